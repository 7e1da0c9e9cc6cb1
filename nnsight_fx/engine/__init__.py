"""How a plan runs on a model: on hooks (`run.py`), or spliced into the model's captured graph (`captured/`).

`wave.py` runs one forward of a trace, `switch.py` hands control between a body that looks and the model, `notes.py` keeps what happened,
`deliver.py` gives the values to the user.
May import: `passes/`, `scan/`, `tracing/`, `capture/`, `plan/`, `compat/`, the ground. Start with `wave.py`, then `captured/run.py`.
"""
