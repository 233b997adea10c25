"""The graph in a workflow's file, as nodes and wires that know neither the page's format nor the API's, and back into the file.

Formats: ComfyUI_frontend, src/platform/workflow/validation/schemas/workflowSchema.ts (version 0.4, links as lists; version 1, links as objects).
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from .kinds import KINDS
from .workflow import BYPASSED, MUTED, graphs, is_page, widget_values

#: Nodes of the page that only lead a link elsewhere.
PASSING = ("Reroute", "SetNode", "GetNode")
AFTER_SEED = "control_after_generate"
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
        return f'node {self.id} "{self.kind}"'


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
        passed: outputs that only pass on what a wire brings to their node, besides those of the page's own nodes for that.
    """

    def __init__(self, data: dict):
        self.data = data
        self.passed: dict[tuple, Wire | None] = {}
        self.nodes: dict[object, Node] = {node.id: node for node in self._read()}

    def _read(self) -> Iterator[Node]:
        raise NotImplementedError

    def hidden(self) -> list[str]:
        """The types of nodes that lie in subgraphs and group nodes, and not in ``nodes``."""
        return []

    def widgets(self, node: Node, order: Iterable[str]) -> dict:
        """The widgets by name of a node whose widgets' order is ``order``."""
        return node.values

    def new_id(self, taken: Iterable):
        """An id that no node has, nor is in ``taken``."""
        raise NotImplementedError

    def write(self, changes: Changes) -> dict:
        """The workflow as it is after the changes; ``data`` stays as it was."""
        raise NotImplementedError

    def add_note(self, data: dict, title: str, text: str) -> None:
        """Lay a note into what ``write`` gave, where the format has notes."""

    def trace(self, wire: Wire | None) -> Node | None:
        """The node that an old wire comes from, past nodes that only pass it on; None if nothing that is switched on."""
        origin = self.origin(wire)
        return None if origin is None else self.nodes[origin.node]

    def origin(self, wire: Wire | None) -> Wire | None:
        """The output at the beginning of an old wire, past nodes that only pass it on; None if nothing that is switched on."""
        seen = set()
        while wire is not None and wire.key not in seen:
            seen.add(wire.key)
            node = self.nodes.get(wire.node)
            if node is None or node.raw.get("mode") == MUTED:
                return None
            if node.kind in PASSING or node.raw.get("mode") == BYPASSED:
                wire = self.before(node, wire.slot)
            elif wire.key in self.passed:
                wire = self.passed[wire.key]
            else:
                return wire
        return None

    def before(self, node: Node, slot: int) -> Wire | None:
        """What a node that passes something on is given."""
        if node.kind == "GetNode":
            name = _first(node.raw.get("widgets_values"))
            node = next((other for other in self.nodes.values() if other.kind == "SetNode" and _first(other.raw.get("widgets_values")) == name), None)
        if node is None or node.raw.get("mode") != BYPASSED:
            return next(iter(node.wires.values()), None) if node is not None else None
        wanted = _type(node.raw.get("outputs"), slot)
        return next((wire for name, wire in node.wires.items() if _type(node.raw.get("inputs"), name) == wanted), None)


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
                wires = {socket.get("name"): self._wire(socket.get("link")) for socket in _dicts(raw.get("inputs"))}
                yield Node(raw["id"], raw["type"], widget_values(raw), {name: wire for name, wire in wires.items() if wire is not None}, raw)

    def widgets(self, node: Node, order: Iterable[str]) -> dict:
        return widget_values(node.raw, tuple(order))

    def new_id(self, taken: Iterable) -> int:
        return max(_numbers((*self.nodes, *taken)), default=0) + 1

    def write(self, changes: Changes) -> dict:
        data = copy.deepcopy(self.data)
        nodes, places = [], _Places(self.data)
        for raw in data["nodes"]:
            id_ = raw["id"] if _is_page_node(raw) else None
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
        as_objects = any(isinstance(link, dict) for link in self.data.get("links") or [])
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        data["links"] = [self._old_link(link[0]) | dict(zip(names, link, strict=True)) for link in links] if as_objects else links
        last_node = max(_numbers(node.get("id") for node in nodes if isinstance(node, dict)), default=0)
        _count(data, last_node, max([*self.links, *(link[0] for link in links)], default=0))
        _forget_links(data, {link[0] for link in links} & self.links.keys())
        return data

    def _wire(self, link) -> Wire | None:
        return Wire(*self.links[link][:2], link) if isinstance(link, int) and link in self.links else None

    def _old_link(self, id_: int) -> dict:
        return self.links[id_][2] if id_ in self.links else {}

    def _draw(self, node: Node) -> dict:
        """A new node as the page saves it: where and how the old one was, with the sockets and widgets of ours."""
        kind, raw = KINDS[node.kind], node.raw
        widgets = {entry.name: node.values[entry.name] for entry in kind.inputs if entry.default is not None}
        if AFTER_SEED in node.values:
            # The page has it right behind the seed.
            widgets = {"seed": widgets["seed"], AFTER_SEED: node.values[AFTER_SEED]} | widgets
        inputs = []
        for entry in kind.inputs:
            socket = {"name": entry.name, "type": entry.type, "link": None}
            socket |= {"shape": 7} if entry.optional else {}
            inputs.append(socket | ({"widget": {"name": entry.name}} if entry.default is not None else {}))
        look = {name: copy.deepcopy(raw[name]) for name in ("pos", "size", "flags", "order", "mode", "title", "color", "bgcolor") if name in raw}
        return {
            "id": node.id,
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
            now = changes.resolve(self.origin(self.before(self.nodes[raw["id"]], 0)))
            if now is None or now.node not in changes.made:
                continue
            type_ = KINDS[changes.made[now.node].kind].outputs[now.slot][1]
            for socket in (*_dicts(raw.get("inputs")), *_dicts(raw.get("outputs"))):
                if socket.get("type") != "*":
                    socket |= {"name": type_ if socket.get("name") == socket.get("type") else socket.get("name"), "type": type_}

    def _connect(self, nodes: list[dict], changes: Changes) -> list[list]:
        """Join the nodes by links: those of old that lead where they led under their old numbers."""
        by_id = {raw["id"]: raw for raw in nodes if _is_page_node(raw)}
        number, used, links = max(self.links, default=0), set(), []
        for id_, raw in by_id.items():
            node = changes.made.get(id_)
            for slot, socket in enumerate(_dicts(raw.get("inputs"))):
                wire = node.wires.get(socket["name"]) if node else changes.resolve(old := self._wire(socket.get("link")))
                source = by_id.get(wire.node) if wire is not None else None
                why = None if node or old is None else "" if source else "what was connected is left out"
                type_ = _type(source.get("outputs"), wire.slot) if source else None
                if why == "" and type_ in _OWN_TYPES and socket.get("type") not in (type_, "*"):
                    source, why = None, f"it takes a {socket.get('type')}, and this pack has a {type_}"
                if why:
                    changes.say(self.nodes[id_], f"{socket.get('name')} is not connected any more: {why}.")
                if source is None:
                    if node or old is not None:
                        socket["link"] = None
                    continue
                if wire.link is None or wire.link in used:
                    number += 1
                    wire = wire._replace(link=number)
                used.add(wire.link)
                socket["link"] = wire.link
                links.append([wire.link, wire.node, wire.slot, id_, slot, type_])
        for id_, raw in by_id.items():
            for slot, socket in enumerate(_dicts(raw.get("outputs"))):
                now = [link[0] for link in links if link[1] == id_ and link[2] == slot]
                if sorted(_numbers(socket.get("links") or [])) != sorted(now):
                    socket["links"] = now
        return sorted(links)

    def add_note(self, data: dict, title: str, text: str) -> None:
        lines = sum(1 + len(line) // 90 for line in text.split("\n"))
        size, id_ = [620, 60 + 16 * lines], self.new_id(_numbers(node.get("id") for node in data["nodes"] if isinstance(node, dict)))
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
                yield Node(id_, raw["class_type"], {name: value for name, value in inputs.items() if name not in wires}, wires, raw)

    def new_id(self, taken: Iterable) -> str:
        used = {*self.nodes, *taken}
        return next(id_ for number in itertools.count(1) if (id_ := str(number)) not in used)

    def write(self, changes: Changes) -> dict:
        data = {}
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

    def _rewire(self, node: Node, changes: Changes) -> dict:
        inputs = dict(node.raw["inputs"]) if node.wires else None
        for name, wire in node.wires.items():
            now = changes.resolve(wire)
            type_ = KINDS[changes.made[now.node].kind].outputs[now.slot][1] if now is not None and now.node in changes.made else ""
            if now is None or type_ in _OWN_TYPES:
                changes.say(node, f"{name} is not connected any more: what was connected is left out, or nothing that this node takes.")
                del inputs[name]
            elif now.key != wire.key:
                inputs[name] = [now.node, now.slot]
        return node.raw if inputs is None else {**node.raw, "inputs": inputs}


class _Places:
    """Where there is room on the page."""

    def __init__(self, graph: Mapping):
        self.taken = [
            (*_pair(raw.get("pos")), *_pair(raw.get("size"), 200)) for raw in graph["nodes"] if isinstance(raw, dict) and raw.get("pos") is not None
        ]
        bounds = [group.get("bounding") for group in _dicts(graph.get("groups"))]
        self.groups = [(*_pair(bound), *_pair(bound[2:], 200)) for bound in bounds if isinstance(bound, list) and len(bound) == 4]

    def beside(self, raw: Mapping) -> list[float]:
        """A free place for another node as large as ``raw``, under it."""
        (x, y), (width, height) = _pair(raw.get("pos")), _pair(raw.get("size"), 200)
        while any(x < left + wide and left < x + width and y < top + high + 40 and top < y + height + 40 for left, top, wide, high in self.taken):
            y += 40
        self.taken.append((x, y, width, height))
        return [x, y]

    def above(self, size: list[float]) -> list[float]:
        """A place over everything, at the left."""
        everything = self.taken + self.groups
        return [min((box[0] for box in everything), default=0), min((box[1] for box in everything), default=0) - size[1] - 100]


def _is_page_node(raw) -> bool:
    return isinstance(raw, dict) and isinstance(raw.get("type"), str) and isinstance(raw.get("id"), int | str)


def _is_api_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], int | str) and type(value[1]) is int


