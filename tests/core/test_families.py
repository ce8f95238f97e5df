"""Families that are out of the ordinary in one thing: each loads with every plan, and what makes pictures runs."""

import json
import shutil

import diffusers
import pytest
import torch
from PIL import Image

from quant_core import (
    LoadRequest,
    SpecError,
    estimate,
    generate,
    inspect_pipeline,
    load_pipeline,
    parse_plan,
    read_index,
    save_pipeline,
)
from quant_core.inspection import stored_tensors

from .small_requests import small

PLANS = ["torchao/int8wo", "bitsandbytes_4bit/nf4", "gguf/Q8_0"]
SOUND = ("acestep", "longcat")
MODELS = {
    "acestep": {
        "audio_tokenizer",
        "audio_token_detokenizer",
        "condition_encoder",
        "text_encoder",
        "transformer",
        "vae",
    },
    "cascade": {"decoder", "text_encoder", "vqgan"},
    "controlnets": {"controlnet", "text_encoder", "unet", "vae"},
    "hunyuanimage": {"text_encoder", "text_encoder_2", "transformer", "vae"},
    "hunyuanvideo15": {"text_encoder", "text_encoder_2", "transformer", "vae"},
    "longcat": {"text_encoder", "transformer", "vae"},
    "motif": {"text_encoder", "transformer", "vae"},
}
QUANTIZED = {"controlnets": {"text_encoder", "unet"}, "cascade": {"decoder", "text_encoder"}}
EDGES = {"image": [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]}


@pytest.fixture
def family(tiny, tmp_path, edit):
    """Name -> its folder, as the hub has it."""

    def folder(name):
        if name != "cascade":
            return tiny(name)
        made = shutil.copytree(tiny(name), tmp_path / name)
        edit(made / "model_index.json", vqgan=["wuerstchen", "PaellaVQModel"])  # a pipeline that is deprecated by now
        return made

    return folder


def request(name):
    return small(name, extra=EDGES if name == "controlnets" else {})


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_a_family_loads_and_makes_its_pictures(family, name, plan):
    pipeline = load_pipeline(LoadRequest(str(family(name)), parse_plan(plan)))
    reports = {report.name: report for report in inspect_pipeline(pipeline)}
    assert reports.keys() == MODELS[name]
    quantized = {part for part, report in reports.items() if report.is_quantized}
    assert quantized == QUANTIZED.get(name, {part for part in MODELS[name] if part.startswith(("text", "transf"))})
    if name not in (*SOUND, "cascade"):  # whose decoder takes what its prior makes of a prompt
        images = generate(pipeline, request(name))
        assert images.isfinite().all() and images.std() > 0


def test_what_the_class_makes_itself_is_not_looked_for(tiny, caplog):
    folder = tiny("longcat")
    assert "scheduler" in json.loads((folder / "model_index.json").read_text()) and not (folder / "scheduler").exists()
    pipe = load_pipeline(LoadRequest(str(folder))).pipe
    assert "left out" not in caplog.text
    assert pipe.scheduler.config == diffusers.DiffusionPipeline.from_pretrained(folder).scheduler.config
    with pytest.raises(SpecError, match="LongCatAudioDiTPipeline takes no scheduler, though model_index.json names"):
        load_pipeline(LoadRequest(str(folder), parse_plan("scheduler=torchao/int8wo")))


def test_a_component_that_the_class_does_not_take_is_left_out_which_is_said(copy, edit, caplog):
    """As by diffusers: such an index is one of another version."""
    model = copy("sd3")
    shutil.copytree(model / "vae", model / "refiner")
    edit(model / "model_index.json", refiner=["diffusers", "AutoencoderKL"])
    assert "refiner" not in load_pipeline(LoadRequest(str(model))).models
    assert "refiner of sd3 is left out: StableDiffusion3Pipeline takes none." in caplog.text


def test_settings_of_the_index_reach_the_class(copy, edit):
    model = copy("sd")
    edit(model / "model_index.json", requires_safety_checker=False, force_zeros_for_empty_prompt=True)
    assert load_pipeline(LoadRequest(str(model))).pipe.config.requires_safety_checker is False


