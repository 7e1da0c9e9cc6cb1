"""`Envoy`: the mirror of a module, through which its values are read, written and skipped."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.nn as nn

from ..errors import OutsideTraceError, UnknownModuleError, nearest, own_error
from ..lines import user_line
from ..names import shown
from ..plan import tree
from ..plan.printing import module_name
from ..plan.verbs import Site
from ..tracing.lazy import LazyTensor
from ..tracing.tape import Tape
from . import attention
from .methods import traceable

_TAKEN = ("input", "inputs", "output", "source")  # every module's own: a child of such a name is `E_<name>`
_CHILD = "E_"  # in front of a child's name; nnsight's


class Observed:
    """Something that the model calls: it has inputs and an output, and can be skipped."""

    _path: str
    _root: Any

    # -- values --------------------------------------------------------------------------------------------------

    def _at(self, what: str, kind: str | None = None) -> tuple[Tape, Site]:
        """The open recording, and the occurrence of a site of this module that is meant."""
        tracer = self._root.tracer
        if tracer is None:
            raise OutsideTraceError(
                f"{user_line()}: cannot access `{shown(self._path)}.{what}` outside of a trace: values exist only while the model "
                "runs. Open one: `with model.trace(...):`."
            )
        if tracer.waves:
            call = tracer.cursor.call(self._path, kind or what)
            return tracer.tape, (self._path, kind or what, call)
        return tracer.tape, (self._path, kind or what, 0)

    def next(self, step: int = 1) -> Self:
        """From here on, the next occurrence of this module: `model.lm_head.next().output`."""
        tracer = self._root.tracer
        if tracer is None:
            raise OutsideTraceError(
                f"{user_line()}: `{shown(self._path)}.next()` outside of a trace has nothing to count."
            )
        tracer.cursor.next(step, self._path)
        return self

    @own_error
    def output(self) -> Any:
        """What the module returned: the model's own structure, with tensors that are recorded."""
        tape, site = self._at("output")
        return tape.read(site)

    @output.setter
    def output(self, value: object) -> None:
        tape, site = self._at("output")
        tape.write(site, value)

    @own_error
    def inputs(self) -> Any:
        """`(args, kwargs)` of the module's call."""
        tape, site = self._at("inputs", "input")
        return tape.read(site)

    @inputs.setter
    def inputs(self, value: object) -> None:
        tape, site = self._at("inputs", "input")
        tape.write(site, value)

    @own_error
    def input(self) -> Any:
        """The first argument of the module's call: positional, else by keyword."""
        tape, site = self._at("input")
        return tape.read_input(site)

    @input.setter
    def input(self, value: object) -> None:
        tape, site = self._at("input")
        tape.write_input(site, value)

    def skip(self, value: object) -> None:
        """Do not run the module: its output is `value`. Its input can be read before, its output after."""
        tape, (path, _, call) = self._at("skip", "input")
        tape.skip(path, call, value)

    @property
    def path(self) -> str:
        """The path, from `model` on."""
        return ".".join(p for p in ("model", self._path) if p)


