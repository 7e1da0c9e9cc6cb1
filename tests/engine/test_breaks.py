"""Graph breaks in every layer: Dynamo captures frame by frame, and layers of one class share their code."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight, assert_max_compiles, assert_no_fallback

X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Layer(nn.Module):
    """Two calls of one module, and a branch on a value between them."""

    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x):
        x = self.fc(x)
        if x.sum() > 0:
            x = x * 2
        return self.act(self.fc(x)) + x.mean()


class Model(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def both(depth: int = 3) -> tuple[NNsight, NNsight]:
    torch.manual_seed(0)
    hooks, spliced = NNsight(Model(depth)), NNsight(Model(depth))
    spliced._module.load_state_dict(hooks._module.state_dict())
    spliced.compile(backend="eager")
    return hooks, spliced


def read(model, tracer):
    kept = [model.layers[i].act.input.save() for i in range(len(model.layers))]
    return [*kept, model.output.save()]


def write_a_second_call(model, tracer):
    for i in (0, 2):
        model.layers[i].fc.output[:] = i
        model.layers[i].fc.next().output[:, 1] += i + 1
    return [model.output.save()]


def write_another_shape(model, tracer):
    with tracer.iter[1]:
        model.layers[1].fc.output = model.layers[1].fc.output.mean(0)
    model.layers[2].act.output = model.layers[2].act.output[:1]
    return [model.output.save()]


def skip(model, tracer):
    h = model.layers[0].output
    model.layers[1].skip(h * 3)
    kept = model.layers[1].output.save()
    model.layers[2].act.skip(h + 1)
    return [kept, model.output.save()]


PROGRAMS = [read, write_a_second_call, write_another_shape, skip]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_each_layer_is_itself(program):
    found = []
    for model in both():
        for x in (X, X + 1, X):
            with assert_no_fallback(), assert_max_compiles(0 if len(found) in (2, 5) else 99):
                with model.trace(x) as tracer:
                    kept = program(model, tracer)
            found.append(kept)
    for hooks, spliced in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(spliced, hooks, rtol=0, atol=0)


@pytest.mark.slow(reason="captures 140 segments")
def test_more_layers_than_dynamo_has_patience_for():
    hooks, spliced = both(depth=70)
    for model in (hooks, spliced):
        with assert_no_fallback(), model.trace(X) as tracer:
            kept = read(model, tracer)
        if model is hooks:
            want = kept
    assert spliced.explain().to_dict()["captures"][0]["live"] == ["output"]  # of the root, which is broken itself
    torch.testing.assert_close(kept, want, rtol=0, atol=0)


def test_a_skip_that_waits_for_its_own_output_is_not_taken():
    hooks, spliced = both()
    messages = []
    for model in (hooks, spliced):
        with pytest.raises(Exception, match="`layers.1.output` .* was skipped, but the run never reached it") as caught:
            with model.trace(X):
                h = model.layers[1].output
                kept = h.save()
                model.layers[1].skip(h * 2)
        messages.append((type(caught.value), str(caught.value), kept))
    assert messages[0][:2] == messages[1][:2]
    torch.testing.assert_close(messages[1][2], messages[0][2], rtol=0, atol=0)
