"""The model on fake tensors: which sites it has, in which order they fire, and what shapes they hold.

The recording asks these questions before anything runs. `scanner.py` runs the model on fakes and remembers each scan by the input's
signature, `scan.py` is what one scan found, `wave_sites.py` answers for one recording, `past.py` makes fakes of a generation's cache.
May import: `tracing/`, `capture/`, `plan/`, `compat/`, the ground. Start with `scanner.py`.
"""
