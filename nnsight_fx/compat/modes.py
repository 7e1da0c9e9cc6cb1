"""The modes and flags of a thread and of the process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .probe import Name, needed

_CURRENT_LEVEL = Name(
    "torch._C._functorch.maybe_current_level", "a `torch.func` transform in a body is refused later, by its operations"
)
_AUTOCAST = Name("torch._C._is_any_autocast_enabled", "autocast is asked for by device")
_SET_GRAD = Name("torch._C._set_grad_enabled", "how torch sets the grad mode is found by watching it")
_ENTER = Name("torch.amp.autocast_mode._enter_autocast", "autocast in a graph is a call of our own")
_EXIT = Name("torch.amp.autocast_mode._exit_autocast", "autocast in a graph is a call of our own")

_SLOW_VMAP = Name(
    "torch._C._functorch._set_vmap_fallback_warning_enabled", "torch warns of operations that a `vmap` does one by one"
)

NoTorchFunction, TorchFunction = needed("torch._C.DisableTorchFunction"), needed("torch._C._EnableTorchFunction")
TorchDispatchMode = needed("torch.utils._python_dispatch.TorchDispatchMode")
_functions, _function_count = (
    needed("torch.overrides._get_current_function_mode_stack"),
    needed("torch._C._len_torch_function_stack"),
)
_pop_function, _push_function = (
    needed("torch._C._pop_torch_function_stack"),
    needed("torch._C._push_on_torch_function_stack"),
)
_dispatches = needed("torch.utils._python_dispatch._get_current_dispatch_mode_stack")
_dispatch_count = needed("torch._C._len_torch_dispatch_stack")
_pop_dispatch, _push_dispatch = (
    needed("torch.utils._python_dispatch._pop_mode"),
    needed("torch.utils._python_dispatch._push_mode"),
)


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def _grad_setter() -> Any:
    """The function that a function mode sees when the grad mode is set."""
    with _Watch() as watch:
        torch.set_grad_enabled(torch.is_grad_enabled())
    return next(iter(watch.seen), torch.set_grad_enabled)


SET_GRAD = _SET_GRAD() or _grad_setter()


@contextlib.contextmanager
def quiet_vmap() -> Iterator[None]:
    """torch says nothing of operations without a batching rule, which it does one by one."""
    switch = _SLOW_VMAP()
    if switch is None:
        yield
        return
    switch(False)
    try:
        yield
    finally:
        switch(True)


def transforms() -> int | None:
    """How deep in torch.func transforms this thread is."""
    level = _CURRENT_LEVEL()
    return None if level is None else level()


def any_autocast() -> bool:
    """Is autocast on, on any device?"""
    asked = _AUTOCAST()
    return asked() if asked is not None else any(map(torch.is_autocast_enabled, ("cpu", "cuda")))


def enter_autocast() -> Callable:
    """The function that begins autocast in a graph, and gives a token."""
    return _ENTER() or _enter


def exit_autocast() -> Callable:
    """The function that ends it."""
    return _EXIT() or _exit


def _enter(*given: Any) -> object:
    block = torch.autocast(*given)
    block.__enter__()
    return block


def _exit(block: Any) -> None:
    block.__exit__(None, None, None)


def function_modes(take: bool = False) -> list[TorchFunctionMode]:
    """The thread's stack of function modes, bottom first; `take` leaves it empty."""
    modes = _functions() if _function_count() else []
    for _ in modes if take else ():
        _pop_function()
    return modes


def push_function_modes(modes: list[TorchFunctionMode]) -> None:
    for mode in modes:
        _push_function(mode)


def dispatch_modes(take: bool = False) -> list[object]:
    """The thread's stack of dispatch modes, bottom first; `take` leaves it empty."""
    modes = _dispatches() if _dispatch_count() else []
    for _ in modes if take else ():
        _pop_dispatch()
    return modes


def push_dispatch_modes(modes: list[object]) -> None:
    for mode in modes:
        _push_dispatch(mode)


SDPA = {
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "mem_efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
}


def deterministic() -> tuple[bool, bool]:
    """Are deterministic algorithms asked for, and is it no error where there is none?"""
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def process_flags() -> tuple:
    """What Python can look at of the process, and operations of a graph do not take as an argument."""
    return (
        *deterministic(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.backends.mha.get_fastpath_enabled(),
        tuple(enabled() for enabled in SDPA.values()),
    )
