"""What nodes have in common that take a pipeline by its name."""

from .comfy_node import Node
from .comfy_runtime import pipeline_fingerprint, why_not_listed


class OfPipeline(Node):
    """Refuses a name that is not listed, and runs again when the pipeline's files change."""

    @classmethod
    def validate_inputs(cls, pipeline=None):
        return why_not_listed(pipeline) or True

    @classmethod
    def fingerprint_inputs(cls, pipeline=None, **_):
        return pipeline_fingerprint(pipeline) if pipeline else []
