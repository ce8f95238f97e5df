"""What a pipeline's own code raises is one sentence of ours; what is a host's, ours or of memory goes out as it is."""

import importlib
import inspect
from contextlib import contextmanager

import diffusers
import numpy
import pytest
import torch
from PIL import Image

from quant_core import BackendUnavailable, DeviceUnsupported, QuantError, SpecError, generate, refusals
from quant_core.request import _check_types
from quant_core.results import check_makes_pictures, found_in, pictures, size_of

from .small_requests import load, small

PIPE = "StableDiffusionPipeline"


@contextmanager
def failing(pipeline, name, error):
    def fail(*_):
        raise error

    hook = pipeline.models[name].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


def raised(pipeline, name, error, on_step=None):
    with failing(pipeline, name, error), pytest.raises(BaseException) as found:
        generate(pipeline, small("sd", remember=False), on_step)
    return found.value


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (AttributeError("'NoneType' object has no attribute 'size'"), "AttributeError: 'NoneType' object has no attr"),
        (IndexError("index out of range in self"), "IndexError: index out of range in self."),
        (RuntimeError("shape '[2, 3]' is invalid\nand more"), "RuntimeError: shape '[2, 3]' is invalid."),
        (OverflowError("int too big"), "OverflowError: int too big."),
        (KeyError("size"), "KeyError: 'size'."),
        (NameError("name 'undefined_thing' is not defined"), "NameError: name 'undefined_thing' is not defined."),
        (NotImplementedError(), "NotImplementedError."),
        (ValueError("a height of 7"), "a height of 7."),
        (RuntimeError("x" * 1000), "RuntimeError: xxx"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_before_the_first_step_it_is_the_request_that_is_refused(pipelines, error, cause):
    found = raised(pipelines("sd"), "text_encoder", error)
    assert type(found) is SpecError and found.__cause__ is error
    assert str(found).startswith(f"{PIPE} refuses the request: {cause}") and len(str(found)) <= 300
    assert str(found).endswith(".") and not str(found).endswith("..")


def test_after_a_step_it_is_the_run_that_failed(pipelines):
    found = raised(pipelines("sd"), "safety_checker", RuntimeError("mat1 and mat2"))
    assert type(found) is QuantError and isinstance(found.__cause__, RuntimeError)
    assert str(found) == f"{PIPE} failed after 2 steps: RuntimeError: mat1 and mat2."


@pytest.mark.parametrize("name", ["text_encoder", "safety_checker"])
@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("no room"), DeviceUnsupported("ours."), KeyboardInterrupt()]
)
def test_what_others_must_see_goes_out_as_it_is(pipelines, name, error):
    assert raised(pipelines("sd"), name, error) is error


def test_an_allocation_that_fails_on_the_cpu_goes_out_as_it_is(pipelines):
    pipeline = pipelines("sd")
    hook = pipeline.models["vae"].decoder.register_forward_pre_hook(lambda *_: torch.empty(2**60))
    try:
        with pytest.raises(RuntimeError) as found:
            generate(pipeline, small("sd"))
    finally:
        hook.remove()
    assert type(found.value) is RuntimeError


def test_a_second_run_at_the_same_time_is_refused(pipelines):
    pipeline = pipelines("sd")
    said = []

    def again(step):
        with pytest.raises(QuantError) as found:
            generate(pipeline, small("sd"))
        said.append(str(found.value))

    generate(pipeline, small("sd"), again)
    assert said[0].endswith(" is running already; wait for that run, or load the pipeline once more.")
    generate(pipeline, small("sd"))


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyboardInterrupt])
def test_what_a_callback_raises_goes_out_as_it_is(pipelines, kind):
    error = kind("of the host")

    def stop(step):
        raise error

    with pytest.raises(kind) as found:
        generate(pipelines("sd"), small("sd"), stop)
    assert found.value is error


def not_imported(module, function, name):
    """The error of a function of diffusers' pipelines where an optional package is not installed."""
    module = importlib.import_module(f"diffusers.pipelines.{module}")
    *owner, function = function.split(".")
    call = getattr(getattr(module, owner[0]) if owner else module, function)
    kept = vars(module).pop(name, None)
    try:
        call(*[None] * len(owner), "a cat")
    except NameError as error:
        return error
    finally:
        if kept is not None:
            setattr(module, name, kept)


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (not_imported("wan.pipeline_wan_i2v", "prompt_clean", "ftfy"), "ftfy"),
        (not_imported("pixart_alpha.pipeline_pixart_alpha", "PixArtAlphaPipeline._clean_caption", "BeautifulSoup"),)
        + ("beautifulsoup4",),
        (ModuleNotFoundError("No module named 'bs4'", name="bs4"), "beautifulsoup4"),
        (ModuleNotFoundError("No module named 'no_such_thing.part'", name="no_such_thing.part"), "no_such_thing"),
        (ImportError("\nProcessor requires the Torchvision library. Run: `pip install torchvision`"), "torchvision"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_what_installs_it(pipelines, monkeypatch, error, package):
    monkeypatch.setattr(refusals, "find_spec", lambda name: None)
    found = raised(pipelines("sd"), "text_encoder", error)
    assert type(found) is BackendUnavailable
    assert str(found) == f"{PIPE} needs a package that is not installed; run: pip install {package}."


def test_what_pipelines_clean_prompts_with_is_required():
    """Wan's and others' use ftfy whether it is there or not."""
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    assert "ftfy" in (root / "requirements.txt").read_text().split()
    assert '"ftfy"' in (root / "pyproject.toml").read_text()
    from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean

    assert prompt_clean(" a &amp;amp; cat ") == "a & cat"


MAKES = {
    "StableAudioPipeline": "audios",
    "AudioLDM2Pipeline": "audios",
    "MarigoldDepthPipeline": "prediction and uncertainty and latent",
    "KandinskyV22PriorPipeline": "image_embeds and negative_image_embeds",
}


@pytest.mark.parametrize("name", MAKES)
def test_a_pipeline_that_makes_no_pictures_is_refused_before_it_runs(name):
    pipe = object.__new__(getattr(diffusers, name))
    with pytest.raises(SpecError) as error:
        check_makes_pictures(pipe)
    sentence = f"{name} makes neither images nor video but {MAKES[name]}; load a pipeline that makes pictures."
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "name", ["FluxPipeline", "LTX2Pipeline", "Kandinsky5T2IPipeline", "KandinskyCombinedPipeline", "IFPipeline"]
)
def test_any_other_runs(name):
    check_makes_pictures(object.__new__(getattr(diffusers, name)))


