"""`tracer.bug_report(path)`: all that somebody else needs to see what happened, and nothing of yours."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import zipfile
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as to_bytes

from .. import atomic
from ..compat.guards import guards
from ..plan import tree

if TYPE_CHECKING:
    from ..tracing.contexts import Tracer


PACKAGES = ("nnsight-fx", "torch", "transformers", "safetensors", "greenlet", "numpy", "accelerate", "peft", "triton")


def write(tracer: Tracer, path: str | os.PathLike, inputs: bool = False) -> None:
    """One zip archive: the plan as code, what `explain()` says, the captured segments, what Dynamo
    guards on, and versions.

    No weights, no values, no prompts; with `inputs=True` the tensors that the model was given (`inputs.safetensors`).
    It can be written after an error, too. The file is whole or not there.
    """
    host = tracer.host
    parts: dict[str, str | bytes] = {
        "versions.json": json.dumps(versions(), indent=1),
        "model.txt": f"{host.module}\n",
        "explain.txt": f"{host.model.explain()}\n",
        "explain.json": json.dumps(host.model.explain().to_dict(), indent=1, default=str),
    }
    for i, wave in enumerate(tracer.waves):
        parts[f"plan_{i}.py"] = f"{wave.graph().code}\n"
    captures = host.model.explain().captures
    for i, segment in enumerate(s for capture in captures for s in capture.segments):
        parts[f"segment_{i}.py"] = segment.gm.print_readable(print_output=False)
    entries = [e.inner for capture in captures for e in capture.entries.values() if e.inner is not None]
    parts["guards.txt"] = "\n\n".join(text for inner in entries for text in guards(inner)) + "\n"
    if inputs:
        given = [leaf for wave in tracer.waves for b in wave.batches for leaf in tree.flatten((b.args, b.kwargs))[0]]
        tensors = {f"input_{i}": t.contiguous() for i, t in enumerate(given) if isinstance(t, torch.Tensor)}
        parts["inputs.safetensors"] = to_bytes(tensors)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    atomic.write(path, made.getvalue())


def versions() -> dict[str, object]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # which tells a CPU build from one for CUDA, as its package need not
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"python": platform.python_version(), "system": platform.platform(), "gpu": device, **found}
