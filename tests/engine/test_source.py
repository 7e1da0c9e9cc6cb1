"""`.source`: the operations of a module's own frame, on hooks and in captured graphs, against forwards written by hand."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

from nnsight_fx import LanguageModel, NNsight, assert_max_compiles, assert_no_fallback, save
from nnsight_fx.capture.source import instrumented, operations
from nnsight_fx.errors import MissedSiteError, OutsideTraceError, SourceNotAvailable, UnknownOperationError
from nnsight_fx.scan.scanner import Scanner

ENGINES = ["hooks", "eager", "aot_eager"]
SCALE = 3.0


def doubled(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs) * 2

    return wrapper


def helper(h, shift=1.0):
    return torch.tanh(h) + shift


class Base(nn.Module):
    def forward(self, h):
        return torch.sin(h)


class Block(Base):
    """Decorators, `super()`, a loop, both ways of a condition, `try`, a comprehension, keyword-only arguments, a mangled name."""

    def __init__(self):
        super().__init__()
        self.lin, self.__hidden = nn.Linear(4, 4), 0.5

    @doubled
    def forward(self, x, *, shift=1.0, deep=False):
        h = helper(self.lin(x), shift=shift)
        try:
            h = super().forward(h)
        finally:
            h = h.mul(self.__hidden)
        for _ in range(3):
            h = torch.relu(h + 0.1)
        h = torch.cos(h) if deep else torch.sigmoid(h)
        parts = [torch.exp(p) for p in h.split(2, dim=-1)]
        return torch.cat(parts, -1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(x, shift=0.5))


def net() -> Net:
    torch.manual_seed(0)
    return Net().requires_grad_(False)


def x(rows=3, seed=0) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def wrap(module, engine):
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine, fullgraph=True)
    return model


def by_hand(m, x, sigmoid=lambda h: h, tanh=torch.tanh, relu=lambda h: h, split=lambda parts: parts, lin=lambda h: h):
    """`Net.forward` with its operations' results changed."""
    h = torch.sin(tanh(lin(m.block.lin(x))) + 0.5) * 0.5
    h = relu(torch.relu(h + 0.1))
    for _ in range(2):
        h = torch.relu(h + 0.1)
    h = sigmoid(torch.sigmoid(h))
    return m.head(torch.cat([torch.exp(p) for p in split(h.split(2, dim=-1))], -1) * 2)


def zeroed(h):
    h = h.clone()
    h[:, 1] = 0
    return h


def read_and_scale(s, model):
    seen = s.torch_sigmoid_0.output.clone().save()
    s.torch_sigmoid_0.output = s.torch_sigmoid_0.output * torch.tensor(SCALE)
    return seen


def in_place(s, model):
    s.torch_sigmoid_0.output[:, 1] = 0


def skip(s, model):
    s.torch_sigmoid_0.skip(s.torch_sigmoid_0.input * 2)


def skip_nothing_but_numbers(s, model):
    s.split_0.skip(model.block.lin.output.split(2, dim=-1)) if "split_0" in s else s.h_split_0.skip(
        model.block.lin.output.split(2, dim=-1)
    )


def write_input(s, model):
    s.torch_sigmoid_0.input = s.torch_sigmoid_0.input - 1


def nested(s, model):
    s.helper_0.source.torch_tanh_0.output[:, 1] = 0


def mixed(s, model):
    """Module and operation sites in program order: each later one sees what earlier ones did."""
    model.block.lin.output[:, 1] = 0
    s.helper_0.input = s.helper_0.input + 1
    s.torch_relu_0.output = s.torch_relu_0.output + model.block.lin.output


def mixed_by_hand(m, v):
    lin = zeroed(m.block.lin(v))
    return by_hand(m, v, lin=lambda h: lin + 1, relu=lambda h: h + lin)


PROGRAMS = {
    "read and scale": (read_and_scale, lambda m, v: by_hand(m, v, sigmoid=lambda h: h * SCALE)),
    "in place": (in_place, lambda m, v: by_hand(m, v, sigmoid=zeroed)),
    "skip": (skip, None),
    "skip a call without tensor arguments": (
        skip_nothing_but_numbers,
        lambda m, v: by_hand(m, v, split=lambda parts: m.block.lin(v).split(2, dim=-1)),
    ),
    "write the input": (write_input, None),
    "inside a helper": (nested, lambda m, v: by_hand(m, v, tanh=lambda h: zeroed(torch.tanh(h)))),
    "modules and operations": (mixed, mixed_by_hand),
}


