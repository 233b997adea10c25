"""The graph in a workflow's file, as nodes and wires that know neither the page's format nor the API's, and back into
the file.

Formats: ComfyUI_frontend, src/platform/workflow/validation/schemas/workflowSchema.ts (version 0.4, links as lists;
version 1, links as objects).
"""

import copy
import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cogvideox.words import short

from .kinds import KINDS
from .tables import AFTER_SEED
from .workflow import BYPASSED, MUTED, graphs, is_page, widget_values

#: Nodes of the page that only lead a link elsewhere.
PASSING = ("Reroute", "SetNode", "GetNode")
#: Pixels from the page's middle beyond which nobody sees a node: what lies there does not say where a new one goes.
_FAR = 1e7
#: Types of which this pack has its own, and which no other node takes.
_OWN_TYPES = ("COGVIDEOX_MODEL", "COGVIDEOX_VAE")


class Wire(NamedTuple):
    """Where an input's value comes from: an output of a node. ``link`` is its number in the page's file."""

    node: object
    slot: int
    link: object = None

    @property
    def key(self) -> tuple:
        return self.node, self.slot


@dataclass(eq=False)
class Node:
    """A node of either pack.

    Attributes:
        id: as the file has it: a number on the page, a text for the API.
        values: what its widgets are set to, by name.
        wires: where its inputs come from, by name.
        raw: what the file says of it; of a new node, what the file says of the one whose place it takes.
    """

    id: object
    kind: str
    values: dict = field(default_factory=dict)
    wires: dict[str, Wire] = field(default_factory=dict)
    raw: Mapping = field(default_factory=dict)

    @property
    def is_off(self) -> bool:
        return self.raw.get("mode") in (MUTED, BYPASSED)

    @property
    def where(self) -> str:
        return f'node {short(self.id)} "{short(self.kind)}"'


@dataclass(frozen=True)
class Changes:
    """What becomes of a graph.

    Attributes:
        made: new nodes by their ids, in the places of old ones that have the same, and beside them.
        gone: ids of the old nodes that no longer are, unless made anew.
        resolve: what an old wire is now; None if it comes from nothing any more.
        say: takes a node and a sentence for the report.
    """

    made: Mapping[object, Node]
    gone: Iterable
    resolve: Callable[[Wire | None], Wire | None]
    say: Callable[[Node, str], None]


class Graph:
    """A workflow's nodes, and what can be asked of them.

    Attributes:
        data: the workflow as it was read.
        nodes: by their ids.
        passed: outputs that only pass on what a wire brings to their node, besides those of the page's own nodes for
            that.
    """

    def __init__(self, data: dict):
        self.data = data
        self.passed: dict[tuple, Wire | None] = {}
        self.nodes: dict[object, Node] = {}
        for node in self._read():
            if node.id in self.nodes:
                raise ValueError(
                    f"The workflow has two nodes with the number {short(node.id)}, so which of them a link means is "
                    "not known. Open it in ComfyUI, which numbers them anew, save it and take that file."
                )
            self.nodes[node.id] = node
        self._origins: dict[tuple, Wire | None] = {}
        self._last = max(_numbers(self.nodes), default=0)
        self._named = {
            name: node
            for node in reversed(self.nodes.values())
            if node.kind == "SetNode" and isinstance(name := _first(node), str)
        }

    def _read(self) -> Iterator[Node]:
        raise NotImplementedError

    def hidden(self) -> list[str]:
        """The types of nodes that lie in subgraphs and group nodes, and not in ``nodes``."""
        return []

    def widgets(self, node: Node, order: Iterable[str]) -> dict:
        """The widgets by name of a node whose widgets' order is ``order``."""
        return node.values

    def new_id(self):
        """An id that no node has, nor was given before."""
        self._last += 1
        return self._last

    def pass_on(self, node: Node, slot: int, wire: Wire | None) -> None:
        """Note that an output only passes on what a wire brings to its node."""
        self.passed[node.id, slot] = wire
        self._origins.clear()

    def write(self, changes: Changes) -> dict:
        """The workflow as it is after the changes; ``data`` stays as it was."""
        raise NotImplementedError

    def add_note(self, data: dict, title: str, text: str) -> None:
        """Lay a note into what ``write`` gave, where the format has notes."""

    def trace(self, wire: Wire | None) -> Node | None:
        """The node that an old wire comes from, past nodes that only pass it on; None if nothing that is switched
        on."""
        origin = self.origin(wire)
        return None if origin is None else self.nodes[origin.node]

    def origin(self, wire: Wire | None) -> Wire | None:
        """The output at the beginning of an old wire, past nodes that only pass it on; None if nothing that is switched
        on."""
        seen: dict[tuple, None] = {}
        found = None
        while wire is not None and wire.key not in seen:
            if wire.key in self._origins:
                found = self._origins[wire.key]
                break
            seen[wire.key] = None
            node = self.nodes.get(wire.node)
            if node is None or node.raw.get("mode") == MUTED:
                break
            if node.kind in PASSING or node.raw.get("mode") == BYPASSED:
                wire = self.before(node, wire.slot)
            elif wire.key in self.passed:
                wire = self.passed[wire.key]
            else:
                found = wire
                break
        # Of all on the way, so that long ways are gone once.
        self._origins |= dict.fromkeys(seen, found)
        return found

    def before(self, node: Node, slot: int) -> Wire | None:
        """What a node that passes something on is given."""
        source: Node | None = node
        if node.kind == "GetNode":
            name = _first(node)
            source = self._named.get(name) if isinstance(name, str) else None
        if source is None:
            return None
        if source.raw.get("mode") != BYPASSED:
            return next(iter(source.wires.values()), None)
        wanted = _type(source.raw.get("outputs"), slot)
        return next(
            (
                wire
                for name, wire in source.wires.items()
                if wanted is not None and _type(source.raw.get("inputs"), name) == wanted
            ),
            None,
        )


