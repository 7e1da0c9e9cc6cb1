"""`model.explain()`: what ran how."""

from __future__ import annotations

import torch
import torch.nn as nn

from .. import compat
from ..engine.captured.capture import Capture
from ..engine.clock import seconds
from ..engine.notes import Notes
from ..engine.notes import facts as facts_of
from .runs import Report

SHAPES = 16  # rows of what capturing and compiling took: the latest
NEAR = 4  # captures left before the recompile limit, from which on it is said


class Explanation:
    """Readable as text, `.to_dict()` for tools.

    For each set of compile options: the captured segments with their sites, why each ended and at which line of the model,
    what runs live between them, the passes of the latest compile with what each rewrote, compiles and cache hits, everything
    that ran outside captured code and why, and the recompile limit when it is near. In front of all that: private names that
    this torch lacks, and what is done instead. Then what ran last. A trace, generation or program: its sync points with their
    lines, what it saved, and what keeps a forward alive for a backward. A session, sweep, harvest or ready-made experiment: how
    many traces ran on which engine, together or one by one and why, and what was compiled for them.
    """

    def __init__(
        self, module: nn.Module, captures: list[Capture], current: Capture | None, latest: Notes | Report | None = None
    ):
        self.module, self.captures, self.current, self.latest = module, captures, current, latest

    def to_dict(self) -> dict:
        """The same facts as plain data."""
        return {
            "model": type(self.module).__name__,
            "engine": "hooks" if self.current is None else f"spliced, backend={self.current.options.backend}",
            "captures": [_of(c) for c in self.captures],
            "missing": compat.missing(),
            "trace": facts_of(self.latest) if isinstance(self.latest, Notes) else None,
            "run": self.latest.to_dict() if isinstance(self.latest, Report) else None,
        }

    def __str__(self) -> str:
        facts = self.to_dict()
        lines = [f"{facts['model']}: {facts['engine']}{self._so_far()}"]
        lines += [f"  torch {torch.__version__}: {what}" for what in facts["missing"]]
        for each in facts["captures"]:
            lines += _text(each)
        if self.latest is not None:
            lines += [f"  {line}" for line in str(self.latest).split("\n")]
        return "\n".join(lines)

    __repr__ = __str__

    def _so_far(self) -> str:
        """What is compiled by its options alone."""
        current = self.current
        unable = current is not None and current.fallbacks and not (current.segments or current.row_graphs)
        return "; all ran on hooks so far, see below" if unable else ""


def _of(capture: Capture) -> dict:
    entries = compat.dynamo.recompiles([e.inner for e in capture.entries.values() if e.inner is not None])
    limit = compat.dynamo.patience(len(capture.markers.paths))
    before, report = capture.nodes, capture.last[-1] if capture.last else []
    passes = []
    for name, rewrites, nodes in report:
        passes.append({"pass": name, "rewrites": rewrites, "nodes": nodes, "change": nodes - before})
        before = nodes
    return {
        "options": {
            k: _plain(v) for k, v in vars(capture.options).items() if v not in (None, (), False, "dynamo", frozenset())
        },
        "segments": [
            {
                "sites": len(s.sites),
                "first": ".".join(filter(None, s.sites[0])) if s.sites else "",
                "last": ".".join(filter(None, s.sites[-1])) if s.sites else "",
                "paths": [".".join(filter(None, at)) for at in s.sites],
                "variants": sum(map(len, s.variants.values())),
                "repeated": s.repeated,
                "break": None if s.ended is None else {"reason": s.ended.reason, "line": s.ended.line},
            }
            for s in capture.segments
        ],
        "row_graphs": [{"sites": len(s.sites), "shape": shape} for s, shape in capture.row_graphs.items()],
        "captures": capture.captures,
        "compiles": capture.compiles,
        "seconds": {what: round(s, 3) for what, s in capture.ledger.seconds.items()},
        "spent": capture.ledger.by_shape(),
        "regions": sum(len(made) for s in capture.segments for made in s.regions.values()),
        "hits": capture.hits,
        "recompiles": {"most": entries, "limit": limit},
        "live": sorted(capture.live_sites),
        "fallbacks": list(capture.fallbacks),
        "passes": passes,
        "whole": capture.whole,
        "few_rows": capture.builder.few_rows,
        "cuda_graphs": None if not capture.options.replays else capture.builder.unrecorded,
    }


def _plain(option: object) -> object:
    """An option as data: passes by their names."""
    if isinstance(option, frozenset):
        return sorted(option)
    if isinstance(option, tuple) and all(map(callable, option)):
        return [getattr(step, "__name__", repr(step)) for step in option]
    return option


def _text(facts: dict) -> list[str]:
    lines = [f"  {', '.join(f'{k}={v}' for k, v in facts['options'].items())}"]
    spent = facts["seconds"]
    lines.append(
        f"    {facts['captures']} segments captured{_took(spent['capture'])}, {facts['compiles']} compiles"
        f"{_took(spent['compile'])}, {facts['hits']} cache hits"
    )
    for row in facts["spent"][-SHAPES:]:
        done = [
            f"{row[f'{what}s']} {what}{'s' * (row[f'{what}s'] != 1)} in {seconds(row[f'{what}_s'])}"
            for what in ("capture", "compile")
            if row[f"{what}s"]
        ]
        lines.append(f"      for {row['shape']}, at {row['plan']}: {', '.join(done)}")
    if facts["regions"]:
        lines.append(f"    equal blocks share {facts['regions']} compiled regions")
    for i, segment in enumerate(facts["segments"]):
        span = f" from {segment['first']} to {segment['last']}" if segment["sites"] else ""
        alike = f"; {segment['repeated']} blocks repeat another's capture" if segment["repeated"] else ""
        lines.append(f"    segment {i}: {segment['sites']} sites{span}, {segment['variants']} variants{alike}")
        if segment["break"]:
            lines.append(f"      graph break at {segment['break']['line']}: {segment['break']['reason']}")
    lines += [
        f"    graph for any number of rows ({graph['shape']}): {graph['sites']} sites" for graph in facts["row_graphs"]
    ]
    lines += [f"    live, between segments: {name}" for name in facts["live"]]
    idle = [f"{n} {step['pass']}" for n, step in enumerate(facts["passes"], 1) if not step["rewrites"]]
    for n, step in enumerate(facts["passes"], 1):
        if step["rewrites"]:
            lines.append(
                f"    pass {n} {step['pass']}: {step['rewrites']} rewrites, {step['nodes']} nodes ({step['change']:+d})"
            )
    if idle:
        lines.append(f"    passes with nothing to rewrite: {', '.join(idle)}")
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


def _took(s: float) -> str:
    return f" in {seconds(s)}" if s >= 0.05 else ""
