"""What a derivative cannot be is an error at the user's line."""

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight
from nnsight_fx.errors import MissedSiteError, NestedTraceError, NotConnectedError, NotRecordableError
from tests.derivatives.test_vjp import X, engines, net, wrap


def refused(model, body, error, match, inputs=X, **options):
    with pytest.raises(error, match=match):
        model.vjp(body, inputs, **options)


@engines
def test_a_source_that_no_target_depends_on(engine):
    model = wrap(net(), engine)
    here = r"test_errors.py:\d+: "
    late = lambda tracer: (model.blocks[0].output[0], model.blocks[1].output[0])  # noqa: E731
    text = "the target `blocks.0.output` does not depend on the source `blocks.1.output`"
    refused(model, late, NotConnectedError, here + text)
    part = lambda tracer: (model.head.output, model.blocks[1].output[0][:, -1])  # noqa: E731
    refused(
        model,
        part,
        NotConnectedError,
        r"the target `head.output` does not depend on the source that .*test_errors.py:\d+ computes",
    )
    several = lambda tracer: ((model.blocks[0].output[0], model.embed.output), model.head.output)  # noqa: E731
    text = "none of the targets `blocks.0.output`, `embed.output` depends on the source `head.output`"
    refused(model, several, NotConnectedError, text)


@engines
def test_integers(engine):
    model = wrap(net(), engine)
    body = lambda tracer: (model.head.output, model.embed.input)  # noqa: E731
    refused(
        model, body, NotRecordableError, r"test_errors.py:\d+: the source `embed.input` is int64, and has no derivative"
    )
    body = lambda tracer: (model.head.output.argmax(-1), model.embed.output)  # noqa: E731
    refused(model, body, NotRecordableError, r"the target .* is int64")


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.act(self.a(self.first(x))))


@engines
@pytest.mark.parametrize("lower", [False, True])
def test_a_source_that_the_model_changes_in_place(engine, lower):
    model = wrap(InPlace(), engine)

    def body(tracer):
        first = [model.first.output] if lower else []
        return model.b.output, [*first, model.a.output]

    refused(
        model,
        body,
        NotConnectedError,
        r"test_errors.py:\d+: .*source.* is changed in place behind its site",
        torch.ones(2, 4),
    )
    model.vjp(lambda tracer: (model.b.output, model.act.output), torch.ones(2, 4))


@engines
def test_a_site_that_is_not_reached(engine):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x))

    model = wrap(Twice(), engine)
    refused(
        model, lambda tracer: (model.b.output, model.c.output), MissedSiteError, r"test_errors.py:\d+", torch.ones(2, 4)
    )


def test_names_to_freeze():
    model = NNsight(net())
    body = lambda tracer: (model.head.output, model.embed.output)  # noqa: E731
    refused(
        model,
        body,
        ValueError,
        r"test_errors.py:\d+: `freeze` knows no part `norm`; did you mean `norms`\?",
        freeze={"norm"},
    )


@engines
def test_a_frozen_part_that_is_not_there(engine):
    model = wrap(net(), engine)
    body = lambda tracer: (model.head.output, model.embed.output)  # noqa: E731
    for name, looked in (
        ("attention", "a softmax whose result"),
        ("norms", "`layer_norm`"),
        ("gates", "the activation of one"),
    ):
        refused(
            model,
            body,
            NotConnectedError,
            rf'test_errors.py:\d+: `freeze=\{{"{name}"\}}`, and there is nothing.*Looked for: {looked}',
            freeze=name,
        )


def test_cotangents_of_another_shape():
    model = NNsight(net())
    body = lambda tracer: (model.head.output, {"a": model.embed.output, "b": model.blocks[0].output[0]})  # noqa: E731
    _, pull = model.vjp(body, X)
    with pytest.raises(
        ValueError,
        match=r"test_errors.py:\d+: cotangents for `head.output` are of shape \(n, 2, 3, 5\).*say `x.unsqueeze\(0\)`",
    ):
        pull(torch.ones(2, 3, 5))
    with pytest.raises(ValueError, match=r"given is of shape \(4, 2, 3, 4\)"):
        pull(torch.ones(4, 2, 3, 4))
    with pytest.raises(ValueError, match="tangents have the structure that the body returned"):
        pull.push({"a": torch.ones(1, 2, 3, 6)})
    with pytest.raises(ValueError, match="the same n for all"):
        pull.push({"a": torch.ones(1, 2, 3, 6), "b": torch.ones(2, 2, 3, 6)})
    with pytest.raises(ValueError, match="at least one; it is 0"):
        model.vjp(body, X, chunk=0)


def test_bodies():
    model = NNsight(net())
    refused(
        model,
        lambda tracer: model.head.output,
        NotRecordableError,
        r"test_errors.py:\d+: the body of a derivative returns two things",
    )
    refused(
        model, lambda tracer: (model.head.output, torch.ones(3)), NotRecordableError, "a source is a recorded value"
    )
    refused(model, lambda tracer: (model.head.output, []), NotRecordableError, "gives no source")

    def looks(tracer):
        h = model.embed.output
        return (model.head.output, h) if h.sum() > -1e9 else None

    refused(model, looks, NotRecordableError, "the body looks at a value")

    def own(tracer):
        h = model.embed.output.requires_grad_()
        model.head.output.sum().backward()
        return model.head.output, h

    refused(model, own, NotRecordableError, "no backward of its own")

    def stops(tracer):
        h = model.embed.output
        tracer.stop()
        return h, h

    refused(model, stops, NotRecordableError, "ended by `tracer.stop\\(\\)`")


def test_draws():
    model = NNsight(net().train())
    body = lambda tracer: (model.head.output, model.embed.output)  # noqa: E731
    refused(model, body, NotRecordableError, r"test_errors.py:\d+: the model draws random numbers .*`model.eval\(\)`")
    assert model._module.training


def test_within_a_trace_or_session():
    model = NNsight(net())
    body = lambda tracer: (model.head.output, model.embed.output)  # noqa: E731
    with model.session():
        refused(model, body, NestedTraceError, "a forward of its own")
    with model.trace(X):
        refused(model, body, NestedTraceError, "a forward of its own")
    with pytest.raises(TypeError, match="`frezze=` is no keyword"):
        model.vjp(body, X, frezze={"norms"})
