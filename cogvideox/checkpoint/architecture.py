"""Whether a part is CogVideoX's, and its tensors those that its config asks for.

A part is known to be whole in a millisecond, without building its module: ``expected`` says what that would hold. What
a part is, if it is none that runs here, is told by name before its tensors are counted.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from ..variants import LATENT_CHANNELS, SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, foreign_inputs, identify
from ..words import listed, short
from .expected import TIED, Shape, expected_tensors
from .foreign import ForeignError
from .headers import StoredTensor

if TYPE_CHECKING:
    from .parts import Part

#: The class's name in sentences.
_NAMES = {"transformer": "transformer", "text_encoder": "text encoder", "vae": "VAE"}
#: T5 v1.1's tokens are 32,128, some of them for words that people add; multilingual T5s have 250,000.
_MOST_TOKENS = 2 * 32_128
#: Of T5 v1.1 XXL's encoder, which the released models were trained with.
_XXL_LAYERS = 24


def check_part(part: "Part") -> None:
    """Make sure that a part is CogVideoX's, and that its tensors are those of the module its config would make.

    Raises:
        ForeignError: if it is another model's, or of a kind that is not run here.
        ValueError: if tensors are missing, left over, or of another shape, or its config is none.
    """
    _CHECKS[part.kind](part)
    check_tensors(part, expected_tensors(part.kind, part.config, _origin(part)), TIED.get(part.kind, ()))
    _check_scales(part)


def check_together(transformer: "Part", part: "Part") -> None:
    """Make sure that a text encoder or VAE is one that a transformer was trained with, as far as shapes show.

    Raises:
        ForeignError: if it is not, naming the widths of both.
    """
    if part.kind != "text_encoder":
        # Every CogVideoX VAE goes with every transformer: check_part knows its latents.
        return
    width = part.tensors["encoder.final_layer_norm.weight"].shape[0]
    wanted = transformer.tensors["patch_embed.text_proj.weight"].shape[1]
    xxl = "a T5 v1.1 XXL encoder, such as t5xxl_fp16.safetensors"
    if width != wanted:
        raise ForeignError(
            f"The text encoder in {short(part.source, 400)} gives {width} numbers a token, and the transformer in "
            f"{short(transformer.source, 400)} reads {wanted}: it was trained with another T5. Choose "
            f"{xxl if wanted == 4096 else 'the T5 it was trained with'}."
        )
    variant, layers = identify(transformer.config), _count_blocks(part)
    if variant.is_released and layers != _XXL_LAYERS:
        raise ForeignError(
            f"The text encoder in {short(part.source, 400)} has {layers} layers, and the T5 v1.1 XXL that "
            f"{variant.name} was trained with has {_XXL_LAYERS}: its embeddings would be others. Choose {xxl}."
        )


def check_tensors(part: "Part", wanted: Mapping[str, Shape], tied: Iterable[Collection[str]] = ()) -> None:
    """Compare the tensors of a part with those that its module wants, by name and shape.

    Args:
        tied: groups of names of one tensor each.

    Raises:
        ValueError: if they differ, naming the first that do and the number of all.
    """
    found = part.tensors
    missing = {name for name in wanted if name not in found}
    for group in map(list, tied):
        missing -= set(group[1:] if missing.issuperset(group) else group)
    unknown = [name for name in found if name not in wanted]
    wrong = [name for name, shape in wanted.items() if name in found and found[name].shape != shape]
    problems = [f"{len(missing)} missing ({listed(sorted(missing))})"] if missing else []
    problems += [f"{len(unknown)} unknown ({listed(sorted(unknown))})"] if unknown else []
    problems += [f"{len(wrong)} of another shape ({listed(sorted(wrong))})"] if wrong else []
    if not problems:
        return
    told = ""
    if wrong:
        first = min(wrong)
        told = f" {short(first)} is {short(found[first].shape)}, and should be {wanted[first]}."
    raise ValueError(
        f"The weights in {short(part.source, 400)} (layout: {part.layout}) do not fit {_origin(part)}, from which the "
        f"{_NAMES[part.kind]} would be made: of {len(wanted)} tensors, {'; '.join(problems)}.{told}{_blocks(part)} "
        f"The model would not be the one that was trained. {_remedy(missing, unknown, wrong)}"
    )


#: Models that add layers to CogVideoX's transformer: the model, what it adds, and how the names of those layers begin.
#: The first that fits counts.
#: github.com: PKU-YuanGroup/ConsisID, IGL-HKUST/DiffusionAsShader, TrajectoryCrafter/TrajectoryCrafter, alibaba/Tora,
#: TheDenk/cogvideox-controlnet
_DESCENDANTS = (
    ("ConsisID", "a face to keep", ("local_facial_extractor",)),
    (
        "Diffusion as Shader",
        "the tracking of points",
        ("combine_linears", "initial_combine_linear", "transformer_blocks_copy"),
    ),
    ("TrajectoryCrafter", "the path of a camera", ("ref_patch_embed", "perceiver_cross_attention")),
    ("Tora", "the paths of objects", ("traj_extractor", "fuser", "fuser_list")),
    (
        "a ControlNet",
        "control by pictures",
        ("controlnet_encode_first", "controlnet_encode_second", "out_projectors"),
    ),
)


def _check_transformer(part: "Part") -> None:
    """It must be CogVideoX's and no descendant's, and its inputs those of the models that run here."""
    begins = {name.split(".", 1)[0]: name for name in part.tensors}
    for model, what, layers in _DESCENDANTS:
        seen = sorted(begins[layer] for layer in layers if layer in begins)
        if seen:
            raise ForeignError(
                f"{short(part.source, 400)} is {model}, which adds {what} to CogVideoX, by its tensors "
                f"({listed(seen)}): what is added cannot run here, and without it the model would be another one. Use "
                "the nodes or scripts that were made for it, or choose a CogVideoX transformer."
            )
    why = foreign_inputs(part.config)
    if why:
        raise ForeignError(f"The transformer in {short(part.source, 400)} {why}")


def _check_text_encoder(part: "Part") -> None:
    """T5 v1.1's encoder, whatever its size, and none of its relatives."""
    tokens = part.config.get("vocab_size")
    many_biases = any(
        name.endswith(".SelfAttention.relative_attention_bias.weight") and ".block.0." not in name
        for name in part.tensors
    )
    if many_biases:
        what = "UMT5 (every layer has its own relative_attention_bias), the text encoder of Wan and others"
    elif isinstance(tokens, int) and tokens > _MOST_TOKENS:
        what = f"a multilingual T5 (mT5 or UMT5: {tokens:,} tokens, and T5 v1.1 has 32,128)"
    elif not any(name.endswith(".DenseReluDense.wi_0.weight") for name in part.tensors):
        what = "the first T5 (one wi in each feed-forward layer, and T5 v1.1 has wi_0 and wi_1)"
    else:
        return
    raise ForeignError(
        f"{short(part.source, 400)} is {what}: CogVideoX was trained with T5 v1.1, and its embeddings mean nothing to "
        "it. Choose a T5 v1.1 XXL encoder, such as t5xxl_fp16.safetensors."
    )


