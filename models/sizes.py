"""Published sizes of the pretrained parts, as transformers configurations, and the small ones that tests use.

They let `paper` presets be built on the meta device without a hub. Sources: the models' published config.json.
"""

from __future__ import annotations

from typing import Any

WHISPER_LARGE_V2: dict[str, Any] = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
}
WHISPER_LARGE_V3 = WHISPER_LARGE_V2 | {"num_mel_bins": 128}

LLAMA_7B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
VICUNA_7B = LLAMA_7B | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
LLAMA_13B = LLAMA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
VICUNA_13B = LLAMA_13B

HUBERT_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}

TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
MOONSHINE_TINY_RANDOM: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "encoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 2,
    "encoder_num_key_value_heads": 2,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
}
WHISPER_TINY_RANDOM: dict[str, Any] = {
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 80,
    "max_source_positions": 100,
}

VICUNA_7B_V1 = LLAMA_7B  # versions below 1.5, on LLaMA 1
WHISPER_LARGE = WHISPER_LARGE_V2  # the first version differs in its weights alone
WHISPER_LARGE_V2_DECODER: dict[str, Any] = {
    "decoder_layers": 32,
    "decoder_attention_heads": 20,
    "decoder_ffn_dim": 5120,
    "vocab_size": 51865,
}
# Qwen-7B as Qwen-Audio has it, in the names of Qwen 2: no grouped heads, bias on query, key and value alone
QWEN_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151646,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
}
CAVMAE_TINY: dict[str, Any] = {
    "audio_length": 128,
    "mel_bins": 32,
    "patch_size": 16,
    "embed_dim": 32,
    "depth": 2,
    "modality_specific_depth": 1,
    "num_heads": 2,
}

LLAMA_2_7B_CHAT = LLAMA_7B | {"max_position_embeddings": 4096}
WAVLM_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
W2V_BERT_2: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feature_projection_input_dim": 160,
}
QWEN15_MOE_A27B: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
WAVLM_TINY_RANDOM: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
W2V_BERT_TINY_RANDOM: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_depthwise_kernel_size": 7,
    "feature_projection_input_dim": 160,
}
TINY_MOE: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "tie_word_embeddings": True,
}

HUBERT_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "do_normalize": True,
}
MT5_XXL: dict[str, Any] = {
    "model_type": "mt5",
    "vocab_size": 250112,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "decoder_start_token_id": 0,
}

MT5_TINY_RANDOM: dict[str, Any] = {
    "model_type": "mt5",
    "vocab_size": 259,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
WHISPER_WHOLE_TINY_RANDOM = WHISPER_TINY_RANDOM | {
    "model": "whisper",
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "max_target_positions": 16,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HUBERT_TINY_RANDOM: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
}
OPT_IML_MAX_1_3B: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 50272,
    "hidden_size": 2048,
    "word_embed_proj_dim": 2048,
    "ffn_dim": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
LLAMA_2_7B = VICUNA_7B  # which was tuned from it
MERT_330M: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "do_stable_layer_norm": True,
}
MERT_TINY_RANDOM: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "do_stable_layer_norm": True,
    "conv_dim": [16] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
HTSAT_TINY_RANDOM: dict[str, Any] = {
    "spec_size": 32,
    "num_mel_bins": 16,
    "window_size": 4,
    "patch_embeds_hidden_size": 8,
    "depths": [2, 1],
    "num_attention_heads": [2, 4],
    "window_seconds": 0.4,
    "hop_seconds": 0.2,
    "projection": 24,
}
TINY_GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 259,
    "n_positions": 512,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 259,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "dropout": 0.0,
}
