"""Graph breaks: values read in one segment are used, and changed, in another."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from nnsight_fx import NNsight


class Breaks(nn.Module):
    """A residual stream over a graph break."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.a(x)
        if h.sum().item() > 1e9:  # Dynamo stops here
            h = h * 2
        return self.c(self.b(h) + h)


def steer(model: NNsight, x: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad(), model.trace(x):
        h = model.a.output
        late = model.b.output  # in the next segment
        if how == "in place":
            h[:] = 0
        elif how == "view":
            h[:, 1] += 5
        else:
            model.b.output = late + h
        kept, out = h.save(), model.output.save()
    return kept, out


@pytest.mark.parametrize("how", ["in place", "view", "write"])
@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_a_read_made_in_one_segment_is_changed_in_another(engine, how):
    torch.manual_seed(0)
    module, x = Breaks().requires_grad_(False), torch.randn(3, 4)
    hooks, model = NNsight(module), NNsight(module)
    model.compile(backend=engine)
    for _ in range(2):
        want = steer(hooks, x.clone(), how)
        got = steer(model, x.clone(), how)
        torch.testing.assert_close(got, want)
    assert len(model.explain().to_dict()["captures"][0]["segments"]) == 2
