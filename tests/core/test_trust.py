"""A model folder and a plan are data of others: what they ask for is refused in one sentence, and nothing is run."""

import pickle
import shutil
import sys

import pytest

from quant_core import (
    GenerateRequest,
    LoadRequest,
    QuantError,
    SourceError,
    find_folder,
    generate,
    load_pipeline,
    locating,
    parse_plan,
    read_index,
    reading,
)
from quant_core.picture import describe

CODE = """
open({marker!r}, "w").close()
class Own: pass
class OwnTokenizer: pass
"""


class Payload:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def own(name, module):
    """The sentence on a component that is code of the model's own."""
    return f"{name} is a {module}, which neither diffusers .* has; code that comes with a model is not run\\."


def only_pickle(model, edit, component, weights, pickled):
    (model / component / weights).unlink()
    marker = model.parents[1] / "ran"
    (model / component / pickled).write_bytes(pickle.dumps(Payload(marker)))


def component_code(model, edit, component, library, cls):
    (model / component / f"{library}.py").write_text(CODE.format(marker=str(model.parents[1] / "ran")))
    edit(model / "model_index.json", **{component: [library, cls]})


def pipeline_code(model, edit):
    (model / "pipeline.py").write_text(CODE.format(marker=str(model.parents[1] / "ran")))
    edit(model / "model_index.json", _class_name=["pipeline", "Own"])


def index(model, edit, **values):
    edit(model / "model_index.json", **values)


PICKLED = "has only pickled weights \\({}\\), which can run code when they are opened; convert them to safetensors\\."
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model.{}", "model.{}"

# what is wrong with the folder, the arguments of it, and the sentence
FOLDERS = [
    (only_pickle, ("transformer", DIFFUSERS.format("safetensors"), DIFFUSERS.format("bin")))
    + ("transformer " + PICKLED.format(r"diffusion_pytorch_model\.bin"),),
    (only_pickle, ("text_encoder_3", TRANSFORMERS.format("safetensors"), "pytorch_model.bin"))
    + ("text_encoder_3 " + PICKLED.format(r"pytorch_model\.bin"),),
    (only_pickle, ("vae", DIFFUSERS.format("safetensors"), "vae.ckpt"), "vae " + PICKLED.format(r"vae\.ckpt")),
    (
        pipeline_code,
        (),
        r"asks for pipeline code of its own \(\['pipeline', 'Own'\]\); only diffusers' classes are",
    ),
    (component_code, ("transformer", "modeling", "Own"), own("transformer", "modeling.Own")),
    (component_code, ("tokenizer", "own_words", "OwnTokenizer"), own("tokenizer", "own_words.OwnTokenizer")),
    (index, {"transformer": ["os", "system"]}, own("transformer", "os.system")),
    (index, {"transformer": ["subprocess", "Popen"]}, own("transformer", "subprocess.Popen")),
    (index, {"transformer": ["transformers", "AutoModel"]}, "transformer is a transformers.AutoModel, which is no m"),
    (index, {"tokenizer": ["transformers", "AutoTokenizer"]}, "tokenizer is a transformers.AutoTokenizer, which is"),
    (index, {"transformer": ["diffusers", "FluxPipeline"]}, "transformer is a diffusers.FluxPipeline, which is no m"),
    (index, {"tokenizer": ["this", "OwnTokenizer"]}, own("tokenizer", "this.OwnTokenizer")),
    (index, {"_class_name": "OwnPipeline"}, "diffusers .* has no pipeline OwnPipeline; a newer diffusers may have it"),
    (index, {"_class_name": "AutoencoderKL"}, "diffusers .* has no pipeline AutoencoderKL; a newer"),
    (index, {"../vae": ["diffusers", "AutoencoderKL"]}, "names a component '../vae'; a component's name is a plain"),
    (index, {"transformer": ["a", "b", "c"]}, r"says \['a', 'b', 'c'\] of component transformer; it takes library"),
    (index, {"transformer": ["diffusers", 5]}, r"says \['diffusers', 5\] of component transformer; it takes library"),
]


