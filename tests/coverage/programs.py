"""What `make coverage` runs on each architecture: six programs, on the hook engine and on the spliced graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

import nnsight_fx
from nnsight_fx import NNsight
from nnsight_fx.plan import tree

from .architectures import ARCHITECTURES, Architecture
from .packaged import PACKAGED

ALL = {a.name: a for a in [*ARCHITECTURES, *PACKAGED]}


@dataclass
class Cell:
    """One program on one architecture."""

    verdict: str  # "equal", "close", "differs", "refused" (alike on both engines), "failed"
    difference: float = 0.0
    note: str = ""
    engine: str = "spliced"  # what ran it on the compiled model: "hooks" where the whole trace fell back

    @property
    def red(self) -> bool:
        return self.verdict in ("differs", "failed")


@dataclass
class Row:
    """What the table says of one architecture."""

    name: str
    kind: str
    cells: dict[str, Cell] = field(default_factory=dict)
    segments: int = 0
    sites: int = 0
    captured: int = 0
    breaks: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    error: str = ""

    @property
    def share(self) -> float:
        return self.captured / self.sites if self.sites else 0.0

    @property
    def whole(self) -> bool:
        """No program fell back to hooks as a whole, and 95 % of the sites are in captured code."""
        return not self.error and self.share >= 0.95 and all(c.engine == "spliced" for c in self.cells.values())

    @property
    def red(self) -> bool:
        return bool(self.error) or any(c.red for c in self.cells.values())


def middle(module: nn.Module) -> str:
    """The path of the middle block: of the list of modules that has the most members."""
    lists = [(len(m), -path.count("."), path) for path, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    count, _, path = max(lists)
    return f"{path}.{count // 2}"


def first(value: Any) -> torch.Tensor:
    """The first floating tensor in a value."""
    return next(x for x in tree.flatten(value)[0] if isinstance(x, torch.Tensor) and x.is_floating_point())


def outputs(value: Any) -> list[torch.Tensor]:
    return [x for x in tree.flatten(value)[0] if isinstance(x, torch.Tensor)]


def called(module: nn.Module, inputs: dict) -> list[str]:
    """The modules that a forward calls once, in the order in which they give their outputs."""
    seen: list[str] = []
    hooks = [m.register_forward_hook(lambda *_, p=path: seen.append(p)) for path, m in module.named_modules() if path]
    try:
        with torch.no_grad():
            module(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [path for path in dict.fromkeys(seen) if seen.count(path) == 1]


def read_all(model: Any, block: str, given: dict, paths: list[str]) -> list:
    with model.trace(**given) as tracer:
        found = nnsight_fx.save([])
        for path in paths:
            found.append(model.get(path).output)
        out = nnsight_fx.save([tracer.result])
    return [*(x for value in found for x in outputs(value)), *outputs(out)]


def steer(model: Any, block: str, given: dict, paths: list[str]) -> list:
    with model.trace(**given) as tracer:
        h = first(model.get(block).output)
        h[:] = h + torch.linspace(-1, 1, h.shape[-1])
        out = nnsight_fx.save([tracer.result])
    return outputs(out)


def skip(model: Any, block: str, given: dict, paths: list[str]) -> list:
    envoy = model.get(block)
    with torch.no_grad(), model.trace(**given):
        whole = nnsight_fx.save([envoy.output])
    value = whole[0]
    with model.trace(**given) as tracer:
        x = envoy.input
        envoy.skip((x, *value[1:]) if isinstance(value, tuple) else x)
        out = nnsight_fx.save([tracer.result])
    return outputs(out)


def stop(model: Any, block: str, given: dict, paths: list[str]) -> list:
    with model.trace(**given) as tracer:
        found = nnsight_fx.save([model.get(block).output])
        tracer.stop()
    return outputs(found)


def gradient(model: Any, block: str, given: dict, paths: list[str]) -> list:
    with model.trace(**given) as tracer:
        h = first(model.get(block).output)
        loss = sum(x.float().pow(2).sum() for x in outputs(tracer.result) if x.is_floating_point() and x.requires_grad)
        found = nnsight_fx.save([h.grad])
        loss.backward()
    return [*found, *(p.grad for p in model._module.parameters() if p.grad is not None)]


def generate(model: Any, block: str, given: dict, paths: list[str]) -> list:
    with model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0) as tracer:
        kept = nnsight_fx.save([])
        for _ in tracer.iter[:]:
            h = first(model.get(block).output)
            h[:] = h + 0.1
            kept.append(h)
        out = tracer.result.save()
    return [*kept, out]


PROGRAMS: dict[str, Callable[..., list]] = {
    "read": read_all, "steer": steer, "skip": skip, "stop": stop, "gradient": gradient, "generate": generate,
}  # fmt: skip


def attempt(program: Callable[..., list], model: Any, *args: Any) -> list | Exception:
    torch.manual_seed(0)
    model._module.zero_grad(set_to_none=True)
    try:
        return [x.detach().clone() for x in program(model, *args)]
    except Exception as e:
        return e


def compare(a: list | Exception, b: list | Exception) -> Cell:
    if isinstance(a, Exception) or isinstance(b, Exception):
        if type(a) is type(b):
            return Cell("refused", note=f"{type(a).__name__}: {str(a)[:160]}")
        odd = a if isinstance(a, Exception) else b
        return Cell("failed", note=f"{'hooks' if odd is a else 'spliced'}: {type(odd).__name__}: {str(odd)[:300]}")
    if len(a) != len(b) or any(x.shape != y.shape or x.dtype != y.dtype for x, y in zip(a, b, strict=True)):
        return Cell("differs", float("inf"), "other shapes")
    gaps = [torch.where(same(x, y), 0, (x.double() - y.double()).abs()) for x, y in zip(a, b, strict=True) if x.numel()]
    largest = max((float(gap.max()) for gap in gaps), default=0.0)
    if all(bool(same(x, y).all()) for x, y in zip(a, b, strict=True)):
        return Cell("equal")
    scale = max((float(y.double().abs().max()) for y in b if y.numel()), default=1.0)
    return Cell("close" if largest <= 1e-5 * max(1.0, scale) else "differs", largest)


def same(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Where two tensors agree; infinities and NaNs do with their like."""
    return (x == y) | ((x != x) & (y != y))


