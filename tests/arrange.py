"""Lays out the example workflows: columns from left to right, in each the steps of the work from top to bottom.

``python -m tests.arrange`` writes places and sizes into example_workflows; what the nodes do is not touched. Sizes are
in the graph's units: a line of widgets is 24, a title 30.
"""

import json
import math
import sys
from pathlib import Path

from tests import workflows

#: The window that every workflow is to fit, and what of it the page's own bars leave, in pixels: left, top, right,
#: bottom.
WINDOW, VIEW = (1280, 720), (68, 98, 1274, 714)
#: At this scale and below the page leaves out the texts of nodes: 8 pixels for letters of 14 (its setting
#: LiteGraph.Canvas.MinFontSizeForLOD). A template is opened so that its nodes, with 10 around them, take three quarters
#: of the window's width or height (the frontend's fitToBounds and createBounds).
UNREADABLE, SHARE, AROUND = 8 / 14, 0.75, 10
#: Between columns and nodes (ComfyUI writes the pack's name over a node); the title of a node and of a group; the
#: border of a group.
ACROSS, DOWN, TITLE, HEAD, EDGE = 20, 24, 30, 30, 8
#: The height that a node needs with all that it shows after a run: the loader's report, a note of some lines (58), a
#: live preview, a contact sheet (220 and more), a film. By its title where it has one.
HEIGHTS = {
    "MarkdownNote": 220,
    "CogVideoX15ModelLoader": 510,
    "CogVideoX15LoraLoader": 180,
    "Prompt": 190,
    "Negative prompt": 150,
    "CogVideoX15EmptyLatent": 130,
    "CogVideoX15ImageToVideo": 240,
    "CogVideoX15Inpaint": 300,
    "CogVideoX15Void": 300,
    "LoadImage": 330,
    "Your video": 240,
    "LoadVideo": 284,
    "Quadmask": 284,
    "Mask": 330,
    "GetVideoComponents": 106,
    "Frames of the quadmask": 106,
    "ImageScale": 130,
    "CogVideoX15VAEEncode": 110,
    "CogVideoX15Sampler": 770,
    "CogVideoX15VAEDecode": 100,
    "CogVideoX15BlackFrameCheck": 620,
    "CreateVideo": 102,
    "CogVideoX15ToComfyUI": 66,
    "KSampler": 620,
    "VAEDecode": 46,
    "CogVideoX15Attention": 130,
    "CogVideoX15Cache": 372,
    "CogVideoX15Compile": 182,
    "CogVideoX15ContextWindows": 200,
    "CogVideoX15Extend": 152,
    "CogVideoX15JoinClips": 100,
    "SaveVideo": 340,
    "CogVideoX15SuperResolution": 420,
}
_MODEL = ("Model", ["MarkdownNote", "CogVideoX15ModelLoader"])
_PROMPTS = ("Prompt", ["Prompt", "Negative prompt"])
_SIZE = ("Size and length", ["CogVideoX15EmptyLatent"])
_IMAGE = ("Start image", ["LoadImage", "CogVideoX15ImageToVideo"])
_VIDEO = ("Your video", ["LoadVideo", "GetVideoComponents", "ImageScale", "CogVideoX15VAEEncode"])
_CLIP = ("Your video", ["LoadVideo", "GetVideoComponents"])
_LARGER = ("Make it larger", ["CogVideoX15SuperResolution"])
_PARTS = ("Video and mask", ["Your video", "GetVideoComponents", "Mask"])
_INPAINT = ("What is made anew", ["CogVideoX15Inpaint"])
_QUADMASK = ("Video and quadmask", ["Your video", "GetVideoComponents", "Quadmask"])
_VOID = ("What is taken away", ["Frames of the quadmask", "CogVideoX15Void"])
_FASTER = ("Faster", ["CogVideoX15Attention", "CogVideoX15Cache", "CogVideoX15Compile"])
_WINDOWS = ("Windows", ["CogVideoX15ContextWindows"])
_SO_FAR = ("The clip so far", ["Your video", "GetVideoComponents", "ImageScale", "CogVideoX15Extend"])
_BRIDGE = ("To core's types", ["CogVideoX15ToComfyUI"])
_CORE = [[("Sample", ["KSampler"])], [("Decode and check", ["VAEDecode", "CogVideoX15BlackFrameCheck"])]]
_LAST = [
    [("Sample", ["CogVideoX15Sampler"])],
    [("Decode and check", ["CogVideoX15VAEDecode", "CogVideoX15BlackFrameCheck"])],
    [("Save", ["CreateVideo", "SaveVideo"])],
]
_PAIR = (268, 240, 296, 246, 276, 218)
_FIVE, _SIX, _LORA = (310, 310, 300, 330, 310), (278, 214, 268, 260, 298, 226), (278, 252, 234, 260, 298, 222)
#: By workflow: how wide its columns are, and the steps in each, with their titles and nodes.
STEPS = {
    "text_to_video": (_FIVE, [[_MODEL], [_PROMPTS, _SIZE], *_LAST]),
    "text_to_video_lora": (_LORA, [[_MODEL], [("LoRA", ["CogVideoX15LoraLoader"])], [_PROMPTS, _SIZE], *_LAST]),
    "text_to_video_fast": (_LORA, [[_MODEL], [_FASTER], [_PROMPTS, _SIZE], *_LAST]),
    "native_nodes": (_LORA, [[_MODEL], [_BRIDGE], [_PROMPTS, _SIZE], *_CORE, _LAST[2]]),
    "image_to_video": (_SIX, [[_MODEL], [_PROMPTS], [_IMAGE], *_LAST]),
    "super_resolution": (
        _FIVE,
        [[_MODEL], [_CLIP], [_LARGER], [("Check", ["CogVideoX15BlackFrameCheck"])], _LAST[2]],
    ),
    "video_to_video": (_SIX, [[_MODEL], [_PROMPTS], [_VIDEO], *_LAST]),
    "long_video": (_LORA, [[_MODEL], [_WINDOWS], [_PROMPTS, _SIZE], *_LAST]),
    "extend": (
        _SIX,
        [[_MODEL], [_PROMPTS], [_SO_FAR], *_LAST[:2], [("Join and save", ["CogVideoX15JoinClips", *_LAST[2][0][1]])]],
    ),
    "inpaint": (_PAIR, [[_MODEL], [_PARTS], [_PROMPTS, _INPAINT], *_LAST]),
    "object_removal": (_PAIR, [[_MODEL], [_QUADMASK], [("Prompt", ["Prompt"]), _VOID], *_LAST]),
}


