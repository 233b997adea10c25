"""4. LoRA files: spellings, layouts of trainers, alphas, ranks, shapes, dtypes, values and settings.

Oracles: a LoRA that is taken gives a finite change, and a damaged one none; one that is only spelled or packed in an
unusual way is taken, with the halves and the scale that were written.
"""

import torch
from mutate import NAMES, dump, mutate_bytes, mutate_text, mutate_tree, odd, put, replace_by, short
from safetensors.torch import save_file

from . import common

NAME = "lora"
LAYERS = (
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.1.ff.net.2",
    "patch_embed.text_proj",
    "transformer_blocks.0.norm1.linear",
    "time_embedding.linear_1",
)
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
)
NUMBERS = (float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1e38, 1e30, 1e-38, 8.0)


def prepare(base):
    state = common.build(base)
    state["handles"] = common.use(base / "folder", __import__("random").Random(0))
    from cogvideox.handles import make_handles

    state["model"] = make_handles(state["handles"].checkpoint, "fp32", common.CPU).model
    state["safe"] = make_handles(state["handles"].checkpoint, "fp16", common.CPU).model
    state["shapes"] = {name: state["model"].weights.part.tensors[f"{name}.weight"].shape for name in LAYERS}
    state["plain"] = {
        "model": common.sample_once(
            state["handles"].__class__(**{**vars(state["handles"]), "model": state["model"]}), 1
        )
    }
    return state


def _flat(layer):
    return layer.replace(".", "_")


def _around(rng):
    """A stack of what trainers put before names."""
    words = (
        "transformer",
        "base_model.model",
        "diffusion_model",
        "model",
        "module",
        "_orig_mod",
        "pipeline",
        "unet",
        "model.diffusion_model",
        "dit",
    )
    return "".join(f"{rng.choice(words)}." for _ in range(rng.randrange(4)))


