"""The nodes that a migrated workflow has, as its file describes them: ours as ``our_nodes.json`` has them, which
``python -m tests.nodes_table`` writes from the node classes, and some of ComfyUI's."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Input(NamedTuple):
    """An input of a node: a widget if it has a default, else a socket.

    Attributes:
        low, high: the limits of a number, both included.
        options: what a list holds on every computer.
    """

    name: str
    type: str
    default: Any = None
    optional: bool = False
    low: float | None = None
    high: float | None = None
    options: tuple[str, ...] = ()


class Kind(NamedTuple):
    """A node as a workflow's file has to describe it."""

    inputs: tuple[Input, ...]
    outputs: tuple[tuple[str, str], ...]

    @property
    def widgets(self) -> tuple[str, ...]:
        """Return the names of its widgets, in their order."""
        return tuple(entry.name for entry in self.inputs if entry.default is not None)

    def input(self, name: str) -> Input:
        return next(entry for entry in self.inputs if entry.name == name)

    def limits(self, name: str) -> tuple[Any, Any]:
        """Return the least and the largest number that a widget takes."""
        entry = self.input(name)
        return entry.low, entry.high


def _ours() -> dict[str, Kind]:
    nodes: Mapping[str, Any] = json.loads(Path(__file__).with_name("our_nodes.json").read_text(encoding="utf-8"))
    return {
        kind: Kind(
            tuple(
                Input(
                    entry["name"],
                    entry["type"],
                    entry.get("default"),
                    entry.get("optional", False),
                    entry.get("min"),
                    entry.get("max"),
                    tuple(entry.get("options", ())),
                )
                for entry in node["inputs"]
            ),
            tuple((entry["name"], entry["type"]) for entry in node["outputs"]),
        )
        for kind, node in nodes.items()
    }


#: The nodes that are written: ours, in their own order, and some of ComfyUI's.
KINDS: dict[str, Kind] = _ours() | {
    "ConditioningAverage": Kind(
        (
            Input("conditioning_to", "CONDITIONING"),
            Input("conditioning_from", "CONDITIONING"),
            Input("conditioning_to_strength", "FLOAT", 1.0),
        ),
        (("CONDITIONING", "CONDITIONING"),),
    ),
    "ConditioningConcat": Kind(
        (Input("conditioning_to", "CONDITIONING"), Input("conditioning_from", "CONDITIONING")),
        (("CONDITIONING", "CONDITIONING"),),
    ),
    "ImageFromBatch": Kind(
        (
            Input("image", "IMAGE"),
            Input("batch_index", "INT", 0, low=0, high=16384),
            Input("length", "INT", 1, low=1, high=4096),
        ),
        (("IMAGE", "IMAGE"),),
    ),
    "ImageScaleToTotalPixels": Kind(
        (
            Input("image", "IMAGE"),
            Input("upscale_method", "COMBO", "nearest-exact"),
            Input("megapixels", "FLOAT", 1.0, low=0.01, high=16.0),
            Input("resolution_steps", "INT", 1, low=1, high=256),
        ),
        (("IMAGE", "IMAGE"),),
    ),
    "GetImageSize": Kind((Input("image", "IMAGE"),), (("width", "INT"), ("height", "INT"), ("batch_size", "INT"))),
}
