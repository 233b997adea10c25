"""What CogVideoX-Fun-V1.5-InP and VOID are compared with: clips, masks, and the latents of their own pipelines.

``VIDEOX_FUN_PATH=checkout VOID_PATH=checkout python -m tests.family`` runs those pipelines and writes some of
their numbers into ``tests/family_recorded.json``, for where there is no checkout.
"""

import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from einops import rearrange

from cogvideox import conditioning
from cogvideox.geometry import latent_frames
from cogvideox.sampling import sample
from tests.fun_reference import build_pipeline, run
from tests.reference import draw_prompts
from tests.tiny_checkpoint import build_checkpoint

RECORDED = Path(__file__).parent / "family_recorded.json"
PATHS = {"fun-inp": "VIDEOX_FUN_PATH", "void": "VOID_PATH"}
#: Numbers of each result that are kept, evenly spread.
KEPT = 12
#: Seeds the noise that is added to a clip.
SEED = 5


@dataclass(frozen=True)
class Case:
    """A run: its clip, and what is asked of it."""

    frames: int = 13
    height: int = 48
    width: int = 80
    video: bool = False
    mask: bool = False
    start: bool = False
    end: bool = False
    strength: float = 1.0
    noise_aug: float = 0.0
    batch: int = 1
    cfg: float = 6.0
    steps: int = 3
    scheduler: str = "ddim_origin"
    stage: str = ""

    @property
    def shape(self):
        return self.batch, 16, latent_frames(self.frames), self.height // 8, self.width // 8

    def clip(self):
        """Random frames ``[F, H, W, 3]``, some pixels of them black."""
        clip = torch.rand(self.frames, self.height, self.width, 3, generator=torch.Generator().manual_seed(11))
        clip[:, 4:9, 5:17] = 0.0
        return clip

    def box(self):
        """A mask ``[F, H, W]`` of a box that moves, off the latents' grid."""
        mask = torch.zeros(self.frames, self.height, self.width)
        for frame in range(self.frames):
            mask[frame, 7 + frame : 30, 11 : 43 + frame] = 1.0
        return mask

    def quadmask(self):
        """Greys of 255 ``[F, H, W]`` a little beside the four of a quadmask, as a codec leaves them."""
        generator = torch.Generator().manual_seed(12)
        levels = torch.tensor([0.0, 63.0, 127.0, 255.0])
        rough = levels[torch.randint(0, 4, (self.frames, self.height // 8, self.width // 8), generator=generator)]
        rough = rough.repeat_interleave(8, 1).repeat_interleave(8, 2)
        return (rough + torch.randint(-9, 10, rough.shape, generator=generator)).clamp(0, 255)

    def image(self, seed):
        return torch.rand(1, self.height, self.width, 3, generator=torch.Generator().manual_seed(seed))

    def noise(self):
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(13))


FUN = {
    "text alone": Case(),
    "a masked video": Case(video=True, mask=True),
    "a start image": Case(start=True),
    "a start and an end image": Case(start=True, end=True),
    "a whole video": Case(video=True, strength=0.5, steps=5),
    "a masked video, from the video": Case(video=True, mask=True, strength=0.99, steps=5),
    "noise on the video": Case(video=True, mask=True, noise_aug=0.0563),
    "one frame": Case(frames=1, start=True),
    "one frame of text": Case(frames=1),
    "two latent frames": Case(frames=5, height=64, width=48, video=True, mask=True),
    "two videos": Case(video=True, mask=True, batch=2, cfg=1.0),
    "CogVideoX's own DDIM": Case(video=True, mask=True, scheduler="ddim"),
}
VOID = {
    "the first pass": Case(stage="first", cfg=1.0),
    "the first pass with noise": Case(stage="first", cfg=1.0, noise_aug=0.0563),
    "the first pass, guided": Case(stage="first", frames=5, height=64, width=48, batch=2),
    "the second pass": Case(stage="second", scheduler="ddim"),
}
CASES = {"fun-inp": FUN, "void": VOID}


def build(folder, variant):
    """A tiny checkpoint whose weights depend on their names alone, not on the order in which a library makes them."""

    def fill(parts):
        for kind in ("transformer", "vae"):
            for name, parameter in parts[kind].named_parameters():
                generator = torch.Generator().manual_seed(sum(map(ord, name)) % 9973)
                fresh = torch.randn(parameter.shape, generator=generator)
                scale = 1.0 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
                one = 1.0 if name.endswith("weight") and parameter.ndim == 1 else 0.0
                parameter.data.copy_(one + scale * fresh)

    return build_checkpoint(folder, variant, change=fill, stored={"transformer": torch.float32})


def given_noise(case):
    """Draw what is added to a clip as the engine does, ``[1, 3, F, H, W]``."""
    shape = (3, case.frames, case.height, case.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))[None]


def start_of(case, encode):
    """The latents that a run starts from: a sample of the posterior, as the pipeline draws it, first of all."""
    torch.manual_seed(7)
    posterior = encode(2.0 * rearrange(case.clip(), "f h w c -> 1 c f h w") - 1.0)
    return torch.cat([posterior.sample() for _ in range(case.batch)])


def reference(case, root, checkpoint):
    """The latents of the unmodified pipeline, its VAE, and the latents that it started from."""
    scheduler = {"ddim_origin": "DDIMScheduler", "ddim": "CogVideoXDDIMScheduler"}[case.scheduler]
    config = {"add_noise_in_inpaint_model": case.noise_aug > 0}
    pipeline, module = build_pipeline(root, checkpoint, scheduler, **config)
    more = {"steps": case.steps, "cfg": case.cfg, "batch": case.batch, "noise_aug_strength": case.noise_aug}
    if case.stage:
        greys = case.quadmask()
        levels = torch.where(greys <= 31, 0.0, torch.where(greys <= 95, 63.0, torch.where(greys <= 191, 127.0, 255.0)))
        video, mask = case.clip(), (255.0 - levels) / 255.0
        more |= {"use_trimask": case.stage == "first", "use_vae_mask": True}
        if case.stage == "second":
            more["latents"] = rearrange(case.noise(), "b c t h w -> b t c h w")
    else:
        # As get_image_to_video_latent lays images out: one on every frame, of which the first is kept.
        video = case.clip() if case.video else torch.zeros_like(case.clip())
        mask = 255 * case.box() if case.mask else torch.full(video.shape[:3], 255.0)
        for place, wanted, seed in ((0, case.start, 21), (-1, case.end, 22)):
            if wanted:
                video = case.image(21).expand_as(video).clone() if place == 0 else video
                video[place], mask[place] = case.image(seed)[0], 0.0
        more["strength"] = case.strength
    encode = pipeline.vae.encode
    start = None if case.strength == 1 else start_of(case, lambda pixels: encode(pixels)[0])
    torch.manual_seed(7)
    drawn = given_noise(case)
    with patch.object(module.torch, "randn_like", lambda image: drawn.expand_as(image)), torch.no_grad():
        return run(pipeline, draw_prompts(), video, mask, **more), pipeline.vae, start


def ours(case, handles, start=None, **how):
    """The engine's latents of a run."""
    generator = torch.Generator().manual_seed(SEED)
    how |= {"noise_aug": case.noise_aug, "generator": generator}
    more = {}
    if case.stage:
        greys = case.quadmask() / 255
        beside = conditioning.void_latents(handles.vae, case.clip(), greys, case.stage, **how)
        more["noise"] = case.noise() if case.stage == "second" else None
    else:
        canvas = conditioning.inpaint_canvas(
            case.width,
            case.height,
            case.frames,
            case.clip() if case.video else None,
            case.box() if case.mask else None,
            case.image(21) if case.start else None,
            case.image(22) if case.end else None,
        )
        beside = conditioning.inpaint_latents(handles.vae, canvas, **how)
        more["denoise"] = case.strength
    return sample(
        handles.model,
        *draw_prompts(),
        torch.zeros(case.shape) if start is None else start,
        image_latents=beside,
        seed=1,
        steps=case.steps,
        cfg=case.cfg,
        scheduler=case.scheduler,
        **more,
    )


def kept(latents):
    """Some numbers of a result, evenly spread."""
    flat = latents.flatten()
    return flat[torch.linspace(0, len(flat) - 1, KEPT).long()]


def recordable(case):
    """Return a case without what only the reference's VAE gives: its own sample of the posterior."""
    return replace(case, strength=1.0)


def record():
    found = {}
    for variant, cases in CASES.items():
        root = Path(os.environ[PATHS[variant]])
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = build(Path(folder) / variant, variant)
            for name, case in cases.items():
                latents, _, _ = reference(recordable(case), root, checkpoint)
                found.setdefault(variant, {})[name] = [round(value, 6) for value in kept(latents).tolist()]
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record()
