"""Tiny random vision-language models over supported text models, by `config.model_type`."""

import copy
from functools import lru_cache

import families
import torch
from tiny_models import VOCAB, prompt
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

IMAGE = VOCAB + 1
"""Token that stands for a piece of an image; the next ones delimit images or are for videos."""
_TEXT = families.BASE | {"vocab_size": VOCAB + 8}
_SMALL = {"hidden_size": 32, "intermediate_size": 32}
_VIT = _SMALL | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
_CLIP = _VIT | {"model_type": "clip_vision_model", "projection_dim": 32}
_SIGLIP = _VIT | {"model_type": "siglip_vision_model"}
_QWEN = _SMALL | {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN3 = _QWEN | {"out_hidden_size": 128, "num_position_embeddings": 16}
_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": IMAGE + 1,
    "vision_start_token_id": IMAGE + 2,
    "vision_end_token_id": IMAGE + 3,
}


def _over(text, **options):
    """Text configuration of another family."""
    return _TEXT | {"model_type": text} | options


def _rope(sections, **options):
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
        | options
    }


def _pixels():
    return {"pixel_values": torch.randn(1, 3, 16, 16)}


def _sized():
    return _pixels() | {"image_sizes": torch.tensor([[16, 16]])}


def _tiles():
    return {"pixel_values": torch.randn(1, 2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}


def _images():
    return {"pixel_values": torch.randn(1, 1, 3, 16, 16)}


def _grid():
    return {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}


def _packed():
    return {
        "pixel_values": torch.randn(1, 16, 48),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }


_MROPE = _TEXT | _rope([8, 12, 12])
_PINPOINTS = {"image_token_index": IMAGE, "image_grid_pinpoints": [[16, 16]]}
_MISTRAL = _over("mistral", sliding_window=None)
_COHERE2 = _over("cohere2", **families.WINDOWS["cohere2"])
_DOWNSAMPLED = {"downsample_factor": 2, "alignment_intermediate_size": 32}

# family: (text configuration, vision configuration, further options, inputs of an image, its tokens)
SPECS = {
    "aya_vision": (_COHERE2, _SIGLIP, _DOWNSAMPLED | {"image_token_index": IMAGE}, _pixels, 4),
    "cohere2_vision": (_COHERE2, _SIGLIP, _DOWNSAMPLED | {"image_token_id": IMAGE}, _pixels, 4),
    "gemma3": (
        _TEXT | families.WINDOWS["cohere2"],
        _SIGLIP,
        {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": IMAGE + 1}
        | {"eoi_token_index": IMAGE + 2},
        _pixels,
        4,
    ),
    "glm4v": (
        _TEXT | _rope([4, 6, 6], partial_rotary_factor=0.5),
        _QWEN | {"out_hidden_size": 128, "image_size": 16},
        {"image_token_id": IMAGE, "image_start_token_id": IMAGE + 2, "image_end_token_id": IMAGE + 3},
        _grid,
        4,
    ),
    "idefics3": (_over("llama"), _VIT, {"image_token_id": IMAGE, "scale_factor": 2}, _images, 4),
    "internvl": (
        _over("qwen2"),
        _VIT | {"model_type": "internvl_vision", "image_size": [16, 16], "patch_size": [4, 4]},
        {"image_token_id": IMAGE, "downsample_ratio": 0.5},
        _pixels,
        4,
    ),
    "lfm2_vl": (
        _over("lfm2", **families.STATES["lfm2"]),
        _SMALL
        | {"model_type": "siglip2_vision_model", "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"patch_size": 4, "num_patches": 16},
        {"image_token_id": IMAGE, "downsample_factor": 2, "projector_hidden_size": 32},
        _packed,
        4,
    ),
    "llava": (_over("llama"), _CLIP, {"image_token_index": IMAGE, "image_seq_length": 16}, _pixels, 16),
    "llava_next": (_MISTRAL, _CLIP, _PINPOINTS, _tiles, 36),
    "llava_onevision": (
        _over("qwen2"),
        _SIGLIP | {"vision_use_head": False},
        _PINPOINTS
        | {"video_token_index": IMAGE + 1, "vision_feature_layer": -1}
        | {"vision_feature_select_strategy": "full"},
        _tiles,
        36,
    ),
    "mistral3": (
        _MISTRAL,
        _VIT | {"model_type": "pixtral", "head_dim": 16},
        {"image_token_index": IMAGE, "spatial_merge_size": 2},
        _sized,
        4,
    ),
    "qwen2_5_vl": (
        _MROPE,
        _QWEN | {"out_hidden_size": 128, "fullatt_block_indexes": [1], "window_size": 8},
        _TOKENS,
        _grid,
        4,
    ),
    "qwen2_vl": (_MROPE, _QWEN | {"embed_dim": 32, "hidden_size": 128, "mlp_ratio": 2}, _TOKENS, _grid, 4),
    "qwen3_5": (_MROPE | families.STATES["qwen3_5_text"] | {"head_dim": 64}, _QWEN3, _TOKENS, _grid, 4),
    "qwen3_vl": (_MROPE, _QWEN3 | {"deepstack_visual_indexes": [0]}, _TOKENS, _grid, 4),
    "qwen3_vl_moe": (
        _MROPE | families.EXPERTS["dots1"],
        _QWEN3 | {"deepstack_visual_indexes": [0]},
        _TOKENS,
        _grid,
        4,
    ),
    "smolvlm": (_over("llama"), _VIT, {"image_token_id": IMAGE, "scale_factor": 2}, _images, 4),
    "vipllava": (
        _over("llama"),
        _CLIP,
        {"image_token_index": IMAGE, "image_seq_length": 16, "vision_feature_layers": [-2, -1]},
        _pixels,
        16,
    ),
}


def available(family):
    """Whether this version of transformers has the family; the newest has all of them."""
    return family in CONFIG_MAPPING


@lru_cache(maxsize=4)
def pair(family):
    """(untouched model, equal model to be used with the cache), shared between tests."""
    text, vision, options, _, _ = SPECS[family]
    config = CONFIG_MAPPING[family](text_config=text, vision_config=vision, **options)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.15)
    return model, copy.deepcopy(model)


def image_prompt(family, seed=0):
    """(token ids [1, n] with an image among them, what the model takes beside them)."""
    *_, inputs, tokens = SPECS[family]
    torch.manual_seed(seed)
    ids = torch.cat((prompt(10), torch.full((1, tokens), IMAGE), prompt(20, seed=2)), 1)
    options = inputs()
    if family == "gemma3":
        options["token_type_ids"] = (ids == IMAGE).long()
    elif inputs is _grid:
        options["mm_token_type_ids"] = (ids == IMAGE).long()
    return ids, options
