"""The page itself, in a headless Chromium: what a person sees who opens an example, looks for help, presses Run, or
makes a mistake."""

import itertools

import pytest
from PIL import Image

from tests import locales, workflows
from tests.conftest import ROOT

PACK = "a pack with spaces"
SMALL = {"width": 160, "height": 96, "length": 17, "steps": 3}
#: What the tiny files of the tests are called, where an example leaves the choice to its user.
CHOICES = {"lora_name": "my_cogvideox_lora.safetensors"}
NOTES = ("MarkdownNote", "Note")
#: What a fresh ComfyUI complains of itself while its page opens: files of the user's that are not there yet.
AT_START = (
    "/user.css",
    "/api/userdata/user.css",
    "/api/userdata?dir=",
    "/api/userdata/comfy.templates.json",
    "graph accessed before initialization",
)


@pytest.fixture(scope="module", params=("en", "zh"))
def language(browser, request):
    """The page in that language: ComfyUI's default, or another set by its user."""
    browser.reload(**{"Comfy.Locale": request.param})
    return request.param


def complaints(page):
    """Console errors and exceptions, but for those of asking a host that the tests do not let it reach."""
    return [
        problem
        for problem in page.problems()
        if "net::ERR_FAILED" not in problem["text"] or problem["url"].startswith("http://127.0.0.1")
    ]


def check_graph(graph, path):
    """No node is missing or red, nothing lies on anything else, and every text has room."""
    assert sorted(node["type"] for node in graph) == sorted(node["type"] for node in workflows.read(path)["nodes"])
    for node in graph:
        assert not node["missing"], node["type"]
        assert not node["red"], node["type"]
        assert not any(socket["red"] for socket in node["inputs"]), node["type"]
        # With a film in it the page asks for more than the width that a node has, whatever that is.
        film = any(widget["name"] == "video-preview" for widget in node["widgets"])
        assert film or node["size"][0] >= node["needs"][0] - 1, node["type"]
        assert node["size"][1] >= node["needs"][1] - 1, node["type"]
        for widget in node["widgets"]:
            if widget["name"] == "model":
                # The tiny checkpoint's entry goes on with its odd size.
                assert any(choice.startswith(widget["value"].split(" · ")[0] + " · ") for choice in widget["choices"])
            elif widget["choices"] is not None and widget["name"] not in CHOICES:
                assert widget["value"] in widget["choices"], (node["type"], widget["name"])
    check_apart(graph)


def check_apart(graph):
    """No node lies on another."""
    for one, other in itertools.combinations(graph, 2):
        (x, y, width, height), (left, top, wide, high) = one["box"], other["box"]
        assert x + width <= left or left + wide <= x or y + height <= top or top + high <= y, (
            one["title"],
            other["title"],
        )


def test_the_page_opens_without_a_complaint_of_ours(browser):
    assert [
        problem
        for problem in complaints(browser)
        if not any(known in problem["url"] + problem["text"] for known in AT_START)
    ] == []


@pytest.mark.parametrize("path", workflows.FILES, ids=lambda path: path.stem)
def test_an_example_dropped_on_the_page_opens_without_a_complaint(page, shots, path):
    page.drop(path=path)
    page.fit()
    page.screenshot(path=shots / f"dropped_{path.stem}.png")
    graph = page.graph()
    check_graph(graph, path)
    assert page.messages() == []
    assert complaints(page) == []
    note = next(node for node in graph if node["type"] in NOTES)
    text = note["widgets"][0]
    (model,) = (widget["value"] for node in graph for widget in node["widgets"] if widget["name"] == "model")
    assert model.split(" · ")[0] in text["text"]
    assert text["cut"] <= 1, "the note is longer than its box"


def test_the_template_browser_has_them_with_their_thumbnails_and_opens_them(page, shots):
    for path in workflows.FILES:
        found = page.templates(module=PACK, count=len(workflows.FILES))
        # By their widths: in a thumbnail's place the page would put a picture of its own.
        assert found == {path.stem: Image.open(path.with_suffix(".jpg")).width for path in workflows.FILES}
        page.screenshot(path=shots / "templates.png")
        page.open_template(name=path.stem)
        check_graph(page.graph(), path)
    assert page.messages() == []
    assert complaints(page) == []


def node_of(graph, kind):
    return next(node for node in graph if node["type"] == kind)


