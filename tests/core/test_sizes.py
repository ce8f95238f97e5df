"""A size or a number of frames that a pipeline would round or replace is refused, or else told of."""

import inspect
from dataclasses import replace

import diffusers
import pytest
import torch

from quant_core import GenerateRequest, SpecError, generate, sizes
from quant_core.request import call_arguments
from quant_core.sizes import keeping_size, notices_of_size

from .small_requests import load, small

ROUNDED = [
    ("wan", {"extra": {"num_frames": 6}}, "num_frames is 6; WanPipeline takes one more than a multiple of 4: 5 or 9."),
    ("wan", {"extra": {"num_frames": 2}}, "num_frames is 2; WanPipeline takes one more than a multiple of 4: 1 or 5."),
    ("wan", {"width": 40}, "width is 40; WanPipeline takes multiples of 16: 32 or 48."),
    ("wan", {"height": 8}, "height is 8; WanPipeline takes multiples of 16: 16."),
    ("sd3", {"height": 18}, "height is 18; StableDiffusion3Pipeline takes multiples of 4: 16 or 20."),
    ("pixart", {"width": 22}, "width is 22; PixArtSigmaPipeline takes multiples of 4: 20 or 24."),
    ("sd", {"width": 17}, "width is 17; StableDiffusionPipeline takes multiples of 2: 16 or 18."),
    ("kandinsky22", {"width": 30}, "width is 30; KandinskyV22CombinedPipeline takes multiples of 4: 28 or 32."),
]


@pytest.mark.parametrize(("name", "settings", "sentence"), ROUNDED)
def test_what_a_pipeline_would_round_is_refused_with_its_neighbours(pipelines, name, settings, sentence):
    with pytest.raises(SpecError) as error:
        call_arguments(pipelines(name), replace(small(name), **settings))
    assert str(error.value) == sentence
    for given in settings.values():
        near = [int(number) for number in sentence.rstrip(".").split(": ")[1].split(" or ")]
        for number in near:
            given = {"num_frames": number} if "extra" in settings else number
            call_arguments(pipelines(name), replace(small(name), **{next(iter(settings)): given}))


# How the pipelines of diffusers say that they round sides beyond what their parts do: by a function.
@pytest.mark.parametrize(
    ("name", "multiple"),
    [
        ("KandinskyPipeline", 64),
        ("KandinskyInpaintPipeline", 64),
        ("KandinskyV22Pipeline", 64),
        ("KandinskyV22ControlnetPipeline", 64),
        ("KandinskyV22InpaintPipeline", 64),
        ("Kandinsky3Pipeline", 64),  # by a number in its code
        ("StableDiffusionPipeline", 1),
        ("WanPipeline", 1),
    ],
)
def test_what_a_function_makes_of_sides_is_asked_of_it(name, multiple):
    pipe = object.__new__(getattr(diffusers, name))
    vars(pipe)["movq_scale_factor"] = 8
    assert sizes._fitted(pipe) == multiple


@pytest.mark.parametrize("side", [22, 17, 32])
def test_a_pipeline_that_scales_back_takes_any_size(pipelines, side):
    pipeline = pipelines("pixart")
    request = small("pixart", steps=1, extra={"use_resolution_binning": True})
    request = replace(request, width=side, height=18)
    sample_size = pipeline.pipe.transformer.config.sample_size
    pipeline.pipe.transformer.register_to_config(sample_size=32)  # of which there are bins
    try:
        assert generate(pipeline, request).shape == (1, 18, side, 3)
    finally:
        pipeline.pipe.transformer.register_to_config(sample_size=sample_size)
    assert pipeline.notices == []


def test_a_pipeline_that_takes_another_size_and_leaves_it_is_refused(tiny):
    pipeline, steps = load(tiny, "hunyuandit"), []
    with pytest.raises(SpecError) as error:
        generate(pipeline, GenerateRequest("a cat", width=512, height=512, steps=1), steps.append)
    assert str(error.value) == "HunyuanDiTPipeline makes width 1024, height 1024 of width 512, height 512; " + (
        "ask for what it makes."
    )
    assert not steps


