"""A workflow as ComfyUI's API takes it: ``{id: {class_type, inputs}}``."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from .graph import OWN_TYPES, Changes, Graph, Node, Wire
from .kinds import KINDS


class Api(Graph):
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
        return next(id_ for _ in itertools.count() if (id_ := str(super(Api, self).new_id())) not in self.data)

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
            if now is None or type_ in OWN_TYPES:
                changes.say(
                    node,
                    f"{name} is not connected any more: what was connected is left out, or nothing that this node "
                    "takes.",
                )
                del inputs[name]
            elif now.key != wire.key:
                inputs[name] = [now.node, now.slot]
        return {**node.raw, "inputs": inputs}


def _is_api_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) in (int, str) and type(value[1]) is int
