"""What the general rules for tiny models do not tell: settings and inputs of single types."""

import torch

_NO_GROUPS = {"num_key_value_heads": 4}
_WINDOWS = {"image_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

SETTINGS: dict[str, dict] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "swin": _WINDOWS,
    "donut-swin": _WINDOWS,
    "swinv2": _WINDOWS | {"pretrained_window_sizes": [0, 0]},
    "segformer": {"num_attention_heads": [1, 2, 4, 4]},
    "audio-spectrogram-transformer": {"max_length": 16, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4},
    "timesformer": {"num_frames": 2},
    "whisper": {"max_source_positions": 8, "max_target_positions": 16},
    "speech_to_text": {"input_feat_per_channel": 8, "conv_channels": 16},
} | dict.fromkeys(
    (
        "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "esmc",
        "glm4_moe_lite", "glm5_next_text", "glm_moe_dsa", "kimi_linear", "minicpm3", "mistral4", "mistral_large4_text",
        "nemotron3_5_transcribe_asr_audio", "nemotron3_diarization_audio", "youtu",
    ),
    _NO_GROUPS,
)  # fmt: skip


def _prefix_text(config) -> dict:
    ids = torch.randint(8, 99, (2, 12))
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}


def _sound(config) -> dict:
    return {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": torch.randint(8, 99, (2, 12))}


def _video(config) -> dict:
    return {"pixel_values": torch.randn(2, config.num_frames, 3, config.image_size, config.image_size)}


INPUTS: dict = {
    # Without token types, eager attention is causal and SDPA is not.
    "paligemma": _prefix_text,
    "whisper": _sound,
    "timesformer": _video,
}

# Standard deviation of the weights where the usual one makes activations grow from layer to layer.
DEVIATION = {"mobilebert": 0.02}
