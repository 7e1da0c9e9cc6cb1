"""The greenlets that a body and its run live in."""

import subprocess
import sys

PROGRAM = """
import random
import torch
from nnsight_fx.engine.switch import Coroutine, ThreadState

def run():
    for _ in range(50):
        each.pause()
        torch.ones(1) == None  # a TypeError inside torch, which records the C stack

def deeper(levels, f):
    return f() if levels == 0 else next(map(deeper, (levels - 1,), (f,)))

def junk():
    import json
    json.loads("[" * 200 + "]" * 200)

each, draw = Coroutine(run, ThreadState()), random.Random(0)
deeper(40, each.go_on)
for _ in range(50):
    deeper(draw.randrange(60), junk)
    deeper(draw.randrange(60), each.go_on)
assert each.ended
"""


def test_an_error_inside_torch_in_a_suspended_run():
    """The run goes on from another depth of the C stack than it began at."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
