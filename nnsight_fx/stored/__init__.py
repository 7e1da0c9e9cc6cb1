"""Plans and edits in files: written as data, checked when they are read, played back on a model.

`plans.py` has `save_plan` and `load_plan`, `edits.py` the same for edits, `file.py` checks a file against a model, `replay.py` records
its operations again in a trace. A file holds no code.
May import: `tracing/`, `envoys/`, `plan/`, the ground. Start with `plans.py`.
"""
