"""5. Workflows: check and migrate. Oracle: what is written is JSON that is read again, keeps every node of others, and
whose links join nodes that are there."""

import copy
import json

from mutate import dump, mutate_bytes, mutate_text, mutate_tree, odd, put, replace_by

NAME = "workflow"


def prepare(base):
    from core import PROJECT

    from tests import fun_workflows
    from tests import wrapper_workflows as w

    drawn = {name: getattr(w, name)() for name in ("text_to_video", "image_to_video", "video_to_video", "inpaint")}
    drawn |= {f"{use}-{day}": w.piped(use, day) for use in ("text", "image", "video") for day in w.PIPED}
    drawn |= {f"videox-fun-{use}": draw() for use, draw in fun_workflows.USES.items()}
    seeds = {}
    for name, workflow in drawn.items():
        for age in ("old", "named", "new"):
            try:
                seeds[f"{name}-{age}"] = workflow.page(age)
            except Exception:
                seeds[f"{name}-page"] = workflow.page()
        seeds[f"{name}-api"] = workflow.api()
    for path in [*(PROJECT / "example_workflows").rglob("*.json"), *(PROJECT / "subgraphs").rglob("*.json")]:
        seeds[f"ours-{path.parent.name}-{path.stem}"] = json.loads(path.read_text(encoding="utf-8"))
    return {"seeds": seeds, "base": base}


