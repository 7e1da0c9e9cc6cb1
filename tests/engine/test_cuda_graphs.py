"""CUDA graphs: as far as they can be seen without a GPU, and on one."""

import pytest
import torch
import torch.nn as nn
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from nnsight_fx import NNsight
from nnsight_fx.engine.captured.cuda_graphs import apart, recorded


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        return self.b(torch.relu(self.a(x) + self.shift))


@pytest.mark.parametrize(
    ("backend", "mode", "options", "want"),
    [
        ("inductor", "reduce-overhead", {}, True),
        ("inductor", "max-autotune", {}, True),
        ("inductor", "max-autotune-no-cudagraphs", {}, False),
        ("inductor", None, {"triton.cudagraphs": True}, True),
        ("inductor", "reduce-overhead", {"triton.cudagraphs": False}, False),
        ("inductor", None, {}, False),
        ("aot_eager", "reduce-overhead", {}, False),
    ],
)
def test_which_options_record(backend, mode, options, want):
    assert recorded(backend, mode, options) is want


def test_values_get_memory_of_their_own_and_go_on_to_share_it():
    base, given = torch.arange(12.0), torch.ones(3)
    values = {0: base, 1: base.view(3, 4)[1:], 2: [base[::2], 7], 3: given[:2], 4: "no tensor"}
    copied = apart(values, [given])
    base.fill_(-1)
    assert torch.equal(copied[0], torch.arange(12.0)) and copied[2][1] == 7 and copied[4] == "no tensor"
    copied[1][0, 0] = 50
    assert copied[0][4] == 50 == copied[2][0][2]  # one memory, as before
    assert copied[3].data_ptr() == given.data_ptr()


def test_what_can_be_differentiated_stays_differentiable():
    w = torch.ones(3, requires_grad=True)
    copied = apart({0: w * 2, 1: w}, [])
    assert copied[1] is w
    copied[0].sum().backward()
    assert torch.equal(w.grad, torch.full((3,), 2.0))


def static_inputs(run):
    """For each graph that `run(backend)` compiles: how many inputs there are, and which stay where they are."""
    seen = []

    def inner(gm, inputs, **kwargs):
        seen.append((len(inputs), sorted(kwargs["static_input_idxs"])))
        return compile_fx_inner(gm, inputs, **kwargs)

    with torch._functorch.config.patch(enable_autograd_cache=False):
        run(lambda gm, inputs: compile_fx(gm, inputs, inner_compile=inner))
    return seen


@pytest.mark.inductor
@pytest.mark.parametrize("capture", ["dynamo", "symbolic"])
def test_parameters_are_static_inputs(capture):
    """Else a replay would copy each of them."""
    vector = torch.randn(4)

    def plain(backend):
        with torch.no_grad():
            torch.compile(Net(), backend=backend)(torch.randn(2, 4))

    def ours(backend):
        model = NNsight(Net())
        model.compile(backend=backend, capture=capture)
        with torch.no_grad(), model.trace(torch.randn(2, 4)):
            model.a.output[:] += vector
            model.a.output.save()

    ((_, theirs),) = static_inputs(plain)
    ((inputs, found),) = static_inputs(ours)
    assert len(found) == len(theirs) == 5 and inputs == 7  # the input and the vector are not


@pytest.mark.inductor
def test_explain_says_why_there_are_none():
    model = NNsight(Net())
    model.compile(mode="reduce-overhead")
    with torch.no_grad(), model.trace(torch.randn(2, 4)):
        out = model.a.output.save()
    assert out.shape == (2, 4)
    assert "no CUDA graph: the model is on the cpu" in str(model.explain())


@pytest.mark.gpu
def test_replays_leave_what_was_saved():
    torch.manual_seed(0)
    net = Net().cuda()
    model, hooks = NNsight(net), NNsight(net)
    model.compile(mode="reduce-overhead")

    def trace(m, x):
        with torch.no_grad(), m.trace(x) as tracer:
            m.a.output[:] += 1
            h, out = m.a.output.save(), tracer.result.save()
        return h, out

    inputs = [torch.randn(2, 4, device="cuda") for _ in range(6)]
    kept = [trace(model, x) for x in inputs]  # replays from the third on
    for got, x in zip(kept, inputs, strict=True):
        torch.testing.assert_close(got, trace(hooks, x))
    assert "no CUDA graph" not in str(model.explain())
