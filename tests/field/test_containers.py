"""Outputs of classes of their own: a dataclass and a dict at once, subclasses of dict, named tuples, objects."""

from __future__ import annotations

import collections
import dataclasses
import typing
from dataclasses import dataclass

import pytest
import torch
import torch.nn as nn

import nnsight_fx

from ..equivalence.harness import ENGINES, same, wrap


class DictOfFields(collections.OrderedDict):
    """What a dataclass that derives from it has as attributes, it has as items."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)

    def __setattr__(self, name, value):
        if name in self and value is not None:
            super().__setitem__(name, value)
        object.__setattr__(self, name, value)


@dataclass
class Denoised(DictOfFields):
    sample: torch.Tensor
    more: torch.Tensor | None = None


@dataclass
class Pair(DictOfFields):
    sample: torch.Tensor
    more: torch.Tensor


class Items(dict):
    """Items that are attributes, too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Labelled(dict):
    """With an attribute beside its items."""

    def __init__(self, label, **items):
        super().__init__(**items)
        self.label = label

    @property
    def sample(self):
        return self["sample"]


class Named(typing.NamedTuple):
    sample: torch.Tensor
    more: int = 3


Plain = collections.namedtuple("Plain", "sample more")


@dataclass(frozen=True, slots=True)
class Frozen:
    sample: torch.Tensor
    more: torch.Tensor


class Object:
    """A distribution, say."""

    def __init__(self, h):
        self.sample, self.inner = h, {"parts": [Part(h * 2)]}

    def twice(self):
        return self.sample * 2


class Part:
    def __init__(self, h):
        self.h = h


class Counted(collections.defaultdict):
    @property
    def sample(self):
        return self["sample"]


MAKES = {
    "fields and items, one None": lambda h: Denoised(sample=h),
    "fields and items": lambda h: Pair(sample=h, more=h * 2),
    "items as attributes": lambda h: Items(sample=h, more=1),
    "a label beside items": lambda h: Labelled("mine", more=h * 2, sample=h),
    "a defaultdict": lambda h: Counted(list, sample=h),
    "a NamedTuple": lambda h: Named(h),
    "a namedtuple": lambda h: Plain(h, h * 2),
    "frozen with slots": lambda h: Frozen(h, h * 2),
    "an object": Object,
    "in a tuple": lambda h: (Items(more=h * 2, sample=h), h * 3),
}


class Inner(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make, self.linear = make, nn.Linear(4, 4)

    def forward(self, x):
        return self.make(self.linear(x))


class Taking(nn.Module):
    def forward(self, got, factor=2.0):
        return main(got).sample * factor


class Net(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.inner, self.taking = Inner(make), Taking()

    def forward(self, x):
        return self.taking(self.inner(x), factor=3.0)


def main(got):
    """The container of a value that is in a tuple."""
    return got[0] if type(got) is tuple else got


def built(kind: str, engine: str):
    torch.manual_seed(0)
    return wrap(Net(MAKES[kind]).requires_grad_(False), engine)


def plain(value: object) -> bool:
    return type(value) is torch.Tensor


# -- `(model, x) -> values`, and what they are for the output `want` of the inner module -----------------------------------


def read(model, x):
    with model.trace(x):
        h = main(model.inner.output).sample.save()
        out = model.output.save()
    return h, out


def changed_in_place(model, x):
    with model.trace(x):
        main(model.inner.output).sample[:, 0] = 7.0
        out = model.output.save()
    return out[:, 0]


def read_as_input(model, x):
    with model.trace(x):
        h = main(model.taking.input).sample.save()
    return h


def computed(model, x):
    with model.trace(x):
        h = main(model.inner.output).sample
        double = (h * 2).save()
        out = model.output.save()
    return double, out


def looked_at(model, x):
    with model.trace(x):
        total = main(model.inner.output).sample.sum().item()
    return torch.tensor(total)


PROGRAMS = {
    read: lambda h: (h, h * 3),
    changed_in_place: lambda h: torch.full((2,), 21.0),
    read_as_input: lambda h: h,
    computed: lambda h: (h * 2, h * 3),
    looked_at: lambda h: h.sum(),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", MAKES)
def test_values_in_it(kind, engine):
    model = built(kind, engine)
    for program, want in PROGRAMS.items():
        for seed in range(2):
            x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
            h = model._module.inner.linear(x)
            same(program(model, x), want(h), engine != "aot_eager", program.__name__)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", MAKES)
def test_it_is_saved_as_the_models_own(kind, engine):
    model, x = built(kind, engine), torch.randn(2, 4)
    with model.trace(x):
        whole = nnsight_fx.save(model.inner.output)
    want = model._module.inner(x)
    assert type(whole) is type(want)
    got, want = main(whole), main(want)
    assert type(got) is type(want) and plain(got.sample) and torch.equal(got.sample, want.sample)
    if isinstance(want, dict):
        assert list(got) == list(want)
        same(dict(got), dict(want), engine != "aot_eager")
        assert vars(got).keys() == vars(want).keys() and getattr(got, "label", "mine") == "mine"
    if kind == "a defaultdict":
        assert got["new"] == []
    if kind == "fields and items, one None":
        assert got.more is None and got[0] is got.sample is got["sample"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", MAKES)
def test_it_is_written(kind, engine):
    model, x = built(kind, engine), torch.randn(2, 4)
    for _ in range(2):
        with model.trace(x):
            h = main(model.inner.output).sample
            model.inner.output = MAKES[kind](h + 1)
            out = model.output.save()
        same(out, (model._module.inner.linear(x) + 1) * 3, engine != "aot_eager")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", [k for k in MAKES if k[:2] != "a " and k[0] not in "a" and k != "frozen with slots"])
def test_an_item_is_replaced(kind, engine):
    model, x = built(kind, engine), torch.randn(2, 4)
    with model.trace(x):
        got = main(model.inner.output)
        got["sample"] = got["sample"] + 1
        out = model.output.save()
    same(out, (model._module.inner.linear(x) + 1) * 3, engine != "aot_eager")


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_object_has_in_it(engine):
    """Its tensors can be saved, those of objects in it too; its methods give recorded values."""
    model, x = built("an object", engine), torch.randn(2, 4)
    with model.trace(x):
        got = model.inner.output
        part = got.inner["parts"][0].h.save()
        twice = got.twice().save()
        each = [p.h.save() for p in got.inner["parts"]]
        shape = got.sample.shape
        got.sample = got.sample + 1
        out = model.output.save()
    h = model._module.inner.linear(x)
    exact = engine != "aot_eager"
    same([part, twice, *each], [h * 2] * 3, exact)
    same((out, tuple(shape)), ((h + 1) * 3, (2, 4)), exact)
