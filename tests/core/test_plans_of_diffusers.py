"""A PipelineQuantizationConfig of diffusers, as Python text (as its documentation has it) and as JSON."""

import json
from dataclasses import replace

import pytest

from quant_core import QuantPlan, SpecError, parse_plan, plan_from_diffusers

GLOBAL = """
import torch
from diffusers import DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig

pipeline_quant_config = PipelineQuantizationConfig(
    quant_backend="bitsandbytes_4bit",
    quant_kwargs={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    components_to_quantize=["transformer", "text_encoder_2"],
)
"""
TWO_BACKENDS = """pipeline_quant_config = PipelineQuantizationConfig(
    quant_mapping={
        "transformer": QuantoConfig(weights_dtype="int8"),
        "text_encoder_2": TransformersBitsAndBytesConfig(
            load_in_4bit=True, compute_dtype=torch.bfloat16
        ),
    }
)"""
TWO_LIBRARIES = """from transformers import BitsAndBytesConfig as TransformersBitsAndBytesConfig

pipeline_quant_config = PipelineQuantizationConfig(
    quant_mapping={
        "transformer": DiffusersBitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
        "text_encoder_2": TransformersBitsAndBytesConfig(
            load_in_4bit=True, compute_dtype=torch.bfloat16
        ),
    }
)"""
FP4 = "bitsandbytes_4bit/fp4?compute_dtype=bfloat16"
NF4 = "bitsandbytes_4bit/nf4?compute_dtype=bfloat16"


def in_full(text):
    """Our plan, which where it writes no skip patterns skips nothing, as diffusers does."""
    plan = parse_plan(text)

    def explicit(spec):
        return spec if spec is None or spec.skip_modules else replace(spec, skip_modules=())

    return QuantPlan({name: explicit(spec) for name, spec in plan.components.items()}, explicit(plan.default))


def mapping(config):
    return f'PipelineQuantizationConfig(quant_mapping={{"transformer": {config}}})'


READ = [
    (GLOBAL, f"transformer={NF4},text_encoder_2={NF4}"),
    (TWO_BACKENDS, f"transformer=quanto/int8,text_encoder_2={FP4}"),
    (TWO_LIBRARIES, f"transformer={FP4},text_encoder_2={FP4}"),
    (mapping("TorchAoConfig(Int8WeightOnlyConfig())"), "transformer=torchao/int8wo"),
    (mapping("TorchAoConfig(Int8WeightOnlyConfig(version=2))"), "transformer=torchao/int8wo"),
    (mapping("TorchAoConfig(Int4WeightOnlyConfig(group_size=128))"), "transformer=torchao/int4wo?group_size=128"),
    (
        mapping("TorchAoConfig(Int8WeightOnlyConfig(group_size=128, version=2))"),
        "transformer=torchao/int8wo?group_size=128",
    ),
    (
        mapping("TorchAoConfig(Int8WeightOnlyConfig(granularity=PerGroup(64)))"),
        "transformer=torchao/int8wo?group_size=64",
    ),
    (mapping("TorchAoConfig(Int8WeightOnlyConfig(granularity=PerRow()))"), "transformer=torchao/int8wo"),
    (mapping("TorchAoConfig(Int4WeightOnlyConfig(group_size=32))"), "transformer=torchao/int4wo?group_size=32"),
    (mapping('TorchAoConfig("int8wo")'), "transformer=torchao/int8wo"),
    (mapping('TorchAoConfig("int8_weight_only")'), "transformer=torchao/int8wo"),
    (mapping("TorchAoConfig(quant_type=Float8WeightOnlyConfig())"), "transformer=torchao/fp8wo"),
    (
        mapping("TorchAoConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))"),
        "transformer=torchao/fp8dq_row",
    ),
    (mapping("TorchAoConfig(Float8DynamicActivationFloat8WeightConfig())"), "transformer=torchao/fp8dq"),
    (mapping("Int8DynamicActivationInt8WeightConfig()"), "transformer=torchao/int8dq"),
    (mapping('QuantoConfig(weights="int4")'), "transformer=quanto/int4"),
    (
        mapping('QuantoConfig(weights_dtype="float8", modules_to_not_convert=["proj_out"])'),
        "transformer=quanto/float8?skip=**.proj_out",
    ),
    (
        mapping('BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6, llm_int8_skip_modules=["to_q"])'),
        "transformer=bitsandbytes_8bit/int8?skip=**.to_q",
    ),
    (mapping("dict(quant_backend='quanto', quant_kwargs=dict(weights='int2'))"), "transformer=quanto/int2"),
    ("quantization_config = QuantoConfig(weights_dtype='float8')", "quanto/float8"),
    ("BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')", "bitsandbytes_4bit/nf4"),
    ("PipelineQuantizationConfig(quant_backend='quanto', components_to_quantize='unet')", "unet=quanto/int8"),
    ("PipelineQuantizationConfig(quant_backend='torchao', quant_kwargs={'quant_type': 'fp8wo'})", "torchao/fp8wo"),
    ("PipelineQuantizationConfig(quant_backend='bitsandbytes_8bit', quant_kwargs={})", "bitsandbytes_8bit/int8"),
    (
        "PipelineQuantizationConfig(quant_backend='bitsandbytes_4bit', "
        "quant_kwargs={'bnb_4bit_use_double_quant': True, 'bnb_4bit_quant_storage': torch.uint8})",
        "bitsandbytes_4bit/fp4?double_quant=true",
    ),
]


