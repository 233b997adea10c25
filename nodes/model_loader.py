"""CogVideoX-1.5 Model Loader: opens a checkpoint's transformer, text encoder and VAE, and reports their dtypes."""

import logging

from ..cogvideox.choices import DTYPES, MEMORY, ON_MISMATCH, check_choice
from ..cogvideox.words import listed, short
from . import host
from .base import Node
from .inputs import OfField
from .queued import UNKNOWN

logger = logging.getLogger(__name__)

#: The choice of a part that takes the checkpoint's own, or one that is found.
_AUTO = "auto"


class ModelLoader(Node):
    DISPLAY_NAME = "CogVideoX-1.5 Model Loader"
    DESCRIPTION = (
        "Opens a CogVideoX checkpoint (a folder of diffusers or SAT in models/CogVideo or models/diffusers, or a "
        "single file in models/diffusion_models or models/checkpoints), checks what its weights are stored in and "
        "were trained in, and decides in which dtype each part runs. Weights are read when a node first needs them, "
        "not here."
    )
    SEARCH_ALIASES = [
        "CogVideoX Model Loader",
        "(Down)load CogVideo Model",
        "DownloadAndLoadCogVideoModel",
        "Load CogVideoX-Fun Model",
        "cogvideo",
        "cogvideox",
        "load cogvideox",
        "text to video",
        "checkpoint loader",
        "加载模型",
    ]
    RETURN_TYPES = ("COGVIDEOX_MODEL", "COGVIDEOX_TEXT_ENCODER", "COGVIDEOX_VAE", "STRING")
    RETURN_NAMES = ("model", "text_encoder", "vae", "report")
    OUTPUT_TOOLTIPS = (
        "The transformer, for the sampler.",
        "The T5 text encoder, for CogVideoX-1.5 Text Encode.",
        "The video VAE, for CogVideoX-1.5 VAE Decode.",
        "Per part: the dtype it is stored in, was trained in and will run in, a verdict, and what to do. Also shown "
        "on the node.",
    )

    FIELD = "model"

    @classmethod
    def INPUT_TYPES(cls):
        found = host.checkpoints()
        return {
            "required": {
                "model": (
                    [entry.label for entry in found],
                    {
                        "tooltip": (
                            "A CogVideoX checkpoint: a folder in models/CogVideo or models/diffusers (diffusers or "
                            "SAT), or a single file in models/diffusion_models or models/checkpoints. Only real "
                            "CogVideoX checkpoints are listed, with what they are."
                        )
                    },
                ),
                "dtype": (
                    list(DTYPES),
                    {
                        "default": "auto",
                        "tooltip": (
                            "The dtype to run in. auto: the one the weights were trained in where your card has it, "
                            "else the fastest that gives the same picture (range-safe fp16 on cards without bf16). "
                            "CogVideoX-1.5 was trained in bf16; plain fp16 turns it black."
                        ),
                    },
                ),
            },
            "optional": {
                "on_mismatch": (
                    list(ON_MISMATCH),
                    {
                        "advanced": True,
                        "default": "fix",
                        "tooltip": (
                            "If the dtype does not suit the weights or the card. fix: run in a way that gives a right "
                            "picture, and say what was changed. warn: run as chosen. stop: an error before a second "
                            "is spent."
                        ),
                    },
                ),
                "memory": (
                    list(MEMORY),
                    {
                        "default": "auto",
                        "tooltip": (
                            "Where the weights are while they run. auto: the fastest mode that fits the video and the "
                            "card; the report has what each takes. gpu: all on the card. offload_blocks, "
                            "offload_layers: in the computer's memory, brought to the card piece by piece: slower, in "
                            "much less of the card's memory, and the same video. cpu: not on the card at all."
                        ),
                    },
                ),
                "scan_weights": (
                    "BOOLEAN",
                    {
                        "advanced": True,
                        "default": False,
                        "tooltip": (
                            "Read every weight once and report NaN, Inf, and what an fp16 copy would lose. Takes as "
                            "long as reading the files; can be cancelled."
                        ),
                    },
                ),
                **{
                    f"{kind}_name": (
                        [_AUTO, *(entry.label for entry in host.parts(kind, found))],
                        {
                            "default": _AUTO,
                            "tooltip": f"{what} auto: the checkpoint's own; where it has none that is whole, "
                            f"the most exact file in {where} that goes with it.",
                        },
                    )
                    for kind, what, where in (
                        (
                            "text_encoder",
                            "A T5-XXL encoder in a file of its own, such as t5xxl_fp16.safetensors.",
                            "models/text_encoders",
                        ),
                        ("vae", "A CogVideoX VAE in a file of its own.", "models/vae"),
                    )
                },
            },
            "hidden": {"prompt": "PROMPT", "unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def checks(cls, model=None, dtype=None, on_mismatch=None, memory=None, text_encoder_name=None, vae_name=None):
        return [
            ("model", host.checkpoint_path, model),
            ("dtype", check_choice, "dtype", dtype, DTYPES),
            ("on_mismatch", check_choice, "on_mismatch", on_mismatch, ON_MISMATCH),
            ("memory", check_choice, "memory", memory, MEMORY),
            ("text_encoder_name", _part_path, "text_encoder", text_encoder_name),
            ("vae_name", _part_path, "vae", vae_name),
        ]

    @classmethod
    def foresee(cls, model, dtype, on_mismatch, memory, text_encoder_name, vae_name, prompt=None, unique_id=None, **_):
        from ..cogvideox.precision.policy import DtypeMismatch

        chosen = model, dtype, on_mismatch, memory, text_encoder_name, vae_name
        if UNKNOWN in chosen:
            return None
        try:
            handles, _ = _handles(*chosen, prompt, unique_id)
        except DtypeMismatch as error:
            # Where it is auto, a flag of ComfyUI's asked for the dtype.
            raise OfField(str(error), "on_mismatch" if dtype == _AUTO else "dtype") from error
        return handles.model, handles.text_encoder, handles.vae, UNKNOWN

    @classmethod
    def IS_CHANGED(cls, model=None, text_encoder_name=_AUTO, vae_name=_AUTO, **_):
        chosen = dict(model=model, text_encoder_name=text_encoder_name, vae_name=vae_name)
        return cls.fingerprint(chosen, lambda: _open(**chosen)[0].fingerprint)

    def execute(
        self,
        model,
        dtype="auto",
        on_mismatch="fix",
        memory="auto",
        scan_weights=False,
        text_encoder_name=_AUTO,
        vae_name=_AUTO,
        prompt=None,
        unique_id=None,
    ):
        from ..cogvideox.memory import memory_text
        from ..cogvideox.precision.policy import scan_parts
        from ..cogvideox.precision.verdict import OK

        handles, notes = _handles(model, dtype, on_mismatch, memory, text_encoder_name, vae_name, prompt, unique_id)
        plan = (
            scan_parts(handles.checkpoint, handles.plan, on_progress=host.NodeEvents().counter("reading weights", "B"))
            if scan_weights
            else handles.plan
        )
        memory = memory_text(handles.model)
        notes += [lora.text for lora in handles.model.loras]
        report = "\n".join([plan.text, *notes, memory])
        logger.log(logging.INFO if plan.verdict == OK else logging.WARNING, "%s", report)
        host.show("\n".join([plan.short_text(memory), *notes]))
        return handles.model, handles.text_encoder, handles.vae, report


def _handles(model, dtype, on_mismatch, memory, text_encoder_name, vae_name, prompt, unique_id):
    """Make the handles of what was chosen, with every part that the graph asks for, and return them with what to say
    about parts that were found."""
    from ..cogvideox.handles import make_handles

    checkpoint, notes = _open(model, text_encoder_name, vae_name)
    for slot, kind in enumerate(("text_encoder", "vae"), 1):
        if host.is_connected(prompt, unique_id, slot):
            # A missing part is an error now, not after the video is made.
            checkpoint.part(kind)
    return make_handles(checkpoint, dtype, host.hardware(memory), on_mismatch, memory), notes


def _part_path(kind, name):
    """Find the file that was chosen for a part; None for what is the checkpoint's own, or found."""
    return None if name == _AUTO else host.part_path(kind, name)


def _open(model, text_encoder_name, vae_name):
    """Open the checkpoint with the parts that were chosen, or found where it has none, and return it with what to say
    about the latter."""
    from ..cogvideox.checkpoint.layout import open_checkpoint

    path, notes = host.checkpoint_path(model), []
    chosen = {"text_encoder": _part_path("text_encoder", text_encoder_name), "vae": _part_path("vae", vae_name)}
    checkpoint = open_checkpoint(path, tokenizer=host.tokenizer_folder(), **chosen)
    for kind in ("text_encoder", "vae"):
        if kind not in checkpoint.parts:
            found, note = _find_part(kind, checkpoint)
            chosen |= found
            notes += note
    return (open_checkpoint(path, tokenizer=host.tokenizer_folder(), **chosen) if notes else checkpoint), notes


def _find_part(kind, checkpoint):
    """Find the most exact part in the model folders that runs with the checkpoint's transformer: its path by its kind,
    and what to say about it."""
    from ..cogvideox.checkpoint.architecture import check_together
    from ..cogvideox.checkpoint.layout import open_part
    from ..cogvideox.variants import PARTS

    fitting, refused = [], []
    for entry in host.parts(kind):
        try:
            check_together(checkpoint.part("transformer"), open_part(entry.path, kind))
            fitting.append(entry)
        except ValueError as error:
            logger.info("%s is not taken by auto: %s", entry.name, error)
            refused.append(entry)
    own = checkpoint.incomplete.get(kind)
    lacking = f"the checkpoint's own cannot be used ({own})" if own else "the checkpoint has none"
    if not fitting:
        others = listed(entry.label for entry in refused)
        told = f"{PARTS[kind][0]}: {lacking}, and none that is here goes with it ({others})."
        return {}, [told] if refused else []
    best, *rest = fitting
    why = (
        f", the most exact of those that go with it (the others: {listed(entry.name for entry in rest)})"
        if rest
        else ""
    )
    return {kind: best.path}, [f"{PARTS[kind][0]}: {lacking}, so {short(best.label, 160)} is used{why}."]
