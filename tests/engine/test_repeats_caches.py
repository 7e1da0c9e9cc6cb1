"""Blocks that fill a cache repeat one another, too, each with a layer of its own; where one does anything else by its number, or
its layer is not as the others' are, it is traced. The numbers and what the cache holds are always those of hooks."""

import pytest
import torch
import torch.nn as nn

import nnsight_fx
from nnsight_fx import NNsight

D, N, ODD = 4, 6, 3


class Layer:
    """A cache's layer, filled by one block."""

    names = ()

    def __init__(self):
        self.keys, self.filled = None, False

    def update(self, x):
        if not self.filled:
            self.kind, self.filled = x.dtype, True
            self.keys = x
        else:
            self.keys = torch.cat([self.keys, x], dim=1)
        return self.keys


class Other(Layer):
    def update(self, x):
        return super().update(x)[:, -2:] * 2


class Cache:
    def __init__(self, layers):
        self.layers, self.calls = layers, 0

    def update(self, x, i):
        return self.layers[i].update(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.index, self.second = nn.Linear(D, D), nn.Linear(D, D), 0, 0

    def kept(self, x, cache):
        return cache.update(x, self.index)

    def forward(self, x, cache):
        return x + self.down(self.kept(self.up(x), cache).mean(1, keepdim=True))


class Stack(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(N))

    def made(self, x):
        return Cache([Layer() for _ in range(N)])

    def call(self, i, x, cache):
        return self.blocks[i](x, cache)

    def forward(self, x):
        x, cache = x * 1.5, self.made(x)
        for i in range(N):
            x = self.call(i, x, cache)
            x = x[0] if isinstance(x, tuple) else x
        return x, cache


def block(kept):
    """Blocks that do with the cache what `kept(block, x, cache)` says."""
    return type("Made", (Block,), {"kept": kept})


def stack(made=None, call=None):
    return type("Whole", (Stack,), {n: f for n, f in (("made", made), ("call", call)) if f is not None})


def told(x, seen):
    """All that an object holds, and which objects are one."""
    if isinstance(x, list | tuple):
        return [told(i, seen) for i in x]
    if isinstance(x, dict):
        return [(k, told(v, seen)) for k, v in x.items()]
    if isinstance(x, torch.Tensor):
        return x.tolist(), x.dtype, x.requires_grad
    if hasattr(x, "__dict__") and not isinstance(x, type):
        known = id(x) in seen
        number = seen.setdefault(id(x), len(seen))
        return number if known else (type(x), number, told(vars(x), seen))
    return x


def compared(kind=Block, whole=Stack, change=lambda model: None, later=None, grad=False):
    """How many blocks repeat another one; all is as on hooks, before and after `later`."""
    torch.manual_seed(1)
    x, results, model = torch.randn(2, 3, D), [], None
    for backend in (None, "eager"):
        torch.manual_seed(0)
        Layer.names = ()
        inner = whole(kind).requires_grad_(grad)
        for i, b in enumerate(inner.blocks):
            b.index, b.second = i, max(i - 1, 0)
        change(inner)
        model = NNsight(inner)
        if backend:
            model.compile(backend=backend)
        for step in (None, *([later] if later else [])):
            if step is not None:
                step(inner)
            with model.trace(x):
                model.blocks[1].up.output[:] *= 2
                outs = nnsight_fx.save([b.output[0] if isinstance(b.output, tuple) else b.output for b in model.blocks])
                out = nnsight_fx.save(model.output)
            results.append((outs, out))
    half = len(results) // 2
    for one, other in zip(results[:half], results[half:], strict=True):
        for a, b in zip((*one[0], one[1][0]), (*other[0], other[1][0]), strict=True):
            assert torch.equal(a, b)
        assert told(one[1][1], {}) == told(other[1][1], {})
    captures = model.explain().to_dict()["captures"]
    return [s["repeated"] for capture in captures for s in capture["segments"]][0]


# -- what repeats ------------------------------------------------------------------------------------------------


def _counts_itself(b, x, cache):
    layer = cache.layers[b.index]
    layer.calls = getattr(layer, "calls", 0) + 1
    return layer.update(x) * layer.calls


def _twice(b, x, cache):
    cache.update(x, b.index)
    return cache.update(x + 1, b.index)


def _one_tensor(b, x, cache):
    layer = cache.layers[b.index]
    layer.update(x)
    layer.values = layer.again = layer.keys * 2
    layer.values.mul_(2)
    return layer.keys + layer.again


def _length(b, x, cache):
    return cache.update(x, b.index) * len(cache.layers)


def _gives(b, x, cache):
    cache.update(x, b.index)
    return cache.layers[b.index].keys


def _vars(b, x, cache):
    layer = cache.layers[b.index]
    layer.update(x)
    return vars(layer)["keys"]


@pytest.mark.parametrize(
    "kept", [Block.kept, _counts_itself, _twice, _one_tensor, _length, _gives, _vars], ids=lambda f: f.__name__
)
def test_what_repeats(kept):
    assert compared(block(kept)) == N - 1


@pytest.mark.parametrize("kept", [Block.kept, _one_tensor], ids=lambda f: f.__name__)
def test_with_gradients(kept):
    assert compared(block(kept), grad=True) == N - 2  # what goes into the first one needs none


def test_layers_of_two_kinds():
    def made(self, x):
        return Cache([(Other if i % 2 else Layer)() for i in range(N)])

    assert compared(whole=stack(made)) == N - 2


def test_each_layer_holds_a_tensor():
    def made(self, x):
        cache = Cache([Layer() for _ in range(N)])
        for i, layer in enumerate(cache.layers):
            layer.scale = x[0, 0] * i
        return cache

    def kept(b, x, cache):
        return cache.update(x, b.index) * cache.layers[b.index].scale

    assert compared(block(kept), stack(made)) == N - 1


def test_the_first_layer_is_read_by_all():
    def kept(b, x, cache):
        cache.update(x, b.index)
        return cache.layers[0].keys + cache.layers[b.index].keys

    assert compared(block(kept)) == N - 2


def test_a_shared_layer_is_read():
    """The last blocks read another one's layer, and fill none."""

    def change(model):
        for i, b in enumerate(model.blocks):
            b.shared = i >= ODD
            b.second = 1 if b.shared else 0

    def kept(b, x, cache):
        return cache.layers[b.second].keys * 2 if b.shared else cache.update(x, b.index)

    assert compared(block(kept), change=change) == N - 2


def test_lengths_that_vary():
    """A layer counts what it has seen: a number that is known when the graph runs."""

    def kept(b, x, cache):
        layer = cache.layers[b.index]
        layer.seen = getattr(layer, "seen", 0) + x.shape[1]
        return layer.update(x) * (1 / layer.seen)

    found = []
    for backend in (None, "eager"):
        torch.manual_seed(0)
        inner = Stack(block(kept)).requires_grad_(False)
        for i, b in enumerate(inner.blocks):
            b.index = i
        model = NNsight(inner)
        if backend:
            model.compile(backend=backend, dynamic=True)
        for n in (3, 5, 8):
            with model.trace(torch.ones(2, n, D)):
                out = nnsight_fx.save(model.output)
            found.append((out[0], told(out[1], {})))
    assert model.explain().to_dict()["captures"][-1]["segments"][0]["repeated"] >= N - 2
    for one, other in zip(found[:3], found[3:], strict=True):
        assert torch.allclose(one[0], other[0]) and one[1] == other[1]


# -- what the number of a block says beside its layer ------------------------------------------------------------


@pytest.mark.parametrize(
    "by",
    [
        lambda b, cache: float(b.index + 1),
        lambda b, cache: 2.0 if b.index % 2 else 3.0,
        lambda b, cache: {0: 1.0}.get(b.index, 2.0),
        lambda b, cache: float(len(f"{10**b.index}")),
        lambda b, cache: 3.0 if b.index == ODD else 1.0,
        lambda b, cache: 3.0 if b.index else 1.0,
        lambda b, cache: float(sum(range(b.index))),
        lambda b, cache: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0][b.index],
        lambda b, cache: float(len(cache.layers[: b.index])),
        lambda b, cache: float(list(range(N))[b.index]),
        lambda b, cache: 1.0 if b.index in (1, 2) else 2.0,
    ],
)
def test_a_number_that_is_used_elsewhere(by):
    def kept(b, x, cache):
        x = cache.update(x, b.index)
        return x * by(b, cache)

    compared(block(kept))


