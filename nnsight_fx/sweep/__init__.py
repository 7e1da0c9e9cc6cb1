"""`model.sweep`: one body over a grid of values, its cells in chunks, stored and resumed, on one machine or many.

`job.py` is the grid, `sweep.py` runs it, `executors.py` says where, `store.py` keeps what is done, `results.py` is what the
user gets. How cells share a forward is the business of `batching/`.
May import: `batching/`, `report/` and what is below them. Start with `sweep.py`.
"""
