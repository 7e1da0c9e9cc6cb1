"""Derivatives of one value of the model by another, for many cotangents: `model.vjp`, `model.jvp`, `model.jacobian`.

The forward runs once. May import: `batching/`, `sweep/` and what is below them. Start with `verbs.py`; what keeps a derivative is
`engine/linear.py`.
"""
