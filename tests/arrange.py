"""Lays out the example workflows: columns from left to right, in each the steps of the work from top to bottom.

``python -m tests.arrange`` writes places and sizes into example_workflows; what the nodes do is not touched. Sizes are
in the graph's units: a line of widgets is 24, a title 30.
"""

import json
import math
import sys
from pathlib import Path

from tests import workflows

#: What a window of 1280x720 leaves between the page's own bars, in pixels: left, top, right, bottom.
VIEW = (68, 98, 1274, 714)
#: At this scale and below the page leaves out the texts of nodes.
UNREADABLE = 0.5715
#: Between columns and nodes (ComfyUI writes the pack's name over a node); the title of a node and of a group; the
#: border of a group.
ACROSS, DOWN, TITLE, HEAD, EDGE = 28, 24, 30, 30, 8
#: The height that a node needs with all that it shows after a run: the loader's report, a live preview, a contact
#: sheet, a film. By its title where it has one.
HEIGHTS = {
    "MarkdownNote": 250,
    "CogVideoX15ModelLoader": 550,
    "CogVideoX15LoraLoader": 82,
    "Prompt": 190,
    "Negative prompt": 100,
    "CogVideoX15EmptyLatent": 130,
    "CogVideoX15ImageToVideo": 240,
    "LoadImage": 340,
    "LoadVideo": 340,
    "GetVideoComponents": 106,
    "ImageScale": 130,
    "CogVideoX15VAEEncode": 46,
    "CogVideoX15Sampler": 680,
    "CogVideoX15VAEDecode": 46,
    "CogVideoX15BlackFrameCheck": 560,
    "CreateVideo": 102,
    "SaveVideo": 340,
}
_MODEL = (340, [("Model", ["MarkdownNote", "CogVideoX15ModelLoader"])])
_PROMPTS = ("Prompt", ["Prompt", "Negative prompt"])
_SIZE = ("Size and length", ["CogVideoX15EmptyLatent"])
_LAST = [
    (310, [("Sample", ["CogVideoX15Sampler"])]),
    (340, [("Decode and check", ["CogVideoX15VAEDecode", "CogVideoX15BlackFrameCheck"])]),
    (330, [("Save", ["CreateVideo", "SaveVideo"])]),
]
#: By workflow: columns, each with its width and its steps; each step with its title and nodes.
STEPS = {
    "text_to_video": [_MODEL, (340, [_PROMPTS, _SIZE]), *_LAST],
    "text_to_video_lora": [_MODEL, (340, [("LoRA", ["CogVideoX15LoraLoader"]), _PROMPTS, _SIZE]), *_LAST],
    "image_to_video": [
        _MODEL,
        (280, [_PROMPTS]),
        (270, [("Start image", ["LoadImage", "CogVideoX15ImageToVideo"])]),
        *_LAST,
    ],
    "video_to_video": [
        _MODEL,
        (280, [_PROMPTS]),
        (270, [("Your video", ["LoadVideo", "GetVideoComponents", "ImageScale", "CogVideoX15VAEEncode"])]),
        *_LAST,
    ],
}


def arrange(workflow: dict, columns: list[tuple[int, list[tuple[str, list[str]]]]]) -> None:
    """Give every node its place and size, every step its group, and the page its view, in the workflow itself.

    Raises:
        StopIteration: if a node of the steps is not in the workflow.
        ValueError: if one of the workflow's is in no step, or if all together cannot be read in the view.
    """
    left, number, bottom, groups, placed = EDGE, 0, 0, [], set()
    for width, steps in columns:
        top = 0
        for title, names in steps:
            number, start = number + 1, top
            top += HEAD
            for name in names:
                node = next(node for node in workflow["nodes"] if name in (node.get("title"), node["type"]))
                placed.add(node["id"])
                top += DOWN + TITLE
                node["pos"], node["size"] = [left, top], [width, HEIGHTS[name]]
                top += HEIGHTS[name]
            groups.append(
                {
                    "id": number,
                    "title": f"{number} · {title}",
                    "bounding": [left - EDGE, start, width + 2 * EDGE, top + EDGE - start],
                    "color": "#3f789e",
                    "font_size": 24,
                    "flags": {},
                }
            )
            bottom = max(bottom, top + EDGE)
            top += 2 * EDGE
        left += width + ACROSS
    lost = [node["type"] for node in workflow["nodes"] if node["id"] not in placed]
    if lost:
        raise ValueError(f"no step has {', '.join(lost)}")
    right = left - ACROSS + EDGE
    scale = math.floor(100 * min((VIEW[2] - VIEW[0]) / right, (VIEW[3] - VIEW[1]) / bottom)) / 100
    if scale <= UNREADABLE:
        raise ValueError(f"{right}x{bottom} fits at a scale of {scale}, at which texts are left out")
    workflow["groups"] = groups
    workflow["extra"] = {"ds": {"scale": scale, "offset": [VIEW[0] / scale, VIEW[1] / scale]}}


def write(path: Path) -> None:
    workflow = workflows.read(path)
    arrange(workflow, STEPS[path.stem])
    path.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for path in workflows.FILES:
        if path.stem in (sys.argv[1:] or STEPS):
            write(path)