@pytest.mark.parametrize("plan", ["none", "torchao/int8wo"])
@pytest.mark.parametrize(("spoil", "arguments", "sentence"), FOLDERS, ids=range(len(FOLDERS)))
def test_a_folder_that_asks_for_code_is_refused(copy, edit, tmp_path, monkeypatch, spoil, arguments, sentence, plan):
    model = copy("sd3")
    values = arguments if isinstance(arguments, dict) else {}
    spoil(model, edit, *([] if values else arguments), **values)
    monkeypatch.setattr(reading, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(SourceError, match=sentence) as error:
        load_pipeline(LoadRequest(str(model), parse_plan(plan)))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    assert "this" not in sys.modules and "own_words" not in sys.modules


def test_pickles_and_code_beside_the_real_files_are_not_touched(copy, edit, tmp_path):
    model = copy("sd3")
    (model / "transformer/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for folder in ("", "text_encoder_3", "tokenizer"):
        (model / folder / "pipeline.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    edit(model / "text_encoder_3/config.json", auto_map={"AutoModel": "pipeline.Own", "AutoConfig": "pipeline.Own"})
    edit(model / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["pipeline.OwnTokenizer", None]})
    pipeline = load_pipeline(LoadRequest(str(model), parse_plan("quanto/int8")))
    assert generate(pipeline, GenerateRequest("a", width=16, height=16, steps=1)).shape == (1, 16, 16, 3)
    assert not (tmp_path / "ran").exists()


def test_a_processor_that_brings_code_is_refused_and_nobody_is_asked(copy, edit, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    model = copy("sd")
    folder = model / "feature_extractor"
    shutil.copy(model / "tokenizer/tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}')
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    edit(model / "model_index.json", feature_extractor=["transformers", "CLIPProcessor"])
    with pytest.raises(SourceError, match="feature_extractor does not load as a CLIPProcessor: .*custom code"):
        load_pipeline(LoadRequest(str(model)))
    assert not (tmp_path / "ran").exists()


HAS = "text_encoder, text_encoder_2, text_encoder_3, transformer, vae"
ABSENT = "This pipeline comes without its optional image_encoder"
UNKNOWN = "No component {} in this StableDiffusion3Pipeline"
PLANS = [
    ("transfomer=quanto/int8", f"{UNKNOWN.format(repr('transfomer'))} (did you mean 'transformer'?); it has: {HAS}."),
    ("unet=quanto/int8", f"{UNKNOWN.format(repr('unet'))}; it has: {HAS}."),
    (
        "tokenizer=quanto/int8",
        f"tokenizer is a CLIPTokenizer, which has no weights; the plan can name: {HAS}.",
    ),
    (
        "scheduler=quanto/int8",
        f"scheduler is a FlowMatchEulerDiscreteScheduler, which has no weights; the plan can name: {HAS}.",
    ),
    ("image_encoder=quanto/int8", f"{ABSENT}; it has: {HAS}."),
    ("transformer=gguf/file", "gguf/file needs path: the path of a .gguf file."),
    ("transformer=gguf/file?path=t5.txt", "path is 't5.txt'; it must be an existing .gguf file."),
    ("transformer=gguf/file?path=t5.gguf", "path is 't5.gguf'; it must be an existing .gguf file."),
    ("transformer=quanto/int8?skip=blocks", "Skip pattern 'blocks' matches no module of SD3Transformer2DModel"),
    ("vae=quanto/int4?skip=**.attentions", "vae cannot be quantized as quanto/int4: no layer would be quantized "),
    ("text_encoder=torchao/int4wo", "torchao/int4wo needs a CUDA GPU of compute capability 8.0 or newer; "),
]


@pytest.mark.parametrize(("plan", "sentence"), PLANS, ids=[plan for plan, _ in PLANS])
def test_a_plan_that_does_not_fit_is_refused_before_weights_are_read(tiny, monkeypatch, plan, sentence):
    monkeypatch.setattr(reading, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(QuantError) as error:
        load_pipeline(LoadRequest(str(tiny("sd3")), parse_plan(plan)))
    assert str(error.value).startswith(sentence) and str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "owner/name",
            " is not a folder; give the folder of a diffusers pipeline, 'demo', or a hub id together with ",
        ),
        ("/nowhere/at/all", " is not a folder; "),
    ],
)
def test_the_hub_is_not_asked_without_permission(monkeypatch, source, sentence):
    from diffusers import DiffusionPipeline

    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(SourceError) as error:
        load_pipeline(LoadRequest(source))
    assert str(error.value).startswith(source + sentence)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("owner/no-such-model", "owner/no-such-model could not be downloaded: "),
        ("../etc/passwd", "../etc/passwd is neither a folder nor a hub id, which reads owner/name."),
        ("https://host/model", "https://host/model is neither a folder nor a hub id, which reads owner/name."),
    ],
)
def test_what_is_no_hub_id_or_cannot_be_had_is_told(source, sentence):
    with pytest.raises(SourceError) as error:
        load_pipeline(LoadRequest(source, allow_download=True))
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_a_folder_named_demo_is_reached_and_not_taken_for_the_bundled_one(tiny, tmp_path, monkeypatch, caplog):
    shutil.copytree(tiny("sd3"), tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    locating._tell_of_another.cache_clear()
    names = {source: read_index(find_folder(source)).name for source in ("./demo", str(tmp_path / "demo"))}
    assert set(names.values()) == {"./demo"}
    assert read_index(find_folder("demo")).is_bundled and read_index(find_folder("demo")).name == "demo"
    (said,) = (record.message for record in caplog.records if record.name == "quant_core.locating")
    assert said == "demo is the bundled model; the pipeline in the folder of that name here is ./demo."
    pipeline = load_pipeline(LoadRequest("./demo"))
    assert describe(pipeline, GenerateRequest("a"), "./demo")["model"] == "./demo"
