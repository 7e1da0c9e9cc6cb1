"""Texts of nnsight's users: `.output` beside a child of that name, edits that iterate, constants as wide as the batch."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn as nn
from transformers import (
    BertConfig,
    BertModel,
    ElectraConfig,
    ElectraModel,
    EsmConfig,
    EsmModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import nnsight_fx
from nnsight_fx import LanguageModel, NestedTraceError, NNsight, NotRecordableError

ENGINES = ["hooks", "eager", "aot_eager"]
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
pytestmark = pytest.mark.xdist_group("nnsight users")


def wrap(module: nn.Module, engine: str, kind: Any = LanguageModel, **options: Any) -> Any:
    model = kind(module.eval().requires_grad_(False))
    if engine != "hooks":
        model.compile(backend=engine, **options)
    return model


def gpt2(layers: int = 2) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=16, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0))  # fmt: skip


# -- `.output` --------------------------------------------------------------------------------------------------------

NAMED = {
    "BERT": (lambda: BertModel(BertConfig(vocab_size=50, **SIZES)), "encoder.layer.0", torch.tensor([[5, 6, 7]])),
    "ESM": (
        lambda: EsmModel(EsmConfig(vocab_size=50, pad_token_id=1, mask_token_id=2, position_embedding_type="rotary", **SIZES)),
        "encoder.layer.0",
        torch.tensor([[5, 6, 7]]),
    ),
    "ELECTRA": (lambda: ElectraModel(ElectraConfig(vocab_size=50, embedding_size=16, **SIZES)), "encoder.layer.1", torch.tensor([[5, 6, 7]])),
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", list(NAMED))
def test_a_child_called_output(name: str, engine: str) -> None:
    torch.manual_seed(0)
    make, path, given = NAMED[name]
    module = make()
    model = wrap(module, engine, NNsight)
    seen: dict[str, torch.Tensor] = {}
    layer = module.get_submodule(path)
    handles = [m.register_forward_hook(lambda m, a, o, n=n: seen.update({n: o})) for n, m in (("layer", layer), ("child", layer.output))]  # fmt: skip
    with torch.no_grad():
        module(given)
    for handle in handles:
        handle.remove()
    with warnings.catch_warnings(), model.trace(given):
        warnings.simplefilter("error")
        layer = model.get(path)
        value, child = nnsight_fx.save(layer.output), nnsight_fx.save(layer.E_output.output)
        assert layer["output"] is layer.E_output is model.get(f"{path}.output")
    first = [x[0] if isinstance(x, tuple) else x for x in (value, seen["layer"], child, seen["child"])]
    assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3])


def test_the_old_name_warns() -> None:
    model = wrap(NAMED["BERT"][0](), "hooks", NNsight)
    with pytest.warns(FutureWarning, match=r"`.nns_output` goes in the next release; `.output` is the same now"):
        with model.trace(torch.tensor([[5, 6]])):
            old = model.encoder.layer[0].nns_output
            assert old is model.encoder.layer[0].output
    with pytest.warns(FutureWarning), model.trace(torch.tensor([[5, 6]])):
        model.encoder.layer[0].nns_output = model.encoder.layer[0].output * 0
        out = model.encoder.layer[0].output.save()
    assert not out.any()


@functools.cache
def generator(engine: str) -> Any:
    """One model for the tests of generation, with what was captured of it."""
    return wrap(gpt2(), engine)


# -- edits that iterate -----------------------------------------------------------------------------------------------

VECTOR = torch.randn(16, generator=torch.Generator().manual_seed(1)) * 5
IDS = torch.tensor([[3, 4, 5, 6]])
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CHOSEN: dict[str, tuple[Any, Any]] = {
    "all": (slice(None), lambda k: True),
    "from the third": (slice(2, None), lambda k: k >= 2),
    "every other": (slice(0, None, 2), lambda k: k % 2 == 0),
    "two of them": (slice(1, 3), lambda k: 1 <= k < 3),
    "a list": ([0, 3], lambda k: k in (0, 3)),
}


@pytest.mark.parametrize("engine", ["hooks", "eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(CHOSEN))
def test_an_edit_that_iterates(name: str, engine: str, tmp_path: Any) -> None:
    chosen, holds = CHOSEN[name]
    model, n = generator(engine), [0]
    module = model._module

    def hook(m: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        n[0] += 1
        return out + VECTOR if holds(n[0] - 1) else out

    handle = module.transformer.h[0].register_forward_hook(hook)
    want = module.generate(IDS, attention_mask=torch.ones_like(IDS), **OPTIONS)
    handle.remove()
    with model.edit() as (tracer, edited):
        for _ in tracer.iter[chosen]:
            edited.transformer.h[0].output += VECTOR
    edited.export_edits("steered", tmp_path)
    model.import_edits("steered", tmp_path)
    for each in (edited, model):
        with each.generate(IDS, **OPTIONS) as tracer:
            ids = tracer.result.save()
        assert torch.equal(ids, want)
    model.clear_edits()
    with edited.trace(IDS):
        first = edited.transformer.h[0].output.save()
    with torch.no_grad():
        clean = module.transformer(IDS, output_hidden_states=True).hidden_states[1]
    assert torch.equal(first, clean + VECTOR if holds(0) else clean)


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_an_edit_that_draws_draws_in_every_forward(engine: str) -> None:
    model = generator(engine)
    module = model._module
    handle = module.transformer.h[0].register_forward_hook(lambda m, a, o: o + 5 * torch.randn(16))
    torch.manual_seed(7)
    want = module.generate(IDS, attention_mask=torch.ones_like(IDS), **OPTIONS)
    handle.remove()
    with model.edit() as edited:
        edited.transformer.h[0].output += 5 * torch.randn(16)
    torch.manual_seed(7)
    with edited.generate(IDS, **OPTIONS) as tracer:
        seen = nnsight_fx.save([])
        for _ in tracer.iter[:]:
            seen.append(edited.transformer.h[0].output[0, -1])
        ids = tracer.result.save()
    assert torch.equal(ids, want) and len(seen) == OPTIONS["max_new_tokens"]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_edit_that_iterates_and_skips(engine: str) -> None:
    """The body's first operation is a skip: its occurrences are those of the module's calls."""
    torch.manual_seed(0)
    block = nn.Linear(4, 4)
    module = nn.Sequential(block, block, block).requires_grad_(False)
    model, x = wrap(module, engine, NNsight), torch.randn(2, 4)
    with model.edit() as (tracer, edited):
        for step in tracer.iter[1:3]:
            edited[0].skip(torch.full((2, 4), float(step)))
    with edited.trace(x):
        out = edited.output.save()
    assert torch.equal(out, torch.full((2, 4), 2.0))


def test_a_number_that_an_edit_does_not_have() -> None:
    model = wrap(gpt2(), "hooks")
    with pytest.raises(NotRecordableError, match="is recorded once, for all occurrences, so `step` is"):
        with model.edit() as (tracer, edited):
            for step in tracer.all():
                edited.transformer.h[0].output *= 1 + step
    with model.edit() as (tracer, edited):
        for step in tracer.iter[:2]:
            edited.transformer.h[0].output *= 1 + step
        with tracer.iter[3]:
            edited.transformer.h[0].output += VECTOR
        with pytest.raises(ValueError, match="is for one occurrence"):
            with tracer.iter[:]:
                pass
    with edited.generate(IDS, **OPTIONS) as tracer:
        tracer.result.save()


def test_what_an_edit_binds() -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "hooks", NNsight)
    with model.edit() as edited:
        a, b = edited
        a.output[:] = 0
    assert type(a).__name__ == "Envoy" and edited is not model
    with contextlib.ExitStack() as stack:
        tracer, copy = stack.enter_context(model.edit())
        copy[0].output[:] = 0
    with model.edit() as (
        tracer,
        copy,
    ):
        first, second = copy
        copy[1].output[:] = 0
    assert type(tracer).__name__ == "Editor" and type(first).__name__ == "Envoy" and second is copy[1]
    with model.edit() as edited:
        assert [type(child).__name__ for child in edited] == ["Envoy", "Envoy"]


# -- `.save()` on whatever a body made ----------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_values_behind_a_look_have_a_save(engine: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model, x = wrap(module, engine, NNsight), torch.randn(2, 4)
    first = module[0](x)
    with model.trace(x):
        h = model[0].output
        positive = h[h > 0].save()
        places = h.nonzero().save()
        twice = (positive * 2).save()
        split = [part.save() for part in positive.sort()]
        copied = pickle.loads(pickle.dumps(twice))
        with pytest.raises(AttributeError, match=r"this tensor is a copy, which has no `.save\(\)`; `nnsight_fx.save"):
            copied.save()
        count = nnsight_fx.save(torch.tensor(h.argmax().item()))
        out = model[1].output.save()
    assert torch.equal(positive, first[first > 0]) and torch.equal(places, first.nonzero())
    assert (
        copied.equal(twice)
        and torch.equal(twice, positive * 2)
        and torch.equal(split[0], positive.sort()[0])
        and count == first.argmax()
    )
    assert torch.equal(out, module(x))
    for each in (positive, places, twice, *split):
        assert type(each) is torch.Tensor and not hasattr(each, "save")


@pytest.mark.parametrize("engine", ENGINES)
def test_values_between_the_traces_of_a_session_have_a_save(engine: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model, x = wrap(module, engine, NNsight), torch.randn(2, 4)
    with model.session():
        with model.trace(x):
            h = model[0].output
        twice, positive = (h * 2).save(), h[h > 0].save()
        with model.trace(x):
            model[0].output += twice
            out = model[1].output.save()
    first = module[0](x)
    assert torch.equal(twice, first * 2) and torch.equal(positive, first[first > 0])
    assert torch.equal(out, module[1](first + first * 2))
    assert not hasattr(twice, "save") and not hasattr(positive, "save")


# -- other texts ------------------------------------------------------------------------------------------------------


def in_place(block: Any, steer: torch.Tensor) -> None:
    h = block.output
    h += steer


def assigned(block: Any, steer: torch.Tensor) -> None:
    block.output = block.output + steer


def by_a_slice(block: Any, steer: torch.Tensor) -> None:
    block.output[:] = block.output + steer


@pytest.mark.parametrize("engine", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.inductor])])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "tokens"])
def test_a_constant_as_wide_as_the_batch(dim: int, engine: str) -> None:
    """Steering with a tensor of the batch's rows, or of the prompt's tokens, block by block: its size follows the batch's."""
    module = gpt2(3)
    model = wrap(module, engine, regional=True)
    for write in (in_place, assigned, by_a_slice):
        for n in (2, 3, 5, 7):
            ids = torch.randint(1, 50, (n, 4) if dim == 0 else (3, n), generator=torch.Generator().manual_seed(n))
            steer = torch.randn((n, 1, 16) if dim == 0 else (1, n, 16), generator=torch.Generator().manual_seed(n + 1))
            known = contextlib.nullcontext() if n in (2, 3) else nnsight_fx.assert_max_compiles(0)
            with known, torch.no_grad(), model.trace(ids):
                write(model.transformer.h[1], steer)
                logits = model.lm_head.output.save()
            handle = module.transformer.h[1].register_forward_hook(lambda m, a, o, steer=steer: o + steer)
            with torch.no_grad():
                want = module(ids).logits
            handle.remove()
            torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


