"""The old pack's loaders, LoRAs and ways to be faster, as this pack's: there they are settings of the loader, here
nodes behind it.

The chain is loader, LoRAs, Quantize, Attention, Cache, Compile, sampler. What of it does not go together here is
decided for what works, and said. One file, as every link of that chain depends on the others.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from cogvideox.choices import COMPILE_DEFAULT, COMPILE_MODES, COMPILE_TUNED, FASTER_CACHE, FIRST_BLOCK, PAB, TEACACHE
from cogvideox.variants import TEACACHE_SECONDS
from cogvideox.words import short

from . import tables
from .conversion import Conversion, as_number, is_inpaint
from .graph import PASSING, Node, Wire
from .kinds import KINDS
from .workflow import BYPASSED, MUTED, OURS, is_2b

_CACHE_NAMES = {"CogVideoXFasterCache": "FasterCache", "CogVideoXTeaCache": "TeaCache", "CogVideoPABConfig": "PAB"}


class Loaders(Conversion):
    """What stands before the sampler: the model, and what changes it."""

    def __init__(self, *given):
        super().__init__(*given)
        self.sped_up: dict[tuple, Wire] = {}
        #: Nodes that are left out and were told of.
        self.told: set = set()
        self.vaes: dict[object, list[Node]] = {}
        for node in self.old.values():
            for name in ("vae", "vae_override"):
                source = self.graph.trace(node.wires.get(name))
                if source is not None:
                    self.vaes.setdefault(source.id, []).append(node)
        #: Samplers by their loaders.
        self.used_by: dict[object, list[Node]] = {}
        for sampler in self.samplers:
            loader = self.loader_of(sampler)
            if loader is not None:
                self.used_by.setdefault(loader.id, []).append(sampler)

    def loader(self, node: Node) -> None:
        asked, widget = self.asked(node), tables.MODEL_LOADERS[node.kind][0]
        if widget in node.values:
            self.setting(node, widget, str, "")
        elif widget in node.wires:
            self.settled.add((node.id, widget))
            self.say(node, f"which {widget} came over its link does not stand in the file. Choose it here.")
        values = {"model": self.model_name(node, asked) if asked else "", "dtype": self.dtype(node, asked)}
        if node.kind == "MZ_CogVideoXLoader":
            values["vae_name"] = self.setting(node, "vae_name", str, "auto").replace("\\", "/")
        if self.setting(node, "enable_sequential_cpu_offload", bool, False):
            values["memory"] = self.memory(node)
        if self.setting(node, "load_device", str, "main_device") == "offload_device":
            self.not_needed.append(f"{node.where}: load_device")
        new = self.make(OURS, node, values, {})
        model = Wire(new.id, 0)
        for lora, strength in self.lora_chain(node):
            model = Wire(self.lora(lora, strength, model).id, 0)
        method = self.quantization(node, asked)
        if method is not None:
            model = Wire(
                self.make("CogVideoX15Quantize", node, {"method": method}, {"model": model}, own_id=False).id, 0
            )
        if self.wants_sage(node):
            model = Wire(
                self.make("CogVideoX15Attention", node, {"attention": "sage"}, {"model": model}, own_id=False).id, 0
            )
        self.outputs[node.id, 0] = model
        if node.kind in ("DownloadAndLoadCogVideoModel", "DownloadAndLoadCogVideoGGUFModel"):
            self.outputs[node.id, 1] = Wire(new.id, 2)

    def model_name(self, node: Node, asked: str) -> str:
        """What to choose in our loader: the name of a folder or file, without what the loader adds to it."""
        name = asked.replace("\\", "/")
        if node.kind == "DownloadAndLoadCogVideoModel":
            name = tables.FOLDERS.get(asked, asked.split("/")[-1])
            self.say(
                node,
                f"model {short(asked)} became {short(name)}, its folder in models/CogVideo. If the loader does not "
                "find it, download a model (CogVideoX-1.5 Downloader has some) and choose that.",
            )
            if is_inpaint(asked):
                self.say(node, "if the model lies in models/CogVideoX_Fun, move its folder into models/CogVideo.")
        elif node.kind == "DownloadAndLoadCogVideoGGUFModel":
            name = f"GGUF/{name}"
            self.say(
                node,
                f"model {short(asked)} became {short(name)}, the file in models/CogVideo: its weights stay packed. If "
                "it lies in models/diffusion_models, choose it there. Put "
                "models/CogVideo/VAE/cogvideox_vae.safetensors into models/vae, and a T5 into models/text_encoders, "
                "if none are there.",
            )
        return name

    def dtype(self, node: Node, model: str) -> str:
        name = tables.MODEL_LOADERS[node.kind][1]
        dtype = self.setting(node, name, str, "bf16")
        if name in node.wires:
            self.settled.add((node.id, name))
            self.say(
                node,
                f"{name} came over a link, which is no more: dtype auto was taken, which is right for every model and "
                "card.",
            )
            return "auto"
        if node.kind == "MZ_CogVideoXLoader" and dtype not in tables.PRECISIONS:
            # What the weights are stored in: quantization tells of it.
            return "auto"
        if dtype == "fp16" and not is_2b(model):
            self.say(
                node,
                f"{name} fp16 became dtype auto: the model was trained in bf16, and plain fp16 makes it black. auto "
                "takes bf16, or on a card that has none fp16 in a way that cannot overflow.",
            )
            return "auto"
        if dtype not in tables.PRECISIONS:
            self.say(node, f"{name} {short(dtype)} is not here; dtype auto was taken.")
            return "auto"
        return dtype

    def memory(self, node: Node) -> str:
        """Where the weights are, of a loader that has one layer at a time on the card."""
        if any(
            self.cache(sampler) or self.compiling(node)
            for sampler in self.used_by.get(node.id, ())
            if not sampler.is_off
        ):
            self.say(
                node,
                "enable_sequential_cpu_offload became memory offload_blocks, not offload_layers, which does not go "
                "with compiling and with most caches. Try auto: the same video, in the fastest way that fits your "
                "card.",
            )
            return "offload_blocks"
        self.say(
            node,
            "enable_sequential_cpu_offload became memory offload_layers. Try auto: the same video, in the fastest way "
            "that fits your card.",
        )
        return "offload_layers"

    def quantization(self, node: Node, model: str) -> str | None:
        """The method of the node Quantize, or None for none."""
        name = (
            "weight_dtype"
            if node.kind == "MZ_CogVideoXLoader"
            else "fp8_transformer"
            if "fp8_transformer" in node.values
            else "quantization"
        )
        chosen = node.values.get(name, "disabled")
        chosen = (
            {True: "enabled", False: "disabled"}[chosen]
            if isinstance(chosen, bool)
            else self.setting(node, name, str, "disabled")
        )
        if name == "weight_dtype":
            chosen = chosen if chosen.startswith("fp8") else "disabled"
        fast = "fp8_fast_mode" if name == "weight_dtype" else "fp8_fastmode"
        if self.setting(node, fast, bool, False):
            chosen = "fp8_fastmode"
        if chosen == "disabled":
            return None
        if node.kind != "DownloadAndLoadCogVideoModel" and re.search(tables.PACKED, model, re.IGNORECASE):
            self.say(node, f"{chosen} was left out: the file, going by its name, is packed already, and stays so.")
            return None
        if chosen not in tables.QUANTIZATION:
            self.say(
                node,
                f"{name} {short(chosen)} is not known here: weights are used as they are stored. CogVideoX-1.5 "
                "Quantize has int8 and fp8.",
            )
            return None
        method, same = tables.QUANTIZATION[chosen]
        why = "" if same else ": there is none smaller here, and this loses less"
        self.say(node, f"{chosen} became the node CogVideoX-1.5 Quantize with {method}{why}.")
        return method

    def wants_sage(self, node: Node) -> bool:
        """Whether the attention is computed in 8 bits. All others give the same picture, and the fastest of them is
        taken without being told."""
        attention = self.setting(node, "attention_mode", str, "sdpa")
        if "sage" in attention:
            which = "" if attention == "sageattn" else ", which takes the kernel that suits the card"
            self.say(
                node, f"attention_mode {short(attention)} became the node CogVideoX-1.5 Attention with sage{which}."
            )
            return True
        if attention not in ("sdpa", "fused_sdpa", "comfy"):
            self.say(node, f"attention_mode {short(attention)} is not known here: PyTorch's own attention is used.")
        elif attention != "sdpa":
            self.not_needed.append(f"{node.where}: attention_mode {attention} (PyTorch's own gives the same)")
        return False

    # --- LoRAs ---

    def lora_chain(self, loader: Node) -> list[tuple[Node, float]]:
        """The LoRAs that a loader is given, in the order in which they were chosen, and what their strengths are
        multiplied by."""
        chain = self._loras(loader)
        running = [node for node in chain if not node.is_off]
        # That pack fuses all if the last is to be, and divides by the last one's rank if one (in older versions: the
        # last) is a DimensionX.
        divided = [
            node for node in running if re.search(tables.DIVIDED, str(node.values.get("lora", "")), re.IGNORECASE)
        ]
        if "fp8_transformer" in loader.values:
            divided = [node for node in divided if node is running[-1]]
        if not divided or running[-1].values.get("fuse_lora") is not True:
            return [(node, 1.0) for node in chain]
        name = str(running[-1].values.get("lora", ""))
        rank = re.search(r"(?:rank|[_-]r|dim)[_-]?(\d{1,4})(?!\d)", name, re.IGNORECASE)
        known = int(rank[1]) if rank and int(rank[1]) > 0 else tables.DIMENSIONX_RANK
        said = (
            "by its name"
            if known != tables.DIMENSIONX_RANK or rank
            else "as of all that DimensionX published; if it is another, correct it"
        )
        self.say(
            running[-1],
            f"fused LoRAs called orbit or dimensionx were applied at strength / rank there, and so {len(running)} of "
            f"this chain is here: divided by {known}, the rank of {short(name)} ({said}). If that is too weak, the "
            "LoRA was trained to be used at its strength: set it.",
        )
        return [(node, 1 / known) for node in chain]

    def _loras(self, loader: Node) -> list[Node]:
        # Bypassed ones are kept, bypassed: ours pass their model on as those passed on their list.
        chain: list[Node] = []
        wire, seen, is_cut = loader.wires.get("lora"), set(), False
        while wire is not None and (node := self.nodes.get(wire.node)) is not None and node.id not in seen:
            seen.add(node.id)
            if node.kind in tables.LORAS:
                if node.raw.get("mode") == MUTED:
                    is_cut = True
                    self.say(
                        node,
                        "it is muted, so neither it nor the LoRAs before it were used: here they are bypassed, as a "
                        "muted LoRA Loader would leave the sampler without a model.",
                    )
                chain.insert(0, replace(node, raw={**node.raw, "mode": BYPASSED}) if is_cut else node)
                wire = node.wires.get("prev_lora")
            elif node.kind in PASSING:
                wire = self.graph.before(node, wire.slot)
            else:
                break
        return chain

    def lora(self, node: Node, share: float, model: Wire) -> Node:
        values, wires = {"lora_name": self.setting(node, "lora", str, "").replace("\\", "/")}, {"model": model}
        given = self.setting(node, "strength", (int, float), 1.0)
        linked = self.constant(node.wires.get("strength"))
        limits = KINDS["CogVideoX15LoraLoader"].limits("strength")
        strength = self.limited(node, "strength", given if linked is None else linked, limits)
        if share == 1:
            self.keep(node, "strength", strength, wires, values)
        else:
            values["strength"] = round(strength * share, 6)
            if "strength" in node.wires:
                self.settled.add((node.id, "strength"))
                self.say(
                    node,
                    f"strength came over a link, which was cut, as it is to be divided: {strength} x {share:.6g} was "
                    "taken.",
                )
        if self.setting(node, "fuse_lora", bool, False):
            self.not_needed.append(f"{node.where}: fuse_lora")
        return self.make("CogVideoX15LoraLoader", node, values, wires)

    # --- Faster ---

    def faster(self, sampler: Node) -> Wire | None:
        """A sampler's model, with the cache and the compiling that are its own or its loader's: one chain for all
        samplers that ask the same."""
        model, loader = self.resolve(self.model_wire(sampler)), self.loader_of(sampler)
        if model is None or loader is None:
            return model
        cache, compiling = self.cache(sampler), self.compiling(loader)
        for name, (place, given) in (
            ("CogVideoX15Cache", cache or (None, {})),
            ("CogVideoX15Compile", compiling or (None, {})),
        ):
            if place is None:
                continue
            key = name, model.key, tuple(given.items())
            if key not in self.sped_up:
                self.sped_up[key] = Wire(
                    self.make(name, place, given, {"model": model}, own_id=place.id != loader.id).id, 0
                )
            model = self.sped_up[key]
        if cache is not None:
            self.say_cache(sampler, *cache, compiling is not None)
        if compiling is not None:
            self.say_compiling(loader, *compiling)
        return model

    def cache(self, sampler: Node) -> tuple[Node, dict] | None:
        """The cache that a sampler runs with: the node it comes from, and the values of ours."""
        return next(iter(self.caches(sampler)), None)

    def caches(self, sampler: Node) -> list[tuple[Node, dict]]:
        """All that a sampler is given; the first is the one that is taken, as a model has one cache here."""
        # Where the blocks are compiled, the one whose own method goes with that.
        return sorted(
            self._caches(sampler),
            key=lambda found: found[1]["method"] == FIRST_BLOCK and found[0].kind != "CogVideoXTeaCache",
        )

    def _caches(self, sampler: Node) -> Iterator[tuple[Node, dict]]:
        loader = self.loader_of(sampler)
        compiled = loader is not None and self.compiling(loader) is not None
        # Caches within the blocks cannot be compiled.
        steps = max(1, self._number(sampler, "steps", 50, whole=True))
        faster = self._given(sampler, "fastercache")
        if faster is not None:
            # It begins three steps after its counter has come to start_step.
            start = (self._number(faster, "start_step", 15, whole=True) + 3) / steps
            if start < 1:
                yield (
                    faster,
                    {
                        "method": FIRST_BLOCK if compiled else FASTER_CACHE,
                        "strength": 0.6,
                        "start": round(start, 3),
                        "end": 1.0,
                    },
                )
        tea = self._given(sampler, "teacache_args")
        if tea is not None:
            threshold = self._number(tea, "rel_l1_thresh", 0.3)
            if threshold > 0:
                yield (
                    tea,
                    {
                        "method": TEACACHE,
                        "strength": tea_strength(threshold),
                        # It acted in the whole run.
                        "start": 0.0,
                        "end": 1.0,
                    },
                )
        pab = self._given(loader, "pab_config") if loader is not None else None
        if pab is not None and pab.values.get("spatial_broadcast", True) is True:
            old = "pab_range" in pab.values
            every = self._number(pab, "pab_range" if old else "spatial_range", 2, whole=True)
            start, end = (
                min(
                    1.0,
                    max(
                        0.0,
                        round(
                            1
                            - self._number(pab, f"{'pab' if old else 'spatial'}_threshold_{side}", usual, whole=True)
                            / 1000,
                            3,
                        ),
                    ),
                )
                for side, usual in (("start", 850), ("end", 100))
            )
            if every > 1 and start < end:
                method = FIRST_BLOCK if compiled else PAB
                yield pab, {"method": method, "strength": round(1 - 1 / min(every, 10), 3), "start": start, "end": end}

    def _given(self, node: Node, name: str) -> Node | None:
        source = self.graph.trace(node.wires.get(name))
        return source if source is not None and source.kind == tables.EXPECTED[name] else None

    def _number(self, node: Node, name: str, default, whole: bool = False):
        """A widget's number, for a calculation; that it is none is told where the widget itself is carried over."""
        value = self.constant(node.wires.get(name))
        value = as_number(node.values.get(name, default), int if whole else (int, float)) if value is None else value
        good = type(value) is int or (type(value) is float and not whole)
        return value if good and -1e6 < value < 1e6 else default

    def say_cache(self, sampler: Node, place: Node, values: dict, compiled: bool) -> None:
        name, method = _CACHE_NAMES[place.kind], values["method"]
        text = f"{name} became the node CogVideoX-1.5 Cache with {method}, strength {values['strength']}"
        if name == "TeaCache":
            text += (
                ": about the share of the steps that rel_l1_thresh skips by what its authors publish for 1.5. Here the "
                "first step and the last always run, and 1.5 has its own polynomial, where that of CogVideoX-5b was "
                "used; the node says which threshold a strength is"
            )
        elif compiled:
            text += f", as the cache {'faster_cache' if name == 'FasterCache' else 'pab'} does not go with compiling"
        self.say(place, f"{text}.")
        for other, _ in self.caches(sampler)[1:]:
            self.say(
                other,
                f"{_CACHE_NAMES[other.kind]} is left out: a model has one cache here, and node {short(place.id)} "
                "gives it.",
            )
            self.told.add(other.id)

    def compiling(self, loader: Node) -> tuple[Node, dict] | None:
        """How a loader's transformer is compiled: the node that says it, and the values of ours. None if it is not."""
        settings, chosen = self._given(loader, "compile_args"), loader.values.get("compile")
        if any(name in loader.values for name in ("compile", "torch_compile", "onediff", "fp8_transformer")):
            # Then the settings counted only where compiling was chosen.
            if (
                chosen not in ("torch", "onediff")
                and loader.values.get("torch_compile") is not True
                and loader.values.get("onediff") is not True
            ):
                return None
        elif settings is None:
            return None
        place = loader if settings is None else settings
        mode, dynamic = place.values.get("mode"), place.values.get("dynamic") is True
        tuned = isinstance(mode, str) and mode.startswith("max-autotune")
        return place, {"mode": COMPILE_TUNED if tuned else COMPILE_DEFAULT, "dynamic": dynamic}

    def say_compiling(self, loader: Node, place: Node, values: dict) -> None:
        mode, backend = place.values.get("mode", "default"), place.values.get("backend", "inductor")
        text = f"torch.compile became the node CogVideoX-1.5 Compile with {values['mode']}"
        if mode not in COMPILE_MODES:
            text += f" ({short(mode)} uses CUDA graphs, which are not used here)"
        if backend != "inductor" or loader.values.get("compile") == "onediff" or loader.values.get("onediff") is True:
            text += "; only torch's inductor is here"
        self.say(place, f"{text}.")

    # --- The VAE ---

    def vae_loader(self, node: Node) -> None:
        """A VAE in a file of its own is chosen in the model loader that it is used with."""
        loaders = (self.loader_beside(consumer) for consumer in self.vaes.get(node.id, ()))
        old = next((loader for loader in loaders if loader is not None), None)
        old = old or next((other for other in self.old.values() if other.kind in tables.MODEL_LOADERS), None)
        if old is None:
            self.say(node, "left out: there is no model loader, which is where a VAE is chosen here.")
            return
        loader = self.made[old.id]
        name = self.setting(node, "model_name", str, "auto").replace("\\", "/")
        if loader.values["vae_name"] not in ("auto", name) and old.kind != "MZ_CogVideoXLoader":
            chosen = short(loader.values["vae_name"])
            self.say(
                node,
                f"a loader has one VAE, and {chosen} was chosen in node {short(loader.id)} already; {short(name)} was "
                "left out.",
            )
        else:
            loader.values["vae_name"] = name
        if self._given(node, "compile_args") is not None:
            self.say(node, "compiling the VAE is not here: it runs as it is.")
        self.outputs[node.id, 0] = Wire(loader.id, 2)
        self.not_needed.append(
            f"{node.where}: it is vae_name of node {short(loader.id)} now, and its precision follows dtype"
        )

    def loader_beside(self, node: Node) -> Node | None:
        """The model loader of the sampler that a decoder or encoder works with."""
        found = self.graph.trace(node.wires.get("pipeline"))
        if found is not None and found.kind in tables.MODEL_LOADERS:
            return found
        if node.kind == "CogVideoDecode":
            sampler = self.graph.trace(node.wires.get("samples"))
            return self.loader_of(sampler) if sampler is not None and sampler.kind == "CogVideoSampler" else None
        sampler = self.starts.get(node.id)
        return None if sampler is None else self.loader_of(sampler)

    def vae(self, node: Node) -> Wire | None:
        """The VAE of an old node, which comes from a model loader now."""
        now, old = self.resolve(node.wires.get("vae_override") or node.wires.get("vae")), self.loader_beside(node)
        return now if now is not None or old is None else Wire(old.id, 2)


def tea_strength(threshold: float) -> float:
    """Return the share of the steps that TeaCache skips at a threshold, as its published times for 1.5 have it: linear
    between them, on as between the last two, and 0.8 at most."""
    points = [(known, 1 - seconds / TEACACHE_SECONDS[0]) for known, seconds in sorted(TEACACHE_SECONDS.items())]
    (low, share), (high, more) = next((pair for pair in pairwise(points) if threshold <= pair[1][0]), points[-2:])
    return min(0.8, max(0.05, round(share + (threshold - low) / (high - low) * (more - share), 2)))
