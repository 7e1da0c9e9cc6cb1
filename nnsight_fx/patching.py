"""`nnsight_fx.patching`, the public name of `analysis/patching.py`."""

from .analysis.patching import *  # noqa: F403