FOLLOWED = {  # `(h, n) -> h`, for a batch (n, 4, 6) and for a prompt (2, n, 6)
    "a mask": lambda h, n, dim: h * (torch.arange(n) % 2).reshape((n, 1, 1) if dim == 0 else (n, 1)),
    "a table": lambda h, n, dim: h + torch.linspace(0, 1, n * 6).reshape((n, 1, 6) if dim == 0 else (n, 6)),
    "chosen": lambda h, n, dim: torch.where(torch.arange(n).reshape((n, 1, 1) if dim == 0 else (n, 1)) > 1, h, -h),
    "a product": lambda h, n, dim: torch.eye(n) @ h if dim else torch.einsum("nm,mtd->ntd", torch.eye(n) * 2, h),
    "a row of each": lambda h, n, dim: torch.cat([h, torch.ones((n, 1, 6) if dim == 0 else (2, n, 6))], 1).narrow(1, 0, 4 if dim == 0 else 2),
    "transposed": lambda h, n, dim: h + torch.arange(6.0 * n).reshape(6, n).T.reshape((n, 1, 6) if dim == 0 else (n, 6)),
    "as wide as the model, too": lambda h, n, dim: h @ torch.eye(6) + torch.arange(6.0),
}  # fmt: skip


@functools.cache
def table(engine: str) -> Any:
    torch.manual_seed(0)
    return wrap(Table(), engine, NNsight, dynamic=True)


