"""What a user writes on: `model.layers[5].output`, `.input`, `.skip`, `.source.attention_0.output`.

An envoy stands for a module, an operation for a line inside a `forward`. Both hand reads and writes to the tape of the trace
that is open.
May import: `tracing/`, `capture/`, `plan/`, the ground. Start with `envoy.py`.
"""
