"""Which model an ``inference.yaml`` of SAT runs, and what that was trained in: by shapes, by settings, by a folder's
name."""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

from cogvideox.files import read_bytes
from cogvideox.precision.verdict import WARNING, Finding
from cogvideox.variants import Variant, identify
from cogvideox.words import listed, reason, short

from .sat_config import MAX_BYTES, SatConfig, children, compose_yaml, plain_value

logger = logging.getLogger(__name__)

#: Latent frames of the clips that CogVideoX-1.5 makes: 81 and 161 frames, and one more for its patches of two. The
#: others make 13.
_FRAMES_1_5 = (22, 42)
#: What a checkpoint's folder is called -> the model, and what that was trained in.
_FOLDERS = (
    (r"cogvideox?[-_ ]?(5b[-_ ]?)?1[._]5", "CogVideoX1.5", "bf16"),
    (r"cogvideox?[-_ ]?5b", "CogVideoX-5b", "bf16"),
    (r"cogvideox?[-_ ]?2b", "CogVideoX-2b", "fp16"),
)


@dataclass(frozen=True)
class Model:
    """Which model a config runs, the dtype it was trained in (``bf16``, ``fp16`` or None for not known), how that is
    known, and whether for sure."""

    name: str
    trained: str | None
    source: str
    is_sure: bool = True

    @property
    def text(self) -> str:
        return (
            f"{self.name}, trained in {self.trained}, {self.source}" if self.trained else f"{self.name}: {self.source}"
        )


def identify_model(config: SatConfig) -> tuple[Model, list[Finding]]:
    """Which model an ``inference.yaml`` runs, from the surest source that there is: by shapes, by settings, and by a
    folder's name last.

    SAT is given the model's config beside the inference.yaml on its command line, which is not to be seen here; so the
    places where that config, or the weights, usually are are looked at in turn.
    """
    said: list[Finding] = []

    def known(variants: list[Variant], source: str) -> Model:
        names = dict.fromkeys(variant.name for variant in variants)
        return Model(" or ".join(names), variants[0].trained, source)

    if variant := _described(config.root):
        return known([variant], "known by its own model: section"), said
    file = _checkpoint(config)
    if file is not None:
        try:
            variant = _stored(file)
        except (
            Exception
        ) as error:  # whatever a damaged pickle makes torch raise: it is told, and the other sources still stand
            refused = "could run code" in str(error)
            why = "holds more than tensors, which could run code" if refused else f"cannot be read ({reason(error)})"
            said.append(
                Finding(
                    f"args.load, {short(file, 400)}",
                    WARNING,
                    f"The checkpoint {why}, so it was not opened and says nothing about the model.",
                    "Download it again from the authors if it should be one of theirs.",
                )
            )
        if variant:
            return known([variant], f"known by the shapes in {file}"), said
    beside = _beside(config.file)
    if beside and len({variant.trained for variant in beside.values()}) == 1:
        return known(list(beside.values()), f"known by the model config beside it ({listed(beside, 5)})"), said
    if config.values.get("sampling_fps") == 16:
        return Model(
            "CogVideoX1.5", "bf16", "known by sampling_fps: 16 (the other models make 8 frames a second)"
        ), said
    frames = config.values.get("sampling_num_frames")
    if type(frames) is int and frames in _FRAMES_1_5:
        return Model(
            "CogVideoX1.5", "bf16", f"known by sampling_num_frames: {frames} (latent frames; the other models make 13)"
        ), said
    named = _named(config)
    if named:
        folder, name, trained = named
        source = (
            f"going by the name of the checkpoint's folder alone ({short(folder)} in args.load), which can be wrong"
        )
        return Model(f"{name} (by its folder's name)", trained, source, False), said
    tried = (
        "its own model: section, the checkpoint in args.load and its folder's name, the model configs beside it, "
        "sampling_fps and sampling_num_frames do not say"
    )
    return Model("an unknown CogVideoX", None, f"not known ({tried})"), said


