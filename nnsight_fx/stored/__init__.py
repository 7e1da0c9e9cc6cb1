"""Plans and edits in files: written as data, checked when they are read, played back on a model.

May import: `tracing/`, `envoys/`, `plan/`, the ground. Start with `plans.py`.
"""
