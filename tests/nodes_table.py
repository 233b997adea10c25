"""The description of the pack's nodes that ``interop`` reads: ``python -m tests.nodes_table`` writes it from the node
classes into interop/our_nodes.json.

By node id: the inputs in their order, each with its name and type, of a widget the default, the options of a list and
the limits of a number, and whether it is optional; and the outputs, each with name and type. ``interop`` works without
torch and so cannot ask the classes.
"""

import json

from tests.conftest import ROOT, load_pack

FILE = ROOT / "interop" / "our_nodes.json"
#: Lists that depend on the files and packages of a computer -> what is chosen in them everywhere.
_OF_THE_COMPUTER = {
    **{"model": "", "lora_name": "", "text_encoder_name": "auto", "vae_name": "auto", "attention": "auto"},
    "device": "none",
}
#: Widgets by type -> the default where a class says none.
_WIDGETS = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}


def text(node_classes: dict) -> str:
    """Return the file's content: JSON with a line for each input and output."""
    nodes = []
    for node_id, node in node_classes.items():
        inputs = [
            _described(name, entry[0], entry[1] if len(entry) > 1 else {}, group == "optional")
            for group in ("required", "optional")
            for name, entry in node.INPUT_TYPES().get(group, {}).items()
        ]
        outputs = zip(node.RETURN_NAMES, node.RETURN_TYPES, strict=True)
        parts = {"inputs": inputs, "outputs": [{"name": name, "type": type_} for name, type_ in outputs]}
        listed = ",\n".join(f'  "{part}": [\n{_lines(entries)}\n  ]' for part, entries in parts.items())
        nodes.append(f' "{node_id}": {{\n{listed}\n }}')
    return "{\n" + ",\n".join(nodes) + "\n}\n"


def _lines(entries: list[dict]) -> str:
    return ",\n".join(f"   {json.dumps(entry)}" for entry in entries)


def _described(name: str, type_: str | list, options: dict, optional: bool) -> dict:
    found: dict = {"name": name, "type": "COMBO" if isinstance(type_, list) else type_}
    if isinstance(type_, list):
        here = name in _OF_THE_COMPUTER
        found["default"] = options.get("default", _OF_THE_COMPUTER[name] if here else type_[0])
        found |= {} if here else {"options": type_}
    elif type_ in _WIDGETS:
        found["default"] = options.get("default", _WIDGETS[type_])
        found |= {limit: options[limit] for limit in ("min", "max") if limit in options}
    return found | ({"optional": True} if optional else {})


if __name__ == "__main__":
    FILE.write_text(text(load_pack().NODE_CLASS_MAPPINGS), encoding="utf-8")
