"""Plans and edits as files: JSON in the header of a safetensors file that holds the lifted tensors. No pickle, no code."""

from __future__ import annotations

import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from .. import atomic
from ..errors import PlanError

PLAN, EDITS = "nnsight_fx.plan", "nnsight_fx.edits"
VERSION = 2  # of the files and of the dialect in them

_WHAT = {PLAN: "a saved plan", EDITS: "an export of edits"}
_AGAIN = {PLAN: "Save the plan again, from the trace that made it,", EDITS: "Export the edits again"}


def write(path: str | os.PathLike, kind: str, document: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file, or leave what is there: never half of it."""
    document = {"version": VERSION, "torch": torch.__version__, **document}
    atomic.write(path, to_bytes(tensors, {"format": kind, "plan": json.dumps(document)}))


def read(path: str | os.PathLike, kind: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The document and the tensors of a file."""
    what = _WHAT[kind]
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise PlanError(f"`{path}` is not {what}: its header does not say `{kind}`.")
            document = json.loads(metadata["plan"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (clone: aligned)
    except (SafetensorError, ValueError, KeyError) as e:
        if isinstance(e, PlanError):
            raise
        raise PlanError(f"`{path}` is not {what}, or is damaged: {e}") from e
    if not isinstance(document, dict) or document.get("version") != VERSION:
        version = document.get("version") if isinstance(document, dict) else None
        raise PlanError(
            f"`{path}` is {what} of version {version!r}, and this nnsight_fx reads version {VERSION}. "
            f"{_AGAIN[kind]} with this version."
        )
    return document, tensors
