"""Settings of single types, where the general rules for tiny models do not tell them."""

from transformers import ResNetConfig, RTDetrResNetConfig

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
    "cvt": {"num_heads": [1, 2, 4], "embed_dim": [8, 16, 32], "depth": [1, 2, 3]},
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


# Texts.
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4}
_EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
_INDEXER = dict.fromkeys(("indexer_n_heads", "hc_count"), 2) | {
    "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2, "indexer_kv_heads": 1, "hc_lowrank": 8,
}  # fmt: skip
_NO_ROPE = {"num_key_value_heads": 4, "index_topk": 16, "qk_rope_head_dim": 0, "head_dim": 0, "linear_head_dim": 8}
_NO_ROPE |= {"linear_num_heads": 4}
_FOUR_AXES = {"head_dim": 8, "rope_parameters": _SECTIONS | {"mrope_section": [1, 1, 1, 1]}}
_BY_KIND = {
    "rope_parameters": {
        kind: _SECTIONS | {"mrope_section": [2, 1, 1]} for kind in ("full_attention", "sliding_attention")
    }
}
SETTINGS |= {
    "bailing_hybrid": {"num_key_value_heads": 4, "num_experts": 16},
    "bros": {"hidden_size": 64, "intermediate_size": 96},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "emu3": {
        "vocabulary_map": {"<image>": 4, "<|extra_200|>": 5},
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": []},
    },
    "cohere_compass_text": _BY_KIND,
    "cohere_compass": {"text_config": _BY_KIND},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 4}},
    "dia": {
        "decoder_config": {
            "num_channels": 9, "cross_hidden_size": 32, "cross_num_attention_heads": 4, "cross_head_dim": 8,
            "cross_num_key_value_heads": 4,
        },
    },
    "diffusion_gemma": {"text_config": _EXPERTS},
    "glm5_next_text": _NO_ROPE,
    "glm5_next": {"text_config": _NO_ROPE},
    "longcat_flash": {"num_key_value_heads": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 16},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 16},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "step3p7": {"text_config": {"sliding_window": 5}},
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 4], "attn_layers": ["local", "lsh"], "num_buckets": 2,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "attention_head_size": 8, "num_hidden_layers": 2,
        "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0, "hash_seed": 1,
    },
    "blt": {"encoder_hash_byte_group_vocab": 99, "vocab_size": 260, "patching_mode": "space"}
    | {f"{part}_config": {"vocab_size": 260, "hidden_size_global": 32} for part in ("encoder", "decoder", "patcher")},
    "hunyuan_vl_text": _FOUR_AXES,
    "hunyuan_vl": {"text_config": _FOUR_AXES},
    "hunyuan_vl_vision": {"temporal_patch_size": 1},
    "neomme": {"head_dim": 16},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "fastspeech2_conformer_with_hifigan": {"vocoder_config": {"model_in_dim": 8}},
    "ernie4_5_vl_moe": {
        "text_config": {"head_dim": 8, "rope_parameters": _SECTIONS | {"mrope_section": [1, 1, 2]}},
    },
    "musicgen": {"decoder": {"num_codebooks": 2, "vocab_size": 99}},
    "musicgen_melody": {"decoder": {"num_codebooks": 2, "vocab_size": 99}},
}  # fmt: skip

