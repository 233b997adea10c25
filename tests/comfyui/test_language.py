"""ComfyUI's page in Chinese: what our nodes say to it, the templates and the blocks; and the log in English."""

import http.client
import json
import re
import urllib.request
from urllib.parse import quote

import pytest

from tests import workflows
from tests.comfyui.page import HOW, Page, available

PACK = "a pack with spaces"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
#: In the order in which they are shown: what most begin with comes first.
TITLES = {
    "text_to_video": "文生视频",
    "image_to_video": "图生视频",
    "video_to_video": "视频生视频",
    "text_to_video_lora": "文生视频加 LoRA",
    "text_to_video_fast": "文生视频（更快）",
    "native_nodes": "ComfyUI 自带节点",
    "long_video": "长视频",
    "extend": "续写视频",
    "super_resolution": "超分辨率",
    "inpaint": "局部重绘",
    "object_removal": "移除物体",
}


@pytest.fixture
def chinese(comfy):
    """The setting of a user who chose Chinese."""
    comfy.post("/settings", {"Comfy.Locale": "zh"})
    yield
    comfy.post("/settings", {"Comfy.Locale": None})


def refused(comfy, prompt, headers=()) -> str:
    """What the page is told of a prompt that is not queued."""
    request = urllib.request.Request(
        f"{comfy.url}/prompt",
        json.dumps({"prompt": prompt}).encode(),
        {"Content-Type": "application/json", **dict(headers)},
    )
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.urlopen(request, timeout=30)
    return json.dumps(json.loads(answer.value.read()), ensure_ascii=False)


def odd_length(prompt) -> dict:
    node_of(prompt, "CogVideoX15EmptyLatent")["inputs"]["length"] = 80
    return prompt


def node_of(prompt, kind):
    return next(node for node in prompt.values() if node["class_type"] == kind)


def logged(comfy, since: int) -> str:
    return comfy.log.read_text(encoding="utf-8")[since:]


def test_what_is_refused_is_told_in_the_languages_of_the_page_and_of_the_log(comfy, prompt, chinese):
    since = len(comfy.log.read_text(encoding="utf-8"))
    assert "片段长度是 80 帧，而这个模型生成 16N+1 帧" in refused(comfy, odd_length(prompt))
    assert "The clip length is 80 frames, but this model makes 16N+1 frames" in logged(comfy, since)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "片段长度是 80 帧"),
        ("de-DE,de;q=0.9,zh;q=0.8", "The clip length is 80 frames"),
        ("zh-TW,zh;q=0.9", "The clip length is 80 frames"),
        ("", "The clip length is 80 frames"),
    ],
)
def test_without_a_setting_the_page_has_the_browsers_language(comfy, prompt, header, said):
    comfy.post("/settings", {"Comfy.Locale": None})
    assert said in refused(comfy, odd_length(prompt), {"Accept-Language": header}.items())


def test_an_error_while_a_node_runs_is_told_in_both(comfy, prompt, chinese):
    since = len(comfy.log.read_text(encoding="utf-8"))
    # A length that another node gives is known only then.
    prompt["80"] = {"class_type": "StringLength", "inputs": {"string": 80 * "x"}}
    node_of(prompt, "CogVideoX15EmptyLatent")["inputs"]["length"] = ["80", 0]
    told = comfy.listen(prompt)
    (failed,) = [event["data"] for event in told.events if event["type"] == "execution_error"]
    assert failed["exception_type"] == "ValueError"
    assert failed["exception_message"].startswith("片段长度是 80 帧")
    assert "ValueError: The clip length is 80 frames, but this model makes 16N+1 frames" in logged(comfy, since)


