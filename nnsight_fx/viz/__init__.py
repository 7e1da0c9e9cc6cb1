"""Pictures of runs. Needs the extra `viz`: `pip install "nnsight-fx[viz]"`."""

from .heatmap import heatmap

__all__ = ["heatmap"]
