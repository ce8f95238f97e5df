"""What each node makes of its widgets, and what it says of wrong ones."""

import os
import shutil
import time
from pathlib import Path, PureWindowsPath
from unittest.mock import Mock

import pytest
from quant_pack.nodes import (
    Generate,
    LoadQuantizedPipeline,
    QuantConfig,
    QuantMapping,
    SaveQuantizedPipeline,
    comfy_runtime,
)
from quant_pack.quant_core import (
    GenerateRequest,
    QuantizedPipeline,
    QuantPlan,
    QuantSpec,
    SourceError,
    SpecError,
    backends,
)

DEMO = Path(__file__).resolve().parents[2] / "demo_model/pipeline"
ROOT = PureWindowsPath(r"C:\models")
WINDOWS = [(ROOT, ROOT / "sub" / "sd15", ["model_index.json", "t5.GGUF"])]  # as a walk there would find it
INT8 = QuantSpec("torchao", "int8wo")
NF4 = QuantSpec("bitsandbytes_4bit", "nf4")


def widgets(backend):
    """The default values of a backend's widgets, as the frontend sends them."""
    (choice, _) = QuantConfig.define_schema().inputs
    option = next(option for option in choice.settings["options"] if option.key == backend)
    return {widget.id: widget.settings.get("default") for widget in option.inputs if widget.id != "scheme"}


@pytest.mark.parametrize(
    ("backend", "scheme"), [(name, scheme.name) for name, backend in backends().items() for scheme in backend.schemes]
)
def test_untouched_widgets_give_the_scheme_s_defaults(backend, scheme):
    sent = {"backend": backend, "scheme": scheme, **widgets(backend)}
    assert QuantConfig.execute(backend=sent)[0] == QuantSpec(backend, scheme)
    left_out = dict.fromkeys(widgets(backend)) | {"backend": backend, "scheme": scheme}
    assert QuantConfig.execute(backend=left_out)[0] == QuantSpec(backend, scheme)


@pytest.mark.parametrize(
    ("text", "patterns"),
    [("", None), (" \n", None), ("none", ()), (" none ", ()), ("recommended, **.to_v", ("recommended", "**.to_v"))],
)
def test_an_empty_text_skips_what_is_recommended_and_none_nothing(text, patterns):
    sent = {"backend": "bitsandbytes_4bit", "scheme": "nf4"}
    assert QuantConfig.execute(backend=sent, skip_modules=text)[0].skip_modules == patterns


def test_skip_patterns_are_separated_by_commas_or_lines():
    sent = {"backend": "torchao", "scheme": "int8wo"}
    spec = QuantConfig.execute(backend=sent, skip_modules="proj_out, **.norm_out\n x_embedder ,")[0]
    assert spec.skip_modules == ("proj_out", "**.norm_out", "x_embedder")


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (None, "names no backend that is known here; use one of: bitsandbytes_4bit, "),
        ({"backend": "bnb", "scheme": "nf4"}, "Unknown backend 'bnb'"),
        ({"backend": "quanto", "scheme": "nf4"}, "quanto has no scheme 'nf4'; use one of: float8, int2, int4, int8."),
        ({"backend": "quanto"}, "quanto has no scheme ''"),
        ({"backend": "torchao", "scheme": "fp8wo", "group_size": "64"}, "group_size has no effect on torchao/fp8wo"),
        ({"backend": "torchao", "scheme": "int4wo", "group_size": "7"}, "group_size is '7'; use one of"),
        ({"backend": "quanto", "scheme": "int8", "bits": 3}, "quanto has no option 'bits'"),
    ],
)
def test_a_wrong_config_is_told_so_in_its_own_node(sent, message):
    with pytest.raises(SpecError, match=message.replace("(", r"\(")):
        QuantConfig.execute(backend=sent)


def test_a_gguf_file_is_chosen_by_its_name_in_the_model_folders(comfyui):
    (comfyui / "text_encoders/t5.gguf").write_bytes(b"")
    spec = QuantConfig.execute(backend={"backend": "gguf", "scheme": "file", "path": "t5.gguf"})[0]
    assert spec.options["path"] == str(comfyui / "text_encoders/t5.gguf")
    assert "t5.gguf" in QuantConfig.define_schema().inputs[0].settings["options"][2].inputs[1].settings["options"]
    assert QuantMapping.execute(text="vae=gguf/file?path=t5.gguf")[0].components["vae"] == spec
    for name in ("../t5.gguf", str(comfyui / "text_encoders/t5.gguf"), "absent.gguf"):
        with pytest.raises(SourceError, match="There is no .gguf file"):
            QuantConfig.execute(backend={"backend": "gguf", "scheme": "file", "path": name})


