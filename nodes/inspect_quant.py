"""What a loaded pipeline really is."""

import json

from ..quant_core import format_report, inspect_pipeline, peak_data, peak_report, report_data
from .comfy_runtime import io, ui
from .types import CATEGORY, PipelineType


class InspectQuant(io.ComfyNode):
    """Reports on each component."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QDiff_InspectQuant",
            display_name="Inspect Quantization",
            category=CATEGORY,
            description="How each component is stored, read from its weights: formats, bytes, and what was left out.",
            search_aliases=["quantization report", "model size", "vram usage", "was it quantized"],
            inputs=[
                PipelineType.Input("pipeline", tooltip="From Load Quantized Pipeline."),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip="Wire the images of Generate here to report after the run, with the memory it took.",
                ),
            ],
            outputs=[
                io.String.Output("report", tooltip="An aligned table."),
                io.String.Output("json", tooltip="The same and more, as JSON."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, pipeline, after=None):
        reports, peak = inspect_pipeline(pipeline), peak_report(pipeline)
        table = "\n".join([format_report(reports), *([str(peak)] if peak else [])])
        data = report_data(reports) | {"peak": peak_data(peak) if peak else None}
        return io.NodeOutput(table, json.dumps(data, indent=1), ui=ui.PreviewText(table))
