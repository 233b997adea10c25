"""What the unmodified diffusers pipelines and modules make, in our layout, and what they are given."""

import torch
from einops import rearrange

from tests.tiny_checkpoint import TEXT_WIDTH


def error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2, in float64."""
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


def draw_prompts(tokens=226):
    """The embeddings of a prompt and of a negative one, ``[1, tokens, width]`` each, as the tiny text encoder would
    give them."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(1, tokens, TEXT_WIDTH, generator=generator), torch.randn(
        1, tokens, TEXT_WIDTH, generator=generator
    )


def draw_beside(variant, shape, generator=None):
    """What a variant reads beside the noise of a LATENT shape, random; None for text to video."""
    channels = {"1.5-i2v": 16, "5b-i2v": 16, "fun-inp": 17, "void": 32}.get(variant)
    return None if channels is None else torch.randn(shape[0], channels, *shape[2:], generator=generator)


def run_module(module, inputs, dtype=torch.float32):
    """A transformer's output for inputs of ``dtype``."""
    with torch.no_grad():
        return module(
            **{k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
        )[0]


def reference_latents(pipeline, prompts, shape, *, scheduler="ddim", cfg=6.0, seed=1, steps=4, **more):
    """A pipeline's latents for a LATENT shape: padding removed, and unscaled as the pipeline does before its VAE;
    ``more`` is passed to it."""
    import diffusers

    classes = {"ddim": diffusers.CogVideoXDDIMScheduler, "dpm": diffusers.CogVideoXDPMScheduler}
    # Tests share a pipeline: it is given back as it was.
    own, pipeline.scheduler = pipeline.scheduler, classes[scheduler].from_config(pipeline.scheduler.config)
    batch, _, length, height, width = shape
    positive, negative = (prompt.expand(batch, -1, -1).to(pipeline.transformer.dtype) for prompt in prompts)
    try:
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
    finally:
        pipeline.scheduler = own
    latents = latents[:, latents.shape[1] - length :]
    return rearrange(1 / pipeline.vae_scaling_factor_image * latents, "b t c h w -> b c t h w").float()
