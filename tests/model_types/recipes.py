"""What the general rules for tiny models do not tell: settings and inputs of single types."""

import torch

_NO_GROUPS = {"num_key_value_heads": 4}
_WINDOWS = {"image_size": 32, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

_ROPE = {
    "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1],
}  # fmt: skip

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
    # Two of three kinds of layers, and heads whose size follows from nothing that is made tiny.
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["linear_attention", "hybrid"]},
    "sam3_lite_text_text_model": {"num_hidden_layers": 4},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "esm": {"vocab_size": 99, "pad_token_id": 1, "mask_token_id": 4},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "visual_embed": False},
    "lilt": {"hidden_size": 48, "intermediate_size": 96},
    "roc_bert": dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 8)
    | dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 50),
    "perceiver": {
        "d_latents": 32,
        "num_latents": 6,
        "num_self_attends_per_block": 2,
        "num_blocks": 1,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "blip_2_qformer": {"encoder_hidden_size": 32},
    "patchtst": {"context_length": 8, "patch_length": 2, "patch_stride": 2, "num_input_channels": 2},
    "hiera": {
        "image_size": [64, 64],
        "patch_size": [7, 7],
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 4, 4],
    },
    "pvt": {"image_size": 64, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "pvt_v2": {"image_size": 64, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 32},
    "lxmert": {"visual_feat_dim": 32, "l_layers": 2, "x_layers": 2, "r_layers": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "kosmos-2": {"latent_query_num": 4},
    "idefics": {"cross_layer_interval": 1, "use_resampler": False, "additional_vocab_size": 0},
    "siglip2": {"vision_config": {"num_patches": 16}},
    "siglip2_vision_model": {"num_patches": 16},
    "gemma3n_text": {
        "intermediate_size": [48, 48],
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
        "vocab_size_per_layer_input": 99,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
    },
    "granite_speech5_encoder": {"context_size": 8},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 8}},
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "zaya": {"num_experts_per_tok": 1},
    "glm5_next_text": {"num_key_value_heads": 4, "index_topk": 16},
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "index_topk": 16}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "cvt": {"num_heads": [1, 2, 4], "embed_dim": [8, 16, 32], "depth": [1, 1, 2]},
}
SETTINGS |= {key: {"head_dim": 8} for key in ("hunyuan_v1_dense", "hunyuan_v1_moe", "hunyuan_vl_text", "ministral")}
SETTINGS |= {key: {"text_config": {"head_dim": 8}} for key in ("hunyuan_vl",)}
SETTINGS |= {key: {"text_config": _NO_GROUPS} for key in ("kimi_k25", "mistral_large4", "dots3_note")}
SETTINGS |= {
    key: {"prediction_length": 4, "context_length": 8, "label_length": 4, "num_time_features": 1}
    for key in ("autoformer", "informer", "time_series_transformer")
}
SETTINGS |= {
    key: {"head_config": {"audio_hidden_size": 32}}
    for key in ("nemo_speechlm", "nemotron3_5_transcribe_audio", "nemotron3_diarization")
}
SETTINGS |= {key: {"flow_head_config": {"condition_dim": 32}} for key in ("pocket_tts", "gradium_phonon_tts")}
SETTINGS |= dict.fromkeys(
    (
        "axk1", "axk2", "bailing_hybrid", "deepseek_v3", "deepseek_v32", "dots3_note_text", "esmc",
        "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "minicpm3", "mistral4", "mistral_large4_text",
        "nemotron3_5_transcribe_asr_audio", "nemotron3_diarization_audio", "youtu",
    ),
    _NO_GROUPS,
)  # fmt: skip

SETTINGS |= {
    kind: {"rope_parameters": _ROPE}
    for kind in "qwen2_vl_text qwen2_5_vl_text glm4v_text glm4v_moe_text glm_image_text glm_ocr_text".split()
}
SETTINGS |= {
    kind: {"text_config": {"rope_parameters": _ROPE}}
    for kind in (
        "qwen2_vl qwen2_5_vl qwen2_5_omni_thinker glm46v glm4v glm4v_moe glm_image glm_ocr glmga paddleocr_vl"
    ).split()
}
SETTINGS |= {"unlimited_ocr": {"text_config": _NO_GROUPS}}
SETTINGS["nemotron3_diarization"] = SETTINGS["nemotron3_diarization"] | {"audio_config": _NO_GROUPS}


def _prefix_text(config) -> dict:
    ids = torch.randint(8, 99, (2, 12))
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}


