"""2. GGUF files: bytes of the header, counts and lengths and offsets that lie. Oracle: names and shapes of what loads
are those of the original."""

import itertools
import struct

from mutate import NAMES, mutate_bytes, put, replace_by

from . import common

NAME = "gguf_file"
BIG = (0, 1, 2, 3, 5, 31, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def prepare(base):
    state = common.build(base)
    state["raw"] = {name: (base / f"{name}.gguf").read_bytes() for name in ("q8", "q4")}
    state["fields"] = {name: _fields(raw) for name, raw in state["raw"].items()}
    from cogvideox.checkpoint.layout import open_checkpoint

    state["shapes"] = {
        name: _shapes(open_checkpoint(base / f"{name}.gguf").parts["transformer"]) for name in state["raw"]
    }
    return state


def _shapes(part):
    return {name: (tensor.shape, str(tensor.kind)) for name, tensor in part.tensors.items()}


def _fields(raw):
    """Where the numbers of the header are: (what, offset, size)."""
    found = [("magic", 0, 4), ("version", 4, 4), ("tensor count", 8, 8), ("kv count", 16, 8)]
    tensors, keys = struct.unpack_from("<QQ", raw, 8)
    at = 24
    for _ in range(keys):
        (length,) = struct.unpack_from("<Q", raw, at)
        found.append(("key length", at, 8))
        at += 8 + length
        (kind,) = struct.unpack_from("<I", raw, at)
        found.append(("value type", at, 4))
        at += 4
        if kind == 8:
            (length,) = struct.unpack_from("<Q", raw, at)
            found.append(("string length", at, 8))
            at += 8 + length
        else:
            at += {4: 4, 5: 4, 6: 4, 7: 1, 10: 8}[kind]
    for _ in range(tensors):
        (length,) = struct.unpack_from("<Q", raw, at)
        found.append(("name length", at, 8))
        at += 8 + length
        (dims,) = struct.unpack_from("<I", raw, at)
        found.append(("dims", at, 4))
        found += [("dim", at + 4 + 8 * i, 8) for i in range(dims)]
        at += 4 + 8 * dims
        found += [("type", at, 4), ("offset", at + 4, 8)]
        at += 12
    return [*found, ("end", at, 0)]


def case(state, rng, folder):
    which = rng.choice(("q8", "q4"))
    raw, fields = bytearray(state["raw"][which]), state["fields"][which]
    file, said, kind = (
        folder / "model.gguf",
        [],
        rng.choice(("field",) * 5 + ("bytes", "bytes", "insert", "place", "cut")),
    )
    if kind == "field":
        for _ in range(rng.choice((1, 1, 1, 2))):
            wanted = rng.choice(sorted({name for name, _, size in fields if size}))
            what, at, size = rng.choice([field for field in fields if field[0] == wanted])
            value = (
                rng.choice(BIG)
                if rng.random() < 0.8
                else int.from_bytes(raw[at : at + size], "little") + rng.choice((-1, 1, 32, 2**20))
            )
            raw[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
            said.append(f"{what} at {at} = {value}")
    elif kind == "bytes":
        content, what = mutate_bytes(rng, bytes(raw), fields[-1][1])
        raw = bytearray(content)
        said.append(what)
    elif kind == "cut":
        at = rng.choice([at for _, at, _ in fields] + [rng.randrange(len(raw))])
        del raw[at:]
        said.append(f"cut at {at}")
    elif kind == "insert":
        # Another key and value before the rest: of any type, with any length, arrays in arrays.
        key = rng.choice(
            [
                *NAMES[:10],
                "general.alignment",
                "comfy.gguf.orig_shape.patch_embed.proj.weight",
                "comfy.gguf.orig_shape.transformer_blocks.0.attn1.to_q.weight",
                "GGUF.version",
                "general.architecture",
            ]
        ).encode("utf-8", "surrogatepass")
        deep = rng.choice((1, 2, 50, 3000))
        value = rng.choice((
            struct.pack("<IQ", 8, rng.choice(BIG)), struct.pack("<IQ", 8, 3) + b"\xff\xfe\x00", struct.pack("<I", 4) + b"\x07\x00\x00\x00", struct.pack("<II", 4, 0), struct.pack("<IQ", 10, rng.choice(BIG)),
            struct.pack("<IIQ", 9, 5, rng.choice(BIG)), struct.pack("<IIQ", 9, 5, 2) + struct.pack("<ii", -1, 7), struct.pack("<IIQ", 9, 4, 0), struct.pack("<IIQ", 9, 8, 2) + struct.pack("<Q", 1) + b"a" + struct.pack("<Q", 1) + b"b",
            struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * deep + struct.pack("<IQ", 4, 0), struct.pack("<I", rng.choice((13, 99, 2**31))), struct.pack("<If", 6, float("nan")), struct.pack("<IB", 7, 7), struct.pack("<IIQ", 9, 4, 2) + struct.pack("<II", 128, 64), struct.pack("<IIQ", 9, 5, 3) + struct.pack("<iii", 128, 64, 1),
        ))  # fmt: skip
        raw[24:24] = struct.pack("<Q", len(key)) + key + value
        (count,) = struct.unpack_from("<Q", raw, 16)
        raw[16:24] = struct.pack("<Q", count + 1)
        said.append(f"a key {key[:40]} with {value[:24]}")
    put(file, bytes(raw))
    if kind == "place":
        said.append(replace_by(rng, file))

    def act():
        from cogvideox.checkpoint.catalogue import list_checkpoints, list_parts
        from cogvideox.loading import empty_module

        list_checkpoints([folder], [folder])
        list_parts("text_encoder", [folder])
        handles = common.use(file, rng, loads=0.15)
        part = handles.checkpoint.parts["transformer"]
        if rng.random() < 0.04:
            common.sample_once(handles, 1)
        empty_module(part)
        if _shapes(part) != state["shapes"][which]:
            changed = [
                name
                for name in set(_shapes(part)) | set(state["shapes"][which])
                if _shapes(part).get(name) != state["shapes"][which].get(name)
            ]
            return (
                f"loads with other names, shapes or kinds: {sorted(changed)[:3]} "
                f"{[_shapes(part).get(n) for n in sorted(changed)[:3]]}"
            )
        places = sorted((tensor.offset, tensor.offset + tensor.nbytes) for tensor in part.tensors.values())
        if any(end > begin for (_, end), (begin, _) in itertools.pairwise(places)):
            return "two tensors share bytes: overlapping offsets"
        return None

    return f"{which} {' '.join(said)}", act
