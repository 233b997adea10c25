"""CogVideoX-Fun-V1.5-InP and VOID make the latents and the frames of their own pipelines, bit for bit.

Where no environment variable names a checkout (``tests.family``), the latents are compared with recorded numbers.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from einops import rearrange

from cogvideox import conditioning
from cogvideox.conditioning import fit_area, fit_mask_frames, inpaint_canvas, inpaint_latents, mirror, taken_away
from cogvideox.geometry import check_frames
from cogvideox.handles import open_handles
from cogvideox.sampling import sample
from cogvideox.schedulers import make_scheduler
from cogvideox.vae import decode, pair_lengths
from tests import family
from tests.conftest import CPU
from tests.fun_reference import import_pipeline
from tests.reference import draw_prompts, error

RUNS = [(variant, name) for variant, cases in family.CASES.items() for name in cases]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """``built(variant)``: a tiny checkpoint, and its handles in fp32."""
    kept = {}

    def get(variant):
        if variant not in kept:
            folder = family.build(tmp_path_factory.mktemp("family") / variant, variant)
            kept[variant] = folder, open_handles(folder, "fp32", CPU)
        return kept[variant]

    return get


def checkout(variant):
    path = os.environ.get(family.PATHS[variant])
    if path is None:
        pytest.skip(f"{family.PATHS[variant]} names no checkout")
    return Path(path)


@pytest.mark.parametrize(("variant", "name"), RUNS)
def test_latents_equal_their_pipelines_bit_for_bit(built, monkeypatch, variant, name):
    case, root = family.CASES[variant][name], checkout(variant)
    folder, handles = built(variant)
    expected, vae, start = family.reference(case, root, folder)

    def module_encode(_, values, **__):
        with torch.no_grad():
            return vae.encode(rearrange(values, "f h w c -> 1 c f h w"))[0].mode()

    strips = family.ours(case, handles, start)
    monkeypatch.setattr(conditioning, "encode_values", module_encode)
    assert torch.equal(family.ours(case, handles, start), expected)
    # With the engine's own encode, which sums in another order.
    assert error(strips, expected) < 1e-5


@pytest.mark.parametrize(("variant", "name"), RUNS)
def test_latents_equal_the_recorded_ones(built, variant, name):
    case = family.recordable(family.CASES[variant][name])
    expected = torch.tensor(json.loads(family.RECORDED.read_text())[variant][name])
    assert error(family.kept(family.ours(case, built(variant)[1])), expected) < 1e-4


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
def test_frames_equal_their_decode_in_any_memory(built, length):
    _, handles = built("fun-inp")
    module = import_pipeline(checkout("fun-inp"))
    with handles.vae.weights.running() as own:
        vae = module.vae.from_config(own.config)
        vae.load_state_dict(own.state_dict())
    latents = torch.randn(2, 16, length, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = rearrange((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1), "b c f h w -> (b f) h w c")
    for budget in (None, 1 << 20):
        images = decode(handles.vae, latents, budget=budget)
        assert images.shape == expected.shape == (2 * (4 * length - 3), 32, 48, 3)
        assert error(images, expected) < 1e-5
