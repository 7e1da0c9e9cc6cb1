"""Every private name of torch and transformers that nnsight_fx uses, one file a subsystem.

May import: torch, transformers, the standard library; nothing of nnsight_fx. Importing it does not load Dynamo.
Start with `dynamo` (capturing a function) and `fakes` (shapes without data).
"""

from . import (
    autograd,
    dynamo,
    fakes,
    frames,
    graphs,
    guards,
    inductor,
    modes,
    modules,
    symbols,
    tensors,
    transformers,
    variables,
)

__all__ = [
    "autograd",
    "dynamo",
    "fakes",
    "frames",
    "graphs",
    "guards",
    "inductor",
    "modes",
    "modules",
    "symbols",
    "tensors",
    "transformers",
    "variables",
]
