"""The model as graphs: a `Segment` for each graph that Dynamo (or the symbolic tracer) makes of it, with a marker at each site.

A marker is a node that stands where a hook would fire. `markers.py` puts them into the model, `segment.py` is a captured
graph that nothing changes, `source.py` and `operations.py` make sites of the operations inside a `forward`.
May import: `plan/`, `compat/`, the ground. Start with `segment.py`, then `markers.py`.
"""