def opened(workflow: dict) -> float:
    """Say at what scale the page opens a workflow from the template browser, in a window of that size."""
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    left, right = min(box[0] for box in boxes), max(box[0] + box[2] for box in boxes)
    top, bottom = min(box[1] - TITLE for box in boxes), max(box[1] + box[3] for box in boxes)
    wide, high = right - left + 2 * AROUND, bottom - top + 2 * AROUND
    return SHARE * min(WINDOW[0] / wide, WINDOW[1] / high)


def arrange(workflow: dict, widths: tuple[int, ...], columns: list[list[tuple[str, list[str]]]]) -> None:
    """Give every node its place and size, every step its group, and the page its view, in the workflow itself.

    Raises:
        StopIteration: if a node of the steps is not in the workflow.
        ValueError: if one of the workflow's is in no step.
    """
    left, number, bottom, groups, placed = EDGE, 0, 0, [], set()
    for width, steps in zip(widths, columns, strict=True):
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
    workflow["groups"] = groups
    workflow["extra"] = {"ds": {"scale": scale, "offset": [VIEW[0] / scale, VIEW[1] / scale]}}


def write(path: Path) -> None:
    workflow = workflows.read(path)
    arrange(workflow, *STEPS[path.stem])
    path.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for path in workflows.FILES:
        if path.stem in (sys.argv[1:] or STEPS):
            write(path)
