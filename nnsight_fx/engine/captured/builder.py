"""The builder: rewritten graphs become compiled functions, and a compiler that fails costs speed only."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from ... import compat
from ...passes.effects import draws
from . import cuda_graphs
from .draws import give_out, without
from .options import Options
from .watch import Fallbacks


class Builder:
    """The compiler of one set of options."""

    def __init__(self, options: Options, told: Fallbacks):
        self.options, self.told = options, told
        self.few_rows = False  # may products of few rows be `products.few_rows`
        self.unrecorded: list[str] = []  # why no CUDA graph is recorded of a segment, where that was asked for
        further = dict(options.options)
        if options.backend == "inductor":
            from . import products  # which imports Inductor

            further = products.chosen({"fallback_random": True, **further})  # draws as eager's
            self.few_rows = products.FewRows in map(type, further.values())
        self.compiler = compat.dynamo.backend(options.backend, options.mode, further or None, options.dynamic)

    @functools.cached_property
    def plain(self) -> Builder:
        """The compiler without `products`: in a derivative, weights are views, which its kernels do not take."""
        if not self.few_rows:
            return self
        further = {**dict(self.options.options), "post_grad_custom_post_pass": None}
        return Builder(replace(self.options, options=tuple(sorted(further.items()))), self.told)

    def build(self, gm: torch.fx.GraphModule, inputs: Callable[[], list], report: list[str]) -> Callable:
        """A rewritten segment, compiled; where its compiler fails by `aot_eager`, and where that fails the graph as it is."""
        if self.options.backend == "eager":
            return self.compiler(gm, inputs())
        if not compat.inductor.keeps_draws() and any(map(draws, gm.graph.nodes)):
            self.told.fall_back(
                "a segment that draws random numbers runs with `eager`: this torch cannot be told to keep them"
            )
            return gm
        spare = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
        try:
            with compat.inductor.keeping_draws():
                further = 0 if self.options.backend == "aot_eager" else give_out(gm)
                try:
                    return without(self._compiled(gm, inputs()), further)
                except Exception as error:
                    if not compat.dynamo.restarts(error):
                        raise
                gm = torch.fx.GraphModule(spare, copy.deepcopy(spare.graph))
                further = 0 if self.options.backend == "aot_eager" else give_out(gm)
                return without(self._compiled(gm, inputs()), further)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            cause = error
        try:
            gm = torch.fx.GraphModule(spare, copy.deepcopy(spare.graph))
            compiler = compat.dynamo.backend("aot_eager", None, None, self.options.dynamic)
            with compat.inductor.keeping_draws():
                made, instead = compiler(gm, inputs()), "aot_eager"
        except Exception:
            made, instead = spare, "eager"
        reason = f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"
        why = f"`{self.options.backend_name}` could not compile a segment, which runs with `{instead}`: {reason}"
        self.told.fall_back(why)
        report.append(why)
        self.told.warn(why)
        return made

    def _compiled(self, gm: torch.fx.GraphModule, inputs: list) -> Callable:
        if not self.options.replays:
            return self.compiler(gm, inputs)
        device = next((x.device for x in inputs if isinstance(x, torch.Tensor) and x.dim()), None)
        with cuda_graphs.refusals(device) as why:
            made = self.compiler(gm, inputs)
        self.unrecorded += [reason for reason in why if reason not in self.unrecorded]
        return made
