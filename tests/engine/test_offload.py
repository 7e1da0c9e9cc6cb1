"""`tracer.cache(device="cpu")` of a model on a GPU: values are on their way while it goes on."""

import pytest
import torch
import torch.fx as fx
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnsight_fx import NNsight
from nnsight_fx.engine.offload import Offload
from nnsight_fx.model.cache import observed
from nnsight_fx.passes.emit import Emitter
from nnsight_fx.plan.verbs import Observation

TO_CPU = observed(True, "cpu", torch.float16)


@pytest.fixture
def on_gpu():
    """A value on a GPU, whether there is one or not."""
    with FakeTensorMode():
        return torch.empty(2, 3, device="cuda")


@pytest.mark.parametrize(
    "how, wanted",
    [
        (TO_CPU, True),
        (observed(False, "cpu", None), True),
        (observed(True, None, torch.float16), False),
        (observed(True, "cuda", None), False),
        (observed(True, None, None), False),
    ],
)
def test_what_is_taken_from_a_gpu(on_gpu, how, wanted):
    assert how.leaves_gpu(on_gpu) is wanted
    assert not how.leaves_gpu(torch.empty(2, 3))


def test_what_stays_on_its_autograd_graph_is_moved_as_it_is(on_gpu):
    kept = observed(False, "cpu", None)
    assert not kept.leaves_gpu(on_gpu.requires_grad_()) and TO_CPU.leaves_gpu(on_gpu.requires_grad_())


def test_a_graph_leaves_the_move_to_the_run(on_gpu):
    graph = fx.Graph()
    emitter = Emitter.__new__(Emitter)
    emitter._emit = lambda op, target, args=(), kwargs=None: graph.create_node(op, target, args, kwargs or {})
    for value in (on_gpu, torch.empty(2, 3)):
        node = graph.placeholder("x")
        node.meta["example_value"] = value
        made = emitter.observed(node, TO_CPU)
        assert (made.target, made.args[0].target) == ("to", "detach")
        assert made.kwargs["device"].type == value.device.type and made.kwargs["dtype"] == torch.float16
        assert made.kwargs.get("copy", False) is value.is_cuda  # what changes the value later, changes no copy


def test_nothing_to_wait_for():
    Offload().wait()
    assert Observation(()).to == {}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.b(self.a(x).relu_())  # what was seen is changed behind the site


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_values_are_what_the_site_had(backend):
    torch.manual_seed(0)
    net = Net().cuda()
    model = NNsight(net)
    if backend is not None:
        model.compile(backend=backend)
    for _ in range(3):
        x = torch.randn(512, 64, device="cuda")
        with torch.no_grad(), model.trace(x) as tracer:
            cache = tracer.cache(device="cpu", dtype=torch.float64)
        got = cache["model.b"].output
        assert got.device.type == "cpu" and got.is_pinned() and got.dtype == torch.float64
        for path, want in (("model.b", net(x)), ("model.a", net.a(x))):
            torch.testing.assert_close(cache[path].output, want.detach().cpu().double(), rtol=1e-4, atol=1e-5)
