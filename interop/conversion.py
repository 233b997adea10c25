"""What every step of a migration needs: the old graph, what is made of it, and what is said about it."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cogvideox.words import short

from . import tables
from .graph import PASSING, Graph, Node, Wire
from .kinds import KINDS

#: Larger numbers than that are of no widget, and cannot be added to others.
_LARGEST = 1e15
_INPAINT_SIZE = tuple(KINDS["CogVideoX15Inpaint"].input(side).default for side in ("width", "height"))


def as_number(value: Any, kind: type | tuple) -> Any:
    """Return a number that a program wrote as a text, or a whole one that it wrote with a point, as ComfyUI reads it
    for a widget of whole numbers (``int``) or of others; anything else as it is."""
    if kind in (str, bool) or not (isinstance(value, str) or (kind is int and isinstance(value, float))):
        return value
    with suppress(ValueError, OverflowError):
        number = int(value) if kind is int else float(value)
        # "nan" and "inf" are no numbers that a widget has.
        return number if math.isfinite(number) and (isinstance(value, str) or number == value) else value
    return value


class Conversion:
    """The conversion of one graph, and what came of it so far.

    Attributes:
        old: the nodes of the old pack, which will be no more.
        made: the new nodes.
        differs, not_needed: sentences for the report.
        outputs: old outputs -> new outputs.
        settled: widgets whose links were dealt with, as (node, name).
    """

    def __init__(self, graph: Graph, source: Path):
        self.graph, self.source, self.nodes = graph, source, graph.nodes
        self.old = {id_: node for id_, node in self.nodes.items() if is_old(node)}
        self.samplers = [node for node in self.old.values() if node.kind == "CogVideoSampler"]
        self.made: dict[object, Node] = {}
        self.differs: list[str] = []
        self.not_needed: list[str] = []
        self.outputs: dict[tuple, Wire | None] = {}
        self.settled = {(node.id, name) for node in self.old.values() for name in tables.WITHOUT_EFFECT}
        for node in self.old.values():
            if node.kind == "CogVideoTextEncode":
                graph.pass_on(node, 1, node.wires.get("clip"))
            elif node.kind == "CogVideoXFunResizeToClosestBucket":
                graph.pass_on(node, 0, node.wires.get("images"))
            elif is_piped(node) and node.kind == "CogVideoSampler":
                graph.pass_on(node, 0, node.wires.get("pipeline"))
        for node in self.old.values():
            for name in tables.known_widgets(node.kind) & node.wires.keys():
                # What a widget was left at when it was turned into an input is not what it ran with.
                if tables.fits(name, value := self.given(node.wires[name])):
                    node.values[name] = value
        #: Nodes whose outputs others than those of the old pack take too.
        self.shared: set = set()
        #: The first sampler that starts from what a node made.
        self.starts: dict[object, Node] = {}
        for node in self.nodes.values():
            if node.id not in self.old and node.kind not in PASSING:
                wires = [each for wire in node.wires.values() for each in (wire, graph.origin(wire))]
                self.shared |= {wire.node for wire in wires if wire is not None}
        for node in self.samplers:
            for name in ("image_cond_latents", "samples"):
                start = graph.trace(node.wires.get(name))
                if start is not None:
                    self.starts.setdefault(start.id, node)

    @property
    def others(self) -> list[Node]:
        """The nodes that stay as they are."""
        return [node for id_, node in self.nodes.items() if id_ not in self.old and id_ not in self.made]

    def say(self, node: Node, text: str) -> None:
        self.differs.append(f"{node.where}: {text}")

    def make(
        self,
        kind: str,
        place: Node,
        values: Mapping,
        wires: Mapping[str, Wire | None],
        own_id: bool = True,
        id_: object = None,
    ) -> Node:
        """A new node in the place of ``place``, under its id or, if that is taken, under one of its own: ``id_`` if it
        has one already."""
        if id_ is None:
            id_ = place.id if own_id and place.id not in self.made else self.graph.new_id()
        defaults = {entry.name: entry.default for entry in KINDS[kind].inputs if entry.default is not None}
        self.made[id_] = node = Node(
            id_,
            kind,
            defaults | dict(values),
            {name: wire for name, wire in wires.items() if wire is not None},
            place.raw,
        )
        return node

    def resolve(self, wire: Wire | None) -> Wire | None:
        """An old wire as it is now; None if what it came from is no more."""
        seen = set()
        while wire is not None and wire.key in self.graph.passed and wire.key not in seen:
            seen.add(wire.key)
            before = self.graph.passed[wire.key]
            wire = before and before._replace(link=wire.link)
        if wire is None:
            return None
        if wire.key in self.outputs:
            now = self.outputs[wire.key]
            return now and now._replace(link=wire.link)
        return wire if wire.node in self.nodes and wire.node not in self.old else None

    def setting(self, node: Node, name: str, kind: type | tuple, default):
        """The value of an old node's widget; what it cannot hold is told and becomes the default."""
        value = as_number(node.values.get(name, default), kind)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        good = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if not good or (numeric and kind is not int and not abs(value) < _LARGEST):
            self.say(
                node,
                f"{name} is {short(repr(value))}, which is not a value that it takes; {short(repr(default))} was "
                "taken.",
            )
            return default
        return value

    def limited(self, node: Node, name: str, given, limits: tuple, tells: bool = True):
        """Bring a number within the limits of our widget, and say so if it was beyond them and ``tells``."""
        value = min(max(given, limits[0]), limits[1])
        if value != given and tells:
            self.say(node, f"{name} {short(given)} became {value}.")
        return value

    def keep(self, node: Node, name: str, value, wires: dict, values: dict, new_name: str | None = None) -> None:
        """Carry over a widget's value, and its link if it has one."""
        values[new_name or name] = value
        self.settled.add((node.id, name))
        if name in node.wires:
            wires[new_name or name] = self.resolve(node.wires[name])

    def given(self, wire: Wire | None):
        """The value that comes over a wire, if it stands in the file."""
        node = self.graph.trace(wire)
        if node is None or node.kind not in tables.CONSTANTS:
            return None
        value = next(iter(self.graph.widgets(node, ("value",)).values()), None)
        return value if isinstance(value, str | int | float) else None

    def constant(self, wire: Wire | None) -> int | float | None:
        """The number that comes over a wire, if it stands in the file."""
        value = as_number(as_number(self.given(wire), int), (int, float))
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def model_wire(self, node: Node) -> Wire | None:
        """What brings a node its model, or in old files all."""
        return node.wires.get("pipeline") if is_piped(node) else node.wires.get("model")

    def loader_of(self, node: Node) -> Node | None:
        """The loader whose model a node is given."""
        loader = self.graph.trace(self.model_wire(node))
        return loader if loader is not None and loader.kind in tables.MODEL_LOADERS else None

    def model_of(self, sampler: Node) -> str:
        loader = self.loader_of(sampler)
        return "" if loader is None else self.asked(loader)

    def asked(self, loader: Node) -> str:
        """The name of the model that a loader loads."""
        name = loader.values.get(tables.MODEL_LOADERS[loader.kind][0])
        # The node's first version had no widget for it.
        return (
            name
            if isinstance(name, str)
            else "THUDM/CogVideoX-2b"
            if loader.kind == "DownloadAndLoadCogVideoModel" and "model" not in loader.wires
            else ""
        )


