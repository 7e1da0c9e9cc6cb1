"""Ready-made research, on the public API only: patching grids, a model's parts by family, small helpers.

`patching.py` has the grids, `parts.py` finds attention and MLPs in a model of any family, `places.py` says where to patch.
What stands here could be a user's own script.
May import: every room but `cli/`. Start with `patching.py`.
"""
