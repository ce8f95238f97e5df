"""Several schemes of one backend within one component: which layer gets which, and that it stays so."""

import json

import pytest
import torch

from quant_core import (
    BackendUnavailable,
    DeviceUnsupported,
    GenerateRequest,
    LoadRequest,
    QuantPlan,
    QuantSpec,
    SpecError,
    activations,
    backends,
    estimate,
    footprint,
    format_plan,
    format_report,
    generate,
    inspect_pipeline,
    load_pipeline,
    parse_plan,
    save_pipeline,
)
from quant_core.inspection import layer_format
from quant_core.store import Store

REQUEST = GenerateRequest("a lake at noon", width=128, height=128, steps=2, seed=3, max_sequence_length=48)
OF_EACH = {  # text -> the formats of the base scheme, of *attn and of *mlp
    "gguf/Q4_0?Q8_0=*attn&Q5_1=*mlp": ("Q4_0", "Q8_0", "Q5_1"),
    "torchao/nvfp4wo?group_size=32&int8wo=*attn&fp8wo=*mlp": ("NVFP4Tensor", "Int8Tensor", "Float8Tensor"),
    "quanto/int4?float8=*attn&int2=*mlp": ("qint4", "qfloat8_e4m3fn", "qint2"),
}


def both(text):
    """A text as the plan of a denoiser and an encoder of the demo, every layer of them."""
    return parse_plan(f"transformer={text}&skip=none,text_encoder={text}")


def load(plan, source="demo", **settings):
    plan = parse_plan(plan) if isinstance(plan, str) else plan
    return load_pipeline(LoadRequest(str(source), plan, **settings))


def formats(pipeline, component):
    named = getattr(pipeline.pipe, component).named_modules()
    return {name: layer_format(part) for name, part in named if isinstance(part, torch.nn.Linear)}


def census(pipeline):
    return {report.name: (report.formats, report.footprint) for report in inspect_pipeline(pipeline)}


@pytest.fixture(scope="module", params=OF_EACH, ids=lambda text: text.split("/")[0])
def made(request, tmp_path_factory):
    """A text, its pipeline as it was stored, and the store."""
    store = tmp_path_factory.mktemp("store")
    return request.param, load(both(request.param), store=store), store


def test_a_layer_gets_the_scheme_of_the_first_pattern_that_matches_it(made):
    text, pipeline, _ = made
    base, attention, multilayer = OF_EACH[text]
    for component in ("transformer", "text_encoder"):
        found = formats(pipeline, component)
        assert len(found) == {"transformer": 54, "text_encoder": 12}[component]
        for name, stored in found.items():
            parts = {part.removeprefix("self_").removeprefix("proj_") for part in name.split(".")}
            assert stored == (attention if "attn" in parts else multilayer if "mlp" in parts else base), name
        assert set(found.values()) == {*OF_EACH[text]} - ({base} if component == "text_encoder" else set())


@pytest.mark.parametrize(
    ("mixed", "stored"),
    [
        ({"proj_out": "Q5_0", "*proj_out": "Q8_0"}, ("Q5_0", "Q8_0")),
        ({"*proj_out": "Q8_0", "**.attn": "Q5_0"}, ("Q8_0", "Q8_0")),
        ({"proj_out": "Q4_0", "*proj_out": "Q8_0"}, ("Q4_0", "Q8_0")),  # its own scheme, as an exception
    ],
)
def test_the_order_of_the_patterns_counts(mixed, stored):
    spec = QuantSpec("gguf", "Q4_0", skip_modules=(), mixed=mixed)
    found = formats(load(QuantPlan({"transformer": spec})), "transformer")
    assert (found["proj_out"], found["single_transformer_blocks.0.proj_out"]) == stored
    assert found["x_embedder"] == "Q4_0"


def test_skip_patterns_win():
    pipeline = load("transformer=gguf/Q8_0?Q4_0=**.attn&skip=*.to_q|proj_out")
    report = {report.name: report for report in inspect_pipeline(pipeline)}["transformer"]
    assert set(report.left_out.values()) == {"skipped by the plan"} and len(report.left_out) == 6
    assert report.formats == {"Q4_0": 20, "Q8_0": 28}
    assert (report.requested, report.method) == ("gguf/Q8_0+Q4_0", "gguf")
    assert "28 Q8_0" in format_report([report]) and "20 Q4_0" in format_report([report])