def test_a_run_asks_first_what_the_pipeline_makes(tiny):
    pipeline = load(tiny, "sd")
    pipeline.pipe = object.__new__(diffusers.StableAudioPipeline)
    with pytest.raises(SpecError, match="makes neither images nor video but audios"):
        generate(pipeline, small("sd"))


def test_pictures_are_found_under_any_of_their_names():
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipelineOutput
    from diffusers.pipelines.kandinsky5.pipeline_output import KandinskyImagePipelineOutput

    image = torch.rand(2, 3, 4, 5)
    assert found_in(KandinskyImagePipelineOutput(image=image), "Pipe") is image
    assert found_in(Cosmos3OmniPipelineOutput(video=image, sound=None), "Pipe") is image
    assert size_of(KandinskyImagePipelineOutput(image=image)) == (5, 4)
    assert size_of(KandinskyImagePipelineOutput(image=image.permute(0, 2, 3, 1).numpy())) == (5, 4)
    assert size_of((image,)) is None
    with pytest.raises(SpecError, match="^Pipe makes neither images nor video but tuple.$"):
        found_in((image,), "Pipe")


def test_pictures_are_one_batch_in_whatever_form_they_come():
    images = torch.rand(6, 3, 4, 5)
    expected = images.permute(0, 2, 3, 1)
    array = expected.numpy()
    pil = [Image.fromarray((image * 255).round().astype("uint8")) for image in array]
    forms = [images, images.unflatten(0, (2, 3)), list(images), [list(images[:3]), list(images[3:])], array]
    for form in forms:
        assert torch.equal(pictures(form)[0], expected)
    for form in (pil, [pil[:3], pil[3:]]):
        assert torch.allclose(pictures(form)[0], expected, atol=1 / 255)


PICTURE, TENSOR, ARRAY = Image.new("RGB", (8, 8)), torch.zeros(1, 3, 8, 8), numpy.zeros((8, 8, 3))


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("SanaPipeline", "complex_human_instruction", None),
        ("LTXConditionPipeline", "conditions", None),
        ("SkyReelsV2ImageToVideoPipeline", "last_image", PICTURE),
        ("KandinskyInpaintCombinedPipeline", "mask_image", ARRAY),
        ("FluxImg2ImgPipeline", "image", [PICTURE, PICTURE]),
        ("VisualClozePipeline", "image", [[PICTURE, PICTURE], [PICTURE, None]]),
        ("FluxPipeline", "latents", TENSOR.bfloat16()),
        ("LTXLatentUpsamplePipeline", "video", TENSOR),
        ("FluxPipeline", "prompt_embeds", TENSOR),
        ("StableDiffusionPipeline", "guidance_rescale", 1),
    ],
)
def test_an_argument_that_the_pipeline_takes_is_let_through(name, argument, value):
    accepted = inspect.signature(getattr(diffusers, name).__call__).parameters
    _check_types(name, {argument: value}, accepted)


@pytest.mark.parametrize(
    ("name", "argument", "value", "shown"),
    [
        ("FluxImg2ImgPipeline", "image", "x.png", "image is 'x.png'; FluxImg2ImgPipeline takes "),
        ("FluxPipeline", "latents", [[0.0]], "latents is [[0.0]]; FluxPipeline takes FloatTensor there."),
        ("FluxPipeline", "latents", [[[[[[TENSOR]]]]]], "latents is [[[[[[tensor("),
        ("FluxPipeline", "joint_attention_kwargs", [PICTURE], "joint_attention_kwargs is [<PIL.Image"),
        ("WanPipeline", "num_frames", True, "num_frames is True; WanPipeline takes int there."),
        ("WanPipeline", "num_frames", "5" * 500, "num_frames is '5555"),
    ],
)
def test_an_argument_of_another_kind_is_refused(name, argument, value, shown):
    accepted = inspect.signature(getattr(diffusers, name).__call__).parameters
    with pytest.raises(SpecError) as error:
        _check_types(name, {argument: value}, accepted)
    assert str(error.value).startswith(shown) and len(str(error.value)) <= 300
