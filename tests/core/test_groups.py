"""Groups of layers: every layer in one, and patterns that name each."""

import diffusers
import pytest
from accelerate import init_empty_weights

from quant_core.groups import FIRST, LAST, layer_groups, plain_patterns, single_layers
from quant_core.layers import linear_layers, match_modules

CLASSES = [
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "ZImageTransformer2DModel",
    "LTXVideoTransformer3DModel",
    "PixArtTransformer2DModel",
    "UNet2DConditionModel",
]


@pytest.fixture(scope="module", params=CLASSES)
def model(request):
    with init_empty_weights():
        return getattr(diffusers, request.param)()


def test_every_layer_is_in_one_group_and_no_group_is_empty(model):
    groups = layer_groups(model)
    grouped = [layer for group in groups for layer in group.layers]
    assert sorted(grouped) == sorted(name for name, _ in linear_layers(model))
    assert all(group.layers and group.patterns for group in groups)
    assert len({group.name for group in groups}) == len(groups)
    assert {FIRST, LAST, "embedders", "attention", "feed-forward"} <= {group.name for group in groups}


def test_the_first_pattern_that_matches_a_layer_is_its_groups(model):
    layers = {name for name, _ in linear_layers(model)}
    left = set(layers)
    for group in layer_groups(model):
        found = match_modules(model, group.patterns) & left
        assert found == set(group.layers), group.name
        left -= found
    assert not left


def test_plain_patterns_name_a_group_whatever_comes_before(model):
    layers = {name for name, _ in linear_layers(model)}
    for group in layer_groups(model):
        assert match_modules(model, plain_patterns(group, layers)) & layers == set(group.layers), group.name


def test_a_layer_belongs_to_what_it_does():
    with init_empty_weights():
        flux, unet = diffusers.FluxTransformer2DModel(), diffusers.UNet2DConditionModel()
    groups = {layer: group.name for group in layer_groups(flux) for layer in group.layers}
    assert groups["transformer_blocks.0.attn.to_q"] == FIRST
    assert groups["single_transformer_blocks.37.proj_out"] == LAST
    assert groups["transformer_blocks.18.attn.to_q"] == "attention"
    assert (
        groups["single_transformer_blocks.0.proj_out"]
        == groups["single_transformer_blocks.0.proj_mlp"]
        == "feed-forward"
    )
    assert groups["single_transformer_blocks.0.norm.linear"] == "modulation"
    assert groups["proj_out"] == groups["norm_out.linear"] == "output"
    assert groups["x_embedder"] == groups["time_text_embed.timestep_embedder.linear_1"] == "embedders"
    groups = {layer: group.name for group in layer_groups(unet) for layer in group.layers}
    assert groups["down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj"] == "feed-forward"
    assert groups["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"] == "attention"
    assert groups["mid_block.resnets.0.time_emb_proj"] == "modulation"


def test_of_few_blocks_none_stands_for_itself():
    with init_empty_weights():
        model = diffusers.SD3Transformer2DModel(num_layers=2)
    assert {FIRST, LAST}.isdisjoint(group.name for group in layer_groups(model))


def test_each_layer_alone():
    with init_empty_weights():
        model = diffusers.SD3Transformer2DModel(num_layers=2)
    groups = single_layers(model)
    assert [group.layers for group in groups] == [(name,) for name, _ in linear_layers(model)]
    assert all(group.patterns == group.layers == (group.name,) for group in groups)