def _structural(rng, graph, said):
    """Changes that only a graph knows: cycles, links to nowhere, ids of odd kinds, subgraphs in themselves."""
    is_page = isinstance(graph.get("nodes"), list)
    kind = rng.choice(
        (
            "cycle",
            "to itself",
            "nowhere",
            "slot",
            "ids",
            "same ids",
            "no widgets",
            "widgets",
            "subgraph",
            "groups",
            "no links",
            "links",
            "mode",
            "types",
            "properties",
            "reroutes",
            "set get",
            "wrap",
            "extra",
            "pos",
            "deep wrap",
        )
    )
    if rng.random() < 0.01:
        kind = "many"
    said.append(kind)
    if kind == "wrap":
        return {rng.choice(("prompt", "workflow")): graph}
    if kind == "deep wrap":
        for _ in range(rng.choice((5, 400))):
            graph = {rng.choice(("prompt", "workflow")): graph}
        return graph
    if not is_page:
        ids = list(graph)
        for _ in range(rng.choice((1, 2, 5))):
            node = graph[rng.choice(ids)]
            if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):
                continue
            inputs = node["inputs"]
            links = [key for key, value in inputs.items() if isinstance(value, list)]
            value = rng.choice(
                (
                    [rng.choice(ids), 0],
                    ["nowhere", 0],
                    [ids[0], -1],
                    [ids[0], 2**64],
                    [None, 0],
                    [ids[0]],
                    [ids[0], "0"],
                    [[ids[0], 0], 0],
                    [ids[0], 0.0],
                    [1, True],
                    [{}, 0],
                    [True, 0],
                )
            )
            inputs[rng.choice(links or ["model"])] = value
            if rng.random() < 0.3:
                inputs[rng.choice(list(inputs))] = odd(rng)
        if kind == "ids":
            graph[rng.choice(("", "-1", "é", "0" * 5000, "a:b", "__proto__"))] = graph.pop(rng.choice(ids))
        if kind == "types":
            graph[rng.choice(list(graph))]["class_type"] = rng.choice(
                (
                    "CogVideoSampler",
                    "CogVideoX15ModelLoader",
                    "",
                    None,
                    3,
                    [],
                    "Reroute",
                    "SetNode",
                    "GetNode",
                    "CogVideoXModelLoader",
                )
            )
        return graph
    nodes, links = graph["nodes"], graph.get("links")
    dicts = [node for node in nodes if isinstance(node, dict)]
    node, other = rng.choice(dicts), rng.choice(dicts)
    as_dict = bool(links) and isinstance(links[0], dict)

    def set_link(link, **fields):
        if as_dict:
            link |= fields
        else:
            for name, value in fields.items():
                link[("id", "origin_id", "origin_slot", "target_id", "target_slot").index(name)] = value

    if kind in ("cycle", "to itself", "nowhere", "slot") and links:
        for _ in range(rng.choice((1, 3, len(links)))):
            link = rng.choice(links)
            if kind == "cycle":
                set_link(link, origin_id=rng.choice(dicts).get("id"))
            elif kind == "to itself":
                target = link.get("target_id") if as_dict else link[3]
                set_link(link, origin_id=target)
            elif kind == "nowhere":
                set_link(
                    link,
                    **{
                        rng.choice(("id", "origin_id", "target_id")): rng.choice(
                            (9999, -10, -20, "x", None, 2**70, 1.5, [], {}, True)
                        )
                    },
                )
            else:
                set_link(
                    link,
                    **{
                        rng.choice(("origin_slot", "target_slot")): rng.choice(
                            (99, -1, None, "0", 2**70, 0.5, [], True)
                        )
                    },
                )
    elif kind == "ids":
        node["id"] = rng.choice((None, -1, 2**70, 1.5, "7", "", [], {}, True, float("nan"), 10**400, "é"))
    elif kind == "same ids":
        node["id"] = other.get("id")
    elif kind == "no widgets":
        for some in dicts:
            if rng.random() < 0.5:
                some.pop(
                    rng.choice(("widgets_values", "widgets_values_named", "inputs", "outputs", "properties", "mode")),
                    None,
                )
    elif kind == "widgets":
        for some in dicts:
            if rng.random() < 0.5:
                some["widgets_values"] = rng.choice(
                    (
                        None,
                        {},
                        [],
                        [odd(rng)] * 8,
                        {"model": odd(rng), "precision": odd(rng)},
                        "text",
                        3,
                        [[]],
                        [None] * 20,
                        {1: 2} if False else {"": None},
                    )
                )
    elif kind == "subgraph":
        inner = {
            "id": "11111111-1111-1111-1111-111111111111",
            "name": "inner",
            "nodes": copy.deepcopy(nodes),
            "links": copy.deepcopy(links),
            "inputs": [],
            "outputs": [],
        }
        inner["nodes"].append(
            {"id": 5000, "type": inner["id"], "mode": 0, "inputs": [], "outputs": [], "widgets_values": []}
        )
        graph.setdefault("definitions", {})
        if not isinstance(graph["definitions"], dict):
            graph["definitions"] = {}
        depth = rng.choice((1, 2, 200, 700))
        deepest = inner
        for _ in range(depth if depth > 2 else 0):
            deepest["definitions"] = {"subgraphs": [{"id": "x", "nodes": []}]}
            deepest = deepest["definitions"]["subgraphs"][0]
        graph["definitions"]["subgraphs"] = rng.choice(
            ([inner], [inner, copy.deepcopy(inner)] if depth < 3 else [inner], [None, inner, 3], {"a": inner}, "x")
        )
        nodes.append(
            {
                "id": 4000,
                "type": inner["id"],
                "mode": rng.choice((0, 2, 4)),
                "inputs": [],
                "outputs": [],
                "widgets_values": [],
            }
        )
        said.append(f"depth {depth}")
    elif kind == "groups":
        graph["groups"] = rng.choice(
            (
                None,
                {},
                [None],
                [{"bounding": None}],
                [{"bounding": ["a", 1, 2, 3]}],
                [{"bounding": [float("nan")] * 4}],
                [{"bounding": [2**70] * 4}],
                "x",
            )
        )
    elif kind == "no links":
        graph.pop("links", None)
    elif kind == "links":
        graph["links"] = rng.choice(
            (
                None,
                {},
                "x",
                [None],
                [[1]],
                [[]],
                [{}],
                [[1, 2, 3, 4, 5, "*"]] * 3,
                [odd(rng)],
                [[None] * 6],
                [["a"] * 6],
                (links or []) * 2,
            )
        )
    elif kind == "mode":
        for some in dicts:
            some["mode"] = rng.choice((0, 2, 4, None, "2", -1, 2**40, True, []))
    elif kind == "types":
        node["type"] = rng.choice(
            (
                None,
                3,
                [],
                "",
                "CogVideoSampler",
                "Reroute",
                "SetNode",
                "GetNode",
                "CogVideoXModelLoader",
                "CogVideoX15Sampler",
                "a" * 10_000,
                other.get("type"),
            )
        )
    elif kind == "properties":
        node["properties"] = rng.choice(
            (
                None,
                [],
                "x",
                {"cnr_id": 3},
                {"cnr_id": None, "aux_id": []},
                {"cnr_id": "ComfyUI-CogVideoXWrapper"},
                {"aux_id": "kijai/ComfyUI-CogVideoXWrapper"},
                {"proxyWidgets": 3},
            )
        )
        node["title"] = odd(rng)
    elif kind == "reroutes":
        graph["reroutes"] = rng.choice(([{"id": 1, "linkIds": [1, None, "x"]}], [{"linkIds": 3}], [None], {}, "x"))
        graph["extra"] = rng.choice(
            (
                None,
                [],
                "x",
                {"linkExtensions": [None, {"id": []}]},
                {"reroutes": [{"linkIds": [[]]}]},
                {"groupNodes": {"g": {"nodes": [{"type": "CogVideoSampler"}]}}},
                {"groupNodes": []},
                {"linkExtensions": [{"id": {}}]},
            )
        )
    elif kind == "set get":
        a, b = 7001, 7002
        for i, some in enumerate((a, b)):
            nodes.append(
                {
                    "id": some,
                    "type": "GetNode",
                    "inputs": [],
                    "outputs": [{"name": "*", "type": "*", "links": []}],
                    "widgets_values": rng.choice((["x"], [], None, [None], {"a": 1})),
                }
            )
            nodes.append(
                {
                    "id": some + 10,
                    "type": "SetNode",
                    "inputs": [{"name": "*", "type": "*", "link": 9000 + i}],
                    "outputs": [],
                    "widgets_values": rng.choice((["x"], [], None)),
                }
            )
            if isinstance(links, list):
                link = [9000 + i, b if some == a else a, 0, some + 10, 0, "*"]
                links.append(
                    dict(
                        zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link, strict=False)
                    )
                    if as_dict
                    else link
                )
        for link in links or []:
            if rng.random() < 0.4:
                set_link(link, origin_id=a)
    elif kind == "many":
        for i in range(3000):
            nodes.append(
                {
                    "id": 10_000 + i,
                    "type": "Reroute",
                    "inputs": [{"name": "", "type": "*", "link": 20_000 + i}],
                    "outputs": [{"name": "", "type": "*", "links": [20_001 + i]}],
                }
            )
            if isinstance(links, list) and not as_dict:
                links.append([20_000 + i, 9_999 + i, 0, 10_000 + i, 0, "*"])
        for link in links or []:
            if not as_dict and isinstance(link[0], int) and link[0] < 20_000 and rng.random() < 0.3:
                link[1] = 12_999
    elif kind == "extra":
        graph[
            rng.choice(("state", "last_node_id", "last_link_id", "config", "extra", "version", "definitions", "id"))
        ] = odd(rng)
        graph["state"] = rng.choice(({"lastNodeId": odd(rng), "lastLinkId": odd(rng)}, odd(rng)))
    elif kind == "pos":
        for some in dicts:
            some[rng.choice(("pos", "size"))] = rng.choice(
                (
                    None,
                    [],
                    [1],
                    ["a", "b"],
                    {"0": 1},
                    {"0": "x", "1": None},
                    [float("nan")] * 2,
                    [float("inf"), 0],
                    [2**70, 0],
                    [1e308, 1e308],
                    "x",
                    [-1, -1],
                    [0, 10**400],
                )
            )
    return graph


