"""What a loaded pipeline really is."""

import json

from ..quant_core import (
    THEMES,
    as_image,
    format_report,
    format_runs,
    inspect_layers,
    inspect_pipeline,
    inspection_picture,
    layer_data,
    peak_data,
    peak_report,
    report_data,
)
from .comfy_node import Node
from .comfy_progress import count_reporter
from .comfy_runtime import io, ui
from .types import CATEGORY, PipelineType


class InspectQuant(Node):
    """Reports on each component and its layers."""

    @classmethod
    def schema(cls):
        return io.Schema(
            node_id="QDiff_InspectQuant",
            display_name="Inspect Quantization",
            category=CATEGORY,
            description="How each component is stored, read from its weights: formats, bytes, what was left out, and "
            "the error of each layer, as a table, a picture and JSON.",
            search_aliases=[
                "quantization report",
                "quantization error",
                "model size",
                "vram usage",
                "was it quantized",
            ],
            inputs=[
                PipelineType.Input("pipeline", tooltip="From Load Quantized Pipeline."),
                io.AnyType.Input(
                    "after",
                    optional=True,
                    tooltip="Wire the images of Generate here to report after the run, with the memory it took.",
                ),
                io.Combo.Input(
                    "theme", options=list(THEMES), default="dark", optional=True, tooltip="Colours of the picture."
                ),
                io.Boolean.Input(
                    "errors",
                    default=True,
                    optional=True,
                    tooltip="Measure the error of each layer; reads the 16-bit weights once.",
                ),
            ],
            outputs=[
                io.String.Output("report", tooltip="An aligned table."),
                io.String.Output("json", tooltip="The same and more, as JSON, each layer's figures among it."),
                io.Image.Output("picture", tooltip="Bytes before and after, a map of the layers, memory, the table."),
            ],
            is_output_node=True,
        )

    @classmethod
    def run(cls, pipeline, after=None, theme="dark", errors=True):
        reports, peak = inspect_pipeline(pipeline), peak_report(pipeline)
        layers = inspect_layers(pipeline, errors, count_reporter(tells=False))  # a text would take the picture's room
        runs = format_runs(pipeline) or str(pipeline.optimization or "")
        table = "\n".join(filter(None, (format_report(reports), runs, str(peak or ""))))
        data = report_data(reports) | {"peak": peak_data(peak) if peak else None, "layers": layer_data(layers)}
        data["optimization"] = pipeline.optimization.data() if pipeline.optimization else {}
        data["runs"] = {part: report.data() for part, report in pipeline.reports.items()}
        picture = as_image(inspection_picture(reports, layers, peak, pipeline.title, theme))
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(table).as_dict()
        return io.NodeOutput(table, json.dumps(data, indent=1), picture, ui=shown)
