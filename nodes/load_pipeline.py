"""From a folder to a pipeline with its components quantized."""

from ..quant_core import DTYPES, OFF, LoadRequest, QuantPlan, load_pipeline
from .comfy_memory import ManagedPipeline, load_device, log_forecast, release_superseded
from .comfy_progress import bytes_reporter
from .comfy_runtime import io, pipeline_folder, pipeline_names, store_folder
from .of_pipeline import OfPipeline
from .types import CATEGORY, PipelineType, QuantMappingType


class LoadQuantizedPipeline(OfPipeline):
    """Loads a diffusers pipeline as a mapping says."""

    @classmethod
    def schema(cls):
        return io.Schema(
            node_id="QDiff_LoadPipeline",
            display_name="Load Quantized Pipeline",
            category=CATEGORY,
            description="Loads a diffusers pipeline, each component quantized as the mapping says. The mapping is "
            "checked in full before the first weight is read.",
            search_aliases=["diffusers loader", "quantized model", "load diffusers", "bnb loader"],
            inputs=[
                io.Combo.Input(
                    "pipeline",
                    options=pipeline_names(),
                    tooltip="A folder with a model_index.json under models/diffusers, or the bundled demo.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default=DTYPES[0],
                    tooltip="Of activations and of all layers that stay unquantized.",
                ),
                QuantMappingType.Input(
                    "mapping", optional=True, tooltip="Which component is quantized how; nothing is, without one."
                ),
                io.String.Input(
                    "variant",
                    default="",
                    optional=True,
                    advanced=True,
                    placeholder="fp16",
                    tooltip="Of the weight files, where a folder has several: fp16 for model.fp16.safetensors.",
                ),
                io.Boolean.Input(
                    "store",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Keep the quantized components on disk, and read them from there from then on.",
                ),
            ],
            outputs=[PipelineType.Output("pipeline", tooltip="To Generate and Inspect Quantization.")],
        )

    @classmethod
    def run(cls, pipeline, dtype, mapping=None, variant="", store=True):
        request = LoadRequest(
            pipeline_folder(pipeline),
            mapping or QuantPlan(),
            dtype,
            device=load_device(),
            variant=variant.strip() or None,
            store=store_folder() if store else OFF,
        )
        log_forecast(request)
        release_superseded()
        return io.NodeOutput(ManagedPipeline(load_pipeline(request, bytes_reporter())))
