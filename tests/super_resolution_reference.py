"""DOVE's and SparkVSR's own scripts, run unmodified on tiny checkpoints, and the numbers recorded from them.

``DOVE_PATH=… SPARKVSR_PATH=… python -m tests.super_resolution_reference`` prints ``RECORDED`` anew, from checkouts of
https://github.com/zhengchen1999/DOVE (ad649cc) and https://github.com/smthemex/ComfyUI_SparkVSR_SM (30f3378).
"""

import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from einops import rearrange

from tests.reference import draw_prompts
from tests.tiny_checkpoint import build_checkpoint

#: What the scripts import for videos, metrics and ComfyUI, and what they do not need to make one clip larger.
_ABSENT = ("cv2", "torchvision", "torchvision.io", "pyiqa", "imageio", "imageio.v3", "decord", "folder_paths")
_OWN = ("finetune", "finetune.utils", "finetune.utils.ref_utils", "model_loader_utils")
SCRIPTS = {
    "dove": ("DOVE_PATH", "inference_script.py"),
    "sparkvsr": ("SPARKVSR_PATH", "sparkvsr_inference_script.py"),
}


@dataclass(frozen=True)
class Case:
    """One run: of a kind and a variant of tiny checkpoint, on a clip of frames x height x width."""

    kind: str
    variant: str
    clip: tuple[int, int, int]
    scale: int = 4
    places: tuple[int, ...] = ()
    guidance: float = 1.0
    piece: tuple[int, int, int] | None = None

    @property
    def images(self):
        """The clip's frames, uint8 ``[F, H, W, 3]``."""
        return torch.randint(256, (*self.clip, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)

    @property
    def references(self):
        """Images for ``places``, of the enlarged size, ``[n, H, W, 3]`` in 0..1 of eight bits; None without places."""
        size = [self.scale * side for side in self.clip[1:]]
        drawn = torch.randint(256, (len(self.places), *size, 3), generator=torch.Generator().manual_seed(2))
        return drawn / 255 if self.places else None

    @property
    def seed(self):
        return 42


CASES = {
    "one frame": Case("dove", "1.5", (1, 12, 20)),
    "an odd number of latent frames": Case("dove", "1.5", (9, 16, 16)),
    "padded in time and space": Case("dove", "1.5", (12, 20, 24), scale=2),
    "DOVE-2B": Case("dove", "2b", (5, 16, 16)),
    "chunks and tiles": Case("dove", "1.5", (21, 16, 16), piece=(16, 48, 64)),
    "SparkVSR without references": Case("sparkvsr", "1.5-i2v", (9, 14, 17)),
    "references": Case("sparkvsr", "1.5-i2v", (9, 14, 17), places=(0, 5)),
    "references, guided": Case("sparkvsr", "1.5-i2v", (13, 16, 16), places=(4, 12), guidance=2.5),
    "references in chunks and tiles": Case("sparkvsr", "1.5-i2v", (21, 12, 16), places=(0, 9, 20), piece=(16, 48, 48)),
}
#: Of each case, the image's values at ``samples`` of the script's own.
# fmt: off
RECORDED: dict[str, list[float]] = {
    "one frame": [
        0.55195, 0.60657, 0.52993, 0.47984, 0.47314, 0.56582, 0.12356, 0.21074, 0.40318, 0.38293, 0.8565, 0.43008,
        0.62116, 0.44487, 0.57924, 0.64965, 0.28048, 0.62992, 0.52962, 0.38687, 0.48271, 0.53027, 0.68222, 0.38943,
    ],
    "an odd number of latent frames": [
        0.52878, 0.47891, 0.50063, 0.99888, 0.58102, 0.52694, 0.45716, 0.63129, 0.58104, 0.62485, 0.51692, 0.56264,
        0.98593, 0.42036, 0.50365, 0.3357, 0.75082, 0.75284, 0.73677, 0.52112, 0.57871, 0.67117, 1.0, 0.37991,
    ],
    "padded in time and space": [
        0.40415, 0.34009, 0.38199, 0.6859, 0.55016, 0.35499, 0.60035, 0.4812, 0.4255, 0.65551, 0.64315, 0.33308,
        0.63815, 0.27088, 0.56584, 0.47982, 0.32304, 0.5874, 0.5371, 0.35097, 0.41884, 0.6108, 0.41244, 0.50964,
    ],
    "DOVE-2B": [
        0.53804, 0.4947, 0.73922, 0.49755, 0.63559, 0.44248, 0.44057, 0.40597, 0.28039, 1.0, 0.53159, 0.45872,
        0.59098, 0.37097, 0.51263, 0.65649, 0.30259, 0.40178, 0.24374, 0.57214, 0.64412, 0.44849, 0.82594, 0.57328,
    ],
    "chunks and tiles": [
        0.50204, 0.50687, 0.4468, 0.38333, 0.83848, 0.5393, 0.52458, 0.29542, 0.42999, 0.93494, 0.3967, 0.73871,
        0.49178, 0.32569, 0.51528, 0.66488, 0.44773, 0.46512, 0.42393, 0.37481, 0.67071, 0.36256, 0.58712, 0.51054,
    ],
    "SparkVSR without references": [
        0.55473, 0.52843, 0.85587, 0.56551, 0.5887, 0.47296, 0.4833, 0.47973, 0.34612, 0.5402, 0.63423, 0.81099,
        0.83778, 0.63715, 0.63312, 0.57452, 0.64371, 0.8119, 0.57107, 0.46779, 0.68112, 0.42496, 0.51677, 0.8147,
    ],
    "references": [
        0.55947, 0.5898, 0.92679, 0.55991, 0.60787, 0.50133, 0.56313, 0.56046, 0.3909, 0.51585, 0.69768, 0.75305,
        0.68138, 0.56539, 0.62383, 0.62198, 0.49971, 0.6945, 0.49673, 0.42886, 0.49055, 0.45112, 0.5024, 0.66628,
    ],
    "references, guided": [
        0.5627, 0.61301, 0.53674, 0.53269, 0.39592, 0.54823, 0.4927, 0.40472, 0.77012, 0.60719, 0.22235, 0.48474,
        0.40226, 0.23767, 0.46126, 0.71123, 0.26457, 0.48906, 0.6014, 0.52011, 0.42867, 0.74047, 0.50532, 0.48138,
    ],
    "references in chunks and tiles": [
        0.51675, 0.67344, 0.74763, 0.635, 0.4986, 0.72866, 0.69106, 0.52873, 0.467, 0.39758, 0.60938, 0.60351,
        0.59133, 0.60419, 0.49295, 0.36362, 0.82207, 0.45146, 0.53776, 0.84456, 0.40509, 0.43262, 0.49097, 0.71842,
    ],
}
# fmt: on


def samples(images):
    """A few dozen values of images, spread over all of them."""
    flat = images.flatten()
    return flat[torch.linspace(0, len(flat) - 1, 24).long()]


def script(kind):
    """The module of a script, with stand-ins for what is not installed."""
    variable, name = SCRIPTS[kind]
    folder = Path(os.environ[variable])
    package = ModuleType("reference_script")
    package.__path__ = []
    stubs = {missing: mock.MagicMock() for missing in _ABSENT}
    stubs |= {f"reference_script.{own}": mock.MagicMock() for own in _OWN} | {"reference_script": package}
    spec = importlib.util.spec_from_file_location(f"reference_script.{kind}", folder / name)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stubs), mock.patch.object(sys, "path", list(sys.path)):
        spec.loader.exec_module(module)
    return module


