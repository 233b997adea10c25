"""Makes every picture of ComfyUI's page that the pack shows: of the help pages, and those of README.md and docs/. The
examples' thumbnails are drawn by tests/drawings.py.

Run from the repository's root, with the variables of the browser tests set: ``python -m tests.comfyui.pictures [help]
[readme]``.
"""

import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.comfyui.page import HOW, Page, available
from tests.comfyui.server import add_example_files, from_environment
from tests.conftest import ROOT

#: The help pages' pictures are of nodes this wide, in the graph's own units; what a text box needs is not known to the
#: page.
WIDTH, HEIGHTS = 350, {"CogVideoX15TextEncode": 180}
#: What stands in them.
FILLED = {
    "prompt": "A giant panda sits on a wooden stool in a sunlit bamboo forest and plays a small acoustic guitar.",
    "model": "CogVideoX1.5-5B · bf16 · diffusers",
    "lora_name": "my_cogvideox_lora.safetensors",
}
#: A run that a tiny checkpoint with random weights is through with in seconds.
SMALL = {"width": 320, "height": 192, "length": 17, "steps": 10}
MARGIN = 10
IMAGES = ROOT / "web" / "docs" / "images"


def help_pictures(page: Page) -> None:
    for node_id in json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8")):
        page.alone(type=node_id, width=WIDTH, height=HEIGHTS.get(node_id))
        page.set_widgets(values=FILLED)
        shoot(page, IMAGES / f"{node_id}.png", colours=96)


def readme_pictures(page: Page) -> None:
    page.fit()
    page.drop(path=ROOT / "example_workflows" / "text_to_video.json")
    page.set_widgets(values=SMALL)
    page.fit()
    page.run(seconds=300)
    page.video()
    shoot(page, IMAGES / "after_a_run.jpg", width=1400)
    page.fit()
    page.help(type="CogVideoX15BlackFrameCheck")
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        page.screenshot(path=file.name)
        save(Image.open(file.name), IMAGES / "help_beside_the_graph.jpg", width=1400)


def shoot(page: Page, path: Path, **options) -> None:
    """The whole graph and nothing else."""
    boxes = [node["box"] for node in page.graph()]
    boxes += page.evaluate(script="() => window.app.graph.groups.map((group) => Array.from(group.boundingRect))")
    left, top = (min(box[i] for box in boxes) - MARGIN for i in (0, 1))
    right, bottom = (max(box[i] + box[i + 2] for box in boxes) + MARGIN for i in (0, 1))
    page.fit(plain=True)
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        page.screenshot(path=file.name, around=[left, top, right - left, bottom - top])
        save(Image.open(file.name), path, **options)


def save(picture: Image.Image, path: Path, width: int | None = None, colours: int = 256) -> None:
    """Scaled to a width where there is one; a PNG with a palette of so many colours, or a JPEG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = picture.convert("RGB")
    if width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    if path.suffix == ".png":
        picture.quantize(colours).save(path, optimize=True)
    else:
        picture.save(path, quality=82, optimize=True)


def main(parts: list[str]) -> None:
    if not available():
        sys.exit(f"no browser: {HOW}")
    with tempfile.TemporaryDirectory() as base:
        comfy = from_environment(Path(base))
        if comfy is None:
            sys.exit("no ComfyUI: set COMFYUI_PATH to a checkout and COMFYUI_PYTHON to its interpreter")
        try:
            add_example_files(comfy.base)
            page = Page(
                comfy,
                width=1600,
                height=1000,
                scale=1.5,
                **{"Comfy.NodeBadge.NodeSourceBadgeMode": "None", "Comfy.NodeBadge.NodeIdBadgeMode": "None"},
            )
            makers = {"readme": readme_pictures, "help": help_pictures}
            for part in parts or makers:
                makers[part](page)
            page.close()
        finally:
            comfy.close()


if __name__ == "__main__":
    main(sys.argv[1:])
