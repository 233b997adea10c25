"""3a. SAT's torch checkpoints: pickles that would run code, that lie about their storages, and damaged archives."""

import io
import os
import pickle
import zipfile

import torch
from core import WORK
from mutate import NAMES, mutate_bytes, odd, put, replace_by, short

from . import common

NAME = "pickles"


class Calls:
    """Pickles to a call."""

    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


def prepare(base):
    state = common.build(base)
    state["pwned"] = str(WORK / "PWNED")
    state["raw"] = (base / "sat/transformer/1000/mp_rank_00_model_states.pt").read_bytes()
    state["vae"] = (base / "sat/vae/3d-vae.pt").read_bytes()
    state["old"] = (base / "old.pt").read_bytes()
    state["dict"] = torch.load(base / "sat/transformer/1000/mp_rank_00_model_states.pt", weights_only=True)["module"]
    from cogvideox.checkpoint.layout import open_checkpoint

    state["shapes"] = {
        name: tensor.shape for name, tensor in open_checkpoint(base / "sat").parts["transformer"].tensors.items()
    }
    return state


def _evil(pwned, rng):
    """A pickle that runs code when an ordinary unpickler reads it."""
    import builtins
    import subprocess

    command = f"touch {pwned}"
    return rng.choice((
        Calls(os.system, command), Calls(subprocess.call, ["touch", pwned]), Calls(builtins.eval, f"open({pwned!r}, 'w')"), Calls(builtins.exec, f"import os; os.system({command!r})"),
        Calls(builtins.open, pwned, "w"), Calls(builtins.getattr, os, "system"), Calls(__import__, "os"), Calls(torch.load, pwned), Calls(torch.hub.load, ".", "x"),
        Calls(torch.storage._load_from_bytes, b"x"), Calls(torch.save, {}, pwned), Calls(os.remove, pwned), Calls(os.open, pwned, 66), Calls(torch.ops.load_library, pwned), Calls(torch.serialization.load, pwned),
    ))  # fmt: skip


def _dumped(tree, protocol) -> bytes:
    """A pickle, modules in it by their names, as a class would be."""
    out = io.BytesIO()

    class Writer(pickle._Pickler):
        def save(self, value, save_persistent_id=True):
            super().save(
                Calls(__import__, value.__name__) if isinstance(value, type(os)) else value, save_persistent_id
            )

    Writer(out, protocol).dump(tree)
    return out.getvalue()


def _archive(content: bytes, records=(), root="x", names=None):
    """A zip as ``torch.save`` writes it, with any pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", content)
        archive.writestr(f"{root}/byteorder", b"little")
        for name, data in records:
            archive.writestr(name if "/" in name else f"{root}/data/{name}", data)
        archive.writestr(f"{root}/version", b"3\n")
        archive.writestr(f"{root}/.data/serialization_id", b"0")
    return out.getvalue()


class _Stored:
    """Pickled as a persistent id of a storage, as torch does."""

    def __init__(self, key, numel, kind="FloatStorage"):
        self.key, self.numel, self.kind = key, numel, kind


def _pickle(tree) -> bytes:
    out = io.BytesIO()

    class Writer(pickle._Pickler):
        def persistent_id(self, value):
            if isinstance(value, _Stored):
                return ("storage", getattr(torch, value.kind), value.key, "cpu", value.numel)
            return None

    Writer(out, 2).dump(tree)
    return out.getvalue()


def _lying(rng):
    """Tensors whose storages, shapes, strides and offsets do not fit together."""
    from collections import OrderedDict

    numel, size = (
        rng.choice((0, 1, 4, 4, 16, 2**20, 2**40, 2**62, -1)),
        rng.choice(((4,), (2, 2), (2**20,), (2**40,), (2**62, 4), (-1,), (0,), ())),
    )
    stride = rng.choice(((1,), (2, 1), (0,), (0, 0), (-1,), (2**40,), (2**62,), ()))
    offset = rng.choice((0, 0, 1, 4, 2**40, -1, 2**62))
    kind = rng.choice(
        (
            "FloatStorage",
            "HalfStorage",
            "BFloat16Storage",
            "DoubleStorage",
            "LongStorage",
            "BoolStorage",
            "ComplexFloatStorage",
        )
    )
    rebuild = rng.choice(
        (
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v2",
            "_rebuild_tensor",
            "_rebuild_parameter",
            "_rebuild_sparse_tensor",
            "_rebuild_qtensor",
            "_rebuild_meta_tensor_no_storage",
            "_rebuild_tensor_v3",
            "_rebuild_nested_tensor",
            "_rebuild_wrapper_subclass",
        )
    )
    args = {
        "_rebuild_tensor_v2": (_Stored("0", numel, kind), offset, size, stride, False, OrderedDict()),
        "_rebuild_tensor": (_Stored("0", numel, kind), offset, size, stride),
        "_rebuild_parameter": (Calls(torch._utils._rebuild_tensor_v2, _Stored("0", numel, kind), offset, size, stride, False, OrderedDict()), False, OrderedDict()),
        "_rebuild_sparse_tensor": (torch.sparse_coo, (torch.tensor([[0]]), torch.tensor([1.0]), size)),
        "_rebuild_qtensor": (_Stored("0", numel, kind), offset, size, stride, (torch.per_tensor_affine, 0.1, 0), False, OrderedDict()),
        "_rebuild_meta_tensor_no_storage": (torch.float32, size, stride, False),
        "_rebuild_tensor_v3": (_Stored("0", numel, kind), offset, size, stride, False, OrderedDict(), torch.float32),
        "_rebuild_nested_tensor": (_Stored("0", numel, kind), size, stride, offset),
        "_rebuild_wrapper_subclass": (torch.Tensor, torch.float32, size, stride, offset, torch.strided, "cpu", False),
    }[rebuild]  # fmt: skip
    tensor = Calls(getattr(torch._utils, rebuild), *args)
    name = rng.choice(
        (
            "transformer.layers.0.attention.query_key_value.weight",
            "model.diffusion_model.mixins.patch_embed.text_proj.weight",
            "a",
        )
    )
    data = b"\x00" * rng.choice((0, 4, 16, 64, 1024))
    records = [("0", data)] if rng.random() < 0.9 else []
    return _archive(
        _pickle({"module": {name: tensor, "b": tensor}}), records
    ), f"{rebuild} {kind} numel {numel} size {size} stride {stride} offset {offset} bytes {len(data)}"


def _contents(state, rng):
    """Things of torch's own that may be pickled, in the place of the state or in it."""
    nested = {}
    deep = nested
    for _ in range(rng.choice((3, 150))):
        deep["module"] = {}
        deep = deep["module"]
    itself = {}
    itself["module"] = itself
    alike = dict(state["dict"])
    some = rng.choice(list(alike))
    shared = torch.zeros(100)
    tree = rng.choice((
        None, [], {}, [state["dict"]], (1, 2), torch.ones(3), 7, "text", {"module": None}, {"module": []}, {"module": {1: torch.ones(3), 2: 3}}, {"module": {None: torch.ones(2), ("a", 1): torch.ones(2)}},
        {"module": {b"bytes": torch.ones(1)}}, {"state_dict": {"module": {"model": {"a": torch.ones(2)}}}}, nested, itself, {"module": alike | {1: torch.ones(3)}}, {"module": alike | {"a": shared[:10], "b": shared[10:], "c": shared[::2]}},
        {"module": alike | {some: alike[some].t() if alike[some].ndim == 2 else alike[some]}}, {"module": alike | {some: alike[some].double()}}, {"module": alike | {some: alike[some].to(torch.complex64)}}, {"module": alike | {some: odd(rng)}},
        {"module": alike | {rng.choice(NAMES): torch.ones(3)}}, {"module": alike | {some: torch.empty(0)}}, {"module": alike | {some: torch.zeros(1).expand(10**6, 10**6)}}, {"module": alike | {some: torch.ones(3, device="meta")}},
        {"module": alike | {some: torch.sparse_coo_tensor([[0]], [1.0], (3,))}}, {"module": alike | {some: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}}, {"module": {k: v for k, v in alike.items() if k != some}},
        {"module": {k.replace("layers.0", "layers.x"): v for k, v in alike.items()}}, {"module": {k: torch.ones(7, 5) for k in alike}}, {"module": {k: torch.ones(()) for k in alike}}, {"module": {k: v[:0] for k, v in alike.items()}},
    ))  # fmt: skip
    out = io.BytesIO()
    torch.save(tree, out, _use_new_zipfile_serialization=rng.random() < 0.9)
    return (
        out.getvalue(),
        f"holds {type(tree).__name__} {short(list(tree)[:2]) if isinstance(tree, dict) else ''} {some}",
    )


def case(state, rng, folder):
    kind = rng.choice(
        ("evil",) * 4 + ("lying",) * 4 + ("contents",) * 4 + ("bytes",) * 3 + ("zip", "zip", "place", "text")
    )
    file = folder / "sat" / "transformer" / "1000" / "mp_rank_00_model_states.pt"
    file.parent.mkdir(parents=True)
    if kind == "evil":
        gadget = _evil(state["pwned"], rng)
        place = rng.choice(
            (
                gadget,
                {"module": gadget},
                {"module": {"a": gadget}},
                {"module": {"a": torch.ones(1)}, "other": gadget},
                [gadget],
                {gadget: 1} if False else {"x": [gadget]},
            )
        )
        how = rng.choice(("zip", "zip", "plain", "old", "tar"))
        if how == "zip":
            content = _archive(_dumped(place, 2))
        elif how == "plain":
            content = _dumped(place, rng.choice((0, 2, 4)))
        elif how == "old":
            content = (
                pickle.dumps(0x1950A86A20F9469CFC6C, 2)
                + pickle.dumps(1001, 2)
                + pickle.dumps({}, 2)
                + _dumped(place, 2)
            )
        else:
            import tarfile

            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w") as tar:
                for name in ("storages", "tensors", "pickle", "../../PWNED"):
                    info = tarfile.TarInfo(name)
                    info.size = len(data := _dumped(place, 2))
                    tar.addfile(info, io.BytesIO(data))
            content = out.getvalue()
        said = f"evil {how} {gadget.what[0]!r}"[:150]
    elif kind == "lying":
        content, said = _lying(rng)
    elif kind == "contents":
        content, said = _contents(state, rng)
    elif kind == "zip":
        bomb = rng.choice(
            ("traversal", "many", "duplicate", "no data", "two roots", "comment", "encrypted", "absolute", "64")
        )
        if rng.random() < 0.03:
            bomb = "deflated"
        data = pickle.dumps({"module": {}}, 2)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if bomb == "deflated" else zipfile.ZIP_STORED) as archive:
            if bomb != "no data":
                archive.writestr("x/data.pkl", data if bomb != "deflated" else b"\x80\x02" + b"]" * 200_000_000)
            for name in {
                "traversal": ["../../../../PWNED", "x/data/../../../PWNED"],
                "absolute": [state["pwned"]],
                "duplicate": ["x/data/0", "x/data/0"],
                "two roots": ["y/data.pkl"],
            }.get(bomb, []):
                archive.writestr(name, b"\x00" * 16)
            if bomb == "many":
                for i in range(20_000):
                    archive.writestr(f"x/data/{i}", b"")
            archive.writestr("x/version", b"3\n")
            archive.comment = b"c" * 60_000 if bomb == "comment" else b""
        content = out.getvalue()
        if bomb == "encrypted":
            content = content.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00")
        said = f"zip {bomb}"
    elif kind == "bytes":
        raw = rng.choice((state["raw"], state["vae"], state["old"]))
        if rng.random() < 0.5:
            # The central directory and the pickle.
            at = raw.rfind(b"PK\x05\x06") if rng.random() < 0.5 else raw.find(b"data.pkl")
            at = max(0, at - rng.choice((0, 200, 5000)))
            piece, what = mutate_bytes(rng, raw[at:], 6000)
            content = raw[:at] + piece
        else:
            content, what = mutate_bytes(rng, raw, 6000)
        said = f"bytes {what}"
    elif kind == "text":
        content, said = rng.choice(
            (
                (b"", "empty"),
                (b"version https://git-lfs.github.com/spec/v1\n", "lfs"),
                (b"<html>", "html"),
                (b"\x80", "one byte"),
                (b"\x80\x02.", "stop"),
                (b"(" * 100_000, "marks"),
                (b"\x80\x02" + b"]" * 1_000_000 + b".", "lists"),
                (b"PK\x03\x04", "zip"),
                (b"PK\x05\x06" + b"\x00" * 18, "empty zip"),
            )
        )
    else:
        content, said = state["raw"], ""
    put(file, content)
    if kind == "place":
        said = replace_by(
            rng,
            rng.choice((file, file.parent.parent / "latest", file.parent))
            if False
            else rng.choice((file, file.parent.parent / "latest")),
        )
    if rng.random() < 0.1:
        put(
            file.parent.parent / "latest",
            rng.choice((b"../../../canary", b"\xff\xfe", b"", b"1000\n", b"a" * 5000, b"\x00", b"/", b"..")),
        )
        said += " odd latest"
    # The same file in the place of a VAE, and under SAT's config.
    as_vae = rng.random() < 0.2
    config = folder / "sat" / "inference.yaml"
    config.write_text("args:\n  fp16: True\n  load: transformer\n")

    def act():
        from cogvideox.checkpoint.catalogue import list_checkpoints
        from cogvideox.checkpoint.layout import open_part
        from cogvideox.loading import empty_module
        from interop.check import check_config

        list_checkpoints([folder], [folder])
        check_config(config)
        if as_vae:
            common.load_module(open_part(file, "vae"), common.FP32, torch.device("cpu"))
            return None
        handles = common.use(folder / "sat", rng, loads=0.3)
        empty_module(handles.checkpoint.parts["transformer"])
        shapes = {name: tensor.shape for name, tensor in handles.checkpoint.parts["transformer"].tensors.items()}
        if shapes != state["shapes"]:
            return f"names or shapes differ: {list(set(shapes) ^ set(state['shapes']))[:3]}"
        return None

    return said, act
