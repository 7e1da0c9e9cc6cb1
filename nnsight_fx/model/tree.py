"""The envoys of a wrapped model: one for each module, made when it is asked for, found again by the module."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch.nn as nn

from ..envoys.envoy import Envoy, host_of, path_of, tree_of
from .aliasing import Names, Rename

if TYPE_CHECKING:
    from .model import NNsight


class EnvoyTree:
    """Those of one model; an edited copy has its own."""

    def __init__(self, model: NNsight, rename: Rename, classes: object):
        self.model = weakref.ref(model)
        self.rename, self.classes = rename, classes
        self.envoys: dict[int, Envoy] = {id(model._module): model}
        self.attached: dict[str, nn.Module] = {}  # what the user put into the tree

    def copy(self, model: NNsight) -> EnvoyTree:
        """The tree of an edited copy of the model."""
        made = EnvoyTree(model, self.rename, self.classes)
        made.names, made.attached = self.names, self.attached
        return made

    def changed(self) -> None:
        """The module tree is new: everything learnt of the old one is forgotten, and the envoys that a user holds stay good."""
        model = self.model()
        assert model is not None
        host = host_of(model)
        host.shared.renew(host.module)
        for each in host.shared.family:
            tree_of(each).know(host.markers.paths)

    def know(self, paths: weakref.WeakKeyDictionary[nn.Module, str] | dict[nn.Module, str]) -> None:
        """Learn the names and paths of the module tree."""
        model = self.model()
        assert model is not None
        self.names = Names(model._module, self.rename, Envoy)
        kept = [e for e in (model, *self.envoys.values()) if e._module in paths]
        for envoy in kept:
            envoy._path = paths[envoy._module]
        self.envoys = {id(e._module): e for e in kept}

    def envoy_of(self, module: nn.Module) -> Envoy:
        """The envoy of a module of the tree."""
        if id(module) not in self.envoys:
            model = self.model()
            assert model is not None
            if module not in host_of(model).markers.paths:
                self.changed()
            path = host_of(model).markers.paths[module]
            cls = self.names.chosen(self.classes, module, Envoy)
            self.envoys[id(module)] = cls(module, path, model)
        return self.envoys[id(module)]

    def attach(self, path: str, module: nn.Module) -> None:
        """The user has put a module into the tree."""
        self.attached[path] = module
        self.changed()

    def adopt(self, module: nn.Module) -> None:
        """Go on with another module of the same structure; every envoy stays, and gets its part of it."""
        model = self.model()
        assert model is not None
        for path, attached in self.attached.items():
            where, _, name = path.rpartition(".")
            setattr(module.get_submodule(where), name, attached)
        for envoy in [e for each in host_of(model).shared.family for e in tree_of(each).envoys.values()]:
            envoy._module = module.get_submodule(path_of(envoy))
        host_of(model).shared.module = module
        self.changed()
