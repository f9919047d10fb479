"""Batches of single types, where the general rules do not tell what their forward takes."""

import torch


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


def _beside(config, count: int, **others) -> dict:
    """Texts that begin with the places of an image."""
    token = getattr(config, "image_token_id", None) or config.image_token_index
    return {"input_ids": torch.cat([torch.full((2, count), token), _ids()], 1)} | others


def _pixels(config, size: int | None = None) -> torch.Tensor:
    vision = getattr(config, "vision_config", config)
    size = size or vision.image_size
    return torch.randn(2, 3, size, size)


def _query_tokens(config) -> dict:
    return _beside(config, config.num_query_tokens, pixel_values=_pixels(config))


def _with_questions(config) -> dict:
    return _query_tokens(config) | {"qformer_input_ids": _ids()}


def _videos_with_questions(config) -> dict:
    size = config.vision_config.image_size
    token, count = getattr(config, "video_token_id", None) or config.video_token_index, 4 * config.num_query_tokens
    ids = torch.cat([torch.full((2, count), token), _ids()], 1)
    return {"input_ids": ids, "qformer_input_ids": _ids(), "pixel_values": torch.randn(2, 4, 3, size, size)}


def _flat_patches(config, frames: int = 1, name: str = "grid_thw", size: int | None = None) -> dict:
    size = size or (config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0])
    return {"pixel_values": torch.randn(32, 3 * frames * size**2), name: torch.tensor([[1, 4, 4], [1, 4, 4]])}


def _places(config) -> dict:
    places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).flatten(0, 1)
    pixels = torch.rand(2, 16, 3 * config.patch_size**2)
    return {"pixel_values": pixels, "pixel_position_ids": places.expand(2, 16, 2).contiguous()}


def _lines_of_patches(config) -> dict:
    """Two images of 4 x 4 patches, one behind the other in one line."""
    size = config.patch_size
    return {"pixel_values": torch.randn(1, 3, size, 32 * size), "target_sizes": torch.tensor([[4, 4], [4, 4]])}


def _first() -> torch.Tensor:
    """The first token attends to all, and all to it."""
    return (torch.arange(12) == 0).long().expand(2, 12).contiguous()


def _mels(config, length: int = 64, bins: int = 128) -> dict:
    return {"input_features": torch.randn(2, length, bins), "attention_mask": torch.ones(2, length, dtype=torch.bool)}


def _wave(length: int):
    return lambda config: {"input_values": torch.randn(2, 1, length)}