def open_graph(data: dict) -> Graph:
    """The graph of a workflow that ``read_workflow`` read."""
    return (_Page if is_page(data) else _Api)(data)


class _Page(Graph):
    """A workflow as the page saves it."""

    def hidden(self) -> list[str]:
        inside = [node for _, _, graph in list(graphs(self.data))[1:] for node in _dicts(graph["nodes"])]
        extra = self.data.get("extra")
        groups = extra.get("groupNodes") if isinstance(extra, dict) else None
        for group in groups.values() if isinstance(groups, dict) else []:
            inside += _dicts(group.get("nodes")) if isinstance(group, dict) else []
        return [node["type"] for node in inside if isinstance(node.get("type"), str)]

    def _read(self) -> Iterator[Node]:
        self.links = dict(_page_links(self.data.get("links")))
        for raw in self.data["nodes"]:
            if _is_page_node(raw):
                wires = {_name(socket): self._wire(socket.get("link")) for socket in _dicts(raw.get("inputs"))}
                yield Node(
                    _id(raw["id"]),
                    raw["type"],
                    widget_values(raw),
                    {name: wire for name, wire in wires.items() if wire is not None},
                    raw,
                )

    def widgets(self, node: Node, order: Iterable[str]) -> dict:
        return widget_values(node.raw, tuple(order))

    def write(self, changes: Changes) -> dict:
        data = copy.deepcopy(self.data)
        nodes, places = [], _Places(self.data)
        for raw in data["nodes"]:
            id_ = _id(raw["id"]) if _is_page_node(raw) else None
            if id_ in changes.made:
                nodes.append(self._draw(changes.made[id_]))
            elif id_ not in changes.gone:
                nodes.append(raw)
        for node in changes.made.values():
            if node.id not in self.nodes:
                nodes.append(self._draw(node) | {"pos": places.beside(node.raw)})
        self._retype(nodes, changes)
        links = self._connect(nodes, changes)
        data["nodes"] = nodes
        given = self.data.get("links")
        as_objects = isinstance(given, dict) or (
            isinstance(given, list) and any(isinstance(link, dict) for link in given)
        )
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        data["links"] = (
            [self._old_link(link[0]) | dict(zip(names, link, strict=True)) for link in links] if as_objects else links
        )
        last_node = max(_numbers(node.get("id") for node in nodes if isinstance(node, dict)), default=0)
        _count(data, last_node, max([*self.links, *(link[0] for link in links)], default=0))
        _forget_links(data, {link[0] for link in links} & self.links.keys())
        return data

    def _wire(self, link) -> Wire | None:
        if type(link) is not int or link not in self.links:
            return None
        origin, slot, _ = self.links[link]
        return Wire(origin, slot, link)

    def _old_link(self, id_: int) -> dict:
        """What a link that was there says beside its ends."""
        link = self.links[id_][2] if id_ in self.links else None
        return link if isinstance(link, dict) else {}

    def _draw(self, node: Node) -> dict:
        """A new node as the page saves it: where and how the old one was, with the sockets and widgets of ours."""
        kind, raw = KINDS[node.kind], node.raw
        widgets = {entry.name: node.values[entry.name] for entry in kind.inputs if entry.default is not None}
        if AFTER_SEED in node.values:
            # The page has it right behind the seed.
            widgets = {"seed": widgets["seed"], AFTER_SEED: node.values[AFTER_SEED]} | widgets
        inputs = []
        for entry in kind.inputs:
            socket: dict[str, Any] = {"name": entry.name, "type": entry.type, "link": None}
            socket |= {"shape": 7} if entry.optional else {}
            inputs.append(socket | ({"widget": {"name": entry.name}} if entry.default is not None else {}))
        in_place = node.id in self.nodes
        # A name that the user gave the old node is no name for one beside it.
        names = ("pos", "size", "flags", "order", "mode", *(("title",) if in_place else ()), "color", "bgcolor")
        look = {name: copy.deepcopy(raw[name]) for name in names if name in raw}
        return {
            "id": self.nodes[node.id].raw["id"] if in_place else node.id,
            "type": node.kind,
            **look,
            "inputs": inputs,
            "outputs": [{"name": name, "type": type_, "links": []} for name, type_ in kind.outputs],
            "properties": {"Node name for S&R": node.kind},
            "widgets_values": list(widgets.values()),
            "widgets_values_named": widgets,
        }

    def _retype(self, nodes: list[dict], changes: Changes) -> None:
        """Give the nodes that only lead a link elsewhere the new types of what they lead."""
        for raw in nodes:
            if not _is_page_node(raw) or raw["type"] not in PASSING:
                continue
            now = changes.resolve(self.origin(self.before(self.nodes[_id(raw["id"])], 0)))
            if now is None or now.node not in changes.made:
                continue
            type_ = KINDS[changes.made[now.node].kind].outputs[now.slot][1]
            for socket in (*_dicts(raw.get("inputs")), *_dicts(raw.get("outputs"))):
                if socket.get("type") != "*":
                    socket |= {
                        "name": type_ if socket.get("name") == socket.get("type") else socket.get("name"),
                        "type": type_,
                    }

    def _connect(self, nodes: list[dict], changes: Changes) -> list[list]:
        """Join the nodes by links: those of old that lead where they led under their old numbers."""
        by_id = {_id(raw["id"]): raw for raw in nodes if _is_page_node(raw)}
        number, used, links = max(self.links, default=0), set(), []
        for id_, raw in by_id.items():
            node = changes.made.get(id_)
            for slot, socket in enumerate(_dicts(raw.get("inputs"))):
                wire = (
                    node.wires.get(socket["name"]) if node else changes.resolve(old := self._wire(socket.get("link")))
                )
                source = by_id.get(wire.node) if wire is not None else None
                why = None if node or old is None else "" if source else "what was connected is left out"
                type_ = _type(source.get("outputs"), wire.slot) if source and wire else None
                if why == "" and type_ in _OWN_TYPES and socket.get("type") not in (type_, "*"):
                    source, why = None, f"it takes a {short(socket.get('type'))}, and this pack has a {type_}"
                if why:
                    changes.say(self.nodes[id_], f"{short(_name(socket))} is not connected any more: {why}.")
                if source is None or wire is None:
                    if node or old is not None:
                        socket["link"] = None
                    continue
                if wire.link is None or wire.link in used:
                    number += 1
                    wire = wire._replace(link=number)
                used.add(wire.link)
                socket["link"] = wire.link
                links.append([wire.link, source["id"], wire.slot, raw["id"], slot, type_])
        leaving: dict[tuple, list[int]] = {}
        for link in links:
            leaving.setdefault((_id(link[1]), link[2]), []).append(link[0])
        for id_, raw in by_id.items():
            for slot, socket in enumerate(_dicts(raw.get("outputs"))):
                now = leaving.get((id_, slot), [])
                before = socket.get("links")
                if sorted(_numbers(before if isinstance(before, list) else [])) != sorted(now) or not isinstance(
                    before, list | None
                ):
                    socket["links"] = now
        return sorted(links, key=lambda link: link[0])

    def add_note(self, data: dict, title: str, text: str) -> None:
        lines = sum(1 + len(line) // 90 for line in text.split("\n"))
        size, id_ = [620, 60 + 16 * lines], self.new_id()
        note = {
            "id": id_,
            "type": "Note",
            "pos": _Places(data).above(size),
            "size": size,
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "title": title,
            "properties": {},
            "widgets_values": [text],
        }
        data["nodes"].append(note)
        _count(data, id_, None)


class _Api(Graph):
    """A workflow as the API takes it."""

    def _read(self) -> Iterator[Node]:
        for id_, raw in self.data.items():
            if isinstance(raw, dict) and isinstance(raw.get("class_type"), str):
                inputs = raw["inputs"] if isinstance(raw.get("inputs"), dict) else {}
                wires = {name: Wire(str(value[0]), value[1]) for name, value in inputs.items() if _is_api_link(value)}
                yield Node(
                    id_,
                    raw["class_type"],
                    {name: value for name, value in inputs.items() if name not in wires},
                    wires,
                    raw,
                )

    def new_id(self) -> str:
        return next(id_ for _ in itertools.count() if (id_ := str(super(_Api, self).new_id())) not in self.data)

    def write(self, changes: Changes) -> dict:
        data: dict[Any, Any] = {}
        for id_, raw in self.data.items():
            if id_ in changes.made:
                data[id_] = self._describe(changes.made[id_])
            elif id_ not in self.nodes:
                data[id_] = raw
            elif id_ not in changes.gone:
                data[id_] = self._rewire(self.nodes[id_], changes)
        return data | {id_: self._describe(node) for id_, node in changes.made.items() if id_ not in data}

    def _describe(self, node: Node) -> dict:
        values = {entry.name: node.values[entry.name] for entry in KINDS[node.kind].inputs if entry.default is not None}
        title = node.raw.get("_meta")
        return {
            "class_type": node.kind,
            "inputs": values | {name: [wire.node, wire.slot] for name, wire in node.wires.items()},
            **({"_meta": title} if title is not None and node.id in self.nodes else {}),
        }

    def _rewire(self, node: Node, changes: Changes) -> Mapping:
        if not node.wires:
            return node.raw
        inputs = dict(node.raw["inputs"])
        for name, wire in node.wires.items():
            now = changes.resolve(wire)
            type_ = (
                KINDS[changes.made[now.node].kind].outputs[now.slot][1]
                if now is not None and now.node in changes.made
                else ""
            )
            if now is None or type_ in _OWN_TYPES:
                changes.say(
                    node,
                    f"{name} is not connected any more: what was connected is left out, or nothing that this node "
                    "takes.",
                )
                del inputs[name]
            elif now.key != wire.key:
                inputs[name] = [now.node, now.slot]
        return {**node.raw, "inputs": inputs}


class _Places:
    """Where there is room on the page."""

    def __init__(self, graph: Mapping):
        boxes = [
            (*_pair(raw.get("pos")), *_pair(raw.get("size"), 200))
            for raw in _dicts(graph["nodes"])
            if raw.get("pos") is not None
        ]
        self.taken = sorted((box for box in boxes if max(map(abs, box)) < _FAR), key=_top)
        self.tallest = max((box[3] for box in self.taken), default=0)
        self.ends: dict[tuple, float] = {}
        bounds = [group.get("bounding") for group in _dicts(graph.get("groups"))]
        boxes = [
            (*_pair(bound), *_pair(bound[2:], 200)) for bound in bounds if isinstance(bound, list) and len(bound) == 4
        ]
        self.groups = [box for box in boxes if max(map(abs, box)) < _FAR]

    def beside(self, raw: Mapping) -> list[float]:
        """A free place for another node as large as ``raw``, under it."""
        (x, y), (width, height) = _pair(raw.get("pos")), _pair(raw.get("size"), 200)
        width, height = min(width, 2000), min(height, 2000)
        if max(abs(x), abs(y)) >= _FAR:
            x, y = 0, 0
        # Where many begin, the next one goes on where the last one ended.
        wanted = x, y, width, height
        y = self.ends.get(wanted, y)
        # From the top down: what is passed once does not come again. What ends above cannot begin lower than that.
        first = bisect_left(self.taken, y - self.tallest - 40, key=_top)
        for left, top, wide, high in itertools.islice(self.taken, first, None):
            if top >= y + height + 40:
                break
            if x < left + wide and left < x + width and y < top + high + 40 and top < y + height + 40:
                y = top + high + 40
        self.ends[wanted] = y
        self.tallest = max(self.tallest, height)
        insort(self.taken, (x, y, width, height), key=_top)
        return [x, y]

    def above(self, size: Sequence[float]) -> list[float]:
        """A place over everything, at the left."""
        everything = self.taken + self.groups
        return [
            min((box[0] for box in everything), default=0),
            min((box[1] for box in everything), default=0) - size[1] - 100,
        ]


def _top(box: tuple) -> float:
    return box[1]


def _id(value):
    """A node's number: some programs write it as a text in one place, and as a number in another."""
    return int(value) if isinstance(value, str) and value.isdecimal() and value.isascii() and len(value) < 16 else value


def _name(socket: Mapping) -> str:
    name = socket.get("name")
    return name if isinstance(name, str) else ""


def _is_page_node(raw) -> bool:
    return isinstance(raw, dict) and isinstance(raw.get("type"), str) and type(raw.get("id")) in (int, str)


def _is_api_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) in (int, str) and type(value[1]) is int