def _page_links(links) -> Iterator[tuple[int, tuple]]:
    """Number -> (node, slot, the link as it is) of every link, in either form that the page writes."""
    for link in links if isinstance(links, list) else []:
        if isinstance(link, dict):
            fields = (link.get("id"), link.get("origin_id"), link.get("origin_slot"))
        else:
            fields = tuple(link[:3]) if isinstance(link, list) and len(link) >= 5 else (None,) * 3
        if type(fields[0]) is int and isinstance(fields[1], int | str) and type(fields[2]) is int:
            yield fields[0], (*fields[1:], link)


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
        extra["linkExtensions"] = [entry for entry in extra["linkExtensions"] if isinstance(entry, dict) and entry.get("id") in there]
    for bend in (*_dicts(data.get("reroutes")), *_dicts(extra.get("reroutes"))):
        if isinstance(bend.get("linkIds"), list):
            bend["linkIds"] = [number for number in bend["linkIds"] if number in there]


def _dicts(values) -> list[dict]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _numbers(values: Iterable) -> list[int]:
    return [value for value in values if isinstance(value, int)]


def _first(values):
    return values[0] if isinstance(values, list) and values else None


def _type(sockets, which: int | str):
    """The type of a socket, by its number or name."""
    sockets = _dicts(sockets)
    found = sockets[which : which + 1] if isinstance(which, int) else [socket for socket in sockets if socket.get("name") == which]
    return found[0].get("type") if found else None


def _pair(value, default: float = 0) -> tuple[float, float]:
    """Two numbers of the page's, which writes them as a list or as an object with the keys 0 and 1."""
    pair = [value.get("0"), value.get("1")] if isinstance(value, dict) else value[:2] if isinstance(value, list) else []
    return tuple(pair) if len(pair) == 2 and all(isinstance(number, int | float) for number in pair) else (default, default)
