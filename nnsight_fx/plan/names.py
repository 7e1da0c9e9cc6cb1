"""What the tape has to know of torch's functions by name."""

from __future__ import annotations

from ..compat.fakes import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
)


def _names(text: str, form: str = "{}") -> frozenset[str]:
    return frozenset(form.format(name) for name in text.split())


IN_PLACE_DUNDERS = _names("add sub mul truediv floordiv mod pow and or xor lshift rshift", "__i{}__")

# Answered from what is known of a value, without recording anything.
ASKS_NOTHING = _names(
    "size dim ndimension stride numel nelement is_floating_point is_complex is_contiguous is_signed element_size "
    "get_device storage_offset type is_same_size is_inference is_pinned dense_dim is_conj is_neg"
)

# Sync points: Python gets to see numbers.
NEEDS_DATA = _names(
    "item tolist numpy data_ptr untyped_storage storage equal allclose is_nonzero cpu_numpy "
    "__array__ __repr__ __format__ __contains__ __dlpack__ __reduce_ex__"
)

# Refused: they work on the tensor's own memory, and on fakes some crash.
NEEDS_MEMORY = _names("apply_ map_ map2_ share_memory_ set_ pin_memory")

# Done when the model gets there, on the real tensor: autograd's own.
LIVE_CALLS = _names("register_hook retain_grad register_post_accumulate_grad_hook")

RANDOM = _names(
    "rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like randint_like dropout dropout1d "
    "dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout rrelu gumbel_softmax fractional_max_pool2d "
    "fractional_max_pool3d fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices svd_lowrank pca_lowrank"
)
RANDOM_IN_PLACE = _names(
    "uniform_ normal_ bernoulli_ random_ exponential_ geometric_ cauchy_ log_normal_ dropout_ rrelu_"
)

_DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
    NotImplementedError,
)


# Draw in training only: where `training` stands among the arguments, and what it is by default.
_TRAINING = {
    **dict.fromkeys(_names("dropout dropout1d dropout2d dropout3d dropout_"), (2, True)),
    **dict.fromkeys(_names("alpha_dropout feature_alpha_dropout feature_dropout"), (2, False)),
    **dict.fromkeys(_names("rrelu rrelu_"), (3, False)),
}


def draws(name: str, args: tuple, kwargs: dict) -> bool:
    """Does a call draw random numbers?"""
    if name not in RANDOM and name not in RANDOM_IN_PLACE:
        return False
    place, default = _TRAINING.get(name, (0, True))
    given = args[place] if place and len(args) > place else default
    return name not in _TRAINING or bool(kwargs.get("training", kwargs.get("train", given)))


def effect_of(name: str, kwargs: dict, args: tuple = ()) -> str:
    """`"inplace"` for a call that changes an argument, `"random"` for one that draws numbers, else nothing."""
    if name in RANDOM and kwargs.get("out") is None and draws(name, args, kwargs):
        return "random"
    dunder = name in IN_PLACE_DUNDERS or name == "__setitem__"
    in_place = dunder or (name.endswith("_") and not name.endswith("__"))
    return "inplace" if in_place or kwargs.get("out") is not None or kwargs.get("inplace") else ""


def needs_data(refusal: Exception) -> bool:
    """Did fakes refuse an operation because only real values will do?"""
    texts = ("data is not allocated", "not supported for tensor subclasses", "no fake impl registered")
    return isinstance(refusal, _DATA_DEPENDENT) or any(text in str(refusal) for text in texts)