def _three_parts(config) -> dict:
    size = [2, 3, *(config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2)]
    half = [*size[:2], size[2] // 2, size[3]]
    return {name: torch.randn(half) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


def _phrases(config) -> dict:
    """Two phrases each, with the full stop that ends one."""
    ids = torch.randint(200, 900, (2, 12))
    ids[:, 0], ids[:, 6], ids[:, 10], ids[:, 11] = 101, 1012, 1012, 102
    return {"input_ids": ids, "pixel_values": _pixels(config, 64)}


def _protein(config) -> dict:
    ids = torch.randint(4, 20, (2, 10))
    return {"input_ids": _ids(), "protein_input_ids": ids, "protein_attention_mask": torch.ones_like(ids)}


INPUTS |= {
    "bros": lambda config: {"input_ids": _ids(), "bbox": torch.rand(2, 12, 8)},
    "blip-2": _query_tokens,
    "blt": lambda config: {"input_ids": torch.randint(8, 250, (2, 24))},
    "clap": lambda config: {"input_ids": _ids(), "input_features": torch.randn(2, 1, 250, 16)},
    "clvp": lambda config: {
        "input_ids": _ids(), "input_features": torch.randn(2, config.decoder_config.feature_size, 20),
    },
    "csm": lambda config: {"input_ids": torch.randint(3, 16, (2, 12, config.num_codebooks))},
    "dac": _wave(2048),
    "dia": lambda config: {"input_ids": _ids(), "decoder_input_ids": torch.randint(3, 20, (2, 8, 9))},
    "encodec": _wave(2000),
    "evolla": _protein,
    "fast_vlm": lambda config: {"input_ids": _ids()},
    "gemma3n_audio": lambda config: {
        "audio_mel": torch.randn(2, 64, config.input_feat_size), "audio_mel_mask": torch.zeros(2, 64, dtype=torch.bool),
    },
    "gemma4_audio": _mels,
    "gemma4_vision": _places,
    "granite_speech5_encoder": lambda config: {"input_features": torch.randn(2, 16, 32)},
    "granite_speech5_ctc": lambda config: {"input_features": torch.randn(2, 16, 32)},
    "grounding-dino": _phrases,
    "mm-grounding-dino": _phrases,
    "hunyuan_vl_vision": lambda config: _flat_patches(config),
    "inkling2_vision": lambda config: {
        "pixel_values": torch.randn(256, 96), "image_grid_thw": torch.tensor([[1, 8, 8], [1, 8, 8]]),
    },
    "instructblip": _with_questions,
    "instructblipvideo": _videos_with_questions,
    "kimi_k25_vision": lambda config: {
        "pixel_values": torch.randn(32, 3, config.patch_size, config.patch_size),
        "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    },
    "led": lambda config: {"input_ids": _ids(), "decoder_input_ids": _ids(), "global_attention_mask": _first()},
    "longformer": lambda config: {"input_ids": _ids(), "global_attention_mask": _first()},
    "luke": lambda config: {
        "input_ids": _ids(), "entity_ids": torch.randint(1, 20, (2, 3)),
        "entity_attention_mask": torch.ones(2, 3, dtype=torch.long),
        "entity_position_ids": torch.arange(6).view(1, 3, 2).expand(2, 3, 2).contiguous(),
    },
    "kyutai_speech_to_text": lambda config: {"input_ids": torch.randint(3, 16, (2, 12, config.num_codebooks + 1))},
    "muse_glimmer_assistant": lambda config: {
        "noise_embeds": torch.randn(2, 4, 32), "context_hidden_states": torch.randn(2, 12, 160),
    },
    "nemotron3_5_transcribe_word_timestamp": lambda config: {"inputs_embeds": torch.randn(2, 12, 32)},
    "pocket_tts_audio_tokenizer_decoder": lambda config: {"latents": torch.randn(2, config.hidden_size, 6)},
    **dict.fromkeys(
        ("nemotron3_5_asr", "nemotron_asr_streaming"),
        lambda config: {
            "input_features": torch.randn(2, 96, config.encoder_config.num_mel_bins), "decoder_input_ids": _ids(),
        },
    ),
    "nemotron_asr_streaming_encoder": lambda config: {"input_features": torch.randn(2, 96, config.num_mel_bins)},
    "lasr_encoder": lambda config: _mels(config, 64, config.num_mel_bins),
    "lasr_ctc": lambda config: _mels(config, 64, config.encoder_config.num_mel_bins),
    "mimi": _wave(11520),
    "mimi_encoder": _wave(11520),
    "muse_spark_vision": lambda config: _flat_patches(config, 2),
    "muse_glimmer_vision": lambda config: _flat_patches(config, 2),
    "musicgen": lambda config: {
        "input_ids": torch.randint(3, 90, (4, 12)), "encoder_hidden_states": torch.randn(2, 5, config.hidden_size),
    },
    "musicgen_melody": lambda config: {"input_ids": torch.randint(3, 90, (4, 12))},
    "efficientloftr": lambda config: {"pixel_values": torch.randn(2, 2, 3, 64, 64)},
    "lightglue": lambda config: {"pixel_values": torch.randn(2, 2, 3, 64, 64)},
    "mimi_decoder": lambda config: {"latents": torch.randn(2, config.hidden_size, 6)},
    "minicpm_ocr_vision": _lines_of_patches,
    "minicpmv4_7_vision": _lines_of_patches,
    "muse_spark_audio": lambda config: {"input_values": torch.randn(2, 3840)},
    "oneformer": lambda config: {"pixel_values": _pixels(config, 64), "task_inputs": torch.randint(1, 90, (2, 77))},
    "patchtsmixer": _patches_of_series,
    "xcodec": _wave(2560),
    "pe_audio": lambda config: {"input_ids": _ids()} | _wave(4096)(config),
    "pe_audio_encoder": _wave(4096),
    "pocket_tts_audio_tokenizer": _wave(11520),
    "pocket_tts_audio_tokenizer_encoder": _wave(11520),
    "pp_ocrv5_mobile_rec": lambda config: {"pixel_values": torch.randn(2, 3, 96, 320)},
    "pp_ocrv5_server_rec": lambda config: {"pixel_values": torch.randn(2, 3, 96, 320)},
    "pp_ocrv6_small_rec": lambda config: {"pixel_values": torch.randn(2, 3, 48, 320)},
    "pp_ocrv6_tiny_rec": lambda config: {"pixel_values": torch.randn(2, 3, 48, 320)},
    "reformer": lambda config: {"input_ids": _ids(16)},
    "seggpt": _three_parts,
    "swin2sr": lambda config: {"pixel_values": torch.randn(2, 3, 16, 16)},
    "timesfm": lambda config: {
        "past_values": torch.randn(2, config.context_length),
        "past_values_padding": torch.zeros(2, config.context_length, dtype=torch.long),
        "freq": torch.zeros(2, 1, dtype=torch.long),
    },
    "timesfm2_5": lambda config: {"past_values": torch.randn(2, config.context_length)},
    "tvp": lambda config: {"input_ids": _ids(), "pixel_values": torch.randn(2, 2, 3, 64, 64)},
    "vibevoice_acoustic_tokenizer": _wave(6400),
    "vibevoice_acoustic_tokenizer_encoder": lambda config: {"hidden_states": torch.randn(2, 1, 6400)},
    "vibevoice_acoustic_tokenizer_decoder": lambda config: {"hidden_states": torch.randn(2, config.hidden_size, 4)},
    "vibevoice": lambda config: {"input_ids": _ids()},
    "vibevoice_asr": lambda config: {"input_ids": _ids()},
    "udop": lambda config: {"input_ids": _ids(), "bbox": torch.rand(2, 12, 4), "decoder_input_ids": _ids()},
}  # fmt: skip
