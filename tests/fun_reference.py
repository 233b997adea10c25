"""The pipelines of CogVideoX-Fun-V1.5-InP and VOID, unmodified, around a tiny checkpoint.

With the environment variable VIDEOX_FUN_PATH at a checkout of https://github.com/aigc-apps/VideoX-Fun, and
VOID_PATH at one of https://github.com/Netflix/void-model. Of both only the files of the pipeline, the
transformer and the VAE are imported: the rest needs cards and packages that the pipeline does not.
"""

import importlib
import sys
import types
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file

_PACKAGES = ("videox_fun", "videox_fun.models", "videox_fun.pipeline", "videox_fun.dist")
#: Names that those files import and use on several cards only, or with another attention.
_UNUSED = {
    "videox_fun.dist": (
        "get_sequence_parallel_rank",
        "get_sequence_parallel_world_size",
        "get_sp_group",
        "xFuserLongContextAttention",
    ),
    "videox_fun.models.attention_kernel": ("_sparse_linear_attention", "get_block_map"),
}


def import_pipeline(root: Path) -> types.ModuleType:
    """Import ``pipeline_cogvideox_fun_inpaint`` of a checkout; ``transformer`` and ``vae`` on it are its classes."""
    _forget()
    for name in _PACKAGES:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")))]
    for name, members in _UNUSED.items():
        module = sys.modules.setdefault(name, types.ModuleType(name))
        for member in members:
            setattr(module, member, None)
    try:
        models = sys.modules["videox_fun.models"]
        transformer = importlib.import_module("videox_fun.models.cogvideox_transformer3d").CogVideoXTransformer3DModel
        vae = importlib.import_module("videox_fun.models.cogvideox_vae").AutoencoderKLCogVideoX
        models.CogVideoXTransformer3DModel, models.AutoencoderKLCogVideoX = transformer, vae
        models.T5EncoderModel = models.T5Tokenizer = object
        pipeline = importlib.import_module("videox_fun.pipeline.pipeline_cogvideox_fun_inpaint")
        pipeline.transformer, pipeline.vae = transformer, vae
        return pipeline
    finally:
        _forget()


def _forget():
    """Both checkouts have packages of these names."""
    for name in [name for name in sys.modules if name.split(".")[0] == "videox_fun"]:
        del sys.modules[name]


def build_pipeline(root: Path, checkpoint: Path, scheduler: str = "DDIMScheduler", **config):
    """The unmodified pipeline on a tiny checkpoint's weights, in fp32, and its module.

    Args:
        config: of the transformer, beside the checkpoint's.
    """
    import diffusers

    module = import_pipeline(root)
    transformer_config = module.transformer.load_config(checkpoint / "transformer") | config
    transformer = module.transformer.from_config(transformer_config)
    state = {}
    for file in sorted((checkpoint / "transformer").glob("*.safetensors")):
        state |= load_file(file)
    transformer.load_state_dict(state, strict=True)
    vae = module.vae.from_config(module.vae.load_config(checkpoint / "vae"))
    vae.load_state_dict(load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors"), strict=True)
    pipeline = module.CogVideoXFunInpaintPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        transformer=transformer.float().eval(),
        scheduler=getattr(diffusers, scheduler).from_pretrained(checkpoint, subfolder="scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, module


def run(pipeline, prompts, video, mask, *, steps=3, cfg=6.0, seed=1, batch=1, **more):
    """A pipeline's latents, unscaled, ``[B, 16, T, h, w]``.

    Args:
        video: ``[F, H, W, 3]`` in 0..1.
        mask: ``[F, H, W]``, as the pipeline takes it: 0..255 for Fun, 0..1 for VOID.
    """
    frames, height, width, _ = video.shape
    positive, negative = (prompt.expand(batch, -1, -1) for prompt in prompts)
    latents = pipeline(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        height=height,
        width=width,
        num_frames=frames,
        video=rearrange(video, "f h w c -> 1 c f h w").contiguous().expand(batch, -1, -1, -1, -1),
        mask_video=rearrange(mask, "f h w -> 1 1 f h w").contiguous().expand(batch, -1, -1, -1, -1),
        num_inference_steps=steps,
        guidance_scale=cfg,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent",
        return_dict=True,
        **more,
    ).videos
    return rearrange(1 / pipeline.vae.config.scaling_factor * latents, "b t c h w -> b c t h w")
