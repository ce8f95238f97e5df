"""What plans cost in quality."""

import json

from ..quant_core import (
    OFF,
    CompareRequest,
    LoadRequest,
    SpecError,
    as_image,
    chart,
    compare,
    comparison_csv,
    comparison_data,
    differences,
    format_comparison,
    format_plan,
    grid,
    labelled,
    without_folders,
)
from .comfy_memory import load_device, managed, release_superseded
from .comfy_progress import count_reporter
from .comfy_runtime import io, pipeline_folder, store_folder, ui
from .generate import request_of, size_inputs
from .of_pipeline import OfPipeline
from .types import CATEGORY, QuantMappingType
from .widgets import extra_input, lines, pictures_inputs, plain_pipeline_inputs

_MAPPINGS = tuple(f"mapping_{number}" for number in range(1, 7))


class CompareQuant(OfPipeline):
    """Measures mappings against 16 bit."""

    @classmethod
    def schema(cls):
        mappings = [
            QuantMappingType.Input(name, optional=True, tooltip="From Quantization Mapping; wire one at least.")
            for name in _MAPPINGS
        ]
        return io.Schema(
            node_id="QDiff_CompareQuant",
            display_name="Compare Quantization",
            category=CATEGORY,
            description="Paints the same prompts from the same noise in 16 bit, twice, and with each mapping, one "
            "pipeline in memory at a time, and says how far each is from 16 bit.",
            search_aliases=["quantization quality", "psnr", "ssim", "benchmark quantization", "compare models"],
            inputs=[
                *plain_pipeline_inputs(),
                *mappings,
                io.String.Input("prompts", multiline=True, tooltip="One per line."),
                *size_inputs(),
                *pictures_inputs(),
                extra_input(),
                io.Boolean.Input(
                    "store",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Keep the quantized components on disk, as Load Quantized Pipeline does.",
                ),
            ],
            outputs=[
                io.Image.Output("grid", tooltip="All pictures, labelled: a column per mapping."),
                io.Image.Output("differences", tooltip="How far each is from 16 bit, brightened."),
                io.Image.Output("chart", tooltip="PSNR against bytes stored."),
                io.String.Output("table", tooltip="The figures as an aligned table."),
                io.String.Output("json", tooltip="All figures as JSON, those of each picture and step among them."),
                io.String.Output("csv", tooltip="A line per mapping and picture."),
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
        extra="",
        store=True,
        **mappings,
    ):
        wired = filter(None, (mappings.get(name) for name in _MAPPINGS))
        plans = labelled((format_plan(without_folders(plan)), plan) for plan in wired)
        if not plans:
            raise SpecError("No mapping is wired; wire one at least to compare it with 16 bit.")
        load = LoadRequest(
            pipeline_folder(pipeline), dtype=dtype, device=load_device(), store=store_folder() if store else OFF
        )
        settings = request_of("", width, height, steps, guidance, seed, extra=extra)
        request = CompareRequest(load, plans, lines(prompts), range(seed, seed + pictures), settings)
        release_superseded()
        found = compare(request, count_reporter(), managed)
        table = format_comparison(found)
        drawn = [as_image(draw(found)) for draw in (grid, differences, chart)]
        data = json.dumps(comparison_data(found), indent=1)
        return io.NodeOutput(*drawn, table, data, comparison_csv(found), ui=ui.PreviewText(table))
