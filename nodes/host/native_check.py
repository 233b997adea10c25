"""Core's own CogVideoX: what it is stored in, trained in and computed in, and a watch on its run."""

from typing import Any

import torch
from comfy import model_base
from comfy.patcher_extension import WrappersMP

from ...cogvideox.dtypes import Precision, dtype_name
from ...cogvideox.words import short, size_text
from .memory import hardware
from .page import failures_shown
from .progress import NodeEvents

_KEY = "cogvideox15_check"


def watched(patcher: Any, stop: bool) -> tuple[Any, str, bool]:
    """Return a copy of core's MODEL whose every call is checked, a report, and whether the report warns.

    Raises:
        ValueError: for another model than CogVideoX, by name.
    """
    base = patcher.model
    if not isinstance(base, model_base.CogVideoX):
        raise ValueError(
            f"The MODEL that is connected is a {short(type(base).__name__)}, and this node knows what CogVideoX needs "
            "only. Connect a CogVideoX model."
        )
    net = base.diffusion_model
    if hasattr(net, "handle"):
        precision = net.handle.weights.precision
        return (
            patcher,
            f"This is CogVideoX-1.5 to ComfyUI's MODEL: it runs in {precision.name} and watches itself.",
            False,
        )
    report, warns = _report(base, net)
    copy = patcher.clone()
    copy.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, _Watch(stop))
    return copy, report, warns


def _report(base: Any, net: torch.nn.Module) -> tuple[str, bool]:
    from ...cogvideox.variants import identify

    config = dict(base.model_config.unet_config)
    # No tensor shows how 1.0's positions are made, and core takes those of 2b, which has 30 heads, for rotary ones.
    config["use_rotary_positional_embeddings"] = "patch_size_t" in config or config["num_attention_heads"] != 30
    variant = identify(config)
    stored: dict[torch.dtype, int] = {}
    for parameter in net.parameters():
        stored[parameter.dtype] = stored.get(parameter.dtype, 0) + parameter.nbytes
    held = " + ".join(f"{dtype_name(dtype)} ({size_text(count)})" for dtype, count in sorted(stored.items(), key=str))
    computed, trained, card = base.get_dtype_inference(), variant.trained_dtype, hardware()
    lines = [
        f"{variant.name}: weights held in {held}, trained in {dtype_name(trained)}; ComfyUI computes in "
        f"{dtype_name(computed)} on {card.name}."
    ]
    warns = computed == torch.float16 and trained != torch.float16
    if warns:
        lines.append(
            "Mismatch: in plain fp16 values of a model trained in bf16 can pass 65504, become Inf, then NaN, and the "
            "video turns black. Start ComfyUI with --bf16-unet or --fp32-unet, or load the model with CogVideoX-1.5 "
            "Model Loader and CogVideoX-1.5 to ComfyUI, whose range-safe fp16 cannot overflow."
        )
    elif computed == torch.bfloat16 and trained == torch.float16:
        lines.append("It was trained in fp16, and bf16 keeps 8 of its 11 significant bits: finite, but coarser.")
    elif card.support(computed) != "native":
        lines.append(f"{card.name} has {dtype_name(computed)} not natively: right, but slow.")
    if torch.float16 in stored and trained == torch.bfloat16:
        lines.append(
            "The weights are a copy in fp16 of what was trained in bf16: magnitudes under 5.96e-8 became zero."
        )
    if base.model_type == model_base.ModelType.V_PREDICTION_DDPM:
        lines.append(
            "In KSampler this model reads noise scaled by 4519, and ends far from the reference (relative L2 about "
            "0.9). Put ModelSamplingDiscrete (v_prediction, zsnr on) behind it, or use VOID's sampler."
        )
    if variant.frame_step == 16:
        lines.append("ComfyUI pads an odd number of latent frames by wrapping the first to the end.")
        if variant.image_to_video:
            lines.append("It multiplies the start image's latent by 0.7, where the reference divides by it.")
    return "\n".join(lines), warns


class _Watch:
    """A wrapper of core's calls of the transformer: looks at what each gives, and for the module if it is not
    finite."""

    def __init__(self, stop: bool):
        self._stop = stop
        self._told: torch.Tensor | None = None

    @failures_shown()
    def __call__(self, executor, *args, **kwargs):
        from ...cogvideox.finite import is_finite
        from ...cogvideox.sentinel import probes

        output = executor(*args, **kwargs)
        if is_finite(output):
            return output
        options = next((each for each in (*args, *kwargs.values()) if isinstance(each, dict) and "sigmas" in each), {})
        # A run is told once where it goes on.
        run = options.get("sample_sigmas")
        if not self._stop and self._told is run and run is not None:
            return output
        self._told = run
        net = executor.class_obj
        with probes(net, Precision(net.dtype)) as found:
            executor(*args, **kwargs)
        cause = found[0].text if found else "every module's output is finite, so what is done with them overflows"
        text = (
            f"{_step(options)}: ComfyUI's own CogVideoX gave NaN or Inf, which ends in a black video; {cause}. Start "
            "ComfyUI with --bf16-unet or --fp32-unet, or load the model with CogVideoX-1.5 Model Loader and "
            "CogVideoX-1.5 to ComfyUI."
        )
        if self._stop:
            raise RuntimeError(text)
        NodeEvents().note(text)
        return output


def _step(options: dict) -> str:
    sigmas, now = options.get("sample_sigmas"), options.get("sigmas")
    if sigmas is None or now is None or len(sigmas) < 2:
        return "A call of the model"
    index = int((sigmas[:-1].float().cpu() - float(now[0])).abs().argmin())
    return f"Step {index + 1} of {len(sigmas) - 1}"
