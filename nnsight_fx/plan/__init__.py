"""The plan: what a body does to a model, as data.

A class a verb (`verbs`), arguments as keys (`keys`), trees of values, the order in which operations take place
(`interleave.Interleaver`), how a plan is
printed, drawn and written to a file. Nothing here runs a model or knows who recorded the plan.
May import: `compat/`, and the ground (`errors`, `lines`, `atomic`). Start with `plan.py`, then `interleave.py`.
"""
