"""nnsight_fx: interventions on neural networks, spliced into the model's own compiled graph."""

from . import interventions
from .analysis import patching
from .analysis.helpers import TraceDict, steer
from .analysis.parts import Parts
from .config import CONFIG
from .engine.captured.watch import assert_max_compiles, assert_no_fallback
from .envoys.envoy import Envoy
from .errors import (
    FallbackError,
    FallbackWarning,
    InvokeError,
    MissedProviderError,
    MissedSiteError,
    NestedTraceError,
    NNsightFXError,
    NotConnectedError,
    NotRecordableError,
    OutOfOrderError,
    OutsideTraceError,
    PaddedLengthUnknown,
    PlanError,
    PlanMismatchError,
    PromptError,
    RecompileError,
    SkipError,
    SourceNotAvailable,
    StoreError,
    UnknownModuleError,
    UnknownOperationError,
    UnsavedValueError,
    WeightsNotComputedError,
    WorkerLostError,
)
from .harvest.activations import Activations
from .model.language import LanguageModel
from .model.loading import ModelNotFoundError
from .model.model import NNsight
from .stored.plans import Plan, load_plan, save_plan
from .tracing.saving import save

__all__ = [
    "Activations",
    "CONFIG",
    "Envoy",
    "FallbackError",
    "FallbackWarning",
    "InvokeError",
    "LanguageModel",
    "MissedProviderError",
    "MissedSiteError",
    "ModelNotFoundError",
    "NNsight",
    "NNsightFXError",
    "NestedTraceError",
    "NotConnectedError",
    "NotRecordableError",
    "OutOfOrderError",
    "OutsideTraceError",
    "PaddedLengthUnknown",
    "Parts",
    "Plan",
    "PlanError",
    "PlanMismatchError",
    "PromptError",
    "RecompileError",
    "SkipError",
    "SourceNotAvailable",
    "StoreError",
    "TraceDict",
    "UnknownModuleError",
    "UnknownOperationError",
    "UnsavedValueError",
    "WeightsNotComputedError",
    "WorkerLostError",
    "assert_max_compiles",
    "assert_no_fallback",
    "interventions",
    "load_plan",
    "patching",
    "save",
    "save_plan",
    "steer",
]
