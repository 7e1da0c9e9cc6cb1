"""Lines that an earlier recording has made are found again by what was written: another line is never taken for one."""

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight

X = torch.linspace(-1, 1, 32).reshape(8, 4)


@pytest.fixture(params=["hooks", "eager"])
def model(request):
    torch.manual_seed(0)
    made = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    if request.param != "hooks":
        made.compile(backend=request.param)
    return made


def test_a_recorded_index_is_not_two_numbers(model):
    """`Value(5, 0)`, the sixth value, was found where `(5, 0)` was written."""

    def read(by_value):
        with model.trace(X):
            h = model[0].output
            doubled = h.argmax(-1)
            for _ in range(3):
                doubled = doubled + doubled
            zeros = doubled - doubled
            return (h[zeros] if by_value else h[5, 0]).save()

    h = model._module[0](X)
    for by_value in (False, True, False, True):
        assert torch.equal(read(by_value), h[torch.zeros(8, dtype=torch.long)] if by_value else h[5, 0])


def test_changes_in_place_with_tensors_and_numbers(model):
    def steered(vector, position, scale):
        with model.trace(X):
            h = model[0].output
            h[position:] += vector
            h[:, 1] *= scale
            h[position] = vector
            return h.save(), model.output.save()

    module = model._module
    for vector in (torch.ones(4), torch.full((4,), 2.0), torch.ones(1), torch.ones(4, dtype=torch.float64)):
        for position, scale in ((2, 3.0), (4, 3.0), (-3, 0.5)):
            want = module[0](X).detach()
            want[position:] += vector
            want[:, 1] *= scale
            want[position] = vector
            h, out = steered(vector, position, scale)
            assert torch.equal(h, want)
            assert torch.equal(out, module[2](module[1](want)))


def test_one_tensor_that_has_become_another(model):
    """Python gives a number (`id`) again, and a tensor can be given other data."""
    vector, module = torch.ones(4), model._module
    for data in (torch.ones(4), torch.zeros(4), torch.ones(4, dtype=torch.float64), torch.ones(1), torch.ones(8, 1)):
        vector.data = data
        with model.trace(X):
            h = model[0].output
            h += vector
            h += vector
            out = model.output.save()
        want = module[0](X).detach()
        want += vector
        want += vector
        assert torch.equal(out, module[2](module[1](want)))


def test_a_change_that_does_not_fit_is_told_each_time(model):
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"size|broadcast|shape"), model.trace(X):
            h = model[0].output
            h[:, :3] += torch.ones(2)
        with model.trace(X):
            h = model[0].output
            h[:, :3] += torch.ones(3)
            out = model[0].output.save()
        want = model._module[0](X).detach()
        want[:, :3] += 1
        assert torch.equal(out, want)


class Pair(nn.Module):
    def forward(self, x):
        return {"h": x * 2, "g": x * 3}


class Paired(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.out = Pair(), nn.Linear(4, 4)

    def forward(self, x):
        pair = self.pair(x)
        return self.out(pair["h"] + pair["g"])


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_a_change_of_a_container_stands_between_two_lines(engine):
    torch.manual_seed(0)
    module = Paired()
    model = NNsight(module)
    if engine != "hooks":
        model.compile(backend=engine)

    def run(which):
        with model.trace(X):
            x = model.pair.input
            pair = model.pair.output
            if which is not None:
                pair[which] = x
            (x + 1).save()
            return model.output.save()

    for which in (None, "h", "g", None, "g", "h"):
        parts = {"h": X * 2, "g": X * 3} | ({} if which is None else {which: X})
        assert torch.equal(run(which), module.out(parts["h"] + parts["g"]))
