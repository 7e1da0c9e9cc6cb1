"""What operations are done on: real tensors and lifted numbers by slot, and the fake of every value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from ..compat.modes import NoTorchFunction
from ..compat.tensors import shares_memory
from ..plan import tree
from ..plan.encode import Lifted, encode
from ..plan.keys import NO_ARGS, NO_KWARGS, Items, Key, Named, NumberSlot, Recorded, TensorSlot, Value, facts
from .handed import Handed
from .lazy import LazyTensor, fake_in, key_of, tape_of

if TYPE_CHECKING:
    from .recording import Recording


class Operands:
    """Those of one recording."""

    def __init__(self, tape: Recording):
        self.tape = tape
        self.constants: list = []  # real tensors and lifted numbers, by slot
        self.negative: dict[int, int] = {}  # lifted positions that the user counted from the end, by slot
        self.slots: dict[int, TensorSlot] = {}  # id of a real tensor -> its key
        self.const_fakes: dict[int, torch.Tensor] = {}
        self.changed: dict[int, torch.Tensor] = {}  # real tensors that a recorded operation changes in place
        self.awaited: dict[int, tuple] = {}  # what each slot expects that holds a value of a trace which is put off
        self.handed = Handed(self.constants, self.slots, self.watch)

    def forget(self, marks: int) -> None:
        for slot in range(marks, len(self.constants)):
            if isinstance(self.constants[slot], torch.Tensor):
                self.slots.pop(id(self.constants[slot]), None)
            self.const_fakes.pop(slot, None)
            self.negative.pop(slot, None)
        del self.constants[marks:]

    def arguments(self, args: tuple, kwargs: dict) -> tuple[Items, Named]:
        """The keys of the arguments of a call."""
        named = Named(tuple(kwargs), tuple([self.encode(x) for x in kwargs.values()])) if kwargs else NO_KWARGS
        return NO_ARGS if not args else Items(tuple, tuple([self.encode(x) for x in args])), named

    def encode(self, value: object) -> Key:
        if type(value) is LazyTensor and tape_of(value) is self.tape:
            return key_of(value)
        return encode(value, self.key_of, self.number_key, self.tape.objects.key)

    def key_of(self, tensor: torch.Tensor) -> Recorded:
        if isinstance(tensor, LazyTensor):
            if tape_of(tensor) is self.tape:
                return key_of(tensor)
            if tape_of(tensor).pending is None or self.tape.begun:
                tensor = tape_of(tensor).syncs.earlier(tensor)
            elif id(tensor) not in self.slots:
                self.awaited[len(self.constants)] = facts(tensor)
        key = self.slots.get(id(tensor))
        if key is None:
            key = self.slots[id(tensor)] = TensorSlot(len(self.constants), facts(tensor))
            self.constants.append(self.handed.own(tensor, len(self.constants)) if self.handed.copies else tensor)
        return key

    def number_key(self, number: Lifted) -> NumberSlot:
        if number.written is not None:
            self.negative[len(self.constants)] = number.written
        self.constants.append(number.value)
        return NumberSlot(len(self.constants) - 1, number.kind)

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake of a tensor, recorded or real."""
        if isinstance(tensor, LazyTensor):
            return fake_in(tensor) if tape_of(tensor) is self.tape else self.fake_of(self.key_of(tensor))
        key = self.slots.get(id(tensor))
        return self.fake_of(key) if key is not None else tensor

    def fakes_of(self, args: object) -> Any:
        """Arguments with the fake in place of every tensor."""
        return tree.tree_map(lambda x: self.fake(x) if isinstance(x, torch.Tensor) else x, args)

    def fake_of(self, key: Recorded) -> torch.Tensor:
        """The fake of a value, or of a real tensor."""
        if isinstance(key, Value):
            return self.tape.fake_of_result(key)
        return self.fake_at(key.slot)

    def fake_at(self, slot: int) -> torch.Tensor:
        """The fake of the real tensor in a slot."""
        if slot not in self.const_fakes:
            value = self.constants[slot]
            if (
                type(value) is LazyTensor and tape_of(value).fakes is self.tape.fakes
            ):  # of a trace that its session has put off
                self.const_fakes[slot] = fake_in(value)
            elif type(value) is LazyTensor:
                shape, stride, dtype, device, *_ = facts(value)
                with NoTorchFunction(), self.tape.fakes:
                    self.const_fakes[slot] = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            else:
                self.const_fakes[slot] = self.tape.fakes.from_tensor(value, static_shapes=True)
        return self.const_fakes[slot]

    def resolve(self) -> None:
        """The values of earlier traces that this recording uses, as the real tensors: the model is about to run."""
        for slot, (shape, stride, dtype, device, *_) in self.awaited.items():
            value = self.constants[slot]
            real = tape_of(value).syncs.earlier(value) if type(value) is LazyTensor else value
            if facts(real)[:4] != (shape, stride, dtype, device):  # the scan saw other strides
                real = torch.empty_strided(shape, stride, dtype=dtype, device=device).copy_(real)
            self.constants[slot] = real
        self.awaited = {}

    def unsettled(self, x: object) -> bool:
        """Is an argument a recorded value, or a real tensor (or a view of one) that recorded operations change?"""
        if not isinstance(x, torch.Tensor):
            return False
        return isinstance(x, LazyTensor) or id(x) in self.changed or _aliases(x, self.changed.values())

    def holds(self, x: object) -> bool:
        """Does the recording hold the memory of a real tensor? Then changes of it must keep their place among the uses."""
        return isinstance(x, torch.Tensor) and _aliases(x, self.constants)

    def watch(self, x: torch.Tensor) -> torch.Tensor:
        """Treat a real tensor as recorded: its value is the one that it has when the model gets there."""
        return self.changed.setdefault(id(x), x)

    def device_of(self, tensor: torch.Tensor) -> torch.device:
        return self.fake(tensor).device


def _aliases(x: torch.Tensor, others: Iterable) -> bool:
    return any(isinstance(t, torch.Tensor) and type(t) is not LazyTensor and shares_memory(x, t) for t in others)
