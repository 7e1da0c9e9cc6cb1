"""Recording: the user's body runs on lazy values, and what it does becomes a plan.

`contexts.py` has the `with` blocks, `tape.py` the recording itself, `lazy.py` the values, `recorder.py` what torch calls.
A body that needs numbers (`.item()`, `if`) stops at a sync point; a wave of the run gives it real tensors.
May import: `plan/`, `compat/`, the ground. Start with `contexts.py`, then `tape.py`.
"""
