"""Workflows of VideoX-Fun's own nodes for CogVideoX-Fun-V1.5-InP, made into this pack's.

There one sampler reads the prompts, sizes and encodes the pictures, makes the video and decodes it; here these are a
node each. One file, as all that a sampler does hangs together. Its nodes have nothing of a cache, and nothing of
guidance in a part of the steps.
"""

import re
from collections.abc import Iterator

from cogvideox.choices import COMPILE_DEFAULT
from cogvideox.words import short

from . import tables
from .conversion import is_1_5
from .graph import PASSING, Node, Wire
from .kinds import KINDS
from .samplers import MAX_FRAMES, Samplers
from .workflow import BYPASSED, OURS

#: Height and width of the sizes that VideoX-Fun chooses from at base_resolution 512, by their ratio as it is written
#: there (``ASPECT_RATIO_512`` in videox_fun/data/bucket_sampler.py of aigc-apps/VideoX-Fun 804a425).
_BUCKETS = {
    **{"0.25": (256, 1024), "0.26": (256, 992), "0.27": (256, 960), "0.28": (256, 928), "0.32": (288, 896)},
    **{"0.33": (288, 864), "0.35": (288, 832), "0.4": (320, 800), "0.42": (320, 768), "0.48": (352, 736)},
    **{"0.5": (352, 704), "0.52": (352, 672), "0.57": (384, 672), "0.6": (384, 640), "0.68": (416, 608)},
    **{"0.72": (416, 576), "0.78": (448, 576), "0.82": (448, 544), "0.88": (480, 544), "0.94": (480, 512)},
    **{"1.0": (512, 512), "1.07": (512, 480), "1.13": (544, 480), "1.21": (544, 448), "1.29": (576, 448)},
    **{"1.38": (576, 416), "1.46": (608, 416), "1.67": (640, 384), "1.75": (672, 384), "2.0": (704, 352)},
    **{"2.09": (736, 352), "2.4": (768, 320), "2.5": (800, 320), "2.89": (832, 288), "3.0": (864, 288)},
    **{"3.11": (896, 288), "3.62": (928, 256), "3.75": (960, 256), "3.88": (992, 256), "4.0": (1024, 256)},
}
#: The least and the largest base_resolution whose area Scale Image to Total Pixels makes.
_BASES = 128, 4096
_STEP = 16
#: Nodes that give the model that they are given, changed: theirs and ours.
_CHANGES_MODEL = {
    *(*tables.FUN_LORAS, "FunCompile", "FunAttention"),
    *(
        name
        for name, kind in KINDS.items()
        if kind.outputs[0][1] == "COGVIDEOX_MODEL" and any(entry.type == "COGVIDEOX_MODEL" for entry in kind.inputs)
    ),
}
_OUR_MODEL = "CogVideoX-Fun-V1.5-5b-InP"
#: Ways to keep the weights in GPU_memory_mode, and what low_gpu_memory_mode said before there was that.
_SEQUENTIAL, _OFFLOAD, _FULL, _QUANTIZED = (
    "sequential_cpu_offload",
    "model_cpu_offload",
    "model_full_load",
    "_and_qfloat8",
)