def test_a_suffix_in_capitals_counts(comfyui):
    plain = QuantMapping.execute(text="transformer=gguf/Q8_0")[0]
    saved = SaveQuantizedPipeline.execute(LoadQuantizedPipeline.execute("demo", "bfloat16", plain)[0], "saved")[0]
    shutil.move(next(Path(saved).glob("transformer/*.gguf")), comfyui / "text_encoders/FLUX.GGUF")
    mapping = QuantMapping.execute(text="transformer=gguf/file?path=FLUX.GGUF")[0]
    assert LoadQuantizedPipeline.execute("demo", "bfloat16", mapping)[0].origins["transformer"].kind == "file"


def test_a_changed_gguf_file_changes_the_fingerprints(comfyui):
    def stamps():
        return (
            QuantConfig.fingerprint_inputs(backend={"backend": "gguf", "scheme": "file", "path": "t5.gguf"}),
            QuantMapping.fingerprint_inputs(text="vae=gguf/file?path=t5.gguf"),
        )

    (comfyui / "text_encoders/t5.gguf").write_bytes(b"")
    before = stamps()
    assert stamps() == before
    file = comfyui / "text_encoders/t5.gguf"
    file.write_bytes(b"other")
    other = stamps()
    assert all(after != old for after, old in zip(other, before, strict=True))
    told = file.stat()
    time.sleep(0.05)  # more than a tick of the file system's clock
    file.write_bytes(b"third")
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))
    assert all(after != old for after, old in zip(stamps(), other, strict=True))


@pytest.mark.parametrize(
    ("sent", "plan"),
    [
        ({}, QuantPlan()),
        ({"default": INT8}, QuantPlan(default=INT8)),
        ({"unet": NF4, "vae": None}, QuantPlan({"unet": NF4})),
        ({"other": NF4, "other_name": " prior "}, QuantPlan({"prior": NF4})),
        ({"text": "unet=torchao/int8wo", "vae": NF4}, QuantPlan({"unet": INT8, "vae": NF4})),
        ({"base": QuantPlan({"unet": NF4}, NF4), "unet": INT8}, QuantPlan({"unet": INT8}, NF4)),
    ],
)
def test_a_mapping_of_what_is_wired(sent, plan):
    assert QuantMapping.execute(**sent)[0] == plan


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"other": NF4}, "belong together"),
        ({"other_name": "prior"}, "belong together"),
        ({"other": NF4, "other_name": "unet", "unet": INT8}, "unet is both wired and named"),
        ({"base": QuantPlan(), "text": "torchao/int8wo"}, "Give a base or a text, not both"),
        ({"text": "torchao"}, "is no part of a plan"),
        ({"text": "vae=gguf/file?path=/etc/t5.gguf"}, "There is no .gguf file '/etc/t5.gguf'"),
    ],
)
def test_a_mapping_that_contradicts_itself(sent, message):
    with pytest.raises((SpecError, SourceError), match=message):
        QuantMapping.execute(**sent)


def test_pipelines_are_listed_by_folder(comfyui):
    shutil.copytree(DEMO, comfyui / "diffusers/some/model")
    (comfyui / "diffusers/no_model").mkdir()
    (listed, *_) = LoadQuantizedPipeline.define_schema().inputs
    assert listed.settings["options"] == ["demo", "some/model"]
    assert LoadQuantizedPipeline.validate_inputs("some/model") is True


@pytest.mark.parametrize("written", ["sub/sd15", "sub\\sd15"])
def test_a_workflow_of_another_system_finds_its_files(comfyui, written):
    shutil.copytree(DEMO, comfyui / "diffusers/sub/sd15")
    (comfyui / "text_encoders/sub").mkdir()
    (comfyui / "text_encoders/sub/t5.gguf").write_bytes(b"")
    assert LoadQuantizedPipeline.validate_inputs(written) is True
    assert LoadQuantizedPipeline.fingerprint_inputs(written) == LoadQuantizedPipeline.fingerprint_inputs("sub/sd15")
    assert LoadQuantizedPipeline.execute(pipeline=written, dtype="bfloat16")[0].models
    file = {"backend": "gguf", "scheme": "file", "path": written.replace("sd15", "t5.gguf")}
    found = str(comfyui / "text_encoders/sub/t5.gguf")
    assert QuantConfig.execute(backend=file)[0].options["path"] == found
    assert (
        QuantMapping.execute(text=f"vae=gguf/file?path={file['path']}")[0].components["vae"].options["path"] == found
    )
    assert QuantConfig.validate_inputs(backend=file) is True


