"""One program text on nnsight 0.8.1 and on ours: the same values to the bit, on hooks and in the captured graph."""

import textwrap
from typing import Any

import pytest
import torch

from nnsight_fx import NNsight
from nnsight_peer import run_peer

pytestmark = pytest.mark.peer

MODELS = """
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8)

    def forward(self, x, scale=1.0):
        return x + scale * self.down(self.act(self.up(x)))

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
        self.norm, self.head = torch.nn.LayerNorm(8), torch.nn.Linear(8, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(self.norm(x))

class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = torch.nn.LSTM(8, 8, batch_first=True), torch.nn.Linear(8, 5)

    def forward(self, x):
        out, (h, c) = self.rnn(x)
        return self.head(out + h[-1][:, None] + c[-1][:, None])
"""

PROGRAMS = {
    "read": """
        with model.trace(x):
            out["h"] = model.blocks[1].output.save()
            out["y"] = model.output.save()
    """,
    "write": """
        with model.trace(x):
            model.blocks[0].output = model.blocks[0].output * 2 + 1
            out["y"] = model.output.save()
    """,
    "in_place": """
        with model.trace(x):
            model.blocks[1].output[:, -1] = 0
            model.blocks[2].output[:, 0] += vector
            out["y"] = model.output.save()
    """,
    "chained": """
        with model.trace(x):
            model.blocks[0].output = model.blocks[0].output + 1
            model.blocks[0].output = model.blocks[0].output + 1
            out["after"] = model.blocks[0].output.save()
            out["next"] = model.blocks[1].input.save()
            out["y"] = model.output.save()
    """,
    "inputs": """
        with model.trace(x):
            args, kwargs = model.blocks[1].inputs
            out["arg"] = args[0].save()
            model.blocks[1].input = model.blocks[1].input * 0.5
            out["y"] = model.output.save()
    """,
    "keyword": """
        with model.trace(x):
            args, kwargs = model.blocks[1].inputs
            model.blocks[1].inputs = (args, {"scale": 5.0})
            out["y"] = model.output.save()
    """,
    "skip": """
        with model.trace(x):
            model.blocks[1].skip(model.blocks[0].output * 3)
            out["y"] = model.output.save()
    """,
    "stop": """
        with model.trace(x) as tracer:
            out["h"] = model.blocks[0].output.save()
            tracer.stop()
    """,
    "lens": """
        with model.trace(x):
            h = model.blocks[0].output
            out["early"] = model.head(model.norm(h)).save()
            out["y"] = model.output.save()
    """,
    "invokes": """
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.blocks[0].output[:] = 0
                out["zeroed"] = model.output.save()
            with tracer.invoke(x + 1):
                out["plain"] = model.output.save()
    """,
    "promptless": """
        with model.trace() as tracer:
            with tracer.invoke(x):
                out["first"] = model.blocks[2].output.save()
            with tracer.invoke(-x):
                pass
            with tracer.invoke():
                out["all"] = model.output.save()
    """,
    "patch": """
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(x):
                clean = model.blocks[1].output[:, 2]
                barrier()
            with tracer.invoke(-x):
                barrier()
                model.blocks[1].output[:, 2] = clean
                out["patched"] = model.output.save()
    """,
    "result": """
        with model.trace(x) as tracer:
            model.head.output = model.head.output - 1
            out["y"] = tracer.result.save()
    """,
    "gradient": """
        with model.trace(x):
            h = model.blocks[1].output
            loss = model.output.square().sum()
            with loss.backward():
                out["grad"] = h.grad.save()
        out["weight"] = state_of(model)["head.weight"].grad
    """,
    "gradient_replaced": """
        with model.trace(x):
            h = model.blocks[1].output
            loss = model.output.square().sum()
            with loss.backward():
                h.grad = h.grad * 2
        out["weight"] = state_of(model)["blocks.0.up.weight"].grad
    """,
    "number": """
        with model.trace(x):
            h = model.blocks[0].output
            if h.sum() > 0:
                model.blocks[1].output = model.blocks[1].output * 2
            else:
                model.blocks[1].output = model.blocks[1].output * 3
            out["y"] = model.output.save()
    """,
    "lstm_state": """
        with model.trace(x):
            o, (h, c) = model.rnn.output
            h[:] = 0
            out["o"] = o.save()
            out["y"] = model.output.save()
    """,
}
# In-place changes under grad are refused by torch where a program makes them on values that autograd needs; these run without.
WITH_GRAD = ("gradient", "gradient_replaced")


def text(name: str) -> str:
    body = textwrap.dedent(PROGRAMS[name]).strip()
    return body if name in WITH_GRAD else "with torch.no_grad():\n" + textwrap.indent(body, "    ")


def model_of(name: str) -> str:
    return "Recurrent" if name.startswith("lstm") else "Net"


# nnsight's plain `NNsight` batches no invokes; its models do by these two methods.
HELPER = """
class NNsight(NNsight):
    def _batch_size(self, *args, **kwargs):
        return len(args[0]) if args else 0

    def _batch(self, invokes, fn):
        return ((torch.cat([args[0] for args, _ in invokes]),), {}) if invokes else ((), {})

def state_of(model):
    return dict(net.named_parameters())
"""


@pytest.mark.parametrize("engine", ["hooks", "eager"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_text_gives_the_same_values(name, engine):
    scope: dict[str, Any] = {"torch": torch}
    exec(MODELS, scope)
    net = scope[model_of(name)]()
    x, vector = torch.randn(2, 4, 8), torch.randn(8)
    program = (
        f"{MODELS}\nnet = {model_of(name)}()\nnet.load_state_dict(state)\n{HELPER}\nmodel = NNsight(net)\n{text(name)}"
    )
    theirs = run_peer(program, state=net.state_dict(), x=x, vector=vector)
    model = NNsight(net)
    if engine == "eager":
        model.compile(backend="eager")
    ours: dict[str, Any] = {}
    exec(
        text(name),
        {
            "torch": torch,
            "model": model,
            "x": x,
            "vector": vector,
            "out": ours,
            "state_of": lambda m: dict(net.named_parameters()),
        },
    )
    assert ours.keys() == theirs.keys() and ours
    for key, value in ours.items():
        torch.testing.assert_close(value.detach(), theirs[key], rtol=0, atol=0, msg=lambda m, key=key: f"{key}: {m}")
