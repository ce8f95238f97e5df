"""Any pipeline is called as an unquantized one is: arguments, steps, outputs; what would be ignored is refused."""

import pytest
import torch

from quant_core import GenerateRequest, LoadRequest, SpecError, generate, load_pipeline, parse_plan

SIZES = {"pixart": 16, "sd": 16, "sd3": 16, "wan": 32, "zimage": 32}
PLAN = parse_plan("torchao/int8wo")


@pytest.fixture(scope="module")
def pipelines(tiny):
    """Name -> loaded pipeline, quantized."""
    loaded = {}

    def pipeline(name):
        if name not in loaded:
            loaded[name] = load_pipeline(LoadRequest("demo" if name == "demo" else str(tiny(name)), PLAN))
        return loaded[name]

    return pipeline


def request(name, steps=3, **settings):
    side = SIZES.get(name, 128)
    extra = {"num_frames": 5} if name == "wan" else {}
    if name == "pixart":
        extra = {"use_resolution_binning": False}
    return GenerateRequest("a cat", width=side, height=side, steps=steps, extra=extra, **settings)


@pytest.mark.parametrize("name", SIZES)
def test_every_step_is_reported_and_a_stop_leaves_the_pipeline_usable(pipelines, name):
    pipeline = pipelines(name)
    expected = generate(pipeline, request(name))
    steps = []
    assert torch.equal(generate(pipeline, request(name), lambda step: steps.append((step.done, step.total))), expected)
    assert steps == [(1, 3), (2, 3), (3, 3)]

    class Interrupt(BaseException):
        """As ComfyUI's is."""

    def stop(step):
        steps.append((step.done, step.total))
        if step.done == 2:
            raise Interrupt

    steps.clear()
    with pytest.raises(Interrupt):
        generate(pipeline, request(name), stop)
    assert steps == [(1, 3), (2, 3)]
    assert torch.equal(generate(pipeline, request(name)), expected)


def test_pixart_has_no_callback_and_wan_has():
    from inspect import signature

    from diffusers import PixArtSigmaPipeline, WanPipeline

    assert "callback_on_step_end" not in signature(PixArtSigmaPipeline.__call__).parameters
    assert "callback_on_step_end" in signature(WanPipeline.__call__).parameters


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", SIZES)
def test_images_and_frames_are_channels_last_in_any_grad_mode(pipelines, name, mode):
    with mode():
        images = generate(pipelines(name), request(name, steps=1))
    side = SIZES[name]
    assert images.shape == (5 if name == "wan" else 1, side, side, 3)
    assert images.dtype == torch.float32 and images.device.type == "cpu" and images.is_contiguous()
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1
    assert not images.requires_grad


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"prompt": ["a cat", "a dog"]}, 2),
        ({"images_per_prompt": 3}, 3),
        ({"prompt": ["a cat", "a dog"], "images_per_prompt": 2}, 4),
    ],
)
def test_several_prompts_and_several_images_of_each(pipelines, settings, count):
    from dataclasses import replace

    images = generate(pipelines("sd3"), replace(request("sd3", steps=1), **settings))
    assert images.shape == (count, 16, 16, 3)
    assert len({image.numpy().tobytes() for image in images}) == count


