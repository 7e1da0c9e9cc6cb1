"""Traces of a generation: a wave for each forward of the decode loop of transformers.

May import: `engine/` and what is below it. Start with `generation.py`.
"""
