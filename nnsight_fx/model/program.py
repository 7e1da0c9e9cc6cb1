"""`model.program`: a body that is recorded once, and then is a function."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

import torch

from ..compat.dynamo import NotCaptured
from ..engine.captured.steady import Steady
from ..engine.deliver import own
from ..engine.notes import Notes, of_run
from ..engine.request import Request
from ..envoys.envoy import host_of
from ..errors import NotRecordableError
from ..lines import user_line
from ..plan import tree
from ..plan.keys import Recorded, facts
from ..plan.plan import InterventionGraph
from ..plan.printing import short
from ..plan.tree import PLAIN
from ..plan.verbs import Call, CallModule, Read, Save, Skip, StopRun, Write
from ..scan.wave_sites import WaveSites
from ..sweep.job import given
from ..tracing import saving
from ..tracing.contexts import Tracer
from ..tracing.lazy import LazyTensor, key_of
from .inputs import Batch

if TYPE_CHECKING:
    from .model import NNsight


_PLAIN = (torch.Tensor, *PLAIN)
ENTRIES = 64  # recordings that a program keeps
KINDS = Read | Write | Skip | Call | CallModule | Save | StopRun


class Program:
    """What `model.program(fn)` returns: `program(inputs, *args)` gives what `fn(tracer, *args)` returned, as real tensors.

    The first call with inputs and arguments of some kind traces the body. Later calls of that kind run what was recorded,
    with their own inputs and tensors: nothing of `fn` runs again. Of that kind are tensors of the same shape, strides, dtype,
    device and `requires_grad`, equal values of anything else, and a model in the same modes, with the same edits. A number is
    its value, so pass what varies as a tensor. What the body reads from outside (closures, globals) is what it was when
    it was recorded, but for tensors changed in place since, and the model's own parameters and buffers.

    A body that looks at values, or does what a recording does not hold (invokes, gradients, caches, `tracer.cond`, callbacks,
    objects, generation, tensors of its own changed in place), is traced each time; `explain()` says which, and why.
    """

    def __init__(self, model: NNsight, fn: Callable, stop: bool, options: dict):
        self.model, self.fn, self.stop, self.options = model, fn, stop, options
        self.recordings: OrderedDict[Hashable, RecordedBody] = OrderedDict()
        self.calls: OrderedDict[Hashable, RecordedBody] = (
            OrderedDict()
        )  # those that run as a call, by what they are called with
        self.refused: dict[Hashable, str] = {}
        self.own = {name: x for name, x in options.items() if name not in ("compile", "fn", "pad_to")}
        self.runs: Counter[str] = Counter()

    def __call__(self, inputs: object, *args: object, **kwargs: object) -> Any:
        """Run the model on `inputs` (what `model.sweep` takes as one input) with these arguments of the body.

        Raises:
            NotRecordableError: the body returns something else than recorded values, in any structure.
            TypeError: an argument that is no tensor and cannot be hashed.
        """
        model = self.model
        if model.tracer is not None or saving.session() is not None:
            return self._trace(inputs, args, kwargs)  # within another trace, an error; in a session, one of its traces
        model.dispatch()
        leaves, spec = tree.flatten((args, kwargs))
        batch = self._batch(inputs)
        kind = (spec, _described(leaves), *host_of(model).edits, host_of(model).capture_for(self._of("compile")))
        call = self._call(batch, kind)
        if call in self.calls:
            try:
                known = self.calls[call]
                result = known.again(self, batch, leaves)
            except NotCaptured:
                del self.calls[call]
            else:
                self.runs["recorded"] += 1
                host_of(model).told.ran = known
                return result
        key = (host_of(model).scanner.signature(batch, self._of("fn"), None), *kind)
        known = self.recordings.get(key)
        if known is not None:
            self.runs["recorded"] += 1
            self.recordings.move_to_end(key)
            result = known.run(self, batch, leaves)
            host_of(model).told.ran = known
            if known.steady is not None and call is not None:
                self.calls[call] = known
                if len(self.calls) > ENTRIES:
                    self.calls.popitem(last=False)
            return result
        self.runs["traced"] += 1
        if key in self.refused:
            return self._trace(inputs, args, kwargs)
        made = RecordedBody(self, leaves)
        result = self._trace(inputs, *tree.unflatten(leaves, spec), of=made)
        if made.why is None:
            self.recordings[key] = made
            if len(self.recordings) > ENTRIES:
                self.recordings.popitem(last=False)
        else:
            self.refused[key] = made.why
            if len(self.refused) > ENTRIES:
                self.refused.pop(next(iter(self.refused)))
        return result

    def explain(self) -> str:
        """How often the body was traced and how often a recording ran, and why what is traced each time is."""
        lines = [
            f"program {getattr(self.fn, '__name__', self.fn)}: {len(self.recordings)} recordings, {self.runs['recorded']} runs of "
            f"them, {self.runs['traced']} traces"
        ]
        return "\n".join([*lines, *(f"  traced each time: {why}" for why in dict.fromkeys(self.refused.values()))])

    def __repr__(self) -> str:
        return self.explain()

    # -- calls -------------------------------------------------------------------------------------------------------

    def _of(self, option: str) -> Any:
        return self.options.get(option)

    def _batch(self, inputs: object) -> Any:
        """The input as the model gets it."""
        model = self.model
        args, kwargs = given(model, inputs)
        return host_of(model).inputs.collate(
            [host_of(model).inputs.prepare(args, {**self.own, **kwargs})], pad_to=self._of("pad_to")
        )

    def _call(self, batch: Any, kind: tuple) -> Hashable:
        """By what a call is known again without a look at the model, which Dynamo's guards take; `None` with objects."""
        leaves, spec = batch.flat
        plain = all([isinstance(x, _PLAIN) for x in leaves])
        return (spec, _described(leaves), host_of(self.model).scanner, *kind) if plain else None

    def _trace(self, inputs: object, args: tuple, kwargs: dict, of: RecordedBody | None = None) -> Any:
        call_args, call_kwargs = given(self.model, inputs)
        leaves = None
        with self.model.trace(*call_args, **{**self.options, **call_kwargs}) as tracer:
            if of is not None:
                args, kwargs = tree.tree_map(of.lend(tracer), (args, kwargs))
            result = self.fn(tracer, *args, **kwargs)
            leaves, spec = tree.flatten(result)
            for leaf in leaves:
                if not isinstance(leaf, LazyTensor):
                    raise NotRecordableError(
                        f"{user_line()}: a program's body returns recorded values, in any structure; there is a {type(leaf).__name__} "
                        "in what it returned. End it with `return model.lm_head.output[:, -1]`, say."
                    )
                leaf.save()
            if of is not None:
                of.keep(tracer, leaves, spec)
            if self.stop:
                tracer.stop()
        if leaves is None:
            raise NotRecordableError(
                f"{user_line()}: a program's body ended by `tracer.stop()`, before it returned its result. Give the program "
                "`stop=True`: then each forward ends behind the last site of its body."
            )
        if of is not None:
            of.close(tracer)
        return tree.unflatten(leaves, spec)


