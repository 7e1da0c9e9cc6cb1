"""A sweep's job as bytes, for workers in other processes: the model, and the body that refers to it, in one piece.

Functions go by value where they have no module to be imported from (`cloudpickle`); the wrapped model is made anew there, and an
envoy that the body holds is found in it by its path. What was captured and compiled stays here.
"""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Any

import torch

from ..compat.transformers import without_library_hooks
from ..envoys.envoy import Envoy, host_of, path_of
from ..errors import MissingExtraError
from ..lines import user_line

if TYPE_CHECKING:
    import torch.nn as nn


try:
    import cloudpickle
except ImportError:
    cloudpickle = None

# Made by `NNsight.__init__`, or of this process alone.
_OWN = {"_host", "_tree", "_module", "_root", "_path"}


def pack(job: Any) -> bytes:
    """What `unpack` makes a job of."""
    if cloudpickle is None:
        raise MissingExtraError(
            f"{user_line()}: an executor sends bodies to other processes by cloudpickle: pip install 'nnsight-fx[sweep]'."
        )
    if host_of(job.model).edits:
        raise ValueError(
            f"{user_line()}: a model with edits does not go to other processes. Do in the body what the edit does, or run this sweep "
            "without `executor=`."
        )
    buffer = io.BytesIO()
    torch.save(job, buffer, pickle_module=sys.modules[__name__])
    return buffer.getvalue()


def unpack(data: bytes, device: str | None) -> Any:
    """The job, its tensors on a device (where they were, if None)."""
    return torch.load(io.BytesIO(data), map_location=device, weights_only=False)


def _model(cls: type, module: nn.Module, state: dict, compiled: dict | None) -> object:
    return cls.unpacked(module, state, compiled)


def _envoy(root: Envoy, path: str) -> Any:
    return root.get(path)


if cloudpickle is not None:

    class Pickler(cloudpickle.Pickler):
        """What `torch.save` writes a job with."""

        def reducer_override(self, obj: object) -> object:
            if isinstance(obj, torch.nn.Module):
                return without_library_hooks(obj)
            if not isinstance(obj, Envoy):
                return super().reducer_override(obj)
            root: Any = obj.root
            if obj is not root:
                return _envoy, (root, path_of(obj))
            state = {k: v for k, v in vars(root).items() if k not in _OWN}
            capture = host_of(root).compiled
            options = None if capture is None else vars(capture.options) | {"options": dict(capture.options.options)}
            return _model, (type(root), root._module, state, options)
