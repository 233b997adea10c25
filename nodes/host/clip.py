"""ComfyUI's CLIP: the T5 inside it, run as CogVideoX was trained with it."""

from typing import Any

import torch


def encode_with_clip(clip: Any, prompt: str, length: int) -> torch.Tensor:
    """Encode a prompt with ComfyUI's own T5, as CogVideoX was trained with it: ``length`` tokens, padding included, no
    mask.

    The T5 inside a CLIP is asked directly: what the CLIP's type (cogvideox, sd3, mochi, …) does around it, such as
    other lengths, masks or weighted words, is not what CogVideoX wants.

    Returns:
        float32 ``[1, length, 4096]`` on the CPU.

    Raises:
        ValueError: if the CLIP holds no T5-XXL.
    """
    # A model of one encoder has it under its own name, and the tokenizer has clip_ before that name.
    model, tokenizer = (
        next(
            (getattr(holder, name) for name in ("t5xxl", "clip_t5xxl") if getattr(holder, name, None) is not None), None
        )
        for holder in (clip.cond_stage_model, clip.tokenizer)
    )
    if model is None or tokenizer is None:
        raise ValueError(
            f"The CLIP that is connected is a {type(clip.cond_stage_model).__name__} without a T5-XXL, and CogVideoX "
            "reads T5-XXL's embeddings only. Load a t5xxl file in CLIPLoader with type cogvideox, or use the "
            "text_encoder of CogVideoX-1.5 Model Loader."
        )
    ids = tokenizer.tokenizer(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"]
    clip.cond_stage_model.reset_clip_options()
    clip.load_model()
    clip.cond_stage_model.set_clip_options({"execution_device": clip.patcher.load_device})
    masks = model.enable_attention_masks
    try:
        model.enable_attention_masks = False
        return model.encode([ids])[0].float().cpu()
    finally:
        model.enable_attention_masks = masks
