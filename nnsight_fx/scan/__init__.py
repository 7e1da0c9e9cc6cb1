"""The model on fake tensors: which sites it has, in which order they fire, and what shapes they hold.

The recording asks these questions before anything runs. `sites.py` answers them and remembers the answers by the input's
signature; `scan.py` runs the model on fakes; `past.py` makes fakes of the caches of a generation.
May import: `tracing/`, `capture/`, `plan/`, `compat/`, the ground. Start with `sites.py`.
"""