class Envoy(Observed):
    """One module of a wrapped model.

    `.output` is what the module returns, `.inputs` is `(args, kwargs)`, `.input` the first of them; each can be read,
    assigned, and changed in place inside a trace. Children are attributes (`model.transformer.h[3].mlp`), what happens
    inside its `forward` is `.source`. A child whose name is one of these (`output` in BERT's blocks) is `.E_output`, or
    `["output"]`.
    """

    def __init__(self, module: nn.Module, path: str, root: Envoy):
        self._module, self._path, self._root = module, path, root
        self._tree = root._tree  # of all envoys

    @own_error
    def output(self) -> Any:
        """What the module returned: the model's own structure, with tensors that are recorded."""
        return attention.explained(self, Observed.output.fget(self))  # type: ignore[misc]

    @output.setter
    def output(self, value: object) -> None:
        Observed.output.fset(self, value)  # type: ignore[misc]

    @own_error
    def source(self) -> Any:
        """The operations inside the module's `forward`: `print(module.source)` lists them.

        `module.source.torch_relu_0.output` is what the first call of `torch.relu` in it returned; `.inputs`, `.input`,
        `.skip(value)` and assignment work as for modules. An operation's own `.source` looks into the function that it
        calls. Raises `SourceNotAvailable`; an unknown operation is an `AttributeError`.
        """
        from .source import source_of  # which needs `Observed`

        return source_of(self)

    def __call__(self, *args: object, hook: bool = False, **kwargs: object) -> Any:
        """Inside a trace: the module applied to values, on its parameters' device. Outside: the module itself.

        The call is not one of the model's: `.output` is what the model computes, whoever calls the module beside. With
        `hook=True` it counts: the sites of the module and of all in it are passed, to be read behind the call, and
        written by later invokes. That is for modules that are attached to the model and that only the body calls.

        ```python
        model.sae = SAE()
        with model.trace(x):
            model.layer.output = model.sae(model.layer.output, hook=True)
            features = model.sae.relu.output.save()
        ```
        """
        tracer = self._root.tracer
        if tracer is None:
            return self._module(*args, **kwargs)
        device = self.device
        if device is not None and device.type != "meta":  # weights that are elsewhere: they come to the values
            args, kwargs = tree.tree_map(lambda x: _moved(x, device), (args, kwargs))
        if hook:
            return tracer.tape.hooked(self._path, self._module, args, kwargs)
        return tracer.tape.module(self._path, args, kwargs)

    def trace(self, *args: object, fn: str | None = None, **kwargs: object) -> Any:
        """Trace this module alone, on inputs of its own: `model.layers[3].trace(hidden)`. Keywords are `NNsight.trace`'s."""
        return self._root._part_trace(self, args, kwargs, fn)

    # -- the tree ------------------------------------------------------------------------------------------------

    @property
    def root(self) -> Any:
        """The wrapped model that this module belongs to: the `NNsight` or `LanguageModel`, not the torch module in it.

        The torch module itself is `._module`, as in nnsight: `model._module` is the one that was wrapped, and
        `model.layers[3]._module` is a layer, for hooks of your own, `state_dict()`, or an optimizer.
        """
        return self._root

    @property
    def parent(self) -> Envoy | None:
        """The envoy of the module that holds this one, `None` for the root."""
        if not self._path:
            return None
        return self._root.get(self._path.rpartition(".")[0])

    def _child(self, name: str) -> Envoy:
        child = self._module._modules.get(name)
        if child is None:
            child = self._tree.names.at.get(self._module, {}).get(name)
        if child is None:
            raise KeyError(name)
        return self._tree.envoy_of(child)

    def __getattr__(self, name: str) -> Any:
        own_error.reraise(self)
        if name.startswith("__") or "_module" not in self.__dict__:
            raise AttributeError(name)
        try:
            return self._child(name)
        except KeyError:
            pass
        if name.startswith(_CHILD) and name.removeprefix(_CHILD) in self._module._modules:
            return self._child(name.removeprefix(_CHILD))
        if hasattr(self._module, name):
            found = getattr(self._module, name)
            tracer = self._root.tracer
            if isinstance(found, torch.Tensor) and tracer is not None and tracer.waves:
                return tracer.waves[-1].tape.operands.watch(found)
            return found if tracer is not None else traceable(self, name, found)
        raise self._unknown(name)

    def _unknown(self, name: str) -> UnknownModuleError:
        known = [
            *(_CHILD * (name in _TAKEN) + name for name in self._module._modules),
            *self._tree.names.at.get(self._module, {}),
            "output",
            "input",
            "inputs",
            "skip",
            "source",
        ]
        ends = [p for p in self._tree.names.spelled if not self._path and p.endswith(f".{name}")]
        hint = f"it is `{module_name(ends[0])}`" if len(ends) == 1 else nearest(name, known)
        if name == "save" or hasattr(torch.Tensor, name):
            hint = f"a module's value is its `.output` or `.input`: `.output.{name}`"
        return UnknownModuleError(f"{user_line()}: `{shown(self._path)}` has no module `{name}`; {hint}")

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            return super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            setattr(self._module, name, value)
            self._tree.attach(".".join(p for p in (self._path, name) if p), value)
            return
        if not hasattr(type(self), name) and name not in self.__dict__ and self._root.tracer is not None:
            raise self._unknown(name)
        super().__setattr__(name, value)

    def __getitem__(self, index: int | slice | str) -> Any:
        if isinstance(index, str):
            return self._child(index)
        names = list(self._module._modules)
        if type(index) is int and 0 <= index < len(names):
            return self._child(names[index])
        if isinstance(index, slice):
            return [self._child(n) for n in names[index]]
        if not names:
            raise IndexError(f"{user_line()}: `{shown(self._path)}` has no children to index")
        if not -len(names) <= index < len(names):
            raise IndexError(f"{user_line()}: `{shown(self._path)}` has {len(names)} children; there is no [{index}]")
        return self._child(names[index])

    def __len__(self) -> int:
        return len(self._module._modules)

    def __iter__(self) -> Iterator[Envoy]:
        return iter(self[:])

    def __bool__(self) -> bool:
        return True

    def get(self, path: str) -> Any:
        """What a path leads to, from here: `model.get("transformer.h.3.output")`.

        `"model.transformer.h.3.output"` is the same, and so is `"h.3.output"` where no other module's path ends so.

        Raises `UnknownModuleError` for a path that leads nowhere, or to several modules.
        """
        from .paths import resolved  # which needs `Envoy`

        here, rest = resolved(self, path)
        return functools.reduce(getattr, rest, here)

    def modules(self, include_fn: Callable[[Envoy], bool] | None = None, names: bool = False) -> list:
        """This envoy and all below it, children first; with `names`, as `(path, envoy)`."""
        found: list[Envoy] = []

        def walk(module: nn.Module) -> None:
            for child in module._modules.values():
                if child is not None:
                    walk(child)
            envoy = self._tree.envoy_of(module)
            if envoy not in found:
                found.append(envoy)

        walk(self._module)
        kept = [e for e in found if include_fn is None or include_fn(e)]
        return [(e.path, e) for e in kept] if names else kept

    def named_modules(self, include_fn: Callable[[Envoy], bool] | None = None) -> list[tuple[str, Envoy]]:
        """`(path, envoy)` of this envoy and all below it, children first."""
        return self.modules(include_fn, names=True)

    @property
    def device(self) -> torch.device | None:
        """The device of the first parameter."""
        found = _first_parameter(self._module)
        return None if found is None else found.device

    @property
    def devices(self) -> set[torch.device]:
        return {p.device for p in self._module.parameters()}

    def to(self, *args: Any, **kwargs: object) -> Envoy:
        """`nn.Module.to`, in place."""
        self._module.to(*args, **kwargs)
        return self

    def cpu(self) -> Envoy:
        return self.to("cpu")

    def cuda(self, *args: Any) -> Envoy:
        self._module.cuda(*args)
        return self

    def __repr__(self) -> str:
        return re.sub(r"^\w+", lambda m: m.group(0), repr(self._module), count=1)