@pytest.mark.usefixtures("previews")
def test_run_makes_a_video_with_progress_and_the_report_on_the_loader(page, shots):
    page.drop(path=ROOT / "example_workflows" / "text_to_video.json")
    page.set_widgets(values=SMALL)
    seen = page.run()
    assert seen["end"] == "success"
    film = page.video()
    assert (film["width"], film["height"]) == (160, 96)
    assert film["seconds"] == pytest.approx(17 / 16, abs=0.1)
    graph = page.graph()
    sampler, loader = (str(node_of(graph, kind)["id"]) for kind in ("CogVideoX15Sampler", "CogVideoX15ModelLoader"))
    assert {(value, 3) for value in range(1, 4)} <= {tuple(state) for state in seen["progress"][sampler]}
    assert seen["previews"] >= 3
    report = next(
        widget
        for widget in node_of(graph, "CogVideoX15ModelLoader")["widgets"]
        if widget["name"] == "$$node-text-preview"
    )
    assert "transformer: stored bf16" in report["value"]
    assert loader in seen["progress"]
    page.fit()
    page.screenshot(path=shots / "after_run.png")
    assert page.messages() == []
    assert complaints(page) == []


def test_a_wrong_length_is_told_in_the_engines_words(page, shots):
    page.drop(path=ROOT / "example_workflows" / "text_to_video.json")
    before = node_of(page.graph(), "CogVideoX15EmptyLatent")["size"]
    page.set_widgets(values=SMALL | {"length": 80})
    page.run()
    told = page.error_details()
    page.screenshot(path=shots / "error.png")
    assert "Set it to 65 or 81" in told.split("Stack Trace")[0]

    def told_on_it():
        latent = node_of(page.graph(), "CogVideoX15EmptyLatent")
        (text,) = (widget for widget in latent["widgets"] if widget["name"] == "$$node-text-preview")
        return latent, text

    latent, text = told_on_it()
    assert "Set it to 65 or 81" in text["value"]
    # Three lines are what the page gives any text.
    assert latent["size"][1] >= sum(text["place"]) > text["place"][0] + 58
    page.set_widgets(values=SMALL)
    assert page.run()["end"] == "success"
    latent, text = told_on_it()
    assert text["value"].strip() == ""
    assert latent["size"] == before

    # What its user has made higher meanwhile stays so.
    page.set_widgets(values=SMALL | {"length": 80})
    page.run()
    script = "(type) => window.app.graph.nodes.find((node) => node.type === type).setSize([310, 420])"
    page.evaluate(script=script, argument="CogVideoX15EmptyLatent")
    page.set_widgets(values=SMALL)
    assert page.run()["end"] == "success"
    latent, text = told_on_it()
    assert (text["value"].strip(), latent["size"][1]) == ("", 420)


def test_why_a_node_failed_while_it_ran_is_on_it_until_it_runs_again(page, shots):
    """The page's own box and panel have the places in the code, and not the sentence."""

    def told():
        return [w["value"] for w in node_of(page.graph(), kind)["widgets"] if w["name"] == "$$node-text-preview"]

    kind = "CogVideoX15BlackFrameCheck"
    page.load(workflow=workflows.read(ROOT / "example_workflows" / "text_to_video.json"))
    page.set_widgets(values=SMALL | {"pixel_black_threshold": 1, "picture_black_ratio": 0.1})
    assert page.run()["end"] == "error"
    page.screenshot(path=shots / "failed.png")
    (said,) = told()
    assert "so it is not passed on to be saved" in said
    # Two spaces keep a line's break in nodes that are drawn by Vue, which read Markdown.
    assert "  \nverdict: black  \n17 of 17" in said
    assert "Likely causes" in said
    page.set_widgets(values={"pixel_black_threshold": 0.1, "picture_black_ratio": 0.98})
    assert page.run()["end"] == "success"
    (said,) = told()
    assert said.startswith("verdict: ok")


def test_the_block_is_found_added_and_run_from_the_page(page, shots):
    """One node from the search box, its frames into a preview: the page runs what tests/workflows.py says it would."""
    (path,) = workflows.BLOCKS
    page.add_by_search(name=path.stem)
    page.join(type="SaveVideo", output="video", input="video")
    assert node_of(page.graph(), "SaveVideo")["inputs"][0]["link"] is not None
    page.set_widgets(values=SMALL)
    queued, known = page.prompt(), workflows.to_api(page.save())
    assert {name: node["inputs"] for name, node in queued.items()} == {
        name: node["inputs"] for name, node in known.items()
    }
    page.screenshot(path=shots / "block.png")
    seen = page.run()
    assert seen["end"] == "success"
    assert page.video()["width"] == 160
    assert page.messages() == []
    assert complaints(page) == []