def _dumped(tree, said):
    try:
        return dump(tree)
    except RecursionError:
        # Deeper than Python's own writer goes: as deep, by hand.
        said.append("(by hand)")
        return b'{"prompt": ' * 2000 + b"{}" + b"}" * 2000


def case(state, rng, folder):
    name = rng.choice(list(state["seeds"]))
    if rng.random() < 0.6:
        name = rng.choice([name for name in state["seeds"] if not name.startswith("ours")])
    tree, said = copy.deepcopy(state["seeds"][name]), [name]
    kind = rng.choice(("structure",) * 6 + ("tree",) * 6 + ("text", "bytes", "place"))
    if kind == "structure":
        for _ in range(rng.choice((1, 1, 2, 3))):
            if isinstance(tree, dict) and tree:
                try:
                    tree = _structural(rng, tree, said)
                except (AttributeError, TypeError, IndexError, KeyError, ValueError, RecursionError):
                    said.append("(not fitting)")
        content = _dumped(tree, said)
    elif kind == "tree":
        tree, what = mutate_tree(rng, tree, rng.choice((None, None, 10, 40)))
        said.append(what)
        content = _dumped(tree, said)
    elif kind == "text":
        content, what = mutate_text(rng, dump(tree, 2))
        said.append(what)
    elif kind == "bytes":
        content, what = mutate_bytes(rng, dump(tree))
        said.append(what)
    else:
        content = dump(tree)
    file, target = folder / "old.json", folder / "new.json"
    put(file, content)
    if kind == "place":
        said.append(replace_by(rng, file if rng.random() < 0.6 else target))

    def act():
        from interop.check import check_config, is_config
        from interop.migrate import migrate_workflow

        is_config(file)
        problem = None
        try:
            report = check_config(file)
            report.text, json.dumps(report.as_dict())
        except ValueError as error:
            problem = error
        before = target.exists() or target.is_symlink()
        try:
            report = migrate_workflow(file, target)
        except ValueError:
            if not before and target.exists():
                return "refused, and a file is there: migrate"
            left = [path.name for path in folder.iterdir() if path.name.startswith(".new")]
            if left:
                return f"a temporary file is left: {left}"
            raise
        if problem:
            raise problem
        report.text.encode("utf-8", "surrogatepass")
        written = json.loads(target.read_text(encoding="utf-8"))
        return _look(json.loads(content.decode("utf-8-sig")), written)

    return " ".join(said), act


