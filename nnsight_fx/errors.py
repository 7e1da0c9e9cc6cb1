"""Every error that nnsight_fx raises on its own account.

Each says what was written (file and line), what exists, and what to do. Each also inherits the builtin that nnsight
0.8.1 or eager torch raises in its place, so that code which catches that one goes on working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from .lines import user_line


class NNsightFXError(Exception):
    """The parent of all errors of this package."""


class OutOfOrderError(NNsightFXError):
    """A site was read or written after the model had passed it."""


class MissedSiteError(OutOfOrderError):
    """A site that the run never reached: its module was not called, or not that often."""


MissedProviderError = MissedSiteError  # nnsight's name


class UnknownModuleError(NNsightFXError, AttributeError):
    """A module path that the wrapped model does not have."""


class UnknownOperationError(NNsightFXError, AttributeError):
    """A `.source` operation that a module's `forward` does not have."""


class SourceNotAvailable(NNsightFXError):
    """A function whose operations cannot be listed: it is not written in Python, or its text is not at hand."""


class OutsideTraceError(NNsightFXError, ValueError):
    """A site, `save` or `stop` used where no trace of the model is open."""


class NestedTraceError(NNsightFXError, ValueError):
    """A trace opened while another one of the same model is open."""


class InvokeError(NNsightFXError, ValueError):
    """An invoke where none can be opened, or a trace without any input."""


class UnsavedValueError(NNsightFXError, ValueError):
    """A recorded value used after its trace, without `.save()`."""


class NotRecordableError(NNsightFXError, RuntimeError):
    """Something a recorded value cannot do, because it has no data until the model runs."""


class NotConnectedError(NNsightFXError, RuntimeError):
    """A value by which nothing can be differentiated: no target depends on it, or what was to be held constant is not there."""


class PaddedLengthUnknown(NNsightFXError, RuntimeError):
    """Python asked for the padded length of a batch whose prompts are not all known yet."""


class SkipError(NNsightFXError, ValueError):
    """A module skipped in some invokes of a batch and not in others."""


class PlanMismatchError(NNsightFXError, RuntimeError):
    """A write that the captured model cannot take, and that came too late to capture it anew."""


class PlanError(NNsightFXError, ValueError):
    """A plan that cannot be saved, or a saved one that does not fit the model, the input or this version."""


class StoreError(NNsightFXError, ValueError):
    """A folder that holds another sweep, harvest or machine's code, or none at all."""


class WorkerLostError(NNsightFXError, RuntimeError):
    """A worker of a sweep's executor died, and those that took its place did, too."""


class UnsupportedTorchError(NNsightFXError, ImportError):
    """This torch lacks a private name that there is no way around."""


class WeightsNotComputedError(NNsightFXError, TypeError):
    """Attention weights of a model whose attention is one kernel, which gives none."""


class FallbackError(NNsightFXError, AssertionError):
    """Something ran outside captured code under `assert_no_fallback()`."""


class FallbackWarning(UserWarning):
    """The model is compiled, and ran on hooks, or by a lesser compiler. Told once for each reason, at the line of the trace."""


class RecompileError(NNsightFXError, AssertionError):
    """More compiles than `assert_max_compiles(n)` allows."""


class own_error(property):  # noqa: N801  (used as `@property` is)
    """A property of a class with `__getattr__`, to which Python would turn after an `AttributeError` raised in here.

    The error (a model that cannot use what was written, say) is kept, for `__getattr__` to raise by `reraise`.
    """

    def __get__(self, obj: object, cls: type | None = None) -> Any:
        if obj is None:
            return self
        try:
            return self.fget(obj)  # type: ignore[misc]
        except AttributeError as error:
            obj.__dict__["_own_error"] = error
            raise

    @staticmethod
    def reraise(obj: object) -> None:
        error = obj.__dict__.pop("_own_error", None)
        if error is not None:
            raise error


class PromptError(NNsightFXError, ValueError):
    """A prompt that makes no tokens, or prompts that cannot run as one batch."""

    def __init__(self, text: str):
        super().__init__(f"{user_line()}: {text}")


class MissingExtraError(NNsightFXError, ImportError):
    """What was asked for needs packages of an extra that is not installed."""


def nearest(wrong: str, known: Iterable[str], n: int = 3) -> str:
    """`did you mean` text with the closest known names, or all of them when there are few."""
    known = list(known)
    close = difflib.get_close_matches(wrong, known, n=n, cutoff=0.4)
    if close:
        return "did you mean " + ", ".join(f"`{c}`" for c in close) + "?"
    shown = ", ".join(f"`{k}`" for k in known[:8]) + (", ..." if len(known) > 8 else "")
    return f"there is {shown}" if known else "there is none"
