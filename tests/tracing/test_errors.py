"""Bad input: each mistake is a named error with the user's file and line, what exists, and what to do; on both engines."""

from __future__ import annotations

import inspect
import re
import traceback

import pytest
import torch
import torch.nn as nn

import nnsight_fx
from nnsight_fx import LanguageModel, NNsight, errors

pytestmark = pytest.mark.parametrize("engine", ["hooks", "eager"])


class Net(nn.Module):
    """Two blocks, one of which is never called, and a head that is called by weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = self.second(torch.relu(self.first(x)))
        return nn.functional.linear(h, self.head.weight)


def wrap(engine: str, module: nn.Module | None = None) -> NNsight:
    torch.manual_seed(0)
    model = NNsight((module or Net()).requires_grad_(False))
    if engine != "hooks":
        model.compile(backend=engine)
    return model


def x(rows: int = 2) -> torch.Tensor:
    return torch.ones(rows, 3)


def here(offset: int = 0) -> str:
    """`file:line` of the caller, moved by `offset` lines."""
    frame = inspect.currentframe().f_back
    return f"{__file__}:{frame.f_lineno + offset}"


def text_of(error: pytest.ExceptionInfo) -> str:
    """What Python prints of an exception: its message and its notes."""
    return "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])


def says(error: pytest.ExceptionInfo, *parts: str) -> None:
    for part in parts:
        assert part in text_of(error)


def clean(model: NNsight) -> None:
    """Nothing was left behind: no hooks, no `forward` on instances, no modes; the next trace is the plain model's."""
    module = model._module
    for m in module.modules():
        assert "forward" not in m.__dict__
        tables = (
            m._forward_hooks,
            m._forward_pre_hooks,
            m._forward_hooks_with_kwargs,
            m._forward_pre_hooks_with_kwargs,
        )
        assert not any(tables)
    assert model.tracer is None
    assert not torch.overrides._get_current_function_mode_stack()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert not nnsight_fx.tracing.saving._open.stack
    assert getattr(nnsight_fx.capture.marker.active, "run", None) is None
    with model.trace(x()):
        got = model.output.save()
    assert type(got) is torch.Tensor and torch.equal(got, module(x()))


# -- input and invokes -------------------------------------------------------------------------------------------------


def test_no_input_at_all(engine):
    model = wrap(engine)
    with pytest.raises(ValueError) as error:
        with model.trace():
            line = here(-1)
    assert type(error.value) is errors.InvokeError
    says(error, line, "neither an input nor an invoke", "`model.trace(prompt)`", "`with tracer.invoke(prompt):`")
    clean(model)


def test_a_site_without_an_open_invoke(engine):
    model = wrap(engine)
    with pytest.raises(ValueError) as error:
        with model.trace() as tracer:
            with tracer.invoke(x()):
                pass
            _, line = None, here(1)
            model.first.output.save()
    assert type(error.value) is errors.OutsideTraceError
    says(error, line, "no input is open here", "`with tracer.invoke(...):`")
    clean(model)


def test_a_nested_trace_on_the_same_model(engine):
    model = wrap(engine)
    with pytest.raises(ValueError) as error:
        with model.trace(x()):
            outer, inner = here(-1), here(1)
            with model.trace(x()):
                pass
    assert type(error.value) is errors.NestedTraceError
    says(error, inner + ": ", f"from {outer}", "Leave it first", "`with tracer.invoke(...)`")
    clean(model)


def test_a_trace_of_another_model_may_be_nested(engine):
    one, two = wrap(engine), wrap("hooks")
    with one.trace(x()):
        with two.trace(x()):
            inner = two.output.save()
        outer = one.output.save()
    assert torch.equal(inner, outer)


def test_a_second_open_invoke(engine):
    model = wrap(engine)
    with pytest.raises(ValueError) as error:
        with model.trace() as tracer:
            with tracer.invoke(x()):
                line = here(1)
                with tracer.invoke(x()):
                    pass
    assert type(error.value) is errors.InvokeError
    says(error, line, "already open", "Leave the other `with` block first")
    clean(model)


def test_an_invoke_in_a_trace_that_has_an_input(engine):
    model = wrap(engine)
    with pytest.raises(ValueError) as error:
        with model.trace(x()) as tracer:
            outer, line = here(-1), here(1)
            with tracer.invoke(x()):
                pass
    assert type(error.value) is errors.InvokeError
    says(error, line, outer, "already has an input", "`with model.trace() as tracer:`")
    clean(model)


