"""Exported edits: in another process, and on every engine, they do what they did; what is no data, or does not fit, is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nnsight_fx import LanguageModel, NNsight, PlanError, assert_max_compiles, assert_no_fallback, interventions

from .generation.test_generate import Hooks, gpt2, ids, options, plain
from .generation.test_generate import steer as steer_block
from .test_plans import damaged
from .tracing.test_edits import EDITS, ENGINES, by_hand, e_field, e_module, e_skip, net, same, wrap, x

ROOT = Path(__file__).resolve().parents[1]


def exported(tmp_path, edit, module=None, **where):
    model = NNsight(module or net())
    with model.edit() as edited:
        edit(edited)
    return edited.export_edits("mine", tmp_path, **where)


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_imported_edit_is_what_hooks_do(engine, name, tmp_path):
    edit, hooks = EDITS[name]
    exported(tmp_path, edit)
    module = net()
    model = wrap(engine, module)
    model.import_edits("mine", tmp_path)
    for rows in (3, 5):
        want = by_hand(module, hooks, x(rows))
        assert not torch.equal(want, module(x(rows)))
        with assert_no_fallback(), model.trace(x(rows)):
            out = model.output.save()
        same(out, want, engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_it_shares_what_is_compiled_with_the_edit_it_comes_from(engine, tmp_path):
    module = net()
    model = wrap(engine, module)
    with model.edit() as edited:
        EDITS["views"][0](edited)
        edited.b.output *= 2
    with edited.trace(x()):
        want = edited.output.save()
    edited.export_edits("mine", tmp_path)
    model.import_edits("mine", tmp_path)
    with assert_no_fallback(), assert_max_compiles(0), model.trace(x()):
        got = model.output.save()
    assert torch.equal(got, want)


@pytest.mark.parametrize("engine", ENGINES)
def test_skips_stops_calls_of_modules_and_hooked_ones(engine, tmp_path):
    def hooked(m):
        m.a.output = m.extra(m.a.output, hook=True) + m.extra.input

    for edit in (e_skip, e_module, hooked):
        module = net()
        module.extra = nn.Linear(4, 4).requires_grad_(False)
        exported(tmp_path, edit, module)
        model = wrap(engine, module)
        with model.edit() as edited:
            edit(edited)
        model.import_edits("mine", tmp_path)
        with edited.trace(x()), torch.no_grad():
            want = edited.output.save()
        with model.trace(x()), torch.no_grad():
            out = model.output.save()
        assert torch.equal(out, want) and not torch.equal(out, module(x()))
    model = NNsight(net())
    with model.edit() as (tracer, edited):
        edited.a.output[:] = 1
        tracer.stop()
    edited.export_edits("stops", tmp_path)
    model.import_edits("stops", tmp_path)
    ran = []
    handle = model._module.c.register_forward_hook(lambda *_: ran.append(1))
    with model.trace(x()):
        a = model.a.output.save()
    handle.remove()
    assert (a == 1).all() and not ran


def test_several_edits_stack_behind_those_of_the_model(tmp_path):
    module = net()
    model = NNsight(module)
    with model.edit() as edited:
        edited.a.output[:] = 2
    with edited.edit(inplace=True):
        edited.a.output = edited.a.output * 5
    edited.export_edits("mine", tmp_path, variant="ten")
    with model.edit(inplace=True):
        model.a.output[:] = 7
        model.b.output[:] = 1
    model.import_edits("mine", tmp_path, variant="ten")
    with model.trace(x()):
        a, b = model.a.output.save(), model.b.output.save()
    assert (a == 10).all() and (b == 1).all()
    model.clear_edits()
    with model.trace(x()):
        out = model.output.save()
    assert torch.equal(out, module(x()))


def test_tensors_are_values_and_parameters_are_names(tmp_path):
    vector = torch.arange(4.0, requires_grad=True)

    def edit(m):
        m.a.output = m.a.output * 0 + vector + m.b.bias
        with torch.no_grad():
            m.c.input = m.c.input * 2

    path = exported(tmp_path, edit)
    assert [tuple(t.shape) for t in load_file(path).values()] == [(4,)]
    other = net()
    other.b.bias.add_(3)
    model = NNsight(other)
    with torch.no_grad():
        model.import_edits("mine", tmp_path)
    with model.trace(x()):
        a, c = model.a.output.save(), model.c.input.save()
    assert a.requires_grad and torch.equal(a.detach(), (vector + other.b.bias).detach().expand(3, 4))
    assert not c.requires_grad  # the modes of an operation are its own, whatever holds when it is imported


def test_interventions_of_ours_are_rebuilt_from_their_operations(tmp_path):
    torch.manual_seed(1)
    made = [
        interventions.Add(torch.randn(4)),
        interventions.Projection(torch.randn(4)),
        interventions.Mean(torch.ones(4)),
    ]
    for one in made:

        def edit(m, one=one):
            m.a.output = one(m.a.output)

        exported(tmp_path, edit)
        module = net()
        model = NNsight(module)
        model.import_edits("mine", tmp_path)
        with torch.no_grad(), model.trace(x()):
            out = model.output.save()
        want = by_hand(module, [("a", one)], x()).detach()
        torch.testing.assert_close(out, want, rtol=0, atol=0)
        assert not torch.equal(out, module(x()))


@pytest.mark.parametrize("engine", ["hooks", "eager"])
def test_in_a_generation(engine, tmp_path):
    model = LanguageModel(gpt2())
    with model.edit() as edited:
        steer_block(edited.transformer.h[0])
    edited.export_edits(export_dir=tmp_path)
    module = gpt2()
    other = LanguageModel(module)
    if engine != "hooks":
        other.compile(backend=engine)
    other.import_edits(export_dir=tmp_path)
    with Hooks(module).steer(module.transformer.h[0], set(range(5))):
        want = plain(module, ids())
    with assert_no_fallback(), other.generate(ids(), **options()) as tracer:
        got = tracer.result.save()
    assert torch.equal(got, want) and not torch.equal(got, plain(module, ids()))


def test_in_another_process(tmp_path):
    module = net()
    edit, hooks = EDITS["dict"]
    exported(tmp_path, edit, module)
    save_file({"x": x(), "want": by_hand(module, hooks, x())}, tmp_path / "x")
    program = (
        "import sys, torch\nfrom safetensors.torch import load_file\nfrom nnsight_fx import NNsight\n"
        "from tests.tracing.test_edits import net\n"
        "data = {k: v.clone() for k, v in load_file(sys.argv[2]).items()}\nmodel = NNsight(net())\n"
        "model.import_edits('mine', sys.argv[1])\n"
        "for engine in (False, {'backend': 'eager'}):\n"
        "    with model.trace(data['x'], compile=engine):\n        out = model.output.save()\n"
        "    assert torch.equal(out, data['want'])\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(tmp_path / "x")]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_for_a_model_without_weights_they_are_loaded_where_the_edit_needs_them(tmp_path):
    module = gpt2()
    module.save_pretrained(tmp_path / "model")
    vector = torch.arange(32.0)

    def edit(m):
        m.transformer.h[0].output = m.transformer.h[0].output * m.transformer.ln_f.weight + vector

    model = LanguageModel(module)
    with model.edit() as edited:
        edit(edited)
    edited.export_edits("mine", tmp_path)
    fresh = LanguageModel(tmp_path / "model", tokenizer=object())
    assert not fresh.dispatched
    fresh.import_edits("mine", tmp_path)
    with torch.no_grad(), fresh.trace(ids()):
        got = fresh.lm_head.output.save()
    handle = module.transformer.h[0].register_forward_hook(
        lambda m, a, out: out * module.transformer.ln_f.weight + vector
    )
    with torch.no_grad():
        assert torch.equal(got, module(ids()).logits)
    handle.remove()


# -- what is refused --------------------------------------------------------------------------------------------------


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_what_is_no_data_is_refused_with_its_line(tmp_path):
    generator = torch.Generator()

    def edit(m):
        m.a.output = torch.rand(4, generator=generator) + m.a.output

    with pytest.raises(
        PlanError, match=r"test_edit_files\.py:\d+: `rand` cannot be saved: its argument .*Generator.* is an object"
    ):
        exported(tmp_path, edit)
    with pytest.raises(PlanError, match=r"test_edit_files\.py:\d+: this model has no edits to export"):
        NNsight(net()).export_edits("mine", tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_that_it_does_not_fit(tmp_path):
    exported(tmp_path, e_skip)
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(
        PlanError, match=r"test_edits\.py:\d+ uses the module `b`, which this model does not have; there is"
    ):
        NNsight(other).import_edits("mine", tmp_path)

    def uses_bias(m):
        m.a.output = m.a.output + m.b.bias

    exported(tmp_path, uses_bias)
    bare = net()
    bare.b = nn.Linear(4, 4, bias=False)
    with pytest.raises(PlanError, match="uses the parameter `b.bias`, which this model does not have"):
        NNsight(bare).import_edits("mine", tmp_path)
    exported(tmp_path, EDITS["views"][0])
    wider = net()
    wider.a, wider.b = nn.Linear(4, 6), nn.Linear(6, 4)
    model = NNsight(wider)
    model.import_edits("mine", tmp_path)
    with pytest.raises(RuntimeError) as caught, model.trace(x()):
        model.output.save()
    assert any("in the edit at" in note and "test_edits.py" in note for note in caught.value.__notes__)


def test_a_file_that_is_not_there_or_no_edits(tmp_path):
    model = NNsight(net())
    with pytest.raises(
        PlanError, match=r"test_edit_files\.py:\d+: there are no exported edits at .*export them there first"
    ):
        model.import_edits("mine", tmp_path)
    exported(tmp_path, e_skip, variant="a")
    with pytest.raises(PlanError, match=r"there is `a` \(`variant=`\)"):
        model.import_edits("mine", tmp_path)
    (tmp_path / "mine" / "b.safetensors").write_bytes(b"no")
    with pytest.raises(PlanError, match="is not an export of edits, or is damaged"):
        model.import_edits("mine", tmp_path, variant="b")
    with model.trace(x()) as tracer:
        model.output.save()
    tracer.graph.save_plan(tmp_path / "mine" / "c.safetensors")
    with pytest.raises(PlanError, match="its header does not say `nnsight_fx.edits`"):
        model.import_edits("mine", tmp_path, variant="c")
    assert model._host.edits == []


def _of(document, target):
    return next(op for op in document["edits"][0]["operations"] if op.get("target") == target)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda d: d.update(version=99), "version 99, and this nnsight_fx reads version 2. Export the edits again"),
        (lambda d: _of(d, "getattr")["args"].__setitem__(1, "__class__"), "not about a field of a value"),
        (lambda d: _of(d, "setattr")["args"].__setitem__(0, {"c": 0}), "changes a constant"),
        (lambda d: _of(d, "getattr").update(target="eval"), "`eval`, which is not among the torch operations"),
        (lambda d: _of(d, "getattr").update(kind="apply"), "a `apply`, which this version does not have"),
        (lambda d: _of(d, "getattr")["args"].__setitem__(0, {"v": [40, -1]}), "damaged"),
        (lambda d: d.pop("edits"), "damaged"),
    ],
)
def test_what_a_file_may_not_say(change, text, tmp_path):
    def edit(m):
        e_field(m)
        m.b.output = m.b.output + torch.ones(4)

    path = exported(tmp_path, edit)
    damaged(path, change)
    with pytest.raises(PlanError, match=text):
        NNsight(net()).import_edits("mine", tmp_path)


def test_default_places(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = NNsight(net())
    with model.edit(inplace=True):
        e_skip(model)
    path = Path(model.export_edits())
    assert path == tmp_path / ".cache/nnsight_fx/edits/Net/__default__.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "nnsight_fx.edits"
    fresh = NNsight(net())
    fresh.import_edits()
    assert len(fresh._host.edits) == 1
    named = gpt2()
    named.config.name_or_path = "openai-community/gpt2"
    model = LanguageModel(named)
    with model.edit(inplace=True):
        model.transformer.h[0].mlp.output[:] = 0
    assert Path(model.export_edits(variant="zero")).relative_to(tmp_path).parts[-2:] == (
        "openai-community_gpt2",
        "zero.safetensors",
    )
