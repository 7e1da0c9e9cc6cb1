"""Saved plans: what runs again gives what the trace gave, on every engine; what does not fit is refused with its line."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file

import nnsight_fx
from nnsight_fx import NNsight, PlanError, load_plan

ROOT = Path(__file__).resolve().parents[1]


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.pair = Pair()
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        x, y = self.pair(x)
        return self.head(x + y)


class Pair(nn.Module):
    def forward(self, x):
        return x * 2, x - 1


def net(width=8):
    torch.manual_seed(0)
    return Net(width).requires_grad_(False)


VECTOR = torch.linspace(-1, 1, 8)
INPUT = torch.linspace(-2, 2, 2 * 6 * 8).reshape(2, 6, 8)
OTHER = INPUT.flip(0) * 0.7
ENGINES = [False, {"backend": "eager"}, {"backend": "aot_eager"}]
NAMES = ["hooks", "eager", "aot_eager"]


def steer(model, vector, position=-1, scale=2.5):
    model.layers[0].output[:, position] += scale * vector
    return {"head": model.head.output.save()}


def swap(model, vector, position=-1, scale=2.5):
    model.layers[2].output = torch.nn.functional.gelu(model.layers[1].output * scale)
    return {"top": model.head.output.topk(2, dim=-1).values.save()}


def tuples(model, vector, position=-1, scale=2.5):
    first, second = model.pair.output
    model.pair.output = (second, first.mT.mT + vector)
    return {"sum": model.head.output.sum(-1, keepdim=True).save(), "second": second.save()}


def skipped(model, vector, position=-1, scale=2.5):
    model.layers[1].skip(model.layers[1].input * scale)
    return {"head": model.head.output.save()}


def applied(model, vector, position=-1, scale=2.5):
    with torch.no_grad():
        early = model.head(model.layers[0].output + vector)
    return {"lens": early.save(), "weight": (model.layers[1].output @ model.layers[0]._module.weight).save()}


def stopped(model, vector, position=-1, scale=2.5):
    saved = model.layers[1].output[..., 1:4].save()
    model.layers[1].output.sum()
    return {"part": saved}


def gradients(model, vector, position=-1, scale=2.5):
    hidden = model.layers[0].output
    hidden.requires_grad_()
    grad = hidden.grad.save()
    model.head.output.square().sum().backward()
    return {"grad": grad}


def gradients_changed(model, vector, position=-1, scale=2.5):
    hidden = model.layers[0].output
    hidden.requires_grad_()
    early = model.layers[2].output
    with (model.head.output * scale).square().sum().backward():
        early.grad = early.grad * vector
        grad = hidden.grad.clone().save()
        hidden.grad[:, position] *= 2
    return {"grad": grad}


def gradients_of_two_losses(model, vector, position=-1, scale=2.5):
    hidden = model.layers[0].output
    hidden.requires_grad_()
    out = model.head.output
    (first,) = torch.autograd.grad(out.sum(), [hidden], retain_graph=True)
    (second,) = torch.autograd.grad((out * scale).square().sum(), [hidden])
    return {"first": first.save(), "second": second.save()}


def inside(model, vector, position=-1, scale=2.5):
    model.source.torch_relu_0.output = model.source.torch_relu_0.output * scale
    return {"first": model.layers[1].input.save(), "head": model.head.output.save()}


PROGRAMS = [
    steer,
    swap,
    tuples,
    skipped,
    applied,
    stopped,
    gradients,
    gradients_changed,
    gradients_of_two_losses,
    inside,
]


def record(model, program, x, **options):
    with model.trace(x, compile=False) as tracer:
        saved = program(model, VECTOR, **options)
    return tracer, saved


def saved_plan(path, program, **options):
    model = NNsight(net())
    tracer, saved = record(model, program, INPUT, **options)
    tracer.graph.save_plan(path, names=saved)
    return model, tracer, saved


@pytest.mark.parametrize("engine", ENGINES, ids=NAMES)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_a_loaded_plan_gives_what_its_trace_gave(program, engine, tmp_path):
    model, tracer, saved = saved_plan(tmp_path / "p", program)
    plan = load_plan(tmp_path / "p", model)
    assert plan.graph == tracer.graph and plan.graph.diff(tracer.graph) == []
    again = plan(INPUT, compile=engine)
    assert list(again) == list(saved)
    for name, value in saved.items():
        assert type(again[name]) is torch.Tensor and torch.equal(again[name], value)
    for name, value in record(model, program, OTHER)[1].items():
        assert torch.equal(plan(OTHER, compile=engine)[name], value)


def test_it_equals_hand_written_hooks(tmp_path):
    saved_plan(tmp_path / "p", steer)
    module = net()

    def hook(_, __, out):
        out[:, -1] += 2.5 * VECTOR

    handle = module.layers[0].register_forward_hook(hook)
    expected = module(OTHER)
    handle.remove()
    assert torch.equal(load_plan(tmp_path / "p", NNsight(module))(OTHER)["head"], expected)


def test_a_second_input_and_other_constants_compile_nothing(tmp_path):
    model, tracer, saved = saved_plan(tmp_path / "p", steer)
    model.compile(backend="eager")
    plan = load_plan(tmp_path / "p", model)
    with nnsight_fx.assert_no_fallback():
        plan(INPUT)
        with nnsight_fx.assert_max_compiles(0):
            assert torch.equal(plan(OTHER)["head"], record(model, steer, OTHER)[1]["head"])
            with model.trace(INPUT):  # and the trace shares it
                mine = steer(model, VECTOR)
            assert torch.equal(mine["head"], saved["head"])
            others = {n: v.cos() if isinstance(v, torch.Tensor) else 3 for n, v in plan.constants.items()}
            got = plan(OTHER, constants=others)["head"]
    assert torch.equal(got, plan(OTHER, constants=others, compile=False)["head"])
    assert not torch.equal(got, plan(OTHER, compile=False)["head"])


def test_constants_have_names_and_take_other_values(tmp_path):
    model = NNsight(net())
    with model.trace(INPUT, compile=False) as tracer:
        model.layers[0].output[:, -1] += VECTOR
        out = model.head.output.save()
    tracer.graph.save_plan(tmp_path / "p", names={"out": out, "vector": VECTOR, "at": ("constant_0", "constant_2")})
    plan = load_plan(tmp_path / "p", model)
    assert set(plan.constants) == {"at", "vector"} and plan.constants["at"] == -1
    other = VECTOR.exp()
    with model.trace(OTHER, compile=False):
        model.layers[0].output[:, 2] += other
        expected = model.head.output.save()
    assert torch.equal(plan(OTHER, constants={"at": 2, "vector": other})["out"], expected)
    longer = torch.cat([OTHER, INPUT], 1)
    with model.trace(longer, compile=False):  # -1 is the last position, however many there are
        model.layers[0].output[:, -1] += VECTOR
        expected = model.head.output.save()
    assert torch.equal(plan(longer)["out"], expected)
    for wrong, text in [
        ({"vectr": VECTOR}, "did you mean `vector`"),
        ({"vector": VECTOR[:3]}, r"is a \[8\] tensor of torch.float32, and was given a \[3\]"),
        ({"at": 1.5}, "is a position"),
        ({"vector": 1.0}, "was given the number 1.0"),
    ]:
        with pytest.raises(PlanError, match=text):
            plan(INPUT, constants=wrong)


@pytest.mark.parametrize("engine", ENGINES[:2], ids=NAMES[:2])
@pytest.mark.parametrize("together", [False, True])
def test_invokes(together, engine, tmp_path):
    def body(a, b):
        with model.trace(compile=engine) as tracer:
            one, two = tracer.batch(a, b) if together else (tracer.invoke(a), tracer.invoke(b))
            with one:
                h = model.layers[0].output.mean(1, keepdim=True)
            with two:
                model.layers[1].output[:] += h
                out = model.head.output.save()
            with tracer.invoke():
                whole = model.head.output.save()
        return tracer, out, whole

    model = NNsight(net())
    tracer, out, whole = body(INPUT[:1], OTHER[:1])
    nnsight_fx.save_plan(tracer, tmp_path / "p", names={"out": out, "whole": whole})
    plan = load_plan(tmp_path / "p", model)
    assert plan.graph == tracer.graph
    got = plan(INPUT[:1], OTHER[:1], compile=engine)
    assert torch.equal(got["out"], out) and torch.equal(got["whole"], whole)
    _, out, _ = body(OTHER[:1], INPUT[:1])
    assert torch.equal(plan(OTHER[:1], INPUT[:1], compile=engine)["out"], out)
    with pytest.raises(PlanError, match="takes 2 inputs"):
        plan(INPUT)


def test_stop(tmp_path):
    model = NNsight(net())
    with model.trace(INPUT, compile=False) as tracer:
        h = model.layers[1].output.save()
        tracer.stop()
    tracer.graph.save_plan(tmp_path / "p")
    plan = load_plan(tmp_path / "p", model)
    calls = []
    handle = model._module.head.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(plan(INPUT)["layers.1.output"], h) and plan.saved == ("layers.1.output",)
    handle.remove()
    assert calls == []


def test_in_another_process(tmp_path):
    _, _, saved = saved_plan(tmp_path / "p", steer)
    save_file({"x": INPUT, "expected": saved["head"].contiguous()}, tmp_path / "x")
    program = (
        "import torch, torch.nn as nn\n"
        + "".join(map(inspect.getsource, (Net, Pair, net)))
        + (
            "import sys, nnsight_fx\nfrom safetensors.torch import load_file\n"
            "data = {k: v.clone() for k, v in load_file(sys.argv[2]).items()}  # aligned: sums round alike\nmodel = nnsight_fx.NNsight(net())\nplan = nnsight_fx.load_plan(sys.argv[1], model)\n"
            "for engine in (False, {'backend': 'eager'}):\n"
            "    assert torch.equal(plan(data['x'], compile=engine)['head'], data['expected'])\n"
            "with nnsight_fx.assert_max_compiles(0):\n    plan(data['x'].neg(), compile={'backend': 'eager'})\n"
            "print(plan.graph.key)"
        )
    )
    command = [sys.executable, "-c", program, str(tmp_path / "p"), str(tmp_path / "x")]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == load_plan(tmp_path / "p", NNsight(net())).graph.key


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@pytest.mark.parametrize(
    "body, text",
    [
        (lambda m, t: t.apply(lambda h: h + 1, m.layers[0].output), "holds no code"),
        (lambda m, t: float(m.layers[0].output.sum()), "it runs Python on real values"),
        (lambda m, t: Twice.apply(m.layers[0].output), "a custom autograd function"),
        (lambda m, t: torch.zeros(8).add_(m.layers[0].output[0, 0]), "in place"),
    ],
    ids=["apply", "float", "autograd function", "in place"],
)
def test_what_is_no_data_is_refused_with_its_line(body, text, tmp_path):
    model = NNsight(net())
    with model.trace(INPUT, compile=False) as tracer:
        nnsight_fx.save([body(model, tracer)])
        model.head.output.save()
    with pytest.raises(PlanError, match=rf"test_plans\.py:\d+: .*{text}"):
        tracer.graph.save_plan(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_thing_to_name(tmp_path):
    tracer, _ = record(NNsight(net()), steer, INPUT)
    with pytest.raises(PlanError, match='`names` calls something `x` .*"constant_0"'):
        tracer.graph.save_plan(tmp_path / "p", names={"x": torch.ones(2)})


def test_a_model_that_it_does_not_fit(tmp_path):
    saved_plan(tmp_path / "p", steer)
    with pytest.raises(
        PlanError, match=r"test_plans\.py:\d+ uses the module `layers.0`, which this model does not have; there is"
    ):
        load_plan(tmp_path / "p", NNsight(nn.Sequential(nn.Linear(8, 8))))
    double = net().double()
    with pytest.raises(PlanError, match="does not fit this model"):
        load_plan(tmp_path / "p", NNsight(double))
    wider = net()
    wider.layers[0] = nn.Linear(8, 16)
    wider.layers[1] = nn.Linear(16, 8)
    with pytest.raises(PlanError, match=r"`layers.0.output` is \[2, 6, 16\] of torch.float32, and was \[2, 6, 8\]"):
        load_plan(tmp_path / "p", NNsight(wider))


def damaged(path, change):
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    document = json.loads(metadata["plan"])
    change(document)
    save_file(tensors, path, metadata | {"plan": json.dumps(document)})


# -- caches, calls with hooks, edits, loops, modules of one's own ------------------------------------------------------


def leaves(cache):
    """The tensors that a cache holds, by path."""
    flat = {path: nnsight_fx.plan.tree.flatten([(e.output, e.inputs) for e in cache[path].visits])[0] for path in cache}
    return {path: [x for x in found if isinstance(x, torch.Tensor)] for path, found in flat.items()}


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_caches(engine, tmp_path):
    model = NNsight(net())

    def body(x, compile):
        with model.trace(x, compile=compile) as tracer:
            everything = tracer.cache()
            some = tracer.cache([model.pair, "model.layers.1"], dtype=torch.float64, include_inputs=True)
            model.layers[0].output[:, -1] += VECTOR
            out = model.head.output.save()
        return tracer, everything, some, out

    tracer, _, some, out = body(INPUT, False)
    tracer.graph.save_plan(tmp_path / "p", names={"some": some, "out": out})
    plan = load_plan(tmp_path / "p", NNsight(net()))
    assert plan.graph == tracer.graph and plan.saved == ("out", "cache", "some")
    got = plan(OTHER, compile=engine)
    _, everything, some, out = body(OTHER, False)
    assert list(got) == ["out", "cache", "some"] and torch.equal(got["out"], out)
    for name, want in (("cache", everything), ("some", some)):
        found, wanted = leaves(got[name]), leaves(want)
        assert found.keys() == wanted.keys() and all(
            map(torch.equal, sum(found.values(), []), sum(wanted.values(), []))
        )
    assert got["some"]["model.pair"].inputs[0][0].dtype == torch.float64 and len(got["cache"]) > len(got["some"]) == 2
    clean = net()
    hidden = torch.relu(clean.layers[0](OTHER) + torch.cat([torch.zeros(5, 8), VECTOR[None]]))
    assert torch.equal(got["cache"].model.layers[1].output, clean.layers[1](hidden))


@pytest.mark.parametrize("together", [False, True])
def test_a_cache_of_one_invoke(together, tmp_path):
    model = NNsight(net())
    with model.trace() as tracer:
        one, two = (
            tracer.batch(INPUT[:1], OTHER[:1]) if together else (tracer.invoke(INPUT[:1]), tracer.invoke(OTHER[:1]))
        )
        with one:
            model.layers[0].output[:] = 0
        with two:
            cache = tracer.cache(["model.layers.0"])
        with tracer.invoke():
            whole = model.head.output.save()
    tracer.graph.save_plan(tmp_path / "p", names={"acts": cache, "whole": whole})
    plan = load_plan(tmp_path / "p", NNsight(net()))
    assert plan.graph == tracer.graph
    got = plan(INPUT[:1], OTHER[:1])
    assert torch.equal(got["whole"], whole) and torch.equal(
        got["acts"].model.layers[0].output, net().layers[0](OTHER[:1])
    )
    damaged(tmp_path / "p", lambda d: d["caches"][0].update(modules=["model.layers.9"]))
    with pytest.raises(
        PlanError, match=r"test_plans\.py:\d+ uses the module `layers.9`, which this model does not have"
    ):
        load_plan(tmp_path / "p", NNsight(net()))


def test_a_value_of_a_cache_in_the_body_is_refused(tmp_path):
    model = NNsight(net())
    with pytest.raises(nnsight_fx.MissedSiteError), model.trace(INPUT, compile=False) as tracer:
        cache = tracer.cache(["model.layers.0"])
        (cache["model.layers.0"].output + 1).save()
    with pytest.raises(PlanError, match=r"test_plans\.py:\d+: .*it uses what a cache holds. Read the site itself"):
        tracer.graph.save_plan(tmp_path / "p")


def with_extra():
    module = net()
    module.extra = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).requires_grad_(False)
    return module


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_call_with_hooks(engine, tmp_path):
    """An attached module in sight of the trace: another invoke changes what is inside it."""
    module = with_extra()
    model = NNsight(module)

    def body(x, y):
        with model.trace(compile=False) as tracer:
            with tracer.invoke(x):
                model.layers[1].output = model.extra(model.layers[1].output, hook=True)
                inner = model.extra[0].output.save()
                out = model.head.output.save()
            with tracer.invoke(y):
                model.layers[0].output[:] *= 2
        return tracer, inner, out

    tracer, inner, out = body(INPUT[:1], OTHER[:1])
    tracer.graph.save_plan(tmp_path / "p", names={"inner": inner, "out": out})
    plan = load_plan(tmp_path / "p", model)
    assert plan.graph == tracer.graph
    _, inner, out = body(OTHER[:1], INPUT[:1])
    got = plan(OTHER[:1], INPUT[:1], compile=engine)
    assert torch.equal(got["inner"], inner) and torch.equal(got["out"], out)
    handle = module.layers[1].register_forward_hook(lambda m, a, out: module.extra(out))
    assert torch.equal(got["out"], module(OTHER[:1]))
    handle.remove()
    with pytest.raises(PlanError, match="`extra`?.*which this model does not have"):
        load_plan(tmp_path / "p", NNsight(net()))


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_the_edits_of_the_model_are_part_of_the_plan(engine, tmp_path):
    model = NNsight(net())
    with model.edit() as edited:
        edited.layers[2].output = edited.layers[2].output * 2
    with edited.edit(inplace=True):
        edited.layers[0].output[:, 0] = 1

    def body(x):
        with edited.trace(x, compile=False) as tracer:  # earlier in the model than the first edit is
            cache = tracer.cache(["model.layers.2"])
            model.layers[0].output[:] += VECTOR
            out = model.head.output.save()
        return tracer, cache, out

    tracer, cache, out = body(INPUT)
    tracer.graph.save_plan(tmp_path / "p", names={"out": out, "acts": cache})
    plan = load_plan(tmp_path / "p", model)
    assert plan.graph == tracer.graph
    got, (_, cache, out) = plan(OTHER, compile=engine), body(OTHER)
    assert torch.equal(got["out"], out) and leaves(got["acts"]).keys() == {"model.layers.2"}
    assert torch.equal(got["acts"]["model.layers.2"].output, cache["model.layers.2"].output)
    with model.trace(OTHER, compile=False):
        clean = model.head.output.save()
    assert not model._host.edits and torch.equal(clean, net()(OTHER)) and not torch.equal(clean, out)
    with pytest.raises(PlanError, match="this model has edits of its own"):
        load_plan(tmp_path / "p", edited)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_conditions(engine, tmp_path):
    model = NNsight(net())

    def body(x, limit):
        with model.trace(x, compile=False) as tracer:
            h = model.layers[0].output
            with tracer.cond(h.sum() > limit):
                model.layers[1].output = model.layers[1].output * 0 + VECTOR
                with tracer.cond(h.mean() < 100.0):
                    h[:, 0] = 1
                    inner = (h * 2).save()
                tripled = h * 3
            late = (tripled - 1).save()
            out = model.head.output.save()
        return tracer, {"inner": inner, "late": late, "out": out}

    limit = float(net().layers[0](INPUT).sum()) - 1.0
    tracer, saved = body(INPUT, limit)
    assert torch.equal(saved["inner"][:, 0], torch.full((2, 8), 2.0))
    tracer.graph.save_plan(tmp_path / "p", names=saved)
    plan = load_plan(tmp_path / "p", NNsight(net()))
    assert plan.graph == tracer.graph
    got = plan(INPUT, compile=engine)
    assert all(torch.equal(got[name], value) for name, value in saved.items())
    other = INPUT - 10 * net().layers[0].weight.sum(0)  # the condition does not hold
    got, (_, want) = plan(other, compile=engine), body(other, limit)
    assert torch.equal(got["out"], want["out"]) and torch.equal(got["out"], net()(other))
    for name in ("inner", "late"):
        with pytest.raises(nnsight_fx.UnsavedValueError, match="that did not hold"):
            got[name] + 1


class Repeats(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(4):
            x = torch.tanh(self.cell(x))
        return x


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_occurrences(engine, tmp_path):
    torch.manual_seed(0)
    module = Repeats().requires_grad_(False)
    model = NNsight(module)
    with model.trace(INPUT, compile=False) as tracer:
        kept = {}
        for i in tracer.iter[1:3]:
            model.cell.output[:] *= i
            kept[f"step {i}"] = model.cell.output.clone().save()
        kept["out"] = model.output.save()
    tracer.graph.save_plan(tmp_path / "p", names=kept)
    got, seen = load_plan(tmp_path / "p", model)(OTHER, compile=engine), []

    def hook(m, args, out):
        seen.append(out * len(seen) if len(seen) in (1, 2) else out)
        return seen[-1]

    handle = module.cell.register_forward_hook(hook)
    want = module(OTHER)
    handle.remove()
    assert torch.equal(got["out"], want) and torch.equal(got["step 1"], seen[1]) and torch.equal(got["step 2"], seen[2])


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 20), nn.Linear(20, 8)

    def encode(self, h):
        return torch.relu(self.up(h))

    def decode(self, features):
        return self.down(features)


def made_interventions():
    torch.manual_seed(2)
    iv = nnsight_fx.interventions
    return {
        "SAESplice": iv.SAESplice(Autoencoder()),
        "Add": iv.Add(torch.randn(8)),
        "Noise": iv.Noise(0.1),
        "Projection": iv.Projection(torch.randn(2, 8)),
        "Mean": iv.Mean(torch.randn(8)),
        "Resample": iv.Resample(torch.randn(5, 6, 8)),
        "Zero": iv.Zero(),
    }


@pytest.mark.parametrize("name", made_interventions())
def test_modules_of_ones_own_are_their_operations_and_named_tensors(name, tmp_path):
    """An intervention is what it does: the plan needs neither its class nor its code, and its weights keep their names."""
    one = made_interventions()[name].requires_grad_(False)
    model = NNsight(net())
    with model.trace(INPUT, compile=False) as tracer:
        model.layers[1].output = one(model.layers[1].output)
        out = model.head.output.save()
    held = dict(one.named_parameters()) | dict(one.named_buffers())
    names = (
        {"one": one} if name in ("SAESplice", "Noise", "Mean", "Resample") else {}
    )  # others use what they make of theirs
    tracer.graph.save_plan(tmp_path / "p", names={"out": out, **names})
    plan = load_plan(tmp_path / "p", NNsight(net()))
    assert not names or {f"one.{n}" for n in held} == {n for n in plan.constants if n.startswith("one.")}
    module = net()
    handle = module.layers[1].register_forward_hook(lambda m, a, out: one(out))
    for engine in ENGINES[:2]:
        torch.manual_seed(3)
        want = module(OTHER)
        torch.manual_seed(3)
        assert torch.equal(plan(OTHER, compile=engine)["out"], want)
    handle.remove()
    if name == "SAESplice":
        zeroed = {n: torch.zeros_like(v) for n, v in plan.constants.items() if n.startswith("one.sae.down")}
        assert len(zeroed) == 2 and torch.equal(plan(OTHER, constants=zeroed)["out"], net()(OTHER))
    with pytest.raises(PlanError, match="neither a saved value nor a lifted one"):
        tracer.graph.save_plan(tmp_path / "p", names={"other": nn.Linear(2, 2)})


def test_a_generation_is_refused_and_says_what_to_do(tmp_path):
    from .generation.test_generate import gpt2, ids, options

    model = nnsight_fx.LanguageModel(gpt2())
    with model.generate(ids(), **options()) as tracer:
        for _ in tracer.iter[:]:
            model.transformer.h[0].output[:] *= 2
    with pytest.raises(PlanError, match=r"this trace is a generation.*export_edits"):
        tracer.graph.save_plan(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def call_of(document):
    return next(op for op in document["operations"] if op["kind"] == "call")


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda d: d.update(version=99), "version 99, and this nnsight_fx reads version 2"),
        (lambda d: call_of(d).update(target="os.system"), "`os.system`, which is not among the torch operations"),
        (lambda d: call_of(d).update(target="torch.load"), "not among the torch operations"),
        (lambda d: call_of(d).update(target="torch.Tensor.numpy"), "not among the torch operations"),
        (lambda d: d["operations"][0].update(kind="apply"), "a `apply`, which this version does not have"),
        (
            lambda d: call_of(d).update(target="torch.Tensor.add_", args=[{"c": 1}, 1]),
            "changes a constant, which no plan may",
        ),
        (lambda d: call_of(d).update(target="torch.lobpcg"), "not among the torch operations"),
        (lambda d: call_of(d).update(target="getattr"), "`getattr`, which is not among the torch operations"),
        (lambda d: call_of(d)["args"].append({"v": [99, 0]}), "damaged"),
        (lambda d: call_of(d)["args"].append({"eval": "1"}), "damaged"),
        (lambda d: call_of(d)["args"].append({"c": -1}), "damaged"),
        (lambda d: call_of(d)["args"].append({"dtype": "torch.__class__"}), "damaged"),
        (lambda d: d.pop("saved"), "damaged"),
    ],
)
def test_what_a_file_may_not_say(change, text, tmp_path):
    saved_plan(tmp_path / "p", steer)
    damaged(tmp_path / "p", change)
    with pytest.raises(PlanError, match=text):
        load_plan(tmp_path / "p", NNsight(net()))


def test_a_file_that_is_no_plan(tmp_path):
    (tmp_path / "p").write_bytes(b"not a plan")
    with pytest.raises(PlanError, match="is not a saved plan"):
        load_plan(tmp_path / "p", NNsight(net()))
    save_file({"x": torch.ones(1)}, tmp_path / "q")
    with pytest.raises(PlanError, match="its header does not say"):
        load_plan(tmp_path / "q", NNsight(net()))


def test_parameters_are_kept_by_name(tmp_path):
    saved_plan(tmp_path / "p", applied)
    with safe_open(tmp_path / "p", framework="pt") as file:
        assert len(list(file.keys())) == 1  # the vector
    trained = net()
    trained.layers[0].weight.mul_(2)
    model = NNsight(trained)
    assert torch.equal(load_plan(tmp_path / "p", model)(INPUT)["weight"], record(model, applied, INPUT)[1]["weight"])
