"""Room on the page: a workflow can be read when it is opened, and what its nodes show after a run lies inside them."""

import pytest

from tests import arrange, workflows
from tests.comfyui.test_page import CHOICES, PACK, SMALL, check_apart, node_of

WINDOWS = ((1280, 720), (1600, 900))
OURS = ("COGVIDEOX_MODEL", "COGVIDEOX_TEXT_ENCODER", "COGVIDEOX_VAE")
SAMPLERS = ("CogVideoX15Sampler", "KSampler")
#: Lengths in pairs, and a clip that is smaller than the example's, as it is made larger.
SIZES = {"inpaint": {"length": 13}, "object_removal": {"length": 13}, "super_resolution": {"file": "input.mp4"}}
#: How high letters of a sheet are drawn in its node, at least; ComfyUI writes its own widgets 12 high.
LETTERS = 12


@pytest.fixture
def small_window(page):
    page.resize(width=1280, height=720)
    yield page
    page.resize(width=1600, height=1000)


def open_example(page, name):
    page.templates(module=PACK, count=len(workflows.FILES))
    page.open_template(name=name)


def apart(one, other):
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


@pytest.mark.parametrize("path", workflows.FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: f"{window[0]}x{window[1]}")
def test_a_template_opens_whole_and_large_enough_to_be_read(small_window, shots, path, window):
    page, (width, height) = small_window, window
    page.resize(width=width, height=height)
    open_example(page, path.stem)
    page.screenshot(path=shots / f"template_{path.stem}_{width}.png")
    seen = page.view()
    assert seen["readable"], f"at a scale of {seen['scale']} the page leaves out texts"
    assert seen["scale"] > 0.57
    assert len(seen["groups"]) == sum(map(len, arrange.STEPS[path.stem][1]))
    for box in seen["nodes"] + seen["groups"]:
        assert box[0] >= 0
        assert box[1] >= 0
        assert box[2] <= width
        assert box[3] <= height
        assert all(apart(box, bar) for bar in seen["bars"]), box


@pytest.mark.usefixtures("previews")
@pytest.mark.parametrize("name", [path.stem for path in workflows.FILES])
def test_what_nodes_show_lies_inside_them_after_the_first_run_and_the_second(page, shots, name):
    """As opened, but for a smaller size; all of it black, so that there is a contact sheet too."""
    page.resize(width=1280, height=720)
    open_example(page, name)
    groups = page.evaluate(script="() => window.app.graph.groups.map((group) => Array.from(group.boundingRect))")
    before = {node["id"]: node["box"] for node in page.graph()}
    for steps in (3, 4):
        small = SMALL | SIZES.get(name, {})
        page.set_widgets(values=small | CHOICES | {"steps": steps, "action": "warn", "pixel_black_threshold": 1.0})
        # One of them compiles.
        seen = page.run(seconds=400)
        assert seen["end"] == "success"
        samples = any(node["type"] in SAMPLERS for node in page.graph())
        assert (seen["previews"] >= 1) == samples
        page.video()
        page.pictures(type="CogVideoX15BlackFrameCheck")
        page.screenshot(path=shots / f"{name}_run_{steps}.png")
        graph = page.graph()
        check_apart(graph)
        for node in graph:
            x, y, width, height = node["box"]
            if node["type"] == "SaveVideo":
                # It is as high as the film that it shows, and the page opens it without one.
                assert any(
                    left <= x and top <= y and x + width <= left + wide and y + height <= top + high
                    for left, top, wide, high in groups
                )
            else:
                assert node["box"] == pytest.approx(before[node["id"]], abs=1), node["title"]
            assert all(sum(widget["place"]) <= node["size"][1] for widget in node["widgets"]), node["title"]
        samplers = [node for node in graph if node["type"] in SAMPLERS]
        assert all(sampler["pictures"] for sampler in samplers), "the last preview stays"
        check_sheet(node_of(graph, "CogVideoX15BlackFrameCheck"))
        texts = [text for text in page.texts() if text["text"].strip()]
        assert {text["text"].split()[0] for text in texts} >= {"verdict:"}
        assert [text["broken"] for text in texts] == [[]] * len(texts)
        # Of the loader's, whose reasons can be many, the verdict and the memory stand first.
        assert all(text["cut"] <= 1 for text in texts if "memory to sample" not in text["text"]), texts
    assert page.messages() == []


def check_sheet(node):
    """The sheet of black frames lies in its node, and its labels, 34 high on it, can be read there."""
    ((width, height),) = node["pictures"]
    room = next(widget["place"][1] for widget in node["widgets"] if widget["name"] == "$$canvas-image-preview")
    assert 34 * min((node["size"][0] - 20) / width, (room - 20) / height) >= LETTERS


def test_our_sockets_have_colours_of_their_own_in_every_palette(page):
    """The page empties what it does not know when a palette is chosen."""
    for palette, ground in (("dark", 0x353535), ("light", 0xF0F0F0), ("dark", 0x353535)):
        found = page.evaluate(
            script="""async ([palette, types]) => {
              await window.app.extensionManager.setting.set('Comfy.ColorPalette', palette)
              await new Promise((done) => setTimeout(done, 500))
              const style = getComputedStyle(document.documentElement)
              return types.map((type) => [
                window.app.canvas.default_connection_color_byType[type],
                window.LGraphCanvas.link_type_colors[type],
                style.getPropertyValue('--color-datatype-' + type).trim()
              ])
            }""",
            argument=[palette, OURS],
        )
        assert all(len(set(colours)) == 1 for colours in found), found
        ours = [int(colours[0].removeprefix("#"), 16) for colours in found]
        assert len(set(ours)) == 3
        assert all(contrast(colour, ground) >= 3 for colour in ours)


def contrast(one, other):
    """WCAG 2.1's contrast ratio of two colours."""
    light, dark = sorted((luminance(colour) for colour in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    parts = [(colour >> shift & 255) / 255 for shift in (16, 8, 0)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