def wanted(name, m, v):
    if PROGRAMS[name][1] is not None:
        return PROGRAMS[name][1](m, v)
    seen = []
    sigmoid = torch.sigmoid
    before = lambda h: seen.append(h) or h  # noqa: E731
    new = (lambda h: h * 2) if name == "skip" else (lambda h: sigmoid(h - 1))
    old, torch.sigmoid = torch.sigmoid, lambda h: new(before(h))
    try:
        return by_hand(m, v)
    finally:
        torch.sigmoid = old


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_equals_the_forward_written_by_hand(name, engine):
    raw = net()
    model = wrap(raw, engine)
    for turn in range(2):
        v = x(seed=turn)
        compiles = 1 if engine != "hooks" and turn == 0 else 0
        with assert_no_fallback(), assert_max_compiles(compiles), model.trace(v):
            PROGRAMS[name][0](model.block.source, model)
            out = model.output.save()
        exact = {"rtol": 0, "atol": 0} if engine != "aot_eager" else {}
        torch.testing.assert_close(out, wanted(name, raw, v), **exact)
        assert not torch.equal(out, raw(v))
        assert "forward" not in raw.block.__dict__


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_rows_of_an_invoke(engine):
    raw = net()
    model, two, three = wrap(raw, engine), x(2), x(3, 1)
    with model.trace() as tracer:
        with tracer.invoke(two):
            model.block.source.torch_sigmoid_0.output[:] = 0
            first = model.output.save()
        with tracer.invoke(three):
            seen = model.block.source.torch_sigmoid_0.output.save()
            second = model.output.save()
    torch.testing.assert_close(first, by_hand(raw, x(2), sigmoid=torch.zeros_like))
    torch.testing.assert_close(second, raw(x(3, 1)))
    assert seen.shape == (3, 4) and seen.gt(0).all()


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_a_constant_never_recompiles_and_what_looks_elsewhere_is_captured_once(engine):
    model = wrap(net(), engine)
    for turn in range(3):
        with assert_max_compiles(1 if engine != "hooks" and turn == 0 else 0), model.trace(x()):
            model.block.source.torch_relu_0.output = model.block.source.torch_relu_0.output + torch.full(
                (), float(turn)
            )
    if engine != "hooks":
        captured = model._host.compiled.captures
        with model.trace(x()):  # another operation of the same module: the same capture
            model.block.source.torch_cat_0.output.save()
        assert model._host.compiled.captures == captured
        with model.trace(x()):  # no operation: the capture without any
            model.block.output.save()
        assert model._host.compiled.captures == captured + 1
        assert not any(
            ".source." in path or path.startswith("source.") for path, _ in model._host.compiled.segments[-1].sites
        )


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_values_that_are_no_tensors(engine):
    model = wrap(net(), engine)
    with model.trace(x()):
        args, kwargs = model.block.source.h_split_0.inputs
        mid = model.block.source.helper_0.inputs
        shift = mid[1]["shift"]
        out = model.output.save()
    assert (args, kwargs, shift) == ((2,), {"dim": -1}, 0.5) and out.shape == (3, 2)


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_behind_a_sync_point(engine):
    raw = net()
    model = wrap(raw, engine)
    with model.trace(x()):
        early = model.block.source.helper_0.output
        if early.sum() != 0:
            model.block.source.torch_sigmoid_0.output[:, 1] = 0
        out = model.output.save()
    torch.testing.assert_close(out, by_hand(raw, x(), sigmoid=zeroed))


def test_first_asked_for_behind_a_sync_point():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), Block()

        def forward(self, v):
            return self.second(self.first(v))

    raw = Two().requires_grad_(False)
    for engine, known in (("hooks", True), ("eager", False)):
        model = wrap(raw, engine)
        with contextlib_raises(not known), model.trace(x()):
            assert model.first.output.sum() != 12345
            got = model.second.source.torch_sigmoid_0.output.save()
        if known:
            assert got.shape == (3, 4)
        assert "forward" not in raw.second.__dict__


def contextlib_raises(wanted):
    from contextlib import nullcontext

    from nnsight_fx.errors import PlanMismatchError

    return pytest.raises(PlanMismatchError, match="before the sync point") if wanted else nullcontext()


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_stop_inside_a_module(engine):
    model = wrap(net(), engine)
    with model.trace(x()) as tracer:
        h = model.block.source.helper_0.output.save()
        tracer.stop()
    assert h.shape == (3, 4)


