"""What is told of a run: `model.explain()`, the report of a session or sweep, bug reports, and where results came from.

May import: `engine/` and what is below it. Start with `explain.py`.
"""
