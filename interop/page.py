"""A workflow as ComfyUI's page saves it: nodes in their places, sockets and numbered links.

Formats: ComfyUI_frontend, src/platform/workflow/validation/schemas/workflowSchema.ts (version 0.4, links as lists;
version 1, links as objects).
"""

import copy
import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from cogvideox.words import short

from .graph import OWN_TYPES, PASSING, Changes, Graph, Node, Wire, dicts, numbers, socket_type
from .kinds import KINDS
from .tables import AFTER_SEED
from .workflow import graphs, widget_values

#: Pixels from the page's middle beyond which nobody sees a node: what lies there does not say where a new one goes.
_FAR = 1e7


class Page(Graph):
    """A workflow as the page saves it."""

    def hidden(self) -> list[str]:
        parts = {id_: graph for id_, _, graph in graphs(self.data) if id_ is not None}
        extra = self.data.get("extra")
        groups = extra.get("groupNodes") if isinstance(extra, dict) else None
        for name, group in groups.items() if isinstance(groups, dict) else ():
            if isinstance(group, dict):
                parts |= {f"workflow{sign}{name}": group for sign in "/>"}
        # Those in use: files keep what nodes stood for that are unpacked since.
        found: list[str] = []
        todo: list[Mapping] = [self.data]
        for part in todo:
            types = [node["type"] for node in dicts(part.get("nodes")) if isinstance(node.get("type"), str)]
            found += [] if part is self.data else types
            todo += [parts.pop(type_) for type_ in types if type_ in parts]
        return found

    def _read(self) -> Iterator[Node]:
        self.links = dict(_page_links(self.data.get("links")))
        self.broadcast = self._broadcast()
        self.numbered = {_id(raw["id"]) for raw in dicts(self.data["nodes"]) if type(raw.get("id")) in (int, str)}
        for raw in self.data["nodes"]:
            if _is_page_node(raw):
                wires = {
                    _name(socket): self._wire(socket.get("link")) or self.broadcast.get((_id(raw["id"]), slot))
                    for slot, socket in enumerate(dicts(raw.get("inputs")))
                }
                yield Node(
                    _id(raw["id"]),
                    raw["type"],
                    widget_values(raw),
                    {name: wire for name, wire in wires.items() if wire is not None},
                    raw,
                )

    def widgets(self, node: Node, order: Iterable[str]) -> dict:
        return widget_values(node.raw, tuple(order))

    def new_id(self):
        # What is no node by its type is kept with its number too.
        return next(id_ for _ in itertools.count() if (id_ := super(Page, self).new_id()) not in self.numbered)

    def write(self, changes: Changes) -> dict:
        data = copy.deepcopy(self.data)
        nodes = []
        places = _Places(self.data, {id_: _height(node) for id_, node in changes.made.items()})
        for raw in data["nodes"]:
            id_ = _id(raw["id"]) if _is_page_node(raw) else None
            if id_ in changes.made:
                nodes.append(self._draw(changes.made[id_]))
            elif id_ not in changes.gone:
                nodes.append(raw)
        for node in changes.made.values():
            if node.id not in self.nodes:
                nodes.append(self._draw(node) | {"pos": places.beside(node.raw, _height(node))})
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
        last_node = max(numbers(node.get("id") for node in nodes if isinstance(node, dict)), default=0)
        _count(data, last_node, max([*self.links, *(link[0] for link in links)], default=0))
        _forget_links(data, {link[0] for link in links} & self.links.keys())
        return data

    def _broadcast(self) -> dict[tuple, Wire]:
        """(Node, number of its input) -> what cg-use-everywhere gives it without a link, as it noted that in the file
        (``ue_links`` in its use_everywhere_graph_analysis.js)."""
        extra = self.data.get("extra")
        found = {}
        for link in dicts(extra.get("ue_links")) if isinstance(extra, dict) else ():
            origin, slot, target, entry = (
                link.get(name) for name in ("upstream", "upstream_slot", "downstream", "downstream_slot")
            )
            if type(slot) is int and type(entry) is int and {type(origin), type(target)} <= {int, str}:
                found[_id(target), entry] = Wire(_id(origin), slot)
        return found

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
            # What was broadcast to the old node has a link now, and nothing more is to arrive.
            "properties": {"Node name for S&R": node.kind, **({"rejects_ue_links": True} if self.broadcast else {})},
            "widgets_values": list(widgets.values()),
            "widgets_values_named": widgets,
        }

    def _retype(self, nodes: list[dict], changes: Changes) -> None:
        """Give the nodes that only lead a link elsewhere the new types of what they lead."""
        for raw in nodes:
            if not _is_page_node(raw) or raw["type"] not in PASSING:
                continue
            node = self.nodes[_id(raw["id"])]
            # Where nothing comes over it now, what will once it is switched on.
            now = changes.resolve(self.origin(self.before(node, 0)) or self.beginning(node))
            if now is None or now.node not in changes.made:
                continue
            type_ = KINDS[changes.made[now.node].kind].outputs[now.slot][1]
            for socket in (*dicts(raw.get("inputs")), *dicts(raw.get("outputs"))):
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
            for slot, socket in enumerate(dicts(raw.get("inputs"))):
                wire = (
                    node.wires.get(socket["name"]) if node else changes.resolve(old := self._wire(socket.get("link")))
                )
                source = by_id.get(wire.node) if wire is not None else None
                why = None if node or old is None else "" if source else "what was connected is left out"
                type_ = socket_type(source.get("outputs"), wire.slot) if source and wire else None
                if (
                    why == ""
                    and type_ in OWN_TYPES
                    and not {type_, "*"}.intersection(str(socket.get("type")).split(","))
                ):
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
            for slot, socket in enumerate(dicts(raw.get("outputs"))):
                now = leaving.get((id_, slot), [])
                before = socket.get("links")
                if sorted(numbers(before if isinstance(before, list) else [])) != sorted(now) or not isinstance(
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
            "pos": _Places(data, {}).above(size),
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


class _Places:
    """Where there is room on the page.

    Args:
        heights: what nodes by their ids will need at least, in pixels: those in the place of others are drawn as tall
            as these were, and the page makes them taller.
    """

    def __init__(self, graph: Mapping, heights: Mapping):
        boxes = []
        for raw in dicts(graph["nodes"]):
            if raw.get("pos") is not None:
                width, height = _pair(raw.get("size"), 200)
                least = heights.get(_id(raw["id"]), 0) if _is_page_node(raw) else 0
                boxes.append((*_pair(raw["pos"]), width, max(height, least)))
        self.taken = sorted((box for box in boxes if max(map(abs, box)) < _FAR), key=_top)
        self.tallest = max((box[3] for box in self.taken), default=0)
        self.ends: dict[tuple, float] = {}
        bounds = [group.get("bounding") for group in dicts(graph.get("groups"))]
        boxes = [
            (*_pair(bound), *_pair(bound[2:], 200)) for bound in bounds if isinstance(bound, list) and len(bound) == 4
        ]
        self.groups = [box for box in boxes if max(map(abs, box)) < _FAR]

    def beside(self, raw: Mapping, least: float) -> list[float]:
        """A free place for another node as large as ``raw``, and ``least`` pixels tall or more, under it."""
        (x, y), (width, height) = _pair(raw.get("pos")), _pair(raw.get("size"), 200)
        width, height = min(width, 2000), min(max(height, least), 2000)
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


def _height(node: Node) -> float:
    """How tall the page draws a new node at least, in pixels: a row a socket and a row a widget."""
    kind = KINDS[node.kind]
    sockets = max(len(kind.inputs) - len(kind.widgets), len(kind.outputs))
    return 20 * sockets + 24 * (len(kind.widgets) + (AFTER_SEED in node.values)) + 20


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
            place[name] = max([number, *numbers([place.get(name)])])


def _forget_links(data: dict, there: set[int]) -> None:
    """Have the page's bends in links name only links that are there."""
    extra = data["extra"] if isinstance(data.get("extra"), dict) else {}
    if isinstance(extra.get("linkExtensions"), list):
        extra["linkExtensions"] = [
            entry for entry in dicts(extra["linkExtensions"]) if type(entry.get("id")) is int and entry["id"] in there
        ]
    for bend in (*dicts(data.get("reroutes")), *dicts(extra.get("reroutes"))):
        if isinstance(bend.get("linkIds"), list):
            bend["linkIds"] = [number for number in bend["linkIds"] if type(number) is int and number in there]


def _pair(value, default: float = 0) -> tuple[float, float]:
    """Two numbers of the page's, which writes them as a list or as an object with the keys 0 and 1."""
    pair = [value.get("0"), value.get("1")] if isinstance(value, dict) else value[:2] if isinstance(value, list) else []
    # Numbers of hundreds of digits cannot be added to others.
    good = [
        max(-1e18, min(number, 1e18))
        for number in pair
        if type(number) is int or (type(number) is float and math.isfinite(number))
    ]
    return (good[0], good[1]) if len(good) == 2 else (default, default)
