"""The layers are those that diffusers and transformers themselves make of the same checkpoint, bit for bit."""

import pytest
import torch

from quant_core import LoadRequest, find_folder, load_pipeline, parse_plan

DEMO = find_folder("demo")


def ours(component, scheme):
    return getattr(load_pipeline(LoadRequest("demo", parse_plan(f"{component}={scheme}"))).pipe, component)


def diffusers_transformer(config):
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(
        DEMO / "transformer", quantization_config=config, dtype=torch.bfloat16
    ).eval()


def transformers_t5(config):
    from transformers import T5EncoderModel

    return T5EncoderModel.from_pretrained(
        DEMO / "text_encoder_2", quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    ).eval()


def transformer_inputs(model):
    generator = torch.Generator().manual_seed(0)
    config = model.config

    def noise(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    return {
        "hidden_states": noise(1, 16, config.in_channels),
        "encoder_hidden_states": noise(1, 8, config.joint_attention_dim),
        "pooled_projections": noise(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "img_ids": torch.stack([torch.zeros(16), torch.arange(16.0) // 4, torch.arange(16.0) % 4], dim=1),
        "txt_ids": torch.zeros(8, 3),
    }


def t5_inputs(model):
    return {"input_ids": torch.arange(12).view(1, 12) % model.config.vocab_size}


@torch.no_grad()
def output(model, inputs):
    found = model(**inputs)
    return found.sample if hasattr(found, "sample") else found.last_hidden_state


def torchao(name, transformers=False):
    from torchao import quantization

    if transformers:
        from transformers import TorchAoConfig
    else:
        from diffusers import TorchAoConfig
    return TorchAoConfig(getattr(quantization, name)())


def quanto(weights, transformers=False):
    if transformers:
        from transformers import QuantoConfig

        return QuantoConfig(weights=weights)
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype=weights)


SAME = [
    ("torchao/int8wo", torchao, "Int8WeightOnlyConfig"),
    ("torchao/int8dq", torchao, "Int8DynamicActivationInt8WeightConfig"),
    ("torchao/fp8wo", torchao, "Float8WeightOnlyConfig"),
    ("quanto/int8", quanto, "int8"),
    ("quanto/float8", quanto, "float8"),
    ("quanto/int2", quanto, "int2"),
]


@pytest.mark.parametrize(("scheme", "config", "argument"), SAME, ids=[row[0] for row in SAME])
def test_our_transformer_computes_what_diffusers_own_computes(scheme, config, argument):
    model, theirs = ours("transformer", f"{scheme}?skip=none"), diffusers_transformer(config(argument))
    inputs = transformer_inputs(model)
    expected = output(theirs, inputs)
    assert expected.isfinite().all() and expected.std() > 0
    assert torch.equal(output(model, inputs), expected)
    assert not torch.equal(expected, output(diffusers_transformer(None), inputs)), "nothing was quantized"


@pytest.mark.parametrize(("scheme", "config", "argument"), SAME, ids=[row[0] for row in SAME])
def test_our_t5_computes_what_transformers_own_computes(scheme, config, argument):
    wo = "?skip=**.wo" if config is quanto else ""  # which transformers leaves out, except with torchao
    model, theirs = ours("text_encoder_2", scheme + wo), transformers_t5(config(argument, transformers=True))
    inputs = t5_inputs(model)
    expected = output(theirs, inputs)
    assert expected.isfinite().all() and expected.std() > 0
    assert torch.equal(output(model, inputs), expected)
    assert not torch.equal(expected, output(transformers_t5(None), inputs)), "nothing was quantized"


@pytest.mark.parametrize(
    ("scheme", "arguments"),
    [
        ("bitsandbytes_4bit/nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("bitsandbytes_4bit/fp4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        (
            "bitsandbytes_4bit/nf4?double_quant=true",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        ),
    ],
)
def test_4_bit_weights_are_those_of_transformers_in_the_layers_that_both_quantize(scheme, arguments):
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    model = ours("text_encoder_2", scheme)
    theirs = transformers_t5(BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.bfloat16, **arguments))
    assert shared_layers(model, theirs, "Params4bit") == {"q", "k", "v", "o", "wi_0", "wi_1"}
    for name, part in theirs.named_modules():
        if type(getattr(part, "weight", None)).__name__ == "Params4bit":
            mine = model.get_submodule(name).weight
            assert torch.equal(mine.data.view(torch.uint8).flatten(), part.weight.data.view(torch.uint8).flatten()), (
                name
            )
            first, second = (dequantize_4bit(weight.data, weight.quant_state) for weight in (mine, part.weight))
            assert torch.equal(first, second), name


def test_8_bit_weights_are_those_of_transformers_in_the_layers_that_both_quantize():
    from transformers import BitsAndBytesConfig

    model = ours("text_encoder_2", "bitsandbytes_8bit/int8")
    theirs = transformers_t5(BitsAndBytesConfig(load_in_8bit=True))
    assert shared_layers(model, theirs, "Int8Params") == {"q", "k", "v", "o", "wi_0", "wi_1"}
    output(theirs, t5_inputs(theirs))  # theirs moves its scales into place at the first use
    for name, part in theirs.named_modules():
        if type(getattr(part, "weight", None)).__name__ == "Int8Params":
            mine = model.get_submodule(name).state
            assert torch.equal(mine.CB, part.state.CB) and torch.equal(mine.SCB, part.state.SCB), name


def shared_layers(model, theirs, kind):
    """Last names of the layers that both quantize; that transformers leaves out T5's `wo` is its own choice."""
    found = [
        {name for name, part in owner.named_modules() if type(getattr(part, "weight", None)).__name__ == kind}
        for owner in (model, theirs)
    ]
    assert found[1] < found[0]
    assert {name.split(".")[-1] for name in found[0] - found[1]} == {"wo"}
    return {name.split(".")[-1] for name in found[1]}


@pytest.mark.parametrize("scheme", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_gguf_layers_hold_what_the_gguf_package_decodes(scheme):
    import gguf

    plain = load_pipeline(LoadRequest("demo")).pipe.transformer
    kind = getattr(gguf.GGMLQuantizationType, scheme)
    weight = plain.proj_out.weight
    packed = ours("transformer", f"gguf/{scheme}?skip=none").proj_out.weight
    expected = gguf.quants.quantize(weight.float().numpy(), kind)
    assert torch.equal(packed.data.view(torch.uint8), torch.from_numpy(expected))
    decoded = torch.from_numpy(gguf.quants.dequantize(expected, kind))
    assert torch.allclose(decoded, weight.float(), atol=float(weight.abs().max()) / 7)
