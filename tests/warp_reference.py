"""The noise of VOID's second pass by the reference's own code: Netflix's scripts, and what they call.

With checkouts of https://github.com/Netflix/void-model (66e9c0e) and https://github.com/RyannDaGreat/CommonSource
(28f1b68), and the packages rp (0.1.1428), cachetools, six and opencv-python-headless installed

    VOID_PATH=… COMMON_SOURCE_PATH=… python -m tests.warp_reference

prints the numbers that ``test_warped_noise.py`` has recorded.
"""

import ast
import os
import sys
import tempfile
import types
from pathlib import Path
from unittest.mock import patch

import torch
from einops import rearrange
from torch.nn.functional import avg_pool2d, interpolate

#: What stands in the place of 72 frames of 480x720 and 16 channels, so that it takes no minutes.
SMALL = {"FRAMES": 4, "HEIGHT": 64, "WIDTH": 96, "LATENT_CHANNELS": 2}
SHAPE, SEED = (1, 2, 3, 6, 10), 9
#: Of the noise that moves: channels, height, width; how many times as fine as the flow, and pixels that it moves.
MOVES = {"a little": (3, 64, 96, 8, 0.4), "far": (2, 32, 48, 4, 5.0)}
#: Numbers of each result that are kept, evenly spread.
KEPT = 8


def kept(values):
    flat = values.flatten()
    return flat[torch.linspace(0, len(flat) - 1, KEPT).long()]


def flows(name):
    """Four smooth random flows ``[2, h, w]``, every other of whole pixels and halves."""
    _, height, width, finer, pixels = MOVES[name]
    generator = torch.Generator().manual_seed(3)
    for number in range(4):
        coarse = pixels * torch.randn(1, 2, 3, 3, generator=generator)
        flow = interpolate(coarse, (height // finer, width // finer), mode="bilinear")[0]
        yield flow if number % 2 else flow.round() / 2


def clip():
    """Random smooth frames of the size that they are brought to: uint8 ``[9, 64, 96, 3]``."""
    coarse = torch.rand(9, 3, 4, 6, generator=torch.Generator().manual_seed(4))
    size = SMALL["HEIGHT"], SMALL["WIDTH"]
    return rearrange((255 * interpolate(coarse, size, mode="bilinear")).byte(), "f c h w -> f h w c")


def flow_between(before, after):
    """A flow that frames ``[3, H, W]`` alone decide."""
    return 9 * avg_pool2d(after - before, 5, stride=1, padding=2)[:2]


def load(root):
    """CommonSource's noise_warp, its network for the flow replaced by ``flow_between``."""
    sys.path.insert(0, str(root))
    stubs = {name: types.ModuleType(name) for name in ("fire", "raft", "background_remover")}
    stubs["background_remover"].BackgroundRemover = None

    def raft(device, version):
        return lambda *frames: flow_between(*(torch.from_numpy(frame).float().permute(2, 0, 1) for frame in frames))

    stubs["raft"].RaftOpticalFlow = raft
    with patch.dict(sys.modules, stubs):
        import noise_warp
    return noise_warp


def moved(root, name):
    """The noise after each flow, eight times as coarse, and its weights after the last."""
    channels, height, width, _, _ = MOVES[name]
    module = load(root)
    torch.manual_seed(SEED)
    warper = module.NoiseWarper(channels, height, width, "cpu")
    found = []
    for flow in flows(name):
        noise = warper(*flow.clone()).noise
        found.append(8 * module.rp.torch_resize_image(noise, 1 / 8, interp="area").half().float())
    return torch.stack(found), warper._state[2]


def made(root, void):
    """The noise of a second pass ``[1, C, T, h, w]``, as ``make_warped_noise.py`` is called, and its noise resized."""
    import cv2
    import numpy
    import rp

    torch.manual_seed(SEED)
    video = rp.resize_list(clip().numpy(), length=SMALL["FRAMES"])
    noises = load(root).get_noise_from_video(
        video,
        remove_background=False,
        visualize=False,
        save_files=False,
        noise_channels=SMALL["LATENT_CHANNELS"],
        resize_frames=2**-1,
        resize_flow=2**3,
        downscale_factor=32,
        device="cpu",
    )["numpy_noises"]
    script = Path(void) / "inference" / "cogvideox_fun" / "inference_with_pass1_warped_noise.py"
    tree = ast.parse(script.read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if getattr(node, "name", "") == "load_and_resize_warped_noise")
    logger = types.SimpleNamespace(info=lambda text: None)
    scope = {"np": numpy, "cv2": cv2, "torch": torch, "logger": logger}
    exec(compile(ast.Module([function], []), str(script), "exec"), scope)
    _, channels, length, height, width = SHAPE
    with tempfile.TemporaryDirectory() as folder:
        numpy.save(Path(folder) / "noises.npy", noises)
        wanted = (length, height, width, channels)
        noise = scope[function.name](Path(folder) / "noises.npy", wanted, "cpu", torch.float32)
    return rearrange(noise, "b t c h w -> b c t h w")


if __name__ == "__main__":
    roots = os.environ["COMMON_SOURCE_PATH"], os.environ["VOID_PATH"]
    for case in MOVES:
        noise, weights = moved(roots[0], case)
        print(case, [round(value, 5) for value in torch.cat([kept(noise), kept(weights)]).tolist()])
    print("made", [round(value, 5) for value in kept(made(*roots)).tolist()])