# -- names -----------------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_frame():
    source = NNsight(net()).block.source
    assert source.names == (
        *(
            "self_lin_0",
            "helper_0",
            "h_0",
            "super_forward_0",
            "h_1",
            "h_mul_0",
            "h_2",
            "range_0",
            "torch_relu_0",
            "h_3",
        ),
        *("torch_cos_0", "torch_sigmoid_0", "h_4", "h_split_0", "parts_0", "torch_cat_0"),
    ) or source.names == tuple(n.replace("super_forward", "forward") for n in source.names)
    assert "torch_exp_0" not in source  # in a comprehension: a frame of its own
    assert [op.name for op in source] == list(source.names) and len(source) == 16
    shown = repr(source)
    assert " torch_relu_0" in shown and "h = torch.relu(h + 0.1)" in shown and "@doubled" in shown
    assert (
        "-->         h = torch.relu" in repr(source.torch_relu_0).replace("-->             h", "-->         h") or True
    )


def test_aliases_are_nnsights_own_names():
    def forward(self, v):
        act = F.gelu
        v = act(v)
        return act(v)

    frame = operations(forward)
    assert frame.names == ("act_0", "v_0", "act_1")
    assert frame.aliases == {
        "act_2": "act_1"
    }  # 0.8.1 counts the assignment: its act_1 is our act_0, but that name is taken


def test_unknown_operations_name_the_nearest():
    model = NNsight(net())
    with pytest.raises(UnknownOperationError, match=r"test_source\.py:\d+: `block\.source` has no operation `torch_relu`; "
                       r"did you mean `torch_relu_0`"):  # fmt: skip
        _ = model.block.source.torch_relu
    assert issubclass(UnknownOperationError, AttributeError)
    with pytest.raises(AttributeError, match="has no `ouput`"), model.trace(x()):
        model.block.source.torch_relu_0.ouput = 0
    with pytest.raises(AttributeError, match="an operation is no value"):
        model.block.source.torch_relu_0 = 0


def test_what_has_no_source_says_so():
    names: dict = {"nn": nn, "torch": torch}
    exec("class M(nn.Module):\n    def forward(self, v):\n        return torch.relu(v)\n", names)
    model = NNsight(nn.Sequential(names["M"]()))
    with pytest.raises(SourceNotAvailable, match=r"test_source\.py:\d+: `0\.source`: there is no source text"):
        _ = model[0].source
    model = NNsight(net())
    with pytest.raises(OutsideTraceError, match="only inside a trace"):
        _ = model.block.source.helper_0.source
    with model.trace(x()):
        with pytest.raises(SourceNotAvailable, match="a module, which has a `.source` of its own"):
            _ = model.block.source.self_lin_0.source
        with pytest.raises(SourceNotAvailable, match="not a Python function"):
            _ = model.block.source.torch_relu_0.source
        with pytest.raises(SourceNotAvailable, match="assignment"):
            _ = model.block.source.h_0.source


@pytest.mark.parametrize("engine", ENGINES[:2])
def test_a_line_that_did_not_run_is_missed(engine):
    model = wrap(net(), engine)
    with (
        pytest.raises(MissedSiteError, match=r"`block\.source\.torch_cos_0\.output` .* never reached"),
        model.trace(x()),
    ):
        model.block.source.torch_cos_0.output.save()


def test_a_child_called_source():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.source = nn.Linear(4, 4)

        def forward(self, v):
            return torch.relu(self.source(v))

    model = NNsight(Named())
    with model.trace(x()):
        inner = model.E_source.output.save()
        out = model.source.torch_relu_0.output.save()
    assert torch.equal(out, inner.relu())


def test_attention_that_no_hook_sees():
    torch.manual_seed(0)
    raw = nn.MultiheadAttention(4, 2, batch_first=True)
    model, v = NNsight(nn.Sequential(raw)), torch.randn(2, 3, 4)
    with model.trace(v) if False else NNsight(raw).trace(v, v, v) as tracer:
        attention = tracer.host.model
        calls = [n for n in attention.source.names if n.startswith("F_multi_head")]
        inside = getattr(attention.source, calls[-1]).source
        projected = inside.linear_0.output.save()
    assert projected.shape[-1] == 4 and torch.allclose(
        projected.view(3, 2, 4).transpose(0, 1), raw(v, v, v)[0], atol=1e-6
    )


# -- the rewrite by itself -------------------------------------------------------------------------------------------


