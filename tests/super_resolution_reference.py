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
        0.45767, 0.52268, 0.48261, 0.5029, 0.47717, 0.38822, 0.52134, 0.60309, 0.26988, 0.06531, 0.50937, 0.44939,
        0.46144, 0.4519, 0.40978, 0.54835, 0.55632, 0.49912, 0.4931, 0.60169, 0.41858, 0.43114, 0.32956, 0.5572,
    ],
    "an odd number of latent frames": [
        0.53981, 0.02405, 0.16856, 0.51574, 0.48887, 0.56873, 0.45344, 0.49813, 0.42604, 0.54086, 0.5266, 0.5446,
        0.53028, 0.46593, 0.50198, 0.35058, 0.53482, 0.48942, 0.44757, 0.29763, 0.32799, 0.48893, 0.35328, 0.67244,
    ],
    "padded in time and space": [
        0.57609, 0.33337, 0.22228, 0.56114, 0.47497, 0.42259, 0.47979, 0.39819, 0.65098, 0.58272, 0.45964, 0.30788,
        0.49903, 0.49808, 0.50784, 0.48128, 0.24748, 0.47639, 0.62913, 0.42163, 0.21065, 0.3305, 0.46375, 0.50432,
    ],
    "DOVE-2B": [
        0.33972, 0.73456, 0.6333, 0.57121, 0.55076, 0.39971, 0.44284, 0.53781, 0.37049, 0.43805, 0.50016, 0.46988,
        0.34365, 0.34453, 0.47886, 0.44616, 0.49754, 0.39389, 0.53028, 0.4399, 0.0, 0.44097, 0.0, 0.57451,
    ],
    "chunks and tiles": [
        0.49521, 0.37839, 0.48164, 0.28262, 0.54469, 0.5514, 0.56882, 0.60864, 0.30418, 0.50634, 0.42544, 0.4001,
        0.53987, 0.53145, 0.49145, 0.42601, 0.58323, 0.55673, 0.51506, 0.22584, 0.47532, 0.50323, 0.51582, 0.47521,
    ],
    "SparkVSR without references": [
        0.69555, 0.72026, 0.47161, 0.33253, 0.38694, 0.60699, 0.47551, 0.39611, 0.39169, 0.57759, 0.10702, 0.25678,
        0.52897, 0.45095, 0.50162, 0.43716, 0.47646, 0.60335, 0.40012, 0.34249, 0.51915, 0.627, 0.22465, 0.34879,
    ],
    "references": [
        0.59952, 0.60046, 0.49942, 0.56233, 0.4005, 0.54459, 0.23091, 0.0, 0.43776, 0.4002, 0.20641, 0.23521,
        0.51253, 0.42875, 0.49568, 0.46706, 0.35392, 0.57574, 0.48125, 0.404, 0.48619, 0.51356, 0.3346, 0.3486,
    ],
    "references, guided": [
        0.53879, 0.22933, 0.50837, 0.48874, 0.35136, 0.55202, 0.57374, 0.5116, 0.39103, 0.40491, 0.36477, 0.85624,
        0.51633, 0.51022, 0.57371, 0.64172, 0.45567, 0.29253, 0.59513, 0.48038, 0.55393, 0.44224, 0.37817, 0.50562,
    ],
    "references in chunks and tiles": [
        0.50917, 0.49566, 0.2076, 0.54721, 0.59126, 0.61927, 0.82075, 0.0719, 0.51465, 0.56255, 0.67035, 0.42177,
        0.5935, 0.39518, 0.34519, 0.43875, 0.57916, 0.46043, 0.44378, 0.69447, 0.38057, 0.72671, 0.6156, 0.50933,
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