def test_a_number_that_is_used_elsewhere_first():
    def kept(b, x, cache):
        y = 1.0 if b.index in (1, 2) else 2.0
        return cache.update(x, b.index) * y

    compared(block(kept))


def _negative(model):
    for i, b in enumerate(model.blocks):
        b.index = i - N


def _boolean(model):
    model.blocks[1].index = True


def _same(model):
    for b in model.blocks[2:]:
        b.index = 2


def _backward(model):
    for i, b in enumerate(model.blocks):
        b.index = N - 1 - i


@pytest.mark.parametrize("change, repeated", [(_negative, N - 1), (_backward, N - 1), (_boolean, None), (_same, None)])
def test_other_numbers(change, repeated):
    found = compared(change=change)
    assert repeated is None or found == repeated


def _swap(model):
    model.blocks[2].index, model.blocks[3].index = 3, 2


def _odd(model):
    model.blocks[4].index = 0


@pytest.mark.parametrize("later", [_swap, _odd, _boolean, _backward])
def test_a_number_that_changes_later(later):
    assert compared(later=later) == N - 1


# -- layers that are not as the others are -----------------------------------------------------------------------


def _filled(self, x):
    cache = Cache([Layer() for _ in range(N)])
    cache.update(x, ODD)
    return cache


def _one_layer(self, x):
    layer = Layer()
    return Cache([layer if i in (0, ODD, 4) else Layer() for i in range(N)])