def test_latents_are_what_the_pipeline_leaves(pipelines):
    pipeline = pipelines("sd3")
    latents = generate(pipeline, request("sd3", output="latents"))
    assert latents.shape == (1, 4, 8, 8) and latents.isfinite().all()
    vae = pipeline.pipe.vae
    with torch.no_grad():
        decoded = vae.decode((latents.to(vae.dtype) / vae.config.scaling_factor) + vae.config.shift_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
    assert torch.equal(generate(pipeline, request("sd3")), expected)
    video = generate(pipelines("wan"), request("wan", output="latents"))
    assert video.shape == (1, 16, 2, 4, 4)


@pytest.mark.parametrize(
    ("name", "settings", "changes"),
    [
        ("sd", {"negative_prompt": "a dog"}, True),
        ("sd", {"guidance": 1.5}, True),
        ("sd", {"seed": 1}, True),
        ("sd", {"negative_prompt": ""}, False),
        ("sd3", {"max_sequence_length": 8}, True),
        ("demo", {"negative_prompt": "a dog", "extra": {"true_cfg_scale": 3.0}}, True),
    ],
)
def test_settings_reach_the_pipeline(pipelines, name, settings, changes):
    plain = generate(pipelines(name), request(name, steps=2))
    side = SIZES.get(name, 128)
    other = generate(pipelines(name), GenerateRequest("a cat", width=side, height=side, steps=2, **settings))
    assert torch.equal(plain, other) != changes


REFUSED = [
    ("sd3", {"extra": {"num_frame": 3}}, "StableDiffusion3Pipeline takes no num_frame; it takes: clip_skip, "),
    ("sd3", {"extra": {"guidance_rescal": 3}}, "StableDiffusion3Pipeline takes no guidance_rescal"),
    ("sd", {"extra": {"clip_skp": 1}}, "takes no clip_skp (did you mean 'clip_skip'?); it takes: "),
    ("sd", {"max_sequence_length": 8}, "StableDiffusionPipeline takes no max_sequence_length"),
    ("wan", {"images_per_prompt": 2}, "WanPipeline takes no images_per_prompt"),
    ("demo", {"extra": {"negative_prompt_2": "rain"}}, "ignores negative_prompt while true_cfg_scale is 1.0; set"),
    ("demo", {"extra": {"joint_attention_kwargs": 3}}, "joint_attention_kwargs is 3; FluxPipeline takes dict there."),
    (
        "demo",
        {"max_sequence_length": 4000},
        "FluxPipeline refuses the request: `max_sequence_length` cannot be greater",
    ),
    ("demo", {"width": 100}, "width is 100; FluxPipeline takes multiples of 16: 96 or 112."),
    ("demo", {"height": 8}, "height is 8; FluxPipeline takes multiples of 16: 16."),
    ("demo", {"negative_prompt": "rain"}, "ignores negative_prompt while true_cfg_scale is 1.0; set"),
    ("demo", {"negative_prompt": "rain", "extra": {"true_cfg_scale": 1}}, "ignores negative_prompt while true_cfg_"),
    ("demo", {"guidance": 3.5}, "This FluxTransformer2DModel ignores guidance (guidance_embeds is false); "),
]


@pytest.mark.parametrize(("name", "settings", "sentence"), REFUSED, ids=range(len(REFUSED)))
def test_arguments_that_mean_nothing_to_the_pipeline_are_refused(pipelines, name, settings, sentence):
    with pytest.raises(SpecError) as error:
        generate(pipelines(name), GenerateRequest("a cat", steps=1, **settings))
    assert sentence in str(error.value) and str(error.value).endswith(".")
    for ours in ("generator", "output_type", "callback", "self", "kwargs"):
        assert f" {ours}," not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": 0}, "steps is 0; it takes a whole number from 1 to 10000."),
        ({"width": 12.5}, "width is 12.5; it takes a whole number from 1 to 16384."),
        ({"images_per_prompt": True}, "images_per_prompt is True; it takes a whole number from 1 to 64."),
        ({"guidance": float("nan")}, "guidance is nan; it takes a number of at least 0."),
        ({"extra": {"true_cfg_scale": float("nan")}}, "true_cfg_scale is nan; it takes a finite number."),
        (
            {"extra": {"sigmas": []}},
            "sigmas says how many steps there are; give at least one, and no steps beside it.",
        ),
        ({"extra": {"sigmas": ["a"]}}, "sigmas is ['a']; it takes a list of finite numbers."),
        ({"extra": {"sigmas": [float("nan")]}}, "sigmas is [nan]; it takes a list of finite numbers."),
        ({"extra": {"sigmas": 1.0}}, "sigmas is 1.0; it takes a list of finite numbers."),
        ({"extra": {"timesteps": [[999]]}}, "timesteps is [[999]]; it takes a list of finite numbers."),
        ({"prompt": []}, "prompt is []; it takes a text or a list of texts."),
        ({"seed": -1}, "seed is -1; it takes a whole number from 0 to 2**64 - 1."),
        ({"seed": 2**64}, f"seed is {2**64}; it takes a whole number from 0 to 2**64 - 1."),
        ({"output": "video"}, "output is 'video'; use one of: images, latents."),
        ({"extra": {"generator": 1}}, "generator is set by the engine and cannot be given."),
        ({"extra": {"callback_on_step_end": print}}, "callback_on_step_end is set by the engine and cannot be given."),
        ({"extra": {"callback_on_step_end_tensor_inputs": ["latents"]}},)
        + ("callback_on_step_end_tensor_inputs is set by the engine and cannot be given.",),
        ({"extra": {"num_inference_steps": 3}}, "num_inference_steps cannot be an extra argument; give it as steps."),
        ({"extra": {"prompt": "a"}}, "prompt cannot be an extra argument; give it as prompt."),
    ],
)
def test_a_wrong_request_is_told_so_when_it_is_made(settings, sentence):
    with pytest.raises(SpecError) as error:
        GenerateRequest(**{"prompt": "a cat"} | settings)
    assert str(error.value) == sentence


def test_sigmas_are_the_steps(pipelines):
    totals = []
    settings = {"width": 128, "height": 128, "extra": {"sigmas": [1, 0.2]}}
    generate(pipelines("demo"), GenerateRequest("a cat", **settings), lambda step: totals.append(step.total))
    assert totals == [2, 2]


def test_the_largest_seed_is_a_seed(pipelines):
    first, last = (generate(pipelines("sd"), request("sd", steps=1, seed=seed)) for seed in (0, 2**64 - 1))
    assert not torch.equal(first, last)