# Images: sizes that leave more than one key after the convolutions, and backbones that need no further package.
_RESNET = {
    "use_timm_backbone": False,
    "backbone_config": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    ),
}
_LARGER = (
    "align", "convnext", "convnextv2", "cvt", "detr", "conditional_detr", "dab-detr", "deformable_detr",
    "dinov3_convnext", "efficientnet", "glpn", "mm-grounding-dino", "grounding-dino", "segformer", "table-transformer",
)  # fmt: skip
IMAGE_SIZES = dict.fromkeys(_LARGER, 64) | {"mobilevit": 128, "mobilevitv2": 128, "oneformer": 64, "mask2former": 64}
SETTINGS |= {kind: _RESNET for kind in ("detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer")}
SETTINGS |= {
    "align": {"vision_config": {"hidden_dim": 640}, "projection_dim": 640},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "xclip": {"vision_config": {"mit_hidden_size": 32, "mit_intermediate_size": 48, "mit_num_attention_heads": 4}},
    "efficientnet": {"hidden_dim": 2560},
    "gemma3n": {"text_config": SETTINGS["gemma3n_text"]},
    "mobilevit": {"patch_size": 2},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8, "backbone_config": ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"])},
    "blip-2": {"image_token_index": 3},
    "instructblip": {"image_token_index": 3},
    "instructblipvideo": {"video_token_index": 4},
    "grounding-dino": {"text_config": {"vocab_size": 1100}},
    "mm-grounding-dino": {"text_config": {"vocab_size": 1100}},
    "bridgetower": {
        "hidden_size": 64, "text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 64, "image_size": 16},
        "image_size": 16,
    },
    "clap": {
        "audio_config": {
            "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4], "window_size": 4, "depths": [2, 2],
            "num_attention_heads": [2, 4], "patch_embeds_hidden_size": 8, "hidden_size": 16, "num_mel_bins": 16,
            "enable_fusion": False,
        },
    },
    "levit": {"image_size": 128, "patch_size": 16, "hidden_sizes": [16, 24, 32], "depths": [1, 1, 1],
              "key_dim": [8, 8, 8], "num_attention_heads": [2, 2, 2]},
    "swin2sr": {"image_size": 16, "patch_size": 1, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2],
                "window_size": 4},
    "sam": {"vision_config": {"output_channels": 32, "num_pos_feats": 16}},
    "sam_hq": {"vision_config": {"output_channels": 32, "num_pos_feats": 16}},
    "sam3": {"vision_config": {"fpn_hidden_size": 32}},
    "sam3_lite_text": {"vision_config": {"fpn_hidden_size": 32}},
    "sam3_tracker": {
        "vision_config": {"fpn_hidden_size": 32, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    },
    "seggpt": {"image_size": [32, 16], "pretrain_image_size": 16, "intermediate_hidden_state_indices": [0, 1],
               "merge_index": 0, "decoder_hidden_size": 8},
    "timesfm": {"context_length": 64, "patch_length": 8, "horizon_length": 8, "freq_size": 3},
    "timesfm2_5": {"context_length": 64, "patch_length": 8},
    "patchtsmixer": {"context_length": 8, "patch_length": 2, "patch_stride": 2, "num_input_channels": 2},
    "vjepa2": dict.fromkeys(("pred_num_attention_heads", "num_attention_heads"), 4)
    | {"crop_size": 16, "pred_hidden_size": 32, "pred_num_hidden_layers": 2, "frames_per_clip": 2},
    "efficientloftr": {"num_attention_heads": 8, "stage_num_blocks": [1, 1, 1], "out_features": [8, 8, 32],
                       "stage_stride": [2, 1, 2],
                       "stage_in_channels": [1, 8, 8]},
    "muse_spark_vision": {"temporal_patch_size": 2},
}  # fmt: skip
_HIERA = {
    "hidden_size": 8, "num_attention_heads": 1, "embed_dim_per_stage": [8, 16, 32, 64], "image_size": [64, 64],
    "num_attention_heads_per_stage": [1, 2, 2, 4], "blocks_per_stage": [1, 1, 1, 1], "patch_kernel_size": [7, 7],
    "window_size_per_stage": [4, 2, 4, 2], "global_attention_blocks": [],
    "window_positional_embedding_background_size": [4, 4],
}  # fmt: skip
_HIERA_PYRAMID = {
    "backbone_config": _HIERA, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 32,
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}  # fmt: skip
IMAGE_SIZES |= dict.fromkeys((
        "sam2", "sam2_vision_model", "sam2_hiera_det_model", "rt_detr", "rt_detr_v2", "d_fine", "deimv2",
        "pp_doclayout_v3", "pp_doclayout_v4", "depth_pro",
    ),
    64,
)  # fmt: skip
_RT_DETR = {
    "backbone_config": RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    ),
    "encoder_hidden_dim": 32, "encoder_in_channels": [16, 16, 32], "decoder_in_channels": [32, 32, 32],
}  # fmt: skip
SETTINGS |= {
    "sam2_hiera_det_model": _HIERA,
    "sam2_vision_model": _HIERA_PYRAMID,
    "sam2": {"vision_config": _HIERA_PYRAMID, "prompt_encoder_config": {"image_size": 64, "patch_size": 16}},
    "depth_pro": {
        "intermediate_hook_ids": [1, 0], "intermediate_feature_dims": [8, 8], "fusion_hidden_size": 32,
        "scaled_images_feature_dims": [8, 8, 16], "patch_size": 16,
    },
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "lw_detr": {
        "backbone_config": {"num_windows": 4, "pretrain_image_size": 16, "window_block_indices": [0],
                            "out_features": ["stage2"]},
        "decoder_cross_attention_heads": 4, "decoder_self_attention_heads": 4, "group_detr": 2,
        "projector_scale_factors": [1.0],
    },
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": 32, "num_key_value_heads": 4}},
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": [], "image_grid_pinpoints": [[16, 16]]},
}  # fmt: skip

