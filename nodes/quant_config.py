"""How a component is quantized."""

from ..quant_core import backends
from .comfy_node import Node
from .comfy_runtime import io
from .types import CATEGORY, QuantConfigType
from .widgets import backend_choice, choice_stamps, spec_of


class QuantConfig(Node):
    """A backend, a scheme and its options."""

    @classmethod
    def schema(cls):
        return io.Schema(
            node_id="QDiff_QuantConfig",
            display_name="Quantization Config",
            category=CATEGORY,
            description="How a component is quantized: a backend, one of its schemes, and its options.",
            search_aliases=["quantize", "bitsandbytes", "nf4", "torchao", "int8", "fp8", "quanto", "gguf", "4bit"],
            inputs=[
                io.DynamicCombo.Input(
                    "backend",
                    options=[backend_choice(backend) for backend in backends().values()],
                    tooltip="The library that quantizes. Only its own options are shown below.",
                ),
                io.String.Input(
                    "skip_modules",
                    default="",
                    optional=True,
                    placeholder="recommended, proj_out, *.norm_out.*",
                    tooltip="Modules to leave in 16 bit, by full name or glob, separated by commas; "
                    "**. in front means at any depth, as in **.proj_out. It means the same for every backend. Empty: "
                    "what is recommended for the model's class, under schemes of fewer than 8 bits. The word "
                    "recommended among others adds that; none leaves nothing in 16 bit.",
                ),
            ],
            outputs=[QuantConfigType.Output("config", tooltip="To a mapping's default or one of its components.")],
        )

    @classmethod
    def validate_inputs(cls, **_):
        return True  # ComfyUI would refuse a file's name with the other system's separators; `run` checks them all

    @classmethod
    def fingerprint_inputs(cls, backend=None, **_):
        return choice_stamps(backend)

    @classmethod
    def run(cls, backend=None, skip_modules=""):
        return io.NodeOutput(spec_of(backend, skip_modules))
