"""Convolutions in fewer products give what PyTorch's give, and are really fewer."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.vae_decode import build as build_released
from benchmarks.vae_decode import theirs
from cogvideox.modules import fewer_products
from tests.memory import count_strips
from tests.reference import error


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_over_time_it_is_the_convolution_of_all_frames(count, bias):
    generator = torch.Generator().manual_seed(count)
    frames = torch.randn(2 + count, 5, 8, 6, generator=generator)
    if count % 2:
        frames[:2] = frames[2]
    weight, bias = torch.randn(7, 5, 3, 3, 3, generator=generator), torch.randn(7, generator=generator) * bias
    given = frames.transpose(0, 1)[None]
    ours = fewer_products.convolve_over_time(frames, fewer_products.weights_over_time(weight), bias)
    expected = F.conv3d(given.double(), weight.double(), bias.double(), padding=(0, 0, 1))
    assert ours.shape == expected.shape == (1, 7, count, 6, 6)
    assert error(ours.double(), expected) < 1e-6


def test_of_doubled_pictures_it_is_the_convolution():
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(3, 5, 4, 6, generator=generator)
    weight, bias = torch.randn(7, 5, 3, 3, generator=generator), torch.randn(7, generator=generator)
    ours = fewer_products.convolve_doubled(F.pad(frames, (1, 1, 1, 1)), fewer_products.weights_doubled(weight), bias)
    doubled = F.interpolate(frames.double(), scale_factor=2.0)
    expected = F.conv2d(doubled, weight.double(), bias.double(), padding=1)
    assert ours.shape == expected.shape == (3, 7, 8, 12)
    assert error(ours.double(), expected) < 1e-6


def test_the_sums_of_weights_are_less_than_twice_as_large():
    weight = torch.zeros(8, 4, 3, 3, 3)
    assert fewer_products.weights_over_time(weight).nbytes < 2 * weight.nbytes
    assert fewer_products.weights_doubled(weight[:, :, 0]).nbytes < 2 * weight[:, :, 0].nbytes


def test_they_are_for_fp32_on_a_cpu_and_more_than_a_few_pixels():
    cpu, size = torch.device("cpu"), 4 * 16 * 16
    assert fewer_products.pay(cpu, torch.float32, size)
    assert not fewer_products.pay(torch.device("cuda"), torch.float32, size)
    assert not fewer_products.pay(cpu, torch.bfloat16, size)
    assert not fewer_products.pay(cpu, torch.float32, 2 * 12 * 12)


def test_a_decode_at_the_released_size_takes_two_thirds_of_diffusers_products():
    """Of a clip of 17 frames of 320x192, counted from shapes."""
    vae = build_released("meta", torch.float32)
    latent = torch.empty(1, 16, 5, 24, 40, device="meta")
    counts = []
    with torch.no_grad():
        for work in (lambda: count_strips(vae, latent, None, [3, 2]), lambda: theirs(vae, latent, False)):
            with FlopCounterMode(display=False) as counter:
                work()
            counts.append(counter.get_total_flops())
    assert counts[0] < 0.66 * counts[1]
