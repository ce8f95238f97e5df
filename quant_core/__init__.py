"""Load, run and inspect quantized diffusers pipelines. Knows nothing of ComfyUI."""

from .availability import missing
from .backend import Backend, Option, Scheme
from .backends import backends, get_backend
from .errors import BackendUnavailable, DeviceUnsupported, QuantError, SourceError, SpecError
from .generation import OUTPUTS, GenerateRequest, generate
from .inspection import ComponentReport, footprint, format_report, inspect_pipeline, report_data
from .loading import DTYPES, LoadRequest, load_pipeline
from .notation import format_plan, parse_plan, plan_from_diffusers
from .pipeline import QuantizedPipeline, move
from .source import DEMO, PipelineIndex, find_folder, read_index
from .specs import QuantPlan, QuantSpec

__all__ = [
    "Backend",
    "BackendUnavailable",
    "ComponentReport",
    "DEMO",
    "DTYPES",
    "DeviceUnsupported",
    "GenerateRequest",
    "LoadRequest",
    "OUTPUTS",
    "Option",
    "PipelineIndex",
    "QuantError",
    "QuantPlan",
    "QuantSpec",
    "QuantizedPipeline",
    "Scheme",
    "SourceError",
    "SpecError",
    "backends",
    "find_folder",
    "footprint",
    "format_plan",
    "format_report",
    "generate",
    "get_backend",
    "inspect_pipeline",
    "load_pipeline",
    "missing",
    "move",
    "parse_plan",
    "plan_from_diffusers",
    "read_index",
    "report_data",
]
