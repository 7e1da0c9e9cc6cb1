"""The architectures of `make coverage`: each a transformers class built from a small random config, and an input for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf


@dataclass(frozen=True)
class Architecture:
    """One row of the table."""

    name: str
    kind: str  # "decoder", "encoder", "encoder-decoder", "vision", "audio", "vision-language", "recurrent", "convolutional"
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], dict[str, Any]]
    generates: bool = False
    block: str = ""  # the block that is steered and skipped, where it is not the middle one of the longest list


def ids(rows: int = 2, length: int = 8) -> torch.Tensor:
    return torch.randint(5, 95, (rows, length), generator=torch.Generator().manual_seed(1))


def text() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


def image(size: int = 32, channels: int = 3) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))}


TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SMALL: dict[str, Any] = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA: dict[str, Any] = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADED = {**LLAMA, "head_dim": 8}
EXPERTS = {**HEADED, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BERT = {**SMALL, "intermediate_size": 64, "max_position_embeddings": 64}
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8,
}  # fmt: skip
CLIP_TEXT = {**BERT, "max_position_embeddings": 16, "eos_token_id": 2}


def decoder(name: str, prefix: str, cls: str = "", config_cls: str = "", **config: Any) -> Architecture:
    def build() -> torch.nn.Module:
        return getattr(hf, cls or f"{prefix}ForCausalLM")(getattr(hf, config_cls or f"{prefix}Config")(**config))

    return Architecture(name, "decoder", build, text, generates=True)


def model(name: str, kind: str, cls: str, config: str, given: Callable[[], dict], **settings: Any) -> Architecture:
    block = settings.pop("block", "")
    generates = settings.pop("generates", False)
    return Architecture(
        name, kind, lambda: getattr(hf, cls)(getattr(hf, config)(**settings)), given, generates=generates, block=block
    )


DECODERS = [
    decoder("GPT-2", "GPT2", "GPT2LMHeadModel", **TOKENS, n_embd=32, n_layer=4, n_head=4, n_positions=64),
    decoder("GPT-NeoX", "GPTNeoX", **SMALL, intermediate_size=64, max_position_embeddings=64),
    decoder("GPT-J", "GPTJ", **TOKENS, n_embd=32, n_layer=4, n_head=4, n_positions=64, rotary_dim=4),
    decoder("OPT", "OPT", **SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64),
    decoder("BLOOM", "Bloom", **TOKENS, hidden_size=32, n_layer=4, n_head=4),
    decoder("Llama", "Llama", **LLAMA),
    decoder("Mistral", "Mistral", **HEADED),
    decoder("Qwen2", "Qwen2", **LLAMA),
    decoder("Qwen3", "Qwen3", **HEADED),
    decoder("Gemma 2", "Gemma2", **HEADED),
    decoder("Gemma 3", "Gemma3", config_cls="Gemma3TextConfig", **HEADED),
    decoder("Phi-3", "Phi3", **LLAMA),
    decoder("Falcon", "Falcon", **SMALL, new_decoder_architecture=False, max_position_embeddings=64),
    decoder("OLMo 2", "Olmo2", **LLAMA),
    decoder("StableLM", "StableLm", **LLAMA),
    decoder("Cohere", "Cohere", **LLAMA),
    decoder("Granite", "Granite", **LLAMA),
    decoder("SmolLM3", "SmolLM3", **LLAMA),
    decoder(
        "DeepSeek-V3", "DeepseekV3", **{**LLAMA, "num_key_value_heads": 4}, moe_intermediate_size=32, n_routed_experts=4, n_group=2,
        topk_group=1, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    ),
    decoder("Mixtral", "Mixtral", **HEADED, num_local_experts=4, num_experts_per_tok=2),
    decoder("Qwen3-MoE", "Qwen3Moe", **EXPERTS, num_experts=4, decoder_sparse_step=1, mlp_only_layers=[]),
    decoder("gpt-oss", "GptOss", **HEADED, num_local_experts=4, num_experts_per_tok=2),
    decoder("Mamba", "Mamba", **TOKENS, hidden_size=32, num_hidden_layers=4, state_size=8),
    decoder("Mamba-2", "Mamba2", **TOKENS, hidden_size=32, num_hidden_layers=4, state_size=8, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
    decoder("RecurrentGemma", "RecurrentGemma", **{**LLAMA, "num_key_value_heads": 1}, lru_width=32, attention_window_size=16, head_dim=8),
    decoder("RWKV", "Rwkv", **TOKENS, hidden_size=32, num_hidden_layers=4, attention_hidden_size=32, intermediate_size=64, context_length=64),
]  # fmt: skip

ENCODERS = [
    model("BERT", "encoder", "BertModel", "BertConfig", text, **BERT),
    model("RoBERTa", "encoder", "RobertaModel", "RobertaConfig", text, **BERT),
    model("DeBERTa-v2", "encoder", "DebertaV2Model", "DebertaV2Config", text, **BERT, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]),
    model("ModernBERT", "encoder", "ModernBertModel", "ModernBertConfig", text, **{**BERT, "pad_token_id": 0}, cls_token_id=1, sep_token_id=2),
    model("ELECTRA", "encoder", "ElectraModel", "ElectraConfig", text, **BERT, embedding_size=32),
]  # fmt: skip


def pairs() -> dict[str, Any]:
    return {**text(), "decoder_input_ids": ids(2, 5)}


def speech() -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return {"input_features": torch.randn(2, 16, 40, generator=g), "decoder_input_ids": ids(2, 5)}


PAIRS = [
    model("T5", "encoder-decoder", "T5ForConditionalGeneration", "T5Config", pairs, **TOKENS, d_model=32, d_ff=64, num_layers=4, num_heads=4, d_kv=8, decoder_start_token_id=0),
    model("BART", "encoder-decoder", "BartForConditionalGeneration", "BartConfig", pairs, **TOKENS, d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=None),
    model("Whisper", "encoder-decoder", "WhisperForConditionalGeneration", "WhisperConfig", speech, **TOKENS, d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=20, max_target_positions=32, decoder_start_token_id=2),
]  # fmt: skip


def clip_inputs() -> dict[str, Any]:
    return {**text(), **image()}


VISIONS = [
    model("ViT", "vision", "ViTModel", "ViTConfig", image, **VISION),
    model("DINOv2", "vision", "Dinov2Model", "Dinov2Config", image, **VISION),
    Architecture("CLIP", "vision", lambda: hf.CLIPModel(hf.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION, projection_dim=16)), clip_inputs),
    Architecture("SigLIP", "vision", lambda: hf.SiglipModel(hf.SiglipConfig(text_config=CLIP_TEXT, vision_config=VISION)), clip_inputs),
    model("ConvNeXt", "convolutional", "ConvNextModel", "ConvNextConfig", image, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 3, 1]),
    model("Swin", "vision", "SwinModel", "SwinConfig", image, image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4),
]  # fmt: skip


def wave() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(1))}


AUDIO = [
    model("Wav2Vec2", "audio", "Wav2Vec2Model", "Wav2Vec2Config", wave, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, conv_dim=[16, 16], conv_stride=[5, 4], conv_kernel=[10, 8], num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=40),
]  # fmt: skip


def llava() -> torch.nn.Module:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**LLAMA), image_token_index=99
    )
    return hf.LlavaForConditionalGeneration(config)


def seen(tokens: int, token: int, **more: Any) -> Callable[[], dict[str, Any]]:
    """Prompts with `tokens` places for each image."""

    def given() -> dict[str, Any]:
        prompt = torch.cat([ids(2, 2), torch.full((2, tokens), token), ids(2, 5)], 1)
        return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), **image(), **more}

    return given


def qwen2_vl() -> torch.nn.Module:
    config = hf.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3},
        text_config={**LLAMA, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}},
        image_token_id=99, video_token_id=98, vision_start_token_id=97, vision_end_token_id=96,
    )  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration(config)


def qwen2_vl_inputs() -> dict[str, Any]:
    prompt = torch.cat([ids(2, 2), torch.full((2, 1), 97), torch.full((2, 4), 99), ids(2, 5)], 1)
    patches = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return {
        "input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pixel_values": patches, "image_grid_thw": grid,
        "mm_token_type_ids": (prompt == 99).long(),
    }  # fmt: skip


def paligemma() -> torch.nn.Module:
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION),
        text_config=hf.GemmaConfig(**HEADED),
        image_token_index=99,
        projection_dim=32,
    )
    return hf.PaliGemmaForConditionalGeneration(config)


VISION_LANGUAGE = [
    Architecture("LLaVA", "vision-language", llava, seen(16, 99), block="model.language_model.layers.2"),
    Architecture("Qwen2-VL", "vision-language", qwen2_vl, qwen2_vl_inputs, block="model.language_model.layers.2"),
    Architecture("PaliGemma", "vision-language", paligemma, seen(16, 99, token_type_ids=torch.zeros(2, 23, dtype=torch.long)), block="model.language_model.layers.2"),
]  # fmt: skip

ARCHITECTURES = [*DECODERS, *ENCODERS, *PAIRS, *VISIONS, *AUDIO, *VISION_LANGUAGE]

# Reasons that lie upstream, for the rows that fall back.
KNOWN = {
    "LLaVA": "a check of the image tokens' number reads a value (`torch_compilable_check`, transformers), so the forward is several "
    "graphs, and a backward over several runs on hooks",
    "Qwen2-VL": "`get_rope_index` counts on the values of tokens and of the image grid, which no scan on fakes has: "
    "https://github.com/pytorch/pytorch/issues/173915",
    "PaliGemma": "as LLaVA",
    "resemblyzer (LSTM)": "Dynamo leaves RNNs alone (`torch._dynamo.config.allow_rnn`), so they run live",
}
