"""Whose a hook is: the user's, or a library's that comes and goes by itself."""

import pytest
import torch
from accelerate import big_modeling
from transformers.utils import output_capturing

from nnsight_fx import NNsight
from nnsight_fx.capture.markers import Markers
from nnsight_fx.compat.modules import comes_and_goes, library_of
from nnsight_fx.errors import OutOfOrderError
from nnsight_fx.tracing.tape import Tape


class OfAccelerate:
    """A hook as accelerate puts them (`attach_context_parallel_hooks`): it changes what a module is called with."""

    __module__ = big_modeling.__name__

    def __call__(self, module, args):
        return (args[0] * 2,)


def of_user(module, args, output):
    return output


def by_itself(module, args, output):
    return output


by_itself.__module__ = output_capturing.__name__


def test_whose_a_hook_is():
    assert library_of(by_itself) == "transformers" and library_of(OfAccelerate()) == "accelerate"
    assert library_of(Tape.hooked) == "nnsight_fx"
    assert library_of(of_user) is None and library_of(object()) is None
    named_alike = type("Hook", (), {"__module__": "transformers_of_mine.hooks"})()
    assert library_of(named_alike) is None


def test_only_those_of_accelerate_stay_without_the_user():
    assert comes_and_goes(by_itself) and comes_and_goes(Tape.hooked)
    assert not comes_and_goes(OfAccelerate()) and not comes_and_goes(of_user)


@pytest.mark.parametrize("hook, hooked", [(of_user, True), (by_itself, False)])
def test_what_dynamo_must_guard(hook, hooked):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    module[0].register_forward_hook(hook)
    assert Markers(module).hooked() is hooked


def test_a_hook_of_accelerate_put_on_before_a_session_ends_is_told():
    model = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(OutOfOrderError, match="the hooks of the model were changed"):
        with torch.no_grad(), model.session():
            with model.trace(torch.ones(1, 2)):
                model[0].output.save()
            model._module[0].register_forward_pre_hook(OfAccelerate())


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_a_hook_of_accelerate_is_part_of_the_model(backend):
    model = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    model._module[0].register_forward_pre_hook(OfAccelerate())
    if backend is not None:
        model.compile(backend=backend)
    x = torch.ones(1, 2)
    with torch.no_grad():
        with model.trace(x):
            got = model[0].output.save()
        assert torch.equal(got, model._module(x))
