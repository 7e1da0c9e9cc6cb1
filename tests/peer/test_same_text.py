"""One program text on nnsight 0.8.1 and on ours: the same values to the bit, on hooks and in the captured graph."""

import inspect
import textwrap
from typing import Any

import pytest
import torch

import same_models
from nnsight_fx import NNsight
from nnsight_peer import run_peer

pytestmark = pytest.mark.peer

MODELS = inspect.getsource(same_models)

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
    "in_place_input": """
        with model.trace(x):
            out["before"] = model.blocks[0].output.save()
            model.blocks[1].input[:, 0] = 0
            out["y"] = model.output.save()
    """,
    "nested_tuple_written": """
        with model.trace(x):
            args, kwargs = model.blocks[2].inputs
            model.blocks[2].inputs = ((args[0] * 2,), kwargs)
            out["y"] = model.output.save()
    """,
    "list_of_saves": """
        with model.trace(x):
            for i, block in enumerate(model.blocks):
                out[f"h{i}"] = block.output.save()
    """,
    "get": """
        with model.trace(x):
            out["act"] = model.get("blocks.1.act.output").save()
            out["y"] = model.output.save()
    """,
    "skip_reads_output": """
        with model.trace(x):
            model.blocks[1].skip(model.blocks[1].input * 2)
            out["h"] = model.blocks[1].output.save()
            model.blocks[1].output[:, 0] = 1
            out["y"] = model.output.save()
    """,
    "skip_in_invokes": """
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.blocks[1].skip(model.blocks[1].input * 2)
                out["first"] = model.output.save()
            with tracer.invoke(-x):
                model.blocks[1].skip(model.blocks[1].input * 3)
                out["second"] = model.output.save()
    """,
    "stop_in_an_invoke": """
        with model.trace() as tracer:
            with tracer.invoke(x):
                out["first"] = model.blocks[1].output.save()
                tracer.stop()
            with tracer.invoke(-x):
                out["second"] = model.blocks[0].output.save()
    """,
    "gradient_plain": """
        with model.trace(x):
            h = model.blocks[1].output
            model.output.square().sum().backward()
        out["weight"] = state_of(model)["blocks.1.down.weight"].grad
        out["first"] = state_of(model)["blocks.0.up.bias"].grad
    """,
    "gradient_twice": """
        with model.trace(x):
            h = model.blocks[1].output
            loss = model.output.sum()
            with loss.backward(retain_graph=True):
                out["one"] = h.grad.save()
            with (loss * 2).backward():
                out["two"] = h.grad.save()
    """,
    "gradient_of_several": """
        with model.trace(x):
            a, b = model.blocks[0].output, model.blocks[2].output
            loss = model.output.square().mean()
            with loss.backward():
                out["b"] = b.grad.save()
                out["a"] = a.grad.save()
    """,
    "gradient_after": """
        with model.trace(x):
            model.blocks[1].output = model.blocks[1].output * 2
            y = model.output.save()
        y.square().sum().backward()
        out["weight"] = state_of(model)["blocks.0.up.weight"].grad
    """,
    "trained_vector": """
        v = torch.zeros(8, requires_grad=True)
        with model.trace(x):
            model.blocks[0].output = model.blocks[0].output + v
            y = model.output.save()
        y.square().sum().backward()
        out["grad"] = v.grad
    """,
    "session": """
        with model.session():
            with model.trace(x):
                h = model.blocks[1].output
            with model.trace(-x):
                model.blocks[1].output = h * 0.5
                out["y"] = model.output.save()
    """,
    "session_loop": """
        with model.session():
            with model.trace(x):
                hidden = [block.output for block in model.blocks]
            for i in range(3):
                with model.trace(-x):
                    model.blocks[i].output = hidden[i]
                    out[f"y{i}"] = model.output.save()
    """,
    "edit": """
        with model.edit() as (tracer, edited):
            model.blocks[1].output[:] = 0
        with model.trace(x):
            out["plain"] = model.output.save()
        with edited.trace(x):
            out["edited"] = edited.output.save()
    """,
    "edit_in_place": """
        with model.edit(inplace=True):
            model.blocks[1].output[:, 0] = 0
        with model.edit(inplace=True):
            model.blocks[1].output[:] += 1
        with model.trace(x):
            out["h"] = model.blocks[1].output.save()
            out["edited"] = model.output.save()
        model.clear_edits()
        with model.trace(x):
            out["plain"] = model.output.save()
    """,
    "cache": """
        with model.trace(x) as tracer:
            cache = tracer.cache(include_inputs=True)
            model.blocks[0].output[:] *= 2
        out["h"] = cache["model.blocks.0"].output
        out["in"] = cache["model.blocks.1"].inputs[0][0]
        out["first"] = cache.model.blocks[1].act.input
        out["y"] = cache["model"].output
    """,
    "cache_of_modules": """
        with model.trace(x) as tracer:
            cache = tracer.cache(modules=[model.blocks[0], "model.norm"], dtype=torch.float64)
        out["h"], out["norm"] = cache["model.blocks.0"].output, cache["model.norm"].output
        out["n"] = torch.tensor(len(cache.keys()))
    """,
    "cache_in_an_invoke": """
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.blocks[0].output.save()
            with tracer.invoke(-x):
                cache = tracer.cache()
        out["h"] = cache["model.blocks.2"].output
    """,
    "iter_int": """
        with model.trace(x) as tracer:
            for step in tracer.iter[1]:
                out["second"] = model.twice.output.save()
            out["y"] = model.output.save()
    """,
    "iter_slice": """
        with model.trace(x) as tracer:
            for step in tracer.iter[0:2]:
                model.twice.output += step + 1.0
            out["y"] = model.output.save()
    """,
    "visits": """
        with model.trace(x) as tracer:
            cache = tracer.cache([model.twice])
        out["both"] = torch.stack(cache["model.twice"].output if isinstance(cache["model.twice"].output, list) else [e.output for e in cache["model.twice"]])
    """,
    "applied_to_values": """
        with model.trace(x):
            for i, block in enumerate(model.blocks):
                out[f"lens{i}"] = model.head(model.norm(block.output)).save()
    """,
    "auxiliary": """
        torch.manual_seed(5)
        model.blocks[1].ad = torch.nn.Linear(8, 8)
        with model.trace(x):
            model.blocks[1].output = model.blocks[1].ad(model.blocks[1].output)
            out["y"] = model.output.save()
    """,
    "auxiliary_seen": """
        torch.manual_seed(5)
        model.ad = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        with model.trace() as tracer:
            with tracer.invoke(x):
                model.blocks[1].output = model.ad(model.blocks[1].output, hook=True)
                out["y"] = model.output.save()
            with tracer.invoke():
                out["inner"] = model.ad[0].output.save()
    """,
    "item": """
        with model.trace(x):
            n = model.blocks[0].output.abs().max().item()
            out["n"] = torch.tensor(n)
            model.blocks[1].output[:] = n
            out["y"] = model.output.save()
    """,
    "draws": """
        torch.manual_seed(3)
        with model.trace(x):
            h = model.blocks[0].output
            model.blocks[0].output = h + torch.randn_like(h)
            out["y"] = model.output.save()
        out["next"] = torch.rand(2)
    """,
    "einsum_and_methods": """
        with model.trace(x):
            h = model.blocks[0].output
            out["q"] = torch.einsum("bsd,btd->bst", h, h).softmax(-1).topk(2).values.save()
            out["c"] = torch.cat([h, h.flip(1)], 1).view(2, -1).std(0).save()
            out["shape"] = torch.zeros(h.shape[-1])
    """,
    "source_activation": """
        with model.trace(x):
            out["down"] = model.ops.source.torch_relu_0.output.save()
            model.ops.source.torch_relu_0.output[:] *= 2
            out["y"] = model.output.save()
    """,
    "source_inputs": """
        with model.trace(x):
            args, kwargs = model.ops.source.self_inner_0.inputs
            out["in"] = args[0].save()
            model.ops.source.self_inner_0.output = model.ops.source.self_inner_0.output + 1
            out["y"] = model.output.save()
    """,
    "rename": """
        renamed = NNsight(net, rename={"blocks": "layers", "head": "unembed"})
        with renamed.trace(x):
            out["h"] = renamed.layers[1].output.save()
            out["y"] = renamed.unembed.output.save()
    """,
    "without_trace": """
        out["y"] = model.trace(x, trace=False)
    """,
    "module_attribute": """
        with model.trace(x):
            out["y"] = (model.norm.output @ model.head.weight.T + model.head.bias).save()
            out["same"] = model.output.save()
    """,
    "lstm_tuple": """
        with model.trace(x):
            o, (h, c) = model.rnn.output
            model.rnn.output = (o * 0, (c, h))
            out["y"] = model.output.save()
    """,
}
# In-place changes under grad are refused by torch where a program makes them on values that autograd needs; these run without.
WITH_GRAD = ("gradient", "trained")
ON = {"lstm": "Recurrent", "iter": "Twice", "visits": "Twice", "source": "HasOps"}


def text(name: str) -> str:
    body = textwrap.dedent(PROGRAMS[name]).strip()
    return body if name.startswith(WITH_GRAD) else "with torch.no_grad():\n" + textwrap.indent(body, "    ")


def model_of(name: str) -> str:
    return next((model for prefix, model in ON.items() if name.startswith(prefix)), "Net")


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
    net = getattr(same_models, model_of(name))()
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
            "NNsight": NNsight,
            "net": net,
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