def _other(self, x):
    return Cache([Other() if i == ODD else Layer() for i in range(N)])


def _scaled(self, x):
    cache = Cache([Layer() for _ in range(N)])
    for i, layer in enumerate(cache.layers):
        layer.scale = 3 if i == ODD else 2
    return cache


def _more(self, x):
    cache = Cache([Layer() for _ in range(N)])
    cache.layers[ODD].scale = 3
    return cache


def _kinds(self, x):
    cache = Cache([Layer() for _ in range(N)])
    for i, layer in enumerate(cache.layers):
        layer.scale = True if i == ODD else 1
    return cache


def _zeros(self, x):
    cache = Cache([Layer() for _ in range(N)])
    for i, layer in enumerate(cache.layers):
        layer.scale = -0.0 if i == ODD else 0.0
    return cache


def _shapes(self, x):
    cache = Cache([Layer() for _ in range(N)])
    for i, layer in enumerate(cache.layers):
        layer.scale = x[:, :1] if i == ODD else x[:1, :1]
    return cache


def _chained(self, x):
    cache = Cache([Layer() for _ in range(N)])
    for i, layer in enumerate(cache.layers):
        layer.other = layer if i == ODD else cache.layers[0]
    return cache


def _ahead(self, x):
    cache = Cache([Layer() for _ in range(N)])
    for i, layer in enumerate(cache.layers[:-1]):
        layer.other = cache.layers[i + 1]
    cache.layers[-1].other = cache.layers[0]
    return cache


def _dicts(self, x):
    cache = Cache([Layer() for _ in range(N)])
    for i, layer in enumerate(cache.layers):
        layer.held = {"scale": i}
    return cache


def _lists(self, x):
    cache = Cache([Layer() for _ in range(N)])
    for i, layer in enumerate(cache.layers):
        layer.held = [i]
    return cache


