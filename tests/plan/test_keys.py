"""`plan.keys`, `plan.verbs`: what is not the same is not equal, and every verb and key goes through what all go through."""

import dataclasses
import itertools
import typing

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, assert_max_compiles, save
from nnsight_fx.plan import keys, verbs
from nnsight_fx.plan.differences import stable
from nnsight_fx.plan.encode import encode
from nnsight_fx.plan.keys import (
    Container,
    Identity,
    Items,
    Named,
    NumberSlot,
    Plain,
    SizeExpr,
    Span,
    TensorSlot,
    Value,
    decode,
    leaves,
    mapped,
    references,
    slots,
)

ONE = Plain(int, 1)
EACH = [
    Value(0, 1),
    TensorSlot(0, ()),
    NumberSlot(0, "int"),
    ONE,
    SizeExpr(1),
    Identity(torch.add),
    Items(tuple, ()),
    Items(list, ()),
    Named((), ()),
    Span(ONE, ONE, ONE),
    Container("dict", dict, (), ()),
]
NESTED = Items(
    tuple, (Named(("v", "c"), (Value(3, 0), TensorSlot(1, ()))), Span(Value(2, 1), ONE, NumberSlot(4, "int")))
)


def test_there_is_one_of_each_kind():
    assert {type(key) for key in EACH} == set(typing.get_args(keys.Key))


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(EACH, 2)), ids=str)
def test_keys_of_different_kinds_are_not_equal(a, b):
    assert a != b and stable(a) != stable(b)


def test_leaves_are_found_in_everything():
    assert leaves(NESTED) == [Value(3, 0), TensorSlot(1, ()), Value(2, 1), ONE, NumberSlot(4, "int")]
    assert references(NESTED) == {(3, 0), (2, 1)} and slots(NESTED) == [1, 4]
    moved = mapped(NESTED, lambda key: Value(key.op + 10, key.leaf) if isinstance(key, Value) else key)
    assert references(moved) == {(13, 0), (12, 1)} and slots(moved) == [1, 4]
    assert mapped(NESTED, lambda key: key) == NESTED


@pytest.mark.parametrize(
    "value", [float("nan"), -0.0, 1, True, "v", None, ..., torch.float16, (1, [2.5]), {"v": 1}, slice(1, None)], ids=str
)
def test_what_is_encoded_is_decoded(value):
    found = decode(encode(value, Identity, Identity), lambda key: pytest.fail("it needs nothing"))
    assert repr(found) == repr(value)


def test_bools_and_numbers_are_not_one():
    assert len({encode(x, Identity, Identity) for x in (1, True, 1.0, "1")}) == 4


VERBS = [verb for verb in vars(verbs).values() if isinstance(verb, type) and dataclasses.is_dataclass(verb)]
GIVEN = {"site": ("0", "output", 0), "fn": Identity(torch.add), "path": "0", "spec": None, "leaf": 0, "batched": None}


def of(verb):
    wanted = [f.name for f in dataclasses.fields(verb) if f.default is dataclasses.MISSING]
    return verb(**{name: GIVEN.get(name, verbs.Observation(())) for name in wanted})


def test_every_verb_has_a_name_of_its_own_and_hashes_by_what_it_says():
    made = [of(verb) for verb in VERBS if verb is not verbs.AtSite]
    assert len({verb.name for verb in made}) == len(made) > 15
    assert len(set(made)) == len(made) and all(hash(of(type(verb))) == hash(verb) for verb in made)
    assert all(verb != other for verb, other in itertools.combinations(made, 2))
    for verb in made:
        with pytest.raises((dataclasses.FrozenInstanceError, TypeError, AttributeError)):
            verb.name = "other"


@pytest.mark.parametrize("engine", [None, "eager", "aot_eager"])
def test_a_dict_may_have_any_names(engine):
    """Keys were tagged tuples once, and a dict with the names of tags was taken for one."""
    model = NNsight(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    if engine:
        model.compile(backend=engine)
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    with torch.no_grad(), model.trace(x) as tracer:
        h = model[0].output
        given = {"v": h, "k": 2, "c": h + 1, "n": None, "s": "t", "o": (h, 3)}
        got = save(tracer.apply(lambda d: d["v"] * d["k"] + d["c"] + d["o"][0], given))
    h = model._module[0](x)
    torch.testing.assert_close(got, (h * 2 + h + 1 + h).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_integers_that_scale_do_not_compile_anew(engine, dtype):
    """In arithmetic with floats an integer is lifted, as a float is; exponents and what is filled in are structure."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype).requires_grad_(False)
    x = torch.linspace(-1, 1, 8).reshape(2, 4).to(dtype)
    model = NNsight(net)
    model.compile(backend=engine)
    with assert_max_compiles(1):
        for i in (2, 0, 1, -7, 1000, 2**40):
            with torch.no_grad(), model.trace(x):
                h = model[0].output
                h *= i
                got = ((i - h * 3) / max(i, 1) + i).save()
                model[0].output = got
                out = model[1].output.save()
            h = net[0](x) * i
            want = (i - h * 3) / max(i, 1) + i
            assert torch.equal(got, want)
            torch.testing.assert_close(out, net[1](want))


def test_an_integer_that_no_float_is_and_one_beside_integers_are_structure():
    model = NNsight(nn.Linear(2, 2))
    with model.trace(torch.ones(1, 2)) as tracer:
        h = model.output
        kept = save([h + (2**53 + 1), h.argmax(-1) + 3, h**2, torch.where(h > 0, h, 0)])
    assert len(kept) == 4 and len(tracer.graph.constants) == 0