class VideoXFun(Samplers):
    """The conversion of VideoX-Fun's nodes: each of its samplers becomes Inpaint, Sampler and VAE Decode.

    Attributes:
        fun_samplers: its samplers.
    """

    def __init__(self, *given):
        super().__init__(*given)
        self.fun_samplers = [node for node in self.old.values() if node.kind in tables.VIDEOX_FUN_SAMPLERS]
        self.old |= {node.id: node for node in self._serving()}
        #: A node that changes the model -> where that begins.
        self.begins_at: dict[object, Node | None] = {}
        #: (Text box, text encoder) -> the encoded prompt.
        self.encoded: dict[tuple, Wire] = {}
        #: Sampler -> the id of the VAE Decode that is made for it.
        self.decoders: dict[object, object] = {}
        for node in self.old.values():
            if node.kind in tables.FUN_SHARED:
                node.values = self.graph.widgets(node, tables.FUN_SHARED[node.kind])
            if node.kind in (*tables.FUN_LORAS, "FunCompile", "FunAttention"):
                self.outputs[node.id, 0] = Wire(node.id, 0)
            elif node.kind in tables.VIDEOX_FUN_SAMPLERS:
                self.decoders[node.id] = self.graph.new_id()
                self.outputs[node.id, 0] = Wire(self.decoders[node.id], 0)
        for node in self.old.values():
            if node.kind in ("FunAttention", "FunCompile") and self._without_effect(node):
                self.graph.pass_on(node, 0, node.wires.get("funmodels"))

    def _without_effect(self, node: Node) -> bool:
        """Whether FunAttention or FunCompile is nothing here: an attention that gives the same, and what that pack left
        out itself."""
        if node.kind == "FunAttention":
            return node.values.get("attention_type") != "sage"
        loader = self.fun_loader_of(node)
        return loader is not None and _asked_mode(loader) == _SEQUENTIAL

    def _serving(self) -> list[Node]:
        """The nodes of VideoX-Fun's that serve all its models, and here serve CogVideoX alone."""
        shared = {id_ for id_, node in self.nodes.items() if node.kind in tables.FUN_SHARED}
        #: What each node takes of them, also of one that is switched off, and how many others than ours take them.
        taken: dict[object, set] = {}
        outside = dict.fromkeys(shared, 0)
        for node in self.nodes.values():
            if node.kind not in PASSING:
                wires = [each for wire in node.wires.values() for each in (wire, self.graph.origin(wire))]
                taken[node.id] = {wire.node for wire in wires if wire is not None} & shared
                for id_ in taken[node.id] if node.id not in self.old else ():
                    outside[id_] += 1
        used = {id_ for ids in taken.values() for id_ in ids}
        found, todo = [], [id_ for id_ in self.nodes if id_ in used and not outside[id_]]
        while todo:
            found.append(self.nodes[todo.pop()])
            for id_ in taken[found[-1].id]:
                outside[id_] -= 1
                if not outside[id_]:
                    todo.append(id_)
        return found

    # --- The model ---

    def fun_model_wire(self, node: Node) -> Wire | None:
        return node.wires.get("cogvideoxfun_model") or node.wires.get("funmodels") or node.wires.get("model")

    def fun_loader_of(self, sampler: Node) -> Node | None:
        """What the model of a sampler begins at: a loader, or a node that is not known."""
        node = self.graph.trace(self.fun_model_wire(sampler))
        way: dict[object, None] = {}
        while node is not None and node.kind in _CHANGES_MODEL:
            if node.id in way or node.id in self.begins_at:
                node = self.begins_at.get(node.id)
                break
            way[node.id] = None
            node = self.graph.trace(self.fun_model_wire(node))
        self.begins_at |= dict.fromkeys(way, node)
        return node

    def fun_not_here(self, sampler: Node) -> Iterator[tuple[str, Node, str]]:
        """As ``not_here``, of a sampler of VideoX-Fun."""
        loader = self.fun_loader_of(sampler)
        # Ours the page may have put in the place of theirs.
        if loader is None or loader.kind == OURS:
            return
        if loader.kind not in tables.FUN_LOADERS:
            yield (
                f"a model from a loader that is not known here, {short(loader.kind)}",
                loader,
                "Put Load CogVideoX-Fun Model in its place",
            )
            return
        name = self.asked(loader)
        if re.search(tables.FUN_CONTROL, name, re.IGNORECASE) or loader.values.get("model_type") == "Control":
            yield (
                f"a model that reads a control video, {short(name)}, which this pack does not run",
                loader,
                f"Choose {_OUR_MODEL} and Inpaint there",
            )
        elif not is_1_5(name):
            yield (
                f"{short(name)}, an inpainting model of CogVideoX 1.0, of which this pack runs V1.5 alone",
                loader,
                f"Choose {_OUR_MODEL} there",
            )

    def fun_loader(self, node: Node) -> None:
        asked = self.asked(node)
        self.setting(node, "model", str, "")
        folder = asked.replace("\\", "/")
        values = {"model": folder, "dtype": self.dtype(node, asked)}
        if asked:
            self.say(
                node,
                f"the model is looked for as models/CogVideo/{short(folder)}. Move its folder there from "
                "models/Fun_Models, models/CogVideoX_Fun or models/VideoX_Fun.",
            )
        else:
            self.say(node, f"no model is chosen. Choose {_OUR_MODEL}.")
        mode = self._memory_mode(node)
        if mode == _SEQUENTIAL:
            values["memory"] = "offload_layers"
            self.say(
                node,
                "GPU_memory_mode sequential_cpu_offload became memory offload_layers. Try auto: the same video, in the "
                "fastest way that fits your card.",
            )
        new = self.make(OURS, node, values, {})
        model = Wire(new.id, 0)
        if mode == _OFFLOAD + _QUANTIZED:
            method = {"method": "fp8_weight_only"}
            model = Wire(self.make("CogVideoX15Quantize", node, method, {"model": model}, own_id=False).id, 0)
            self.say(
                node,
                f"{mode} became the node CogVideoX-1.5 Quantize with fp8_weight_only, whose weights are nearer to the "
                "original: each row has a scale.",
            )
        elif mode == _FULL + _QUANTIZED:
            # Of CogVideoX that mode only wraps the layers, whose weights are in the chosen dtype by then.
            self.say(
                node,
                f"{mode} left CogVideoX's weights as they are, and so it is here. CogVideoX-1.5 Quantize makes them "
                "smaller.",
            )
        self.outputs[node.id, 0] = model

    def _memory_mode(self, node: Node) -> str:
        """How a loader keeps the weights, once it is said."""
        mode = _asked_mode(node)
        if mode.removesuffix(_QUANTIZED) not in (_SEQUENTIAL, _OFFLOAD, _FULL):
            self.say(node, f"GPU_memory_mode {short(mode)} is not known here: memory auto was taken.")
            return _OFFLOAD
        if mode != _SEQUENTIAL:
            self.not_needed.append(f"{node.where}: {mode} (memory auto takes the fastest way that fits the card)")
        return mode

    def fun_lora(self, node: Node) -> None:
        wires = {"model": self.resolve(self.fun_model_wire(node))}
        values = {"lora_name": self.setting(node, "lora_name", str, "").replace("\\", "/")}
        given = self.setting(node, "strength_model", (int, float), 1.0)
        strength = self.limited(node, "strength", given, KINDS["CogVideoX15LoraLoader"].limits("strength"))
        self.keep(node, "strength_model", strength, wires, values, "strength")
        self.make("CogVideoX15LoraLoader", node, values, wires)

    def fun_faster(self, node: Node) -> None:
        """FunCompile and FunAttention."""
        if (node.id, 0) in self.graph.passed:
            self.told.add(node.id)
            if node.kind == "FunAttention":
                kind = short(node.values.get("attention_type", "flash"))
                self.not_needed.append(f"{node.where}: attention_type {kind} (PyTorch's own gives the same)")
            else:
                self.say(node, "left out: with sequential_cpu_offload nothing was compiled there either.")
            return
        wires = {"model": self.resolve(self.fun_model_wire(node))}
        if node.kind == "FunAttention":
            self.make("CogVideoX15Attention", node, {"attention": "sage"}, wires)
        else:
            self.make("CogVideoX15Compile", node, {"mode": COMPILE_DEFAULT}, wires)

    def say_kept(self) -> None:
        """Name the nodes that stay and come from VideoX-Fun."""
        for node in self.others:
            if node.kind in (*tables.FUN_PICTURES, *tables.FUN_SHARED) and node.kind != "TextBox":
                self.say(
                    node, f"it stays as it is, and is one of {tables.FUN_PACK}'s: keep that pack installed for it."
                )

    # --- The sampler ---

    def fun_sampler(self, node: Node) -> None:
        loader = self.fun_loader_of(node)
        values, wires = self._fun_size(node)
        length, link = self._fun_length(node)
        new = wires | link | self._fun_pictures(node)
        for ours, theirs in (("positive", "prompt"), ("negative", "negative_prompt")):
            new[ours] = self._fun_prompt(node, theirs, loader)
        vae = None if loader is None else Wire(loader.id, 2)
        settings, links = self.numbers(node)
        links["model"] = self.resolve(self.fun_model_wire(node))
        settings["scheduler"] = self._fun_scheduler(node)
        if node.kind in tables.FUN_FROM_VIDEO:
            denoise = self.setting(node, "denoise_strength", (int, float), 1.0)
            self.keep(node, "denoise_strength", min(max(denoise, 0.0), 1.0), links, settings, "denoise")
        inpaint = self.make("CogVideoX15Inpaint", node, values | length, new | {"vae": vae}, own_id=False)
        links |= {name: Wire(inpaint.id, slot) for slot, name in enumerate(("positive", "negative", "latent_image"))}
        sampler = self.make("CogVideoX15Sampler", node, settings, links)
        decoder = {"samples": Wire(sampler.id, 0), "vae": vae}
        self.make("CogVideoX15VAEDecode", node, {}, decoder, id_=self.decoders[node.id])
        self.say(
            node,
            "a seed's noise was drawn on the card there and is drawn on the CPU here: the same seed gives another "
            "video, and the same one on every computer.",
        )
        if node.raw.get("mode") == BYPASSED:
            self.say(node, "it is bypassed, and passed a picture on; the nodes in its place pass none on.")

    def _fun_prompt(self, node: Node, name: str, loader: Node | None) -> Wire | None:
        """The encoded prompt of a sampler: one for all that ask the same text of the same loader."""
        encoder = None if loader is None else Wire(loader.id, 1)
        wire = node.wires.get(name)
        box = self.graph.trace(wire)
        # A file that a program wrote may have the text itself.
        text = node.values.get(name)
        if (box is None or wire is None) and not isinstance(text, str):
            return None
        key = text if box is None else box.id, encoder
        if key not in self.encoded:
            values, wires = {}, {"text_encoder": encoder}
            if box is None or wire is None:
                values["prompt"] = text
            elif box.kind in tables.FUN_TEXT:
                held = Node(box.id, box.kind, self.graph.widgets(box, ("prompt",)), box.wires, box.raw)
                self.keep(held, "prompt", self.setting(held, "prompt", str, ""), wires, values)
            else:
                self.say(node, f"{name} comes from {box.where}: see that what it gives is a text.")
                wires["prompt"] = self.resolve(wire)
            self.look_at_prompt(node, values.get("prompt") or "")
            in_place = box is not None and box.id in self.old
            place = box if in_place and box is not None else node
            new = self.make("CogVideoX15TextEncode", place, values, wires, own_id=in_place)
            self.encoded[key] = Wire(new.id, 0)
        now = self.encoded[key]
        return now if wire is None or box is None or box.id not in self.old else self.through(wire, box, now)

    def _fun_scheduler(self, node: Node) -> str:
        name = self.setting(node, "scheduler", str, "DDIM")
        if name in tables.FUN_SCHEDULERS:
            return tables.FUN_SCHEDULERS[name]
        return self.near_scheduler(node, name, "ddim_origin")

    # --- Pictures, size and length ---

    def _fun_pictures(self, node: Node) -> dict[str, Wire | None]:
        """What Inpaint is given beside prompts and size."""
        found = {}
        for ours, theirs in (("start_image", "start_img"), ("end_image", "end_img"), ("video", "validation_video")):
            wire = node.wires.get(theirs)
            source = self.graph.trace(wire)
            found[ours] = self.resolve(wire)
            if source is not None and ours != "video" and source.kind not in ("LoadImage", *tables.RESIZERS):
                self.say(
                    node, f"if {theirs} brings several pictures: all of them were kept there, and here the first is."
                )
        if node.kind in tables.FUN_FROM_VIDEO:
            self.say(
                node,
                "a clip that is shorter than length gave a video as short there; here its last frame is repeated. Set "
                "length to what it has.",
            )
        if self.graph.trace(node.wires.get("control_video")) is not None:
            self.say(node, "control_video was left out: a model of the type Inpaint does not read it.")
        return found

    def _fun_length(self, node: Node) -> tuple[dict, dict]:
        """``length`` as a value and, where it came over a link, as a wire."""
        self.settled |= {(node.id, "video_length"), (node.id, "is_image")}
        if "is_image" in node.wires:
            self.say(node, "is_image came over a link, which is no more: set length to 1 for a picture.")
        if self.setting(node, "is_image", bool, False):
            return {"length": 1}, {}
        wire = node.wires.get("video_length")
        given = self.setting(node, "video_length", int, 49) if wire is None else self.constant(wire)
        if type(given) is not int:
            self.say(node, "video_length came over a link and is length now: what arrives there must be 8N+5.")
            return {"length": fun_length(self.setting(node, "video_length", int, 49))}, {"length": self.resolve(wire)}
        length = fun_length(given)
        if length == given:
            return {"length": length}, {"length": self.resolve(wire)}
        self.say(
            node,
            f"video_length {short(given)} became length {length}: as many frames came out there, where latent frames "
            "were cut to an even number." + (" It came over a link, which was cut." if wire else ""),
        )
        return {"length": length}, {}

    def _fun_size(self, node: Node) -> tuple[dict, dict]:
        """``width`` and ``height``, as values and, where a picture or a link decides them, as wires."""
        if node.kind in tables.FUN_FROM_TEXT:
            return self._given_size(node)
        base = self._base(node)
        name = "validation_video" if node.kind in tables.FUN_FROM_VIDEO else "start_img"
        source = self.graph.trace(node.wires.get(name))
        width, height = bucket(base, 672, 384)
        if source is None:
            self.say(
                node,
                f"{name} is not connected, without which that node stopped: the video is made of the text alone, "
                f"{width}x{height}. Connect it.",
            )
            return {"width": width, "height": height}, {}
        order, _ = tables.RESIZERS.get(source.kind, ((), False))
        known = self.resized_to(source, order) if order else None
        if known is not None:
            width, height = bucket(base, *known)
            return {"width": width, "height": height}, {}
        self.say(
            node,
            f"of VideoX-Fun's sizes for base_resolution {base} the nearest in shape to {name} was taken (of 16:9 "
            f"{width}x{height}), and the picture stretched to it. How large that picture is does not stand in the "
            "file: here Scale Image to Total Pixels and Get Image Size give as many pixels in the picture's own shape. "
            "For one of those sizes, take the links of width and height away and set them.",
        )
        wire = self.resolve(node.wires[name])
        if name == "validation_video":
            wire = Wire(self.make("ImageFromBatch", node, {}, {"image": wire}, own_id=False).id, 0)
        megapixels = {"megapixels": round(base * base / 1024**2, 4), "resolution_steps": _STEP}
        scaled = self.make("ImageScaleToTotalPixels", node, megapixels, {"image": wire}, own_id=False)
        size = self.make("GetImageSize", node, {}, {"image": Wire(scaled.id, 0)}, own_id=False)
        return {"width": width, "height": height}, {"width": Wire(size.id, 0), "height": Wire(size.id, 1)}

    def _given_size(self, node: Node) -> tuple[dict, dict]:
        kind = KINDS["CogVideoX15Inpaint"]
        return self.sides(node, ("width", "height"), (kind.input("width").default, kind.input("height").default))

    def _base(self, node: Node) -> int:
        base = self.constant(node.wires.get("base_resolution"))
        base = self.setting(node, "base_resolution", int, 768) if type(base) is not int else base
        self.settled.add((node.id, "base_resolution"))
        if "base_resolution" in node.wires:
            self.say(node, f"base_resolution came over a link, which was cut: {short(base)} was taken.")
        return self.limited(node, "base_resolution", base, _BASES)


def bucket(base: int, width: int, height: int) -> tuple[int, int]:
    """Return the width and height that VideoX-Fun makes of a picture of ``width`` x ``height`` pixels."""
    ratio = min(_BUCKETS, key=lambda name: abs(float(name) - height / width))
    high, wide = (int(side / 512 * base / _STEP) * _STEP for side in _BUCKETS[ratio])
    return wide, high


def fun_length(frames: int) -> int:
    """Return how many frames VideoX-Fun makes of CogVideoX-Fun-V1.5 for ``video_length``: 1 or 8N+5, as latent frames
    are cut to an even number (``pipeline_cogvideox_fun_inpaint.py``)."""
    latent = (min(max(frames, 1), MAX_FRAMES) - 1) // 4 + 1
    return max(1, 4 * (latent - latent % 2) - 3)


def _asked_mode(loader: Node) -> str:
    """How a loader keeps the weights, as GPU_memory_mode has it."""
    if "low_gpu_memory_mode" in loader.values:
        return _SEQUENTIAL if loader.values["low_gpu_memory_mode"] is True else _OFFLOAD
    mode = loader.values.get("GPU_memory_mode", _OFFLOAD)
    return mode if isinstance(mode, str) else repr(mode)
