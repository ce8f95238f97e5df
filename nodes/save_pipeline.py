"""A loaded pipeline as a folder of its own."""

from ..quant_core import format_saved, save_pipeline
from .comfy_node import Node
from .comfy_progress import bytes_reporter
from .comfy_runtime import io, new_pipeline_folder, ui
from .types import CATEGORY, PipelineType


class SaveQuantizedPipeline(Node):
    """Saves a pipeline, quantized as it is."""

    @classmethod
    def schema(cls):
        return io.Schema(
            node_id="QDiff_SavePipeline",
            display_name="Save Quantized Pipeline",
            category=CATEGORY,
            description="Writes the pipeline, quantized as it is, as a diffusers folder under models/diffusers, which "
            "then loads without a mapping, here and, where diffusers knows the format, in plain diffusers.",
            search_aliases=["save diffusers", "export quantized", "save_pretrained", "checkpoint save"],
            inputs=[
                PipelineType.Input("pipeline", tooltip="From Load Quantized Pipeline."),
                io.String.Input(
                    "name", default="quantized", tooltip="Of the new folder under models/diffusers, not there yet."
                ),
            ],
            outputs=[io.String.Output("folder", tooltip="Its path.")],
            is_output_node=True,
        )

    @classmethod
    def run(cls, pipeline, name):
        folder = new_pipeline_folder(name)
        saved = save_pipeline(pipeline, folder, bytes_reporter())
        return io.NodeOutput(str(folder), ui=ui.PreviewText(format_saved(saved, folder)))
