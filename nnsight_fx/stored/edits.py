"""Edits as files: `model.export_edits(...)` here, `model.import_edits(...)` in another process."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..envoys.envoy import host_of
from ..errors import PlanError
from ..lines import user_line
from ..plan import files
from ..plan.forms import EDIT_KINDS, ambient_of
from ..plan.keys import Identity
from ..plan.names import effect_of
from ..plan.operators import table
from ..plan.verbs import Barrier, Call, CallModule, Read, Skip, StopRun, Verb, Write
from ..plan.writing import EditWriter
from ..tracing.draft import Draft, Turn
from .file import Stored, arguments, line_of, undamaged

FOLDER = "~/.cache/nnsight_fx/edits"


def place(model: Any, name: str | None, export_dir: str | os.PathLike | None, variant: str) -> str:
    """The file of a variant: `<export_dir>/<name>/<variant>.safetensors`."""
    known = getattr(getattr(model._module, "config", None), "name_or_path", "")
    name = str(name or known or type(model._module).__name__)
    folder = os.path.expanduser(FOLDER) if export_dir is None else os.fspath(export_dir)
    return os.path.join(folder, name.strip(os.sep).replace(os.sep, "_").replace("/", "_"), f"{variant}.safetensors")


def export(model: Any, path: str) -> None:
    """Write the edits of a model."""
    if not host_of(model).edits:
        raise PlanError(f"{user_line()}: this model has no edits to export; make one first (`model.edit()`).")
    module = model._module
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    parameters = {id(tensor): name for name, tensor in tensors}
    writers = [EditWriter(draft, parameters, model.device, f"{i}.") for i, draft in enumerate(host_of(model).edits)]
    edits = [writer.document() for writer in writers]
    held: dict[str, torch.Tensor] = {}
    for writer in writers:
        held |= writer.tensors
    os.makedirs(os.path.dirname(path), exist_ok=True)
    files.write(path, files.EDITS, {"model": type(module).__name__, "edits": edits}, held)


def imported(model: Any, path: str) -> list[Draft]:
    """The edits in a file, for a model."""
    if not os.path.exists(path):
        folder = os.path.dirname(path)
        there = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        known = ", ".join(f"`{f.removesuffix('.safetensors')}`" for f in there if f.endswith(".safetensors"))
        raise PlanError(
            f"{user_line()}: there are no exported edits at `{path}`; "
            + (f"there is {known} (`variant=`)." if known else "export them there first (`model.export_edits(...)`).")
        )
    document, tensors = files.read(path, files.EDITS)
    functions = {**table(), "getattr": getattr, "setattr": setattr}
    with undamaged(path):
        return [_draft(Stored(path, edit, tensors, model, EDIT_KINDS, functions)) for edit in document["edits"]]


def _draft(stored: Stored) -> Draft:
    """The edit, as if it had just been recorded."""
    draft, values = Draft(), []
    for op in stored.operations:
        args, kwargs = arguments(op, lambda n, leaf: values[n], stored.constant)
        draft.turn = Turn(*op["turn"]) if "turn" in op else None
        values.append(draft.add(_verb(stored, op, args, kwargs), tuple(args), kwargs))
        draft.ops[-1] = draft.ops[-1]._replace(ambient=ambient_of(op.get("ambient")))
        draft.lines[-1] = line_of(op)
    draft.open = False
    return draft


def _verb(stored: Stored, op: dict, args: list, kwargs: dict) -> Verb:
    """What an operation of a file does."""
    kind: str = op["kind"]
    target: Any = op.get("target")
    if kind == Call.name:
        changes = target == "setattr"
        effect = "inplace" if changes else effect_of(target.rpartition(".")[2], kwargs, tuple(args))
        return Call(Identity(stored.functions[target]), effect)
    if kind == Read.name:
        return Read(tuple(target), first=op["first"])
    if kind == Write.name:
        return Write(tuple(target), first=op["first"])
    if kind == Skip.name:
        return Skip(tuple(target))
    if kind == CallModule.name:
        return CallModule(target, Identity(stored.model._module.get_submodule(target)) if op["hook"] else None)
    return StopRun() if kind == StopRun.name else Barrier()