def _by_scale(b, x, cache):
    layer = cache.layers[b.index]
    y = getattr(layer, "scale", 2)
    return layer.update(x) * (y if isinstance(y, torch.Tensor) else 5.0 if isinstance(y, bool) else 1 / y if y else 2)


def _by_sign(b, x, cache):
    layer = cache.layers[b.index]
    return layer.update(x) * (2.0 if str(layer.scale)[0] == "-" else 3.0)


def _by_other(b, x, cache):
    layer = cache.layers[b.index]
    layer.update(x)
    if layer.other is layer:
        return layer.keys * 2
    return layer.keys if layer.other.keys is None else layer.keys + layer.other.keys


def _fills_other(b, x, cache):
    layer = cache.layers[b.index]
    layer.update(x)
    layer.other.extra = x
    return layer.keys * (2 if hasattr(layer, "extra") else 3)


def _by_held(b, x, cache):
    layer = cache.layers[b.index]
    return layer.update(x) * (layer.held["scale"] if isinstance(layer.held, dict) else layer.held[0])


def _appends(b, x, cache):
    layer = cache.layers[b.index]
    layer.held.append(x)
    cache.layers[0].held.append(x)
    return layer.update(x) * len(layer.held)


@pytest.mark.parametrize(
    "made, kept",
    [
        (_filled, Block.kept),
        (_one_layer, Block.kept),
        (_other, Block.kept),
        (_scaled, _by_scale),
        (_more, _by_scale),
        (_kinds, _by_scale),
        (_zeros, _by_sign),
        (_shapes, _by_scale),
        (_chained, _by_other),
        (_ahead, _by_other),
        (_ahead, _fills_other),
        (_dicts, _by_held),
        (_lists, _by_held),
        (_lists, _appends),
    ],
)
def test_a_layer_unlike_the_others(made, kept):
    compared(block(kept), stack(made))


# -- what blocks change for one another --------------------------------------------------------------------------


def _counts(b, x, cache):
    cache.calls += 1
    return cache.update(x, b.index) * cache.calls


def _counts_unread(b, x, cache):
    cache.calls += 1
    return cache.update(x, b.index)


def _last(b, x, cache):
    before = getattr(cache, "last", None)
    cache.last = cache.layers[b.index]
    return cache.update(x, b.index) * (2 if before is cache.layers[0] else 3)


def _last_tensor(b, x, cache):
    before = getattr(cache, "last", x)
    cache.last = cache.update(x, b.index)
    return before + cache.last


def _before(b, x, cache):
    cache.update(x, b.index)
    return cache.layers[b.index].keys + cache.layers[b.second].keys


def _minus(b, x, cache):
    cache.update(x, b.index)
    return cache.layers[b.index].keys + cache.layers[b.index - 1].keys if b.index else x


def _all(b, x, cache):
    cache.update(x, b.index)
    return sum(layer.keys for layer in cache.layers if layer.filled)


def _how_many(b, x, cache):
    return cache.update(x, b.index) * sum(layer.filled for layer in cache.layers)


def _next_one(b, x, cache):
    i = [layer.filled for layer in cache.layers].index(False)
    return cache.layers[i].update(x)


def _search(b, x, cache):
    return cache.update(x, b.index) * (1 + cache.layers.index(cache.layers[b.index]))


def _replaces(b, x, cache):
    cache.layers[b.index] = Other()
    return cache.update(x, b.index)


def _lengthens(b, x, cache):
    cache.layers.append(Layer())
    return cache.update(x, b.index) * len(cache.layers)


def _writes_last(b, x, cache):
    cache.layers[-1].extra = x
    return cache.update(x, b.index)


def _reads_last(b, x, cache):
    last = cache.layers[-1]
    x = cache.update(x, b.index)
    return x * (2 if last is cache.layers[b.index] else 3)


def _deletes(b, x, cache):
    layer = cache.layers[b.index]
    layer.update(x)
    del layer.kind
    return layer.keys


def _index_kept(b, x, cache):
    cache.layers[b.index].index = b.index
    return cache.update(x, b.index)