#: style -> (what is before a layer, how it is called, its halves' ends).
STYLES = {
    "peft": lambda rng: ("transformer.", str, ".lora_A.weight", ".lora_B.weight"),
    "kohya": lambda rng: ("lora_unet_", _flat, ".lora_down.weight", ".lora_up.weight"),
    "old": lambda rng: ("", str, ".lora.down.weight", ".lora.up.weight"),
    "stack": lambda rng: (_around(rng), str, ".lora_A.weight", ".lora_B.weight"),
    "bare halves": lambda rng: (_around(rng), str, ".lora_A", ".lora_B"),
    "linear layers": lambda rng: (_around(rng), str, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "Fun": lambda rng: ("lora_unet__", _flat, ".lora_down.weight", ".lora_up.weight"),
    "flat stack": lambda rng: (
        "lora_unet_" + _around(rng).replace(".", "_"),
        _flat,
        ".lora_down.weight",
        ".lora_up.weight",
    ),
    "wrapper": lambda rng: ("my_wrapper.net.", str, ".lora_A.weight", ".lora_B.weight"),
}
ADAPTERS = ("default", "my-style", "my style", "v1.5", "風景", "a.b.c", "up", "weight", "lora_B", "0")


def _good(state, rng, style):
    """A whole LoRA, and what it says: layer -> (down, up)."""
    tensors, said = {}, {}
    prefix, name, down_end, up_end = STYLES[style](rng)
    if style == "stack" and rng.random() < 0.5:
        adapter = rng.choice(ADAPTERS)
        down_end, up_end = f".lora_A.{adapter}.weight", f".lora_B.{adapter}.weight"
    for layer in rng.sample(LAYERS, rng.randrange(1, 4)):
        out, wide = state["shapes"][layer]
        rank = rng.choice((1, 4, 8))
        down, up = torch.randn(rank, wide) * 0.1, torch.randn(out, rank) * 0.1
        tensors |= {f"{prefix}{name(layer)}{down_end}": down, f"{prefix}{name(layer)}{up_end}": up}
        if style in ("kohya", "Fun", "flat stack"):
            tensors[f"{prefix}{name(layer)}.alpha"] = torch.tensor(float(rank))
        said[layer] = (down, up)
    return tensors, said


def _sat(rng):
    """A LoRA as SAT's trainer saves one, and what it says."""
    tensors, said, rank = {}, {}, rng.choice((1, 4, 8))
    prefix = rng.choice(("model.diffusion_model.", "", "module.model.diffusion_model."))
    for block in range(2):
        for path, layers in (("query_key_value", ("to_q", "to_k", "to_v")), ("dense", ("to_out.0",))):
            for number, layer in enumerate(layers):
                down, up = torch.randn(rank, 128) * 0.1, torch.randn(128, rank) * 0.1
                name = f"{prefix}transformer.layers.{block}.attention.{path}"
                tensors |= {f"{name}.matrix_A.{number}": down, f"{name}.matrix_B.{number}": up}
                said[f"transformer_blocks.{block}.attn1.{layer}"] = (down, up)
    return tensors, said, 1 / rank


#: Where trainers put the tensors in a pickle.
LAYOUTS = (
    lambda tensors: tensors,
    lambda tensors: {"lora": tensors, "epoch": 3},
    lambda tensors: {"model_state_dict": tensors, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    lambda tensors: {"model": {"state_dict": tensors}, "iteration": 1},
    lambda tensors: {"module": tensors, "rank": 0},
    lambda tensors: {"what I trained": {"at night": tensors}, "loss": 0.1},
)


def _clean(state, rng, folder):
    """A LoRA that is all right, in an unusual spelling, file or folder; it is to be taken as it was written."""
    style = rng.choice((*STYLES, "SAT"))
    tensors, said, scale = _sat(rng) if style == "SAT" else (*_good(state, rng, style), 1.0)
    items = list(tensors.items())
    rng.shuffle(items)
    tensors = dict(items)
    place = folder / rng.choice((".", "run", "run/checkpoint-500", "lora_weights/000500"))
    place.mkdir(parents=True, exist_ok=True)
    if rng.random() < 0.5:
        name = rng.choice(
            ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "mine.safetensors", "mine.sft")
        )
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, place / name)
    else:
        name = rng.choice(
            ("adapter_model.bin", "pytorch_lora_weights.bin", "mine.pt", "mine.ckpt", "mp_rank_00_model_states.pt")
        )
        torch.save(rng.choice(LAYOUTS)(tensors), place / name)
    path = place / name if rng.random() < 0.5 else folder

    def act():
        from cogvideox.checkpoint.headers import read_tensor
        from cogvideox.handles import with_lora

        pairs = with_lora(state["model"], path).loras[-1].pairs
        if set(pairs) != set(said):
            return f"other layers: {sorted(set(pairs) ^ set(said))}"
        for layer, (down, up) in said.items():
            pair = pairs[layer]
            if not (torch.equal(read_tensor(pair.down), down) and torch.equal(read_tensor(pair.up), up)):
                return f"another change of {layer}"
            if abs(pair.scale - scale) > 1e-12:
                return f"another scale of {layer}: {pair.scale} instead of {scale}"
        return None

    def judged():
        try:
            return act()
        except ValueError as error:
            return f"refused: {error}"

    return f"clean {style} {name} {'file' if path != folder else 'folder'}", judged


