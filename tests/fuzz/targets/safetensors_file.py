"""1a. Single safetensors files. Oracle: the safetensors library, which must give the same tensors or refuse too."""

import json

import torch
from mutate import dump, mutate_bytes, mutate_text, mutate_tree, odd, put, replace_by, short
from safetensors import safe_open

from . import common

NAME = "safetensors_file"
FILES = ("diffusers", "comfy", "fp8", "vae", "t5")
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F4",
    "F6_E2M3",
    "F8_E8M0",
    "C64",
    "U16",
    "U32",
    "U64",
    "",
    "f32",
    None,
    3,
]


def prepare(base):
    state = common.build(base)
    state["files"] = {name: common.split(base / f"{name}.safetensors") for name in FILES}
    return state


def _entry(rng, header, said):
    """One tensor's entry changed in a way that a parser may overlook."""
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    if len(entry["data_offsets"]) != 2:
        # Changed before.
        return
    begin, end = entry["data_offsets"]
    size = end - begin
    kind = rng.choice(
        (
            "dtype",
            "same size",
            "shape",
            "offset",
            "overlap",
            "swap",
            "negative",
            "float",
            "three",
            "rename",
            "delete",
            "extra",
            "empty",
            "huge",
            "shift",
            "transpose",
        )
    )
    if kind == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == "same size":
        entry["dtype"] = rng.choice(("F16", "BF16", "I16", "U16"))
    elif kind == "shape":
        entry["shape"] = rng.choice(
            (
                [],
                [0],
                [-1, -size // 2],
                [2**62, 4],
                [2**32, 2**32],
                [1.0 * s for s in entry["shape"]],
                [str(s) for s in entry["shape"]],
                None,
                [True],
                [size // 2],
                [[1]],
                {"0": 1},
                "12",
                [10**30],
            )
        )
    elif kind == "offset":
        entry["data_offsets"] = rng.choice(
            (
                [begin, 2**63],
                [2**64, 2**64 + size],
                [end, begin],
                [begin + 2**40, end + 2**40],
                [begin - 10**9, end - 10**9],
                None,
                [],
                [begin],
                {},
                "ab",
                [None, None],
                [begin, float("inf")],
                [float("nan"), end],
                [str(begin), str(end)],
            )
        )
    elif kind == "overlap":
        start = header[other]["data_offsets"][0]
        entry["data_offsets"] = [start, start + size]
    elif kind == "swap":
        entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
    elif kind == "negative":
        entry["data_offsets"] = [-8, size - 8]
    elif kind == "float":
        entry["data_offsets"] = [float(begin), float(end)]
    elif kind == "three":
        entry["data_offsets"] = [begin, end, end]
    elif kind == "rename":
        header[
            rng.choice(
                (
                    "../x.weight",
                    "",
                    "\ud800",
                    name + ".",
                    name.upper(),
                    name.replace("0", "00"),
                    name.replace("0", "-1"),
                    "a" * 100_000,
                    other,
                    name + "\x00",
                )
            )
        ] = header.pop(name)
    elif kind == "delete":
        del header[name]
    elif kind == "extra":
        header[
            rng.choice(
                (
                    "extra.weight",
                    "model.diffusion_model." + name,
                    "transformer_blocks.7.attn1.to_q.weight",
                    name + ".scale_weight",
                    name.replace(".weight", ".scale_weight"),
                    name.replace(".weight", ".weight_scale"),
                    "a.b.c",
                )
            )
        ] = rng.choice(
            (
                dict(entry),
                {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
                {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            )
        )
    elif kind == "empty":
        entry["shape"], entry["data_offsets"] = [0, *entry["shape"][1:]], [begin, begin]
    elif kind == "huge":
        entry["shape"] = [2**60, 0]
        entry["data_offsets"] = [begin, begin]
    elif kind == "shift":
        entry["data_offsets"] = [begin + 1, end + 1]
    elif kind == "transpose":
        entry["shape"] = entry["shape"][::-1]
    said.append(f"{kind} {short(name)} {short(entry)}")


def case(state, rng, folder):
    which = rng.choice(("diffusers", "diffusers", "diffusers", "comfy", "fp8", "vae", "t5"))
    header, data = state["files"][which]
    file, said = folder / "model.safetensors", [which]
    kind = rng.choice(("entry",) * 6 + ("tree", "tree", "text", "length", "bytes", "file", "metadata"))
    if kind == "entry":
        header = json.loads(json.dumps(header))
        for _ in range(rng.choice((1, 1, 2, 3))):
            if len(header) > 2:
                _entry(rng, header, said)
        content = common.joined(dump(header), data)
    elif kind == "tree":
        tree, what = mutate_tree(rng, header)
        said.append(what)
        content = common.joined(dump(tree), data)
    elif kind == "text":
        text, what = mutate_text(rng, dump(header))
        said.append(f"text {what}")
        content = common.joined(text, data)
    elif kind == "length":
        text = dump(header)
        length = rng.choice(
            (
                0,
                1,
                2,
                len(text) - 1,
                len(text) + 1,
                len(text) + 8,
                len(text) + len(data),
                len(text) // 2,
                2**31,
                2**63,
                2**64 - 1,
                99_999_999,
                100_000_001,
            )
        )
        said.append(f"length {length}")
        content = common.joined(text, data, length)
    elif kind == "metadata":
        value = odd(rng)
        said.append(f"__metadata__ {short(value)}")
        content = common.joined(dump({**header, "__metadata__": value}), data)
    elif kind == "bytes":
        content, what = mutate_bytes(rng, common.joined(dump(header), data), 12_000)
        said.append(f"bytes {what}")
    else:
        content = common.joined(dump(header), data)
    put(file, content)
    if kind == "file":
        said.append(replace_by(rng, file))

    def act():
        from cogvideox.checkpoint.catalogue import list_checkpoints, list_parts
        from cogvideox.checkpoint.convert import convert_checkpoint
        from cogvideox.checkpoint.layout import open_checkpoint, open_part
        from cogvideox.loading import empty_module
        from cogvideox.precision.policy import plan_dtypes, scan_parts

        list_checkpoints([folder], [folder])
        for part in ("text_encoder", "vae", "lora"):
            list_parts(part, [folder])
        if which in ("vae", "t5"):
            part = open_part(file, "vae" if which == "vae" else "text_encoder")
        else:
            handles = common.use(file, rng, loads=0.1)
            part = handles.checkpoint.parts["transformer"]
            if rng.random() < 0.05:
                scan_parts(handles.checkpoint, plan_dtypes(handles.checkpoint, "fp16", common.CPU)).text
            if rng.random() < 0.05:
                convert_checkpoint(
                    handles.checkpoint, folder / "out.safetensors", rng.choice((torch.bfloat16, torch.float32))
                )
                open_checkpoint(folder / "out.safetensors")
            if rng.random() < 0.05:
                common.sample_once(handles, 1)
        refused = _refused(file)
        if refused or rng.random() < 0.7:
            empty_module(part)
            return refused
        return _compare(file, part, common.load_module(part, common.FP32, torch.device("cpu")))

    return " ".join(said), act


def _refused(file):
    try:
        with safe_open(file, "pt"):
            return None
    except Exception as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        kind = next(
            (
                word
                for word in ("invalid offset", "invalid JSON", "incomplete", "too large", "UTF-8", "start token")
                if word.lower() in why.lower()
            ),
            why[:60],
        )
        return f"loads, though the safetensors library refuses it, {kind}: {why[:120]}"


def _compare(file, part, module):
    state = module.state_dict()
    with safe_open(file, "pt") as theirs:
        for name, stored in part.tensors.items():
            if stored.more or name not in state:
                continue
            found = (
                [key for key in theirs.keys() if key.endswith(name) or stored.layout_name == key]
                if hasattr(stored, "layout_name")
                else [key for key in theirs.keys() if key.endswith(name)]
            )
            if len(found) == 1:
                other = theirs.get_tensor(found[0])
                if other.is_floating_point() and not other.float().nan_to_num().equal(state[name].float().nan_to_num()):
                    return f"{name} is not what the safetensors library reads"
    return None