def _sound(config) -> dict:
    return {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": torch.randint(8, 99, (2, 12))}


def _video(config) -> dict:
    return {"pixel_values": torch.randn(2, config.num_frames, 3, config.image_size, config.image_size)}


def _ids(length: int = 12) -> torch.Tensor:
    return torch.randint(8, 99, (2, length))


def _series(config) -> dict:
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": torch.randn(2, past),
        "past_time_features": torch.randn(2, past, config.num_time_features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.randn(2, config.prediction_length),
        "future_time_features": torch.randn(2, config.prediction_length, config.num_time_features),
    }


def _patches_of_series(config) -> dict:
    return {"past_values": torch.randn(2, config.context_length, config.num_input_channels)}


def _decisions(config) -> dict:
    return {
        "states": torch.randn(2, 6, config.state_dim),
        "actions": torch.randn(2, 6, config.act_dim),
        "rewards": torch.randn(2, 6, 1),
        "returns_to_go": torch.randn(2, 6, 1),
        "timesteps": torch.arange(6).expand(2, 6),
        "attention_mask": torch.ones(2, 6),
    }


def _long_sound(config) -> dict:
    return {"input_features": torch.randn(2, config.num_mel_bins, 128)}


def _masked_sound(config) -> dict:
    return _long_sound(config) | {"input_features_mask": torch.ones(2, 128, dtype=torch.long)}


def _patched_image(config) -> dict:
    vision = getattr(config, "vision_config", config)
    return {
        "pixel_values": torch.randn(2, 16, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def _kosmos(config) -> dict:
    size, mask = config.vision_config.image_size, torch.zeros(2, 12, dtype=torch.long)
    mask[:, 1 : 1 + config.latent_query_num] = 1
    return {"pixel_values": torch.randn(2, 3, size, size), "input_ids": _ids(), "image_embeds_position_mask": mask}


def _interleaved(config) -> dict:
    size = config.vision_config.image_size
    return {
        "input_ids": _ids(),
        "pixel_values": torch.randn(2, 1, 3, size, size),
        "image_attention_mask": torch.ones(2, 12, 1),
    }


def _frames(config) -> dict:
    vision = config.vision_config
    frames = torch.randn(2, vision.num_frames, 3, vision.image_size, vision.image_size)
    return {"input_ids": _ids(), "pixel_values": frames}


INPUTS: dict = {
    # Without token types, eager attention is causal and SDPA is not.
    "paligemma": _prefix_text,
    "whisper": _sound,
    "timesformer": _video,
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "patchtst": _patches_of_series,
    "decision_transformer": _decisions,
    "perceiver": lambda config: {"inputs": torch.randn(2, 12, config.d_model)},
    "blip_2_qformer": lambda config: {
        "query_embeds": torch.randn(2, 4, config.hidden_size),
        "encoder_hidden_states": torch.randn(2, 5, config.encoder_hidden_size),
    },
    "lxmert": lambda config: {
        "input_ids": _ids(),
        "visual_feats": torch.randn(2, 5, config.visual_feat_dim),
        "visual_pos": torch.rand(2, 5, 4),
    },
    "wav2vec2-bert": lambda config: {"input_features": torch.randn(2, 16, config.feature_projection_input_dim)},
    "speecht5": lambda config: {
        "input_values": torch.randn(2, 16, config.hidden_size),
        "decoder_input_values": torch.randn(2, 8, config.hidden_size),
    },
    "voxtral_encoder": _long_sound,
    "qwen2_audio_encoder": _long_sound,
    "moss_transcribe_diarize_audio": _long_sound,
    "audioflamingo3_encoder": _masked_sound,
    "qwen3_asr_encoder": lambda config: {
        "input_features": torch.randn(2, config.num_mel_bins, 100),
        "input_features_mask": torch.ones(2, 100, dtype=torch.long),
    },
    "fun_asr_nano_encoder": lambda config: {
        "input_features": torch.randn(2, 16, getattr(config, "input_size", None) or config.num_mel_bins),
        "input_features_mask": torch.ones(2, 16, dtype=torch.long),
    },
    "glmasr_encoder": lambda config: {"input_features": torch.randn(2, config.num_mel_bins, 16)},
    "voxtral_realtime_encoder": lambda config: {"input_features": torch.randn(2, config.num_mel_bins, 16)},
    "siglip2": lambda config: {"input_ids": _ids()} | _patched_image(config),
    "siglip2_vision_model": _patched_image,
    "kosmos-2": _kosmos,
    "idefics": _interleaved,
    "xclip": _frames,
    "flava": lambda config: {"input_ids": _ids(), "pixel_values": torch.randn(2, 3, 16, 16)},
}

# Standard deviation of the weights where the usual one makes activations grow from layer to layer.
DEVIATION = {"mobilebert": 0.02}
