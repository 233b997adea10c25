"""ComfyUI's modules, where the pack runs inside ComfyUI. The other files here read them from this one, and ask
``IN_COMFYUI`` before they do."""

import importlib.util
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

IN_COMFYUI = importlib.util.find_spec("folder_paths") is not None and importlib.util.find_spec("comfy") is not None

if IN_COMFYUI:
    import comfy.cli_args
    import comfy.model_management
    import comfy.utils
    import comfy_execution.utils
    import folder_paths
    from server import PromptServer

    with suppress(ImportError):
        # Only newer versions have it.
        import comfy_api.latest

    __all__ = ["IN_COMFYUI", "PromptServer", "comfy", "comfy_api", "comfy_execution", "folder_paths"]


def node_classes() -> Mapping[str, Any]:
    """Return all nodes of ComfyUI by the names of their classes; none outside of it."""
    # Long imported where it is ComfyUI's.
    return getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}) if IN_COMFYUI else {}


def server() -> Any:
    """Return ComfyUI's server; None where there is no page to tell."""
    return getattr(globals().get("PromptServer"), "instance", None) if IN_COMFYUI else None
