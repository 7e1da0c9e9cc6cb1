"""Many traces as few runs: traces of a session or cells of a sweep become rows of one batch, or forks of one graph.

`session.py` and `pending.py` put a trace off, `rows.py` proves that the rows of a forward do not meet, `planner.py` says which
traces run together, `batch.py` (hooks) and `forked.py` (captured graphs) run them.
May import: `engine/`, `report/`, `passes/` and what is below them. Start with `session.py`, then `planner.py`.
"""