def case(state, rng, folder):
    torch.manual_seed(rng.randrange(2**31))
    if rng.random() < 0.15:
        return _clean(state, rng, folder)
    style = rng.choice(("peft", "kohya", "old", *STYLES, "SAT"))
    tensors, said = (_sat(rng) if style == "SAT" else _good(state, rng, style))[0], [style]
    metadata, config, damaged = {"format": "pt"}, None, False
    file = folder / "style.safetensors"
    kind = rng.choice(
        ("tensor",) * 6
        + ("alpha",) * 3
        + ("settings",) * 4
        + ("config",) * 3
        + ("header", "header", "bytes", "names", "names", "place", "pickle", "text")
    )
    name = rng.choice(list(tensors))
    if kind == "tensor":
        value = tensors[name].clone()
        what = rng.choice(
            (
                "nan",
                "inf",
                "dtype",
                "rank 0",
                "rank",
                "more",
                "less",
                "conv",
                "vector",
                "scalar",
                "empty",
                "transposed",
                "wide",
                "huge values",
                "complex",
                "3d",
                "5d",
            )
        )
        if what == "nan":
            value.view(-1)[rng.randrange(value.numel())] = float("nan")
        elif what == "inf":
            value.view(-1)[rng.randrange(value.numel())] = rng.choice((float("inf"), float("-inf")))
        elif what == "dtype":
            dtype = rng.choice(DTYPES)
            value = value.to(dtype)
            what = f"dtype {dtype}"
        elif what == "rank 0":
            for other in tensors:
                if tensors[other].ndim == 2:
                    is_down = any(word in other for word in ("lora_A", "down"))
                    tensors[other] = tensors[other][:0] if is_down else tensors[other][:, :0]
            value = tensors[name]
        elif what == "rank":
            value = torch.cat([value, value], dim=rng.choice((0, 1))) if value.ndim == 2 else value
        elif what == "conv":
            value = value[..., None, None] if rng.random() < 0.5 else torch.ones(*value.shape, 3, 3)
        elif what == "vector":
            value = value.flatten()
        elif what == "scalar":
            value = torch.tensor(1.0)
        elif what == "empty":
            value = torch.empty(0)
        elif what == "transposed":
            value = value.t().contiguous() if value.ndim == 2 else value
        elif what == "wide":
            value = torch.ones(value.shape[0] if value.ndim else 1, 3072)
        elif what == "huge values":
            value = value * rng.choice((1e20, 1e37, 1e-30))
        elif what == "complex":
            value = value.to(torch.complex64)
        elif what == "3d":
            value = value[None]
        elif what == "5d":
            value = value[None, None, None]
        elif what == "more":
            tensors |= {
                f"transformer.{rng.choice(('transformer_blocks.99.attn1.to_q', 'x', 'transformer_blocks.0.attn2.to_q'))}.lora_A.weight": torch.ones(
                    4, 128
                )
            }
        elif what == "less" and len(tensors) > 1:
            tensors.pop(rng.choice([other for other in tensors if other != name]))
        tensors[name] = value
        said.append(f"{short(name)} {what}")
    elif kind == "alpha":
        base = name.rsplit(".lora", 1)[0].rsplit(".alpha", 1)[0].rsplit(".matrix", 1)[0]
        number = rng.choice(NUMBERS)
        dtype = rng.choice(DTYPES)
        shape = rng.choice(((), (1,), (1, 1), (2,), (0,), (1, 0)))
        alpha = torch.full(shape, number if dtype.is_floating_point else 3).to(dtype)
        tensors[f"{base}.alpha"] = alpha
        damaged = not torch.isfinite(alpha.float()).all().item()
        said.append(f"alpha {number} {dtype} {shape}")
    elif kind == "names":
        new = rng.choice(
            [f"{bad}.lora_A.weight" for bad in NAMES]
            + list(NAMES)
            + [
                "transformer..lora_A.weight",
                ".lora_A.weight",
                "lora_unet_.lora_down.weight",
                "a.alpha",
                ".alpha",
                "transformer.transformer_blocks.0.attn1.to_q.lora_A.default.weight",
                "transformer.transformer_blocks.0.attn1.to_q.dora_scale",
                "text_encoder.x.lora_A.weight",
                "x.diff",
                "lokr_w1",
                "lora_unet_" + "_" * 30_000 + ".lora_down.weight",
                ("a." * 20_000) + "lora_A.weight",
                "down.down.down.weight",
                "." * 3000 + "down.weight",
            ]
        )
        try:
            new.encode()
        except UnicodeEncodeError:
            new = "\\ud800"
        tensors[new] = tensors.pop(name) if rng.random() < 0.5 else tensors[name].clone()
        said.append(f"named {short(new)}")
    elif kind == "settings":
        settings = {
            "transformer.lora_alpha": 8,
            "transformer.r": 4,
            "transformer.use_rslora": False,
            "transformer.alpha_pattern": {"to_q": 4},
        }
        if rng.random() < 0.7:
            key = rng.choice(list(settings))
            settings[key] = odd(rng)
            what = f"{key}={short(settings[key])}"
        else:
            settings, what = mutate_tree(rng, settings)
        if isinstance(settings, dict) and rng.random() < 0.2:
            settings["transformer.alpha_pattern"] = {
                rng.choice(("(", "[", "*", "(a+)+$", "(x*)*y", ".*" * 30 + "z", "to_q", "", "\\")): odd(rng)
            }
            what += f" pattern {short(settings['transformer.alpha_pattern'])}"
        try:
            text = dump(settings).decode("utf-8", "surrogateescape")
            text.encode()
        except UnicodeError:
            text = "{"
        metadata["lora_adapter_metadata"] = text
        said.append(f"metadata {what}")
    elif kind == "config":
        file = folder / "adapter_model.safetensors"
        config = {
            "lora_alpha": 8,
            "r": 4,
            "use_rslora": False,
            "alpha_pattern": {},
            "rank_pattern": {},
            "peft_type": "LORA",
            "target_modules": ["to_q"],
        }
        if rng.random() < 0.3:
            content, what = mutate_text(rng, dump(config))
        elif rng.random() < 0.6:
            key = rng.choice(
                (
                    "lora_alpha",
                    "r",
                    "use_rslora",
                    "use_dora",
                    "init_lora_weights",
                    "modules_to_save",
                    "rank_pattern",
                    "alpha_pattern",
                )
            )
            config[key] = rng.choice(
                (
                    odd(rng),
                    {"(": 3},
                    {"(a|a)*$": 1},
                    {"to_q": "8"},
                    {"to_q": None},
                    {"to_q": float("nan")},
                    {"to_q": [1]},
                    {"": 5},
                )
            )
            content, what = dump(config), f"{key}={short(config[key])}"
        else:
            tree, what = mutate_tree(rng, config)
            content = dump(tree)
        put(folder / "adapter_config.json", content)
        said.append(f"adapter_config {what}")
        if rng.random() < 0.1:
            said.append(replace_by(rng, folder / "adapter_config.json"))
    if kind == "pickle":
        file = folder / rng.choice(("style.pt", "style.ckpt", "style.bin", "style.gguf", "style.txt", "style"))
        odd_one = rng.choice(
            (
                lambda t: {k: v.t() for k, v in t.items() if v.ndim == 2},
                lambda t: [t],
                lambda t: {"lora": t, "lora_alpha": odd(rng)},
            )
        )
        torch.save(rng.choice((*LAYOUTS, odd_one, odd_one))(tensors), file)
        said.append(f"{file.name}")
    else:
        contiguous = {key: value.contiguous().clone() for key, value in tensors.items()}
        save_file(contiguous, file, metadata)
    if kind == "header":
        header, data = common.split(file)
        tree, what = mutate_tree(rng, header)
        put(file, common.joined(dump(tree), data))
        said.append(f"header {what}")
    elif kind == "text":
        header, data = common.split(file)
        text, what = mutate_text(rng, dump(header))
        put(file, common.joined(text, data))
        said.append(f"header text {what}")
    elif kind == "bytes":
        content, what = mutate_bytes(rng, file.read_bytes(), 900)
        put(file, content)
        said.append(f"bytes {what}")
    elif kind == "place":
        said.append(replace_by(rng, file))
    strength = rng.choice((1.0, 1.0, 1.0, 0.0, -1.0, 1e30, 1e308, 1e-300))
    path = file if rng.random() < 0.8 else folder
    model = state["safe"] if rng.random() < 0.3 else state["model"]
    ran = rng.random() < 0.6

    def act():
        from cogvideox.checkpoint.catalogue import list_parts
        from cogvideox.handles import with_lora

        list_parts("lora", [folder])
        changed = with_lora(model, path, strength)
        changed.loras[-1].text, changed.loras[-1].nbytes
        scales = [pair.scale for pair in changed.loras[-1].pairs.values()]
        if not all(isinstance(scale, (int, float)) for scale in scales):
            return f"a scale is no number: {scales}"
        if ran:
            handles = state["handles"].__class__(**{**vars(state["handles"]), "model": changed})
            result = common.sample_once(handles, 1)
            if not result.isfinite().all():
                return "the result is not finite"
            if damaged and strength:
                return "an alpha that is not finite was taken, and the run goes on"
        elif not all(abs(scale) < float("inf") for scale in scales):
            return f"a scale that is not finite is taken without a word: {scales}"
        return None

    return " ".join(said) + f" strength {strength}", act
