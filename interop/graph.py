"""The graph in a workflow's file, as nodes and wires that know neither the page's format (``page``) nor the API's
(``api``)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cogvideox.words import short

from .workflow import BYPASSED, MUTED

#: Nodes that give a link a name -> those that take it up by that name: ComfyUI-KJNodes', ComfyUI-Easy-Use's.
_NAMES = {"SetNode": "GetNode", "easy setNode": "easy getNode"}
#: It leads on the first of its links that brings something.
_SWITCH = "Any Switch (rgthree)"
#: Nodes that only lead a link elsewhere: the page's, and those of rgthree, ComfyUI-mxToolkit and
#: ComfyUI-Custom-Scripts.
PASSING = (
    *_NAMES,
    *_NAMES.values(),
    *("Reroute", "Reroute (rgthree)", "mxReroute", "ReroutePrimitive|pysssss", _SWITCH),
)
#: Types of which this pack has its own, and which no other node takes.
OWN_TYPES = ("COGVIDEOX_MODEL", "COGVIDEOX_VAE")


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
        # What was found out, by the output or node that it was asked of.
        self._origins: dict[tuple, Wire | None] = {}
        self._beginnings: dict[object, Wire | None] = {}
        self._bringing: dict[tuple, bool] = {}
        self._last = max(numbers(self.nodes), default=0)
        self._named = {
            (_NAMES[node.kind], name): node
            for node in reversed(self.nodes.values())
            if node.kind in _NAMES and isinstance(name := _first(node), str)
        }

    def _read(self) -> Iterator[Node]:
        raise NotImplementedError

    def hidden(self) -> list[str]:
        """The types of nodes that lie in subgraphs and group nodes that are in use, and not in ``nodes``."""
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
        if node.kind in _NAMES.values() or node.raw.get("mode") != BYPASSED:
            return next((wire for wire in self.led(node) if node.kind != _SWITCH or self._brings(wire)), None)
        # As the page chooses it (ExecutableNodeDTO._getBypassSlotIndex): the input beside the output, else the first.
        wanted, sockets = socket_type(node.raw.get("outputs"), slot), dicts(node.raw.get("inputs"))
        if wanted is None:
            return None
        exact = [socket for socket in sockets if socket.get("type") == wanted]
        fitting = [socket for socket in sockets if "*" in (wanted, socket.get("type"))]
        beside = [socket for socket in sockets[slot : slot + 1] if socket in exact or socket in fitting]
        chosen = next(iter([*beside, *exact, *fitting]), {}).get("name")
        return node.wires.get(chosen) if isinstance(chosen, str) else None

    def beginning(self, node: Node) -> Wire | None:
        """The output at the beginning of what a node that only leads links elsewhere leads, switched on or off."""
        seen: dict[object, None] = {}
        found, on = None, node
        while on.id not in seen and on.id not in self._beginnings:
            seen[on.id] = None
            wire = next(iter(self.led(on)), None)
            if wire is None or wire.node not in self.nodes:
                break
            on = self.nodes[wire.node]
            if on.kind not in PASSING:
                found = wire
                break
        self._beginnings |= dict.fromkeys(seen, self._beginnings.get(on.id, found))
        return self._beginnings[node.id]

    def led(self, node: Node) -> list[Wire]:
        """What a node that only leads links elsewhere may lead, switched on or off."""
        if node.kind in _NAMES.values():
            name = _first(node)
            named = self._named.get((node.kind, name)) if isinstance(name, str) else None
            return list(named.wires.values())[:1] if named else []
        return list(node.wires.values())

    def _brings(self, wire: Wire) -> bool:
        """Whether something may come over a wire: no node on its way is muted, or bypassed with nothing to pass on."""
        todo, after = [wire], {wire.key: wire.key}
        while todo:
            on = todo.pop()
            key, known, node = on.key, self._bringing.get(on.key), self.nodes.get(on.node)
            if known is False or node is None or node.raw.get("mode") == MUTED:
                continue
            is_bypassed = node.raw.get("mode") == BYPASSED
            if known or (node.kind not in PASSING and not is_bypassed):
                self._bringing[key] = True
                while not self._bringing.get(key := after[key]):
                    self._bringing[key] = True
                return True
            is_switch = node.kind == _SWITCH and not is_bypassed
            for each in self.led(node) if is_switch else [self.before(node, on.slot)]:
                if each is not None and each.key not in after:
                    after[each.key] = key
                    todo.append(each)
        self._bringing |= dict.fromkeys(after, False)
        return False


def dicts(values) -> list[dict]:
    """List the objects of a list that may hold anything, or be none."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def numbers(values: Iterable) -> list[int]:
    """List the whole numbers among values that may be anything."""
    return [value for value in values if type(value) is int]


def _first(node: Node):
    """The first widget of a node: of those that set and get a link, its name."""
    values = node.raw.get("widgets_values")
    values = list(values.values()) if isinstance(values, dict) else values
    return values[0] if isinstance(values, list) and values else None


def socket_type(sockets, which: int | str):
    """The type of a socket, by its number or name."""
    sockets = dicts(sockets)
    found = (
        sockets[which : which + 1]
        if isinstance(which, int)
        else [socket for socket in sockets if socket.get("name") == which]
    )
    return found[0].get("type") if found else None
