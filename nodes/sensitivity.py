"""What quantizing each group of layers alone costs."""

import json

from ..quant_core import (
    OFF,
    LoadRequest,
    SensitivityRequest,
    format_sensitivity,
    measure_sensitivity,
    parse_spec,
    usable_specs,
)
from .comfy_memory import load_device, managed, release_superseded
from .comfy_progress import count_reporter
from .comfy_runtime import io, pipeline_folder, ui
from .generate import request_of, size_inputs
from .of_pipeline import OfPipeline
from .types import CATEGORY
from .widgets import extra_input, lines, pictures_inputs, plain_pipeline_inputs


class MeasureSensitivity(OfPipeline):
    """Measures each group of layers of a pipeline."""

    @classmethod
    def schema(cls):
        return io.Schema(
            node_id="QDiff_Sensitivity",
            display_name="Measure Sensitivity",
            category=CATEGORY,
            description="Paints the prompts in 16 bit and then with each group of layers quantized alone, and says "
            "how far each is from 16 bit. Automatic Mapping chooses by it.",
            search_aliases=["layer sensitivity", "mixed precision", "which layers to quantize"],
            inputs=[
                *plain_pipeline_inputs(),
                io.String.Input("prompts", multiline=True, tooltip="One per line."),
                *size_inputs(),
                *pictures_inputs(),
                io.String.Input(
                    "schemes",
                    default="bitsandbytes_4bit/nf4, torchao/int8wo",
                    optional=True,
                    tooltip="What each group is quantized as, separated by commas, as gguf/Q4_0; empty means all that "
                    "run here. Those left out are told from the nearest that was measured.",
                ),
                io.Combo.Input(
                    "by",
                    options=["group", "layer"],
                    default="group",
                    optional=True,
                    tooltip="group: layers that do the same work, about seven per component. layer: each one, which "
                    "takes long.",
                ),
                io.Int.Input(
                    "batch", default=1, min=1, max=64, optional=True, tooltip="Prompts that are painted at once."
                ),
                extra_input(),
            ],
            outputs=[
                io.String.Output("sensitivity", tooltip="As JSON, to Automatic Mapping."),
                io.String.Output("table", tooltip="PSNR with only that group quantized."),
            ],
            is_output_node=True,
        )

    @classmethod
    def run(
        cls,
        pipeline,
        dtype,
        prompts,
        width,
        height,
        steps,
        guidance,
        seed,
        pictures,
        schemes="",
        by="group",
        batch=1,
        extra="",
    ):
        load = LoadRequest(pipeline_folder(pipeline), dtype=dtype, device=load_device(), store=OFF)
        specs = [parse_spec(text.strip()) for text in schemes.split(",") if text.strip()]
        settings = request_of("", width, height, steps, guidance, seed, extra=extra)
        request = SensitivityRequest(
            load, specs or usable_specs(load), lines(prompts), range(seed, seed + pictures), settings, by, batch
        )
        release_superseded()
        found = measure_sensitivity(request, count_reporter(), managed)
        table = format_sensitivity(found)
        return io.NodeOutput(json.dumps(found.to_dict(), indent=1), table, ui=ui.PreviewText(table))
