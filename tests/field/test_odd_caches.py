"""`tracer.cache` over modules that return nothing, or no tensor, or are called several times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

from ..equivalence.harness import ENGINES, same, wrap


class Logs(nn.Module):
    """Returns nothing."""

    def __init__(self):
        super().__init__()
        self.probe = nn.Linear(4, 4)

    def forward(self, x):
        self.probe(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.inner(torch.tanh(self.inner(x))))


class Width(nn.Module):
    """Returns a number."""

    def forward(self, x):
        return x.shape[-1]


class Scale(nn.Module):
    """Takes no tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, 2, 4))

    def forward(self, times):
        return self.weight * times


class Split(nn.Module):
    """Nothing, then a tensor, then a text."""

    def forward(self, x):
        return None, x * 2, "half"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.logs, self.twice, self.width, self.scale, self.split = Logs(), Twice(), Width(), Scale(), Split()
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        self.logs(x)
        for _ in range(2):
            x = self.twice(x) * self.width(x)
        x = x + self.scale(2) + self.split(x)[1]
        self.logs(x)
        return self.last(x)


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


def by_hooks(module: nn.Module, x: torch.Tensor, steer: float = 0.0) -> dict[str, list[tuple]]:
    """`(output, inputs)` of every visit of every module."""
    seen: dict[str, list[tuple]] = {}

    def keep(path: str) -> Any:
        def hook(m, args, kwargs, out):
            if path == "twice":
                out = out + steer
            seen.setdefault(f"model.{path}" if path else "model", []).append((out, (args, kwargs)))
            return out

        return hook

    handles = [m.register_forward_hook(keep(path), with_kwargs=True) for path, m in module.named_modules()]
    module(x)
    for handle in handles:
        handle.remove()
    return seen


def visits(cache: Any) -> dict[str, list[tuple]]:
    return {path: [(e.output, e.inputs) for e in view.visits] for path, view in cache.items()}


def chosen(want: dict, modules: list | None, outputs: bool, given: bool) -> dict:
    wanted = want if modules is None else {f"model.{m}": want[f"model.{m}"] for m in modules}
    return {p: [(out if outputs else None, args if given else None) for out, args in v] for p, v in wanted.items()}


FORMS = [
    (None, True, False),
    (None, True, True),
    (None, False, True),
    (["logs"], True, False),
    (["logs", "logs.probe"], True, True),
    (["twice"], True, False),
    (["twice.inner", "width"], True, True),
    (["width"], True, False),
    (["scale"], False, True),
    (["split", "scale"], True, True),
]


@pytest.mark.parametrize("engine", [*ENGINES, "symbolic"])
@pytest.mark.parametrize(("modules", "outputs", "given"), FORMS)
def test_a_cache_is_what_hooks_see(modules, outputs, given, engine):
    torch.manual_seed(0)
    model = wrap(Net().requires_grad_(False), engine)
    for seed in range(2):
        with model.trace(inputs(seed)) as tracer:
            cache = tracer.cache(modules=modules, include_output=outputs, include_inputs=given)
            for _ in tracer.iter[:2]:
                model.twice.output += 0.5
        want = chosen(by_hooks(model._module, inputs(seed), 0.5), modules, outputs, given)
        same(dict(sorted(visits(cache).items())), dict(sorted(want.items())), engine != "aot_eager")


@pytest.mark.parametrize("engine", ENGINES)
def test_of_one_invoke(engine):
    torch.manual_seed(0)
    model = wrap(Net().requires_grad_(False), engine)
    with model.trace() as tracer:
        with tracer.invoke(inputs(0)):
            first = tracer.cache()
        with tracer.invoke(inputs(1)):
            second = tracer.cache(modules=["logs", "twice", "split"])
    for cache, seed in ((first, 0), (second, 1)):
        want = by_hooks(model._module, inputs(seed))
        for path, found in visits(cache).items():
            same([out for out, _ in found], [out for out, _ in want[path]], False, path)
    assert len(visits(first)) == len(list(model._module.modules()))


@pytest.mark.parametrize("engine", ENGINES)
def test_behind_a_look_and_in_front_of_a_stop(engine):
    torch.manual_seed(0)
    model = wrap(Net().requires_grad_(False), engine)
    with model.trace(inputs(0)) as tracer:
        cache = tracer.cache(modules=["logs", "twice", "last"])
        assert model.twice.output.sum().item() is not None
    want = chosen(by_hooks(model._module, inputs(0)), ["logs", "twice", "last"], True, False)
    same(visits(cache), want, engine != "aot_eager")
    with model.trace(inputs(0)) as tracer:
        cache = tracer.cache(modules=["logs", "twice.inner"])
        model.twice.inner.output.save()
        tracer.stop()
    want = by_hooks(model._module, inputs(0))["model.twice.inner"][0][0]
    assert visits(cache)["model.logs"] == [(None, None)]
    same(visits(cache)["model.twice.inner"], [(want, None)], engine != "aot_eager")