def _described(root) -> Variant | None:
    """The variant a ``model:`` section describes, or None if it does not say."""
    node = root
    for key in ("model", "network_config", "params"):
        node = (children(node, key) or [None])[-1]
    if node is None:
        return None
    try:
        params = plain_value(node)
    except ValueError as error:
        logger.info("A model: section is passed over: %s", reason(error))
        return None
    patch = params.get("patch_size") if isinstance(params, dict) else None
    time_patch = patch[0] if isinstance(patch, list) and len(patch) == 3 and patch[0] != 1 else None
    target = params
    for key in ("modules", "pos_embed_config", "target"):
        target = target.get(key) if isinstance(target, dict) else None
    if time_patch is None and not isinstance(target, str):
        return None
    return _variant(
        params.get("num_layers"),
        params.get("num_attention_heads"),
        params.get("in_channels", 16),
        time_patch,
        "Rotary3D" in str(target),
    )


def _variant(layers, heads, channels, time_patch, rotary) -> Variant:
    """``variants.identify`` on what SAT knows of a model."""
    variant = identify(
        {
            "num_layers": layers,
            "num_attention_heads": heads,
            "in_channels": channels,
            "patch_size_t": time_patch,
            "use_rotary_positional_embeddings": rotary,
        }
    )
    return variant if layers and heads else replace(variant, name=variant.name.split(" (")[0])


def _checkpoint(config: SatConfig) -> Path | None:
    """The weights ``args.load`` points at, if they are there."""
    load, here = config.values.get("load"), config.file.parent
    if not isinstance(load, str) or not load or "\0" in load:
        return None
    # SAT resolves it against the folder it is started in: the file's own, or the one above configs/.
    try:
        folders = [folder for folder in (here / load, here.parent / load) if folder.is_dir()]
    except OSError as error:  # such as a name that is too long
        logger.info("args.load is passed over: %s", reason(error))
        return None
    if not folders:
        return None
    # Here and not above: it imports torch, which a config without its weights does not need.
    from cogvideox.checkpoint.layout import sat_step

    return next((file for folder in folders if (file := sat_step(folder)) is not None), None)


def _named(config: SatConfig) -> tuple[str, str, str] | None:
    """What the checkpoint's folder is called, if that is a model's name: the folder, the model, and what that was
    trained in."""
    load = config.values.get("load")
    if (
        not isinstance(load, str) or "{" in load
    ):  # {your_CogVideoX-2b-sat_path}/transformer, as the authors' own file has it, is no name
        return None
    for part in reversed(re.split(r"[\\/]", load)[-3:]):
        for pattern, name, trained in _FOLDERS:
            if re.search(pattern, part, re.IGNORECASE):
                return part, name, trained
    return None


def _stored(file: Path) -> Variant | None:
    """The variant whose weights a SAT checkpoint holds, by names and shapes; None if they do not say. No weight is
    read.

    Raises:
        ValueError: if it cannot be read, or holds anything but tensors and plain containers: opening it would run code.
    """
    from cogvideox.checkpoint.pickles import read_pickle_shapes

    shapes = {name.removeprefix("model.diffusion_model."): shape for name, shape in read_pickle_shapes(file).items()}
    patch = shapes.get("mixins.patch_embed.proj.weight", ())
    if len(patch) not in (2, 4):
        return None
    width, heads = patch[0], patch[0] // 64
    layers = len({name.split(".")[2] for name in shapes if name.startswith("transformer.layers.")})
    if len(patch) == 2:
        # A linear layer over 2 x 2 x 2 patches; the 1.0 models have a convolution over 2 x 2.
        return _variant(layers, heads, patch[1] // 8, 2, True)
    if any(name.endswith(("freqs_sin", "freqs_cos")) for name in shapes):
        rotary = True
    elif "mixins.pos_embed.pos_embedding" in shapes:
        # The sin-cos table is a parameter. So is the learned one that image-to-video models have on top of rotary
        # positions.
        rotary = patch[1] == 32
    elif width in (1920, 3072):
        # Neither leaves a trace where the table was not saved and the rotary angles are no buffers: go by the released
        # widths.
        rotary = width == 3072
    else:
        return None
    return _variant(layers, heads, patch[1], None, rotary)


def _beside(file: Path) -> dict[str, Variant]:
    """The variants that the other YAML files of the folder describe, by file name."""
    found, left = {}, MAX_BYTES
    for other in sorted(file.parent.glob("*.yaml")):
        if other.name == file.name:
            continue
        try:
            raw = read_bytes(other, left)
            left -= len(raw)
            variant = _described(compose_yaml(other, raw)[1])
        except ValueError as error:
            logger.info("%s is passed over: %s", short(other, 400), error)
            continue
        if variant:
            found[other.name] = variant
    return found
