"""Random sweeps on random models: `model.sweep`, the nested loop of traces in a session, and the loop of traces alone agree."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nnsight_fx import NNsight

from ..fuzz.nets import LAYERS, Net, Place

SWEEPS = 20
KINDS = ("read", "write", "in place", "row in place", "two saves", "swap")
DRAWN = sorted(
    set(LAYERS) - {"dropout", "caching"}
)  # dropout draws for each cell (`test_store`), a cache is nothing to share


@dataclass(frozen=True)
class Sweep:
    """What one body does: at each place that the grid goes to something of its own, with the cell's scale and row."""

    net: Net
    places: tuple[Place, ...]
    kinds: tuple[str, ...]
    scales: tuple[float, ...]
    rows: tuple[int, ...]
    late: Place  # read behind the change, where it comes behind it
    stop: bool
    chunk: int

    @property
    def over(self) -> dict[str, Any]:
        return {"place": range(len(self.places)), "scale": self.scales, "row": self.rows}

    def body(self, model: NNsight) -> Any:
        def run(tracer: Any, place: int, scale: float, row: int) -> dict[str, torch.Tensor]:
            at, kind = self.places[place], self.kinds[place]
            value = read(model, at)
            found = {"before": few(value.clone())}
            if kind == "write":
                write(model, at, value * scale)
            elif kind == "in place":
                value.mul_(scale)
            elif kind == "row in place":
                value[:, row] = value[:, row] * scale + 1
            elif kind == "swap":
                write(model, at, value.flip(1) - scale)
            found["after"] = few(value) if kind == "two saves" else found["before"] * 2
            found["late"] = few(read(model, self.late))
            return found

        return run


def read(model: NNsight, place: Place) -> Any:
    envoy = model.get(place.path) if place.path else model
    value = envoy.output if place.kind == "output" else envoy.input
    return (
        value
        if place.leaf is None
        else getattr(value, place.leaf)
        if hasattr(value, str(place.leaf))
        else value[place.leaf]
    )


def write(model: NNsight, place: Place, value: Any) -> None:
    envoy = model.get(place.path) if place.path else model
    if place.kind == "output":
        envoy.output = value
    else:
        envoy.input = value


def few(value: Any) -> Any:
    return value.flatten()[:8]


@st.composite
def sweeps(draw: Any) -> Sweep:
    net = Net(tuple(draw(st.lists(st.sampled_from(DRAWN), min_size=2, max_size=4))), draw(st.booleans()), False, True)
    passed = [p for p in net.places(INPUT) if p.call == 0]
    late = draw(st.integers(len(passed) // 2, len(passed) - 1))
    chosen = sorted(draw(st.lists(st.integers(0, late), min_size=1, max_size=3, unique=True)))
    places = tuple(passed[i] for i in chosen)
    kinds = [draw(st.sampled_from(KINDS if p.leaf is None else KINDS[:1] + KINDS[2:5])) for p in places]
    scales = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=1, max_size=2, unique=True))
    rows = draw(st.lists(st.integers(-3, 2), min_size=1, max_size=2, unique=True))
    stop, chunk = draw(st.booleans()), draw(st.sampled_from([2, 5, 64]))
    return Sweep(net, places, tuple(kinds), tuple(scales), tuple(rows), passed[late], stop, chunk)


INPUT = torch.linspace(-1, 1, 24).reshape(2, 3, 4).sin()


def wrap(sweep: Sweep, engine: str) -> NNsight:
    model = NNsight(sweep.net.build())
    if engine != "hooks":
        model.compile(backend=engine, dynamic=True)
    return model


def looped(sweep: Sweep, engine: str, session: bool) -> dict[str, torch.Tensor]:
    """The loop that a researcher writes."""
    model, found = wrap(sweep, engine), {}
    body = sweep.body(model)

    def loop() -> None:
        for cell in itertools.product(*sweep.over.values()):
            with model.trace(INPUT.clone()) as tracer:
                for name, value in body(tracer, *cell).items():
                    found.setdefault(name, []).append(value.save())
                if sweep.stop:
                    tracer.stop()

    with torch.no_grad():
        if session:
            with model.session():
                loop()
        else:
            loop()
    return {name: torch.stack(values) for name, values in found.items()}


def outcome(run: Any) -> Any:
    try:
        return run()
    except (RuntimeError, ValueError, TypeError) as error:  # a net that a write breaks breaks each way
        return type(error)


def check(sweep: Sweep, engine: str) -> bool:
    """Do the three agree? Whether there were numbers."""
    alone = outcome(lambda: looped(sweep, "hooks", session=False))
    session = outcome(lambda: looped(sweep, engine, session=True))
    model = wrap(sweep, engine)
    swept = outcome(
        lambda: model.sweep(
            sweep.body(model), INPUT.clone(), sweep.over, stop=sweep.stop, chunk=sweep.chunk, progress=False
        )
    )
    if isinstance(alone, type):
        assert session == swept == alone
        return False
    for name, want in alone.items():
        torch.testing.assert_close(session[name], want)
        torch.testing.assert_close(swept[name].flatten(0, 2), want)
    return True


@pytest.mark.parametrize("engine", ["hooks", pytest.param("eager", marks=pytest.mark.slow)])
def test_a_random_sweep_is_the_loop(engine):
    ran = []

    @settings(
        max_examples=SWEEPS, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(sweeps())
    def run(sweep):
        try:
            ran.append(check(sweep, engine))
        finally:
            torch._dynamo.reset()

    run()
    assert len(ran) >= SWEEPS and sum(ran) >= 0.8 * len(ran)


def test_a_body_that_stops_before_it_returns():
    from nnsight_fx import NotRecordableError

    model = NNsight(Net(("linear", "residual")).build())

    def body(tracer, scale):
        model.layers[0].output * scale
        tracer.stop()

    with pytest.raises(NotRecordableError, match=r"test_generated\.py:\d+: a sweep's body ended by `tracer.stop\(\)`"):
        model.sweep(body, INPUT, {"scale": [1.0]}, progress=False)
