"""`model.explain()`: what ran how."""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from .engine.spliced import Capture


class Explanation:
    """Readable as text, `.to_dict()` for tools."""

    def __init__(self, module: nn.Module, captures: list[Capture], current: Capture | None):
        self.module, self.captures, self.current = module, captures, current

    def to_dict(self) -> dict[str, Any]:
        """The same facts as plain data."""
        return {
            "model": type(self.module).__name__,
            "engine": "hooks" if self.current is None else f"spliced, backend={self.current.options.backend}",
            "captures": [self._of(c) for c in self.captures],
        }

    @staticmethod
    def _of(capture: Capture) -> dict[str, Any]:
        return {
            "options": {k: v for k, v in vars(capture.options).items() if v not in (None, (), False)},
            "segments": [
                {
                    "sites": len(s.sites),
                    "first": ".".join(s.sites[0]) if s.sites else "",
                    "variants": sum(map(len, s.variants.values())),
                }
                for s in capture.segments
            ],
            "captures": capture.captures,
            "compiles": capture.compiles,
            "hits": capture.hits,
            "live": sorted(capture.live_sites),
            "fallbacks": list(capture.fallbacks),
            "passes": [
                {"pass": name, "rewrites": rewrites, "nodes": nodes}
                for name, rewrites, nodes in (capture.last or [[]])[-1]
            ],
        }

    def __str__(self) -> str:
        facts = self.to_dict()
        lines = [f"{facts['model']}: {facts['engine']}"]
        for each in facts["captures"]:
            lines.append(f"  {', '.join(f'{k}={v}' for k, v in each['options'].items())}")
            lines.append(
                f"    {each['captures']} segments captured, {each['compiles']} compiles, {each['hits']} cache hits"
            )
            for i, segment in enumerate(each["segments"]):
                lines.append(
                    f"    segment {i}: {segment['sites']} sites from {segment['first']}, {segment['variants']} variants"
                )
            for n, step in enumerate(each["passes"], 1):
                lines.append(f"    pass {n} {step['pass']}: {step['rewrites']} rewrites, {step['nodes']} nodes after")
            for name in each["live"]:
                lines.append(f"    live, between segments: {name}")
            for why in each["fallbacks"]:
                lines.append(f"    fallback: {why}")
        return "\n".join(lines)

    __repr__ = __str__
