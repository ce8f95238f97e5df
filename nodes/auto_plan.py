"""The mapping with the least expected error that fits."""

import json

from ..quant_core import (
    FITS,
    OFF,
    TYPICAL_PROMPT,
    AutoPlanRequest,
    LoadRequest,
    SpecError,
    auto_plan,
    auto_plan_data,
    format_auto_plan,
    format_plan,
    parse_sensitivity,
    parse_size,
)
from .comfy_memory import device_memory, load_device
from .comfy_runtime import io, pipeline_folder, ui
from .generate import request_of, size_inputs
from .of_pipeline import OfPipeline
from .types import CATEGORY, QuantMappingType
from .widgets import extra_input, plain_pipeline_inputs

ALL = "all"


class AutoMapping(OfPipeline):
    """Chooses a mapping for a budget."""

    @classmethod
    def schema(cls):
        return io.Schema(
            node_id="QDiff_AutoPlan",
            display_name="Automatic Mapping",
            category=CATEGORY,
            description="Finds the mapping with the least expected error that fits into a budget of memory, and says "
            "why. It loads nothing.",
            search_aliases=["auto quantize", "which quantization", "fit vram", "auto plan", "mixed precision"],
            inputs=[
                *plain_pipeline_inputs(),
                io.MultiType.Input(
                    io.String.Input(
                        "budget",
                        default=ALL,
                        tooltip="What may be taken, as 8GiB or 500MiB; a bare number is in GiB. all: the memory of "
                        "the device that computes, less what ComfyUI leaves to others.",
                    ),
                    types=[io.Float, io.Int],  # as wires, which it took when it was a number
                ),
                io.Combo.Input(
                    "fits",
                    options=list(FITS),
                    default=next(iter(FITS)),
                    tooltip="What has to fit. in turn: the component in use with what it computes. together: all "
                    "components with that. weights: the stored weights alone.",
                ),
                *size_inputs(),
                io.String.Input(
                    "sensitivity",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="From Measure Sensitivity, of this pipeline. Without it, what was measured on the most "
                    "similar one decides.",
                ),
                extra_input(),
            ],
            outputs=[
                QuantMappingType.Output("mapping", tooltip="To Load Quantized Pipeline, or as base of a mapping."),
                io.String.Output("text", tooltip="The mapping as text, which Quantization Mapping takes."),
                io.String.Output("reasons", tooltip="Three lines: what it takes, what it is, what it costs."),
                io.String.Output("json", tooltip="All of that as JSON, with the estimate of each component."),
            ],
            is_output_node=True,
        )

    @classmethod
    def run(cls, pipeline, dtype, budget, fits, width, height, steps, guidance, sensitivity="", extra=""):
        load = LoadRequest(pipeline_folder(pipeline), dtype=dtype, device=load_device(), store=OFF)
        run = request_of(TYPICAL_PROMPT, width, height, steps, guidance, 0, extra=extra)
        data = parse_sensitivity(sensitivity) if sensitivity.strip() else None
        found = auto_plan(AutoPlanRequest(load, run, _bytes(budget), fits, data))
        return io.NodeOutput(
            found.plan,
            format_plan(found.plan),
            "\n".join(found.reasons),
            json.dumps(auto_plan_data(found), indent=1),
            ui=ui.PreviewText(format_auto_plan(found)),
        )


def _bytes(budget):
    """The bytes that a budget is, which workflows of earlier versions have as a number of GiB.

    Raises:
        SpecError: it is no size, or nothing.
    """
    text = str(budget).strip()
    if text.lower() == ALL:
        return device_memory()
    size = parse_size(text, "budget", "GiB", f"; or {ALL}")
    if not size:
        raise SpecError(f"budget is {text}, which nothing fits into; write {ALL} for all the memory of the device.")
    return size