# Sounds.
_STAGES = {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1]}
_FEW_FILTERS = {"num_filters": 4, "depths": [1] * 7, "hidden_size": 32}
SETTINGS |= {
    "muse_spark_audio": _STAGES,
    "muse_spark": {"audio_config": _STAGES},
    "moonshine_streaming": {"num_key_value_heads": 4, "encoder_config": {"num_key_value_heads": 4}},
    "vibevoice": {"audio_config": _FEW_FILTERS, "semantic_model_config": _FEW_FILTERS},
    "vibevoice_asr": {f"{kind}_tokenizer_encoder_config": _FEW_FILTERS for kind in ("acoustic", "semantic")},
}
SETTINGS |= {f"vibevoice_acoustic_tokenizer{part}": _FEW_FILTERS for part in ("", "_encoder", "_decoder")}
_CODEC = {"upsample_groups": 32, "num_filters": 4}
SETTINGS |= {kind: _CODEC
    for kind in (
        "mimi", "mimi_encoder", "mimi_decoder", "pocket_tts_audio_tokenizer", "pocket_tts_audio_tokenizer_encoder",
        "pocket_tts_audio_tokenizer_decoder",
    )
}  # fmt: skip
SETTINGS |= {
    "csm": {"codec_config": _CODEC, "depth_decoder_config": {"backbone_hidden_size": 32}},
    "kyutai_speech_to_text": {"codec_config": _CODEC, "audio_pad_token_id": 3},
    "encodec": {"num_filters": 4},
    "granite_speech5_encoder": {"context_size": 8, "num_key_value_heads": 4},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 8, "num_key_value_heads": 4}},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 98, "num_key_value_heads": 4},
    "vits": {
        "flow_size": 32,
        "spectrogram_bins": 9,
        "upsample_initial_channel": 16,
        "upsample_rates": [2, 2],
        "upsample_kernel_sizes": [4, 4],
        "duration_predictor_filter_channels": 16,
        "posterior_encoder_num_wavenet_layers": 2,
        "prior_encoder_num_wavenet_layers": 2,
    },
    "clvp": {"decoder_config": {"feature_size": 16, "max_text_tokens": 64}},
}

# Standard deviation of the weights where the usual one makes activations grow from layer to layer.
DEVIATION = {
    "mobilebert": 0.02,
    "pe_audio": 0.05,
    "pe_audio_encoder": 0.05,
    "d_fine": 0.05,
    "deimv2": 0.05,
    "pp_doclayout_v3": 0.03,
    "pp_doclayout_v4": 0.03,
    "vits": 0.02,
    "grounding-dino": 0.03,
    "mm-grounding-dino": 0.03,
}
DEVIATION |= dict.fromkeys(("florence2", "levit", "lightglue", "xclip"), 0.1)

# Parameters that must not be as small as any: zero, gates cut a gradient off; a snake divides by its alpha.
FILLED = {
    "doge": {"A": 0.5},
    "zaya": {"temp": 1.0},
    "pe_audio": {"alpha": 1.0},
    "pe_audio_encoder": {"alpha": 1.0},
    "evolla": {"gate_attention": 0.5, "gate_ffw": 0.5},
    "idefics": {"alpha_cross_attn": 0.5, "alpha_dense": 0.5},
}

# Types of which no batch can be made, and why.
NO_BATCH = {
    "bark": "has no forward: its three parts are run by generate",
    "glm_image_vqmodel": "has no forward: the language model calls its parts",
    "voxtral_realtime_text": "its class is not in this version of Transformers",
} | dict.fromkeys(
    ("edgetam_video", "sam2_video", "sam3_tracker_video", "sam3_video"),
    "its forward takes a session of inference, not a batch",
)

# Types whose model takes one part of their configuration.
PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}

# Types that give no gradient in evaluation mode, without dropout then.
IN_TRAINING = {"reformer"}

# Why adapters of a type get no gradient, where that is the model's own doing.
INERT = dict.fromkeys(
    ("detr", "conditional_detr", "dab-detr", "table-transformer", "maskformer"),
    "object queries begin as zeros: the first self attention of the decoder has nothing to read",
) | {"mra": "without its CUDA kernel its attention returns zeros"}

# Types whose models choose by thresholds (keypoints, masks, queries) or by random buckets, otherwise in float64 than in
# float32: compared in float32.
IN_SINGLE = {"reformer", "lightglue", "mask2former", "oneformer", "pp_doclayout_v3", "pp_doclayout_v4"}