# How the pipelines of diffusers say that they round: by a number of their own, or in their latents.
@pytest.mark.parametrize(
    ("name", "attribute", "rounds"),
    [
        ("WanPipeline", "vae_scale_factor_temporal", True),
        ("SkyReelsV2Pipeline", "vae_scale_factor_temporal", True),
        ("Kandinsky5T2VPipeline", "vae_scale_factor_temporal", True),
        ("CogVideoXPipeline", "vae_scale_factor_temporal", True),
        ("HunyuanVideoPipeline", "vae_scale_factor_temporal", True),
        ("LTXPipeline", "vae_temporal_compression_ratio", True),
        ("MochiPipeline", "vae_temporal_scale_factor", True),
        ("SanaVideoPipeline", "vae_scale_factor_temporal", True),
        ("AllegroPipeline", "vae_scale_factor_temporal", False),  # takes any even number, too
        ("HeliosPipeline", "vae_scale_factor_temporal", False),  # in chunks; its own 132 is none of these
        ("AnimateDiffPipeline", "vae_scale_factor", False),
    ],
)
def test_whether_frames_are_rounded_is_asked_of_the_pipeline_s_code(name, attribute, rounds):
    pipe = object.__new__(getattr(diffusers, name))
    vars(pipe)[attribute] = 6
    parameters = inspect.signature(type(pipe).__call__).parameters
    default = next(parameters[word].default for word in sizes._FRAMES if word in parameters)
    default = 19 if isinstance(default, int) and name != "HeliosPipeline" else default
    assert sizes._frame_factor(pipe, default) == (6 if rounds else None)


@pytest.fixture
def kontext(tiny):
    """The demo as a pipeline that takes sizes of about a megapixel, whatever it is asked for."""
    pipeline = load(tiny, "demo")
    pipeline.pipe = diffusers.FluxKontextPipeline(**pipeline.pipe.components)
    return pipeline


def test_a_size_that_a_pipeline_replaces_is_refused_before_the_first_step(kontext):
    steps = []
    with pytest.raises(SpecError) as error:
        generate(kontext, small("demo"), steps.append)
    assert str(error.value) == "FluxKontextPipeline makes width 1024, height 1024 of width 32, height 32; " + (
        "ask for what it makes."
    )
    assert not steps and "prepare_latents" not in vars(kontext.pipe)
    assert generate(kontext, small("demo", extra={"max_area": 32 * 32})).shape == (1, 32, 32, 3)
    assert kontext.notices == []


class Pipe:
    """Makes latents of the size that `made` says."""

    def __init__(self, made):
        self.made = made

    def prepare_latents(self, width, height):
        return width, height

    def __call__(self, width=None, height=None):
        return self.prepare_latents(*self.made), self.prepare_latents(height=1, width=1)


class Binning(Pipe):
    def __call__(self, width=None, height=None, use_resolution_binning=False):
        return self.resize_and_crop_tensor(super().__call__(width, height))

    def resize_and_crop_tensor(self, picture):
        return picture


def test_latents_of_the_size_asked_for_or_a_part_of_it_are_right():
    for made, asked in (((64, 32), (64, 32)), ((8, 4), (64, 32))):
        pipe = Pipe(made)
        with keeping_size(pipe, dict(zip(("width", "height"), asked, strict=True))):
            assert pipe() == (made, (1, 1)), "only the first are the picture's"
    scaled_back = Binning((64, 64))
    with keeping_size(scaled_back, {"width": 60, "use_resolution_binning": True}):
        assert scaled_back()
    with pytest.raises(SpecError, match="makes width"), keeping_size(scaled_back, {"width": 60}):
        scaled_back()
    for made in ((64, 64), (16, 32), (60, 4)):
        pipe = Pipe(made)
        with pytest.raises(SpecError, match="makes width"), keeping_size(pipe, {"width": 60, "height": 32}):
            pipe()
        assert "prepare_latents" not in vars(pipe)


def test_a_result_that_is_not_what_was_asked_is_told(pipelines, monkeypatch):
    pipeline = pipelines("wan")
    monkeypatch.setattr(sizes, "_frame_factor", lambda *_: None)
    assert len(generate(pipeline, small("wan", prompt=["a", "b"], steps=1, extra={"num_frames": 6}))) == 10
    assert pipeline.notices == ["WanPipeline made num_frames 5, not num_frames 6 as was asked."]
    generate(pipeline, small("wan", steps=1))
    assert pipeline.notices == []


def test_only_what_was_asked_is_compared():
    images = torch.zeros(3, 24, 32, 3)
    assert list(notices_of_size(images, "Pipe", {"width": 32, "prompt": "a", "num_frames": None})) == []
    asked = {"width": 32, "height": 16, "frames": 4, "prompt": "a"}
    assert list(notices_of_size(images, "Pipe", asked)) == [
        "Pipe made height 24, frames 3, not height 16, frames 4 as was asked."
    ]


def test_an_estimate_refuses_what_a_run_does():
    from quant_core import LoadRequest, estimate

    with pytest.raises(SpecError, match="width is 40; FluxPipeline takes multiples of 16: 32 or 48."):
        estimate(LoadRequest("demo"), GenerateRequest("a", width=40))
