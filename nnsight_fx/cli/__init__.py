"""The command `nnsight-fx`: a demo, and a benchmark of a model of the user's.

May import: every room. Start with `command.py`.
"""

from .command import main

__all__ = ["main"]
