"""For tests: a node that lets a component fail the next time it runs, and routes that count what is alive."""

import functools
import gc
import sys

import torch
from aiohttp import web
from server import PromptServer


class Fault:
    CATEGORY = "testing"
    FUNCTION = "arm"
    RETURN_TYPES = ("QDIFF_PIPELINE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "pipeline": ("QDIFF_PIPELINE",),
                "component": ("STRING", {"default": ""}),
                "error": (["ValueError", "OutOfMemoryError"],),
                "number": ("INT", {"default": 0}),
            }
        }

    def arm(self, pipeline, component, error, number):
        """`number` makes prompts differ."""
        if component:
            part = list(getattr(pipeline.pipe, component).modules())[-1]
            kind = torch.OutOfMemoryError if error == "OutOfMemoryError" else ValueError
            armed = [kind(f"a fault in {component}")]

            def fail(*_):
                if armed:  # once: the hook stays, since what a run changes is taken back
                    raise armed.pop()

            part.register_forward_pre_hook(fail)
        return (pipeline,)


@PromptServer.instance.routes.get("/test/alive")
async def alive(request):
    """Bytes of the tensors that Python holds, and the classes of the models."""
    gc.collect()
    storages, models = {}, []
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor) and not item.is_meta:
            try:
                storage = item.untyped_storage()
            except (RuntimeError, NotImplementedError):  # a wrapper around others
                continue
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, torch.nn.Module) and hasattr(item, "_hf_hook"):
            models.append(type(item).__name__)
    return web.json_response({"bytes": sum(storages.values()), "models": models})


def pipelines():
    return sum(type(item).__name__ == "ManagedPipeline" for item in gc.get_objects())


@PromptServer.instance.routes.get("/test/loads")
async def loads(request):
    """How many pipelines were there each time another one was about to be loaded, since this was first asked for."""
    node = next(module for name, module in list(sys.modules.items()) if name.endswith(".nodes.load_pipeline"))
    if not hasattr(node, "seen"):
        node.seen, load = [], node.load_pipeline

        @functools.wraps(load)
        def counting(*arguments):
            node.seen.append(pipelines())
            return load(*arguments)

        node.load_pipeline = counting
    return web.json_response(node.seen)


NODE_CLASS_MAPPINGS = {"TestFault": Fault}