def pipeline(case, folder):
    """The reference pipeline on a tiny checkpoint, with the scheduler that both scripts set."""
    import diffusers

    cls = diffusers.CogVideoXImageToVideoPipeline if case.kind == "sparkvsr" else diffusers.CogVideoXPipeline
    pipe = cls.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


def run_script(case, folder):
    """A script's result, ``[F, H, W, 3]``, and the latents that it decodes, unscaled, of each piece."""
    module, pipe = script(case.kind), pipeline(case, folder)
    reader = mock.MagicMock(**{"__len__.return_value": case.clip[0], "get_batch.return_value": case.images})
    given = case.images
    if case.kind == "dove":
        module.decord.VideoReader.return_value, given = reader, "clip.mp4"
    clip, *pads, _ = module.preprocess_video_match(given, is_match=True)
    height, width = (case.scale * side for side in clip.shape[2:])
    clip = torch.nn.functional.interpolate(clip, size=(height, width), mode="bilinear", align_corners=False)
    video = (clip / 255.0 * 2.0 - 1.0)[None].permute(0, 2, 1, 3, 4).contiguous()
    shown = []
    for image in () if case.references is None else case.references:
        picture = image.permute(2, 0, 1).contiguous() * 2.0 - 1.0
        if picture.shape[1:] != (height, width):
            picture = torch.nn.functional.interpolate(
                picture[None], size=(height, width), mode="bilinear", align_corners=False
            )[0]
        shown.append(picture)
    chunk, *tile = case.piece or (0, 0, 0)
    overlaps = (8, 32, 32) if case.piece else (0, 0, 0)
    embedding, decoded, out = draw_prompts()[0], [], torch.zeros_like(video)
    decode = pipe.vae.decode

    def watched(latents):
        decoded.append(latents)
        return decode(latents)

    torch.manual_seed(case.seed)
    with mock.patch.object(pipe.vae, "decode", watched):
        for start, end in module.make_temporal_chunks(video.shape[2], chunk, overlaps[0]):
            for top, bottom, left, right in module.make_spatial_tiles(height, width, tuple(tile), overlaps[1:]):
                piece = video[:, :, start:end, top:bottom, left:right]
                more = dict(noise_step=0, sr_noise_step=399, empty_prompt_embedding=embedding)
                if case.kind == "dove":
                    made = module.process_video(pipe, piece, "", **more)
                else:
                    cut = [picture[:, top:bottom, left:right] for picture in shown]
                    more |= dict(chunk_start_idx=start, ref_guidance_scale=case.guidance)
                    made = module.process_video_ref_i2v(pipe, piece, "", cut, list(case.places), **more)
                at = module.get_valid_tile_region(start, end, top, bottom, left, right, video.shape, *overlaps)
                inside, there = (
                    tuple(slice(at[f"{kind}_{axis}_start"], at[f"{kind}_{axis}_end"]) for axis in "thw")
                    for kind in ("valid", "out")
                )
                out[(slice(None), slice(None), *there)] = made[(slice(None), slice(None), *inside)]
    out = module.remove_padding_and_extra_frames(out, pads[0], *(case.scale * pad for pad in pads[1:]))
    return rearrange(out, "1 c f h w -> f h w c"), decoded


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            tiny = build_checkpoint(Path(folder) / name, case.variant, stored={"transformer": torch.float32})
            found = [round(value, 5) for value in samples(run_script(case, tiny)[0]).tolist()]
            print(f"    {json.dumps(name)}: {json.dumps(found)},")