def is_old(node: Node) -> bool:
    """Whether a node is of the old pack: by its type, or by what the page noted of where it is from."""
    properties = node.raw.get("properties")
    pack = [properties.get(name) for name in ("cnr_id", "aux_id")] if isinstance(properties, dict) else []
    return node.kind in tables.OLD or any(isinstance(name, str) and "cogvideoxwrapper" in name.lower() for name in pack)


def is_piped(node: Node) -> bool:
    """Whether a node is as it was before 19 November 2024, when ``pipeline`` brought everything."""
    sockets = node.raw.get("inputs")
    names = [socket.get("name") for socket in sockets if isinstance(socket, dict)] if isinstance(sockets, list) else []
    return "pipeline" in node.wires or ("pipeline" in names and "model" not in node.wires)


def frame_step(model: str) -> int:
    """A clip of a model has so many frames times N, plus 1."""
    return 16 if is_1_5(model) else 8


def is_1_5(name: str) -> bool:
    """Whether a model is a CogVideoX-1.5, going by its name; one that says nothing is taken for it."""
    return re.search(r"1[._]5", name) is not None or re.search("[25]b|interpolation", name, re.IGNORECASE) is None


def is_inpaint(model: str) -> bool:
    """Whether a model is CogVideoX-Fun-V1.5-InP, going by its name."""
    return (
        re.search(tables.FUN, model, re.IGNORECASE) is not None
        and re.search(r"1[._]5", model) is not None
        and re.search(tables.FUN_CONTROL, model, re.IGNORECASE) is None
    )


def usual_size(model: str) -> tuple[int, int]:
    """Return the width and height in pixels that a model, by its name, is used with."""
    if is_inpaint(model):
        return _INPAINT_SIZE
    return (1360, 768) if is_1_5(model) else (720, 480)
