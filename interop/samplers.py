"""The old pack's prompts, sampler and VAE nodes as this pack's, and the size and length of what they make.

Here a clip's size and length lie in the latent and not in the sampler, and the start image travels in the conditioning.
One file, as sampler, encoders and latents decide each other's sizes.
"""

import re
from typing import Any

from cogvideox.variants import SIZE_STEP
from cogvideox.words import short

from . import tables
from .conversion import as_number, frame_step, is_inpaint, is_piped, usual_size
from .graph import Node, Wire
from .kinds import KINDS
from .loaders import Loaders
from .tables import AFTER_SEED
from .workflow import is_2b

#: The largest length and side that our nodes' widgets take.
MAX_FRAMES, _MAX_SIDE = (KINDS["CogVideoX15EmptyLatent"].limits(name)[1] for name in ("length", "width"))


class Samplers(Loaders):
    """What stands behind the model."""

    def __init__(self, *given):
        super().__init__(*given)
        self.image_nodes: dict[tuple, Node] = {}
        self.video_nodes: dict[tuple, Node] = {}
        for node in self.old.values():
            if node.kind in ("CogVideoTextEncode", "CogVideoTextEncodeCombine", "CogVideoDecode"):
                self.outputs[node.id, 0] = Wire(node.id, 0)
            elif node.kind == "CogVideoSampler":
                self.outputs[node.id, 1 if is_piped(node) else 0] = Wire(node.id, 0)

    # --- Prompts ---

    def text_encode(self, node: Node) -> None:
        values: dict[str, Any] = {}
        wires = {"text_encoder": self.resolve(node.wires.get("clip"))}
        # Files that programs write have the widget's name of ComfyUI's own node.
        name = (
            "text"
            if "prompt" not in node.values
            and "prompt" not in node.wires
            and ("text" in node.values or "text" in node.wires)
            else "prompt"
        )
        self.keep(node, name, self.setting(node, name, str, ""), wires, values, "prompt")
        strength = self.setting(node, "strength", (int, float), 1.0)
        self.look_at_prompt(node, values["prompt"])
        if strength != 1:
            self.say(
                node, f"strength {strength} is not here: the prompt is used as the model was trained with it, at 1."
            )
        self.make("CogVideoX15TextEncode", node, values, wires)

    def encode_prompt(self, node: Node) -> None:
        """The first versions' node for both prompts, which took the checkpoint's own text encoder."""
        loader = self.loader_of(node)
        source = Wire(loader.id, 1) if loader is not None else None
        for slot, name in enumerate(("prompt", "negative_prompt")):
            values: dict[str, Any] = {}
            wires = {"text_encoder": source}
            self.keep(node, name, self.setting(node, name, str, ""), wires, values, "prompt")
            self.look_at_prompt(node, values["prompt"])
            self.outputs[node.id, slot] = Wire(self.make("CogVideoX15TextEncode", node, values, wires).id, 0)

    def look_at_prompt(self, node: Node, prompt: str) -> None:
        if re.search(r"\([^()]*:\s*\d", prompt[:10_000]):
            self.say(
                node,
                "weights such as (word:1.2) are not read here: the model sees them as text. Write the prompt without "
                "them.",
            )

    def combine(self, node: Node) -> None:
        mode = self.setting(node, "combination_mode", str, "weighted_average")
        ratio = 0.5 if mode == "average" else self.setting(node, "weighted_average_ratio", (int, float), 0.5)
        wires = {
            f"conditioning_{new}": self.resolve(node.wires.get(f"conditioning_{old}"))
            for new, old in (("to", 1), ("from", 2))
        }
        if mode == "concatenate":
            self.make("ConditioningConcat", node, {}, wires)
            return
        if not 0 <= ratio <= 1:
            self.say(
                node,
                f"weighted_average_ratio {ratio} is not from 0 to 1, as ComfyUI's Conditioning Average takes it; the "
                "nearest was taken.",
            )
        self.make("ConditioningAverage", node, {"conditioning_to_strength": min(1.0, max(0.0, 1.0 - ratio))}, wires)

    # --- The sampler ---

    def sampler(self, node: Node) -> None:
        image, start = (self.graph.trace(node.wires.get(name)) for name in ("image_cond_latents", "samples"))
        wires = {"model": self.faster(node)} | {
            name: self.resolve(node.wires.get(name)) for name in ("positive", "negative")
        }
        if "embeds" in node.wires:
            both = self.graph.origin(node.wires["embeds"])
            wires |= {
                name: both and self.outputs.get((both.node, slot)) for slot, name in enumerate(("positive", "negative"))
            }
        values, links = self.numbers(node)
        wires |= links
        self.denoise(node, start, wires, values)
        values["scheduler"] = self.scheduler(node)
        if "cfg" in node.wires:
            self.say(
                node, "cfg comes over a link: see that it is one number, for a list with one a step is not taken here."
            )
        self.temporal_tiles(node)
        latent = (
            self.image_to_video(node, image, wires) if image is not None and image.kind in self.encoders(node) else None
        )
        if start is not None and start.kind not in tables.EMPTY_LATENTS:
            latent = self.given_latent(node, start)
        elif latent is None:
            latent = self.empty_latent(node, start, wires)
        self.make("CogVideoX15Sampler", node, values, wires | {"latent_image": latent})

    def numbers(self, node: Node) -> tuple[dict[str, Any], dict[str, Wire | None]]:
        """The seed with what becomes of it, the steps and the guidance, as values and, where they came over links, as
        wires."""
        values: dict[str, Any] = {}
        wires: dict[str, Wire | None] = {}
        ours = KINDS["CogVideoX15Sampler"]
        for name in ("seed", "steps", "cfg"):
            given = self.setting(node, name, int if name != "cfg" else (int, float), ours.input(name).default)
            # A cfg below 1 switched the guidance off as 1 does.
            value = self.limited(node, name, given, ours.limits(name), tells=name != "cfg")
            self.keep(node, name, value, wires, values)
        then = node.values.get(AFTER_SEED)
        values[AFTER_SEED] = then if isinstance(then, str) and then in tables.AFTERWARDS else "fixed"
        return values, wires

    def encoders(self, sampler: Node) -> tuple[str, ...]:
        """The encoders whose images a sampler's model reads."""
        return (tables.FUN_ENCODER,) if is_inpaint(self.model_of(sampler)) else tables.ENCODERS

    def denoise(self, node: Node, start: Node | None, wires: dict, values: dict) -> None:
        denoise = min(max(self.setting(node, "denoise_strength", (int, float), 1.0), 0.0), 1.0)
        if start is not None and start.kind not in tables.EMPTY_LATENTS:
            self.keep(node, "denoise_strength", denoise, wires, values, "denoise")
            return
        values["denoise"] = 1.0
        self.settled.add((node.id, "denoise_strength"))
        if denoise != 1 or "denoise_strength" in node.wires:
            self.say(node, "denoise_strength became 1: there is no clip to start from, and without one it did nothing.")

    def scheduler(self, node: Node) -> str:
        name = self.setting(node, "scheduler", str, "CogVideoXDDIM")
        first = "t_tile_length" in node.values or "fps" in node.values
        if name == "DDIM" and is_inpaint(self.model_of(node)):
            return "ddim_origin"
        if name in ("DDIM", "DDIM_tiled") and (first or name == "DDIM_tiled" or not is_2b(self.model_of(node))):
            # Until October 2024 this was CogVideoXDDIM's name. What that adds to diffusers' DDIM, a shift of the
            # noise's strength, is none in the config of all models but 2b.
            name = "CogVideoXDDIM"
        if name not in tables.SAME_SCHEDULER:
            return self.near_scheduler(node, name, "ddim")
        return tables.SAME_SCHEDULER[name]

    def near_scheduler(self, node: Node, name: str, usual: str) -> str:
        """Take what is nearest to a scheduler that is not here: ``usual`` where nothing is known of it."""
        near = tables.NEAR_SCHEDULER.get(name, usual)
        self.say(node, f"scheduler {short(name)} is not here: {near} was taken. The video will differ.")
        steps = self._number(node, "steps", 50, whole=True)
        if steps < 50:
            self.say(node, f"{steps} steps may be too few for {near}: 50 are usual.")
        return near

    def temporal_tiles(self, node: Node) -> None:
        """What the first versions had for long clips."""
        tile, frames = (as_number(node.values.get(name), int) for name in ("t_tile_length", "num_frames"))
        if type(tile) is int and type(frames) is int and tile < frames and "DDIM" in str(node.values.get("scheduler")):
            self.say(
                node,
                f"t_tile_length {tile} is not here: the whole clip is made at once, which takes more memory, and over "
                "the length that the model was trained for the picture may suffer.",
            )
        self.settled |= {(node.id, name) for name in ("t_tile_length", "t_tile_overlap")}

    def given_latent(self, node: Node, start: Node) -> Wire | None:
        """The latents that a run with denoise below 1 starts from."""
        if start.kind in tables.ENCODERS:
            frames, most = self.frames(node), self.most_frames(start_image(start))
            is_cut = frames is not None and (most is None or most > frames)
            encoded = self.video_encode(start, frames if is_cut else None, node.wires.get("num_frames"))
            if not is_cut:
                asked = "num_frames" if frames is None else f"num_frames {short(frames)}"
                self.say(
                    node,
                    f"{asked} is not a setting here: the video is as long as the clip that node {short(encoded.id)} "
                    "gets.",
                )
            self.settled |= {(node.id, side) for side in ("width", "height")}
            return self.through(node.wires["samples"], start, Wire(encoded.id, 0))
        if start.kind != "CogVideoSampler":
            self.say(
                node,
                f"it starts from what {start.where} makes: see that it is a video latent as ComfyUI has it, [batch, "
                "16, frames, height/8, width/8].",
            )
        self.settled |= {(node.id, name) for name in ("num_frames", "width", "height")}
        return self.resolve(node.wires["samples"])

    # --- Pictures and clips ---

    def most_frames(self, wire: Wire | None) -> int | None:
        """The most frames that a clip has, if the file says it: what VideoHelperSuite is to load."""
        seen: set = set()
        while (node := self.graph.trace(wire)) is not None and node.kind in tables.RESIZERS and node.id not in seen:
            seen.add(node.id)
            wire = node.wires.get("image") or node.wires.get("images")
        if node is None or not node.kind.startswith("VHS_LoadVideo"):
            return None
        cap = self._number(node, "frame_load_cap", 0, whole=True)
        return cap if cap > 0 else None

    def video_encode(self, node: Node, frames: int | None = None, wire: Wire | None = None) -> Node:
        """The node that encodes a clip: as many of its frames, which came over ``wire`` if over any, or all."""
        low, high = KINDS["ImageFromBatch"].limits("length")
        key = node.id, frames
        if key not in self.video_nodes:
            images = self.resolve(start_image(node))
            if images is not None and frames is not None and low <= frames <= high:
                cut = {"image": images, "length": self.resolve(wire)}
                images = Wire(self.make("ImageFromBatch", node, {"length": frames}, cut, own_id=False).id, 0)
            wires = {"images": images, "vae": self.vae(node)}
            self.video_nodes[key] = self.make("CogVideoX15VAEEncode", node, {}, wires)
            self.encode_settings(node)
        return self.video_nodes[key]

    def spare_encode(self, node: Node) -> None:
        """An encoder that no sampler uses."""
        if (node.id, 0) not in self.outputs and not node.is_off:
            self.outputs[node.id, 0] = Wire(self.video_encode(node).id, 0)

    def encode_settings(self, node: Node) -> None:
        for name, neutral, meaning in (
            ("noise_aug_strength", 0, "noise in the image"),
            ("strength", 1, "scaling the image's latents"),
            ("start_percent", 0, "showing the image in a part of the steps only"),
            ("end_percent", 1, "showing the image in a part of the steps only"),
        ):
            value = self.setting(node, name, (int, float), float(neutral))
            if value != neutral:
                self.say(
                    node, f"{name} {value} is not here ({meaning}): the image is used as the model was trained with it."
                )
        self.encode_tiling(node)

    def encode_tiling(self, node: Node) -> None:
        if node.values.get("enable_tiling") is True:
            self.not_needed.append(f"{node.where}: tiling")

    def fun_settings(self, sampler: Node, encode: Node, values: dict, wires: dict) -> None:
        """Carry over what CogVideoImageEncodeFunInP adds to its images, and say what differs of the end image and of
        the noise (``encode`` there, and ``pipeline_cogvideox.py``, which sets the mask)."""
        given = self.setting(encode, "noise_aug_strength", (int, float), 0.0)
        noise = self.limited(encode, "noise_aug_strength", given, KINDS["CogVideoX15Inpaint"].limits("noise_aug"))
        self.keep(encode, "noise_aug_strength", noise, wires, values, "noise_aug")
        if noise:
            self.say(encode, "the noise in the images was another one in every run there; here it is always the same.")
        else:
            self.say(
                encode,
                "noise_aug_strength 0 was kept as noise_aug; the model was trained with noise, and VideoX-Fun adds "
                "0.0563.",
            )
        if wires.get("end_image") is not None:
            self.say(
                encode,
                "the end image was shown to the model there and not marked as kept; here it is the last frame, as the "
                "model was trained with it, so the end of the video will differ.",
            )
        self.settled.add((encode.id, "num_frames"))
        wire = encode.wires.get("num_frames")
        own = self.setting(encode, "num_frames", int, 49) if wire is None else self.constant(wire)
        frames = self.frames(sampler)
        if own is not None and frames is not None and own != frames:
            self.say(
                encode,
                f"num_frames {short(own)} is not a setting here: the length follows num_frames {short(frames)} of the "
                "sampler.",
            )
        self.encode_tiling(encode)

    def image_to_video(self, sampler: Node, encode: Node, wires: dict) -> Wire | None:
        """Lead the sampler's conditionings through a node that puts the start image into them: one for all samplers
        that ask the same of it."""
        name = self.model_of(sampler)
        values, new = self.length(sampler, name)
        if is_piped(sampler):
            sizes, links = self.own_size(sampler)
            values, new = values | sizes, new | links
        new |= {side: wires[side] for side in ("positive", "negative")}
        key = encode.id, *values.values(), *(wire and wire.key for wire in new.values())
        if key not in self.image_nodes:
            new |= {
                "start_image": self.resolve(start_image(encode)),
                "end_image": self.resolve(encode.wires.get("end_image")),
                "vae": self.vae(encode),
            }
            if not is_piped(sampler):
                self.picture_size(encode, name, values, new)
            kind = "CogVideoX15ImageToVideo"
            if encode.kind == tables.FUN_ENCODER:
                kind = "CogVideoX15Inpaint"
                self.fun_settings(sampler, encode, values, new)
            else:
                self.encode_settings(encode)
            self.image_nodes[key] = self.make(kind, encode, values, new)
        node = self.image_nodes[key]
        wires["positive"], wires["negative"] = Wire(node.id, 0), Wire(node.id, 1)
        return self.through(sampler.wires["image_cond_latents"], encode, Wire(node.id, 2))

    def through(self, wire: Wire, source: Node, now: Wire) -> Wire:
        """Where a sampler's latent comes from: ``now``, over the nodes that led there from ``source`` if they lead to
        the same still."""
        first = self.outputs.setdefault((source.id, 0), now)
        if first is not None and first.key == now.key:
            return self.resolve(wire) or now
        return now

    def decode(self, node: Node) -> None:
        self.make(
            "CogVideoX15VAEDecode",
            node,
            {},
            {"samples": self.resolve(node.wires.get("samples")), "vae": self.vae(node)},
        )
        if self.setting(node, "enable_vae_tiling", bool, True):
            self.not_needed.append(f"{node.where}: tiling (the untiled frames are made in whatever memory is free)")

    # --- Sizes and lengths ---

    def frames(self, sampler: Node) -> int | None:
        """How many frames a sampler makes, if the file says it."""
        wire = sampler.wires.get("num_frames")
        self.settled.add((sampler.id, "num_frames"))
        if wire is None:
            return self.setting(sampler, "num_frames", int, 49)
        known = self.constant(wire)
        return known if type(known) is int else None

    def length(self, sampler: Node, model: str) -> tuple[dict, dict]:
        """``length`` as a value and, where it came over a link, as a wire: num_frames of the sampler, made one that
        the model has."""
        wire, known = sampler.wires.get("num_frames"), self.frames(sampler)
        frames = self.setting(sampler, "num_frames", int, 49) if known is None else known
        valid, rule = _clip_length(frames, model)
        if valid == frames or known is None:
            if known is None:
                self.say(sampler, f"num_frames came over a link and is length now: what arrives there must be {rule}.")
            return {"length": valid}, {"length": self.resolve(wire)}
        self.say(
            sampler,
            f"num_frames {short(frames)} became length {valid}: the model makes {rule} frames."
            + (" It came over a link, which was cut." if wire else ""),
        )
        if is_inpaint(model) and valid > frames > 1:
            self.say(
                sampler,
                f"for num_frames {short(frames)} as many latent frames were made in {tables.PACK} too, and the first "
                "was cut off. Here all of them are shown, so the video will differ.",
            )
        return {"length": valid}, {}

    def own_size(self, sampler: Node) -> tuple[dict, dict]:
        """The width and height that an old sampler had itself, as values and, where they came over links, as wires."""
        names = ("height", "width") if self.is_flipped(sampler) else ("width", "height")
        return self.sides(sampler, names, (720, 480))

    def sides(self, node: Node, names: tuple[str, str], usual: tuple[int, int]) -> tuple[dict, dict]:
        """The width and height that a node has under these names, or else the usual ones, as values and, where they
        came over links, as wires."""
        values, wires = {}, {}
        for side, name, default in zip(("width", "height"), names, usual, strict=True):
            wire = node.wires.get(side)
            self.settled.add((node.id, side))
            known = node.values.get(name, default) if wire is None else self.constant(wire)
            values[side], fits = self.side(node, side, known, default)
            if wire is not None and fits:
                wires[side] = self.resolve(wire)
        return values, wires

    def is_flipped(self, sampler: Node) -> bool:
        """Whether a list of values has the width first, as from 14 to 19 November 2024; ``tables`` reads it as if the
        height were."""
        raw = sampler.raw
        if not isinstance(raw.get("widgets_values"), list) or isinstance(raw.get("widgets_values_named"), dict):
            return False
        # Then the loaders had lost pab_config, which came before compile_args and after attention_mode.
        loader = self.loader_of(sampler)
        if loader is None:
            return False
        sockets = loader.raw.get("inputs")
        names = (
            [socket.get("name") for socket in sockets if isinstance(socket, dict)] if isinstance(sockets, list) else []
        )
        return "pab_config" not in names and ("compile_args" in names or "attention_mode" in loader.values)

    def empty_latent(self, sampler: Node, source: Node | None, sampler_wires: dict) -> Wire | None:
        """The node with the size and length of a video that starts from noise. Where the model inpaints, the sampler's
        conditionings, of ``sampler_wires``, are led through it."""
        name = self.model_of(sampler)
        values, wires = self.length(sampler, name)
        if source is None or is_piped(sampler):
            if is_piped(sampler):
                sizes, links = self.own_size(sampler)
                values, wires = values | sizes, wires | links
            else:
                values["width"], values["height"] = usual_size(name)
                self.say(sampler, f"nothing gave it a size: {values['width']}x{values['height']} was taken.")
            return self.size_node(sampler, sampler, values, wires, sampler_wires, own_id=False)
        given = self.graph.widgets(source, tables.EMPTY_LATENTS[source.kind])
        for side, usual in zip(("width", "height"), usual_size(name), strict=True):
            wire = source.wires.get(side)
            known = given.get(side) if wire is None else self.constant(wire)
            values[side], fits = self.side(source, side, known, usual)
            if wire is not None and fits:
                wires[side] = self.resolve(wire)
        batch = as_number(given.get("batch_size", 1), int)
        if batch != 1 or "batch_size" in source.wires:
            self.say(
                source,
                f"batch_size {short(batch)}: {tables.PACK} made one video whatever it said, and so does this. Set "
                "batch_size to make more.",
            )
        own = source.id not in self.shared
        new = self.size_node(sampler, source, values, wires, sampler_wires, own_id=own)
        return self.through(sampler.wires["samples"], source, new) if own else new

    def size_node(
        self, sampler: Node, place: Node, values: dict, wires: dict, sampler_wires: dict, own_id: bool
    ) -> Wire:
        loader = self.loader_of(sampler)
        if loader is None or not is_inpaint(self.asked(loader)):
            return Wire(self.make("CogVideoX15EmptyLatent", place, values, wires, own_id=own_id).id, 0)
        wires |= {side: sampler_wires[side] for side in ("positive", "negative")} | {"vae": Wire(loader.id, 2)}
        node = self.make("CogVideoX15Inpaint", place, values, wires, own_id=own_id)
        sampler_wires["positive"], sampler_wires["negative"] = Wire(node.id, 0), Wire(node.id, 1)
        return Wire(node.id, 2)

    def side(self, node: Node, side: str, given, usual: int) -> tuple[int, bool]:
        """A width or height that the model can make, and whether it is the one given."""
        given = as_number(given, int)
        if type(given) is not int or given < 1:
            if given is not None:
                self.say(node, f"{side} is {short(repr(given))}, which is no number of pixels; {usual} was taken.")
            return usual, True
        valid = min(_MAX_SIDE, max(SIZE_STEP, (given + SIZE_STEP // 2) // SIZE_STEP * SIZE_STEP))
        if valid != given:
            self.say(node, f"{side} {short(given)} became {valid}: the model makes multiples of {SIZE_STEP} pixels.")
        return valid, valid == given

    def picture_size(self, encode: Node, model: str, values: dict, wires: dict) -> None:
        """Set the video's width and height, which there were those of the start image: what scales it says them."""
        source = self.graph.trace(encode.wires.get("start_image"))
        order, tells = tables.RESIZERS.get("" if source is None else source.kind, ((), False))
        given = self.resized_to(source, order) if source is not None and order else None
        fits = True
        for side, size, usual in zip(("width", "height"), given or (None, None), usual_size(model), strict=True):
            values[side], same = self.side(source or encode, side, size, usual)
            fits = fits and same
        if source is not None and tells and fits:
            # Where the size is set now, it stays set.
            wires["width"], wires["height"] = (self.resolve(Wire(source.id, slot)) for slot in (1, 2))
        elif given is None:
            self.say(
                encode,
                f"the video was as large as its start image; here it is {values['width']}x{values['height']}, and the "
                "image is scaled and cropped to that. Set width and height.",
            )

    def resized_to(self, node: Node, order: tuple[str, ...]) -> tuple[int, int] | None:
        """The size that a node scales every picture to, if the file says it."""
        given = {name: as_number(value, int) for name, value in self.graph.widgets(node, order).items()}
        width, height = given.get("width"), given.get("height")
        depends = (
            given.get("keep_proportion", given.get("method")) not in tables.EXACT
            or given.get("condition", "always") != "always"
        )
        if (
            depends
            or tables.SIZE_INPUTS & node.wires.keys()
            or not (type(width) is int and width > 0)
            or not (type(height) is int and height > 0)
        ):
            return None
        step = next(
            (
                given[name]
                for name in ("divisible_by", "multiple_of")
                if type(given.get(name)) is int and given[name] > 1
            ),
            1,
        )
        size = width - width % step, height - height % step
        return size if min(size) > 0 else None


def _clip_length(frames: int, model: str) -> tuple[int, str]:
    """Return the length that a model has in place of ``frames``, and the rule of its lengths.

    One frame is a picture, and stays one; what was a video stays that. Of CogVideoX-Fun-V1.5 it is the length with as
    many latent frames as that pack made, an even number.
    """
    if is_inpaint(model):
        latent = (min(max(frames, 2), MAX_FRAMES - 8) - 1) // 4 + 1
        return (1 if frames <= 1 else 4 * (latent + latent % 2) - 3), "8N+5"
    step = frame_step(model)
    least = 1 if frames <= 1 else step + 1
    return min(MAX_FRAMES, max(least, (frames - 1 + step // 2) // step * step + 1)), f"{step}N+1"


def start_image(node: Node) -> Wire | None:
    """What an encoder encodes, under both names that the input had."""
    return node.wires.get("start_image") or node.wires.get("image")