def _described(leaves: list) -> tuple:
    """Of what kind arguments are."""
    if not leaves:
        return ()
    first = {id(x): i for i, x in reversed([*enumerate(leaves)])}
    found = tuple([(facts(x), first[id(x)]) if isinstance(x, torch.Tensor) else (type(x), x, repr(x)) for x in leaves])
    try:
        hash(found)
    except TypeError as error:
        raise TypeError(
            f"{user_line()}: an argument of a program is a tensor, or has a hash by which it is told from others; {error}."
        ) from error
    return found


@dataclass
class Slot:
    """A lifted value that is another one in each run: an argument, or a parameter that may have been replaced."""

    at: int
    argument: int = -1
    name: str = ""


class RecordedBody:
    """A body, recorded: its plan, and where the arguments are among the lifted values."""

    plan: InterventionGraph
    steady: Steady | None = None  # how it runs, once a run has shown that a call is all of it
    ran: Notes | None = None  # its latest run by itself
    bytes: int | None = None  # of what it gives

    def __init__(self, program: Program, leaves: list):
        self.program = program
        self.why: str | None = None
        self.slots: list[Slot] = []
        self.keys: list[Recorded] = []
        self.arguments = {id(x): i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)}

    def lend(self, tracer: Tracer) -> Callable[[Any], Any]:
        """Arguments as recorded values, so that what the body does with them is recorded, too."""
        tape, lent = tracer.tape, {}

        def one(x: object) -> Any:
            if not isinstance(x, torch.Tensor) or isinstance(x, LazyTensor):
                return x
            if id(x) not in lent:
                self.slots.append(Slot(len(tape.constants), argument=self.arguments[id(x)]))
                lent[id(x)] = tape.lend(x)
            return lent[id(x)]

        return one

    def keep(self, tracer: Tracer, leaves: list, spec: tree.Spec) -> None:
        self.keys, self.spec = [key_of(x) for x in leaves], spec
        if tracer.tape.begun:
            self.why = "it looks at values"
        elif tracer.tape.drew:
            self.why = "it draws from a generator of its own"
        elif tracer.tape.containers:
            self.why = "it saves containers of its own"

    def close(self, tracer: Tracer) -> None:
        """The trace has run: can its recording run again?"""
        wave = tracer.waves[-1]
        tape = wave.tape
        if len(tracer.waves) > 1 or tracer.generation is not None or not wave.alone:
            self.why = "it runs several forwards, or has invokes"
        if self.why is not None:
            return
        self.plan, self.lines, self.tape, self.tracer = tape.plan(wave.groups()), tape.lines, tape, tracer
        self.constants = list(tape.constants)
        odd = next((n for n, op in enumerate(self.plan.ops) if op.when or not isinstance(op.verb, KINDS)), None)
        if odd is not None:
            self.why = f"{tape.lines[odd]} is of a kind that a recording does not hold ({self.plan.ops[odd].verb.name})"
        elif tape.told or tape.caches or len(wave.members) > 1 + wave.edits:
            self.why = "it has caches or callbacks"
        elif tape.operands.changed:
            self.why = "it changes tensors of its own in place"
        module = self.program.model._module
        names = {id(x): n for n, x in [*module.named_parameters(), *module.named_buffers()]}
        lent = {slot.at for slot in self.slots}
        for at, value in enumerate(self.constants):
            if at not in lent and id(value) in names:
                self.slots.append(Slot(at, name=names[id(value)]))

    def _lifted(self, program: Program, leaves: list) -> list:
        """The lifted values of a run with these arguments."""
        constants = list(self.constants)
        for slot in self.slots:
            constants[slot.at] = attrgetter(slot.name)(program.model._module) if slot.name else leaves[slot.argument]
        return constants

    def again(self, program: Program, batch: Any, leaves: list) -> Any:
        """Run it as a call; `NotCaptured`, before anything ran, where it is none any more."""
        assert self.steady is not None
        hooks = host_of(program.model).markers.own()
        run = self.steady((batch.args, batch.kwargs), batch.flat[0], self._lifted(program, leaves), self.lines, hooks)
        self.ran = None
        return self._given(run)

    def told(self) -> Notes:
        """Its latest run, for `model.explain()`; a call is a hit of one segment."""
        made = self.ran or Notes(engine="spliced", forwards=1, segments=1, hits=1, operations=len(self.plan.ops))
        made.what, made.line = "program, recorded", short(self.tracer.line)
        made.saved, made.bytes = len(self.keys), self.bytes or 0
        return made

    def run(self, program: Program, batch: Batch, leaves: list) -> Any:
        """Run it on another input, with other arguments."""
        model, constants = program.model, self._lifted(program, leaves)
        tracer, tape = self.tracer, self.tape
        again = (batch, program._of("fn"), tracer.line, tracer.compile, tape, cast(WaveSites, tape.sites), {})
        run = host_of(model).run(Request(self.plan, constants, self.lines, *again))
        try:
            run.finish(self.plan)
            missed = run.unfinished()
            if missed and not run.stopping:
                raise run.missed_error(missed)
            self.steady = Steady.of(run)
            self.ran = of_run(run)
        except BaseException:
            run.abandon()
            raise
        return self._given(run)

    def _given(self, run: Any) -> Any:
        """What a finished run gives."""
        held = [[run.lookup(key)] for key in self.keys]
        if self.bytes is None:
            self.bytes = sum(x.nbytes for (x,) in held)
        run.release()
        return tree.unflatten([own(x)[0] for x in held], self.spec)