def _page_links(links) -> Iterator[tuple[int, tuple]]:
    """Number -> (node, slot, the link as it is) of every link, in either form that the page writes."""
    for link in links.values() if isinstance(links, dict) else links if isinstance(links, list) else []:
        if isinstance(link, dict):
            number, origin, slot = link.get("id"), link.get("origin_id"), link.get("origin_slot")
        else:
            number, origin, slot = link[:3] if isinstance(link, list) and len(link) >= 5 else (None,) * 3
        if type(number) is int and type(origin) in (int, str) and type(slot) is int:
            yield number, (_id(origin), slot, link)


def _count(data: dict, last_node: int, last_link: int | None) -> None:
    """Note the last numbers given, where the page looks for them: in ``state`` in newer files."""
    newer = isinstance(data.get("state"), dict)
    names = ("lastNodeId", "lastLinkId") if newer else ("last_node_id", "last_link_id")
    place = data["state"] if newer else data
    for name, number in zip(names, (last_node, last_link), strict=True):
        if number is not None:
            place[name] = max([number, *_numbers([place.get(name)])])


def _forget_links(data: dict, there: set[int]) -> None:
    """Have the page's bends in links name only links that are there."""
    extra = data["extra"] if isinstance(data.get("extra"), dict) else {}
    if isinstance(extra.get("linkExtensions"), list):
        extra["linkExtensions"] = [
            entry for entry in _dicts(extra["linkExtensions"]) if type(entry.get("id")) is int and entry["id"] in there
        ]
    for bend in (*_dicts(data.get("reroutes")), *_dicts(extra.get("reroutes"))):
        if isinstance(bend.get("linkIds"), list):
            bend["linkIds"] = [number for number in bend["linkIds"] if type(number) is int and number in there]


def _dicts(values) -> list[dict]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _numbers(values: Iterable) -> list[int]:
    return [value for value in values if type(value) is int]


def _first(node: Node):
    """The first widget of a node: of those that set and get a link, its name."""
    values = node.raw.get("widgets_values")
    values = list(values.values()) if isinstance(values, dict) else values
    return values[0] if isinstance(values, list) and values else None


def _type(sockets, which: int | str):
    """The type of a socket, by its number or name."""
    sockets = _dicts(sockets)
    found = (
        sockets[which : which + 1]
        if isinstance(which, int)
        else [socket for socket in sockets if socket.get("name") == which]
    )
    return found[0].get("type") if found else None


def _pair(value, default: float = 0) -> tuple[float, float]:
    """Two numbers of the page's, which writes them as a list or as an object with the keys 0 and 1."""
    pair = [value.get("0"), value.get("1")] if isinstance(value, dict) else value[:2] if isinstance(value, list) else []
    # Numbers of hundreds of digits cannot be added to others.
    numbers = [
        max(-1e18, min(number, 1e18))
        for number in pair
        if type(number) is int or (type(number) is float and math.isfinite(number))
    ]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (default, default)
