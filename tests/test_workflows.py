"""Every example workflow fits the nodes as they are: nothing missing, nothing red."""

import pytest
from PIL import Image

from tests import workflows


def combined(node_class):
    types = node_class.INPUT_TYPES()
    return types["required"] | types.get("optional", {})


@pytest.fixture(params=workflows.FILES, ids=lambda path: path.name)
def workflow(request):
    return workflows.read(request.param)


def ours(workflow, pack):
    return [(node, pack.NODE_CLASS_MAPPINGS[node["type"]]) for node in workflow["nodes"] if node["type"].startswith("CogVideoX15")]


def test_there_is_a_workflow_for_each_use():
    names = {path.stem for path in workflows.FILES}
    assert names == {"text_to_video", "image_to_video", "video_to_video", "text_to_video_lora"}


def test_its_nodes_exist_with_their_sockets_in_order(workflow, pack):
    assert ours(workflow, pack)
    for node, node_class in ours(workflow, pack):
        assert [(socket["name"], socket["type"]) for socket in node["outputs"]] == list(
            zip(node_class.RETURN_NAMES, node_class.RETURN_TYPES, strict=True)
        )
        declared = {name: spec[0] if isinstance(spec[0], str) else "COMBO" for name, spec in combined(node_class).items()}
        assert {socket["name"]: socket["type"] for socket in node["inputs"]} == declared


def test_its_widget_values_are_allowed(workflow, pack):
    for node, node_class in ours(workflow, pack):
        values = workflows.widget_values(node)
        for name, (kind, options, *_) in combined(node_class).items():
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= values[name] <= options["max"], (node["type"], name)
            elif isinstance(kind, list) and name not in ("model", "lora_name"):
                assert values[name] in kind, (node["type"], name)
        assert [value for value in node.get("widgets_values", []) if value not in ("randomize", "fixed")] == list(values.values())


def test_its_links_join_sockets_of_one_type(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, origin, output, target, entry, _kind in workflow["links"]:
        out_socket, in_socket = nodes[origin]["outputs"][output], nodes[target]["inputs"][entry]
        assert number in out_socket["links"]
        assert in_socket["link"] == number
        assert in_socket["type"] == "*" or out_socket["type"] in in_socket["type"].split(",")


def test_every_required_socket_is_connected(workflow, pack):
    for node, node_class in ours(workflow, pack):
        sockets = {socket["name"]: socket for socket in node["inputs"]}
        for name, (kind, *_) in node_class.INPUT_TYPES()["required"].items():
            if isinstance(kind, str) and kind not in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                assert sockets[name]["link"] is not None, (node["type"], name)


@pytest.mark.parametrize("path", workflows.FILES, ids=lambda path: path.name)
def test_it_has_a_thumbnail(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) >= 200