def _look(old, new):
    """What a page would trip over."""
    if not isinstance(new.get("nodes"), list):
        # Scripts queue it: every link must lead to a node.
        lost = [
            id_
            for id_, node in new.items()
            if isinstance(node, dict) and str(node.get("class_type", "")).startswith("CogVideoX15")
            for value in node["inputs"].values()
            if isinstance(value, list) and len(value) == 2 and type(value[0]) in (int, str) and str(value[0]) not in new
        ]
        return f"a link of ours to a node that is not there: {lost[:2]}" if lost else None
    ids = {}
    for node in new["nodes"]:
        if isinstance(node, dict) and isinstance(node.get("id"), (int, str)):
            if node["id"] in ids and not _doubled(old):
                return f"two nodes of one id: {node['id']}"
            ids[node["id"]] = node
    for link in new["links"]:
        number, origin, _slot, target, entry, _ = (
            [link[n] for n in ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")]
            if isinstance(link, dict)
            else link
        )
        if origin not in ids or target not in ids:
            return "a link in the new file joins nodes that are not there: link"
        sockets = ids[target].get("inputs") or []
        if entry >= len(sockets) or sockets[entry].get("link") != number:
            if not _doubled(old):
                return "a link in the new file that its socket does not know: socket"
    return None


def _doubled(old):
    while isinstance(old, dict) and not isinstance(old.get("nodes"), list):
        old = old.get("prompt") if isinstance(old.get("prompt"), dict) else old.get("workflow")
    if not isinstance(old, dict):
        return True
    ids = [node.get("id") for node in old["nodes"] if isinstance(node, dict)]
    return len(ids) != len({json.dumps(i) for i in ids}) or any(
        not isinstance(socket, dict)
        for node in old["nodes"]
        if isinstance(node, dict)
        for socket in (node.get("inputs") if isinstance(node.get("inputs"), list) else [])
    )
