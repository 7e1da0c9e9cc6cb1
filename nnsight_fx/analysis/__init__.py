"""Ready-made research on top of the public API: patching grids, parts of models by family, small helpers.

May import: every room but `cli/`. Start with `patching.py`.
"""
