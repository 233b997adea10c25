"""Workflows of ComfyUI-CogVideoXWrapper made into workflows of this pack.

Facts of its nodes: kijai/ComfyUI-CogVideoXWrapper, nodes.py, model_loading.py and pipeline_cogvideox.py.

Every node of that pack becomes the one of ours that does the same, under its id and in its place, or is left out and named in the report; all other
nodes stay as they are. What differs between the two: here a clip's size and length lie in the latent and not in the sampler, LoRAs stand behind the
loader and not before it, the start image travels in the conditioning, and the VAE always comes out of the model loader.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..geometry import SIZE_STEP
from .graph import AFTER_SEED, PASSING, Changes, Graph, Node, Wire, open_graph
from .kinds import KINDS
from .workflow import OURS, WIDGETS, is_2b, read_workflow

PACK = "ComfyUI-CogVideoXWrapper"


_AFTERWARDS = ("fixed", "increment", "decrement", "randomize")
_MODEL_LOADERS = ("DownloadAndLoadCogVideoModel", "CogVideoXModelLoader", "DownloadAndLoadCogVideoGGUFModel")
_LORAS = ("CogVideoLoraSelect", "CogVideoLoraSelectComfy")
#: Its schedulers that are ours, and of the others the one to begin with.
_SAME_SCHEDULER = {"CogVideoXDDIM": "ddim", "CogVideoXDPMScheduler": "dpm"}
_NEAR_SCHEDULER = {"DPM++": "dpm", "SASolverScheduler": "dpm"}
#: The folder that DownloadAndLoadCogVideoModel makes in models/CogVideo, where it is not the repository's name.
_FOLDERS = {
    "THUDM/CogVideoX-2b": "CogVideo2B",
    "kijai/CogVideoX-5b-1.5-T2V": "CogVideoX-5b-1.5/transformer_T2V",
    "kijai/CogVideoX-5b-1.5-I2V": "CogVideoX-5b-1.5/transformer_I2V",
}
#: What cannot be left out without making another video, and why: sampler's input -> sentence.
_OTHER_VIDEO = {
    "tora_trajectory": "Tora's trajectories",
    "controlnet": "a ControlNet",
}
#: Models that it is the same with, by a word in their names.
_OTHER_MODELS = {"fun": "a CogVideoX-Fun model", "tora": "a Tora model", "img2vid": "a model that is told its image in a way of its own"}
#: Nodes that are left out, and what that means.
_LEFT_OUT = {
    "CogVideoContextOptions": "Context windows are not here: the whole clip is made at once, so a long one needs more memory.",
    "CogVideoXFasterCache": "FasterCache is not here: every step is computed in full, which takes longer and costs no quality.",
    "CogVideoXTeaCache": "TeaCache is not here: every step is computed in full, which takes longer and costs no quality.",
    "CogVideoEnhanceAVideo": "Enhance-A-Video is not here, so the video will differ from the old one.",
    "CogVideoTransformerEdit": "Removing blocks of the transformer is not here: all of them run.",
    "CogVideoXTorchCompileSettings": "torch.compile is not here: the model runs as it is.",
    "CogVideoLatentPreview": "The preview of latents is not here: decode them with CogVideoX-1.5 VAE Decode to see them.",
    "CogVideoXFunResizeToClosestBucket": "CogVideoX-Fun's buckets are not here: CogVideoX-1.5 Image to Video scales and crops the image itself.",
}
#: Its other nodes: those that are refused where they are used, and of older versions.
_REST = {
    *("CogVideoControlNet", "DownloadAndLoadCogVideoControlNet", "DownloadAndLoadToraModel", "ToraEncodeTrajectory", "ToraEncodeOpticalFlow"),
    *("CogVideoImageEncodeFunInP", "CogVideoXFunSampler", "CogVideoXFunVid2VidSampler", "CogVideoXFunControlSampler", "CogVideoControlImageEncode"),
    *("CogVideoDualTextEncode_311", "CogVideoImageInterpolationEncode", "CogVideoPABConfig"),
}
#: Nodes of others that make an empty image latent or scale a picture: their widgets in order, and whether their outputs 1 and 2 are width and height.
_EMPTY_LATENTS = {"EmptyLatentImage": ("width", "height", "batch_size"), "EmptySD3LatentImage": ("width", "height", "batch_size")}
_RESIZERS = {
    "ImageResizeKJ": (("width", "height", "upscale_method", "keep_proportion", "divisible_by"), True),
    "ImageResizeKJv2": (("width", "height", "upscale_method", "keep_proportion", "pad_color", "crop_position", "divisible_by"), True),
    "ImageResize+": (("width", "height", "interpolation", "method", "condition", "multiple_of"), True),
    "GetImageSizeAndCount": ((), True),
    "CogVideoXFunResizeToClosestBucket": ((), False),
    "ImageScale": (("upscale_method", "width", "height", "crop"), False),
}
#: Ways of the resizers that end at width x height, whatever comes in.
_EXACT = (None, False, "stretch", "crop", "pad", "fill / crop")
#: Their inputs that make the size another.
_SIZE_INPUTS = {"width", "height", "width_input", "height_input", "get_image_size"}
_OLD = (WIDGETS.keys() - {OURS}) | _LEFT_OUT.keys() | _REST
#: Widgets of the old nodes that change nothing about the video.
_WITHOUT_EFFECT = ("force_offload", "enable_tiling", "enable_vae_tiling", "load_device", "fuse_lora")
_CONSTANTS = ("INTConstant", "PrimitiveNode", "PrimitiveInt", "Int", "easy int", "ImpactInt")


@dataclass(frozen=True)
class MigrationReport:
    """What became of a workflow.

    Attributes:
        source, target: the two files.
        replaced: how many nodes have one of this pack in their place.
        kept: how many are in the new workflow as they were.
        differs: what could not be carried over or should be looked at, a sentence each, with the node it is about.
        not_needed: settings that were left out because this pack does the same without being told.
    """

    source: Path
    target: Path
    replaced: int
    kept: int
    differs: tuple[str, ...]
    not_needed: tuple[str, ...]

    @property
    def text(self) -> str:
        return f"{self.target}: {self.replaced} nodes were replaced, {self.kept} others stay as they are.\n{self.notes}"

    @property
    def notes(self) -> str:
        """The sentences, as the note in the new workflow has them."""
        lines = ["To look at:", *(f"- {line}" for line in self.differs)] if self.differs else ["Everything was carried over."]
        if self.not_needed:
            lines += ["Left out, because this pack sees to it itself:", *(f"- {line}" for line in self.not_needed)]
        return "\n".join(lines)


def migrate_workflow(source: Path | str, target: Path | str) -> MigrationReport:
    """Read a workflow of ComfyUI-CogVideoXWrapper and write it with the nodes of this pack, in the format it came in: the page's or the API's.

    ``source`` is only read. ``target`` appears whole or not at all.

    Raises:
        ValueError: if ``source`` is no such workflow, or is for something that this pack cannot do; if ``target`` exists or cannot be written.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if not source.is_file():
        raise ValueError(f"There is no file {source}, so there is no workflow to migrate. Check the path.")
    _check_target(target)
    graph = open_graph(read_workflow(source))
    migration = _Migration(graph, source)
    migration.convert()
    changes = Changes(migration.made, migration.old.keys(), migration.resolve, migration.say)
    data = graph.write(changes)
    # Said once of a node, however many others it was asked for.
    differs, not_needed = (tuple(dict.fromkeys(lines)) for lines in (migration.differs, migration.not_needed))
    report = MigrationReport(source, target, len(graph.nodes.keys() & migration.made.keys()), len(migration.others), differs, not_needed)
    graph.add_note(data, f"Migrated from {PACK}", report.notes)
    # A lone surrogate, as JavaScript leaves where it cuts a text, becomes the JSON escape that it came as.
    content = json.dumps(data, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace")
    _write(target, content)
    return report


def _check_target(target: Path) -> None:
    if target.suffix.lower() != ".json":
        raise ValueError(f"The new workflow is to be {target}, but ComfyUI opens workflows that end in .json. Give it such a name.")
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists, and a migration never writes over a file. Choose another name, or delete that file first.")
    if not target.absolute().parent.is_dir():
        raise ValueError(
            f"The new workflow is to be {target}, but the folder {target.absolute().parent} does not exist. Create it or choose another."
        )


def _write(target: Path, content: bytes) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _check_target(target)
        os.replace(partial, target)
    except OSError as error:
        raise ValueError(f"{target} cannot be written ({error.strerror}), so nothing was. Choose a folder you can write to.") from error
    finally:
        partial.unlink(missing_ok=True)


class _Migration:
    """The conversion of one graph."""

    def __init__(self, graph: Graph, source: Path):
        self.graph, self.source, self.nodes = graph, source, graph.nodes
        self.old = {id_: node for id_, node in self.nodes.items() if self.is_old(node)}
        self.samplers = [node for node in self.old.values() if node.kind == "CogVideoSampler"]
        self.made: dict[object, Node] = {}
        self.differs: list[str] = []
        self.not_needed: list[str] = []
        #: Old outputs -> new outputs.
        self.outputs: dict[tuple, Wire | None] = {}
        self.image_nodes: dict[tuple, Node] = {}
        self.video_nodes: dict[object, Node] = {}
        #: Widgets whose links were dealt with, as (node, name).
        self.settled = {(node.id, name) for node in self.old.values() for name in _WITHOUT_EFFECT}

    @property
    def others(self) -> list[Node]:
        """The nodes that stay as they are."""
        return [node for id_, node in self.nodes.items() if id_ not in self.old and id_ not in self.made]

    @staticmethod
    def is_old(node: Node) -> bool:
        properties = node.raw.get("properties")
        pack = str(properties.get("cnr_id", "") or properties.get("aux_id", "")) if isinstance(properties, dict) else ""
        return node.kind in _OLD or "cogvideoxwrapper" in pack.lower()

    def say(self, node: Node, text: str) -> None:
        self.differs.append(f"{node.where}: {text}")

    def make(self, kind: str, place: Node, values: Mapping, wires: Mapping[str, Wire | None], own_id: bool = True) -> Node:
        """A new node in the place of ``place``, under its id or, if that is taken, under one of its own."""
        id_ = place.id if own_id and place.id not in self.made else self.graph.new_id(self.made)
        defaults = {entry.name: entry.default for entry in KINDS[kind].inputs if entry.default is not None}
        self.made[id_] = node = Node(id_, kind, defaults | dict(values), {name: wire for name, wire in wires.items() if wire is not None}, place.raw)
        return node

    def resolve(self, wire: Wire | None) -> Wire | None:
        """An old wire as it is now; None if what it came from is no more."""
        seen = set()
        while wire is not None and wire.key in self.graph.passed and wire.key not in seen:
            seen.add(wire.key)
            before = self.graph.passed[wire.key]
            wire = before and before._replace(link=wire.link)
        if wire is None:
            return None
        if wire.key in self.outputs:
            now = self.outputs[wire.key]
            return now and now._replace(link=wire.link)
        return wire if wire.node in self.nodes and wire.node not in self.old else None

    def setting(self, node: Node, name: str, kind: type | tuple, default):
        """The value of an old node's widget; what it cannot hold is told and becomes the default."""
        value = node.values.get(name, default)
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            self.say(node, f"{name} is {value!r}, which is not a value that it takes; {default!r} was taken.")
            return default
        return value

    def keep(self, node: Node, name: str, value, wires: dict, values: dict, new_name: str | None = None) -> None:
        """Carry over a widget's value, and its link if it has one."""
        values[new_name or name] = value
        self.settled.add((node.id, name))
        if name in node.wires:
            wires[new_name or name] = self.resolve(node.wires[name])

    def constant(self, wire: Wire | None) -> int | None:
        """The number that comes over a wire, if it stands in the file."""
        node = self.graph.trace(wire)
        if node is None or node.kind not in _CONSTANTS:
            return None
        value = next(iter(self.graph.widgets(node, ("value",)).values()), None)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def convert(self) -> None:
        self.refuse()
        for node in self.old.values():
            if node.kind in ("CogVideoTextEncode", "CogVideoTextEncodeCombine", "CogVideoSampler", "CogVideoDecode"):
                self.outputs[node.id, 0] = Wire(node.id, 0)
            if node.kind == "CogVideoTextEncode":
                self.graph.passed[node.id, 1] = node.wires.get("clip")
            elif node.kind == "CogVideoXFunResizeToClosestBucket":
                self.graph.passed[node.id, 0] = node.wires.get("images")
        for kinds, convert in (
            (_MODEL_LOADERS, self.loader),
            (("CogVideoXVAELoader",), self.vae_loader),
            (("CogVideoTextEncode",), self.text_encode),
            (("CogVideoTextEncodeCombine",), self.combine),
            (("CogVideoSampler",), self.sampler),
            (("CogVideoImageEncode",), self.spare_encode),
            (("CogVideoDecode",), self.decode),
        ):
            for node in self.old.values():
                if node.kind in kinds:
                    convert(node)
        for node in self.old.values():
            if node.id in self.made:
                for name in WIDGETS.get(node.kind, ()):
                    if name in node.wires and (node.id, name) not in self.settled:
                        self.say(node, f"{name} came over a link, which is no more: {node.values.get(name, 'the default')} was taken.")
            elif node.kind == "CogVideoImageEncode":
                self.say(node, "left out: it is switched off.")
            elif node.kind in _LORAS:
                self.say(node, "left out: it was connected to no loader.")
            elif node.kind != "CogVideoXVAELoader":
                self.say(node, f"left out. {_LEFT_OUT.get(node.kind, 'It has no counterpart here.')}")
        for node in self.made.values():
            for entry in KINDS[node.kind].inputs:
                if entry.default is None and not entry.optional and entry.name not in node.wires:
                    self.say(node, f"nothing is connected to {entry.name}. Connect it.")

    def refuse(self) -> None:
        """Stop where the new workflow would not make the video that the old one made."""
        if any(kind in _OLD for kind in self.graph.hidden()):
            raise ValueError(
                f"{self.source} has nodes of {PACK} in a subgraph or group node, which are not migrated. Open it in ComfyUI, unpack those (right "
                "click: Unpack Subgraph, or Convert to Nodes), save it and migrate that."
            )
        nothing = f"{self.source} holds no CogVideoSampler of {PACK}, the node that makes the video there"
        if not self.samplers:
            ours = any(node.kind.startswith("CogVideoX15") for node in self.nodes.values())
            have = "It is a workflow of this pack already." if ours else "Choose one that makes a video with that pack."
            raise ValueError(f"{nothing}, so there is nothing to migrate. {have}")
        for sampler in self.samplers:
            if "pipeline" in sampler.wires or "cogvideo_pipe" in sampler.wires:
                raise ValueError(
                    f"{self.source} was saved with a {PACK} of before November 2024 ({sampler.where} has an input called pipeline), whose nodes had "
                    "other inputs, so what is meant cannot be told for sure. Build it anew from one of the workflows in example_workflows."
                )
            for what, node, remedy in self.not_here(sampler):
                if not sampler.is_off:
                    raise ValueError(
                        f"{sampler.where} in {self.source} uses {what} ({node.where}), which this pack does not have: without it the video would be "
                        f"another one, so nothing was written. {remedy}, save the workflow and migrate it again to have the rest."
                    )
                self.say(sampler, f"it uses {what} ({node.where}), which this pack does not have. It is switched off; switched on it would not work.")

    def not_here(self, sampler: Node) -> Iterator[tuple[str, Node, str]]:
        """What a sampler uses that is not in this pack, and cannot be left out: what, the node, what to do."""
        for name, what in _OTHER_VIDEO.items():
            node = self.graph.trace(sampler.wires.get(name))
            if node is not None:
                yield what, node, "Delete or mute it"
        model = self.loader_of(sampler)
        for word, what in _OTHER_MODELS.items():
            if model is not None and word in (name := str(model.values.get("model", ""))).lower():
                yield f"{what}, {name}", model, "Choose another model there"
        image = self.graph.trace(sampler.wires.get("image_cond_latents"))
        if image is not None and image.kind != "CogVideoImageEncode":
            yield "image latents of another kind than CogVideoImageEncode's", image, "Put CogVideoImageEncode in its place"
        start = self.graph.trace(sampler.wires.get("samples"))
        known = ("CogVideoImageEncode", "CogVideoSampler", *_EMPTY_LATENTS)
        if start is not None and start.kind not in known and sampler.values.get("denoise_strength", 1.0) == 1.0:
            yield "noise that another node makes", start, "Delete or mute it"

    def loader_of(self, sampler: Node) -> Node | None:
        node = self.graph.trace(sampler.wires.get("model"))
        return node if node is not None and node.kind in _MODEL_LOADERS else None

    # Node by node -------------------------------------------------------------------------------------------------------------------------------

    def loader(self, node: Node) -> None:
        asked = self.setting(node, "model", str, "")
        name = self.model_name(node, asked)
        values = {"model": name, "dtype": self.dtype(node, asked)}
        if self.setting(node, "enable_sequential_cpu_offload", bool, False):
            values["memory"] = "offload_layers"
            self.say(
                node, "enable_sequential_cpu_offload became memory offload_layers. Try auto: the same video, in the fastest way that fits your card."
            )
        quantization = self.setting(node, "quantization", str, "disabled")
        if quantization != "disabled" or self.setting(node, "fp8_fastmode", bool, False):
            what = quantization if quantization != "disabled" else "fp8_fastmode"
            self.say(
                node,
                f"{what} is not here: weights are used as they are stored. Where memory is short, leave memory at auto, or choose a file that is "
                "stored in fp8 or GGUF: it stays packed.",
            )
        attention = self.setting(node, "attention_mode", str, "sdpa")
        if "sage" in attention:
            self.say(node, f"attention_mode {attention} is not here: torch's own attention is used, which is exact, and slower.")
        if self.setting(node, "load_device", str, "main_device") == "offload_device":
            self.not_needed.append(f"{node.where}: load_device")
        new = self.make(OURS, node, values, {})
        model = Wire(new.id, 0)
        for lora in self.lora_chain(node):
            model = Wire(self.lora(lora, model).id, 0)
        self.outputs[node.id, 0] = model
        if node.kind != "CogVideoXModelLoader":
            self.outputs[node.id, 1] = Wire(new.id, 2)

    def model_name(self, node: Node, asked: str) -> str:
        """What to choose in our loader: the name of a folder or file, without what the loader adds to it."""
        if node.kind == "CogVideoXModelLoader":
            return asked.replace("\\", "/")
        if node.kind == "DownloadAndLoadCogVideoModel":
            name = _FOLDERS.get(asked, asked.split("/")[-1])
            self.say(
                node,
                f"model {asked} became {name}, its folder in models/CogVideo. If the loader does not find it, download a model (CogVideoX-1.5 "
                "Downloader has the official 1.5 ones) and choose that.",
            )
            return name
        image = "I2V" in asked or "nterpolation" in asked
        name = ("CogVideoX1.5-5B" if _is_1_5(asked) else "CogVideoX-5b") + ("-I2V" if image else "")
        self.say(
            node,
            f"model {asked} is packed in a way of its own that is not read here, so {name} was chosen: download that, or choose a GGUF or fp8 file "
            "of the same model and put models/CogVideo/VAE/cogvideox_vae.safetensors into models/vae.",
        )
        return name

    def dtype(self, node: Node, model: str) -> str:
        name = {"DownloadAndLoadCogVideoModel": "precision", "CogVideoXModelLoader": "base_precision"}.get(node.kind, "vae_precision")
        dtype = self.setting(node, name, str, "bf16")
        if name in node.wires:
            self.settled.add((node.id, name))
            self.say(node, f"{name} came over a link, which is no more: dtype auto was taken, which is right for every model and card.")
            return "auto"
        if dtype == "fp16" and not is_2b(model):
            self.say(
                node,
                f"{name} fp16 became dtype auto: the model was trained in bf16, and plain fp16 makes it black. auto takes bf16, or on a card that "
                "has none fp16 in a way that cannot overflow.",
            )
            return "auto"
        if dtype not in ("fp16", "bf16", "fp32"):
            self.say(node, f"{name} {dtype} is not here; dtype auto was taken.")
            return "auto"
        return dtype

    def lora_chain(self, loader: Node) -> list[Node]:
        """The LoRAs that a loader is given, in the order in which they were chosen."""
        chain: list[Node] = []
        # Bypassed ones are kept, bypassed: ours pass their model on as those passed on their list.
        wire = loader.wires.get("lora")
        while wire is not None and (node := self.nodes.get(wire.node)) is not None and node not in chain:
            if node.kind in _LORAS:
                chain.append(node)
                wire = node.wires.get("prev_lora")
            elif node.kind in PASSING:
                wire = self.graph.before(node, wire.slot)
            else:
                break
        return chain[::-1]

    def lora(self, node: Node, model: Wire) -> Node:
        values, wires = {"lora_name": self.setting(node, "lora", str, "").replace("\\", "/")}, {"model": model}
        self.keep(node, "strength", self.setting(node, "strength", (int, float), 1.0), wires, values)
        if self.setting(node, "fuse_lora", bool, False):
            if re.search("orbit|dimensionx", values["lora_name"], re.IGNORECASE):
                self.say(
                    node,
                    f"fused LoRAs called orbit or dimensionx were applied at strength / rank there; here at strength {values['strength']}, as other "
                    "LoRAs. If it is too strong, lower it.",
                )
            self.not_needed.append(f"{node.where}: fuse_lora")
        return self.make("CogVideoX15LoraLoader", node, values, wires)

    def vae_loader(self, node: Node) -> None:
        """A VAE in a file of its own is chosen in the model loader that it is used with."""
        consumers = [other for other in self.old.values() if self.graph.trace(other.wires.get("vae")) is node]
        loaders = [self.loader_beside(consumer) for consumer in consumers]
        old = next((loader for loader in loaders if loader is not None), None)
        old = old or next((other for other in self.old.values() if other.kind in _MODEL_LOADERS), None)
        if old is None:
            self.say(node, "left out: there is no model loader, which is where a VAE is chosen here.")
            return
        loader = self.made[old.id]
        name = self.setting(node, "model_name", str, "auto").replace("\\", "/")
        if loader.values["vae_name"] not in ("auto", name):
            self.say(node, f"a loader has one VAE, and {loader.values['vae_name']} was chosen in node {loader.id} already; {name} was left out.")
        else:
            loader.values["vae_name"] = name
        self.outputs[node.id, 0] = Wire(loader.id, 2)
        self.not_needed.append(f"{node.where}: it is vae_name of node {loader.id} now, and its precision follows dtype")

    def loader_beside(self, node: Node) -> Node | None:
        """The model loader of the sampler that a decoder or encoder works with."""
        if node.kind == "CogVideoDecode":
            sampler = self.graph.trace(node.wires.get("samples"))
            return self.loader_of(sampler) if sampler is not None and sampler.kind == "CogVideoSampler" else None
        for sampler in self.samplers:
            if node in (self.graph.trace(sampler.wires.get(name)) for name in ("image_cond_latents", "samples")):
                return self.loader_of(sampler)
        return None

    def vae(self, node: Node) -> Wire | None:
        """The VAE of an old node, which comes from a model loader now."""
        wire = node.wires.get("vae")
        now, source, old = self.resolve(wire), self.graph.trace(wire), self.loader_beside(node)
        if (now is not None and (source is None or source.id in self.old)) or old is None:
            return now
        if source is not None:
            self.say(node, f"its VAE came from {source.where}, which makes none for this pack; node {old.id} gives it now.")
        return Wire(old.id, 2)

    def text_encode(self, node: Node) -> None:
        values, wires = {}, {"text_encoder": self.resolve(node.wires.get("clip"))}
        self.keep(node, "prompt", self.setting(node, "prompt", str, ""), wires, values)
        strength = self.setting(node, "strength", (int, float), 1.0)
        if re.search(r"\([^()]*:\s*\d", values["prompt"]):
            self.say(node, "weights such as (word:1.2) are not read here: the model sees them as text. Write the prompt without them.")
        if strength != 1:
            self.say(node, f"strength {strength} is not here: the prompt is used as the model was trained with it, at 1.")
        self.make("CogVideoX15TextEncode", node, values, wires)

    def combine(self, node: Node) -> None:
        mode = self.setting(node, "combination_mode", str, "weighted_average")
        ratio = 0.5 if mode == "average" else self.setting(node, "weighted_average_ratio", (int, float), 0.5)
        wires = {f"conditioning_{new}": self.resolve(node.wires.get(f"conditioning_{old}")) for new, old in (("to", 1), ("from", 2))}
        if mode == "concatenate":
            self.make("ConditioningConcat", node, {}, wires)
            return
        if ratio > 1:
            self.say(node, f"weighted_average_ratio {ratio} is over 1, which ComfyUI's Conditioning Average does not take; 1 was taken.")
        self.make("ConditioningAverage", node, {"conditioning_to_strength": max(0.0, 1.0 - ratio)}, wires)

    def sampler(self, node: Node) -> None:
        image, start = (self.graph.trace(node.wires.get(name)) for name in ("image_cond_latents", "samples"))
        wires = {"model": self.resolve(node.wires.get("model"))}
        wires |= {name: self.resolve(node.wires.get(name)) for name in ("positive", "negative")}
        values = {}
        for name, new, low, high in (("seed", "seed", 0, 2**64 - 1), ("steps", "steps", 1, 1000), ("cfg", "cfg", 1, 100)):
            default = next(entry.default for entry in KINDS["CogVideoX15Sampler"].inputs if entry.name == new)
            given = self.setting(node, name, int if name != "cfg" else (int, float), default)
            value = min(max(given, low), high)
            # A cfg below 1 switched the guidance off as 1 does.
            if value != given and name != "cfg":
                self.say(node, f"{name} {given} became {value}.")
            self.keep(node, name, value, wires, values)
        denoise = min(max(self.setting(node, "denoise_strength", (int, float), 1.0), 0.0), 1.0)
        self.keep(node, "denoise_strength", denoise, wires, values, "denoise")
        values["scheduler"] = self.scheduler(node)
        then = node.values.get(AFTER_SEED)
        values[AFTER_SEED] = then if then in _AFTERWARDS else "fixed"
        if "cfg" in node.wires:
            self.say(node, "cfg comes over a link: see that it is one number, for a list with one a step is not taken here.")
        if image is not None and image.kind == "CogVideoImageEncode":
            latent = self.image_to_video(node, image, wires)
        else:
            latent = None
        if start is not None and start.kind not in _EMPTY_LATENTS:
            latent = self.given_latent(node, start)
        elif latent is None:
            latent = self.empty_latent(node, start)
        self.make("CogVideoX15Sampler", node, values, wires | {"latent_image": latent})

    def scheduler(self, node: Node) -> str:
        name = self.setting(node, "scheduler", str, "CogVideoXDDIM")
        if name == "DDIM" and not is_2b(self.model_of(node)):
            # What CogVideoXDDIM adds to it, a shift of the noise's strength, is none in the config of all other models.
            name = "CogVideoXDDIM"
        if name not in _SAME_SCHEDULER:
            near = _NEAR_SCHEDULER.get(name, "ddim")
            self.say(
                node,
                f"scheduler {name} is not here: {near} was taken. The video will differ, and {node.values.get('steps')} steps may be too few: 50 are "
                "usual.",
            )
            return near
        return _SAME_SCHEDULER[name]

    def given_latent(self, node: Node, start: Node) -> Wire | None:
        """The latents that a run with denoise below 1 starts from."""
        if start.kind == "CogVideoImageEncode":
            encoded, frames = self.video_encode(start), self.frames(node)
            asked = "num_frames" if frames is None else f"num_frames {frames}"
            self.say(node, f"{asked} is not a setting here: the video is as long as the clip that node {encoded.id} gets.")
            return self.through(node.wires["samples"], start, Wire(encoded.id, 0))
        if start.kind != "CogVideoSampler":
            self.say(
                node,
                f"it starts from what {start.where} makes: see that it is a video latent as ComfyUI has it, [batch, 16, frames, height/8, width/8].",
            )
        return self.resolve(node.wires["samples"])

    def video_encode(self, node: Node) -> Node:
        if node.id not in self.video_nodes:
            wires = {"images": self.resolve(node.wires.get("start_image")), "vae": self.vae(node)}
            self.video_nodes[node.id] = self.make("CogVideoX15VAEEncode", node, {}, wires)
            self.encode_settings(node)
        return self.video_nodes[node.id]

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
                self.say(node, f"{name} {value} is not here ({meaning}): the image is used as the model was trained with it.")
        if node.values.get("enable_tiling"):
            self.not_needed.append(f"{node.where}: tiling")

    def image_to_video(self, sampler: Node, encode: Node, wires: dict) -> Wire | None:
        """Lead the sampler's conditionings through a node that puts the start image into them: one for all samplers that ask the same of it."""
        name = self.model_of(sampler)
        values, new = self.length(sampler, 16 if _is_1_5(name) else 8)
        new |= {side: wires[side] for side in ("positive", "negative")}
        key = encode.id, *values.values(), *(wire and wire.key for wire in new.values())
        if key not in self.image_nodes:
            pictures = {side: self.resolve(encode.wires.get(side)) for side in ("start_image", "end_image")}
            new |= {"vae": self.vae(encode), **pictures}
            self.picture_size(encode, name, values, new)
            self.image_nodes[key] = self.make("CogVideoX15ImageToVideo", encode, values, new)
            self.encode_settings(encode)
        node = self.image_nodes[key]
        wires["positive"], wires["negative"] = Wire(node.id, 0), Wire(node.id, 1)
        return self.through(sampler.wires["image_cond_latents"], encode, Wire(node.id, 2))

    def through(self, wire: Wire, source: Node, now: Wire) -> Wire:
        """Where a sampler's latent comes from: ``now``, over the nodes that led there from ``source`` if they lead to the same still."""
        if self.outputs.setdefault((source.id, 0), now).key == now.key:
            return self.resolve(wire) or now
        return now

    def model_of(self, sampler: Node) -> str:
        loader = self.loader_of(sampler)
        return "" if loader is None else str(loader.values.get("model", ""))

    def frames(self, sampler: Node) -> int | None:
        """How many frames a sampler makes, if the file says it."""
        wire = sampler.wires.get("num_frames")
        self.settled.add((sampler.id, "num_frames"))
        return self.setting(sampler, "num_frames", int, 49) if wire is None else self.constant(wire)

    def length(self, sampler: Node, step: int) -> tuple[dict, dict]:
        """``length`` as a value and, where it came over a link, as a wire: num_frames of the sampler, made ``step`` N + 1."""
        wire, known = sampler.wires.get("num_frames"), self.frames(sampler)
        frames = self.setting(sampler, "num_frames", int, 49) if known is None else known
        valid = max(1, (frames - 1 + step // 2) // step * step + 1)
        if valid == frames or known is None:
            if known is None:
                self.say(sampler, f"num_frames came over a link and is length now: what arrives there must be {step}N+1.")
            return {"length": valid}, {"length": self.resolve(wire)}
        self.say(
            sampler,
            f"num_frames {frames} became length {valid}: the model makes {step}N+1 frames."
            + (" It came over a link, which was cut." if wire else ""),
        )
        return {"length": valid}, {}

    def empty_latent(self, sampler: Node, source: Node | None) -> Wire | None:
        """The node with the size and length of a video that starts from noise."""
        name = self.model_of(sampler)
        values, wires = self.length(sampler, 16)
        if source is None:
            values["width"], values["height"] = _usual_size(name)
            self.say(sampler, f"nothing gave it a size: {values['width']}x{values['height']} was taken.")
            return Wire(self.make("CogVideoX15EmptyLatent", sampler, values, wires, own_id=False).id, 0)
        given = self.graph.widgets(source, _EMPTY_LATENTS[source.kind])
        for side, usual in zip(("width", "height"), _usual_size(name), strict=True):
            wire = source.wires.get(side)
            known = given.get(side) if wire is None else self.constant(wire)
            values[side], fits = self.side(source, side, known, usual)
            if wire is not None and fits:
                wires[side] = self.resolve(wire)
        batch = given.get("batch_size", 1)
        if batch != 1 or "batch_size" in source.wires:
            self.say(source, f"batch_size {batch}: {PACK} made one video whatever it said, and so does this. Set batch_size to make more.")
        consumers = [node for node in self.nodes.values() for wire in node.wires.values() if wire.node == source.id]
        own = all(node.id in self.old or node.kind in PASSING for node in consumers)
        new = self.make("CogVideoX15EmptyLatent", source, values, wires, own_id=own)
        return self.through(sampler.wires["samples"], source, Wire(new.id, 0)) if own else Wire(new.id, 0)

    def side(self, node: Node, side: str, given, usual: int) -> tuple[int, bool]:
        """A width or height that the model can make, and whether it is the one given."""
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            return usual, True
        valid = max(SIZE_STEP, (given + SIZE_STEP // 2) // SIZE_STEP * SIZE_STEP)
        if valid != given:
            self.say(node, f"{side} {given} became {valid}: the model makes multiples of {SIZE_STEP} pixels.")
        return valid, valid == given

    def picture_size(self, encode: Node, model: str, values: dict, wires: dict) -> None:
        """Set the video's width and height, which there were those of the start image: what scales it says them."""
        source = self.graph.trace(encode.wires.get("start_image"))
        order, tells = _RESIZERS.get("" if source is None else source.kind, ((), False))
        given = self.resized_to(source, order) if order else None
        fits = True
        for side, size, usual in zip(("width", "height"), given or (None, None), _usual_size(model), strict=True):
            values[side], same = self.side(source, side, size, usual)
            fits = fits and same
        if tells and fits:
            # Where the size is set now, it stays set.
            wires["width"], wires["height"] = (self.resolve(Wire(source.id, slot)) for slot in (1, 2))
        elif given is None:
            self.say(
                encode,
                f"the video was as large as its start image; here it is {values['width']}x{values['height']}, and the image is scaled and cropped to "
                "that. Set width and height.",
            )

    def resized_to(self, node: Node, order: tuple[str, ...]) -> tuple[int, int] | None:
        """The size that a node scales every picture to, if the file says it."""
        given = self.graph.widgets(node, order)
        size = [given.get(side) for side in ("width", "height")]
        depends = given.get("keep_proportion", given.get("method")) not in _EXACT or given.get("condition", "always") != "always"
        if depends or _SIZE_INPUTS & node.wires.keys() or not all(type(side) is int and side > 0 for side in size):
            return None
        step = next((given[name] for name in ("divisible_by", "multiple_of") if type(given.get(name)) is int and given[name] > 1), 1)
        return tuple(side - side % step for side in size)

    def decode(self, node: Node) -> None:
        self.make("CogVideoX15VAEDecode", node, {}, {"samples": self.resolve(node.wires.get("samples")), "vae": self.vae(node)})
        if self.setting(node, "enable_vae_tiling", bool, True):
            self.not_needed.append(f"{node.where}: tiling (the untiled frames are made in whatever memory is free)")


def _is_1_5(name: str) -> bool:
    """Whether a model is a CogVideoX-1.5, going by its name; one that says nothing is taken for it."""
    return re.search(r"1[._]5", name) is not None or re.search("[25]b|interpolation", name, re.IGNORECASE) is None


def _usual_size(model: str) -> tuple[int, int]:
    return (1360, 768) if _is_1_5(model) else (720, 480)
