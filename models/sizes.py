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