def test_a_promptless_invoke_with_nothing_before_it(engine):
    model = wrap(engine)
    with pytest.raises(errors.InvokeError) as error:
        with model.trace() as tracer:
            line = here(1)
            with tracer.invoke():
                pass
    says(error, line, "works on the whole batch", "Open an invoke with an input first")
    clean(model)


# -- names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_an_unknown_module_path(engine, inside):
    model = wrap(engine)
    with pytest.raises(AttributeError) as error:
        if inside:
            with model.trace(x()):
                line = here(1)
                model.secnod.output.save()
        else:
            line = here(1)
            model.secnod.output  # noqa: B018
    assert type(error.value) is errors.UnknownModuleError
    says(error, line, "`model` has no module `secnod`", "did you mean `second`")
    clean(model)


def test_an_unknown_path_in_get(engine):
    model = wrap(engine)
    with pytest.raises(AttributeError) as error:
        line = here(1)
        model.get("first.wieght")
    says(error, line, "there is no module `first.wieght`; did you mean `first.input`")


def test_an_index_behind_the_last_child(engine):
    model = wrap(engine, nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(IndexError) as error:
        line = here(1)
        model[4]
    says(error, line, "`model` has 1 children; there is no [4]")


def test_a_misspelt_assignment(engine):
    model = wrap(engine)
    with pytest.raises(AttributeError) as error:
        with model.trace(x()):
            line = here(1)
            model.first.outptu = 0
    assert type(error.value) is errors.UnknownModuleError
    says(error, line, "has no module `outptu`", "did you mean `output`")
    clean(model)


@pytest.mark.parametrize("what", ["output", "input", "inputs"])
def test_a_value_outside_of_a_trace(engine, what):
    model = wrap(engine)
    with pytest.raises(ValueError) as error:
        line = here(1)
        getattr(model.first, what)
    assert type(error.value) is errors.OutsideTraceError
    says(error, line, f"`first.{what}` outside of a trace", "`with model.trace(...):`")


def test_save_outside_of_a_trace(engine):
    with pytest.raises(ValueError) as error:
        line = here(1)
        nnsight_fx.save([])
    assert type(error.value) is errors.OutsideTraceError
    says(error, line, "no trace is open", "`with model.trace(...)`")


# -- writes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "raised"),
    [
        (lambda h: h[:, :2], RuntimeError),  # the next Linear cannot multiply it
        (lambda h: h.to(torch.float64), RuntimeError),
        (lambda h: (h, h), TypeError),  # relu takes a tensor
    ],
    ids=["shape", "dtype", "type"],
)
def test_a_write_that_its_caller_cannot_use(engine, value, raised):
    model = wrap(engine)
    with pytest.raises(raised) as error:
        with model.trace(x()):
            h = value(model.first.output)
            line = here(1)
            model.first.output = h
    assert not isinstance(error.value, errors.NNsightFXError)
    says(error, f"`first.output` was written at {line}")
    clean(model)


def test_none_cannot_be_written_to_an_output(engine):
    model = wrap(engine)
    with pytest.raises(errors.NotRecordableError) as error:
        with model.trace(x()):
            line = here(1)
            model.first.output = None
    says(error, line, "`first.output = None`", "`.skip(None)`")
    clean(model)


@pytest.mark.parametrize(
    "value",
    [lambda h: h[:1], lambda h: h.to(torch.float64), lambda h: [h], lambda h: {"h": h}],
    ids=["shape", "dtype", "list", "dict"],
)
def test_a_write_that_merely_changes_shape_dtype_or_type_is_legal(engine, value):
    model = wrap(engine)
    with model.trace(x()):
        want = nnsight_fx.save({"v": value(model.second.output)})
        model.output = value(model.second.output)
        got = nnsight_fx.save({"v": model.output})
    got, want = got["v"], want["v"]
    assert type(got) is type(want)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    clean(model)


@pytest.mark.parametrize("scale", [lambda h: h[:, :4].double().float(), lambda h: torch.cat([h, h])])
def test_a_new_shape_that_the_caller_can_use_runs(engine, scale):
    model = wrap(engine)
    with model.trace(x()):
        model.first.output = scale(model.first.output)
        got = model.output.save()
    module = model._module
    assert torch.equal(
        got, nn.functional.linear(module.second(torch.relu(scale(module.first(x())))), module.head.weight)
    )


