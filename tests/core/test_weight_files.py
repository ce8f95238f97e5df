"""The files that are checked, keyed and read are those that the libraries read; what is missing is named."""

import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_core import LoadRequest, SourceError, load_pipeline, parse_plan
from quant_core.availability import quiet_libraries
from quant_core.checkpoint import weight_files
from quant_core.source import read_index

STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder_3": "model"}
NAMES = {"transformer": "proj_out.bias", "text_encoder_3": "encoder.final_layer_norm.weight"}
KINDS = ("single", "index", "single fp16", "index fp16")


def put(folder, stem, kind, tensors):
    """Weights as one file or as a shard with its index."""
    form, _, variant = kind.partition(" ")
    tag = f".{variant}" if variant else ""
    if form == "single":
        save_file(tensors, folder / f"{stem}{tag}.safetensors", {"format": "pt"})
        return
    shard = f"{stem}-00001-of-00001{tag}.safetensors"
    save_file(tensors, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
    (folder / f"{stem}.safetensors.index{tag}.json").write_text(json.dumps(index))


@pytest.fixture
def choices(copy):
    """A component and kinds of files -> its info, each kind of file with another number in one weight."""

    def make(name, kinds):
        folder = copy("sd3") / name
        (file,) = folder.glob("*.safetensors")
        tensors = {key: value.clone() for key, value in load_file(file).items()}
        file.unlink()
        for number, kind in enumerate(kinds):
            put(folder, STEMS[name], kind, tensors | {NAMES[name]: torch.full_like(tensors[NAMES[name]], number + 2)})
        return read_index(folder.parent).components[name]

    return make


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("kinds", [kinds for count in (1, 2, 4) for kinds in itertools.combinations(KINDS, count)])
def test_the_files_are_those_that_the_library_reads(choices, name, kinds, variant):
    info = choices(name, kinds)
    with quiet_libraries():
        try:
            theirs = info.cls.from_pretrained(info.folder, variant=variant, local_files_only=True)
        except OSError:
            theirs = None
    if theirs is None:
        if variant and any("fp16" not in kind for kind in kinds):
            assert weight_files(info, variant) == weight_files(info)  # as a whole pipeline does in both libraries
        else:
            with pytest.raises(SourceError, match="ask for variant='fp16'"):
                weight_files(info, variant)
        return
    read = theirs.get_parameter(NAMES[name]).unique().item()
    (file,) = weight_files(info, variant).files
    assert load_file(file)[NAMES[name]].unique().item() == read


@pytest.mark.parametrize("plan", ["none", "transformer=torchao/int8wo,text_encoder_3=torchao/int8wo"])
def test_old_files_beside_those_that_are_read_make_no_difference(copy, tiny, tmp_path, plan):
    folder = copy("sd3")
    for name, kind in (("text_encoder_3", "index"), ("transformer", "index")):
        (file,) = (tiny("sd3") / name).glob("*.safetensors")
        put(folder / name, STEMS[name], kind, load_file(file))
    single = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file({key: value * 0 for key, value in load_file(single).items()}, single, {"format": "pt"})
    (folder / "text_encoder_3/model-00001-of-00001.safetensors").unlink()  # whose index is left from before
    for request in (folder, tiny("sd3")):
        loaded = load_pipeline(LoadRequest(str(request), parse_plan(plan), store=tmp_path / "store"))
        kinds = [loaded.origins[name].kind for name in loaded.specs]
    assert kinds == ["store"] * len(loaded.specs), "both are the same weights, by what is read"


def test_a_file_that_the_config_names_is_the_one_that_is_read(choices, edit):
    info = choices("text_encoder_3", ["single", "single fp16"])
    edit(info.folder / "config.json", transformers_weights="model.fp16.safetensors")
    info = read_index(info.folder.parent).components[info.name]
    theirs = info.cls.from_pretrained(info.folder, local_files_only=True)
    (file,) = weight_files(info).files
    assert theirs.get_parameter(NAMES[info.name]).unique() == load_file(file)[NAMES[info.name]].unique() == 3
    edit(info.folder / "config.json", transformers_weights="../model.safetensors")
    with pytest.raises(SourceError, match="config.json names '../model.safetensors', which is no safetensors file"):
        weight_files(read_index(info.folder.parent).components[info.name])


def test_an_index_that_is_not_of_its_shards_is_refused_where_it_is_trusted(choices):
    for name, refused in (("transformer", True), ("text_encoder_3", False)):
        info = choices(name, ["index"])
        (index,) = info.folder.glob("*.index.json")
        told = json.loads(index.read_text())
        del told["weight_map"][NAMES[name]]
        index.write_text(json.dumps(told))
        if refused:
            with pytest.raises(SourceError, match=f"is not of its shards, which differ in where {NAMES[name]} is"):
                weight_files(info)
        else:
            assert len(weight_files(info).files) == 1
        shutil.rmtree(info.folder.parent)


def test_a_tensor_in_two_shards_is_refused(choices):
    info = choices("text_encoder_3", ["index"])
    (index,), (shard,) = info.folder.glob("*.index.json"), info.folder.glob("*.safetensors")
    shutil.copy(shard, info.folder / "model-00002-of-00002.safetensors")
    told = json.loads(index.read_text())
    told["weight_map"][NAMES[info.name]] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(told))
    with pytest.raises(SourceError, match=r"is in model-00001-of-00001.safetensors and in model-00002-of-00002\.saf"):
        weight_files(info)


