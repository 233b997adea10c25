"""Every example workflow fits the nodes as they are: nothing missing, nothing red."""

import json
import sys

import av
import pytest
from PIL import Image, ImageChops, ImageStat

from tests import arrange, drawings, workflows


@pytest.fixture(params=workflows.FILES + workflows.BLOCKS, ids=lambda path: path.name)
def workflow(request):
    """An example, or what is inside a block."""
    read = workflows.read(request.param)
    return workflows.inside(read) if request.param in workflows.BLOCKS else read


def test_there_is_a_workflow_for_each_use():
    names = {path.stem for path in workflows.FILES}
    assert names == {
        "text_to_video",
        "image_to_video",
        "video_to_video",
        "text_to_video_lora",
        "text_to_video_fast",
        "native_nodes",
        "long_video",
        "extend",
        "super_resolution",
        "inpaint",
        "object_removal",
    }


def test_its_nodes_exist_with_their_sockets_in_order(workflow, pack):
    workflows.check_sockets(workflow, pack)


def test_its_widget_values_are_allowed(workflow, pack):
    workflows.check_widgets(workflow, pack)


def test_its_links_join_sockets_of_one_type(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, origin, output, target, entry, kind in workflow["links"]:
        if origin != workflows.INPUTS:
            assert nodes[origin]["outputs"][output]["type"] == kind
            assert number in nodes[origin]["outputs"][output]["links"]
        if target != workflows.OUTPUTS:
            in_socket = nodes[target]["inputs"][entry]
            assert in_socket["link"] == number
            assert in_socket["type"] == "*" or kind in in_socket["type"].split(",")
    numbers = {link[0] for link in workflow["links"]}
    assert {
        socket["link"] for node in workflow["nodes"] for socket in node["inputs"] if socket.get("link") is not None
    } <= numbers


def test_every_required_socket_is_connected(workflow, pack):
    workflows.check_required(workflow, pack)


@pytest.fixture(scope="module", params=["en", "zh"])
def drawn(request):
    """The thumbnails of a language as they are drawn, by the files that they are in."""
    if request.param != "en" and drawings.font() is None:
        pytest.skip("no font here has the letters")
    folder = drawings.CLIP.parent.parent / ("" if request.param == "en" else request.param)
    return {folder / f"{name}.jpg": picture for name, picture in drawings.thumbnails(request.param).items()}


@pytest.mark.parametrize("path", workflows.FILES, ids=lambda path: path.name)
def test_it_has_its_thumbnail_as_it_is_drawn(path, drawn):
    file = next(file for file in drawn if file.stem == path.stem)
    assert file.stat().st_size < 100_000
    with Image.open(file) as picture:
        assert picture.format == "JPEG"
        assert picture.size == drawn[file].size
        assert max(ImageStat.Stat(ImageChops.difference(picture, drawn[file])).mean) < 3


def test_the_example_clip_is_the_one_that_is_drawn_and_short():
    assert drawings.CLIP.stat().st_size < 200_000
    with av.open(drawings.CLIP) as film:
        assert film.streams.video[0].average_rate == drawings.FPS
        frames = [frame.to_image() for frame in film.decode(video=0)]
    assert len(frames) == drawings.FRAMES
    assert drawings.FRAMES % 16 == 1
    for place in (0, 40, 80):
        wanted = drawings.scene(place / (drawings.FRAMES - 1))
        assert max(ImageStat.Stat(ImageChops.difference(frames[place], wanted)).mean) < 4
    apart = ImageStat.Stat(ImageChops.difference(frames[0], frames[80])).mean
    assert max(apart) > 8, "nothing moves"
    example = next(path for path in workflows.FILES if path.stem == "video_to_video")
    (node,) = (node for node in workflows.read(example)["nodes"] if node["type"] == "LoadVideo")
    assert node["widgets_values"][0] == drawings.CLIP.name


@pytest.mark.parametrize("path", workflows.FILES, ids=lambda path: path.name)
class TestRoom:
    def test_it_is_laid_out_as_arranged_and_can_be_read_when_it_opens(self, path):
        workflow = workflows.read(path)
        arranged = workflows.read(path)
        arrange.arrange(arranged, *arrange.STEPS[path.stem])
        assert arranged == workflow
        assert arrange.opened(workflow) > arrange.UNREADABLE

    def test_it_is_read_from_left_to_right_and_from_top_to_bottom(self, path):
        workflow = workflows.read(path)
        places = {node["id"]: tuple(node["pos"]) for node in workflow["nodes"]}
        for _, origin, _, target, _, _ in workflow["links"]:
            assert places[origin] < places[target]
        (note,) = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
        assert min(places.values()) == places[note["id"]]
        assert [group["title"].split(" · ")[0] for group in workflow["groups"]] == [
            str(number) for number in range(1, len(workflow["groups"]) + 1)
        ]


@pytest.mark.parametrize("path", workflows.FILES, ids=lambda path: path.name)
def test_a_note_says_what_to_change_and_what_to_do_if(path):
    (note,) = (node for node in workflows.read(path)["nodes"] if node["type"] == "MarkdownNote")
    assert note["title"].startswith("Read me")
    text = note["widgets_values"][0]
    of_fun = path.stem in ("inpaint", "object_removal")
    for word in (
        "CogVideoX-Fun-V1.5-5b-InP" if of_fun else "huggingface.co/zai-org/CogVideoX1.5-5B",
        "models/diffusion_models" if path.stem == "object_removal" else "models/CogVideo",
        "Prompt",
        "8N+5" if of_fun else "16N+1",
        "memory",
        "dtype",
        "black",
    ):
        assert word in text, word
    assert ("lora" in path.stem) == ("models/loras" in text)


@pytest.mark.parametrize("path", workflows.FILES, ids=lambda path: path.name)
def test_the_twin_for_scripts_is_what_the_page_would_queue(path):
    twin = workflows.read(workflows.twin(path))
    assert {
        name: {key: node[key] for key in ("class_type", "inputs")} for name, node in twin.items()
    } == workflows.to_api(workflows.read(path))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_lists_them_with_what_most_begin_with_first(pack, language):
    """ComfyUI gives them as its disk has them."""
    page = sys.modules[f"{pack.__name__}.nodes.host.language"]
    stems = [path.stem for path in workflows.FILES]
    assert sorted(page._ORDER) == sorted(stems)
    given = {page._PACK.name: [*stems[::-1], "of the user"], "another": ["b", "a"]}
    listed = json.loads(page._listed("/workflow_templates", json.dumps(given), language))
    wanted = [*page._ORDER, "of the user"]
    assert listed == {page._PACK.name: [page._title(stem, language) for stem in wanted], "another": ["b", "a"]}
    assert listed[page._PACK.name][0] == {"en": "text_to_video", "zh": "文生视频"}[language]


def test_twins_are_not_listed_as_templates():
    """ComfyUI lists every JSON file right in example_workflows."""
    assert [workflows.twin(path).parent.name for path in workflows.FILES] == ["api"] * len(workflows.FILES)
    assert sorted(workflows.twin(workflows.FILES[0]).parent.glob("*")) == [
        workflows.twin(path) for path in workflows.FILES
    ]


@pytest.mark.parametrize("path", workflows.BLOCKS, ids=lambda path: path.name)
def test_a_block_is_one_node_that_shows_what_matters_and_gives_frames_and_video(path):
    """The page takes a block from a workflow of one node, which is a subgraph (ComfyUI's app/subgraph_manager.py lists
    subgraphs/*.json)."""
    block = workflows.read(path)
    (node,), (graph,) = block["nodes"], block["definitions"]["subgraphs"]
    assert node["type"] == graph["id"]
    assert node["title"] == graph["name"] == path.stem
    assert graph["description"]
    names = [socket["name"] for socket in node["inputs"]]
    assert {"model", "prompt", "negative_prompt", "width", "height", "length", "seed", "steps", "cfg"} <= set(names)
    assert names == [socket["name"] for socket in graph["inputs"]]
    assert [(socket["name"], socket["type"]) for socket in node["outputs"]] == [("images", "IMAGE"), ("video", "VIDEO")]
    assert len(node["widgets_values"]) == len(names)
    assert {kind["class_type"] for kind in workflows.to_api(block).values()} >= {
        "CogVideoX15ModelLoader",
        "CogVideoX15BlackFrameCheck",
    }


def test_the_block_runs_what_the_example_runs():
    """Node for node the same, but for what saves and for the names of the nodes."""
    example = workflows.to_api(workflows.read(next(path for path in workflows.FILES if path.stem == "text_to_video")))
    block = workflows.to_api(workflows.read(workflows.BLOCKS[0]))

    def plain(prompt):
        links = {
            name: sorted(value[1] for value in node["inputs"].values() if isinstance(value, list))
            for name, node in prompt.items()
        }
        values = {
            name: {key: value for key, value in node["inputs"].items() if not isinstance(value, list)}
            for name, node in prompt.items()
        }
        return sorted(
            (node["class_type"], str(values[name]), links[name])
            for name, node in prompt.items()
            if node["class_type"] != "SaveVideo"
        )

    assert plain(block) == plain(example)