def test_an_operation_that_torch_refuses_fails_at_its_line(engine):
    model = wrap(engine)
    with pytest.raises(RuntimeError) as error:
        with model.trace(x()):
            line = here(1)
            _ = model.first.output + torch.ones(7)
    assert not isinstance(error.value, errors.NNsightFXError)
    assert error.traceback[0].lineno + 1 == int(line.rpartition(":")[2])
    clean(model)


# -- sites that the run does not reach ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["read", "written"])
@pytest.mark.parametrize("path", ["unused", "head"])
def test_a_site_that_never_runs(engine, how, path):
    model = wrap(engine)
    with pytest.raises(errors.OutOfOrderError) as error:
        with model.trace(x()):
            before = model.first.output.save()
            line = here(2 if how == "read" else 4)
            if how == "read":
                model.get(path).output.save()
            else:
                model.get(path).output = torch.zeros(2, 4)
            after = model.output.save()  # behind a read nothing is recorded: there is no value to go on with
    assert type(error.value) is errors.MissedSiteError is nnsight_fx.MissedProviderError
    says(error, line, f"`{path}.output` (call 0) was {how}", "was not called", "`.source`", "has been delivered")
    module = model._module
    assert torch.equal(before, module.first(x()))
    assert how == "read" or torch.equal(after, module(x()))
    clean(model)


# -- after the trace ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda h: h + 1,
        lambda h: float(h.sum()),
        lambda h: h.tolist(),
        lambda h: torch.relu(h),
        lambda h: h.save(),
        lambda h: str(h),
    ],
    ids=["add", "float", "tolist", "function", "save", "str"],
)
def test_an_unsaved_value_read_after_the_trace(engine, use):
    model = wrap(engine)
    with model.trace(x()):
        made = here(1)
        h = model.first.output
        model.output.save()
    with pytest.raises(ValueError) as error:
        use(h)
    assert type(error.value) is errors.UnsavedValueError
    assert re.match(re.escape(f"{__file__}:{use.__code__.co_firstlineno}: "), str(error.value))
    says(error, f"`first.output`, made at {made},", "not saved", "Add `.save()`", "nnsight_fx.save(container)")
    assert "made at" in repr(h)  # a debugger may look at it


# -- exceptions --------------------------------------------------------------------------------------------------------


class Oops(Exception):
    pass


@pytest.mark.parametrize("when", ["before a read", "after a write", "after a sync", "in an invoke", "after a skip"])
def test_an_exception_in_the_body_leaves_nothing_behind(engine, when):
    model = wrap(engine)
    before = torch.is_grad_enabled(), torch.get_default_dtype()
    with pytest.raises(Oops, match="mine"):
        if when == "in an invoke":
            with model.trace() as tracer, tracer.invoke(x()):
                model.first.output[:] = 0
                raise Oops("mine")
        with model.trace(x()):
            if when == "before a read":
                raise Oops("mine")
            model.first.output[:] = 0
            if when == "after a skip":
                model.second.skip(model.second.input)
            if when in ("after a sync", "after a skip"):
                assert float(model.second.input.sum()) == 0
            raise Oops("mine")
    assert before == (torch.is_grad_enabled(), torch.get_default_dtype())
    clean(model)


def test_an_exception_in_the_model_leaves_nothing_behind(engine):
    class Fails(Net):
        angry = True

        def forward(self, x):
            h = super().forward(x)
            if self.angry:
                raise Oops("the model's")
            return h

    model = wrap(engine, Fails())
    model._module.angry = True
    with pytest.raises(Oops, match="the model's") as error:
        with model.trace(x()):
            h = model.first.output.save()
    assert "was written" not in text_of(error)  # no write is to blame
    with pytest.raises(ValueError):
        h + 1
    model._module.angry = False
    clean(model)


def test_an_exception_in_a_recorded_function_names_its_line(engine):
    def fail(h):
        raise Oops("in apply")

    model = wrap(engine)
    with pytest.raises(Oops, match="in apply") as error:
        with model.trace(x()) as tracer:
            line = here(1)
            tracer.apply(fail, model.first.output)
    says(error, f"in the intervention at {line}")
    clean(model)


def test_an_error_does_not_disturb_the_engine_that_comes_after(engine):
    model = wrap(engine)
    clean(model)
    for _ in range(3):
        with pytest.raises(Oops):
            with model.trace(x()):
                model.first.output[:] = 0
                raise Oops
        clean(model)


