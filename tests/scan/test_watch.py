"""`scan.watch`: whatever a forward depends on beside its input is seen when it changes."""

import pytest
import torch
import torch.nn as nn

from nnsight_fx.scan.watch import TreeWatch


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3, bias=False), nn.Dropout()))


def hooked(module):
    module[0].register_forward_hook(lambda m, a, out: out)


def replaced(module):
    module[0].weight = nn.Parameter(module[0].weight.detach().clone())


def gone(module):
    module[0].bias = None


CHANGES = {
    "a flag": lambda m: m[2][1].eval(),
    "a hook": hooked,
    "a hook before": lambda m: m[0].register_forward_pre_hook(lambda m, a: None),
    "a weight in place": torch.no_grad()(lambda m: m[0].weight.add_(1)),
    "another parameter": replaced,
    "no parameter": gone,
    "a buffer": lambda m: m[1].running_mean.add_(1),
    "a new buffer": lambda m: m[2].register_buffer("late", torch.ones(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_changes(name):
    module = net()
    watch = TreeWatch(list(module.modules()))
    before = watch.setting()
    assert watch.setting() == before
    CHANGES[name](module)
    assert watch.setting() != before


def moved(module):
    module[2].to(torch.float64)


@pytest.mark.parametrize(
    "change",
    [moved, replaced, gone, lambda m: m[0].requires_grad_(False), lambda m: m.bfloat16(), lambda m: m.to("meta")],
)
def test_what_a_structural_copy_has_changes(change):
    module = net()
    watch = TreeWatch(list(module.modules()))
    before = watch.weights()
    assert watch.weights() == before
    change(module)
    assert watch.weights() != before


class Config:
    def __init__(self, **given):
        vars(self).update(given)


def test_a_configuration_that_changes():
    module = net()
    module.config = Config(kernel="sdpa", text_config=Config(layers=2), label=None)
    module[2].config = module.config.text_config
    watch = TreeWatch(list(module.modules()))
    before = watch.weights()
    assert watch.weights() == before and len(before.configs) == 2
    module.config.kernel = "eager"
    changed = watch.weights()
    module.config.text_config.layers = 3
    assert before != changed != watch.weights() != before


def test_a_configuration_that_is_replaced():
    module = net()
    module.config = Config(kernel="sdpa")
    watch = TreeWatch(list(module.modules()))
    before = watch.weights()
    module.config = Config(kernel="eager")
    replaced = watch.weights()
    module.config.kernel = "flex"
    assert before != replaced != watch.weights() != before
    del module.config
    assert watch.weights() != replaced


def test_numbers_alone_change_no_structure():
    module = net()
    watch = TreeWatch(list(module.modules()))
    before = watch.weights()
    with torch.no_grad():
        module[0].weight.mul_(2)
    assert watch.weights() == before


def test_a_hook_that_is_taken_off_leaves_nothing():
    module = net()
    watch = TreeWatch(list(module.modules()))
    before = watch.setting()
    handle = module[0].register_forward_hook(lambda m, a, out: out)
    assert watch.setting().hooks != before.hooks
    handle.remove()
    assert watch.setting() == before


def test_inference_tensors_count_no_changes():
    with torch.inference_mode():
        module = net()
    watch = TreeWatch(list(module.modules()))
    assert watch.setting() == watch.setting()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_module_has_its_flag_elsewhere():
    module = nn.Sequential(torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3)), nn.Dropout())
    watch = TreeWatch(list(module.modules()))
    assert watch.training() == tuple(m.training for m in module.modules())
    module.eval()
    assert watch.training() == (False,) * len(list(module.modules()))
