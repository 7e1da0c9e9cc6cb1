"""`blocks`: where equal blocks begin."""

import torch
import torch.nn.functional as F

from nnsight_fx.capture.marker import site
from nnsight_fx.passes.blocks import blocks

from .graphs import graph, targets
from .test_lift_constants import job_for

X, W = torch.linspace(-1, 1, 12).reshape(3, 4), torch.randn(4, 4)


def stack(n, name="l.{}", heavy=True):
    """`n` blocks `h + linear(norm(h), w)`."""

    def forward(x, w):
        h = site(x * 2.0, "", "input", 0, True)
        for i in range(n):
            h = site(h, name.format(i), "input", 0, True)
            normed = F.layer_norm(h, (4,))
            h = site(h + (F.linear(normed, w) if heavy else normed * w[0]), name.format(i), "output", 0, True)
        return (F.layer_norm(h, (4,)) @ w,)

    return graph(forward, X, W)


def noted(gm):
    job = job_for()
    assert blocks(gm, job) == len(job.blocks)
    return job.blocks


def test_fires():
    gm = stack(4)
    found = noted(gm)
    linears = [n for n in gm.graph.nodes if n.target is F.linear]
    assert found[:4] == linears  # with the norm of each block in front of its cut
    assert len(found) == 5 and found[4] is gm.graph.output_node().args[0][0]  # the matrix product behind the last


def test_changes_nothing():
    gm = stack(4)
    before = targets(gm)
    noted(gm)
    assert targets(gm) == before


def test_blocks_without_matrix_products_begin_at_their_markers():
    gm = stack(4, heavy=False)
    found = noted(gm)
    assert [n.target for n in found[:4]] == [F.layer_norm] * 4


def test_does_not_fire_for_few_blocks_or_other_names():
    assert not noted(stack(3)) and not noted(stack(5, name="layer{}"))


def test_the_outermost_list_counts():
    def forward(x, w):
        h = x * 1.0
        for i in range(4):
            h = site(h, f"l.{i}", "input", 0, True)
            for j in range(5):
                h = F.linear(site(h, f"l.{i}.e.{j}", "input", 0, True), w)
        return (h,)

    assert len(noted(graph(forward, X, W))) == 4
