"""Tiny models of the types of Transformers, from their configurations, and batches for them."""

from __future__ import annotations

import copy
import inspect
import re

import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .inputs import INPUTS
from .recipes import DEVIATION, FILLED, IMAGE_SIZES, IN_TRAINING, NO_BATCH, PARTS, SETTINGS

HIDDEN, HEADS, VOCAB, LENGTH, BATCH = 32, 4, 99, 12, 2
LARGEST = 80_000_000  # parameters: what stays larger was not made tiny by the rules here

# What attributes of configurations are called, and what a tiny model has there.
_WIDTH = "hidden_size d_model n_embd dim hidden_dim model_dim embed_dim embedding_size encoder_hidden_size "
_WIDTH += "projection_dim out_hidden_size output_dim mm_hidden_size word_embed_proj_dim n_embed "
_WIDTH += "cross_attention_hidden_size conv_dim d_embed emb_dim decoder_hidden_size text_embed_dim model_width"
_LAYERS = "num_hidden_layers n_layer n_layers num_layers depth encoder_layers decoder_layers num_encoder_layers "
_LAYERS += "num_decoder_layers num_blocks vision_layers text_layers decoder_num_layers num_h_layers num_l_layers "
_LAYERS += "num_layers_h num_layers_l"
_HEADS = "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
_HEADS += "decoder_num_attention_heads encoder_num_attention_heads n_attention_heads mamba_num_heads_ attention_heads "
_FF = "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner moe_intermediate_size ffn_hidden_size "
_FF += "shared_expert_intermediate_size feed_forward_hidden_size mlp_hidden_size dense_intermediate_size "
_FF += "expert_intermediate_size shared_intermediate_size ffn_size decoder_intermediate_size "
_FF += "moe_shared_expert_intermediate_size"
TINY = (
    dict.fromkeys(_WIDTH.split(), HIDDEN)
    | dict.fromkeys(_LAYERS.split(), 2)
    | dict.fromkeys(_HEADS.split(), HEADS)
    | dict.fromkeys(_FF.split(), 48)
    | {
        "vocab_size": VOCAB, "type_vocab_size": 2, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
        "max_source_positions": 64, "max_target_positions": 64, "max_seq_len": 64,
        "num_key_value_heads": 2, "num_kv_heads": 2, "multi_query_group_num": 2, "head_dim": 8, "d_kv": 8,
        "global_head_dim": 8, "num_global_key_value_heads": 2, "attention_head_size": 8, "head_size": 8,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "image_size": 16, "patch_size": 4, "num_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "sliding_window": 5, "num_mel_bins": 8, "attention_window": 4, "block_size": 4,
        "mamba_d_state": 8, "state_size": 8, "mamba_d_conv": 4, "mamba_dt_rank": 4, "mamba_chunk_size": 8,
        "ssm_state_size": 8, "num_queries": 5, "num_labels": 2, "query_length": 5, "num_query_tokens": 4,
        "codebook_size": 16, "num_codebooks": 2, "conv_kernel_size": 3, "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2, "prediction_length": 4, "context_length": 8, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "unk_token_id": 2, "sep_token_id": 2,
        "cls_token_id": 1, "mask_token_id": 2, "image_token_id": 3, "image_token_index": 3, "video_token_id": 4,
        "audio_token_id": 5, "vision_start_token_id": 6, "vision_end_token_id": 7, "image_seq_length": 16,
        "num_conv_layers": 2, "num_frames": 2, "tubelet_size": 1, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB, "layer_norm_eps": 1e-5, "index_n_heads": 2, "index_head_dim": 8,
        "index_topk": 4, "num_nextn_predict_layers": 0, "use_cache": False, "num_memory_blocks": 2,
    }
)  # fmt: skip


class NotBuilt(Exception):
    """A type of which the rules here make no tiny model, or no batch that it takes."""


def model_and_batch(model_type: str):
    """A tiny model and a batch that it has run. `NotBuilt` says what is missing."""
    if model_type in NO_BATCH:
        raise NotBuilt(NO_BATCH[model_type])
    try:
        model = model_of(model_type, config_of(model_type))
        batch = batch_of(model_type, model)
        with torch.no_grad():
            model(**batch)
    except ImportError as error:
        package = re.search(r"requires the (\S+) library", str(error))
        raise NotBuilt(f"needs {package.group(1) if package else error}") from error
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise NotBuilt(words.replace("|", "/")) from error
    return model, batch


