"""`linearize`: the derivative as a graph of its own, beside a forward that keeps what it needs."""

import sys

import pytest
import torch
import torch.fx as fx
import torch.nn as nn

from nnsight_fx import NNsight
from nnsight_fx.passes.differentiate import traced_by
from nnsight_fx.passes.frozen import Frozen
from nnsight_fx.passes.job import Job, Progress
from nnsight_fx.passes.linearize import linearize
from nnsight_fx.plan.plan import Groups, InterventionGraph

PLAN = InterventionGraph.of((), Groups((None,), 0), "", ())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.c(torch.tanh(self.b(self.a(x))))


def split(body, monkeypatch):
    """The forward and the derivative that a body's trace is compiled as."""
    torch.manual_seed(0)
    module = Net().double()
    model, seen = NNsight(module), {}
    here = sys.modules["nnsight_fx.passes.linearize"]
    inner = here._split

    def noted(gm, flow):
        seen["derivative"] = inner(gm, flow)
        seen["forward"] = gm.graph
        return seen["derivative"]

    monkeypatch.setattr(here, "_split", noted)
    model.compile(backend="eager")
    x = torch.linspace(-1, 1, 8, dtype=torch.double).view(2, 4)
    got = model.jacobian(lambda tracer: body(model), x)
    return module, x, got, seen


def operations(graph):
    return [n.target.__name__ for n in graph.nodes if n.op == "call_function"]


def test_does_not_fire_without_a_derivative():
    gm = fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    assert linearize(gm, Job(PLAN, Progress([], set(), {}, set()))) == 0
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"][0] is torch.relu


def test_forward_and_derivative_share_no_work(monkeypatch):
    module, x, got, seen = split(lambda m: (m.c.output, m.b.output), monkeypatch)
    want = torch.func.jacrev(lambda h: module.c(torch.tanh(h)))(module.b(module.a(x)).detach())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    forward, back = operations(seen["forward"]), operations(seen["derivative"].graph.graph)
    assert forward.count("addmm.default") == 3 and "tanh_backward.default" not in forward
    assert back.count("mm.default") == 1 and "addmm.default" not in back and "tanh.default" not in back


def test_nothing_below_the_lowest_source_is_kept(monkeypatch):
    _, _, _, low = split(lambda m: (m.c.output, m.a.output), monkeypatch)
    monkeypatch.undo()
    _, _, _, high = split(lambda m: (m.c.output, m.b.output), monkeypatch)
    assert operations(low["derivative"].graph.graph).count("mm.default") == 2
    assert operations(high["derivative"].graph.graph).count("mm.default") == 1


def test_parameters_are_taken_as_they_are_and_views_made_anew(monkeypatch):
    _, _, _, seen = split(lambda m: (m.c.output, m.b.output), monkeypatch)
    kept = seen["derivative"].kept
    assert [where for where, _, _ in kept].count("input") == 1  # the weight of `c`
    assert "t.default" in operations(seen["derivative"].graph.graph)


def test_two_targets_and_two_sources(monkeypatch):
    module, x, got, _ = split(lambda m: ((m.b.output, m.c.output), (m.a.output, m.b.output)), monkeypatch)
    h = module.a(x).detach()
    want = torch.func.jacrev(lambda h: (module.b(h), module.c(torch.tanh(module.b(h)))))(h)
    for part, whole in zip(got, want, strict=True):
        torch.testing.assert_close(part[0], whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[0][1], torch.eye(8, dtype=torch.double).view(2, 4, 2, 4))


# -- the function mode -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("norms",), ("attention", "gates")])
def test_it_cuts_what_it_is_told(names):
    x = torch.linspace(-1, 1, 8, dtype=torch.double).view(2, 4).requires_grad_()
    with Frozen(names) as frozen:
        (torch.nn.functional.layer_norm(x, (4,)) * torch.arange(4)).sum().backward()
    centred = x.detach() - x.detach().mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    weight = torch.arange(4, dtype=torch.double)
    still = ((weight - weight.mean()) * scale).expand(2, 4)
    assert torch.allclose(x.grad, still) is ("norms" in names)
    assert frozen.missing() == next((n for n in sorted(names) if n != "norms"), None)


def test_it_forgets_what_is_gone():
    with Frozen(("attention",)) as frozen:
        for _ in range(3):
            torch.ones(2, 2).softmax(-1)
    assert len(frozen.marks) == 0


def test_it_works_on_fakes():
    x = torch.ones(2, 4)
    assert traced_by(lambda x: [torch.relu(x)], [x]).graph.find_nodes(
        op="call_function", target=torch.ops.aten.relu.default
    )