def run(architecture: Architecture, backend: str = "eager") -> Row:
    """All programs on one architecture."""
    row = Row(architecture.name, architecture.kind)
    warnings.simplefilter("ignore")
    try:
        torch.manual_seed(0)
        raw = architecture.build().eval()
        given = architecture.inputs()
        paths = called(raw, given)
        block = architecture.block or middle(raw)
    except Exception as e:
        row.error = f"{type(e).__name__}: {e}"
        return row
    config = getattr(raw, "config", None)
    text = config.get_text_config() if config is not None else None  # of a vision-language model, its language model's
    plain = {**given, "use_cache": False} if hasattr(text, "use_cache") else given  # no objects
    live, spliced = NNsight(raw), NNsight(raw)
    spliced.compile(backend=backend)
    for name, program in PROGRAMS.items():
        if name == "generate" and not architecture.generates:
            continue
        used = given if name == "generate" else plain
        results = [attempt(program, model, block, used, paths) for model in (live, spliced)]
        cell = row.cells[name] = compare(*results)
        facts = spliced.explain().to_dict()
        if cell.verdict in ("equal", "close", "differs"):
            cell.engine = facts["trace"]["engine"]
        if name == "read" and facts["captures"]:
            segments = facts["captures"][0]["segments"]
            inside = {path for segment in segments for path in segment["paths"]}
            sites = [f"{path}.{kind}" for path in paths for kind in ("input", "output")]
            row.segments, row.sites, row.captured = len(segments), len(sites), len(inside.intersection(sites))
            row.breaks = [f"{s['break']['line']}: {s['break']['reason']}" for s in segments if s["break"]]
    captures = spliced.explain().to_dict()["captures"]
    row.fallbacks = list(dict.fromkeys(reason for each in captures for reason in each["fallbacks"]))
    return row


def work(name: str, backend: str) -> Row:
    """One row, in a process of its own."""
    torch.set_num_threads(1)
    try:
        return run(ALL[name], backend)
    except Exception as e:
        return Row(name, ALL[name].kind, error=f"{type(e).__name__}: {e}")