def _first_parameter(module: nn.Module) -> nn.Parameter | None:
    for p in module._parameters.values():
        if p is not None:
            return p
    for child in module._modules.values():
        found = None if child is None else _first_parameter(child)
        if found is not None:
            return found
    return None


def _moved(x: object, device: torch.device) -> Any:
    if isinstance(x, LazyTensor) and not x._placed:
        return x
    return x.to(device) if isinstance(x, torch.Tensor) and x.device != device else x


def path_of(envoy: Observed) -> str:
    """Its path in the model, without `model.` in front."""
    return envoy._path


def tree_of(envoy: Envoy) -> Any:
    """The `EnvoyTree` that an envoy belongs to."""
    return envoy._tree


def host_of(model: Envoy) -> Any:
    """The `ModelHost` of a wrapped model: what traces, sessions and engines may ask of it."""
    return model._host


def _old_name(name: str) -> property:
    """`.nns_<name>`, which was a value's name where a child had its short one."""

    def warned(self: Envoy) -> str:
        warnings.warn(
            f"{user_line()}: `.nns_{name}` goes in the next release; `.{name}` is the same now. A child module of that name is "
            f'`.{_CHILD}{name}`, or `["{name}"]`.',
            FutureWarning,
            stacklevel=3,
        )
        return name

    def put(self: Envoy, value: object) -> None:
        setattr(self, warned(self), value)

    return own_error(lambda self: getattr(self, warned(self)), put if name != "source" else None)


for _name in _TAKEN:
    setattr(Envoy, f"nns_{_name}", _old_name(_name))

__all__ = ["Envoy", "LazyTensor"]