def test_where_the_page_puts_our_text_encoders_both_have_the_clip_that_one_handed_on(page):
    """In the workflows of ComfyUI-CogVideoXWrapper the second prompt's CLIP comes through the first's node."""

    def node(number, kind, inputs, outputs, values):
        sockets = [{"name": name, "type": type_, "link": link} for name, type_, link in inputs]
        given = [{"name": name, "type": type_, "links": links} for name, type_, links in outputs]
        more = {"size": [300, 150], "flags": {}, "order": number, "mode": 0, "properties": {}}
        return {
            **{"id": number, "type": kind, "pos": [350 * number, 0], "inputs": sockets, "outputs": given},
            **{"widgets_values": values, **more},
        }

    encode = "CogVideoTextEncode"
    outputs = [[("conditioning", "CONDITIONING", []), ("clip", "CLIP", links)] for links in ([2], [])]
    page.load(
        workflow={
            "version": 0.4,
            **{"last_node_id": 3, "last_link_id": 2, "config": {}, "extra": {}, "groups": []},
            "nodes": [
                node(1, "CLIPLoader", [], [("CLIP", "CLIP", [1])], ["t5.safetensors", "sd3", "default"]),
                node(2, encode, [("clip", "CLIP", 1)], outputs[0], ["a boat", 1, False]),
                node(3, encode, [("clip", "CLIP", 2)], outputs[1], ["blurred", 1, True]),
            ],
            "links": [[1, 1, 0, 2, 0, "CLIP"], [2, 2, 1, 3, 0, "CLIP"]],
        }
    )
    page.replace_missing()
    queued = page.prompt()
    assert {name: queued[name]["inputs"] for name in ("2", "3")} == {
        "2": {"prompt": "a boat", "text_encoder": ["1", 0]},
        "3": {"prompt": "blurred", "text_encoder": ["1", 0]},
    }


def test_every_node_has_its_words_and_tooltips_in_that_language(page, shots, pack, language):
    for node_id, wanted in locales.read(language).items():
        page.alone(type=node_id)
        (node,) = page.graph()
        assert node["title"] == wanted["display_name"]
        labels = {
            slot["name"]: slot["label"] for slot in node["inputs"] + node["widgets"] if slot["name"] in wanted["inputs"]
        }
        assert labels == {name: entry["name"] for name, entry in wanted["inputs"].items()}
        assert [slot["label"] for slot in node["outputs"]] == [entry["name"] for entry in wanted["outputs"].values()]
        told = page.tooltips()
        assert told["title"] == wanted["description"]
        # The page adds widgets of its own, such as control_after_generate.
        ours = {name: text for name, text in told["inputs"].items() if name in wanted["inputs"]}
        assert len(ours) >= len(wanted["inputs"]) - 1, "only a text box has no tooltip that the mouse finds"
        assert ours == {name: wanted["inputs"][name]["tooltip"] for name in ours}
        assert told["outputs"] == [entry["tooltip"] for entry in wanted["outputs"].values()]
    page.screenshot(path=shots / f"words_{language}.png")
    assert complaints(page) == []


def test_the_help_panel_shows_every_nodes_page_with_its_picture(page, shots, pack, language):
    for node_id in pack.NODE_CLASS_MAPPINGS:
        source = ROOT / "web" / "docs" / (f"{node_id}/{language}.md" if language != "en" else f"{node_id}.md")
        page.alone(type=node_id)
        shown = page.help(type=node_id)
        title = source.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert shown["text"].startswith(title), node_id
        assert [picture["src"].rsplit("/", 1)[-1] for picture in shown["pictures"]] == [f"{node_id}.png"]
        assert all(picture["width"] >= 300 for picture in shown["pictures"]), node_id
        if node_id == "CogVideoX15BlackFrameCheck":
            page.screenshot(path=shots / f"help_{language}.png")
    assert [problem for problem in complaints(page) if f"/{language}.md" not in problem["url"]] == []
