"""Every private name of torch is taken away in turn: programs give the values that they have on hooks, and `explain()` says what is missing."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch
import torch.nn as nn
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_fx import LanguageModel, NNsight, compat
from nnsight_fx.compat import fakes, modes, modules, probe

AT_IMPORT = {  # looked for when nnsight_fx is imported: tested below
    "torch._C._set_grad_enabled",
    *(
        name.path
        for name in probe.NAMES
        if "._global_" in name.path or name.path.rpartition(".")[2].endswith("Exception")
    ),
    "torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode",
}
INDUCTORS = [
    name.path for name in probe.NAMES if "inductor" in name.without.lower() or name.path.startswith("torch._inductor")
]
INDUCTORS += ["torch._dynamo.utils.counters", "torch._logging.getArtifactLogger"]
ROOMS = ("dynamo", "fakes", "frames", "graphs", "guards", "modes", "symbols", "tensors", "variables")
PATHS = sorted({name.path for name in probe.NAMES} - AT_IMPORT - {*INDUCTORS})


def names_of(room: str) -> list[probe.Name]:
    held = vars(getattr(compat, room)).values()
    flat = [each for value in held for each in (value if isinstance(value, list) else [value])]
    return [each for each in flat if isinstance(each, probe.Name)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, scale=1.0):
        return x + scale * self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.again, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        for _ in range(3):
            x = torch.tanh(self.again(x))
        return self.head(x)


def net(backend: str) -> NNsight:
    torch.manual_seed(0)
    model = NNsight(Net().eval())
    if backend != "hooks":
        model.compile(backend=backend)
    return model


def x(rows: int) -> torch.Tensor:
    return torch.arange(8.0 * rows).reshape(rows, 8).sin()


def reads_and_writes(model):
    found = []
    for rows in (2, 3, 5):  # sizes become symbols
        with torch.no_grad(), model.trace(x(rows)):
            before = model.blocks[0].output.save()
            model.blocks[1].output[:, 1:3] += before[:, :2] * 2
            found += [before, model.head.output.save()]
    return found


def skips(model):
    with torch.no_grad(), model.trace(x(2)):
        model.blocks[1].skip(model.blocks[0].output * 2)
        out = model.head.output.save()
    return [out]


def differentiates(model):
    with model.trace(x(2)):
        h = model.blocks[0].output
        grad = h.grad.save()
        model.head.output.square().sum().backward()
    return [grad]


def looks(model):
    with torch.no_grad(), model.trace(x(2)):
        if model.blocks[0].up.output.sum() > -1e9:
            model.blocks[1].output *= 3
        out = model.head.output.save()
    return [out]


def loops(model):
    found = []
    with torch.no_grad(), model.trace(x(2)) as tracer:
        for _ in tracer.iter[:3]:
            model.again.output *= 2
            found.append(model.again.output.save())
    return found


PROGRAMS = (reads_and_writes, skips, differentiates, looks, loops)


def outcomes(backend: str) -> tuple[list, NNsight]:
    model = net(backend)
    return [value for program in PROGRAMS for value in program(model)], model


def generated(backend: str) -> tuple[list, NNsight]:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=16, bos_token_id=None, eos_token_id=None
    )
    model = LanguageModel(GPT2LMHeadModel(config).eval())
    if backend != "hooks":
        model.compile(backend=backend)
    found = []
    with torch.no_grad(), model.generate([[5, 7, 11]], max_new_tokens=3) as tracer:
        for _ in tracer.iter[:]:
            model.transformer.h[0].output[:, -1] *= 2
            found.append(model.lm_head.output[:, -1].save())
    return found, model


@functools.cache
def expected(program=outcomes):
    return program("hooks")[0]


def agrees(program, tolerance: float = 1e-5, backend: str = "eager") -> NNsight:
    """The wrapped model, after a program has given what it gives on hooks, and was captured."""
    values, model = program(backend)
    for got, want in zip(values, expected(program), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    facts = model.explain().to_dict()["captures"]
    assert all(each["segments"] and not each["fallbacks"] for each in facts)
    return model


@pytest.fixture
def without(monkeypatch):
    """A function that takes names away, as on a torch that lacks them."""

    def hide(*paths: str) -> None:
        look, attribute, leaves = probe._look, probe._attribute, {path.rpartition(".")[2] for path in paths}
        monkeypatch.setattr(probe, "_look", lambda path: None if path in paths else look(path))
        monkeypatch.setattr(
            probe, "_attribute", lambda owner, name: probe._ABSENT if name in leaves else attribute(owner, name)
        )
        forget()

    def forget() -> None:
        for name in probe.NAMES:
            name.lacking = False
            if hasattr(name, "thing"):
                del name.thing

    yield hide
    forget()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_a_name_is_gone(path, without):
    without(path)
    model = agrees(outcomes)
    asked = any(name.path == path and name.lacking for name in probe.NAMES)
    if not asked:
        pytest.skip("no program here asks for it")
    assert f"`{path}` is missing: " in str(model.explain())


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_empty(room, without):
    """All that there is a way around in one file of `compat`, at once."""
    gone = {name.path for name in names_of(room)} - AT_IMPORT
    without(*gone)
    told = str(agrees(outcomes).explain())
    told += str(agrees(generated).explain())
    assert any(
        f"`{path}` is missing: " in told for path in gone
    )  # one that is missing may keep others from being asked for


@pytest.mark.parametrize("program", [outcomes, generated])
def test_every_room_is_empty(program, without):
    without(*PATHS)
    told = str(agrees(program).explain())
    assert "`torch._dynamo.optimize` is missing: " in told and "`torch._dynamo.eval_frame._stance` is missing: " in told


def test_nothing_is_missing_here():
    agrees(outcomes)
    assert compat.missing() == []


def test_the_fallbacks_of_what_is_looked_for_at_import(monkeypatch):
    assert modes._grad_setter() is torch._C._set_grad_enabled
    tables = list(modules.GLOBAL)
    monkeypatch.setattr(probe, "_look", lambda path: None)
    before = list(probe.NAMES)
    try:
        assert all(
            a is b for a, b in zip(map(modules._table, modules._WAYS, modules._WAYS.values()), tables, strict=True)
        )
        assert fakes._error("torch.none.such") is fakes._Never
    finally:
        probe.NAMES[:] = before


def test_autocast_in_a_graph(without):
    def run(model):
        with torch.no_grad(), model.trace(x(2)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                made = torch.mm(model.blocks[0].output, torch.ones(8, 3))
            out = made.save()
        return out

    want = run(net("hooks"))
    without("torch.amp.autocast_mode._enter_autocast", "torch.amp.autocast_mode._exit_autocast")
    model = net("aot_eager")
    got = run(model)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)
    assert "_enter_autocast` is missing" in str(model.explain())


@pytest.mark.parametrize("name", ["torch._functorch.config.patch", "torch._inductor.config.patch"])
def test_draws_without_the_settings_that_keep_them(without, name):
    without(name)

    def drawn(model):
        torch.manual_seed(3)
        with model.trace(x(2)):
            h = model.blocks[0].output
            torch.randn_like(h)
            model.blocks[1].output += torch.randn_like(h)
            out = model.output.save()
        return [out.detach(), torch.get_rng_state()]

    model = net("aot_eager")
    torch.testing.assert_close(drawn(model), drawn(net("hooks")))
    assert "runs with `eager`: this torch cannot be told" in str(model.explain())


def test_dynamos_errors_are_told_by_name(without):
    without(*(f"torch._dynamo.exc.{name}" for name in ("Unsupported", "InternalTorchDynamoError", "TorchRuntimeError")))
    from torch._dynamo import exc

    assert not compat.dynamo.cannot_trace(ValueError()) and not compat.dynamo.fails(ValueError())
    assert compat.dynamo.fails(exc.InternalTorchDynamoError("it broke"))


@pytest.mark.inductor
@pytest.mark.slow
def test_what_is_inductors_is_gone(without, tmp_path):
    without(*INDUCTORS)
    model = agrees(outcomes, 1e-4, "inductor")
    model.save_compiled(tmp_path / "made")
    assert "built C++ kernels are not saved" in str(model.explain())


@pytest.mark.inductor
@pytest.mark.slow
def test_a_mode_without_inductors_wrapper(without):
    without("torch._TorchCompileInductorWrapper")
    model = NNsight(Net().eval())
    model.compile(backend="inductor", mode="max-autotune-no-cudagraphs")
    want = reads_and_writes(NNsight(model._module))
    for got, each in zip(reads_and_writes(model), want, strict=True):
        torch.testing.assert_close(got, each, rtol=1e-4, atol=1e-4)


NEEDED = [
    ("fakes", "torch._subclasses.fake_tensor.FakeTensorMode"),
    ("modes", "torch._C.DisableTorchFunction"),
    ("modes", "torch.overrides._get_current_function_mode_stack"),
    ("modes", "torch.utils._python_dispatch._push_mode"),
    ("symbols", "torch.fx.experimental.symbolic_shapes.ShapeEnv"),
    ("graphs", "torch.fx.experimental.proxy_tensor.make_fx"),
    ("tensors", "torch.Tensor._version"),
    ("tensors", "torch._C._swap_tensor_impl"),
]


@pytest.mark.parametrize("room, path", NEEDED)
def test_a_name_without_a_way_around_is_an_error_of_the_import(room, path, monkeypatch):
    module = getattr(compat, room)
    held, names, look = dict(vars(module)), list(probe.NAMES), probe._look
    monkeypatch.setattr(probe, "_look", lambda asked: None if asked == path else look(asked))
    try:
        with pytest.raises(ImportError) as error:
            importlib.reload(module)
    finally:
        vars(module).update(held)
        probe.NAMES[:] = names
    text = str(error.value)
    assert (
        f"`{path}`" in text and f"torch {torch.__version__}" in text and "docs/torch.md" in text and "install" in text
    )
