"""6 and 7. The nodes: what comes over their sockets (LATENT, IMAGE, CONDITIONING) and every value of every widget,
queued and run.

Labels begin with ``queue`` (VALIDATE_INPUTS, IS_CHANGED), ``widget`` (run with one widget's value odd) or ``socket``. A
value of another type than the widget's can only come over a link, as ComfyUI casts what is typed in: such labels hold
``(type)``.
"""

import torch
from mutate import odd, short

from . import common

NAME = "nodes_inputs"
nan, inf = float("nan"), float("inf")
WIDGETS = [None, True, False, 0, 1, -1, 2, 15, 16, 17, 31, 48, 49, 80, 81, 2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.0, 0.5, 0.999, 1.0, 1.5, 6.0, -1.0, 1e-320, 1e308, nan, inf, -inf, "", "auto", "abc", "1", "16", "0.5", "é\x00", "\ud800", "../../etc/passwd", "/dev/zero", "/", ".", "a" * 5000, [], [1], {}, (), b"x", object()]  # fmt: skip


def prepare(base):
    from tests.conftest import load_pack

    state = common.build(base)
    pack = load_pack()
    state["nodes"] = pack.NODE_CLASS_MAPPINGS
    state["paths"] = {"t2v": str(base / "folder")}
    from tests.tiny_checkpoint import build_checkpoint

    if not (base / "i2v").exists():
        build_checkpoint(base / "i2v", "1.5-i2v")
    from safetensors.torch import save_file

    lora = base / "lora.safetensors"
    if not lora.exists():
        save_file(
            {
                "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 128) * 0.01,
                "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(128, 2) * 0.01,
            },
            lora,
        )
    state["lora"] = str(lora)
    state["good"] = good = {}
    good["model"], good["text_encoder"], good["vae"], _ = call(
        state, "ModelLoader", model=str(base / "folder"), dtype="fp32"
    )
    state["i2v"] = call(state, "ModelLoader", model=str(base / "i2v"), dtype="fp32")[0]
    (good["positive"],) = call(state, "TextEncode", text_encoder=good["text_encoder"], prompt="a panda")
    good["negative"] = good["positive"]
    (good["latent_image"],) = call(state, "EmptyLatent", width=16, height=16, length=1)
    good["samples"] = {"samples": torch.full((1, 16, 1, 2, 2), 0.3)}
    good["images"] = torch.full((1, 16, 16, 3), 0.5)
    good["start_image"] = good["first"] = good["second"] = good["images"]
    values = {
        "prompt": "a panda",
        "width": 16,
        "height": 16,
        "length": 1,
        "batch_size": 1,
        "seed": 1,
        "steps": 1,
        "cfg": 6.0,
        "scheduler": "ddim",
        "denoise": 1.0,
        "lora_name": str(lora),
        "attention": "auto",
        "action": "pass",
    }
    good |= values
    call(
        state,
        "Sampler",
        **{
            n: good[n]
            for n in ("model", "positive", "negative", "latent_image", "seed", "steps", "cfg", "scheduler", "denoise")
        },
    )
    call(state, "VAEDecode", samples=good["samples"], vae=good["vae"])
    call(state, "VAEEncode", images=good["images"], vae=good["vae"])
    state["specs"] = {}
    for name, node in state["nodes"].items():
        types = node.INPUT_TYPES()
        state["specs"][name] = types["required"] | types.get("optional", {})
    return state


def call(state, name, **values):
    node = state["nodes"][f"CogVideoX15{name}"]()
    return getattr(node, node.FUNCTION)(**values)


def _default(state, node, name, spec):
    special = {
        ("ModelLoader", "model"): state["paths"]["t2v"],
        ("Compile", "mode"): "default",
        ("Cache", "method"): "first_block",
        ("Quantize", "method"): "int8_weight_only",
        ("Downloader", "download"): False,
        ("ContextWindows", "length"): 81,
        ("Extend", "length"): 81,
    }
    if (node, name) in special:
        return special[node, name]
    if name in state["good"]:
        return state["good"][name]
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    return options.get("default", kind[0] if isinstance(kind, list) and kind else None)


def _is_widget(spec):
    return isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN")