def _check_vae(part: "Part") -> None:
    """The latents must be those that CogVideoX's transformers were trained on."""
    config = part.config
    latent, widths = (
        config.get("latent_channels", LATENT_CHANNELS),
        config.get("block_out_channels", (128, 256, 256, 512)),
    )
    if latent != LATENT_CHANNELS:
        seen = f"{short(latent)} latent channels, and CogVideoX's have {LATENT_CHANNELS}"
    elif isinstance(widths, list | tuple) and 2 ** (len(widths) - 1) != SPATIAL_COMPRESSION:
        levels = SPATIAL_COMPRESSION.bit_length()
        seen = (
            f"{len(widths)} levels, and CogVideoX's have {levels}, which make latents {SPATIAL_COMPRESSION} times "
            "smaller"
        )
    elif config.get("temporal_compression_ratio", TEMPORAL_COMPRESSION) != TEMPORAL_COMPRESSION:
        seen = (
            f"{short(config['temporal_compression_ratio'])} frames to a latent frame, and CogVideoX's have "
            f"{TEMPORAL_COMPRESSION}"
        )
    else:
        return
    raise ForeignError(
        f"The VAE in {short(part.source, 400)} has {seen}: no CogVideoX transformer was trained on its latents. Choose "
        "the VAE of a CogVideoX release, such as vae/ of zai-org/CogVideoX1.5-5B."
    )


_CHECKS = {"transformer": _check_transformer, "text_encoder": _check_text_encoder, "vae": _check_vae}


def _check_scales(part: "Part") -> None:
    """Scales belong to fp8 weights: one number each, or one for each row."""

    def fits(name: str, scale: StoredTensor) -> bool:
        weight = part.tensors.get(name)
        rows = weight.shape[0] if weight is not None and weight.shape else 1
        return (
            weight is not None
            and weight.is_packed
            and weight.quantization is None
            and scale.shape in ((), (1,), (1, 1), (rows,), (rows, 1))
        )

    wrong = sorted(name for name, scale in part.scales.items() if not fits(name, scale))
    if wrong:
        raise ValueError(
            f"{short(part.source, 400)} holds {len(wrong)} scales that fit no fp8 weight ({listed(wrong)}): a scale is "
            "one number, or one for each row, and multiplies a weight in fp8. How these weights are packed is not "
            "known here. Choose another fp8 file, GGUF, or the weights as they were."
        )


def _origin(part: "Part") -> str:
    return f"its config.json ({part.source / 'config.json'})" if part.layout == "diffusers" else "its shapes"


#: What stands before the numbers of a part's blocks.
_BLOCKS = {"transformer": "transformer_blocks.", "text_encoder": "encoder.block."}


def _count_blocks(part: "Part") -> int:
    prefix = _BLOCKS[part.kind]
    return len({name[len(prefix) :].split(".")[0] for name in part.tensors if name.startswith(prefix)})


def _blocks(part: "Part") -> str:
    """What the weights say of the number of blocks, where the config says another."""
    said = part.config.get("num_layers")
    if part.kind not in _BLOCKS or said is None or said == _count_blocks(part):
        return ""
    return f" The config says num_layers {short(said)}, and the weights have {_count_blocks(part)} blocks."


def _remedy(missing: Collection[str], unknown: Collection[str], wrong: Collection[str]) -> str:
    if unknown and not missing and not wrong:
        return (
            "What is unknown was left in by training or is another program's: save the model without it, or choose "
            "another copy."
        )
    if missing and not unknown and not wrong:
        return "Download it again, whole: it was cut off, or is one piece of several."
    return "Download weights and config.json again, whole, from one repository."
