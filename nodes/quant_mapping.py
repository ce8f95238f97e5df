"""Which component is quantized how."""

from ..quant_core import QuantPlan, SpecError, parse_plan
from .comfy_node import Node
from .comfy_runtime import io
from .types import CATEGORY, QuantConfigType, QuantMappingType
from .widgets import plan_stamps, plan_with_file_paths

COMPONENTS = ("transformer", "transformer_2", "unet", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")


class QuantMapping(Node):
    """A config for all, for some, or both."""

    @classmethod
    def schema(cls):
        return io.Schema(
            node_id="QDiff_QuantMapping",
            display_name="Quantization Mapping",
            category=CATEGORY,
            description="Which component is quantized how. The default is for every denoiser and text encoder that is "
            "not named; VAE, safety checker and image encoder are quantized only if named.",
            search_aliases=["quantization plan", "PipelineQuantizationConfig", "quant_mapping", "granular"],
            inputs=[
                QuantConfigType.Input(
                    "default", optional=True, tooltip="For every denoiser and text encoder that is not named here."
                ),
                *(
                    QuantConfigType.Input(name, optional=True, tooltip=f"For the component {name}.")
                    for name in COMPONENTS
                ),
                QuantConfigType.Input("other", optional=True, tooltip="For the component named in other_name."),
                io.String.Input(
                    "other_name",
                    default="",
                    optional=True,
                    tooltip="Any further component, as model_index.json names it: controlnet, image_encoder, prior.",
                ),
                QuantMappingType.Input(
                    "base", optional=True, tooltip="A mapping to extend; what is wired here replaces what it says."
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    optional=True,
                    advanced=True,
                    placeholder="transformer=torchao/int8wo,text_encoder_2=bitsandbytes_4bit/nf4",
                    tooltip="A mapping as text, instead of a base: the short form, JSON, or a "
                    "PipelineQuantizationConfig(...) as in diffusers' documentation.",
                ),
            ],
            outputs=[QuantMappingType.Output("mapping", tooltip="To Load Quantized Pipeline.")],
        )

    @classmethod
    def fingerprint_inputs(cls, text="", **_):
        return plan_stamps(parse_plan(text or ""))

    @classmethod
    def run(cls, default=None, other=None, other_name="", base=None, text="", **components):
        name = other_name.strip()
        if bool(other) != bool(name):
            raise SpecError("other and other_name belong together: wire a config and name its component.")
        if base and text.strip():
            raise SpecError("Give a base or a text, not both: which of them should win?")
        plan = base or plan_with_file_paths(parse_plan(text))
        named = {name: config for name, config in components.items() if config}
        if name in named:
            raise SpecError(f"{name} is both wired and named in other_name; give it once.")
        if name:
            named[name] = other
        return io.NodeOutput(QuantPlan({**plan.components, **named}, default or plan.default))