def config_of(model_type: str):
    """A tiny configuration."""
    return _tiny(CONFIG_MAPPING[model_type], copy.deepcopy(SETTINGS.get(model_type, {})))


def _tiny(cls, settings: dict, given=None):
    """`given`: the configuration that a larger one has by default in this place."""
    names = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
    default = cls() if given is None else given
    values = default.to_dict()
    found = {}
    if _has_stages(given):
        found["out_features"] = list(given.out_features)
    for name in names | set(values):
        value = values.get(name)
        if name in cls.sub_configs:
            continue
        if name in TINY and (value is not None or name in ("num_key_value_heads",)):
            found[name] = _like(value, TINY[name])
    mapped = set(getattr(cls, "attribute_map", {}))
    found = {k: v for k, v in found.items() if k not in mapped}
    rope = _rope(values.get("rope_parameters"), found, settings)
    if rope is not None and "rope_parameters" in names | set(values):
        found["rope_parameters"] = rope
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and kinds and "layer_types" in names:
        found["layer_types"] = [*dict.fromkeys(kinds)] * (1 if len(set(kinds)) > 1 else 2)
        depth = len(found["layer_types"])
        found |= {name: depth for name in ("num_hidden_layers", "n_layers", "num_layers") if name in found}
    for name, sub in cls.sub_configs.items():
        value = getattr(default, name, None)
        if sub is AutoConfig:
            sub = type(value) if value is not None and type(value).__name__ != "PretrainedConfig" else None
        if sub is not None:
            inner = settings.pop(name, {}) if isinstance(settings.get(name), dict) else {}
            found[name] = _tiny(sub, inner, value if isinstance(value, sub) and _has_stages(value) else None).to_dict()
    return cls(**(found | settings))


def _has_stages(config) -> bool:
    """Whether it is of a backbone with named stages, whose number stays."""
    sizes = any(hasattr(config, name) for name in ("stage_out_channels", "hidden_sizes", "depths"))
    return sizes and bool(getattr(config, "out_features", None))