# -- models ------------------------------------------------------------------------------------------------------------


def test_a_missing_model_folder_has_the_command_that_gets_one(engine, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        LanguageModel(tmp_path / "nothing-here")
    assert isinstance(error.value, errors.NNsightFXError)
    says(error, f"there is no folder `{tmp_path / 'nothing-here'}`", "hf download", "--local-dir", "make demo")


def test_a_folder_without_a_model(engine, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError) as error:
        LanguageModel(tmp_path)
    says(error, str(tmp_path), "no config.json", "notes.txt", "hf download")


# -- what our errors are besides ---------------------------------------------------------------------------------------

WRONG_SHAPES = {  # what is written, and what is said of it
    "matmul": (lambda h: h @ torch.ones(7, 7), r"`matmul` of shapes \(2, \d+\), \(7, 7\)"),
    "add": (lambda h: h + torch.ones(7), r"`add` of shapes \(2, \d+\), \(7,\)"),
    "cat": (lambda h: torch.cat([h, torch.ones(1, 99)]), r"`cat` of shapes \(2, \d+\), \(1, 99\)"),
    "index": (lambda h: h[:, 99], r"`__getitem__` of shapes"),
    "view": (lambda h: h.view(3, 99), r"`view` of shapes"),
    "write": (lambda h: h.__setitem__((slice(None), slice(3)), torch.ones(9)), r"`__setitem__` of shapes"),
    "function": (lambda h: torch.nn.functional.linear(h, torch.ones(9, 9)), r"`linear` of shapes"),
}


@pytest.mark.parametrize("name", list(WRONG_SHAPES))
def test_values_that_do_not_fit_are_told_at_the_line_without_torchs_insides(name, engine):
    write, told = WRONG_SHAPES[name]
    model = wrap_for_shapes(engine)
    with pytest.raises((RuntimeError, IndexError)) as error:
        with model.trace(torch.ones(2, 4)):
            write(model[0].output)
    (note,) = error.value.__notes__
    assert re.fullmatch(rf"nnsight_fx: at .*test_errors\.py:\d+: {told}.*\.", note)
    frames = traceback.extract_tb(error.value.__traceback__)
    assert all(
        "torch/" not in f.filename and "nnsight_fx/tracing" not in f.filename.replace("tests/tracing", "")
        for f in frames
    )
    with model.trace(torch.ones(2, 4)):
        out = model.output.save()
    assert out.shape == (2, 4)


def wrap_for_shapes(engine):
    model = NNsight(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    if engine != "hooks":
        model.compile(backend="eager")
    return model


PARENTS = {
    "OutOfOrderError": (),
    "MissedSiteError": (),
    "UnknownModuleError": (AttributeError,),
    "UnknownOperationError": (AttributeError,),
    "SourceNotAvailable": (),
    "StoreError": (ValueError,),
    "WorkerLostError": (RuntimeError,),
    "OutsideTraceError": (ValueError,),
    "NestedTraceError": (ValueError,),
    "InvokeError": (ValueError,),
    "UnsavedValueError": (ValueError,),
    "NotRecordableError": (RuntimeError,),
    "NotConnectedError": (RuntimeError,),
    "PaddedLengthUnknown": (RuntimeError,),
    "SkipError": (ValueError,),
    "PlanError": (ValueError,),
    "PlanMismatchError": (RuntimeError,),
    "FallbackError": (AssertionError,),
    "RecompileError": (AssertionError,),
    "ModelNotFoundError": (FileNotFoundError,),
    "PromptError": (ValueError,),
    "WeightsNotComputedError": (TypeError,),
}


def test_every_error_has_its_builtin_parent(engine):
    public = {
        name: cls
        for name in nnsight_fx.__all__
        if isinstance(cls := getattr(nnsight_fx, name), type)
        and issubclass(cls, Exception)
        and not issubclass(cls, Warning)
    }
    assert set(public) == {*PARENTS, "MissedProviderError", "NNsightFXError"}
    for name, parents in PARENTS.items():
        cls = public[name]
        assert issubclass(cls, nnsight_fx.NNsightFXError) and (cls.__doc__ or "").strip()
        builtin = tuple(p for p in cls.__mro__ if p.__module__ == "builtins")
        assert builtin[: len(parents)] == parents
        assert parents or builtin == (Exception, BaseException, object)
