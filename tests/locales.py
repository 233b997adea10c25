"""The English words of the nodes as ComfyUI's page reads them: ``python -m tests.locales`` writes them into locales/en.

The format of ``nodeDefs.json`` is the page's own: by node id a ``display_name``, a ``description``, ``inputs`` by name
and ``outputs`` by index, each with ``name`` and ``tooltip``. Without the file the page shows what the classes declare,
which is the same; translators start from it.
"""

import json

from tests.conftest import ROOT, load_pack

LOCALES = ROOT / "locales"


def declared(node_classes: dict, display_names: dict) -> dict:
    """Collect what the node classes declare, in the form of ``nodeDefs.json``."""
    return {
        node_id: {
            "display_name": display_names[node_id],
            "description": node.DESCRIPTION,
            "inputs": {
                name: {"name": name, "tooltip": options["tooltip"]} for name, (_, options) in inputs(node).items()
            },
            "outputs": {
                str(index): {"name": name, "tooltip": tooltip}
                for index, (name, tooltip) in enumerate(zip(node.RETURN_NAMES, node.OUTPUT_TOOLTIPS, strict=True))
            },
        }
        for node_id, node in node_classes.items()
    }


def inputs(node) -> dict:
    """List a node class's inputs, required and optional, by name."""
    types = node.INPUT_TYPES()
    return types["required"] | types.get("optional", {})


def read(locale: str) -> dict:
    return json.loads((LOCALES / locale / "nodeDefs.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    pack = load_pack()
    text = json.dumps(declared(pack.NODE_CLASS_MAPPINGS, pack.NODE_DISPLAY_NAME_MAPPINGS), indent=2, ensure_ascii=False)
    (LOCALES / "en" / "nodeDefs.json").write_text(text + "\n", encoding="utf-8")
