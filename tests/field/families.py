"""Families of text models, beside those of `tests/coverage`: what strangers wrap."""

from __future__ import annotations

from typing import Any

from tests.coverage.architectures import (
    BERT,
    DECODERS,
    ENCODERS,
    HEADED,
    LLAMA,
    PAIRS,
    SMALL,
    TOKENS,
    Architecture,
    decoder,
    model,
    pairs,
    text,
)

PADDED: dict[str, Any] = {**BERT, "pad_token_id": 1}  # RoBERTa's kin: the pad token is where positions begin
PAIR: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, **TOKENS,
}  # fmt: skip
T5S: dict[str, Any] = {**TOKENS, "d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "decoder_start_token_id": 0}  # fmt: skip
NO_LIMIT = {k: v for k, v in PAIR.items() if k != "max_position_embeddings"}


def encoder(name: str, cls: str, config: str = "", **settings: Any) -> Architecture:
    kin = cls.replace("ForMaskedLM", "").replace("LMHeadModel", "").replace("WithLMHeadModel", "").removesuffix("Model")
    return model(name, "encoder", cls, config or f"{kin}Config", text, **settings)


def pair(name: str, cls: str, **settings: Any) -> Architecture:
    kin = cls.replace("ForConditionalGeneration", "").replace("MTModel", "")
    return model(name, "encoder-decoder", cls, f"{kin}Config", pairs, **settings)


MORE = [
    encoder("ESM", "EsmForMaskedLM", **PADDED, mask_token_id=32, position_embedding_type="absolute"),
    encoder("ESM-2", "EsmForMaskedLM", **PADDED, mask_token_id=32, position_embedding_type="rotary"),
    encoder("MPNet", "MPNetForMaskedLM", **PADDED),
    encoder("XLM-R", "XLMRobertaForMaskedLM", **PADDED),
    encoder("CamemBERT", "CamembertModel", **PADDED),
    encoder("Longformer", "LongformerModel", **PADDED, attention_window=[4] * 4),
    encoder("Data2Vec", "Data2VecTextModel", **PADDED),
    encoder("IBERT", "IBertModel", **PADDED),
    encoder("ALBERT", "AlbertForMaskedLM", **BERT, embedding_size=16),
    encoder("DistilBERT", "DistilBertForMaskedLM", **TOKENS, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64),
    encoder("BigBird", "BigBirdModel", **BERT, attention_type="original_full"),
    encoder("XLNet", "XLNetLMHeadModel", **TOKENS, d_model=32, n_layer=2, n_head=4, d_inner=64),
    encoder("DeBERTa", "DebertaModel", **BERT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    encoder("Funnel", "FunnelBaseModel", "FunnelConfig", **TOKENS, d_model=32, n_head=4, d_head=8, d_inner=64, block_sizes=[1, 1]),
    encoder("MobileBERT", "MobileBertModel", **{**BERT, "num_hidden_layers": 2}, embedding_size=32, true_hidden_size=32, intra_bottleneck_size=32),
    encoder("Nystromformer", "NystromformerModel", **BERT),
    encoder("Megatron-BERT", "MegatronBertModel", **BERT),
    encoder("Splinter", "SplinterModel", **BERT),
    encoder("ConvBERT", "ConvBertModel", **BERT, embedding_size=32, head_ratio=2, num_groups=1),
    encoder("SqueezeBERT", "SqueezeBertModel", **BERT, embedding_size=32),
    encoder("YOSO", "YosoModel", **BERT, use_expectation=True),
    encoder("RoFormer", "RoFormerModel", **BERT, embedding_size=32),
    encoder("RemBERT", "RemBertModel", **BERT, input_embedding_size=32),
    encoder("ERNIE", "ErnieModel", **BERT),
    encoder("RoCBert", "RoCBertModel", **BERT, enable_pronunciation=False, enable_shape=False),
    encoder("XLM", "XLMModel", **{**TOKENS, "pad_token_id": 2}, emb_dim=32, n_layers=2, n_heads=4, max_position_embeddings=64),
    pair("Marian", "MarianMTModel", **PAIR),
    pair("Pegasus", "PegasusForConditionalGeneration", **PAIR),
    pair("mBART", "MBartForConditionalGeneration", **PAIR),
    pair("Blenderbot", "BlenderbotForConditionalGeneration", **PAIR),
    pair("M2M100", "M2M100ForConditionalGeneration", **PAIR),
    pair("LED", "LEDForConditionalGeneration", **NO_LIMIT, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=4),
    pair("UMT5", "UMT5ForConditionalGeneration", **T5S),
    pair("LongT5", "LongT5ForConditionalGeneration", **T5S),
    pair("ProphetNet", "ProphetNetForConditionalGeneration", **TOKENS, hidden_size=32, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, decoder_start_token_id=2),
    decoder("MPT", "Mpt", **TOKENS, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=64),
    decoder("CTRL", "CTRL", "CTRLLMHeadModel", **TOKENS, n_embd=32, n_layer=2, n_head=4, dff=64, n_positions=64),
    decoder("XGLM", "XGLM", **TOKENS, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, max_position_embeddings=64),
    decoder("BioGPT", "BioGpt", **BERT),
    decoder("GPT-Neo", "GPTNeo", **TOKENS, hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4, window_size=4, max_position_embeddings=64),
    decoder("GPT-BigCode", "GPTBigCode", **TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    decoder("CodeGen", "CodeGen", **TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    decoder("Falcon, ALiBi", "Falcon", **SMALL, alibi=True, new_decoder_architecture=False, max_position_embeddings=64),
    decoder("GPT", "OpenAIGPT", "OpenAIGPTLMHeadModel", **TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    decoder("Bamba", "Bamba", **LLAMA, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=4, attn_layer_indices=[1]),
    decoder("FalconMamba", "FalconMamba", **TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8),
    decoder("BERT, causal", "Bert", "BertLMHeadModel", "BertConfig", **BERT, is_decoder=True),
    decoder("RoBERTa, causal", "Roberta", "RobertaForCausalLM", "RobertaConfig", **PADDED, is_decoder=True),
    decoder("OPT, projected", "OPT", **{**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 64}),
    decoder("Qwen3-Next", "Qwen3Next", **HEADED, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4),
]  # fmt: skip

FAMILIES = [a for a in (*DECODERS, *ENCODERS, *PAIRS, *MORE) if a.name != "Whisper"]  # those that take ids