def _rope(rope, found: dict, settings: dict):
    """Rotary parameters with sections (of time, height, width) that fit a tiny head; None: as they are."""
    if not isinstance(rope, dict) or "mrope_section" not in rope:
        return None
    head = settings.get("head_dim", found.get("head_dim", found.get("hidden_size", HIDDEN) // HEADS))
    half = int(head * (rope.get("partial_rotary_factor") or 1.0)) // 2
    return rope | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}


def _like(default, tiny):
    """The tiny value in the form of the default: some attributes are lists in some types."""
    if isinstance(default, (list, tuple)) and not isinstance(tiny, (list, tuple)):
        return (
            type(default)([tiny] * len(default)) if default and not isinstance(default[0], (list, tuple)) else default
        )
    return tiny


def model_of(model_type: str, config=None, implementation: str = "sdpa"):
    """A tiny model in evaluation mode, with attention that is far from uniform."""
    config = config_of(model_type) if config is None else config
    cls = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
    if isinstance(cls, (tuple, list)):
        cls = cls[0]
    part = PARTS.get(model_type)
    if part is not None and hasattr(config, part):
        config = getattr(config, part)
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"too large: {size} parameters")
    torch.manual_seed(0)
    model = sharpened(build(cls, config, implementation), DEVIATION.get(model_type, 0.3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in FILLED.get(model_type, {}):
                parameter.fill_(FILLED[model_type][name.rpartition(".")[2]])
    return model.train() if model_type in IN_TRAINING else model.eval()


def build(cls, config, implementation: str):
    try:
        return cls._from_config(config, attn_implementation=implementation)
    except ValueError as error:
        if "attn_implementation" not in str(error) and "does not support" not in str(error):
            raise
        return cls._from_config(config, attn_implementation="eager")


def sharpened(model, deviation: float):
    """A fresh model attends nearly uniformly, which a wrong mask or scale would hardly move."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter) * deviation)
            elif parameter.dim() and not torch.isfinite(parameter).all():
                parameter.zero_()
        for name, buffer in model.named_buffers():
            if name.endswith("embed_sum") and not buffer.any():  # the codes of a fresh quantiser: nothing goes through
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model


def batch_of(model_type: str, model) -> dict:
    """Inputs for a model: two texts of twelve tokens, two images, two sounds, as its forward asks for."""
    torch.manual_seed(2)
    config = model.config
    if model_type in INPUTS:
        return INPUTS[model_type](config)
    names = inspect.signature(model.forward).parameters
    first = model.main_input_name
    batch = {}
    text = config.get_text_config()
    ids = lambda: torch.randint(8, min(getattr(text, "vocab_size", VOCAB) or VOCAB, VOCAB), (BATCH, LENGTH))  # noqa: E731
    if "input_ids" in names:
        batch["input_ids"] = ids()
    if "pixel_values" in names and ("input_ids" not in names or model_type in _WITH_IMAGES):
        batch["pixel_values"] = images(config)
    if "pixel_values_videos" == first or (first == "pixel_values" and hasattr(config, "tubelet_size")):
        size, channels = _size(config), getattr(config, "num_channels", 3)
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 2)
        batch[first] = torch.randn(BATCH, frames, channels, size, size)
    if "input_values" in names and first == "input_values":
        bins = getattr(config, "num_mel_bins", None)
        batch["input_values"] = torch.randn(BATCH, 2000) if bins is None else torch.randn(BATCH, 16, bins)
    if "input_features" in names and first == "input_features":
        batch["input_features"] = torch.randn(BATCH, 16, getattr(config, "num_mel_bins", None) or 8)
    if "bbox" in names:
        batch["bbox"] = torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)
    if "decoder_input_ids" in names:
        batch["decoder_input_ids"] = ids()
    if "grid_thw" in names:
        batch = patches(config, "hidden_states" if "hidden_states" in names else "pixel_values")
        if "merge_sizes" in names:
            batch["merge_sizes"] = torch.ones(2, dtype=torch.long)
    if getattr(config, "vision_config", None) is not None and first == "input_ids" and "pixel_values" in names:
        return with_images(model, batch) if "pixel_values" not in batch else batch
    return batch


def patches(config, name: str) -> dict:
    """Two images of 4 x 4 patches, flattened one after the other."""
    size = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    frames = getattr(config, "temporal_patch_size", 1)
    channels = getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return {name: torch.randn(32, channels * frames * size**2), "grid_thw": grid}


def with_images(model, batch: dict) -> dict:
    """A batch of texts with one image each, if the model takes one; how many tokens that is, is found by trying."""
    config, ids = model.config, batch["input_ids"]
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    vision = config.vision_config
    forms = [{"pixel_values": images(config)}]
    if "image_grid_thw" in inspect.signature(model.forward).parameters:
        pixels = patches(vision, "pixel_values")
        forms = [{"pixel_values": pixels["pixel_values"], "image_grid_thw": pixels["grid_thw"]}]
    for form in forms if token is not None else []:
        for count in (4, 16, 17, 1, 8, 2, 64):
            text = torch.cat([torch.full((BATCH, count), token), ids], 1)
            try:
                with torch.no_grad():
                    model(input_ids=text, **form)
            except Exception:  # so many are not what the model makes of an image
                continue
            return {"input_ids": text} | form
    return batch


_WITH_IMAGES = {
    "clip", "siglip", "siglip2", "align", "altclip", "chinese_clip", "clipseg", "blip", "flava", "git", "owlvit",
    "owlv2", "vilt", "bridgetower", "groupvit", "metaclip_2", "xclip", "tipsv2", "aimv2", "clap", "videoprism",
    "vision-text-dual-encoder", "sam3", "sam3_lite_text",
}  # fmt: skip


def _size(config) -> int:
    if config.model_type in IMAGE_SIZES:
        return IMAGE_SIZES[config.model_type]
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or getattr(vision, "crop_size", None) or 32
    return size if isinstance(size, int) else size[0]


def images(config):
    """[2, C, S, S] random images of the size that a model wants."""
    vision = getattr(config, "vision_config", None) or config
    return torch.randn(BATCH, getattr(vision, "num_channels", 3) or 3, _size(config), _size(config))
