"""The captured engine: a plan spliced into the model's graphs, which are captured once for all plans.

`capture.py` holds what is known of one model, `entries.py` what Dynamo compiled for a kind of call, `run.py` runs a plan,
`variants.py` compiles a segment under a plan (in regions, `regions.py`), `steady.py` is the fast path of a plan seen before.
Start with `run.py`, then `entrance.py` and `variants.py`.
"""
