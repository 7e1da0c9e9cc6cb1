"""Pictures of runs. Needs the extra `viz`: `pip install "nnsight-fx[viz]"`.

`heatmap.py` draws a grid of results, with the tokens beside it. matplotlib is imported only when something is drawn.
May import: the ground. Start with `heatmap.py`.
"""

from .heatmap import heatmap

__all__ = ["heatmap"]