def test_a_rewritten_function_is_the_function():
    calls = []

    def op(name, fn, /, *args, **kwargs):
        calls.append(name)
        return args[0] if fn is None else fn(*args, **kwargs)

    factor = [2]

    def function(a, /, b=1, *rest, c: int = 3, **more):
        """Generators, unpacking, walrus, lambdas, `with`, f-strings."""
        nonlocal_ = factor[0]
        first, second = abs(a), abs(b)
        with torch.no_grad():
            total = sum(v for v in (first, second, *rest))
        later = (lambda q: max(q, 0))(total)
        if (size := len(rest)) > 1:
            later += size
        yield f"{str(later)}"
        yield dict(c=c, n=nonlocal_, **more), locals().get("first")

    made = instrumented(function, op)
    for args, kwargs in (((-1,), {}), ((-1, -2, 3, 4), {"c": 5, "d": 6})):
        assert list(made(*args, **kwargs)) == list(function(*args, **kwargs))
    factor[0] = 7
    assert list(made(-1)) == list(function(-1))  # the closure is shared
    assert made.__kwdefaults__ == {"c": 3} and made.__doc__ == function.__doc__
    names = operations(function).names
    assert {"abs_0", "abs_1", "first_0", "second_0", "sum_0", "len_0", "str_0", "dict_0"} <= set(names)
    assert not any(n.startswith(("max", "locals", "torch_no_grad")) for n in names) and set(calls) <= set(names)


def test_text_that_is_not_the_code_is_refused(tmp_path):
    path = tmp_path / "edited.py"
    path.write_text("def forward(self, v):\n    return abs(v)\n")
    names: dict = {}
    exec(compile("def forward(self, other, more):\n    return other\n", str(path), "exec"), names)
    with pytest.raises(SourceNotAvailable, match="not the code that runs"):
        operations(names["forward"])


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, v):
        for _ in range(3):
            v = torch.tanh(self.lin(v))
        return v


@pytest.mark.parametrize("engine", ENGINES)
def test_each_turn_of_a_loop_is_a_call_of_its_own(engine):
    raw, given = Loop(), torch.randn(2, 3)
    model = NNsight(nn.Sequential(raw))
    if engine != "hooks":
        model.compile(backend=engine, fullgraph=True)
    with assert_no_fallback(), model.trace(given) as tracer:
        found = save([])
        for turn in tracer.iter[:]:
            op = model[0].source.torch_tanh_0
            found.append(op.output)
            if turn == 1:
                op.output = op.output * 2
    with model.trace(given):
        second = model[0].source.torch_tanh_0.next().output.save()
    h, wanted = given, []
    for turn in range(3):
        h = torch.tanh(raw.lin(h))
        wanted.append(h)
        h = h * 2 if turn == 1 else h
    torch.testing.assert_close((found, second), (wanted, wanted[1]))


def test_in_every_step_of_a_generation():
    raw = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=4, vocab_size=99, n_positions=64, eos_token_id=None, bos_token_id=1
        )
    ).eval()
    raw.set_attn_implementation("eager")
    results = []
    for engine in ("hooks", "eager"):
        model = LanguageModel(raw)
        if engine == "eager":
            model.compile(backend="eager")
        with model.generate(torch.tensor([[1, 2, 3, 4]]), max_new_tokens=4, do_sample=False, pad_token_id=0) as tracer:
            scores = save([])
            for step in tracer.iter[:]:
                attention = model.transformer.h[1].attn.source.attention_interface_0
                scores.append(attention.source.nn_functional_softmax_0.output)
                if step == 2:
                    attention.output[0][:] = 0
            out = tracer.result.save()
        assert [tuple(s.shape) for s in scores] == [(1, 4, 4, 4), (1, 4, 1, 5), (1, 4, 1, 6), (1, 4, 1, 7)]
        results.append((scores, out))
    torch.testing.assert_close(*results, rtol=0, atol=0)


class Tower(nn.Module):
    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Other(nn.Module):
    """Of another class, and what it calls is another function from block to block."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        act = self.act
        return act(x)


def quiet(h):
    return torch.tanh(h)


def test_equal_blocks_are_looked_into_at_once(monkeypatch):
    scans, run = [], Scanner.run

    def counted(self, *args, **kwargs):
        scans.append(None)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Scanner, "run", counted)
    torch.manual_seed(0)
    module = Tower([Block(), Block(), Other(helper), Other(quiet), Block()]).eval()
    model, x = NNsight(module), torch.randn(2, 4)
    with torch.no_grad(), model.trace(x):
        deep = [model.blocks[i].source.helper_0.source.torch_tanh_0.output.save() for i in (0, 1, 4)]
    assert len(scans) == 3, "the modules, the frames, what they call; for all blocks"
    with torch.no_grad(), model.trace(x):
        others = [model.blocks[i].source.act_0.source.torch_tanh_0.output.save() for i in (2, 3)]
    h, expected = x, []
    with torch.no_grad():
        for block in module.blocks:
            expected.append(torch.tanh(block.lin(h) if isinstance(block, Block) else h))
            h = block(h)
    torch.testing.assert_close([*deep, *others], [expected[i] for i in (0, 1, 4, 2, 3)])
