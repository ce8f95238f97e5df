"""A decode that would not fit its device works in tiles, in that run alone, and says so."""

import logging
from dataclasses import replace
from types import MethodType

import pytest
import torch

from quant_core import QuantError, generate, needs
from quant_core.metrics import psnr
from quant_core.tiling import tiled

from .simulated_device import Card, manage
from .small_requests import load, small

SIDE = {"demo": 256, "sd": 64, "wan": 320}  # pixels, of which each VAE makes several tiles


def request(name, side=None):
    return replace(small(name), width=side or SIDE[name], height=side or SIDE[name])


def hosted(tiny, name, room):
    """A pipeline whose host knows what it needs; `room` is a share of what the VAE needs as a whole."""
    pipeline = load(tiny, name)

    def begin(self, request):
        self.begun = getattr(self, "begun", 0) + 1
        self.activations.clear()
        self.activations.update(needs(self, request))

    pipeline.begin = MethodType(begin, pipeline)
    manage(pipeline, Card())
    whole = needs(pipeline, request(name))["vae"] + pipeline.placements["vae"].size
    pipeline.room = room and int(whole * room)
    return pipeline, whole


def decodes(pipeline):
    """The shapes that the VAE's decoder gets."""
    shapes = []
    pipeline.pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


def settings(pipeline):
    return {name: value for name, value in vars(pipeline.pipe.vae).items() if "til" in name}


@pytest.mark.parametrize("name", SIDE)
@pytest.mark.parametrize("room", [None, 1])
def test_what_fits_or_may_fit_is_as_ever(tiny, name, room, caplog):
    expected = generate(load(tiny, name), request(name))
    pipeline, _ = hosted(tiny, name, room)
    with caplog.at_level(logging.INFO):
        assert torch.equal(generate(pipeline, request(name)), expected)
    assert pipeline.begun == 1 and "tiles" not in caplog.text


@pytest.mark.parametrize("name", SIDE)
def test_what_does_not_fit_is_decoded_in_tiles_and_nothing_of_that_stays(tiny, name, caplog):
    expected = generate(load(tiny, name), request(name))
    pipeline, whole = hosted(tiny, name, 0.6)
    before, shapes, asked = settings(pipeline), decodes(pipeline), []
    prepare = pipeline.prepare
    pipeline.prepare = lambda name: asked.append((name, pipeline.activations["vae"])) or prepare(name)
    with caplog.at_level(logging.INFO):
        found = generate(pipeline, request(name))
    assert len(shapes) > 4 and len({shape[-1] for shape in shapes}) <= 2
    (line,) = [record.getMessage() for record in caplog.records if "tiles" in record.getMessage()]
    assert line.startswith("vae works in tiles in this run") and line.count("iB") == 3
    assert pipeline.notices == [line]
    needed = dict(asked)["vae"]
    assert 0 < needed < whole * 0.7, "the host is asked for the room that a tile needs"
    assert settings(pipeline) == before and not pipeline.pipe.vae.use_tiling
    assert found.shape == expected.shape and not torch.equal(found, expected)
    pipeline.room = None
    assert torch.equal(generate(pipeline, request(name)), expected)


def test_a_picture_made_in_tiles_is_near_the_one_made_as_a_whole(tiny):
    """Also where even tiles do not fit, which are the best that can be done."""
    scene = replace(request("demo", 192), prompt="a lake at noon", steps=8, seed=7, extra={"true_cfg_scale": 3.0})
    pipeline, _ = hosted(tiny, "demo", None)
    expected, shapes = generate(pipeline, scene), decodes(pipeline)
    pipeline.room = 1
    assert psnr(generate(pipeline, scene), expected) > 20 and len(shapes) == 4


class Cancelled(BaseException):
    pass


@pytest.mark.parametrize("error", [Cancelled, torch.OutOfMemoryError, ValueError])
def test_an_error_or_a_cancel_in_a_tile_takes_tiling_back(tiny, error):
    pipeline, _ = hosted(tiny, "demo", 0.6)
    before, count = settings(pipeline), []

    def stop(*_):
        count.append(pipeline.pipe.vae.use_tiling)
        if len(count) == 2:
            raise error("stop")

    hook = pipeline.pipe.vae.decoder.register_forward_pre_hook(stop)
    told = QuantError if error is ValueError else error  # a sentence stands in for what a library raises
    with pytest.raises(told, match="stop"):
        generate(pipeline, request("demo"))
    hook.remove()
    assert count == [True, True] and settings(pipeline) == before


def test_tiles_are_made_smaller_where_the_vae_s_own_do_not_fit(tiny):
    pipeline, whole = hosted(tiny, "demo", 0.6)
    vae = pipeline.pipe.vae
    vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 64  # larger than the picture
    before, shapes = settings(pipeline), decodes(pipeline)
    generate(pipeline, request("demo", 384))
    assert {shape[-1] for shape in shapes} == {32, 24} and settings(pipeline) == before


@pytest.mark.parametrize("why", ["it has no tiles", "tiles take no less", "the user tiles"])
def test_a_vae_that_gains_nothing_by_tiles_is_left_alone(tiny, why, caplog):
    pipeline, _ = hosted(tiny, "demo", 0.6)
    vae = pipeline.pipe.vae
    if why == "it has no tiles":
        del vae.use_tiling
        vae.enable_tiling = None
        vae.decode = lambda *args, **kwargs: None
        before = settings(pipeline)
        pipeline.begin(request("demo"))
        with tiled(pipeline, request("demo")):
            assert settings(pipeline) == before
    elif why == "tiles take no less":
        vae.tile_sample_min_size, vae.tile_latent_min_size = 1001, 125
        before, shapes = settings(pipeline), decodes(pipeline)
        generate(pipeline, request("demo"))
        assert [shape[-1] for shape in shapes] == [32] and settings(pipeline) == before
    else:
        vae.enable_tiling()
        pipeline.begin(request("demo"))
        pipeline.room = 1
        with tiled(pipeline, request("demo")):
            assert vae.use_tiling
        assert vae.use_tiling
    assert "tiles" not in caplog.text
