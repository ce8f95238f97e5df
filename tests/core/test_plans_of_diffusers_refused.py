"""What a PipelineQuantizationConfig cannot say here, and the sentence that tells it."""

import pytest

from quant_core import SpecError, backends, parse_plan

MODES = "Give either quant_mapping, or quant_backend with quant_kwargs; they are two different modes."
NEITHER = "Give quant_backend with quant_kwargs, or quant_mapping; the config has neither."
KEYS = "quant_backend, quant_kwargs, components_to_quantize, quant_mapping"
BITS = "BitsAndBytesConfig must say load_in_4bit=True or load_in_8bit=True, and not both."
KNOWN = ", ".join(backends())
CANNOT = "cannot be read in a plan; only calls, literals and torch dtypes can."
CALL = "PipelineQuantizationConfig"
UNREADABLE = "The plan is no Python that can be read; write one PipelineQuantizationConfig(...)."


def mapping(config):
    return f'PipelineQuantizationConfig(quant_mapping={{"transformer": {config}}})'


def bnb(bits, arguments):
    return f"{CALL}(quant_backend='bitsandbytes_{bits}bit', quant_kwargs={arguments})"


REFUSED = [
    (f"{CALL}(quant_backend='quanto', quant_mapping={{'a': QuantoConfig()}})", MODES),
    (f"{CALL}(quant_kwargs={{'weights': 'int8'}}, quant_mapping={{'a': QuantoConfig()}})", MODES),
    (f"{CALL}(components_to_quantize=['a'], quant_mapping={{'a': QuantoConfig()}})", MODES),
    (f"{CALL}()", NEITHER),
    (f"{CALL}(quant_mapping={{}})", NEITHER),
    ('{"quant_backend": null}', NEITHER),
    (f"{CALL}(quant_backend='quanto', bits=8)", f"{CALL} has no bits; it has {KEYS}."),
    (f"{CALL}(quant_mapping=['a'])", "quant_mapping is ['a']; it maps the name of a component to its config."),
    (f"{CALL}(quant_backend=4)", "quant_backend is 4 with {}; it takes a name, and arguments by name."),
    (f"{CALL}(quant_backend='sdnq')", f"sdnq is no quantization backend known here; use one of: {KNOWN}."),
    (f"{CALL}('quanto', {{}})", f"{CALL} is called with arguments in order; write their names."),
    (f"{CALL}(**config)", f"{CALL}(**...) cannot be read; write its arguments out."),
    (f"{CALL}(quant_backend='quan' + 'to')", f"\"'quan' + 'to'\" {CANNOT}"),
    (f"{CALL}(", "The plan is no valid Python: '(' was never closed in line 1."),
    (f"{CALL}(quant_backend='quanto')\nprint(1)", f"The plan must be one {CALL}(...) call, and nothing else."),
    (bnb(4, {"load_in_8bit": True}), "bitsandbytes_4bit contradicts load_in_8bit=True; keep one of them."),
    (bnb(8, {"load_in_4bit": True}), "bitsandbytes_8bit contradicts load_in_4bit=True; keep one of them."),
    (
        bnb(4, {"load_in_4bit": True, "load_in_8bit": True}),
        "bitsandbytes_4bit contradicts load_in_8bit=True; keep one of them.",
    ),
    (bnb(4, {"load_in_4bit": False}), "bitsandbytes_4bit contradicts load_in_4bit=False; keep one of them."),
    (bnb(4, {"bnb_4bit_quant_type": "nf5"}), "bitsandbytes_4bit has no scheme 'nf5'; use one of: fp4, nf4."),
    (
        bnb(8, {"load_in_8bit": True, "bnb_4bit_use_double_quant": True}),
        "bitsandbytes_8bit has no option 'double_quant'; it takes: threshold.",
    ),
    ("BitsAndBytesConfig()", BITS),
    ("BitsAndBytesConfig(load_in_4bit=True, load_in_8bit=True)", BITS),
    (
        mapping("QuantoConfig(weights_dtype='int3')"),
        "quanto has no scheme 'int3'; use one of: float8, int2, int4, int8.",
    ),
    (
        mapping("QuantoConfig(weights='int8', activations='int8')"),
        "quanto activations need calibration and are not supported; leave them out.",
    ),
    (
        mapping("QuantoConfig(weight_dtype='int8')"),
        "QuantoConfig takes no weight_dtype (did you mean 'weights_dtype'?); "
        "it takes: activations, modules_to_not_convert, weights, weights_dtype.",
    ),
    (
        mapping("GGUFQuantizationConfig(compute_dtype=torch.bfloat16)"),
        "GGUFQuantizationConfig does not say which file to read; write component=gguf/file?path=FILE.gguf, "
        "or component=gguf/Q8_0 to have one made.",
    ),
    (mapping("'int8'"), "'int8' is no quantization config; write backend/scheme or a config class of diffusers."),
    (
        mapping("{'quant_backend': 'quanto', 'bits': 8}"),
        "A config in quant_mapping has no bits; it has quant_backend, quant_kwargs.",
    ),
    (bnb(8, {"load_in_8bit": "false"}), "load_in_8bit is 'false'; it takes True or False, and true or false in JSON."),
    (
        "BitsAndBytesConfig(load_in_8bit=false)",
        "load_in_8bit is false; it takes True or False, and true or false in JSON.",
    ),
    ("BitsAndBytesConfig(load_in_4bit=no)", "load_in_4bit is no; it takes True or False, and true or false in JSON."),
    ("BitsAndBytesConfig(load_in_4bit=1)", "load_in_4bit is 1; it takes True or False, and true or false in JSON."),
    (bnb(4, {"bnb_4bit_use_double_quant": 0}), "double_quant is 0; it takes a bool."),
    (bnb(8, []), "quant_backend is 'bitsandbytes_8bit' with []; it takes a name, and arguments by name."),
    (f"{CALL}(quant_backend='')", "quant_backend is '' with {}; it takes a name, and arguments by name."),
    (f"{CALL}(quant_backend=False)", "quant_backend is False with {}; it takes a name, and arguments by name."),
    (f"{CALL}(quant_mapping=0)", "quant_mapping is 0; it maps the name of a component to its config."),
    (f"{CALL}(quant_kwargs=[], quant_mapping={{'a': QuantoConfig()}})", MODES),
    (f"{CALL}(quant_backend='quanto', quant_mapping={{}})", MODES),
    (
        f"{CALL}(quant_backend='quanto', components_to_quantize=0)",
        "components_to_quantize is 0; it takes a list of component names.",
    ),
    (
        mapping("{'quant_backend': 'quanto', 'quant_kwargs': ''}"),
        "quant_backend is 'quanto' with ''; it takes a name, and arguments by name.",
    ),
    (
        mapping("QuantoConfig(modules_to_not_convert=0)"),
        "modules_to_not_convert is 0; it takes a list of module names.",
    ),
    (
        f"{CALL}(quant_mapping={{'unet': QuantoConfig(), 'unet': QuantoConfig(weights_dtype='int4')}})",
        "The plan gives 'unet' twice; give it once.",
    ),
    ("QuantoConfig(weights='int4', weights='int8')", "The plan gives 'weights' twice; give it once."),
    ("TorchAoConfig('int8wo', quant_type='fp8wo')", "The plan gives 'quant_type' twice; give it once."),
    (
        "QuantoConfig(weights_dtype='int4', weights='int8')",
        "QuantoConfig has both weights_dtype and weights, which say the same; keep one of them.",
    ),
    (
        "TorchAoConfig(Int4WeightOnlyConfig(group_size=32), group_size=64)",
        "TorchAoConfig and Int4WeightOnlyConfig both have group_size; keep one of them.",
    ),
    (
        "TorchAoConfig(Int8WeightOnlyConfig(granularity=PerGroup(64), group_size=32))",
        "Int8WeightOnlyConfig with PerGroup(quant_type=64) is none of ours; leave granularity out.",
    ),
    (
        "TorchAoConfig(Int8WeightOnlyConfig(granularity=PerRow(dim=0)))",
        "Int8WeightOnlyConfig with PerRow(dim=0) is none of ours; leave granularity out.",
    ),
    ("TorchAoConfig('int4wo', group_size=auto)", "group_size is auto; it takes a str."),
    (
        "TorchAoConfig(0x" + "f" * 4000 + ")",
        "The plan has a whole number of more than 64 bits, which nothing here takes.",
    ),
    ("QuantoConfig(weights=" + "-" * 5000 + "1)", UNREADABLE),
    ("QuantoConfig(weights=" + "1+" * 900 + "1)", UNREADABLE),
    ("QuantoConfig(weights=a" + "[0]" * 900 + ")", UNREADABLE),
    ("os.system('true')", f"system is no quantization backend known here; use one of: {KNOWN}."),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED, ids=range(len(REFUSED)))
def test_a_config_that_contradicts_itself_or_means_nothing_here(text, sentence):
    with pytest.raises(SpecError) as error:
        parse_plan(text)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            bnb(4, {"bnb_4bit_quant_typ": "nf4"}),
            r"takes no bnb_4bit_quant_typ \(did you mean 'bnb_4bit_",
        ),
        (mapping("TorchAoConfig('int3wo')"), "asks for 'int3wo', which is none of ours; write one of: fp8dq, "),
        (mapping("TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4))"), "asks for 'IntxWeightOnlyConfig', "),
    ],
)
def test_an_unknown_argument_or_type_is_named(text, sentence):
    with pytest.raises(SpecError, match=sentence):
        parse_plan(text)


def test_text_is_read_and_never_run(tmp_path):
    marker = tmp_path / "ran"
    with pytest.raises(SpecError):
        parse_plan(mapping(f"QuantoConfig(weights=open({str(marker)!r}, 'w').name)"))
    with pytest.raises(SpecError):
        parse_plan(f"x = [open({str(marker)!r}, 'w') for _ in (1,)]")
    assert not marker.exists()
