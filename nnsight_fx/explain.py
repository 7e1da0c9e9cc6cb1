"""`model.explain()`: what ran how."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.nn as nn

from . import compat
from .engine.notes import Notes
from .engine.spliced import Capture

NEAR = 4  # captures left before the recompile limit, from which on it is said


class Explanation:
    """Readable as text, `.to_dict()` for tools.

    For each set of compile options: the captured segments with their sites, why each ended and at which line of the model,
    what runs live between them, the passes of the latest compile with what each rewrote, compiles and cache hits, everything
    that ran outside captured code and why, and the recompile limit when it is near. In front of all that: private names that
    this torch lacks, and what is done instead. Then the latest trace: its sync points
    with their lines, what it saved, and what keeps a forward alive for a backward.
    """

    def __init__(self, module: nn.Module, captures: list[Capture], current: Capture | None, trace: Notes | None = None):
        self.module, self.captures, self.current, self.trace = module, captures, current, trace

    def to_dict(self) -> dict[str, Any]:
        """The same facts as plain data."""
        return {
            "model": type(self.module).__name__,
            "engine": "hooks" if self.current is None else f"spliced, backend={self.current.options.backend}",
            "captures": [_of(c) for c in self.captures],
            "missing": compat.missing(),
            "trace": None if self.trace is None else asdict(self.trace),
        }

    def __str__(self) -> str:
        facts = self.to_dict()
        lines = [f"{facts['model']}: {facts['engine']}"]
        lines += [f"  torch {torch.__version__}: {what}" for what in facts["missing"]]
        for each in facts["captures"]:
            lines += _text(each)
        if self.trace is not None:
            lines += [f"  {line}" for line in str(self.trace).split("\n")]
        return "\n".join(lines)

    __repr__ = __str__


def _of(capture: Capture) -> dict[str, Any]:
    entries = compat.dynamo.recompiles([e.inner for e in capture.entries.values() if e.inner is not None])
    limit = compat.dynamo.patience(len(capture.markers.paths))
    before, report = capture.nodes, capture.last[-1] if capture.last else []
    passes = []
    for name, rewrites, nodes in report:
        passes.append({"pass": name, "rewrites": rewrites, "nodes": nodes, "change": nodes - before})
        before = nodes
    return {
        "options": {k: v for k, v in vars(capture.options).items() if v not in (None, (), False, "dynamo")},
        "segments": [
            {
                "sites": len(s.sites),
                "first": ".".join(filter(None, s.sites[0])) if s.sites else "",
                "last": ".".join(filter(None, s.sites[-1])) if s.sites else "",
                "paths": [".".join(filter(None, at)) for at in s.sites],
                "variants": sum(map(len, s.variants.values())),
                "break": None if s.ended is None else {"reason": s.ended.reason, "line": s.ended.line},
            }
            for s in capture.segments
        ],
        "captures": capture.captures,
        "compiles": capture.compiles,
        "regions": sum(len(made) for s in capture.segments for made in s.regions.values()),
        "hits": capture.hits,
        "recompiles": {"most": entries, "limit": limit},
        "live": sorted(capture.live_sites),
        "fallbacks": list(capture.fallbacks),
        "passes": passes,
        "whole": capture.whole,
        "few_rows": capture.few_rows,
        "cuda_graphs": None if not capture.options.replays else capture.unrecorded,
    }


def _text(facts: dict[str, Any]) -> list[str]:
    lines = [f"  {', '.join(f'{k}={v}' for k, v in facts['options'].items())}"]
    lines.append(f"    {facts['captures']} segments captured, {facts['compiles']} compiles, {facts['hits']} cache hits")
    if facts["regions"]:
        lines.append(f"    equal blocks share {facts['regions']} compiled regions")
    for i, segment in enumerate(facts["segments"]):
        span = f" from {segment['first']} to {segment['last']}" if segment["sites"] else ""
        lines.append(f"    segment {i}: {segment['sites']} sites{span}, {segment['variants']} variants")
        if segment["break"]:
            lines.append(f"      graph break at {segment['break']['line']}: {segment['break']['reason']}")
    lines += [f"    live, between segments: {name}" for name in facts["live"]]
    for n, step in enumerate(facts["passes"], 1):
        lines.append(
            f"    pass {n} {step['pass']}: {step['rewrites']} rewrites, {step['nodes']} nodes ({step['change']:+d})"
        )
    if facts["few_rows"]:
        lines.append(
            "    products of few rows with a large weight are done in blocks or by oneDNN (`options={'post_grad_custom_post_pass': None}`: by MKL)"
        )
    if facts["whole"] is not None:
        lines.append(f"    compiled in one piece: {facts['whole']}")
    lines += [f"    no CUDA graph: {why}" for why in facts["cuda_graphs"] or ()]
    lines += [f"    fallback: {why}" for why in facts["fallbacks"]]
    most, limit = facts["recompiles"]["most"], facts["recompiles"]["limit"]
    if most > limit - NEAR:
        lines.append(
            f"    one entry was captured {most} times, and at {limit} Dynamo gives up: let sizes be dynamic (`dynamic=True`), or pad them"
        )
    return lines