def test_names_are_listed_with_slashes_on_every_system(comfyui, monkeypatch):
    monkeypatch.setattr(comfy_runtime, "_walk", lambda kind: WINDOWS)
    assert LoadQuantizedPipeline.define_schema().inputs[0].settings["options"] == ["demo", "sub/sd15"]
    assert comfy_runtime.files(".gguf") == ["sub/sd15/t5.GGUF"]


def test_a_stray_index_hides_nothing(comfyui):
    shutil.copytree(DEMO, comfyui / "diffusers/some/model")
    before = LoadQuantizedPipeline.define_schema().inputs[0].settings["options"]
    for folder in (comfyui / "diffusers", comfyui / "diffusers/some"):
        (folder / "model_index.json").write_text("{}")
    assert set(LoadQuantizedPipeline.define_schema().inputs[0].settings["options"]) == {*before, ".", "some"}
    assert LoadQuantizedPipeline.execute(pipeline="some/model", dtype="bfloat16")[0].models


def test_a_folder_named_as_the_bundled_model_has_a_name_of_its_own(comfyui):
    shutil.copytree(DEMO, comfyui / "diffusers/demo")
    index = comfyui / "diffusers/demo/model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "FluxKontextPipeline"))
    assert LoadQuantizedPipeline.define_schema().inputs[0].settings["options"] == ["demo", "./demo"]
    found = [LoadQuantizedPipeline.execute(pipeline=name, dtype="bfloat16")[0] for name in ("demo", "./demo")]
    assert [type(pipeline.pipe).__name__ for pipeline in found] == ["FluxPipeline", "FluxKontextPipeline"]


@pytest.mark.parametrize("name", ["../diffusers/some/model", "/etc", "absent", "", "some/../demo"])
def test_only_listed_folders_are_opened(comfyui, name):
    shutil.copytree(DEMO, comfyui / "diffusers/some/model")
    assert "There is no diffusers pipeline" in LoadQuantizedPipeline.validate_inputs(name)
    with pytest.raises(SourceError, match="There is no diffusers pipeline"):
        LoadQuantizedPipeline.execute(name, "bfloat16")


def test_changed_files_of_a_pipeline_change_its_fingerprint(comfyui):
    shutil.copytree(DEMO, comfyui / "diffusers/model")
    before = LoadQuantizedPipeline.fingerprint_inputs("model")
    assert LoadQuantizedPipeline.fingerprint_inputs("model", dtype="float16") == before
    (comfyui / "diffusers/model/transformer/config.json").write_text("{}")
    assert LoadQuantizedPipeline.fingerprint_inputs("model") != before


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"extra": "{"}, "extra is no valid JSON"),
        ({"extra": '{"sigmas": [1], "sigmas": [0.5]}'}, "extra gives 'sigmas' twice; give it once"),
        ({"extra": "[" * 5000}, "extra has lists or objects in one another too deep"),
        ({"extra": "[1]"}, "extra is '\\[1\\]'; it takes a JSON object"),
        ({"extra": '{"seed": 1}'}, "takes no seed"),
        ({"extra": '{"num_inference_steps": 1}'}, "give it as steps"),
        ({"negative_prompt": "rain"}, "set true_cfg_scale above 1"),
        ({"guidance": -0.5}, "guidance is -0.5; it takes a number of at least 0"),
        ({"extra": '{"joint_attention_kwargs": 3}'}, "joint_attention_kwargs is 3; FluxPipeline takes dict there"),
        ({"max_sequence_length": 4000}, "FluxPipeline refuses the request: `max_sequence_length` cannot be greater"),
    ],
)
def test_arguments_without_effect_or_meaning_are_refused(sent, message):
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16")[0]
    with pytest.raises(SpecError, match=message):
        Generate.execute(pipeline, "a lake", width=128, height=128, steps=1, seed=0, **{"guidance": -1.0} | sent)


def test_widgets_left_at_their_defaults_leave_the_pipeline_s_own(monkeypatch):
    seen = []
    monkeypatch.setattr("quant_pack.nodes.generate.generate", lambda pipeline, request, on_step: seen.append(request))
    defaults = {widget.id: widget.settings.get("default") for widget in Generate.define_schema().inputs}
    Generate.execute(**defaults | {"pipeline": Mock(QuantizedPipeline, reports={}, notices=[]), "prompt": "a lake"})
    assert seen == [GenerateRequest("a lake")]
