"""Every tensor of a checkpoint is used, harmless by rule, or an error that says what the checkpoint looks like."""

import logging
import random
import re
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from quant_core import LoadRequest, SourceError, accounted, inspect_pipeline, load_pipeline, parse_plan, save_pipeline
from quant_core.accounted import account
from quant_core.availability import quiet_libraries
from quant_core.inspection import format_report
from quant_core.locating import find_folder
from quant_core.packed import all_tensors
from quant_core.reading import read_weights
from quant_core.source import ComponentInfo, read_index

from .tiny_pipelines import BUILDERS, T5_SIZES

# pipeline -> its components with weights
COMPONENTS = {
    "demo": ("text_encoder", "text_encoder_2", "transformer", "vae"),
    "pixart": ("text_encoder", "transformer", "vae"),
    "sd": ("safety_checker", "text_encoder", "unet", "vae"),
    "sd3": ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae"),
    "wan": ("text_encoder", "transformer", "vae"),
    "zimage": ("text_encoder", "transformer", "vae"),
}
ALL = [(pipeline, name) for pipeline, names in COMPONENTS.items() for name in names]


def read(index, name):
    """One component, as a load checks and reads it."""
    account(index.models[name], torch.bfloat16, None, None)
    with quiet_libraries(), torch.no_grad():
        return dict(all_tensors(read_weights(index.models[name], torch.bfloat16, None)))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture
def component(tiny, tmp_path):
    """(pipeline, component) -> (the index of a copy of the pipeline, the component's file, its tensors)."""

    def take(pipeline, name):
        source = find_folder("demo") if pipeline == "demo" else tiny(pipeline)
        folder = tmp_path / pipeline
        folder.mkdir()
        shutil.copy(source / "model_index.json", folder)
        shutil.copytree(source / name, folder / name)
        (file,) = (folder / name).glob("*.safetensors")
        return read_index(folder), file, apart(load_file(file))

    return take


def beside_a_weight(rng, names):
    weight = rng.choice([name for name in names if name.endswith(".weight")])
    return weight.removesuffix("weight") + rng.choice(["scale_weight", "weight_scale", "bias_", "qzeros"])


def of_another_block(rng, names):
    numbered = [name for name in names if re.search(r"\.\d+\.", name)]
    return re.sub(r"\.(\d+)\.", lambda found: f".{int(found[1]) + 50}.", rng.choice(numbered), count=1)


def in_a_module(rng, names):
    return f"{rng.choice([name for name in names if '.' in name]).rpartition('.')[0]}.extra"


def on_top(rng, names):
    return rng.choice(["extra.weight", "scaled_fp8", "head.proj.weight"])


def under_a_prefix(rng, names):
    return rng.choice(["model.", "transformer.", "text_model.", "module."]) + rng.choice(names)


ADDED = (beside_a_weight, of_another_block, in_a_module, on_top, under_a_prefix)


@pytest.mark.parametrize(("pipeline", "name"), ALL, ids=map("-".join, ALL))
def test_a_tensor_more_less_or_of_another_name_is_never_a_silent_success(component, caplog, pipeline, name):
    caplog.set_level(logging.INFO, "quant_core")
    rng = random.Random(f"{pipeline}.{name}")
    index, file, tensors = component(pipeline, name)
    whole, names, wrong = read(index, name), sorted(tensors), []

    def spoil(what, changed):
        caplog.clear()
        save_file(changed, file, {"format": "pt"})
        try:
            found = read(index, name)
        except SourceError as error:
            if len(str(error)) > 300 or "\n" in str(error):
                wrong.append((what, str(error)))
            return
        told = any("does not use" in line for line in caplog.messages)
        if not same(found, whole) or not (told or len(changed) <= len(tensors)):
            wrong.append((what, "was read"))

    for _ in range(2):
        gone = rng.choice(names)
        spoil(f"without {gone}", {key: value for key, value in tensors.items() if key != gone})
        renamed = rng.choice([f"{gone}_", in_a_module(rng, names), of_another_block(rng, names), f"model.{gone}"])
        spoil(f"{gone} as {renamed}", {renamed if key == gone else key: value for key, value in tensors.items()})
    for added in ADDED:
        key = added(rng, names)
        spoil(f"with {key}", {key: torch.full((3, 2), 0.5), **tensors})
    assert wrong == []


def test_the_net_is_over_all_tiny_pipelines(tiny):
    assert COMPONENTS.keys() == {"demo", *BUILDERS}
    for pipeline, names in COMPONENTS.items():
        assert read_index(find_folder("demo") if pipeline == "demo" else tiny(pipeline)).models.keys() == set(names)


