"""What each class keeps in 16 bit: every pattern says something of the class, and all of them together keep little."""

import json
from functools import cache
from pathlib import Path

import diffusers
import pytest
from accelerate import init_empty_weights

from quant_core.layers import linear_layers, match_modules

LISTS = Path(__file__).resolve().parents[2] / "quant_core" / "skip_lists.json"
ENTRIES = json.loads(LISTS.read_text(encoding="utf-8"))
MOST = 0.15  # of a class's linear parameters

# The config that an entry's share is of, where it is not the class's default arguments; a small position table, which
# is no linear layer, makes a model quickly.
CONFIGS = {
    "AuraFlowTransformer2DModel": {"pos_embed_max_size": 64},
    "CogVideoXTransformer3DModel": {"num_attention_heads": 48, "num_layers": 42},
    "FluxTransformer2DModel": {"guidance_embeds": True},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "caption_channels": [4096, 4096],
        "axes_dims_rope": (64, 32, 32),
    },
    "Lumina2Transformer2DModel": {"cap_feat_dim": 2304},
    "OmniGenTransformer2DModel": {
        "rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48},
        "pos_embed_max_size": 16,
    },
    "PixArtTransformer2DModel": {"caption_channels": 4096, "use_additional_conditions": False},
    "SD3Transformer2DModel": {
        "caption_projection_dim": 2432,
        "num_attention_heads": 38,
        "num_layers": 38,
        "pos_embed_max_size": 16,
        "qk_norm": "rms_norm",
    },
    "UNet2DConditionModel": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# What adds the modules that some models of the class have and others lack.
ADDED = {
    "CosmosTransformer3DModel": {"use_crossattn_projection": True},
    "HunyuanImageTransformer2DModel": {"text_embed_2_dim": 1472},
    "LTX2VideoTransformer3DModel": {
        "cross_attn_mod": True,
        "audio_cross_attn_mod": True,
        "gated_attn": True,
        "audio_gated_attn": True,
    },
    "ZImageTransformer2DModel": {"siglip_feat_dim": 1152},
}
NAMES = sorted(ENTRIES)


@cache
def model_of(name, with_added):
    return make(name, CONFIGS.get(name, {}) | (ADDED[name] if with_added else {}))


def make(name, config):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    with init_empty_weights():
        return getattr(diffusers, name)(**config)


def weights(model):
    return {name: layer.weight.numel() for name, layer in linear_layers(model)}


def share_kept(model, patterns):
    sizes, matched = weights(model), match_modules(model, patterns)
    return sum(size for name, size in sizes.items() if name in matched) / sum(sizes.values())


def test_the_classes_stand_in_order_of_their_names():
    assert list(ENTRIES) == NAMES
    assert set(CONFIGS) | set(ADDED) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_has_patterns_a_share_and_the_sources_it_follows(name):
    entry = ENTRIES[name]
    assert set(entry) == {"skip", "share", "source", "note"}
    assert entry["skip"] and len(entry["skip"]) == len(set(entry["skip"]))
    assert all(isinstance(pattern, str) and pattern for pattern in entry["skip"])
    assert entry["source"].strip() and entry["note"].strip()


@pytest.mark.parametrize("name", NAMES)
def test_every_pattern_matches_a_linear_layer_that_no_other_does(name):
    model = model_of(name, name in ADDED)
    linear = weights(model).keys()
    matched = {pattern: match_modules(model, [pattern]) & linear for pattern in ENTRIES[name]["skip"]}
    for pattern, layers in matched.items():
        others = set().union(*(found for other, found in matched.items() if other != pattern))
        assert layers - others, pattern


@pytest.mark.parametrize("name", NAMES)
def test_the_list_keeps_the_share_that_its_entry_states_and_little(name):
    entry = ENTRIES[name]
    share = share_kept(model_of(name, False), entry["skip"])
    assert share == pytest.approx(entry["share"], abs=6e-5)
    assert 0 < share < MOST


@pytest.mark.parametrize("name", sorted(ADDED))
def test_the_list_keeps_little_of_a_model_with_the_added_modules_too(name):
    assert 0 < share_kept(model_of(name, True), ENTRIES[name]["skip"]) < MOST


def test_a_smaller_model_of_a_class_keeps_little_too():
    klein = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
    name = "Flux2Transformer2DModel"
    assert share_kept(make(name, klein | {"guidance_embeds": False}), ENTRIES[name]["skip"]) < MOST
    name = "UNet2DConditionModel"
    assert share_kept(make(name, {"cross_attention_dim": 768}), ENTRIES[name]["skip"]) < MOST
