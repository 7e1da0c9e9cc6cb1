"""Traces of a generation: transformers' decode loop runs in a greenlet, and each forward of it is a wave.

`generation.py` stops the loop at each forward and runs the body's lines for it; `generator.py` is `model.generator`.
May import: `engine/` and what is below it. Start with `generation.py`.
"""
