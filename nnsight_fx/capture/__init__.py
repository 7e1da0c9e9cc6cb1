"""The model as graphs: a `Segment` for each graph that Dynamo (or the symbolic tracer) makes of it, with a marker at each site.

A marker is a node that stands where a hook would fire (`marker.py`). `markers.py` has the hooks that put them into the model,
`marking.py` what Dynamo reads there, `hook_tables.py` torch's tables. Nothing changes a `Segment`. `source.py` and
`operations.py` make sites of the operations inside a `forward`.
May import: `plan/`, `compat/`, the ground. Start with `segment.py`, then `marker.py` and `markers.py`.
"""
