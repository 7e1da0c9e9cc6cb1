"""nnsight_fx: interventions on neural networks, spliced into the model's own compiled graph."""

from .engine.spliced import assert_max_compiles, assert_no_fallback
from .envoy import Envoy
from .errors import (
    FallbackError,
    InvokeError,
    MissedProviderError,
    MissedSiteError,
    NestedTraceError,
    NNsightFXError,
    NotRecordableError,
    OutOfOrderError,
    OutsideTraceError,
    PaddedLengthUnknown,
    PlanMismatchError,
    RecompileError,
    SkipError,
    UnknownModuleError,
    UnsavedValueError,
)
from .language import LanguageModel
from .model import NNsight
from .tracing.saving import save

__all__ = [
    *("Envoy", "LanguageModel", "NNsight", "assert_max_compiles", "assert_no_fallback", "save"),
    *(
        "FallbackError",
        "InvokeError",
        "MissedProviderError",
        "MissedSiteError",
        "NNsightFXError",
        "NestedTraceError",
    ),
    *(
        "NotRecordableError",
        "OutOfOrderError",
        "OutsideTraceError",
        "PaddedLengthUnknown",
        "PlanMismatchError",
    ),
    *("RecompileError", "SkipError", "UnknownModuleError", "UnsavedValueError"),
]