IDS, NUMBERS, OLD = torch.arange(77).view(1, 77), torch.ones(4, 4), {"to_q": "query", "to_k": "key", "to_v": "value"}
HARMLESS = {  # what real checkpoints have that their class does not take: pipeline, component, config, tensors
    "positions of older versions": ("sd", "text_encoder", [], {"text_model.embeddings.position_ids": IDS}),
    "positions of a safety checker": (
        *("sd", "safety_checker", []),
        {"vision_model.vision_model.embeddings.position_ids": torch.arange(5).view(1, 5)},
    ),
    "a whole CLIP": (
        *("sd", "text_encoder", ["CLIPModel"]),
        {
            "logit_scale": torch.ones(()),
            "text_projection.weight": NUMBERS,
            "visual_projection.weight": NUMBERS,
            "vision_model.encoder.layers.0.layer_norm1.weight": NUMBERS,
        },
    ),
    "a whole T5": (
        *("sd3", "text_encoder_3", ["T5ForConditionalGeneration"]),
        {"decoder.block.0.layer.0.SelfAttention.q.weight": NUMBERS, "lm_head.weight": NUMBERS},
    ),
    "a whole UMT5": (
        *("wan", "text_encoder", ["UMT5ForConditionalGeneration"]),
        {"decoder.block.0.layer.0.SelfAttention.q.weight": NUMBERS, "lm_head.weight": NUMBERS},
    ),
    "the head of a language model": (
        *("zimage", "text_encoder", ["Qwen3ForCausalLM"]),
        {"lm_head.weight": NUMBERS, "layers.0.self_attn.rotary_emb.inv_freq": NUMBERS},
    ),
    "what the class says": ("wan", "transformer", [], {"blocks.0.attn2.norm_added_q.weight": NUMBERS}),
}


def apart(tensors):
    return {key: value.clone() for key, value in tensors.items()}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_real_checkpoints_have_beside_their_weights_is_left_and_told(component, edit, caplog, what):
    caplog.set_level(logging.INFO, "quant_core")
    pipeline, name, architectures, more = HARMLESS[what]
    index, file, tensors = component(pipeline, name)
    whole = read(index, name)
    if architectures:
        edit(file.parent / "config.json", architectures=architectures)
        index = read_index(index.folder)
    save_file(tensors | apart(more), file, {"format": "pt"})
    caplog.clear()
    assert same(read(index, name), whole)
    assert any(f"{name}: {index.models[name].class_name} does not use" in line for line in caplog.messages)


def test_a_part_that_its_own_class_should_have_is_refused(component):
    pipeline, name, _, more = HARMLESS["a whole UMT5"]
    index, file, tensors = component(pipeline, name)
    save_file(tensors | apart(more), file, {"format": "pt"})
    with pytest.raises(SourceError, match=f"{name}: its checkpoint has 1 tensor .* does not take, as dec.*; load one"):
        read(index, name)


