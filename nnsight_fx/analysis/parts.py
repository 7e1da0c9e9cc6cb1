"""Where the parts of a transformer are: layers, attention, heads, MLP, final norm, unembedding, by family.

A row of the table is checked against the module tree of the model that it is used on; a model of another family gives its own
`Parts(...)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..envoys.envoy import Envoy, path_of
from ..envoys.paths import module_of
from ..errors import UnknownModuleError
from ..lines import user_line

if TYPE_CHECKING:
    from ..model.model import NNsight


@dataclass(frozen=True)
class Column:
    """One of several projections that a single module makes side by side (GPT-2's `c_attn`: q, k, v)."""

    path: str
    index: int
    of: int


@dataclass(frozen=True)
class Parts:
    """Paths of a decoder's parts; those inside a layer are relative to it. `None`: the family has no module of that kind.

    `q`, `k`, `v` are modules whose output holds the heads side by side; `z` is the projection whose *input* does.
    """

    layers: str
    attention: str
    mlp: str | None
    z: str | None
    norm: str
    unembed: str
    q: str | Column | None = None
    k: str | Column | None = None
    v: str | Column | None = None

    def check(self, model: NNsight) -> Parts:
        """The parts by the model's own paths. Raise `UnknownModuleError` for one that is not there."""
        layers = path_of(self._found(model, "layers", self.layers))
        found: dict[str, str | Column] = {
            name: path_of(self._found(model, name, getattr(self, name))) for name in ("norm", "unembed")
        }
        for name in ("attention", "mlp", "z", "q", "k", "v"):
            given = getattr(self, name)
            if given is not None:
                path = given.path if isinstance(given, Column) else given
                path = path_of(self._found(model.get(f"{layers}.0"), name, path)).removeprefix(f"{layers}.0.")
                found[name] = replace(given, path=path) if isinstance(given, Column) else path
        return replace(self, layers=layers, **found)

    def _found(self, here: Envoy, name: str, path: str) -> Envoy:
        try:
            return module_of(here, path, "a table of parts")
        except UnknownModuleError as error:
            raise UnknownModuleError(
                f"{error} It is `{name}` in this table of parts for `{type(here.root._module).__name__}`. Give the paths of your "
                "model: `parts=nnsight_fx.Parts(layers=..., ...)`."
            ) from None


def _llama(**other: object) -> Parts:
    q, k, v = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    made = Parts("model.layers", "self_attn", "mlp", "self_attn.o_proj", "model.norm", "lm_head", q, k, v)
    return replace(made, **other)


def _gpt(attention: str, mlp: str, z: str, **other: Any) -> Parts:
    return Parts("transformer.h", attention, mlp, z, "transformer.ln_f", "lm_head", **other)


_LLAMAS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "stablelm", "cohere", "granite", "smollm3"),
    *("mixtral", "qwen3_moe", "gpt_oss"),
)  # fmt: skip
_FUSED: dict[str, object] = {"q": None, "k": None, "v": None}  # heads interleaved, or of another shape

FAMILIES: dict[str, Parts] = {
    **dict.fromkeys(_LLAMAS, _llama()),
    "phi3": _llama(**_FUSED),
    "deepseek_v3": _llama(**_FUSED),
    "gpt2": _gpt("attn", "mlp", "attn.c_proj", **{n: Column("attn.c_attn", i, 3) for i, n in enumerate("qkv")}),
    "gptj": _gpt("attn", "mlp", "attn.out_proj", q="attn.q_proj", k="attn.k_proj", v="attn.v_proj"),
    "bloom": _gpt("self_attention", "mlp", "self_attention.dense"),
    "falcon": _gpt("self_attention", "mlp", "self_attention.dense"),
    "gpt_neox": Parts("gpt_neox.layers", "attention", "mlp", "attention.dense", "gpt_neox.final_layer_norm", "lm_head"),
    "opt": Parts(
        "model.decoder.layers", "self_attn", "fc2", "self_attn.out_proj", "model.decoder.final_layer_norm", "lm_head",
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    ),
}  # fmt: skip


def parts_of(model: NNsight, given: Parts | None = None) -> Parts:
    """The parts of a model: `given`, or its family's; checked against its modules."""
    if given is None:
        family = getattr(getattr(model._module, "config", None), "model_type", None)
        if family not in FAMILIES:
            raise UnknownModuleError(
                f"{user_line()}: no table of parts for the family `{family}`; there is {', '.join(FAMILIES)}. Give the paths of your "
                "model: `parts=nnsight_fx.Parts(layers=..., ...)`."
            )
        given = FAMILIES[family]
    return given.check(model)


def heads_of(model: NNsight, part: str) -> int:
    """How many heads a part has side by side."""
    config = model._module.config
    names = ("num_attention_heads", "n_head")
    queries = next(int(getattr(config, name)) for name in names if hasattr(config, name))
    return int(getattr(config, "num_key_value_heads", None) or queries) if part in ("k", "v") else queries
