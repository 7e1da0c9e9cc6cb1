"""What a forward depends on beside its input, looked at for each trace: in C, where a loop in Python would cost more than the trace."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_not, itemgetter, methodcaller
from typing import NamedTuple

import torch
import torch.nn as nn

from ..compat.modules import comes_and_goes
from ..compat.tensors import versions

_values = methodcaller("values")
_config = methodcaller("get", "config")
_facts = attrgetter("device", "dtype", "requires_grad")


class Weights(NamedTuple):
    """The parameters and buffers of a model as a structural copy has them, and the configurations that its forward reads."""

    ids: list[int]
    facts: list[tuple]
    configs: list[dict]


class Setting(NamedTuple):
    """All that a forward depends on beside its input."""

    training: tuple[bool, ...]
    hooks: tuple
    weights: tuple


class TreeWatch:
    """The modules of one tree."""

    def __init__(self, modules: list[nn.Module]):
        self.modules = modules
        self.tables = [table for m in modules for table in (m._parameters, m._buffers)]
        self.children = [m._modules for m in modules]
        self.tree = self._tree()
        self.hooks = [table for m in modules for table in (m._forward_hooks, m._forward_pre_hooks)]
        states = [vars(m) for m in modules]
        self.states = states if all("training" in state for state in states) else None
        self.owners = [state for state in states if "config" in state]
        self.configs = _configs(self.owners)
        self.seen = list(map(_config, self.owners))

    def _tree(self) -> list[nn.Module]:
        return list(chain.from_iterable(map(_values, filter(None, self.children))))

    def moved(self) -> bool:
        """Has any module got another child, more of them, or fewer?"""
        now = self._tree()
        return len(now) != len(self.tree) or any(map(is_not, now, self.tree))

    def tensors(self) -> list[torch.Tensor]:
        """The parameters and buffers."""
        return [t for t in chain.from_iterable(map(_values, filter(None, self.tables))) if t is not None]

    def weights(self) -> Weights:
        """What a structural copy of the modules depends on."""
        tensors, now = self.tensors(), list(map(_config, self.owners))
        if any(map(is_not, now, self.seen)):  # `model.config = other`
            self.seen, self.configs = now, _configs(self.owners)
        return Weights(list(map(id, tensors)), list(map(_facts, tensors)), list(map(dict, self.configs)))

    def training(self) -> tuple[bool, ...]:
        """The flag of each module."""
        if self.states is None:  # a scripted module has it elsewhere
            return tuple([m.training for m in self.modules])
        return tuple(map(itemgetter("training"), self.states))

    def setting(self) -> Setting:
        """Everything, as it is now."""
        hooks = [hook for table in filter(None, self.hooks) for hook in table.values()]
        tensors = self.tensors()
        return Setting(
            self.training(),
            tuple([id(hook) for hook in hooks if not comes_and_goes(hook)]),
            (*map(id, tensors), *versions(tensors)),
        )


def _configs(states: list[dict]) -> list[dict]:
    """The attributes of each configuration in a tree (`module.config`, as transformers has it), and of those inside one."""
    found: dict[int, dict] = {}
    left = [state["config"] for state in states if "config" in state]
    while left:
        config = left.pop()
        if hasattr(config, "__dict__") and not isinstance(config, (type, nn.Module)) and id(config) not in found:
            found[id(config)] = held = vars(config)
            left += [x for name, x in held.items() if name.endswith("config")]
    return [held for held in found.values() if not any(isinstance(x, torch.Tensor) for x in held.values())]