@pytest.mark.parametrize("engine", ["hooks", "eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "tokens"])
@pytest.mark.parametrize("name", list(FOLLOWED))
def test_constants_whose_sizes_change(name: str, dim: int, engine: str) -> None:
    model, change = table(engine), FOLLOWED[name]
    module = model._module
    for n in (4, 6, 9, 2, 1):  # 4 is as wide as the other dimension, 6 as the model
        x = torch.randn((n, 4, 6) if dim == 0 else (2, n, 6))
        with torch.no_grad(), model.trace(x):
            model.up.output = change(model.up.output, n, dim)
            out = model.output.save()
        handle = module.up.register_forward_hook(lambda m, a, o, n=n: change(o, n, dim))
        with torch.no_grad():
            want = module(x)
        handle.remove()
        torch.testing.assert_close(out, want, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.inductor
def test_constants_of_one_size_and_other_strides() -> None:
    model = wrap(Table(), "inductor", NNsight, dynamic=True)
    with torch.no_grad():
        for n in (4, 6, 9, 5):
            x, flat = torch.randn(n, 3, 6), torch.randn(6 * n)
            for steer in (flat.reshape(n, 1, 6), flat.reshape(6, n).T.reshape(n, 1, 6), flat.reshape(6, n).T[:, None]):
                with model.trace(x):
                    model.up.output += steer
                    out = model.output.save()
                want = model._module.down(torch.tanh(model._module.up(x) + steer))
                torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


def test_a_constant_that_does_not_fit_is_told_where_it_is_written() -> None:
    model = wrap(Table(), "eager", NNsight, dynamic=True)
    for n, wide in ((3, 3), (5, 5), (7, 5), (7, 7)):
        told = contextlib.nullcontext() if n == wide else pytest.raises(RuntimeError, match="size of tensor|broadcast")
        with told, torch.no_grad(), model.trace(torch.randn(n, 4, 6)):
            model.up.output += torch.ones(wide, 1, 6)
            out = model.output.save()
    assert out.shape == (7, 4, 6)


def test_bodies_that_await_one_another() -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "hooks", NNsight)
    x, told = torch.randn(2, 4), []

    async def one() -> None:
        try:
            with model.trace(x):
                h = model[0].output.save()
                await asyncio.sleep(0)
                model[1].output.save()
            assert torch.equal(h, model._module[0](x))
        except NestedTraceError as error:
            told.append(str(error))

    async def both() -> None:
        await asyncio.gather(one(), one())

    asyncio.run(both())
    assert len(told) == 1 and "this model already has an open trace, from" in told[0]
    with model.trace(x):
        out = model[1].output.save()
    assert torch.equal(out, model._module(x))


def test_options_of_a_sweep_and_keywords_of_the_model() -> None:
    model = wrap(gpt2(), "hooks")
    with pytest.raises(TypeError, match=r"`fn=` is ambiguous: a sweep takes its body and its inputs by position"):
        model.sweep(lambda tracer, a: model.lm_head.output.mean() * a, IDS, over={"a": [1.0, 2.0]}, fn="other")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_draw_from_a_generator_of_the_users(engine: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).requires_grad_(False)
    model = wrap(module, engine, NNsight)
    x = torch.randn(2, 4)
    with model.trace(x):
        g = torch.Generator().manual_seed(5)
        noise = torch.randn(2, 4, generator=g)
        h = model[0].output
        like = torch.empty_like(h).normal_(generator=g)
        model[0].output = h + noise + like
        out = model[2].output.save()
    g = torch.Generator().manual_seed(5)
    want = module[0](x) + torch.randn(2, 4, generator=g) + torch.empty(2, 4).normal_(generator=g)
    assert torch.equal(out, module[2](module[1](want)))


def test_a_program_that_draws_from_a_generator_draws_each_time() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model, x, g = wrap(module, "eager", NNsight), torch.randn(2, 4), torch.Generator().manual_seed(5)

    def body(tracer: Any) -> Any:
        return model[1].output + torch.rand(4, generator=g)

    program = model.program(body)
    got = [program(x) for _ in range(3)]
    g = torch.Generator().manual_seed(5)
    assert all(torch.equal(y, module(x) + torch.rand(4, generator=g)) for y in got)
    assert "it draws from a generator of its own" in program.explain()