@pytest.mark.parametrize(("text", "skips"), [("gguf/Q8_0?Q4_0=**.ff", False), ("gguf/Q4_0?Q8_0=**.ff", True)])
def test_what_is_recommended_to_skip_follows_from_the_spec_s_own_scheme(text, skips):
    report = {report.name: report for report in inspect_pipeline(load(f"transformer={text}"))}["transformer"]
    assert bool(report.left_out) == skips


def test_a_layer_that_its_own_scheme_cannot_take_is_left_out(tiny):
    plan = "transformer=quanto/float8?int4=**.feed_forward&skip=none"
    report = {report.name: report for report in inspect_pipeline(load(plan, tiny("zimage")))}["transformer"]
    left_out = {name: why for name, why in report.left_out.items() if ".feed_forward." in name}
    assert set(left_out.values()) == {"in_features 682 is not a multiple of 32"} and len(left_out) == 3
    assert report.formats["qint4"] == 6


def test_each_layer_has_the_options_that_its_scheme_reads():
    plan = "transformer=torchao/fp8wo?group_size=64&int8wo=**.attn"
    model = load(plan).pipe.transformer
    scale = model.transformer_blocks[0].attn.to_q.weight.scale
    assert scale.shape == (model.transformer_blocks[0].attn.to_q.out_features, model.inner_dim // 64)
    (spec,) = parse_plan(plan).components.values()
    recipes = spec.recipes(torch.bfloat16, torch.device("cpu"))
    assert {scheme: recipe.options for scheme, recipe in recipes.items()} == {
        "fp8wo": {},
        "int8wo": {"group_size": "64"},
    }


def test_the_store_gives_the_same_bits(made):
    text, stored, store = made
    again, unstored = (load(both(text), store=where) for where in (store, "off"))
    assert [pipeline.origins["transformer"].kind for pipeline in (stored, again, unstored)] == [
        *("stored", "store", "quantized"),
    ]
    expected = generate(unstored, REQUEST)
    for pipeline in (stored, again):
        assert census(pipeline) == census(unstored)
        assert torch.equal(generate(pipeline, REQUEST), expected)


def test_another_mixture_is_another_entry(made):
    text, _, store = made
    count = len(Store(store).entries())
    plan = both(text).components["transformer"]
    reordered = QuantSpec(plan.backend, plan.scheme, plan.options, (), dict(list(plan.mixed.items())[:1]))
    assert load(QuantPlan({"transformer": reordered}), store=store).origins["transformer"].kind == "stored"
    alone = f"transformer={plan.backend}/{plan.scheme}?skip=none"
    assert load(alone, store=store).origins["transformer"].kind == "stored"
    assert len(Store(store).entries()) == count + 2


def test_the_estimate_is_what_is_loaded(made):
    text, pipeline, _ = made
    found = estimate(LoadRequest("demo", both(text)), REQUEST)
    stored = {report.name: report.footprint for report in inspect_pipeline(pipeline)}
    assert {part.name: part.footprint for part in found.components} == stored
    assert {part.name: part.quantization for part in found.components}["transformer"].count("+") == 2
    taken = activations(pipeline, REQUEST)
    assert {part.name: part.activations for part in found.components} == taken


def test_a_saved_pipeline_is_what_it_was(made, tmp_path):
    text, pipeline, _ = made
    saved = {part.name: part for part in save_pipeline(pipeline, tmp_path / "saved")}
    again = load("none", tmp_path / "saved")
    assert census(again) == census(pipeline)
    assert formats(again, "transformer") == formats(pipeline, "transformer")
    assert torch.equal(generate(again, REQUEST), generate(pipeline, REQUEST))
    assert saved["transformer"].quantization == str(both(text).components["transformer"])
    if text.startswith("quanto"):
        assert saved["transformer"].obstacle == "diffusers reads one quanto scheme per component"
    elif text.startswith("torchao"):
        assert not saved["transformer"].obstacle and not saved["text_encoder"].obstacle


def test_what_plain_libraries_read_of_it_makes_the_same_image(tmp_path):
    import diffusers

    text = "torchao/int8dq?int8wo=*attn|**.SelfAttention&fp8wo=proj_out|**.fc1|**.wo"
    pipeline = load(f"{text}&skip=x_embedder|**.fc2|**.wi_0")  # the last two of an encoder each
    assert set(formats(pipeline, "text_encoder").values()) == {"Int8Tensor", "Float8Tensor", None}
    save_pipeline(pipeline, tmp_path / "saved")
    before, expected = census(pipeline), generate(pipeline, REQUEST)
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    for name in pipeline.models:
        pipeline.pipe.register_modules(**{name: getattr(plain, name)})
    assert census(pipeline) == before
    assert torch.equal(generate(pipeline, REQUEST), expected)


def test_plain_diffusers_reads_a_gguf_file_of_several_types(tmp_path):
    import diffusers

    pipeline = load("transformer=gguf/Q4_0?Q8_0=**.attn|proj_out&Q5_0=**.ff")
    save_pipeline(pipeline, tmp_path / "saved")
    expected, found = generate(pipeline, REQUEST), formats(pipeline, "transformer")
    folder = tmp_path / "saved/transformer"
    transformer = diffusers.FluxTransformer2DModel.from_single_file(
        str(folder / "weights.gguf"),
        config=str(folder),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        torch_dtype=torch.bfloat16,
    )
    pipeline.pipe.register_modules(transformer=transformer)
    assert formats(pipeline, "transformer") == found
    assert torch.equal(generate(pipeline, REQUEST), expected)


def test_plain_diffusers_finds_no_weights_where_it_cannot_read_them(tmp_path):
    import diffusers

    save_pipeline(load("transformer=quanto/float8?int8=**.attn"), tmp_path / "saved")
    with pytest.raises(OSError, match="no file named"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)


def test_patterns_of_a_default_have_to_match_in_one_component_only():
    pipeline = load("gguf/Q4_0?Q8_0=**.wo")
    assert {name: set(formats(pipeline, name).values()) for name in ("text_encoder", "text_encoder_2")} == {
        "text_encoder": {"Q4_0"},
        "text_encoder_2": {"Q4_0", "Q8_0"},
    }


WRITTEN = [
    (QuantSpec("gguf", "Q4_0", mixed={"**.attn": "Q8_0"}), "gguf/Q4_0?Q8_0=**.attn"),
    (
        QuantSpec("gguf", "Q4_0", {}, (), {"transformer_blocks.*.attn": "Q8_0", "proj_out": "Q8_0", "**.ff": "Q5_0"}),
        "gguf/Q4_0?Q8_0=transformer_blocks.*.attn|proj_out&Q5_0=**.ff&skip=none",
    ),
    (
        QuantSpec("gguf", "Q4_0", mixed={"a": "Q8_0", "b": "Q5_0", "c": "Q8_0"}),
        "gguf/Q4_0?Q8_0=a&Q5_0=b&Q8_0=c",
    ),
    (
        QuantSpec("torchao", "fp8wo", {"group_size": "64"}, ("d",), {"a,b|c": "int8wo"}),
        "torchao/fp8wo?group_size=64&int8wo=a%2Cb%7Cc&skip=d",
    ),
]


@pytest.mark.parametrize(("spec", "text"), WRITTEN, ids=[text for _, text in WRITTEN])
def test_a_mixture_is_read_back_as_it_was_written(spec, text):
    plan = QuantPlan({"transformer": spec})
    assert format_plan(plan) == f"transformer={text}" and parse_plan(format_plan(plan)) == plan
    assert hash(parse_plan(format_plan(plan))) == hash(plan)
    again = parse_plan(json.dumps(plan.to_dict()))
    assert again == plan == QuantPlan.from_dict(plan.to_dict())
    assert list(again.components["transformer"].mixed.items()) == list(spec.mixed.items())


def test_another_order_is_another_spec():
    first, second = (QuantSpec("gguf", "Q4_0", mixed=mixed) for mixed in ({"a": "Q8_0", "b": "Q5_0"},) * 2)
    other = QuantSpec("gguf", "Q4_0", mixed={"b": "Q5_0", "a": "Q8_0"})
    assert first == second != other and hash(first) == hash(second)


REFUSED = [
    (
        "bitsandbytes_4bit/nf4?fp4=a",
        "bitsandbytes_4bit takes one scheme per component; these take several: gguf, quanto, torchao.",
    ),
    ("gguf/Q4_0?file=a", "gguf/file takes each layer as its file has it; it cannot be mixed."),
    ("gguf/file?path=a.gguf&Q4_0=a", "gguf/file takes each layer as its file has it; it cannot be mixed."),
    (
        "quanto/int4?Q8_0=a",
        "Q8_0 is another backend's scheme; a component takes those of one, here float8, int2, int4, int8.",
    ),
    ("gguf/Q4_0?Q9_0=a", "gguf has no option 'Q9_0'; it takes: path."),
    ("gguf/Q4_0?Q8_0=", "'' is no module pattern; write a module's name or a glob of it."),
    ("gguf/Q4_0?Q8_0=a&Q5_0=b|a", "'gguf/Q4_0?Q8_0=a&Q5_0=b|a' gives a twice; give it once."),
    (
        "torchao/fp8wo?nvfp4wo=a&group_size=64",
        "group_size has no effect on torchao/fp8wo+nvfp4wo; it belongs to: int4wo, int8wo.",
    ),
    (
        '{"default": {"backend": "gguf", "scheme": "Q4_0", "mixed": {"a": "int8"}}}',
        "gguf has no scheme 'int8'; use one of: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, file.",
    ),
    (
        '{"default": {"backend": "gguf", "scheme": "Q4_0", "mixed": ["a"]}}',
        "mixed is ['a']; write an object: module pattern to scheme.",
    ),
    (
        '{"default": {"backend": "gguf", "scheme": "Q4_0", "mixed": {"a": ["Q8_0"]}}}',
        "gguf has no scheme ['Q8_0']; use one of: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, file.",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED, ids=[text for text, _ in REFUSED])
def test_what_cannot_be_mixed_gets_a_sentence(text, sentence):
    with pytest.raises(SpecError) as error:
        parse_plan(text)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (
            "transformer=gguf/Q4_0?Q8_0=proj_ot",
            "Q8_0's pattern 'proj_ot' matches no module of FluxTransformer2DModel (did you mean 'proj_out'?).",
        ),
        ("transformer=gguf/Q4_0?Q8_0=proj_out&Q5_0=to_q", "Q5_0's pattern 'to_q' matches no module of FluxTransfo"),
        ("gguf/Q4_0?Q8_0=nowhere", "Q8_0's pattern 'nowhere' matches no module of CLIPTextModel, FluxTransformer2"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(plan, sentence):
    with pytest.raises(SpecError) as error:
        load(plan)
    assert str(error.value).startswith(sentence)


def test_each_scheme_has_to_run_here():
    with pytest.raises(DeviceUnsupported, match=r"torchao/fp8dq needs a CUDA GPU .*; this run is on cpu\."):
        load("transformer=torchao/int8wo?fp8dq=**.attn")
    with pytest.raises(BackendUnavailable, match="torchao/fp8dq_int4wo needs: pip install 'mslk"):
        load("transformer=torchao/int8wo?fp8dq_int4wo=**.attn")


@pytest.mark.parametrize("mixed", [5, {"proj_out": "int3"}, {"proj_out": 3}])
def test_a_damaged_config_of_a_saved_mixture_gets_a_sentence(tmp_path, edit, mixed):
    save_pipeline(load("transformer=quanto/float8?int8=**.attn"), tmp_path / "saved")
    path = tmp_path / "saved/transformer/config.json"
    config = json.loads(path.read_text())["quantization_config"]
    assert len(config["mixed"]) in (25, 29) and set(config["mixed"].values()) <= {"int8", "float8"}
    edit(path, quantization_config=config | {"mixed": mixed})
    with pytest.raises(SpecError) as error:
        load("none", tmp_path / "saved")
    assert "int3" in str(error.value) or "mixed is 5" in str(error.value) or "no scheme 3" in str(error.value)


def test_the_footprint_of_a_mixture_is_between_those_of_its_schemes():
    sizes = [
        footprint(load(f"transformer=gguf/{text}&skip=none").pipe.transformer)
        for text in ("Q4_0?Q4_0=proj_out", "Q4_0?Q8_0=**.attn", "Q8_0?Q8_0=proj_out")
    ]
    assert sizes == sorted(set(sizes))


def test_backends_say_whether_they_mix():
    assert {name for name, backend in backends().items() if backend.mixes} == {"gguf", "quanto", "torchao"}


@pytest.mark.parametrize(
    "text",
    [
        "transformer=gguf/Q4_0?Q8_0=proj_out&skip=proj_out",
        "transformer=gguf/Q4_0?Q8_0=**.attn&Q5_0=transformer_blocks.0.attn",
        "gguf/Q4_0?Q8_0=norm_out&skip=norm_out",
    ],
)
def test_a_pattern_that_gives_its_scheme_to_no_layer_is_refused(text):
    with pytest.raises(
        SpecError, match=r"^(Q8_0=proj_out|Q5_0=transformer_blocks.0.attn|Q8_0=norm_out) has no effect: "
    ):
        load_pipeline(LoadRequest("demo", parse_plan(text)))
