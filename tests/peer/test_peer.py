"""The harness itself, and the first comparison: nnsight against hand-written forward hooks."""

import sys
from typing import Any

import pytest
import torch

from nnsight_peer import PeerError, run_peer

pytestmark = pytest.mark.peer

# One text on both sides: the classes cannot be shared otherwise, for nnsight is never imported here.
MLP = """
class MLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(8, 16)
        self.act = torch.nn.GELU()
        self.down = torch.nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))
"""

STEER = """
net = MLP()
net.load_state_dict(state)
model = NNsight(net)
with model.trace(x):
    model.up.output[:, 0] += vector
    hidden = model.act.output.save()
    result = model.output.save()
out["hidden"] = hidden
out["result"] = result
"""


def steered_with_hooks(net, x, vector):
    """STEER by hand."""
    seen = {}

    def steer(module, args, output):
        output[:, 0] += vector

    def keep(module, args, output):
        seen["hidden"] = output

    handles = [net.up.register_forward_hook(steer), net.act.register_forward_hook(keep)]
    try:
        return {"result": net(x), **seen}
    finally:
        for handle in handles:
            handle.remove()


def test_nnsight_equals_forward_hooks():
    scope: dict[str, Any] = {"torch": torch}
    exec(MLP, scope)
    net, x, vector = scope["MLP"](), torch.randn(4, 8), torch.randn(4)

    theirs = run_peer(MLP + STEER, state=net.state_dict(), x=x, vector=vector)
    by_hand = steered_with_hooks(net, x, vector)

    assert theirs.keys() == by_hand.keys()
    for name, value in by_hand.items():
        torch.testing.assert_close(theirs[name], value.detach(), rtol=0, atol=0)
    assert not torch.equal(net(x), by_hand["result"])  # the steering did something


def test_programs_share_a_process_and_nothing_else():
    program = """
    import os
    out["pid"], out["draw"], out["leaked"] = os.getpid(), torch.rand(3), "mark" in globals()
    mark = 1
    """
    first, second = run_peer(program), run_peer(program)
    assert first["pid"] == second["pid"]
    assert not second["leaked"]
    assert torch.equal(first["draw"], second["draw"])
    assert torch.equal(first["draw"], torch.rand(3))  # this process is at seed 0 too


def test_values_travel_unchanged():
    values = {
        "half": torch.ones(2, dtype=torch.bfloat16),
        "turned": torch.rand(2, 3).T,
        "plain": [1, ("a", None)],
    }
    back = run_peer("out.update(values)", values=values)
    assert back["plain"] == values["plain"]
    assert back["half"].dtype is torch.bfloat16
    assert back["turned"].stride() == values["turned"].stride()
    assert torch.equal(back["turned"], values["turned"])


def test_an_error_in_a_program_is_told_and_the_next_one_runs():
    with pytest.raises(PeerError, match="no such value") as raised:
        run_peer('raise IndexError("no such value")')
    assert raised.value.types[:2] == ["IndexError", "LookupError"]
    assert run_peer('out["x"] = 1') == {"x": 1}


def test_what_a_program_prints_is_no_answer():
    assert run_peer('print("done"); out["x"] = 1') == {"x": 1}


def test_a_dead_peer_is_an_error_and_the_next_program_gets_a_new_one():
    with pytest.raises(RuntimeError, match="process died"):
        run_peer("import os; os._exit(1)")
    assert run_peer('out["x"] = 1') == {"x": 1}


def test_nnsight_is_not_imported_here():
    assert "nnsight" not in sys.modules