ONE, SCHEDULE = torch.ones(()), torch.linspace(0, 1, 1000)
LEFTOVERS = {  # what public checkpoints have that no layer reads: pipeline, component, tensors
    "the empty prompt of PixArt-alpha": ("pixart", "transformer", {"caption_projection.y_embedding": NUMBERS}),
    "a CLIP's temperature": ("sd", "text_encoder", {"logit_scale": ONE}),
    "counters of an average": ("sd", "unet", {"model_ema.decay": ONE, "model_ema.num_updates": torch.tensor(5)}),
    "an autoencoder's loss": ("sd", "vae", {"loss.logvar": ONE}),
    "a schedule of noise": (
        *("sd", "unet"),
        dict.fromkeys(("betas", "alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "posterior_mean_coef1"), SCHEDULE),
    ),
    "the head of a language model": ("zimage", "text_encoder", {"lm_head.weight": NUMBERS}),
}


@pytest.mark.parametrize("what", LEFTOVERS)
def test_leftovers_of_public_checkpoints_are_left_and_told(component, what):
    pipeline, name, more = LEFTOVERS[what]
    index, file, tensors = component(pipeline, name)
    whole = read(index, name)
    save_file(tensors | apart(more), file, {"format": "pt"})
    assert account(index.models[name], torch.bfloat16, None, None) == sorted(more)
    assert same(read(index, name), whole)


@pytest.mark.parametrize("plan", ["none", "transformer=torchao/int8wo"])
def test_the_log_and_the_inspection_tell_of_leftovers(copy, caplog, plan):
    folder = copy("pixart")
    (file,) = (folder / "transformer").glob("*.safetensors")
    save_file(load_file(file) | {"caption_projection.y_embedding": NUMBERS}, file, {"format": "pt"})
    pipeline = load_pipeline(LoadRequest(str(folder), parse_plan(plan)))
    said = "does not use caption_projection.y_embedding, which its checkpoint has"
    assert f"transformer {said}" in format_report(inspect_pipeline(pipeline)).splitlines()
    (line,) = (record for record in caplog.records if said in record.message)
    assert line.levelno == logging.WARNING and line.message == f"transformer of {folder.name} {said}."


@pytest.mark.parametrize(
    ("pipeline", "name", "more"),
    [
        ("pixart", "transformer", {f"old_{number}": ONE for number in range(17)}),
        ("pixart", "transformer", {"caption_projection.linear_1_scale": ONE}),
        ("pixart", "transformer", {"caption_projection.linear_1.extra": ONE}),
        ("pixart", "transformer", {"caption_projection.linear_3.extra": ONE}),
        ("pixart", "transformer", {"caption_projection.bias": ONE}),
        ("pixart", "transformer", {"caption_projection.zero_point": ONE}),
        ("pixart", "transformer", {"caption_projection.y_embedding": ONE, "scaled_fp8": ONE}),
        ("pixart", "transformer", {"transformer_blocks.40.extra": ONE}),
        ("pixart", "transformer", {"proj_out.scale_shift_table": ONE}),
        ("pixart", "transformer", {"adaln_single.emb.aspect_ratio_embedder": ONE}),
        ("pixart", "transformer", {"loss.proj.weight": NUMBERS}),
        ("sd", "unet", {"model_ema.layers.0.decay": ONE}),
        ("sd3", "transformer", {"pos_embed.pos_embed_max": ONE}),
    ],
)
def test_what_a_layer_could_mean_is_no_leftover(component, pipeline, name, more):
    index, file, tensors = component(pipeline, name)
    save_file(tensors | apart(more), file, {"format": "pt"})
    with pytest.raises(SourceError, match=f"{name}: its checkpoint (has|is in) .*{max(more)[:4]}"):
        account(index.models[name], torch.bfloat16, None, None)


def test_a_component_is_accounted_for_once_until_it_changes(component, edit, monkeypatch):
    index, file, tensors = component("pixart", "vae")
    made, empty = [], accounted.empty_model
    monkeypatch.setattr(accounted, "_ACCOUNTED", {})
    monkeypatch.setattr(accounted, "empty_model", lambda *arguments: made.append(1) or empty(*arguments))
    for _ in range(3):
        assert account(index.models["vae"], torch.bfloat16, None, None) == [] and len(made) == 1
    edit(file.parent / "config.json", scaling_factor=0.5)
    account(read_index(index.folder).models["vae"], torch.bfloat16, None, None)
    assert len(made) == 2
    save_file(tensors | {"encoder.extra.weight": ONE}, file, {"format": "pt"})
    for _ in range(2):
        with pytest.raises(SourceError, match=r"does not take, as encoder\.extra\.weight"):
            account(index.models["vae"], torch.bfloat16, None, None)


WORDS = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIDES = SIZES | {"projection_dim": 32}
HALVES = {"text_config": SIDES | WORDS, "vision_config": SIDES | {"image_size": 16, "patch_size": 8}}
LANGUAGE = SIZES | WORDS | {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}
PARTS = [  # a whole model, its config, and a class that pipelines take of it
    ("CLIPModel", {**HALVES, "projection_dim": 32}, "CLIPTextModel"),
    ("CLIPModel", {**HALVES, "projection_dim": 32}, "CLIPTextModelWithProjection"),
    ("CLIPModel", {**HALVES, "projection_dim": 32}, "CLIPVisionModel"),
    ("CLIPModel", {**HALVES, "projection_dim": 32}, "CLIPVisionModelWithProjection"),
    ("SiglipModel", HALVES, "SiglipVisionModel"),
    ("LlamaForCausalLM", LANGUAGE, "LlamaModel"),
    ("Gemma2ForCausalLM", LANGUAGE, "Gemma2Model"),
    ("Qwen3ForCausalLM", LANGUAGE, "Qwen3Model"),
    ("T5ForConditionalGeneration", T5_SIZES, "T5EncoderModel"),
    ("UMT5ForConditionalGeneration", T5_SIZES, "UMT5EncoderModel"),
    ("BertForPreTraining", SIZES | WORDS, "BertModel"),
]


@pytest.mark.parametrize(("whole", "config", "part"), PARTS, ids=[f"{part} of {whole}" for whole, _, part in PARTS])
def test_a_class_is_read_from_the_checkpoint_of_a_whole_model(tmp_path, whole, config, part):
    torch.manual_seed(0)
    cls = getattr(transformers, whole)
    model = cls(cls.config_class(**config))
    model.save_pretrained(tmp_path / "text_encoder")
    info = ComponentInfo("text_encoder", "transformers", part, tmp_path / "text_encoder")
    account(info, torch.float32, None, None)
    with quiet_libraries(), torch.no_grad():
        found = read_weights(info, torch.float32, None).state_dict()
    assert found
    for name, tensor in found.items():
        assert any(torch.equal(tensor, weight) for weight in model.state_dict().values()), name


@pytest.mark.parametrize(
    ("pipeline", "name", "rename"),
    [
        ("sd", "vae", lambda key: re.sub(r"to_(q|k|v)\.", lambda found: OLD[f"to_{found[1]}"] + ".", key)),
        ("sd", "vae", lambda key: key.replace("to_out.0.", "proj_attn.")),
        ("zimage", "text_encoder", lambda key: f"model.{key}"),
        ("sd", "text_encoder", lambda key: f"text_model.{key}"),
        ("sd3", "text_encoder_3", lambda key: key.replace("shared", "encoder.embed_tokens")),
    ],
)
def test_names_that_the_libraries_rename_are_read(component, pipeline, name, rename):
    index, file, tensors = component(pipeline, name)
    whole, renamed = read(index, name), {rename(key): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, {"format": "pt"})
    assert same(read(index, name), whole)


@pytest.mark.parametrize(
    ("pipeline", "name", "one", "other"),
    [
        ("sd", "vae", "decoder.mid_block.attentions.0.to_q.bias", "decoder.mid_block.attentions.0.query.bias"),
        ("sd", "text_encoder", "final_layer_norm.weight", "text_model.final_layer_norm.weight"),
        ("zimage", "text_encoder", "norm.weight", "model.norm.weight"),
    ],
)
def test_two_names_of_one_weight_are_refused(component, pipeline, name, one, other):
    index, file, tensors = component(pipeline, name)
    save_file(tensors | {other: tensors[one] + 1}, file, {"format": "pt"})
    with pytest.raises(SourceError) as error:
        read(index, name)
    said = str(error.value)
    assert said.startswith(f"{name}: its checkpoint has both ") and said.endswith(", which are one weight.")
    assert one in said and other in said


def test_weights_that_should_be_one_and_differ_are_refused(component):
    index, file, tensors = component("sd3", "text_encoder_3")
    other = "encoder.embed_tokens.weight"
    save_file(tensors | {other: tensors["shared.weight"].clone()}, file, {"format": "pt"})
    read(index, "text_encoder_3")
    save_file(tensors | {other: tensors["shared.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(SourceError) as error:
        read(index, "text_encoder_3")
    assert f"{other} and shared.weight are one weight of T5EncoderModel, and its" in str(error.value)


QWEN = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "architectures": ["Qwen3ForCausalLM"]}


@pytest.mark.parametrize(
    ("pipeline", "name", "config", "sentence"),
    [
        ("sd3", "text_encoder_3", {"num_layers": 0}, "has encoder.block.0, and its config.json describes 0 encoder.b"),
        ("wan", "transformer", {"num_layers": 1}, "has blocks.1, and its config.json describes 1 blocks; the two are"),
        (
            "zimage",
            "text_encoder",
            QWEN,
            "has layers.1, and its config.json describes 1 layers; the two are not of one model.",
        ),
    ],
)
def test_more_blocks_than_the_config_describes_are_refused(component, edit, pipeline, name, config, sentence):
    index, file, tensors = component(pipeline, name)
    edit(file.parent / "config.json", **config)
    if "layers" in next(iter(sorted(tensors))):
        save_file({f"model.{key}": value for key, value in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(SourceError) as error:
        read(read_index(index.folder), name)
    assert f"{name}: its checkpoint {sentence}" in str(error.value)


def scaled(tensors, ending, kind):
    """Matrices in 8 bits, each with its scale beside it."""
    made = {}
    for key, weight in tensors.items():
        if key.endswith(".weight") and weight.ndim == 2 and "embed" not in key and "shared" not in key:
            scale = weight.abs().max().float() / (127 if kind == torch.int8 else 448)
            made |= {key: (weight.float() / scale).to(kind), key.removesuffix("weight") + ending: scale.reshape(1)}
        else:
            made[key] = weight
    return made


@pytest.mark.parametrize(
    ("ending", "kind", "more", "words"),
    [
        ("scale_weight", torch.float8_e4m3fn, {"scaled_fp8": torch.empty(2)}, "ComfyUI's scaled fp8"),
        ("scale_weight", torch.float8_e4m3fn, {}, "ComfyUI's scaled fp8"),
        ("weight_scale", torch.float8_e4m3fn, {}, "a quantized"),
        ("weight_scale", torch.int8, {}, "a quantized"),
        (
            "weight_scale",
            torch.int8,
            {"proj_out.comfy_quant": torch.zeros(9, dtype=torch.uint8)},
            "ComfyUI's quantize",
        ),
        ("SCB", torch.int8, {}, "bitsandbytes' 8-bit"),
    ],
)
@pytest.mark.parametrize(("name", "plan"), [("transformer", "none"), ("text_encoder_3", "torchao/int8wo")])
def test_a_quantized_file_whose_config_does_not_say_so_is_named(copy, ending, kind, more, words, name, plan):
    folder = copy("sd3")
    (file,) = (folder / name).glob("*.safetensors")
    save_file(scaled(load_file(file), ending, kind) | more, file, {"format": "pt"})
    with pytest.raises(SourceError) as error:
        load_pipeline(LoadRequest(str(folder), parse_plan(plan)), lambda *_: pytest.fail("weights were read"))
    said = str(error.value)
    assert said.startswith(f"{name}: its checkpoint is in {words}") and " does not read; load the checkpoint" in said


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """Scheme -> a folder whose transformer and T5 are quantized with it already."""
    made = {}

    def folder(scheme):
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp("packed") / "sd3"
            plan = parse_plan(f"transformer={scheme},text_encoder_3={scheme}")
            save_pipeline(load_pipeline(LoadRequest(str(tiny("sd3")), plan)), made[scheme])
        return made[scheme]

    return folder


@pytest.mark.parametrize("name", ["transformer", "text_encoder_3"])
@pytest.mark.parametrize("where", ["layer", "layer.weight", "module", "top"])
@pytest.mark.parametrize(
    "scheme", ["torchao/int8wo", "bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8", "quanto/int8"]
)
def test_a_checkpoint_that_is_quantized_already_has_no_other_tensors_either(packed, tmp_path, scheme, where, name):
    folder = shutil.copytree(packed(scheme), tmp_path / "sd3")
    (file,) = (folder / name).glob("*.safetensors")
    with safe_open(file, framework="pt") as opened:
        tensors, about = {key: opened.get_tensor(key).clone() for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    layer = {
        "transformer": "transformer_blocks.0.attn.to_q",
        "text_encoder_3": "encoder.block.0.layer.0.SelfAttention.q",
    }
    module = layer[name].rpartition(".")[0]
    more = {"layer": layer[name], "layer.weight": f"{layer[name]}.weight", "module": module, "top": "more"}[where]
    save_file(tensors | {f"{more}.extra": torch.ones(1)}, file, about)
    with pytest.raises(SourceError) as error:
        read(read_index(folder), name)
    assert str(error.value).startswith(f"{name}") and f"{more}.extra" in str(error.value)


@pytest.mark.parametrize("kind", [torch.int16, torch.uint16, torch.int8, torch.uint8, torch.bool])
def test_integers_are_not_taken_for_weights(component, kind):
    index, file, tensors = component("sd3", "text_encoder_2")
    size = kind.itemsize
    save_file({key: value.view(kind) if size == 2 else value.to(kind) for key, value in tensors.items()}, file)
    with pytest.raises(SourceError) as error:
        read(index, "text_encoder_2")
    assert re.search(r"model.safetensors stores \S+ as (I16|U16|I8|U8|BOOL), which are no weights", str(error.value))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float32, torch.float64])
def test_numbers_of_any_precision_are_read(component, kind):
    index, file, tensors = component("sd3", "transformer")
    save_file({key: value.to(kind) for key, value in tensors.items()}, file, {"format": "pt"})
    found = read(index, "transformer")
    assert all(torch.equal(found[key], value.to(kind).to(torch.bfloat16)) for key, value in tensors.items())
