"""`batch_linears`: a body's calls of one linear layer become one."""

import pytest
import torch
import torch.fx as fx
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import nnsight_fx
from nnsight_fx import NNsight, assert_no_fallback, passes
from nnsight_fx.passes.batch_linears import FEW, MANY, together
from nnsight_fx.passes.calls import ModuleCall

from .graphs import targets
from .test_lift_constants import job_for

WIDE = 4
LINEAR, OTHER = nn.Linear(WIDE, 3), nn.Linear(WIDE, 3, bias=False)


def by_hand(build, rows=2, *, grad=False, sizes=None):
    """A graph of `x` of shape `(rows, 4)` and of `w, b`, whose nodes `build(call, x, layer)` makes, and its job."""
    g = fx.Graph()
    x, w, b = g.placeholder("x"), g.placeholder("w"), g.placeholder("b")

    def call(fn, *args, **kwargs):
        return g.call_function(fn, args, kwargs)

    def layer(of, module=LINEAR, name="lm_head"):
        given = {"weight": w, "bias": b} if module.bias is not None else {"weight": w}
        return call(ModuleCall(name, module), given, (of,), {})

    g.output(tuple(build(call, x, layer)))
    mode, job = FakeTensorMode(shape_env=ShapeEnv()), job_for()
    values = [torch.randn(rows, WIDE), LINEAR.weight.detach().requires_grad_(grad), LINEAR.bias.detach()]
    fakes = [mode.from_tensor(v, static_shapes=sizes != "unknown") for v in values]
    job.inputs = lambda: fakes
    return fx.GraphModule({}, g), job, values


def apply(gm, job, values):
    """How many calls were joined; the graph gives what it gave."""
    want = gm(*values)
    count = passes.batch_linears(gm, job)
    gm.graph.lint()
    gm.recompile()
    for got, old in zip(gm(*values), want, strict=True):
        torch.testing.assert_close(got, old, rtol=0, atol=1e-6)
    return count


def layers(call, x, layer, depth=3):
    """A lens on each of some layers, what is made of it, and the last layer."""
    found = []
    for _ in range(depth):
        x = call(torch.tanh, x)
        found.append(call(torch.relu, layer(x)))
    return (*found, x)


def test_fires():
    gm, job, values = by_hand(layers)
    assert apply(gm, job, values) == 3
    assert [t for t in targets(gm) if isinstance(t, ModuleCall)] == [] and targets(gm).count(together) == 1
    names = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert names[:4] == [torch.tanh] * 3 + [together]  # the layers are left without it


def test_two_layers_and_one_call_alone():
    def build(call, x, layer):
        y = call(torch.tanh, x)
        return (
            layer(x),
            layer(x, OTHER, "other"),
            layer(y),
            layer(y, OTHER, "other"),
            layer(y, nn.Linear(4, 3), "third"),
        )

    gm, job, values = by_hand(build)
    assert apply(gm, job, values) == 4 and targets(gm).count(together) == 2


@pytest.mark.parametrize("rows, count", [(FEW, 3), (FEW + 1, 0)])
def test_leaves_calls_with_many_rows(rows, count):
    assert apply(*by_hand(layers, rows)) == count


def test_no_more_than_so_many_rows_at_once():
    gm, job, values = by_hand(lambda *a: layers(*a, depth=MANY // FEW + 2), FEW)
    assert apply(gm, job, values) == MANY // FEW + 2 and targets(gm).count(together) == 2


def test_leaves_what_needs_another():
    def build(call, x, layer):
        first = layer(x)
        return first, layer(call(torch.add, x, call(torch.sum, first)))

    gm, job, values = by_hand(build)
    assert apply(gm, job, values) == 0 and together not in targets(gm)


def test_joins_in_front_of_what_changes_a_value():
    """In front of the change and behind it, not across."""

    def build(call, x, layer):
        h = call(torch.tanh, x)
        first, second = layer(h), layer(call(torch.relu, h))
        call(torch.Tensor.mul_, h, 2)
        return first, second, layer(h), layer(call(torch.relu, h)), h

    gm, job, values = by_hand(build)
    assert apply(gm, job, values) == 4 and targets(gm).count(together) == 2


def test_what_is_made_of_a_result_can_go_on_into_the_model():
    def build(call, x, layer):
        first = layer(x)
        h = call(torch.tanh, call(torch.cat, (x, call(torch.narrow, first, 1, 0, 1)), dim=1))
        return first, h, layer(call(torch.relu, x))

    gm, job, values = by_hand(build)
    assert apply(gm, job, values) == 2


@pytest.mark.parametrize("case", ["grad", "unknown", "backward", "no inputs", "one"])
def test_does_not_fire(case):
    gm, job, values = by_hand(
        lambda *a: layers(*a, depth=1 + (case != "one")),
        grad=case == "grad",
        sizes="unknown" if case == "unknown" else None,
    )
    if case == "backward":
        job.plan.__dict__["backs"] = frozenset({0})
    if case == "no inputs":
        job.inputs = None
    with torch.set_grad_enabled(case == "grad"):
        assert apply(gm, job, values) == 0 and together not in targets(gm)
    job.plan.__dict__.pop("backs", None)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 7)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.norm(x))


def lens(model, x, alpha):
    with torch.no_grad(), model.trace(x):
        found = nnsight_fx.save([])
        for i, layer in enumerate(model.layers):
            if i == 1:
                layer.output[:, -1] += alpha
            found.append(model.head(model.norm(layer.output[:, -1])).softmax(-1)[..., 2])
        found.append(model.output)
    return found


def test_a_logit_lens():
    torch.manual_seed(0)
    module = Blocks()
    model = NNsight(module)
    model.compile(backend=lambda gm, inputs: gm.forward)  # what is not bit-exact may be joined
    exact = NNsight(module)
    exact.compile(backend="eager")
    for rows in (2, 3, 2):
        x, alpha = torch.randn(rows, 5, 4), torch.randn(())
        want = lens(NNsight(module), x, alpha)
        with assert_no_fallback():
            found, same = lens(model, x, alpha), lens(exact, x, alpha)
        for a, b, c in zip(found, want, same, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
            assert torch.equal(b, c)
    report = dict((name, n) for name, n, _ in model._host.compiled.last[0])
    assert report["batch_linears"] == 2  # in front of the change there is one, which is left
