"""The modes and flags of a thread and of the process."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)

SET_GRAD = torch._C._set_grad_enabled
NoTorchFunction, TorchFunction = torch._C.DisableTorchFunction, torch._C._EnableTorchFunction


def transforms() -> int | None:
    """How deep in torch.func transforms this thread is."""
    return torch._C._functorch.maybe_current_level()  # type: ignore[attr-defined]


def function_modes(take: bool = False) -> list[TorchFunctionMode]:
    """The thread's stack of function modes, bottom first; `take` leaves it empty."""
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else []
    for _ in modes if take else ():
        torch._C._pop_torch_function_stack()
    return modes


def push_function_modes(modes: list[TorchFunctionMode]) -> None:
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


def dispatch_modes(take: bool = False) -> list[Any]:
    """The thread's stack of dispatch modes, bottom first; `take` leaves it empty."""
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
    for _ in modes if take else ():
        _pop_mode()
    return modes


def push_dispatch_modes(modes: list[Any]) -> None:
    for mode in modes:
        _push_mode(mode)


SDPA = {
    "flash": torch._C._get_flash_sdp_enabled,
    "mem_efficient": torch._C._get_mem_efficient_sdp_enabled,
    "math": torch._C._get_math_sdp_enabled,
    "cudnn": torch._C._get_cudnn_sdp_enabled,
}


def deterministic() -> tuple[bool, bool]:
    """Are deterministic algorithms asked for, and is it no error where there is none?"""
    return torch._C._get_deterministic_algorithms(), torch._C._get_deterministic_algorithms_warn_only()


def process_flags() -> tuple:
    """What Python can look at of the process, and operations of a graph do not take as an argument."""
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.get_num_threads(),
        torch.backends.mha.get_fastpath_enabled(),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )
