"""1b. Folders in diffusers layout: every JSON file, the tokenizer's files, the indexes of shards, odd things in the
places of files, and folders of
other shapes: fine-tunes, runs, caches, what was renamed, doubled or left out."""

import json
import shutil

import torch
from core import WORK
from mutate import NAMES, dump, mirror, mutate_bytes, mutate_text, mutate_tree, odd, put, replace_by, short

from . import common

NAME = "diffusers_folder"
JSONS = (
    "transformer/config.json",
    "text_encoder/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "model_index.json",
    "transformer/INDEX",
    "text_encoder/INDEX",
)
#: Names that mean something in a folder.
MEANING = (
    *(
        "transformer",
        "transformer_T2V",
        "transformer_I2V",
        "transformer_ema",
        "text_encoder",
        "vae",
        "tokenizer",
        "scheduler",
        "Transformer",
    ),
    *(
        "config.json",
        "model_index.json",
        "scheduler_config.json",
        "latest",
        "main",
        "refs",
        "snapshots",
        "blobs",
        "models--zai-org--CogVideoX-5b",
    ),
    *("diffusion_pytorch_model", "model", "pytorch_model"),
    *(
        "checkpoint-500",
        "checkpoint-1000",
        "500",
        "1000",
        "mp_rank_00_model_states.pt",
        "mp_rank_01_model_states.pt",
        "3d-vae.pt",
        "t5-v1_1-xxl",
    ),
    *("pytorch_lora_weights.safetensors", "__0_0.distcp", "optimizer.bin", "spiece.model", "x.aria2", "x.incomplete"),
)
STEMS, VARIANTS = ("diffusion_pytorch_model", "model", "pytorch_model", "x"), ("", "", ".fp16", ".bf16", ".ema", ".odd")
SHARDS = ("", "", "-00001-of-00002", "-00002-of-00002", "-1-of-1", "-99999-of-00000")
ENDINGS = (
    ".safetensors",
    ".safetensors",
    ".bin",
    ".pt",
    ".SAFETENSORS",
    ".safetensors.index.json",
    ".bin.index.json",
    ".safetensors.index.fp16.json",
)
EXTRA = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")


def prepare(base):
    state = common.build(base)
    source = base / "folder"
    state["indexes"] = {
        part: next((source / part).glob("*.index.json")).name for part in ("transformer", "text_encoder")
    }
    state["files"] = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    if not (base / "tokenizer").exists():
        from transformers import T5TokenizerFast

        T5TokenizerFast.from_pretrained(source / "tokenizer").save_pretrained(base / "tokenizer")
    state["tokenizer"] = {path.name: path.read_bytes() for path in (base / "tokenizer").iterdir()}
    secret = WORK / "canary" / "secret.safetensors"
    if not secret.exists():
        secret.write_bytes((source / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    return state


def a_name(rng) -> str:
    if rng.random() < 0.05:
        return rng.choice(
            [
                name
                for name in NAMES
                if name not in ("", ".", "..") and not set("/\0") & set(name) and name.isprintable()
            ]
        )[:200]
    if rng.random() < 0.5:
        return rng.choice(STEMS) + rng.choice(VARIANTS) + rng.choice(SHARDS) + rng.choice(ENDINGS)
    return rng.choice(MEANING)


def reshape(rng, state, here):
    """Make something else of a folder, in one to four steps; what may be opened then, and what was done."""
    said, root = [], here.parent
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4))):
        inside = sorted(path for path in root.rglob("*") if not path.is_symlink() or path.exists())
        if not inside:
            break
        path = rng.choice(inside)
        target = rng.choice(
            [path.parent, path.parent, root, *(other for other in inside if other.is_dir() and not other.is_symlink())]
        ) / a_name(rng)
        step = rng.choice(
            (
                "rename",
                "rename",
                "rename",
                "copy",
                "copy",
                "new",
                "new",
                "drop",
                "place",
                "cache",
                "nest",
                "flatten",
                "other",
            )
        )
        try:
            if step == "rename":
                path.rename(target)
            elif step == "copy":
                target.symlink_to(path)
            elif step == "new":
                put(
                    target,
                    rng.choice((b"", b"{}", b"[", b"500", b"a" * 5000, b"..", b"\xff\xfe", b"\0", dump(odd(rng)))),
                )
            elif step == "drop":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            elif step == "place":
                replace_by(rng, path)
            elif step == "other":
                target.symlink_to(
                    state["base"]
                    / rng.choice(
                        ("small.pt", "old.pt", "comfy.safetensors", "vae.safetensors", "q8.gguf", "sat", "folder")
                    )
                )
            elif step == "flatten":
                for file in (root / "model" / "transformer").iterdir():
                    file.rename(root / "model" / file.name)
            else:
                where = root / (
                    "models--zai-org--CogVideoX1.5-5B/snapshots/abc"
                    if step == "cache"
                    else f"{a_name(rng)}/{a_name(rng)}"
                )
                where.parent.mkdir(parents=True, exist_ok=True)
                (root / "model").rename(where)
                if step == "cache":
                    (where.parents[1] / "refs").mkdir(exist_ok=True)
                    (where.parents[1] / "refs" / "main").write_bytes(
                        rng.choice((b"abc", b"abc\n", b"abd", b"..", b"", b"\0", b"a" * 5000))
                    )
            said.append(f"{step} {path.relative_to(root)} {target.relative_to(root)}")
        except OSError:
            said.append(f"no {step}")
    there = [root, *sorted(root.iterdir()), *sorted(root.rglob("*"))]
    path = rng.choice([here, here, *there[: 1 + len(list(root.iterdir()))], *there])
    return path if rng.random() < 0.9 else f'"{path}"', f"{'; '.join(said)}; opened is {path}"


def case(state, rng, folder):
    source = state["base"] / "folder"
    here = mirror(source, folder / "model")
    if rng.random() < 0.3:
        path, said = reshape(rng, state, here)

        def look():
            from cogvideox.checkpoint.catalogue import list_checkpoints
            from cogvideox.checkpoint.layout import open_part
            from interop.check import is_config

            list_checkpoints([folder], [folder])
            is_config(path)
            if rng.random() < 0.2:
                open_part(path, rng.choice(("transformer", "text_encoder", "vae")))
            else:
                handles = common.use(path, rng, ("transformer",), 0.3)
                for kind in ("text_encoder", "vae"):
                    handles.checkpoint.part(kind)

        return said, look
    kind = rng.choice(
        ("json",) * 5
        + ("value",) * 5
        + ("text", "tokenizer", "tokenizer", "spiece", "place", "shard", "index", "index")
    )
    name = rng.choice(JSONS)
    if name.endswith("INDEX"):
        name = name.replace("INDEX", state["indexes"][name.split("/")[0]])
    file, touched = here / name, name.split("/")[0]
    if kind in ("json", "value", "text"):
        tree = json.loads((source / name).read_text())
        if kind == "value":
            key = rng.choice(list(tree))
            tree[key] = odd(rng)
            said, content = f"{key}={short(tree[key])}", dump(tree)
        elif kind == "json":
            tree, said = mutate_tree(rng, tree)
            content = dump(tree)
        else:
            content, said = mutate_text(rng, dump(tree, 2))
        put(file, content)
        said = f"{name}: {said}"
    elif kind == "index":
        touched = rng.choice(("transformer", "text_encoder"))
        name = f"{touched}/{state['indexes'][touched]}"
        tree = json.loads((source / name).read_text())
        some = rng.choice(list(tree["weight_map"]))
        where = rng.choice(
            (
                "../../../../canary/secret.safetensors",
                str(WORK / "canary/secret.safetensors"),
                "..",
                ".",
                "",
                "/",
                "nowhere.safetensors",
                "config.json",
                "a\x00b",
                "\ud800",
                "x" * 300,
                None,
                3,
                ["a"],
                {"a": 1},
                True,
            )
        )
        every = rng.random() < 0.4
        for tensor in tree["weight_map"] if every else [some]:
            tree["weight_map"][tensor] = where
        put(here / name, dump(tree))
        said = f"{name}: {'all' if every else some} in {short(where)}"
    elif kind == "tokenizer":
        touched = "tokenizer"
        name = rng.choice(EXTRA)
        content = state["tokenizer"].get(name, b'{"a": 1}')
        only = rng.random() < 0.5
        if only:
            for path in (here / "tokenizer").iterdir():
                path.unlink()
            put(here / "tokenizer" / "tokenizer.json", state["tokenizer"]["tokenizer.json"])
            name = rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"))
            content = state["tokenizer"][name]
        try:
            tree, said = mutate_tree(rng, json.loads(content))
            content = dump(tree)
        except ValueError:
            said = "as it was"
        if rng.random() < 0.2:
            content, said = mutate_text(rng, content)
        if rng.random() < 0.1:
            evil = here / "tokenizer" / "evil.py"
            evil.write_text(f"import os; os.system('touch {state['base'].parent.parent}/PWNED')")
            content, said = (
                dump({"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T", "custom": True}),
                "auto_map to evil.py",
            )
            name = "tokenizer_config.json"
        put(here / "tokenizer" / name, content)
        said = f"tokenizer{' alone' if only else ''}/{name}: {said}"
    elif kind == "spiece":
        touched = "tokenizer"
        content, said = mutate_bytes(rng, (source / "tokenizer/spiece.model").read_bytes())
        put(here / "tokenizer/spiece.model", content)
        said = f"spiece.model: {said}"
    elif kind == "shard":
        name = rng.choice([name for name in state["files"] if name.endswith(".safetensors")])
        touched = name.split("/")[0]
        content, said = mutate_bytes(rng, (source / name).read_bytes(), 8000)
        put(here / name, content)
        said = f"{name}: {said}"
    else:
        name = rng.choice(
            [
                *state["files"],
                "transformer",
                "vae",
                "tokenizer",
                "scheduler",
                "text_encoder",
                "transformer/latest",
                "latest",
            ]
        )
        touched = name.split("/")[0]
        path = here / name
        if path.is_dir():
            shutil.rmtree(path)
        said = f"{name}: {replace_by(rng, path)}"

    def act():
        from cogvideox.checkpoint.catalogue import list_checkpoints
        from cogvideox.checkpoint.convert import convert_checkpoint
        from cogvideox.text import encode_prompt
        from interop.check import is_config

        list_checkpoints([folder], [folder])
        is_config(here)
        parts = [touched] if touched in ("transformer", "vae", "text_encoder") else []
        handles = common.use(here, rng, parts)
        if touched in ("tokenizer", "text_encoder"):
            encode_prompt(handles.text_encoder, "a panda plays the guitar")
        if touched in ("scheduler", "transformer") or (touched == "vae" and rng.random() < 0.3):
            common.sample_once(handles, rng.choice((1, 2, 3)), scheduler=rng.choice(("ddim", "dpm")))
        if touched == "vae":
            from cogvideox.vae import decode

            decode(handles.vae, torch.full((1, 16, 1, 2, 2), 0.5))
        if rng.random() < 0.03 or touched == "model_index.json":
            convert_checkpoint(handles.checkpoint, folder / "out", None)
        return None

    return said, act
