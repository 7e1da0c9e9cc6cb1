"""What is told of a run: `model.explain()`, the report of a session or sweep, bug reports, and where results came from.

Runs leave notes (`engine/notes.py`); here they become text. `explain.py` tells one model, `runs.py` many traces, `provenance.py` has
the digests that a stored result carries.
May import: `engine/` and what is below it. Start with `explain.py`.
"""
