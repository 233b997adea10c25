"""Reading the workflow files that ComfyUI's Save writes."""

import json
from pathlib import Path

from tests.conftest import ROOT

FILES = sorted((ROOT / "example_workflows").glob("*.json"))
#: The ready-made blocks: workflows of one node, which is a subgraph.
BLOCKS = sorted((ROOT / "subgraphs").glob("*.json"))
#: The ends of the links that come into a subgraph and go out of it.
INPUTS, OUTPUTS = -10, -20
#: Widgets that the page adds and no node declares. They are saved, and not queued.
PAGE_WIDGETS = {"upload", "control_after_generate", "preview_mode", "preview_markdown", "preview_text", "previewMode"}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def twin(path: Path) -> Path:
    """The file with the same workflow in API format, for scripts."""
    return path.parent / "api" / path.name


def inside(block: dict) -> dict:
    """What is inside a block, in a workflow's own form. Its links begin and end at ``INPUTS`` and ``OUTPUTS`` too."""
    (graph,) = block["definitions"]["subgraphs"]
    fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return graph | {"links": [[link[field] for field in fields] for link in graph["links"]]}


def widget_values(node: dict) -> dict:
    """A node's widgets by name, as the file itself names them."""
    named = node.get("widgets_values_named") or {}
    return {name: value for name, value in named.items() if name not in PAGE_WIDGETS}


def to_api(workflow: dict) -> dict:
    """What the page would queue: ``{id: {class_type, inputs}}``. A node in a subgraph is called ``instance:node``, as the page calls it."""
    definitions = {graph["id"]: graph for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}

    def source(link):
        """The node and the socket that a link of the workflow comes from, in a subgraph where it comes out of one."""
        origin, slot = links[link]
        graph = definitions.get(nodes[origin]["type"])
        if graph is None:
            return [origin, slot]
        inner = next(link for link in graph["links"] if link["target_id"] == OUTPUTS and link["target_slot"] == slot)
        return [f"{origin}:{inner['origin_id']}", inner["origin_slot"]]

    for name, node in nodes.items():
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        inputs = widget_values(node) | {socket["name"]: source(socket["link"]) for socket in node["inputs"] if socket.get("link") is not None}
        graph = definitions.get(node["type"])
        if graph is None:
            prompt[name] = {"class_type": node["type"], "inputs": inputs}
            continue
        inside = {link["id"]: link for link in graph["links"]}
        for part in graph["nodes"]:
            values = widget_values(part)
            for socket in part["inputs"]:
                if socket.get("link") is not None:
                    link = inside[socket["link"]]
                    from_outside = link["origin_id"] == INPUTS
                    given = (
                        inputs[graph["inputs"][link["origin_slot"]]["name"]] if from_outside else [f"{name}:{link['origin_id']}", link["origin_slot"]]
                    )
                    values[socket["name"]] = given
            prompt[f"{name}:{part['id']}"] = {"class_type": part["type"], "inputs": values}
    return prompt