def test_the_report_is_shown_and_given_on_in_chinese_and_logged_in_english(comfy, prompt, chinese):
    since = len(comfy.log.read_text(encoding="utf-8"))
    loader = next(name for name, node in prompt.items() if node["class_type"] == "CogVideoX15ModelLoader")
    shown = {"show": {"class_type": "PreviewAny", "inputs": {"source": [loader, 3]}}}
    # Not what an earlier run has left.
    prompt[loader]["inputs"]["on_mismatch"] = "warn"
    told = comfy.listen({loader: prompt[loader], **shown})
    (given,) = told.history["outputs"]["show"]["text"]
    assert re.search(r"Transformer：保存为 \w+，以 \w+ 运行", told.texts[loader][-1])
    assert re.search(r"Transformer：保存为 \w+ .*，以 bf16 训练，以 \w+ 运行", given)
    assert not any("stored" in text or "memory" in text for text in (told.texts[loader][-1], given))
    log = logged(comfy, since)
    assert re.search(r"transformer: stored .*, trained in bf16", log)
    assert not CHINESE.search(log)


def test_the_templates_are_in_the_pages_language(comfy, chinese):
    assert comfy.get("/api/workflow_templates")[PACK] == list(TITLES.values())
    for path in workflows.FILES:
        address = f"/api/workflow_templates/{quote(PACK)}/{quote(TITLES[path.stem])}"
        opened = comfy.get(f"{address}.json")
        notes = [node for node in opened["nodes"] if node["type"] == "MarkdownNote"]
        assert notes
        assert all(CHINESE.search(note["title"] + note["widgets_values"][0]) for note in notes)
        with comfy.open(f"{address}.jpg") as picture:
            assert picture.read() == (path.parent / "zh" / f"{path.stem}.jpg").read_bytes()


def test_the_templates_are_as_they_lie_there_for_everybody_else_but_in_order(comfy):
    assert comfy.get("/api/workflow_templates")[PACK] == list(TITLES)
    for path in workflows.FILES:
        assert comfy.get(f"/api/workflow_templates/{quote(PACK)}/{path.name}") == workflows.read(path)


@pytest.mark.parametrize("name", ["..%2Fpyproject.toml", "%2e%2e/api/text_to_video.json", "none.json", ""])
def test_nothing_else_is_given_for_a_template(comfy, chinese, name):
    with pytest.raises((urllib.error.HTTPError, http.client.HTTPException)):
        comfy.get(f"/api/workflow_templates/{quote(PACK)}/{name}")


def test_the_blocks_are_in_the_pages_language(comfy, chinese):
    blocks = {key: block for key, block in comfy.get("/api/global_subgraphs").items() if PACK in str(block["info"])}
    assert sorted(block["name"] for block in blocks.values()) == ["CogVideoX-1.5 文生视频"]
    for key in blocks:
        block = json.loads(comfy.get(f"/api/global_subgraphs/{key}")["data"])
        (graph,) = block["definitions"]["subgraphs"]
        assert CHINESE.search(graph["description"])
        assert {node.get("title") for node in graph["nodes"]} >= {"提示词", "负面提示词"}


def test_the_page_opens_a_template_runs_it_and_shows_all_of_it_in_chinese(comfy, tmp_path):
    if not available():
        pytest.skip(f"no browser: {HOW} to run these tests")
    page = Page(comfy, width=1280, height=720, **{"Comfy.Locale": "zh"})
    try:
        found = page.templates(module=PACK, count=len(workflows.FILES))
        assert set(found) == set(TITLES.values())
        page.screenshot(path=tmp_path / "templates.png")
        page.open_template(name="文生视频")
        page.fit()
        page.screenshot(path=tmp_path / "opened.png")
        titles = [node["title"] for node in page.graph()]
        assert all(CHINESE.search(title) for title in titles), titles
        page.set_widgets(values={"width": 160, "height": 96, "length": 17, "steps": 2, "dtype": "fp16"})
        page.run()
        page.fit()
        page.screenshot(path=tmp_path / "ran.png")
        shown = [widget["value"] for node in page.graph() for widget in node["widgets"] if "preview" in widget["name"]]
        assert any("Transformer：保存为 bf16" in str(text) for text in shown), shown
        page.set_widgets(values={"on_mismatch": "stop"})
        page.run()
        page.screenshot(path=tmp_path / "failed.png")
        assert "数据类型不适合这个模型，而 on_mismatch 是 stop。" in page.error_details()
        page.screenshot(path=tmp_path / "details.png")
    finally:
        page.close()
        comfy.post("/settings", {"Comfy.Locale": None})
