"""Every private name of torch and transformers that nnsight_fx uses, one file a subsystem.

May import: torch, transformers, `errors`. Importing it does not load Dynamo.
Start with `probe`: a `Name` has a way around, which `missing()` and `model.explain()` tell where it is taken. What has none is
`needed`, and an import without it is an `UnsupportedTorchError`: fake tensors and their symbols (`ShapeEnv`), the stacks of
modes, `make_fx`, `Tensor._version`, the swap that makes a recorded tensor the real one. A module's own tables (`_parameters`, `_forward_hooks`, ...) are used in place.
"""

from . import (
    autograd,
    checkpoints,
    dynamo,
    fakes,
    frames,
    given,
    graphs,
    guards,
    inductor,
    modes,
    modules,
    repeats,
    symbols,
    tensors,
    transformers,
    variables,
)
from .probe import missing

__all__ = [
    "autograd",
    "checkpoints",
    "dynamo",
    "fakes",
    "frames",
    "given",
    "graphs",
    "guards",
    "inductor",
    "missing",
    "modes",
    "modules",
    "repeats",
    "symbols",
    "tensors",
    "transformers",
    "variables",
]