@pytest.mark.parametrize(("text", "same_as"), READ, ids=range(len(READ)))
def test_a_config_of_the_documentation_says_the_same_as_our_plan(text, same_as):
    assert parse_plan(text) == in_full(same_as)


@pytest.mark.parametrize(
    ("data", "same_as"),
    [
        (
            {
                "quant_backend": "bitsandbytes_4bit",
                "quant_kwargs": {
                    "load_in_4bit": True,
                    "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_compute_dtype": "bfloat16",
                },
                "components_to_quantize": ["transformer", "text_encoder_2"],
            },
            f"transformer={NF4},text_encoder_2={NF4}",
        ),
        ({"quant_backend": "quanto", "quant_kwargs": {"weights_dtype": "int4"}}, "quanto/int4"),
        ({"quant_backend": "quanto", "quant_kwargs": None, "components_to_quantize": [], "quant_mapping": None},)
        + ("quanto/int8",),
        (
            {"quant_mapping": {"unet": {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "int8wo"}}}},
            "unet=torchao/int8wo",
        ),
    ],
)
def test_the_arguments_of_a_config_can_be_json(data, same_as):
    assert parse_plan(json.dumps(data)) == plan_from_diffusers(data) == in_full(same_as)


def test_a_mapping_may_hold_specs_of_ours_which_keep_their_meaning():
    data = {"quant_mapping": {"unet": {"backend": "quanto", "scheme": "int4"}}}
    assert parse_plan(json.dumps(data)) == plan_from_diffusers(data) == parse_plan("unet=quanto/int4")


def test_a_config_object_of_diffusers_in_global_mode_is_read_too():
    from diffusers.quantizers import PipelineQuantizationConfig

    config = PipelineQuantizationConfig(
        quant_backend="bitsandbytes_8bit", quant_kwargs={"load_in_8bit": True}, components_to_quantize=["unet"]
    )
    assert plan_from_diffusers(config) == in_full("unet=bitsandbytes_8bit/int8")


def test_a_config_object_that_forgot_its_arguments_is_refused():
    from diffusers import QuantoConfig

    with pytest.raises(SpecError, match="QuantoConfig object has forgotten which of its arguments were given"):
        plan_from_diffusers({"quant_mapping": {"transformer": QuantoConfig(weights_dtype="int8")}})
    assert plan_from_diffusers({"quant_mapping": {"transformer": parse_plan("quanto/int8").default}}) == QuantPlan(
        {"transformer": parse_plan("quanto/int8").default}
    )