def test_old_names_of_classes_load_as_diffusers_loads_them(copy, edit):
    model = copy("sd")
    edit(model / "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    edit(model / "feature_extractor/preprocessor_config.json", feature_extractor_type="CLIPFeatureExtractor")
    pipeline = load_pipeline(LoadRequest(str(model), parse_plan("torchao/int8wo")))
    assert type(pipeline.pipe.feature_extractor).__name__.startswith("CLIPImageProcessor")
    assert generate(pipeline, small("sd")).isfinite().all()


def test_a_pipeline_with_its_files_in_one_folder(tmp_path):
    """As some of the oldest have them."""
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet.save_pretrained(tmp_path)
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    index = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **index}))
    pipeline = load_pipeline(LoadRequest(str(tmp_path), dtype="float32"))
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    pairs = zip(pipeline.pipe.unet.parameters(), theirs.unet.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert type(pipeline.pipe.scheduler) is diffusers.DDPMScheduler


NETS = "controlnet=torchao/int8wo"


def controlnet(pipeline):
    return next(report for report in inspect_pipeline(pipeline) if report.name == "controlnet")


def test_several_controlnets_are_read_as_diffusers_reads_them(tiny):
    folder = tiny("controlnets")
    ours = load_pipeline(LoadRequest(str(folder)))
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    tensors = [list(pipe.controlnet.state_dict().items()) for pipe in (ours.pipe, theirs)]
    pairs = list(zip(*tensors, strict=True))
    assert all(first[0] == second[0] and torch.equal(first[1], second[1]) for first, second in pairs)
    assert len(ours.pipe.controlnet.nets) == 2 and not ours.pipe.controlnet.training
    one, other = (dict(net.named_parameters()) for net in ours.pipe.controlnet.nets)
    assert not torch.equal(one["controlnet_mid_block.weight"], other["controlnet_mid_block.weight"])


def test_several_controlnets_are_quantized_stored_estimated_and_saved(tiny, tmp_path):
    ask = LoadRequest(str(tiny("controlnets")), parse_plan(NETS), store=tmp_path / "store")
    first, second = load_pipeline(ask), load_pipeline(ask)
    assert [pipeline.origins["controlnet"].kind for pipeline in (first, second)] == ["stored", "store"]
    report = controlnet(first)
    assert report.is_quantized and report.footprint < 0.9 * report.bytes_16bit
    planned = {part.name: part.footprint for part in estimate(ask, request("controlnets")).components}
    assert planned["controlnet"] == report.footprint
    images = generate(first, request("controlnets"))
    save_pipeline(first, tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").glob("controlnet*")} == {"controlnet", "controlnet_1"}
    again = load_pipeline(LoadRequest(str(tmp_path / "saved")))
    for pipeline in (second, again):
        pairs = zip(stored_tensors(pipeline.pipe.controlnet), stored_tensors(first.pipe.controlnet), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        assert torch.equal(generate(pipeline, request("controlnets")), images)


def test_a_config_of_one_of_several_counts_for_the_store(tiny, tmp_path, edit):
    folder = shutil.copytree(tiny("controlnets"), tmp_path / "model")
    ask = LoadRequest(str(folder), parse_plan(NETS), store=tmp_path / "store")
    load_pipeline(ask)
    edit(folder / "controlnet_1/config.json", act_fn="gelu")
    assert load_pipeline(ask).origins["controlnet"].kind == "stored"


def test_a_file_of_one_model_is_refused_for_several(tiny, tmp_path):
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    plan = parse_plan(f"controlnet=gguf/file?path={tmp_path / 'one.gguf'}")
    with pytest.raises(SpecError, match="controlnet is 2 models in files of their own, and gguf/file"):
        load_pipeline(LoadRequest(str(tiny("controlnets")), plan))
    made = load_pipeline(LoadRequest(str(tiny("controlnets")), parse_plan("controlnet=gguf/Q8_0")))
    with pytest.raises(SpecError, match="controlnet is several models, which gguf/Q8_0 has no files for"):
        save_pipeline(made, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_what_is_a_model_is_asked_of_its_class(tiny):
    index = read_index(tiny("acestep"))
    assert {"audio_tokenizer", "audio_token_detokenizer"} <= index.models.keys() and "tokenizer" not in index.models
    assert read_index(tiny("hunyuanimage")).components.keys() - read_index(tiny("hunyuanimage")).models.keys() == {
        *("guider", "ocr_guider", "scheduler", "tokenizer", "tokenizer_2")
    }
