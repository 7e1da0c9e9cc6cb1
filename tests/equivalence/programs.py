"""Intervention programs, each with a hand-written reference on plain forward hooks.

A program is `(m, s, x, out)`: the wrapped model, its sites `a`, `b` and `head`, an input, and the dict for results.
Its reference is the same on the raw modules. The text of a program may also run on nnsight, so `save` is whichever
library's runs it.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nnsight_fx import save

# -- hooks, by hand ----------------------------------------------------------------------------------------------


def after(module, change, call=0):
    """`change` sees what `module` returns at its `call`-th call, and may give something else instead.

    It goes first: transformers collects `hidden_states` by hooks too.
    """
    seen = [0]

    def hook(_module, _args, _kwargs, output):
        seen[0] += 1
        return change(output) if seen[0] == call + 1 else None

    return module.register_forward_hook(hook, prepend=True, with_kwargs=True)


def before(module, change, call=0):
    """`change` sees `(args, kwargs)`, and may give others instead."""
    seen = [0]

    def hook(_module, args, kwargs):
        seen[0] += 1
        return change(args, kwargs) if seen[0] == call + 1 else None

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def first(change):
    """`change` of the first positional argument."""
    return lambda args, kwargs: None if (new := change(args[0])) is None else ((new, *args[1:]), kwargs)


def keep(out, name):
    """A hook that keeps what it sees and changes nothing."""
    return lambda value, *_: out.update({name: value})


@contextlib.contextmanager
def skipped(module, value):
    """`module.forward` gives `value()`."""
    module.forward = lambda *_, **__: value()
    try:
        yield
    finally:
        del module.forward


def run(m, x, *handles, **kwargs):
    """The model's result under hooks, which go when it is done."""
    try:
        return m(x, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


class Enough(Exception):
    pass


def ramp(h):
    """A steering vector as long as the last dimension."""
    return torch.linspace(-1, 1, h.shape[-1])


def logits(result):
    return getattr(result, "logits", result)


# -- on every model ----------------------------------------------------------------------------------------------


def read(m, s, x, out):
    with m.trace(x) as tracer:
        out["a"] = s.a.output.save()
        out["into b"] = s.b.input.save()
        out["y"] = save(tracer.result)


def read_by_hand(m, s, x, out):
    out["y"] = run(m, x, after(s.a, keep(out, "a")), before(s.b, first(keep(out, "into b"))))


def replace(m, s, x, out):
    with m.trace(x) as tracer:
        s.a.output = s.a.output * 0.5 + 1
        out["y"] = save(tracer.result)


def replace_by_hand(m, s, x, out):
    out["y"] = run(m, x, after(s.a, lambda h: h * 0.5 + 1))


def steer(m, s, x, out):
    with m.trace(x) as tracer:
        s.a.output[:, -1] += ramp(s.a.output)
        out["b"] = s.b.output.save()
        out["y"] = save(tracer.result)


def steer_by_hand(m, s, x, out):
    def change(h):
        h[:, -1] += ramp(h)

    out["y"] = run(m, x, after(s.a, change), after(s.b, keep(out, "b")))


def chained_writes(m, s, x, out):
    with m.trace(x) as tracer:
        s.a.output = s.a.output + 1
        s.a.output = s.a.output * 2
        s.a.output[:, 0] = 3
        s.a.output *= 0.5
        out["y"] = save(tracer.result)


def chained_writes_by_hand(m, s, x, out):
    def change(h):
        h = (h + 1) * 2
        h[:, 0] = 3
        h *= 0.5
        return h

    out["y"] = run(m, x, after(s.a, change))


def read_after_own_write(m, s, x, out):
    with m.trace(x) as tracer:
        old = s.a.output
        s.a.output = old + 1
        out["old"], out["new"], out["into b"] = old.save(), s.a.output.save(), s.b.input.save()
        out["y"] = save(tracer.result)


def read_after_own_write_by_hand(m, s, x, out):
    def change(h):
        out["old"], out["new"] = h, h + 1
        return out["new"]

    out["y"] = run(m, x, after(s.a, change), before(s.b, first(keep(out, "into b"))))


def write_input(m, s, x, out):
    with m.trace(x) as tracer:
        out["before"] = s.b.input.save()
        s.b.input = s.b.input * 2 + 1
        out["after"] = s.b.input.save()
        out["y"] = save(tracer.result)


def write_input_by_hand(m, s, x, out):
    def change(h):
        out["before"], out["after"] = h, h * 2 + 1
        return out["after"]

    out["y"] = run(m, x, before(s.b, first(change)))


def input_in_place(m, s, x, out):
    """Whoever else holds the tensor sees it too: the residual stream, an earlier save."""
    with m.trace(x) as tracer:
        out["a"] = s.a.output.save()
        s.b.input[:, :2] = 0
        out["y"] = save(tracer.result)


def input_in_place_by_hand(m, s, x, out):
    def change(h):
        h[:, :2] = 0

    out["y"] = run(m, x, after(s.a, keep(out, "a")), before(s.b, first(change)))


def ablate_the_models_input(m, s, x, out):
    with m.trace(x) as tracer:
        m.input[:, 1] = 2
        out["y"] = save(tracer.result)


def ablate_the_models_input_by_hand(m, s, x, out):
    x[:, 1] = 2
    out["y"] = m(x)


def skip(m, s, x, out):
    with m.trace(x) as tracer:
        h = s.a.output
        s.b.skip(h * 0.5)
        out["b"] = s.b.output.save()
        out["y"] = save(tracer.result)


def skip_by_hand(m, s, x, out):
    halves = []
    with skipped(s.b, halves.pop):
        out["y"] = run(m, x, after(s.a, lambda h: halves.append(h * 0.5)), after(s.b, keep(out, "b")))


def stop(m, s, x, out):
    with m.trace(x) as tracer:
        s.a.output += 1
        out["a"] = s.a.output.save()
        tracer.stop()


def stop_by_hand(m, s, x, out):
    def change(h):
        h += 1
        out["a"] = h
        raise Enough

    with contextlib.suppress(Enough):
        run(m, x, after(s.a, change))


def write_the_result(m, s, x, out):
    with m.trace(x) as tracer:
        s.head.output = s.head.output.clamp(min=0) + 1
        out["head"] = s.head.output.save()
        out["y"] = save(tracer.result)


def write_the_result_by_hand(m, s, x, out):
    def change(h):
        out["head"] = h.clamp(min=0) + 1
        return out["head"]

    out["y"] = run(m, x, after(s.head, change))


def patch_across_invokes(m, s, x, out):
    with m.trace() as tracer:
        with tracer.invoke(x):
            clean = s.a.output
            out["clean"] = s.b.output.save()
        with tracer.invoke(x.flip(-1)):
            s.a.output[:, -1] = clean[:, -1] * 2
            out["patched"] = s.b.output.save()


def patch_across_invokes_by_hand(m, s, x, out):
    n = len(x)

    def change(h):
        h[n:, -1] = h[:n, -1] * 2

    run(m, torch.cat([x, x.flip(-1)]), after(s.a, change), after(s.b, keep(out, "b")))
    b = out.pop("b")
    out["clean"], out["patched"] = b[:n], b[n:]


def invokes_of_their_own(m, s, x, out):
    with m.trace() as tracer:
        for i, scale in enumerate((1.0, -2.0, 3.0)):
            with tracer.invoke(x):
                s.a.output = s.a.output * scale
                s.b.input[:, i] = scale
                out[f"b{i}"] = s.b.output.save()


def invokes_of_their_own_by_hand(m, s, x, out):
    n, scales = len(x), (1.0, -2.0, 3.0)

    def change_input(h):
        for i, scale in enumerate(scales):
            h[n * i : n * (i + 1), i] = scale

    def change(h):
        return torch.cat([part * scale for part, scale in zip(h.split(n), scales, strict=True)])

    run(m, torch.cat([x, x, x]), after(s.a, change), before(s.b, first(change_input)), after(s.b, keep(out, "b")))
    out |= {f"b{i}": part for i, part in enumerate(out.pop("b").split(n))}


def promptless(m, s, x, out):
    with m.trace() as tracer:
        with tracer.invoke(x):
            s.a.output[:, 0] = 1
        with tracer.invoke(x[:1]):
            out["one row"] = s.a.output.clone().save()
        with tracer.invoke():
            s.a.output[:] *= 0.5
            out["all"] = s.b.output.save()


def promptless_by_hand(m, s, x, out):
    n = len(x)

    def change(h):
        h[:n, 0] = 1
        out["one row"] = h[n:].clone()
        h *= 0.5

    run(m, torch.cat([x, x[:1]]), after(s.a, change), after(s.b, keep(out, "all")))


def lens(m, s, x, out):
    """The head on an early value, and the real call of it untouched."""
    with m.trace(x) as tracer:
        out["early"] = s.head(s.a.output).save()
        out["late"] = s.head.output.save()
        out["y"] = save(tracer.result)


def lens_by_hand(m, s, x, out):
    def look(h):
        out["early"] = s.head.forward(h)

    out["y"] = run(m, x, after(s.a, look), after(s.head, keep(out, "late")))


def out_of_order(m, s, x, out):
    with m.trace(x) as tracer:
        out["y"] = save(tracer.result)
        out["b"] = s.b.output.save()
        out["a"] = s.a.output.save()
        out["into a"] = s.a.input.save()


def out_of_order_by_hand(m, s, x, out):
    hooks = after(s.b, keep(out, "b")), after(s.a, keep(out, "a")), before(s.a, first(keep(out, "into a")))
    out["y"] = run(m, x, *hooks)


def look(m, s, x, out):
    """The body looks at values: both outcomes of an `if`, and a number."""
    with m.trace(x) as tracer:
        h = s.a.output
        if h.abs().sum() > 0:
            s.a.output = h + 1
        if s.a.output.sum() > 1e9:
            s.b.output = s.b.output * 0
        s.b.output[:, 0] *= 1 + s.b.output.mean().item()
        out["y"] = save(tracer.result)


def look_by_hand(m, s, x, out):
    def change(h):
        h[:, 0] *= 1 + h.mean().item()

    out["y"] = run(m, x, after(s.a, lambda h: h + 1), after(s.b, change))


def positions(m, s, x, out):
    for p in (0, 1, 5, -1, 6):
        with m.trace(x) as tracer:
            row = s.a.output[:, p]
            row += ramp(row)
            out[f"a{p}"] = s.a.output.save()
            out[f"y{p}"] = save(tracer.result)


def positions_by_hand(m, s, x, out):
    for p in (0, 1, 5, -1, 6):

        def change(h, p=p):
            h[:, p] += ramp(h[:, p])
            out[f"a{p}"] = h

        out[f"y{p}"] = run(m, x, after(s.a, change))


def save_twice(m, s, x, out):
    """Two saves of one tensor share its storage; a view of it too; a copy does not."""
    with m.trace(x) as tracer:
        h = s.a.output
        out["one"], out["two"], out["row"] = h.save(), s.a.output.save(), h[:, 1].save()
        out["copy"] = h.clone().save()
        h[:, 1] *= 9
        out["y"] = save(tracer.result)
    out["shared"] = [out["one"].data_ptr() == out[k].data_ptr() for k in ("two", "copy")]


def save_twice_by_hand(m, s, x, out):
    def change(h):
        out.update(one=h, two=h, row=h[:, 1], copy=h.clone())
        h[:, 1] *= 9

    out["y"] = run(m, x, after(s.a, change))
    out["shared"] = [True, False]


def select_and_scatter(m, s, x, out):
    """Operations with several results, masks, and indices that are values."""
    with m.trace(x) as tracer:
        h = s.a.output
        top, where = h.topk(2, dim=-1)
        s.a.output = torch.zeros_like(h).scatter(-1, where, top)
        s.b.output[s.b.output > 0.5] = 0.5
        low, _ = s.b.output.min(dim=1)
        out["low"], out["where"], out["y"] = low.save(), where.save(), save(tracer.result)


def select_and_scatter_by_hand(m, s, x, out):
    def change_a(h):
        top, out["where"] = h.topk(2, dim=-1)
        return torch.zeros_like(h).scatter(-1, out["where"], top)

    def change_b(h):
        h[h > 0.5] = 0.5
        out["low"] = h.min(dim=1).values

    out["y"] = run(m, x, after(s.a, change_a), after(s.b, change_b))


def no_grad_inside(m, s, x, out):
    """Gradient flows through the write and not through what is computed under `no_grad`."""
    w = torch.ones(1, requires_grad=True)
    with m.trace(x) as tracer:
        h = s.a.output * w
        with torch.no_grad():
            out["still"] = (h * 3).save()
        s.a.output = h + out["still"]
        out["y"] = save(tracer.result)
    out["grad"] = torch.autograd.grad(logits(out["y"]).square().sum(), w)


def no_grad_inside_by_hand(m, s, x, out):
    w = torch.ones(1, requires_grad=True)

    def change(h):
        h = h * w
        with torch.no_grad():
            out["still"] = h * 3
        return h + out["still"]

    out["y"] = run(m, x, after(s.a, change))
    out["grad"] = torch.autograd.grad(logits(out["y"]).square().sum(), w)


def train_a_vector(m, s, x, out):
    w = torch.zeros(8, requires_grad=True)
    for step in range(3):
        with m.trace(x) as tracer:
            s.a.output = torch.cat([s.a.output[..., :8] + w, s.a.output[..., 8:]], -1)
            out[f"y{step}"] = y = save(tracer.result)
        loss = logits(y).square().mean()
        (out[f"grad{step}"],) = torch.autograd.grad(loss, w)
        w = (w - out[f"grad{step}"]).detach().requires_grad_()


def train_a_vector_by_hand(m, s, x, out):
    w = torch.zeros(8, requires_grad=True)
    for step in range(3):

        def change(h, w=w):
            return torch.cat([h[..., :8] + w, h[..., 8:]], -1)

        out[f"y{step}"] = run(m, x, after(s.a, change))
        (out[f"grad{step}"],) = torch.autograd.grad(logits(out[f"y{step}"]).square().mean(), w)
        w = (w - out[f"grad{step}"]).detach().requires_grad_()


def random_draws(m, s, x, out):
    """Drawn where the model is, from the one stream."""
    torch.manual_seed(1)
    with m.trace(x) as tracer:
        h = s.a.output
        s.a.output = h + torch.randn(h.shape)
        s.b.output += torch.rand_like(s.b.output)
        out["y"] = save(tracer.result)


def random_draws_by_hand(m, s, x, out):
    torch.manual_seed(1)

    def change(h):
        h += torch.rand_like(h)

    out["y"] = run(m, x, after(s.a, lambda h: h + torch.randn(h.shape)), after(s.b, change))


def keep_a_list(m, s, x, out):
    """A saved container holds in the end whatever the body put there."""
    with m.trace(x):
        seen = save([])
        for each in (s.a, s.b, s.head):
            seen.append({"path": each.path.removeprefix("model."), "mean": each.output.mean(-1)})
    out["seen"] = seen


def keep_a_list_by_hand(m, s, x, out):
    paths = {module: path for path, module in m.named_modules()}
    sites = list(dict.fromkeys((s.a, s.b, s.head)))
    seen = {}
    run(m, x, *(after(each, lambda h, each=each: seen.update({each: h.mean(-1)})) for each in sites))
    out["seen"] = [{"path": paths[each], "mean": seen[each]} for each in (s.a, s.b, s.head)]


# -- on one or a few ---------------------------------------------------------------------------------------------


def logit_lens(m, s, x, out):
    with m.trace(x):
        for i in range(3):
            h = m.transformer.h[i].output[:, -1]
            out[f"logits{i}"] = m.lm_head(m.transformer.ln_f(h)).save()
            out[f"p{i}"] = out[f"logits{i}"].softmax(-1).max(-1).values.save()


def logit_lens_by_hand(m, s, x, out):
    def look_at(i):
        def look(h):
            out[f"logits{i}"] = m.lm_head.forward(m.transformer.ln_f.forward(h[:, -1]))
            out[f"p{i}"] = out[f"logits{i}"].softmax(-1).max(-1).values

        return look

    run(m, x, *(after(m.transformer.h[i], look_at(i)) for i in range(3)))


def hidden_states(m, s, x, out):
    """transformers collects them by hooks of its own, which come after the edit, on the first trace and the second."""
    for i in range(2):
        with m.trace(x, output_hidden_states=True) as tracer:
            if i == 0:
                s.a.output[:, 0] = 4
            else:
                s.a.output = s.a.output * 0
            out[f"y{i}"] = save(tracer.result)


def hidden_states_by_hand(m, s, x, out):
    def fill(h):
        h[:, 0] = 4

    for i, change in enumerate((fill, lambda h: h * 0)):
        out[f"y{i}"] = run(m, x, after(s.a, change), output_hidden_states=True)


def write_a_field_of_the_result(m, s, x, out):
    with m.trace(x) as tracer:
        m.output.logits = m.output.logits * 2
        out["y"] = save(tracer.result)


def write_a_field_of_the_result_by_hand(m, s, x, out):
    def change(result):
        result.logits = result.logits * 2

    out["y"] = run(m, x, after(m, change))


def heads(m, s, x, out):
    """One attention head of four ablated, through a view."""
    with m.trace(x) as tracer:
        z = m.transformer.h[1].attn.c_proj.input
        z.view(*z.shape[:2], 4, 8)[:, :, 2] = 0
        out["y"] = save(tracer.result)


def heads_by_hand(m, s, x, out):
    def change(z):
        z.view(*z.shape[:2], 4, 8)[:, :, 2] = 0

    out["y"] = run(m, x, before(m.transformer.h[1].attn.c_proj, first(change)))


def tuple_element(m, s, x, out):
    with m.trace(x) as tracer:
        attention, weights = m.transformer.h[1].attn.output
        m.transformer.h[1].attn.output = (attention * 2, weights)
        out["attention"] = m.transformer.h[1].attn.output[0].save()
        out["y"] = save(tracer.result)


def tuple_element_by_hand(m, s, x, out):
    def change(output):
        out["attention"] = output[0] * 2
        return (out["attention"], output[1])

    out["y"] = run(m, x, after(m.transformer.h[1].attn, change))


# -- the table ---------------------------------------------------------------------------------------------------

LMS = ("gpt2", "llama", "neox", "bert")
EVERY = (*LMS, "mlp", "cnn", "lstm", "shared", "breaks", "batchnorm", "moe")


@dataclass(frozen=True)
class Program:
    run: Callable
    by_hand: Callable
    models: tuple[str, ...] = EVERY
    fused: bool = True  # a compiler gives the same
    rounds: tuple[
        str, ...
    ] = ()  # where `torch.compile(backend="eager")` of the bare model is not bit-equal itself: gradients
    falls_back: tuple[str, ...] = ()  # the models on which the hook engine runs it, and says so

    @property
    def name(self) -> str:
        return self.run.__name__


PROGRAMS = [
    Program(read, read_by_hand),
    Program(replace, replace_by_hand),
    Program(steer, steer_by_hand),
    Program(chained_writes, chained_writes_by_hand),
    Program(read_after_own_write, read_after_own_write_by_hand),
    Program(write_input, write_input_by_hand),
    Program(input_in_place, input_in_place_by_hand),
    Program(ablate_the_models_input, ablate_the_models_input_by_hand),
    Program(skip, skip_by_hand),
    Program(stop, stop_by_hand),
    Program(write_the_result, write_the_result_by_hand),
    Program(patch_across_invokes, patch_across_invokes_by_hand),
    Program(invokes_of_their_own, invokes_of_their_own_by_hand),
    Program(promptless, promptless_by_hand, falls_back=("lstm",)),  # an LSTM takes no size that is a symbol
    Program(lens, lens_by_hand),
    Program(out_of_order, out_of_order_by_hand),
    Program(look, look_by_hand),
    Program(positions, positions_by_hand),
    Program(save_twice, save_twice_by_hand),
    Program(select_and_scatter, select_and_scatter_by_hand),
    Program(no_grad_inside, no_grad_inside_by_hand, rounds=("llama",)),
    Program(train_a_vector, train_a_vector_by_hand, rounds=("llama",)),
    Program(random_draws, random_draws_by_hand, fused=False),
    Program(keep_a_list, keep_a_list_by_hand),
    Program(logit_lens, logit_lens_by_hand, ("gpt2",)),
    Program(hidden_states, hidden_states_by_hand, LMS),
    Program(write_a_field_of_the_result, write_a_field_of_the_result_by_hand, LMS),
    Program(heads, heads_by_hand, ("gpt2",)),
    Program(tuple_element, tuple_element_by_hand, ("gpt2",)),
]
