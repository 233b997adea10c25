"""What the unmodified diffusers pipelines make, in our layout."""

import torch
from einops import rearrange


def reference_latents(pipeline, prompts, shape, *, scheduler="ddim", cfg=6.0, seed=1, steps=4, **more):
    """A pipeline's latents for a LATENT shape: padding removed, and unscaled as the pipeline does before its VAE; ``more`` is passed to it."""
    import diffusers

    classes = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}
    pipeline.scheduler = classes[scheduler].from_config(pipeline.scheduler.config)
    batch, _, length, height, width = shape
    positive, negative = (prompt.expand(batch, -1, -1).to(pipeline.transformer.dtype) for prompt in prompts)
    latents = pipeline(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        height=height * 8,
        width=width * 8,
        num_frames=4 * (length - 1) + 1,
        num_inference_steps=steps,
        guidance_scale=cfg,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type="latent",
        **more,
    ).frames
    latents = latents[:, latents.shape[1] - length :]
    return rearrange(1 / pipeline.vae_scaling_factor_image * latents, "b t c h w -> b c t h w").float()
