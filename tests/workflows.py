"""Read and check the workflow files that ComfyUI's Save writes."""

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
    """Return the file with the same workflow in API format, for scripts."""
    return path.parent / "api" / path.name


def inside(block: dict) -> dict:
    """Read what is inside a block, in the form of a workflow. Links also begin at ``INPUTS`` and end at ``OUTPUTS``."""
    (graph,) = block["definitions"]["subgraphs"]
    fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return graph | {"links": [[link[field] for field in fields] for link in graph["links"]]}


def widget_values(node: dict) -> dict:
    """Read a node's widgets by name, as the file itself names them."""
    named = node.get("widgets_values_named") or {}
    return {name: value for name, value in named.items() if name not in PAGE_WIDGETS}


def to_api(workflow: dict) -> dict:
    """Make what the page would queue: ``{id: {class_type, inputs}}``. A node in a subgraph is called ``instance:node``,
    as the page calls it."""
    definitions = {graph["id"]: graph for graph in workflow.get("definitions", {}).get("subgraphs", [])}
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}

    def source(link):
        """Find the node and the socket that a link of the workflow comes from: inside the subgraph, if it comes out of
        one."""
        origin, slot = links[link]
        graph = definitions.get(nodes[origin]["type"]) if origin in nodes else None
        if graph is None:
            return [origin, slot]
        inner = next(link for link in graph["links"] if link["target_id"] == OUTPUTS and link["target_slot"] == slot)
        return [f"{origin}:{inner['origin_id']}", inner["origin_slot"]]

    for name, node in nodes.items():
        if node["type"] in ("Note", "MarkdownNote"):
            continue
        inputs = widget_values(node) | {
            socket["name"]: source(socket["link"]) for socket in node["inputs"] if socket.get("link") is not None
        }
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
                        inputs[graph["inputs"][link["origin_slot"]]["name"]]
                        if from_outside
                        else [f"{name}:{link['origin_id']}", link["origin_slot"]]
                    )
                    values[socket["name"]] = given
            prompt[f"{name}:{part['id']}"] = {"class_type": part["type"], "inputs": values}
    return prompt


def combined(node_class) -> dict:
    types = node_class.INPUT_TYPES()
    return types["required"] | types.get("optional", {})


def ours(workflow: dict, pack) -> list:
    return [
        (node, pack.NODE_CLASS_MAPPINGS[node["type"]])
        for node in workflow["nodes"]
        if node["type"].startswith("CogVideoX15")
    ]


def links_of(workflow: dict) -> list[list]:
    """List every link as ``[id, origin, output, target, input, type]``; newer files write them as objects."""
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return [[link[name] for name in names] if isinstance(link, dict) else link for link in workflow["links"]]


def check(workflow: dict, pack, unknown: tuple[str, ...] = ()) -> None:
    """Assert that a workflow fits the nodes as they are: nothing missing, nothing red. ``unknown`` are the widgets
    whose choices are files."""
    check_sockets(workflow, pack)
    check_widgets(workflow, pack, unknown)
    check_links(workflow)
    check_required(workflow, pack)


def check_sockets(workflow: dict, pack) -> None:
    assert ours(workflow, pack)
    for node, node_class in ours(workflow, pack):
        assert [(socket["name"], socket["type"]) for socket in node["outputs"]] == list(
            zip(node_class.RETURN_NAMES, node_class.RETURN_TYPES, strict=True)
        )
        declared = {
            name: spec[0] if isinstance(spec[0], str) else "COMBO" for name, spec in combined(node_class).items()
        }
        assert {socket["name"]: socket["type"] for socket in node["inputs"]} == declared


def check_widgets(workflow: dict, pack, unknown: tuple[str, ...] = ()) -> None:
    for node, node_class in ours(workflow, pack):
        values = widget_values(node)
        for name, (kind, options, *_) in combined(node_class).items():
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= values[name] <= options["max"], (node["type"], name)
            elif isinstance(kind, list) and name not in ("model", "lora_name", *unknown):
                assert values[name] in kind, (node["type"], name)
        afterwards = ("randomize", "fixed", "increment", "decrement")
        assert [value for value in node.get("widgets_values", []) if value not in afterwards] == list(values.values())


def check_links(workflow: dict) -> None:
    """Assert that every link joins sockets of one type, both of which know it, and that no socket knows of another."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = links_of(workflow)
    for number, origin, output, target, entry, _kind in links:
        out_socket, in_socket = nodes[origin]["outputs"][output], nodes[target]["inputs"][entry]
        assert number in out_socket["links"]
        assert in_socket["link"] == number
        assert "*" in (in_socket["type"], out_socket["type"]) or out_socket["type"] in in_socket["type"].split(",")
    numbers = [link[0] for link in links]
    assert len(set(numbers)) == len(numbers)
    known = [
        socket["link"] for node in nodes.values() for socket in node.get("inputs", ()) if socket.get("link") is not None
    ]
    assert sorted(known) == sorted(numbers)
    assert sorted(
        number for node in nodes.values() for socket in node.get("outputs", ()) for number in socket["links"] or ()
    ) == sorted(numbers)


def check_required(workflow: dict, pack) -> None:
    for node, node_class in ours(workflow, pack):
        sockets = {socket["name"]: socket for socket in node["inputs"]}
        for name, (kind, *_) in node_class.INPUT_TYPES()["required"].items():
            if isinstance(kind, str) and kind not in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                assert sockets[name]["link"] is not None, (node["type"], name)
