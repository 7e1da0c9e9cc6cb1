"""Modules of the model that the body calls on values: out of sight of the trace, or passing their sites (`hook=True`)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from ..compat.modes import NoTorchFunction
from ..errors import NNsightFXError, NotRecordableError, OutOfOrderError
from ..lines import Line, user_line
from ..plan import tree
from ..plan.names import needs_data
from ..plan.verbs import CallModule, Site, Skip, Visit, name_of_site
from .steps import SiteMeta

if TYPE_CHECKING:
    from .tape import Tape


class CalledModules:
    """Those of one recording."""

    def __init__(self, tape: Tape):
        self.tape = tape
        # Sites of modules that the body has called in sight: what is known of each, whose invoke's it is, and where.
        self.visits: dict[Site, tuple[SiteMeta, int, Line]] = {}

    def module(self, path: str, args: tuple, kwargs: dict) -> object:
        """Call a module of the model on values, unobserved; one that values decide about looks at them."""

        def result() -> Any:
            return self.tape.sites.module(path)(
                *self.tape.operands.fakes_of(args), **self.tape.operands.fakes_of(kwargs)
            )

        try:
            return self.tape.add(CallModule(path), args, kwargs, result=result)
        except Exception as refusal:
            looks = needs_data(refusal) and not isinstance(refusal, NNsightFXError)
            if not self.tape.sites.odd(path) and not looks:
                raise
        got = self.tape.syncs.apply(self.tape.sites.real(path).forward, args, kwargs)
        return tree.tree_map(
            lambda x: self.tape.calls.call(torch.Tensor.view_as, (x, x), {}) if isinstance(x, torch.Tensor) else x, got
        )

    def hooked(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> object:
        """Call a module of the model on values in sight of the trace: it and all in it pass their sites."""
        handles = []
        for name, m in module.named_modules():
            where = ".".join(p for p in (path, name) if p)
            enter, leave = functools.partial(self._enter, where), functools.partial(self._leave, where)
            handles.append(m.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(m.register_forward_hook(leave, with_kwargs=True))
        try:
            return module(*args, **kwargs)
        except NNsightFXError:
            raise
        except Exception as error:
            why = self.tape.sites.odd(path)
            if why is None:
                raise
            raise NotRecordableError(
                f"{user_line()}: `{path}` cannot be called with `hook=True`: it holds {why}, which takes real values, and no site of "
                f"it can be passed with recorded ones ({type(error).__name__}: {error}). Call it without `hook=True`."
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        return self.visit(path, "input", (args, kwargs))

    def _leave(self, path: str, module: nn.Module, args: tuple, kwargs: dict, out: object) -> object:
        return self.visit(path, "output", out)

    def visit(self, path: str, kind: str, value: object) -> object:
        """Pass a site of a called module: earlier and later invokes may act there."""
        site = (path, kind, self._call_now(path, kind))
        if any(isinstance(op.verb, Skip) and op.verb.site == (path, "output", site[2]) for op in self.tape.ops):
            raise NotRecordableError(
                f"{user_line()}: `{path}` is called with `hook=True`; such a call cannot be skipped."
            )
        leaves, spec = tree.flatten(value)

        def result() -> Any:
            fakes = [
                self.tape.operands.fake(x).view_as(self.tape.operands.fake(x)) if isinstance(x, torch.Tensor) else x
                for x in leaves
            ]
            return tree.unflatten(fakes, spec, value)

        made = self.tape.add(Visit(site, spec), (tuple(leaves),), result=result)
        passed = tree.flatten(made)[0]
        fakes = tuple(self.tape.operands.fake(x) if isinstance(x, torch.Tensor) else x for x in passed)
        meta = SiteMeta(spec, fakes, (None,) * len(fakes), self.tape.invoke.order)  # type: ignore[arg-type]
        self.visits[site] = (meta, self.tape.invoke.index, user_line())
        self.tape.invoke.values[site] = made
        return made

    def _call_now(self, path: str, kind: str) -> int:
        """The call index that a call has here: behind the model's own calls up to here, and those of the body."""
        call = 0
        while (path, kind, call) in self.visits or self._came(path, kind, call):
            call += 1
        return call

    def _came(self, path: str, kind: str, call: int) -> bool:
        taken = sum(site[:2] == (path, kind) and site[2] < call for site in self.visits)
        with NoTorchFunction():
            found = self.tape.sites.lookup(self.tape, (path, kind, call - taken))
        return isinstance(found, SiteMeta) and found.order <= self.tape.invoke.order

    def check_visited(self, site: Site, fits: bool) -> None:
        """A call in the body has passed a site for its own invoke; others may change what it holds, not how."""
        if site not in self.visits:
            return
        _, invoke, line = self.visits[site]
        if invoke == self.tape.invoke.index:
            raise OutOfOrderError(
                f"{user_line()}: `{name_of_site(site)}` was passed by the call at {line}; change its arguments or its result instead."
            )
        if not fits:
            raise NotRecordableError(
                f"{user_line()}: `{name_of_site(site)}` is in a call with `hook=True`, at {line}: it can only be written with a value of "
                "the same shape, dtype and structure, and not be skipped."
            )