def _fits(spec, value):
    """Whether a widget can hold it: what ComfyUI casts to the type, within the limits it checks itself."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    if isinstance(kind, list):
        return isinstance(value, str)
    fits = {
        "INT": lambda: type(value) is int,
        "FLOAT": lambda: type(value) in (int, float),
        "STRING": lambda: isinstance(value, str),
        "BOOLEAN": lambda: isinstance(value, bool),
    }[kind]()
    return fits and not (
        kind in ("INT", "FLOAT") and not options.get("min", value) <= value <= options.get("max", value)
    )


# --- Sockets ------------------------------------------------------------------


def _tensor(rng, shape, said):
    """A tensor of a shape, in one of many states."""
    what = rng.choice(
        (
            "plain",
            "plain",
            "zeros",
            "nan",
            "inf",
            "uint8",
            "int64",
            "float64",
            "fp16",
            "bf16",
            "fp8",
            "complex",
            "bool",
            "grad",
            "strided",
            "expanded",
            "meta",
            "huge values",
            "negative",
            "sparse",
            "subclass",
            "denormal",
            "inference",
            "quantized",
            "inf minus",
        )
    )
    said.append(f"{list(shape)} {what}")
    if what == "meta":
        return torch.empty(shape, device="meta")
    if what == "expanded" and 0 not in shape:
        return torch.full([1] * len(shape), 0.5).expand(shape)
    numel = 1
    for size in shape:
        numel *= size
    if numel > 30_000_000:
        return torch.full([1] * len(shape), 0.5).expand(shape)
    value = torch.full(shape, 0.5)
    if what == "zeros":
        return torch.zeros(shape)
    if what in ("nan", "inf", "inf minus") and numel:
        value = value.clone()
        value.view(-1)[rng.randrange(numel)] = {"nan": nan, "inf": inf, "inf minus": -inf}[what]
    dtypes = {
        "uint8": torch.uint8,
        "int64": torch.int64,
        "float64": torch.float64,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp8": torch.float8_e4m3fn,
        "complex": torch.complex64,
        "bool": torch.bool,
    }
    if what in dtypes:
        return value.mul(200).to(dtypes[what]) if what == "uint8" else value.to(dtypes[what])
    if what == "grad":
        return value.requires_grad_()
    if what == "strided" and len(shape):
        return torch.full([*shape[:-1], shape[-1] * 2], 0.5)[..., ::2]
    if what == "huge values":
        return value * 1e38
    if what == "negative":
        return -value
    if what == "sparse":
        return value.to_sparse()
    if what == "subclass":
        return torch.nn.Parameter(value)
    if what == "denormal":
        return value * 1e-44
    if what == "inference":
        with torch.inference_mode():
            return torch.full(shape, 0.5)
    if what == "quantized":
        return torch.quantize_per_tensor(value, 0.1, 0, torch.quint8)
    return value


def _no_tensor(rng, said):
    value = rng.choice(
        (
            None,
            3,
            "x",
            [],
            {},
            [torch.ones(3)],
            (1, 2),
            True,
            __import__("numpy").ones((1, 16, 16, 3)),
            torch.nn.Linear(1, 1),
        )
    )
    said.append(f"no tensor: {type(value).__name__}")
    return value


def _latent(rng, said):
    shape = rng.choice(
        ((1, 16, 1, 2, 2),) * 6
        + (
            (2, 16, 3, 2, 4),
            (1, 4, 2, 2),
            (1, 16, 2, 2),
            (16, 1, 2, 2),
            (),
            (1,),
            (0, 16, 1, 2, 2),
            (1, 16, 0, 2, 2),
            (1, 16, 1, 0, 2),
            (1, 16, 1, 3, 3),
            (1, 16, 1, 1, 1),
            (1, 32, 1, 2, 2),
            (1, 16, 1, 2, 2, 1),
            (1, 16, 1, 2, 3),
            (1, 16, 2, 2, 2),
            (1, 16, 4, 2, 2),
            (1, 16, 1, 2**20, 2**20),
            (2**40, 16, 1, 2, 2),
            (1, 16, 2**31, 2, 2),
        )
    )
    samples = _tensor(rng, shape, said) if rng.random() < 0.9 else _no_tensor(rng, said)
    latent = {"samples": samples}
    what = rng.random()
    if what < 0.1:
        latent = rng.choice(
            (None, [], {}, {"sample": samples}, samples, [latent], "x", (latent,), {"samples": {"samples": samples}})
        )
        said.append(f"LATENT is {type(latent).__name__} {list(latent)[:1] if isinstance(latent, dict) else ''}")
    elif what < 0.2:
        latent["noise_mask"] = rng.choice((torch.ones(1, 2, 2), None, 3, "x"))
        latent["batch_index"] = odd(rng)
    return latent


def _images(rng, said):
    shape = rng.choice(
        ((1, 16, 16, 3),) * 6
        + (
            (5, 16, 32, 3),
            (17, 16, 16, 3),
            (0, 16, 16, 3),
            (1, 0, 16, 3),
            (1, 16, 0, 3),
            (1, 16, 16, 0),
            (1, 16, 16, 4),
            (1, 16, 16, 1),
            (1, 16, 16, 2),
            (1, 3, 16, 16),
            (16, 16, 3),
            (1, 1, 16, 16, 3),
            (),
            (3,),
            (1, 15, 15, 3),
            (1, 1, 1, 3),
            (1, 17, 33, 3),
            (2, 16, 16, 3),
            (1, 16, 1, 3),
            (1, 2**15, 2**15, 3),
            (2**40, 16, 16, 3),
            (1, 10_000, 1, 3),
            (1, 1, 10_000, 3),
        )
    )
    return _tensor(rng, shape, said) if rng.random() < 0.93 else _no_tensor(rng, said)


def _conditioning(rng, said):
    shape = rng.choice(
        ((1, 226, common.TEXT_WIDTH),) * 6
        + (
            (1, 0, common.TEXT_WIDTH),
            (0, 226, common.TEXT_WIDTH),
            (2, 226, common.TEXT_WIDTH),
            (1, 226, 4096),
            (226, common.TEXT_WIDTH),
            (1, 1, common.TEXT_WIDTH),
            (1, 300, common.TEXT_WIDTH),
            (),
            (1, 226, common.TEXT_WIDTH, 1),
            (1, 77, 768),
        )
    )
    embeddings = _tensor(rng, shape, said) if rng.random() < 0.9 else _no_tensor(rng, said)
    extra = rng.choice(
        ({},) * 4
        + (
            None,
            [],
            "x",
            {"pooled_output": None},
            {"concat_latent_image": torch.zeros(1, 16, 1, 2, 2)},
            {"concat_latent_image": odd(rng)},
            {"concat_latent_image": _tensor(rng, (1, 16, 1, 2, 2), said)},
            {"concat_latent_image": torch.zeros(1, 16, 1, 4, 4)},
            {"concat_latent_image": torch.zeros(2, 16, 1, 2, 2)},
            {"concat_latent_image": None},
        )
    )
    entry = [embeddings, extra]
    given = rng.choice(
        ([entry],) * 8
        + (
            [],
            None,
            [[]],
            [[embeddings]],
            [None],
            entry,
            [entry, entry],
            [(embeddings, extra)],
            (entry,),
            {"a": entry},
            "x",
            [[None, {}]],
            [[entry]],
            [entry[::-1]],
            embeddings,
        )
    )
    said.append(
        f"CONDITIONING {type(given).__name__} of "
        f"{len(given) if hasattr(given, '__len__') and not isinstance(given, torch.Tensor) else '-'}, extra "
        f"{short(extra)[:40] if not isinstance(extra, dict) else list(extra)}"
    )
    return given


SOCKETS = {
    "Sampler": (("latent_image", _latent), ("positive", _conditioning), ("negative", _conditioning)),
    "VAEDecode": (("samples", _latent),),
    "VAEEncode": (("images", _images),),
    "ImageToVideo": (
        ("start_image", _images),
        ("end_image", _images),
        ("positive", _conditioning),
        ("negative", _conditioning),
    ),
    "BlackFrameCheck": (("images", _images),),
    "Extend": (("images", _images), ("positive", _conditioning), ("negative", _conditioning)),
    "JoinClips": (("first", _images), ("second", _images)),
}
#: A handle's socket given something else.
WRONG = (None, 3, "x", {}, [])


def case(state, rng, folder):
    kind = rng.choice(("queue",) * 4 + ("widget",) * 6 + ("socket",) * 8 + ("handle",))
    if kind in ("queue", "widget"):
        full = rng.choice(list(state["specs"]))
        node, specs = full.removeprefix("CogVideoX15"), state["specs"][full]
        widgets = [name for name, spec in specs.items() if _is_widget(spec)]
        values = {
            name: _default(state, node, name, spec)
            for name, spec in specs.items()
            if name in state["good"] or _is_widget(spec)
        }
        some = rng.sample(widgets, min(len(widgets), rng.choice((1, 1, 1, 2)))) if widgets else []
        strange = False
        for name in some:
            values[name] = rng.choice(WIDGETS) if rng.random() < 0.9 else odd(rng)
            if name == "download":
                values[name] = rng.choice((False, None, 0, ""))
            if name == "steps" and isinstance(values[name], (int, float)) and 20 < values[name] <= 1000:
                values[name] = 3
            strange |= not _fits(specs[name], values[name])
        said = (
            f"{kind} {node} {', '.join(f'{name}={short(values[name])}' for name in some)}{' (type)' if strange else ''}"
        )
        cls = state["nodes"][full]

        def act():
            if kind == "queue":
                import inspect

                if hasattr(cls, "VALIDATE_INPUTS"):
                    takes = inspect.signature(cls.VALIDATE_INPUTS).parameters
                    answer = cls.VALIDATE_INPUTS(
                        **{name: value for name, value in values.items() if name in takes and name in some}
                    )
                    if answer is not True and not (isinstance(answer, str) and len(answer) >= 40):
                        return f"VALIDATE_INPUTS answers {answer!r}"
                    answer = cls.VALIDATE_INPUTS(**{name: value for name, value in values.items() if name in takes})
                if hasattr(cls, "IS_CHANGED"):
                    cls.IS_CHANGED(**{name: value for name, value in values.items() if _is_widget(specs[name])})
                return None
            result = call(state, node, **values)
            return _sound(node, result)

        return said, act
    node = rng.choice(list(SOCKETS))
    said = [f"socket {node}"]
    full = f"CogVideoX15{node}"
    values = {
        name: _default(state, node, name, spec)
        for name, spec in state["specs"][full].items()
        if name in state["good"] or _is_widget(spec)
    }
    if kind == "handle":
        full = rng.choice(
            [name for name, specs in state["specs"].items() if any(not _is_widget(spec) for spec in specs.values())]
        )
        node = full.removeprefix("CogVideoX15")
        values = {
            name: _default(state, node, name, spec)
            for name, spec in state["specs"][full].items()
            if name in state["good"] or _is_widget(spec)
        }
        name = rng.choice([name for name, spec in state["specs"][full].items() if not _is_widget(spec)])
        values[name] = rng.choice((*WRONG, state["good"]["vae"], state["good"]["model"], state["good"]["text_encoder"]))
        said = [f"handle {node} {name} is {type(values[name]).__name__}"]
    else:
        for name, make in SOCKETS[node]:
            if rng.random() < 0.6 or len(SOCKETS[node]) == 1:
                said.append(f"{name}:")
                values[name] = make(rng, said)
    if node == "Sampler" and kind != "handle":
        if rng.random() < 0.3:
            values["model"] = state["i2v"]
            said.append("i2v model")
        values["denoise"] = rng.choice((1.0, 1.0, 0.5))
        values["steps"] = 2

    def act():
        given = {
            name: value.clone()
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
            and not value.is_sparse
            and value.device.type != "meta"
            and value.numel() < 10**6
        }
        result = call(state, node, **values)
        for name, value in given.items():
            if not torch.equal(
                value.float().nan_to_num()
                if value.is_floating_point()
                else value.dequantize()
                if value.is_quantized
                else value,
                values[name].float().nan_to_num()
                if value.is_floating_point()
                else values[name].dequantize()
                if value.is_quantized
                else values[name],
            ):
                return f"{node} changed what it was given: {name}"
        return _sound(node, result)

    return " ".join(said), act


def _sound(node, result):
    result = result["result"] if isinstance(result, dict) else result
    if node == "Sampler" and not result[0]["samples"].isfinite().all():
        return "the sampler's latents are not finite"
    if node == "VAEDecode" and not (
        result[0].isfinite().all()
        and result[0].min() >= 0
        and result[0].max() <= 1
        and result[0].dtype == torch.float32
    ):
        return "the frames are not finite in 0..1"
    if node == "VAEEncode" and not result[0]["samples"].isfinite().all():
        return "the latents are not finite"
    return None