def without_index(folder, file):
    file.rename(file.with_name("diffusion_pytorch_model-00001-of-00003.safetensors"))


def renamed(name):
    return lambda folder, file: file.rename(file.with_name(name))


def of_another_model(folder, file):
    save_file({"double_blocks.0.weight": torch.ones(2, 2)}, folder / "flux1-dev.safetensors")
    file.unlink()


def of_an_old_version(folder, file):
    put(folder, "diffusion_pytorch_model", "index fp16", load_file(file))
    new = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    new.rename(folder / "diffusion_pytorch_model.safetensors.fp16.index.json")


@pytest.mark.parametrize("where", ["plain", "of.1", "of.1.5", ".cache", ".cache/of.1"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the plain"])
def test_an_index_of_an_old_version_is_read_where_diffusers_reads_it(copy, where, beside):
    folder = copy("sd3")
    (file,) = (folder / "transformer").glob("*.safetensors")
    of_an_old_version(folder / "transformer", file)
    if not beside:
        file.unlink()
    target = folder.parent / where
    target.parent.mkdir(exist_ok=True)
    folder = folder.rename(target)
    request = LoadRequest(str(folder), variant="fp16")
    if where in ("plain", ".cache"):  # what it looks for in a path of no dots, and of the hub's
        (found,) = (name for name in weight_files(read_index(folder).models["transformer"], "fp16").files)
        assert found.name == "diffusion_pytorch_model-00001-of-00001.fp16.safetensors"
        assert load_pipeline(request).models
        return
    with pytest.raises(SourceError) as error:
        load_pipeline(request)
    old = "diffusion_pytorch_model.safetensors.fp16.index.json"
    new = "diffusion_pytorch_model.safetensors.index.fp16.json"
    way = "load it without variant='fp16'" if beside else f"rename it to {new}"
    said = f"transformer has a shard index of an old name, {old}, which is not found there; {way}."
    assert str(error.value) == said
    if beside:
        request = LoadRequest(str(folder))
    else:
        (folder / "transformer" / old).rename(folder / "transformer" / new)
    assert load_pipeline(request).models


def in_two_gguf(folder, file):
    for name in ("a.gguf", "b.GGUF"):
        (folder / name).write_bytes(b"GGUF")
    file.unlink()


def adapter(folder, file):
    (folder / "adapter_config.json").write_text("{}")


INDEX = "diffusion_pytorch_model.safetensors.index.json"
MISPLACED = [  # component, what is done, the variant that is asked for, the sentence
    ("transformer", without_index, None)
    + (f"has 1 of 3 shards (diffusion_pytorch_model-00001-of-00003.safetensors) and no {INDEX}, which says what is",),
    ("transformer", renamed("flux1-dev.safetensors"), None)
    + ("but flux1-dev.safetensors; rename flux1-dev.safetensors to diffusion_pytorch_model.safetensors.",),
    ("transformer", renamed("model.safetensors"), None)
    + ("but model.safetensors; rename model.safetensors to diffusion_pytorch_model.safetensors.",),
    ("text_encoder_3", renamed("diffusion_pytorch_model.safetensors"), None)
    + ("; rename diffusion_pytorch_model.safetensors to model.safetensors.",),
    ("text_encoder_3", renamed("MODEL.SAFETENSORS"), None, "; rename MODEL.SAFETENSORS to model.safetensors."),
    ("transformer", of_another_model, None)
    + ("but flux1-dev.safetensors; these are not what SD3Transformer2DModel reads, so download the transformer of a",),
    ("transformer", in_two_gguf, None, "has a.gguf, b.GGUF and no safetensors file; name one of them in the plan."),
    ("text_encoder_3", adapter, None, "has an adapter_config.json, whose adapter transformers would put on it; move"),
]


@pytest.mark.parametrize(("name", "spoil", "variant", "sentence"), MISPLACED, ids=range(len(MISPLACED)))
def test_what_is_missing_is_said_and_what_is_advised_works(copy, name, spoil, variant, sentence):
    folder = copy("sd3")
    (file,) = (folder / name).glob("*.safetensors")
    spoil(folder / name, file)
    with pytest.raises(SourceError) as error:
        load_pipeline(LoadRequest(str(folder), variant=variant), lambda *_: pytest.fail("weights were read"))
    said = str(error.value)
    assert said.startswith(f"{name} ") and sentence in said and said.endswith(".") and "\n" not in said
    if "; rename " in said:
        one, _, other = said.removesuffix(".").rpartition("rename ")[2].partition(" to ")
        (folder / name / one).rename(folder / name / other)
        load_pipeline(LoadRequest(str(folder), variant=variant))