def _class_list(b, x, cache):
    layer = cache.layers[b.index]
    Layer.names = (*Layer.names, "x")
    n = len(Layer.names)
    return layer.update(x) * n


def _slot(b, x, cache):
    layer = cache.layers[b.index]
    layer.__dict__["held"] = x * 2
    return layer.update(x) + layer.held


def _new_object(b, x, cache):
    layer = cache.layers[b.index]
    layer.inner = Layer()
    layer.inner.update(x)
    return layer.update(x) + layer.inner.keys


def _view(b, x, cache):
    layer = cache.layers[b.index]
    layer.update(x)
    layer.half = layer.keys[:, :1]
    layer.half.add_(1)
    return layer.keys


def _shrinks(b, x, cache):
    layer = cache.layers[b.index]
    layer.update(x)
    layer.keys.unsqueeze_(0)
    return layer.keys[0]


def _weight(b, x, cache):
    layer = cache.layers[b.index]
    layer.update(x)
    layer.weight = b.up.weight
    return layer.keys + layer.weight.sum()


def _first_weight(b, x, cache):
    layer = cache.layers[0]
    layer.weight = b.up.weight
    return cache.update(x, b.index)


@pytest.mark.parametrize(
    "kept",
    [
        _counts,
        _counts_unread,
        _last,
        _last_tensor,
        _before,
        _minus,
        _all,
        _how_many,
        _next_one,
        _search,
        _replaces,
        _lengthens,
        _writes_last,
        _reads_last,
        _deletes,
        _index_kept,
        _class_list,
        _slot,
        _new_object,
        _view,
        _shrinks,
        _weight,
        _first_weight,
    ],
    ids=lambda f: f.__name__,
)
def test_what_blocks_change(kept):
    compared(block(kept))


@pytest.mark.parametrize("kept", [_view, _shrinks, _weight], ids=lambda f: f.__name__)
def test_what_blocks_change_with_gradients(kept):
    compared(block(kept), grad=True)


def _grows(self, i, x, cache):
    cache.layers.append(Layer())
    return self.blocks[i](x, cache)


def _flags(self, i, x, cache):
    cache.flag = i == ODD
    return self.blocks[i](x, cache)


def _other_cache(self, i, x, cache):
    return self.blocks[i](x, cache if i != ODD else Cache([Layer() for _ in range(N)]))


def _empty(self, x):
    return Cache([])


def _marks_kept(self, i, x, cache):
    if i:
        cache.layers[i - 1].keys.flag = i == ODD
    return self.blocks[i](x, cache)


def _holds(self, x):
    cache = Cache([Layer() for _ in range(N)])
    cache.whole = self
    return cache


def _by_whole(b, x, cache):
    return cache.update(x, b.index) * (2 if cache.whole.blocks[2] is b else 3)


def _by_flag(b, x, cache):
    return cache.update(x, b.index) * (2 if getattr(cache, "flag", False) else 3)


@pytest.mark.parametrize(
    "made, call, kept",
    [
        (None, _grows, _length),
        (_empty, _grows, Block.kept),
        (_empty, _grows, _length),
        (None, _flags, _by_flag),
        (None, _other_cache, Block.kept),
    ],
)
def test_what_the_model_changes_between_blocks(made, call, kept):
    compared(block(kept), stack(made, call))


@pytest.mark.parametrize("kind, made, call", [(block(_before), None, _marks_kept), (block(_by_whole), _holds, None)])
def test_other_ways_to_know_a_block(kind, made, call):
    compared(kind, stack(made, call))


class Both(Block):
    """Gives what is its own, beside the stream."""

    def forward(self, x, cache):
        x = super().forward(x, cache)
        return x, self.up.bias, cache.layers[self.index], cache


def test_a_block_gives_what_is_its_own():
    def call(self, i, x, cache):
        x, bias, layer, same = self.blocks[i](x, cache)
        layer.given = bias * 2
        assert same is cache
        return x + bias + layer.keys.sum()

    assert compared(Both, stack(call=call)) == N - 1
