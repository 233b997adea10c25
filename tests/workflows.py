"""Reading the workflow files that ComfyUI's Save writes."""

import json
from pathlib import Path

from tests.conftest import ROOT

FILES = sorted((ROOT / "example_workflows").glob("*.json"))
#: Widgets that the page adds and no node declares.
PAGE_WIDGETS = {"control_after_generate", "preview_mode", "preview_markdown", "preview_text", "previewMode"}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def widget_values(node: dict) -> dict:
    """A node's widgets by name, as the file itself names them."""
    named = node.get("widgets_values_named") or {}
    return {name: value for name, value in named.items() if name not in PAGE_WIDGETS}


def to_api(workflow: dict) -> dict:
    """What the page would queue: ``{id: {class_type, inputs}}``."""
    source = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] not in ("Note", "MarkdownNote"):
            linked = {socket["name"]: source[socket["link"]] for socket in node["inputs"] if socket.get("link") is not None}
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": widget_values(node) | linked}
    return prompt
