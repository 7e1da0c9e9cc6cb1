"""`LazyTensor`: a tensor without data that stands for a value of the coming run.

It is a `torch.Tensor` (einops, `nn.functional`, whole modules take it), every operation on it is recorded, and nothing
can compute on it in silence: below the Python API it always raises.
"""

from __future__ import annotations

import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from ..compat.tensors import wrapper
from ..errors import NotRecordableError
from ..lines import Line, user_line
from ..plan.keys import Recorded

if TYPE_CHECKING:
    from .tape import Tape


class LazyTensor(torch.Tensor):
    """A recorded value. After the trace a saved one *is* the real `torch.Tensor`, wherever it is held."""

    _tape: Tape
    _key: Recorded  # its key in the recording
    _fake: torch.Tensor  # shape, dtype, device: all that is known of it
    _line: Line  # where it was made
    _placed = True  # is it known where it will be
    _held: torch.Tensor | None = None  # the real tensor, between the run of its trace and the end of the session

    @staticmethod
    def __new__(cls, tape: Tape, key: Recorded, fake: torch.Tensor, line: Line) -> LazyTensor:
        size = () if fake.dim() == 0 else (0,)  # torch takes a tensor without dimensions where a number is meant
        made = wrapper(cls, size)
        made._tape, made._key, made._fake, made._line = tape, key, fake, line
        return made

    def __init__(self, *_: object):
        pass

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        lazy = first_lazy(args, kwargs or {})
        if lazy is None:
            return NotImplemented
        return lazy._tape.call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> NoReturn:
        refusal = NotRecordableError(
            f"{user_line()}: `{func}` reached a recorded value below the Python API, where it cannot be recorded "
            "(torch.func transforms, scripted functions and C++ extensions go that way). "
            "Call the function on real values instead: `tracer.apply(fn, value)`."
        )
        lazy = first_lazy(args, kwargs or {})
        if lazy is not None:
            lazy._tape.refusal = refusal  # TorchScript loses it on its way up
        raise refusal

    def save(self) -> LazyTensor:
        """Keep this value: after the trace this very object is a plain `torch.Tensor`."""
        self._tape.save(self)
        return self

    def update(self, value: object) -> LazyTensor:
        """From here on this very object stands for `value`, a tensor or a number: what was made of it stays as it was.

        Also where it was saved before. Returns the object itself.
        """
        self._tape.update(self, value)
        return self

    # Sync points: Python needs the numbers, so the model runs up to here, once, and the body goes on.
    def _real(self) -> torch.Tensor:
        return self._tape.sync([self])[0]

    def __bool__(self) -> bool:
        return bool(self._real())

    def __int__(self) -> int:
        return int(self._real())

    def __float__(self) -> float:
        return float(self._real())

    def __complex__(self) -> complex:
        return complex(self._real())

    def __index__(self) -> int:
        return self._real().__index__()

    def __str__(self) -> str:
        return str(self._real())

    def __format__(self, spec: str) -> str:
        return format(self._real(), spec)

    def __array__(self, *args: object, **kwargs: object) -> object:
        return self._real().__array__(*args, **kwargs)

    def __contains__(self, item: object) -> bool:
        return item in self._real()

    # Python protocols that torch would send around `__torch_function__`.
    def __repr__(self, *, tensor_contents: object = None) -> str:
        shape = tuple(self._fake.shape)
        return f"LazyTensor({self._tape.describe(self._key)}, shape={shape}, dtype={self._fake.dtype}, made at {self._line})"

    def __hash__(self) -> int:
        return id(self)

    def __len__(self) -> int:
        if self._fake.dim() == 0:
            raise TypeError("len() of a 0-d tensor")
        return int(self._fake.shape[0])

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._fake.dim() == 0:
            raise TypeError("iteration over a 0-d tensor")
        return iter(self.unbind(0))

    def __copy__(self) -> torch.Tensor:
        return self.view_as(self)

    def __deepcopy__(self, memo: dict) -> object:
        return memo.setdefault(id(self), self.clone())

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise NotRecordableError(
            f"{user_line()}: a recorded value cannot be pickled, it has no data until the model runs. "
            "`.save()` it and pickle it after the trace."
        )

    def __dlpack__(self, *args: object, **kwargs: object) -> object:
        return self._real().__dlpack__(*args, **kwargs)


class _Save:
    """`save` of one real tensor, which keeps itself. A copy of the tensor has none that works."""

    def __init__(self, tensor: torch.Tensor | None = None):
        self.tensor = None if tensor is None else weakref.ref(tensor)

    def __call__(self) -> torch.Tensor:
        found = None if self.tensor is None else self.tensor()
        if found is None:
            raise AttributeError(
                f"{user_line()}: this tensor is a copy, which has no `.save()`; `nnsight_fx.save(tensor)` takes any."
            )
        return found

    def __reduce__(self) -> tuple:
        return _Save, ()


class Given:
    """Real tensors that a body made (`h[h > 0]`, what comes of a value that was looked at): they have a `save` until it is over."""

    def __init__(self):
        self.all: list[weakref.ref[torch.Tensor]] = []
        self.latest: deque[torch.Tensor] = deque(maxlen=8)  # a `h[h > 0].save()` has no other name for it

    def saveable(self, value: object) -> object:
        """`value`, the tensors in it with a `save`."""
        for x in (value,) if type(value) is torch.Tensor else value if isinstance(value, tuple | list) else ():
            if type(x) is torch.Tensor and "save" not in x.__dict__:
                vars(x)["save"] = _Save(x)
                self.all.append(weakref.ref(x))
                self.latest.append(x)
        return value

    def over(self) -> None:
        """The body is over."""
        for x in [ref() for ref in self.all]:
            if x is not None:
                vars(x).pop("save", None)
        self.all.clear()
        self.latest.clear()


def first_lazy(args: Any, kwargs: dict) -> LazyTensor | None:
    for a in (*args, *kwargs.values()):
        if isinstance(a, LazyTensor):
            return a
        if isinstance(a, list | tuple):
            found = first_lazy(a, {})
            if found is not None:
                return found
    return None


# What other files may ask of a recorded value. Its own names begin with an underscore: all others are a tensor's.
key_of: Callable[[Any], Recorded] = operator.attrgetter("_key")
tape_of: Callable[[object], Tape] = operator.attrgetter("_tape")
fake_in: Callable[[object], torch.Tensor] = operator.attrgetter("_fake")
line_of: Callable[[object], Line] = operator.attrgetter("_line")
held_by: Callable[[object], torch.Tensor | None] = operator.attrgetter("_held")


def rebind(lazy: LazyTensor, fake: torch.Tensor) -> None:
    """An operation has changed a value in place: from here on `fake` is what is known of it."""
    lazy._fake = fake


def hold(lazy: LazyTensor, real: torch.Tensor) -> None:
    """The run of its trace has given `real`, and its session goes on."""
    lazy._held = real


def stand_for(lazy: LazyTensor, other: LazyTensor) -> None:
    """From here on `lazy` is `other`."""
    lazy._key, lazy._fake, lazy._line = other._key, other._fake, user_line()
