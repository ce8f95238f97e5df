"""Whatever is written to a pipeline or to what it holds is taken back, however that ends."""

import copy
from contextlib import suppress

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from quant_core import generate
from quant_core.inspection import stored_tensors
from quant_core.transfer import adopt, copies
from quant_core.unchanged import unchanged

from .simulated_device import CPU, Card, manage, resident
from .small_requests import load, small
from .test_moving import SCHEMES, assert_same, stored


def add_hook(module):
    module.register_forward_hook(lambda *_: None)


def set_attribute(name, value):
    return lambda part: setattr(part, name, value)


def cut(tokenizer):
    tokenizer(["a cat"], padding="max_length", max_length=8, truncation=True, return_tensors="pt")


def guide(denoiser):
    """As diffusers' guiders do."""
    config = diffusers.LayerSkipConfig(indices=[0], fqn="mid_block.attentions", skip_attention=False, skip_ff=True)
    diffusers.hooks.apply_layer_skip(denoiser, config)


def weights(module):
    return [(id(tensor), tensor.dtype, tensor.data_ptr()) for tensor in module.state_dict(keep_vars=True).values()]


def to_float32(module):
    module.to(torch.float32)


WRITES = {  # -> component, none for the pipeline; what is written; what must be as before
    "an attribute of the pipeline": ("", set_attribute("_guidance_scale", 3), lambda pipe: dict(vars(pipe))),
    "another component": ("", set_attribute("unet", None), lambda pipe: [pipe.unet]),
    "an attribute that goes": (
        "unet",
        lambda unet: vars(unet).pop("_internal_dict"),
        lambda unet: "_internal_dict" in vars(unet),
    ),
    "a pipeline's config": ("", lambda pipe: pipe.register_to_config(some=1), lambda pipe: dict(pipe.config)),
    "the scheduler's steps": ("scheduler", lambda part: part.set_timesteps(3), lambda part: len(part.timesteps)),
    "an entry of a config": (
        "scheduler",
        lambda part: setattr(part.config, "clip_sample", 7),
        lambda part: part.config.clip_sample,
    ),
    "an item of a config": (
        "scheduler",
        lambda part: part.config.__setitem__("clip_sample", 7),
        lambda part: part.config["clip_sample"],
    ),
    "the side of a tokenizer": ("tokenizer", set_attribute("padding_side", "left"), lambda part: part.padding_side),
    "what a tokenizer cuts": ("tokenizer", cut, lambda part: (part._tokenizer.truncation, part._tokenizer.padding)),
    "attention processors": (
        "unet",
        lambda unet: unet.set_attn_processor(AttnProcessor()),
        lambda unet: list(unet.attn_processors.values()),
    ),
    "more weights": ("unet", lambda unet: unet.fuse_qkv_projections(), lambda unet: list(unet.state_dict())),
    "a layer": ("unet", lambda unet: unet.set_submodule("conv_out", nn.Identity()), lambda unet: [unet.conv_out]),
    "a hook": ("unet", lambda unet: add_hook(unet.mid_block), lambda unet: list(unet.mid_block._forward_hooks)),
    "diffusers' hooks": ("unet", guide, lambda unet: [hasattr(part, "_diffusers_hook") for part in unet.modules()]),
    "a buffer": (
        "unet",
        lambda unet: unet.register_buffer("seen", torch.ones(1)),
        lambda unet: [name for name, _ in unet.named_buffers()],
    ),
    "a mode": ("vae", lambda vae: vae.train(), lambda vae: vae.decoder.training),
    "tiling": ("vae", lambda vae: vae.enable_tiling(), lambda vae: vae.use_tiling),
    "a dtype": ("vae", to_float32, weights),
    "a dtype and back": ("vae", lambda vae: vae.float().to(torch.float16).to(torch.bfloat16), weights),
    "a dtype of a part": ("vae", lambda vae: vae.decoder.mid_block.half(), weights),
    "weights": ("vae", lambda vae: setattr(vae.decoder.conv_in, "weight", nn.Parameter(torch.ones(1))), weights),
}


@pytest.fixture(scope="module")
def pipeline(pipelines):
    return pipelines("sd")


@pytest.fixture(scope="module")
def placed(tiny):
    """With all weights on a device."""
    found = load(tiny, "sd")
    manage(found, Card())
    generate(found, small("sd"))
    return found


def all_there(pipeline):
    for placement in pipeline.placements.values():
        placement.load(placement.size)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["pipeline", "placed"])
@pytest.mark.parametrize("what", WRITES)
def test_what_is_written_is_taken_back(what, kind, error, request):
    pipeline = request.getfixturevalue(kind)
    name, write, read = WRITES[what]
    part = getattr(pipeline.pipe, name) if name else pipeline.pipe

    def now():
        if pipeline.placements and read is weights:
            pipeline.placements[name].evict()  # it is the weights at home that are put back
        return read(part)

    before, sizes = now(), {key: placement.size for key, placement in pipeline.placements.items()}
    all_there(pipeline)
    changed = []
    with suppress(RuntimeError, KeyboardInterrupt), unchanged(pipeline.pipe, pipeline.placements.values()):
        write(part)
        changed.append(read(part) != before)
        if error:
            raise error
    assert changed == [True]
    assert now() == before
    assert {key: placement.size for key, placement in pipeline.placements.items()} == sizes


def test_copies_of_weights_that_were_not_changed_stay_where_they_are(placed):
    all_there(placed)
    copied, there = weights(placed.pipe.unet), resident(placed)
    with unchanged(placed.pipe, placed.placements.values()):
        placed.pipe.vae.to(torch.float32)
    assert weights(placed.pipe.unet) == copied
    assert resident(placed) == there - placed.placements["vae"].size > 0


def test_a_pipeline_inside_of_a_pipeline_is_taken_back_too(pipeline):
    inner = diffusers.AudioPipelineOutput(audios=[1])  # any object of the library that holds another
    outer = copy.copy(pipeline.pipe)
    outer.inner, inner.scheduler = inner, copy.deepcopy(pipeline.pipe.scheduler)
    steps = len(inner.scheduler.timesteps)
    with unchanged(outer):
        inner.scheduler.set_timesteps(3)
        inner.audios.append(2)
        inner.new = 1
    assert len(inner.scheduler.timesteps) == steps and inner.audios == [1] and not hasattr(inner, "new")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weights_that_were_changed_are_the_same_again(tiny, scheme):
    """By a change of dtype, which quanto's refuse, and by going into other memory, as those do that are locked."""
    pipeline = load(tiny, "sd3", scheme)
    module, request = pipeline.pipe.transformer, small("sd3", remember=False)
    before = stored(module)
    expected = generate(pipeline, request)
    for _ in range(2):
        if not scheme.startswith("quanto"):
            with unchanged(pipeline.pipe, pipeline.placements.values()):
                module.to(torch.float32)
            for placement in pipeline.placements.values():
                placement.evict()
            assert_same(module, before)
            assert torch.equal(generate(pipeline, request), expected)
        if not pipeline.placements:
            manage(pipeline, Card())
    for placement in pipeline.placements.values():
        placement.evict()
    objects, made = list(map(id, module.parameters())), []
    adopt(copies(module.modules(), lambda tensor: made.append(tensor.clone()) or made[-1], CPU))
    assert list(map(id, module.parameters())) == objects
    assert_same(module, before)
    places = {tensor.untyped_storage().data_ptr() for tensor in made}
    assert {tensor.untyped_storage().data_ptr() for tensor in stored_tensors(module)} <= places
    assert torch.equal(generate(pipeline, request), expected)
