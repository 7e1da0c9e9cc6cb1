"""Products of few rows are `few_rows`'s where their sizes say so, with the same values; what the user says of it stands."""

import pytest
import torch
import torch.nn as nn
from torch.fx.experimental.proxy_tensor import make_fx

from nnsight_fx import NNsight
from nnsight_fx.engine.captured import products
from nnsight_fx.engine.captured.products import BY_ONEDNN, IN_BLOCKS, FewRows, few_rows

WIDE, ROWS = 512, IN_BLOCKS[0]
INNER, LARGE = IN_BLOCKS[1] // WIDE, BY_ONEDNN[1] // WIDE
TARGETS = {"in blocks": torch.ops.aten.bmm.default, "by oneDNN": torch.ops.nnsight_fx.linear.default}
NONE = {"in blocks": 0, "by oneDNN": 0}


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """Into how many blocks a weight is cut is told by the threads: the same on every machine."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def forward(x, w):
    return torch.mm(x, w.t())


def backward(g, w):
    return torch.mm(g, w)


def biased(x, w, b):
    return torch.addmm(b, x, w.t())


def rewritten(function, *values, symbolic=False):
    gm = make_fx(function, tracing_mode="symbolic" if symbolic else "fake")(*values)
    FewRows()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm, {how: len(gm.graph.find_nodes(op="call_function", target=target)) for how, target in TARGETS.items()}


@pytest.mark.parametrize("rows", [1, 14, ROWS])
@pytest.mark.parametrize("function", [forward, biased])
def test_a_forward_in_blocks_has_the_same_values(function, rows):
    values = [torch.randn(rows, WIDE), torch.randn(INNER, WIDE), torch.randn(INNER)][: function.__code__.co_argcount]
    gm, counts = rewritten(function, *values)
    assert counts == NONE | {"in blocks": 1}
    torch.testing.assert_close(gm(*values), function(*values), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 14, BY_ONEDNN[0]])
def test_a_backward_by_onednn_has_the_same_values(rows):
    values = torch.randn(rows, LARGE), torch.randn(LARGE, WIDE)
    gm, counts = rewritten(backward, *values)
    assert counts == NONE | {"by oneDNN": 1}
    torch.testing.assert_close(gm(*values), backward(*values), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "function, x, w",
    [
        pytest.param(forward, torch.randn(ROWS + 1, WIDE), torch.randn(INNER, WIDE), id="many rows"),
        pytest.param(forward, torch.randn(2, WIDE), torch.randn(INNER - 1, WIDE), id="a small weight"),
        pytest.param(backward, torch.randn(BY_ONEDNN[0] + 1, LARGE), torch.randn(LARGE, WIDE), id="many rows back"),
        pytest.param(backward, torch.randn(2, LARGE - 1), torch.randn(LARGE - 1, WIDE), id="a small weight back"),
        pytest.param(forward, torch.randn(2, WIDE).double(), torch.randn(INNER, WIDE).double(), id="double"),
        pytest.param(forward, torch.randn(2, WIDE).bfloat16(), torch.randn(INNER, WIDE).bfloat16(), id="bfloat16"),
    ],
)
def test_others_stay(function, x, w):
    assert rewritten(function, x, w)[1] == NONE


@pytest.mark.parametrize(
    "rows, threads, block",
    [
        (INNER, 1, 128),
        (INNER, 2, 64),
        (192, 2, 32),
        (576, 1, 64),
        (576, 2, 32),
        (576, 16, 32),
        (576, 32, None),
        (768, 8, 32),
        (1536, 2, 128),
        (50257, 1, None),
    ],
)
def test_blocks_leave_nothing_over_and_no_thread_with_much_more_than_others(rows, threads, block):
    assert products._block(rows, threads) == block


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(torch.randn(INNER, WIDE), id="in blocks"),
        pytest.param(torch.randn(WIDE, INNER).t(), id="the other way round"),
        pytest.param(torch.randn(INNER, 2 * WIDE)[:, :WIDE], id="part of another"),
        pytest.param(torch.randn(INNER + 1, WIDE), id="no blocks"),
        pytest.param(torch.randn(INNER, 2 * WIDE).view(2 * INNER, WIDE)[::2], id="every other row"),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 14])
def test_any_weight_gives_what_linear_gives(weight, biased, rows):
    x = torch.randn(2 * rows, 2 * WIDE)[::2, WIDE:]
    bias = torch.randn(len(weight)) if biased else None
    kept = None if bias is None else bias.clone()
    y = few_rows(x, weight, bias)
    assert y.is_contiguous()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(bias, kept, rtol=0, atol=0)


def test_a_bias_that_is_no_row_stays():
    x, w, b = torch.randn(2, WIDE), torch.randn(INNER, WIDE), torch.randn(2, INNER)
    assert rewritten(biased, x, w, b)[1] == NONE


def test_a_size_that_is_a_symbol_is_judged_by_what_it_was_and_takes_others():
    w = torch.randn(INNER, WIDE)

    def rows_of_any_number(x, w):
        return torch.mm(x, w.new_ones(INNER, WIDE).t() * w[0, 0])

    gm, counts = rewritten(rows_of_any_number, torch.randn(3, WIDE), w, symbolic=True)
    assert counts == NONE | {"in blocks": 1}
    for rows in (3, 2 * ROWS):
        x = torch.randn(rows, WIDE)
        torch.testing.assert_close(gm(x, w), rows_of_any_number(x, w), rtol=1e-5, atol=1e-3)


def test_what_the_user_asks_for_stands(monkeypatch):
    mine = {"post_grad_custom_post_pass": None, "max_autotune": True}
    for worthwhile in (True, False):
        monkeypatch.setattr(products, "worthwhile", lambda worthwhile=worthwhile: worthwhile)
        assert products.chosen(mine) == mine
    assert products.chosen({}) == {}
    monkeypatch.setattr(products, "worthwhile", lambda: True)
    assert isinstance(products.chosen({})["post_grad_custom_post_pass"], FewRows)


@pytest.mark.parametrize("vendor, fits", [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_only_where_mkl_is_not_at_home(monkeypatch, vendor, fits):
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    here = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert products.worthwhile.__wrapped__() is (fits and here)


def test_a_trace_through_inductor_and_its_gradients(monkeypatch):
    monkeypatch.setattr(products, "worthwhile", lambda: True)
    calls = []
    monkeypatch.setattr(products.FewRows, "uuid", lambda self: None)  # no cache on disk: the pass has to run
    real = products._replace
    monkeypatch.setattr(products, "_replace", lambda *args: (calls.append(args[1].target), real(*args)))
    done, few = [], products.few_rows
    monkeypatch.setattr(products, "few_rows", lambda x, w, *b: (done.append(w.is_contiguous()), few(x, w, *b))[1])
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDE, LARGE), nn.ReLU(), nn.Linear(LARGE, 4)).requires_grad_(False)
    model, x, found = NNsight(module), torch.randn(2, WIDE), {}
    for engine in ("hooks", "inductor"):
        if engine == "inductor":
            model.compile()
        with model.trace(x):
            model[0].input.requires_grad_()
            out = model[0].output.save()
            with model.output.sum().backward():
                grad = model[0].input.grad.save()
        found[engine] = (out, grad)
    assert calls
    assert set(done) == {True, False}  # the forward in blocks, the backward by oneDNN
    assert (
        "are done in blocks or by oneDNN" in str(model.explain())
        and model.explain().to_dict()["captures"][-1]["few_rows"]
    )
    torch.testing.assert_close(found["inductor"], found["hooks"], rtol=1e-5, atol=1e-4)
