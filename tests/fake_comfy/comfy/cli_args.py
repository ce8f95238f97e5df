from enum import Enum
from types import SimpleNamespace


class LatentPreviewMethod(Enum):
    NoPreviews = "none"
    Auto = "auto"


args = SimpleNamespace(preview_method=LatentPreviewMethod.NoPreviews)
