"""CogVideoX-Fun-V1.5-InP and VOID make the latents and the frames of their own pipelines, bit for bit.

Where no environment variable names a checkout (``tests.family``), the latents are compared with recorded numbers.
"""

import ast
import json
import logging
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import gguf
import pytest
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
from cogvideox import conditioning, sampling
from cogvideox.conditioning import fit_area, mirror, taken_away
from cogvideox.events import Events
from cogvideox.geometry import check_frames
from cogvideox.handles import open_handles, quantized, with_lora
from cogvideox.sampling import sample
from cogvideox.schedulers import make_scheduler
from cogvideox.vae import decode, encode, pair_lengths
from cogvideox.video import read_video, write_latent, write_mp4
from commands.job import read_source
from tests import family, layouts
from tests.conftest import CPU
from tests.fun_reference import import_pipeline
from tests.helpers import call, run_generate
from tests.reference import draw_beside, draw_prompts, error

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


class TestTheNodes:
    """As a graph runs them, with what the engine's own functions give."""

    SIZES = {"width": 80, "height": 48, "length": 13}

    @pytest.fixture
    def prompts(self):
        return {name: [[prompt, {}]] for name, prompt in zip(("positive", "negative"), draw_prompts(), strict=True)}

    @pytest.fixture
    def load(self, pack, built):
        def load(variant):
            model, _, vae, _ = call(pack, "CogVideoX15ModelLoader", model=str(built(variant)[0]), dtype="fp32")
            return model, vae

        return load

    def sampled(self, pack, model, given, **settings):
        positive, negative, latent = given
        settings = dict(seed=1, steps=3, cfg=6.0, scheduler="ddim_origin", denoise=1.0) | settings
        sockets = {"positive": positive, "negative": negative, "latent_image": latent}
        return call(pack, "CogVideoX15Sampler", model=model, **sockets, **settings)[0]

    @pytest.mark.parametrize("name", ["a masked video", "a start and an end image", "noise on the video"])
    def test_inpaint_is_the_engines_conditioning(self, pack, load, built, prompts, name):
        case = family.FUN[name]
        model, vae = load("fun-inp")
        given = {
            "video": case.clip() if case.video else None,
            "mask": case.box() if case.mask else None,
            "start_image": case.image(21) if case.start else None,
            "end_image": case.image(22) if case.end else None,
        }
        made = call(
            pack,
            "CogVideoX15Inpaint",
            **prompts,
            vae=vae,
            **self.SIZES,
            batch_size=1,
            noise_aug=case.noise_aug,
            **given,
        )
        latent = self.sampled(pack, model, made)
        with patch.object(family, "SEED", 0):
            assert torch.equal(latent["samples"], family.ours(case, built("fun-inp")[1]))
        (images,) = call(pack, "CogVideoX15VAEDecode", samples=latent, vae=vae)
        assert images.shape == (13, 48, 80, 3)

    def test_a_whole_video_starts_from_its_own_latent(self, pack, load, built, prompts):
        model, vae = load("fun-inp")
        clip = family.Case().clip()
        made = call(pack, "CogVideoX15Inpaint", **prompts, vae=vae, **self.SIZES, batch_size=2, video=clip)
        assert made[2]["samples"].shape == (2, 16, 4, 6, 10)
        start = encode(built("fun-inp")[1].vae, clip)
        assert torch.equal(made[2]["samples"], start.expand(2, -1, -1, -1, -1))
        ours = sample(
            built("fun-inp")[1].model,
            *draw_prompts(),
            start,
            seed=1,
            steps=4,
            scheduler="ddim_origin",
            denoise=0.5,
        )
        one = made[0], made[1], {**made[2], "samples": made[2]["samples"][:1]}
        assert torch.equal(self.sampled(pack, model, one, steps=4, denoise=0.5)["samples"], ours)

    @pytest.mark.parametrize("kind", ["MASK", "IMAGE"])
    @pytest.mark.parametrize("stage", ["first", "second"])
    def test_void_is_the_engines_conditioning(self, pack, load, built, prompts, stage, kind):
        case = family.Case(stage=stage, noise_aug=0.0563)
        model, vae = load("void")
        greys = case.quadmask() / 255
        greys = greys if kind == "MASK" else greys[..., None].expand(-1, -1, -1, 3)
        made = call(
            pack, "CogVideoX15Void", **prompts, vae=vae, **self.SIZES, video=case.clip(), quadmask=greys, stage=stage
        )
        noise = {"samples": case.noise()} if stage == "second" else None
        with patch.object(family, "SEED", 0):
            expected = family.ours(case, built("void")[1])
        assert torch.equal(self.sampled(pack, model, made, noise=noise)["samples"], expected)

    def test_other_lengths_and_sizes_are_fitted_and_told(self, pack, load, prompts, caplog):
        _, vae = load("void")
        clip, greys = torch.rand(6, 100, 160, 3), torch.rand(6, 100, 160)
        sockets = dict(prompts, vae=vae, **self.SIZES)
        made = call(pack, "CogVideoX15Void", **sockets, video=clip, quadmask=greys, stage="first")
        assert "6 frames and length is 13: it runs back and forth" in caplog.text
        there_and_back = torch.cat([clip, clip.flip(0), clip])[:13]
        masks = torch.cat([greys, greys.flip(0), greys])[:13]
        again = call(pack, "CogVideoX15Void", **sockets, video=there_and_back, quadmask=masks, stage="first")
        assert torch.equal(made[0][0][1]["concat_latent_image"], again[0][0][1]["concat_latent_image"])
        made = call(pack, "CogVideoX15Inpaint", **sockets, batch_size=1, video=clip, mask=greys.round())
        assert "its last was repeated" in caplog.text
        assert made[0][0][1]["concat_latent_image"].shape == (1, 17, 4, 6, 10)
        with pytest.raises(ValueError, match="The mask has 3 frames and the video 6"):
            call(pack, "CogVideoX15Inpaint", **sockets, batch_size=1, video=clip, mask=greys[:3])
        with pytest.raises(ValueError, match="no video, so there is nothing"):
            call(pack, "CogVideoX15Inpaint", **sockets, batch_size=1, mask=greys)


def test_how_a_latent_is_decoded_travels_with_it(pack, built, tiny):
    """A VAE that was loaded apart, or another checkpoint's, does as the latent says; a latent that says nothing is
    decoded as the VAE's checkpoint has it."""
    latents = torch.randn(1, 16, 4, 2, 2)
    fun, plain = (
        call(pack, "CogVideoX15ModelLoader", model=str(folder), dtype="fp32")[2]
        for folder in (built("fun-inp")[0], tiny)
    )
    for vae, said, frames in (
        (fun, {}, 13),
        (fun, {"cogvideox_in_pairs": False}, 16),
        (plain, {}, 16),
        (plain, {"cogvideox_in_pairs": True}, 13),
    ):
        (images,) = call(pack, "CogVideoX15VAEDecode", samples={"samples": latents} | said, vae=vae)
        assert len(images) == frames


class TestRefusals:
    def test_lengths_are_told_as_pairs(self):
        for frames in (1, 5, 77, 85):
            check_frames(frames, 8, in_pairs=True)
        for frames, near in ((81, "77 or 85"), (9, "5 or 13"), (2, "1 or 5"), (0, "1 or 5")):
            with pytest.raises(ValueError, match=rf"8N\+5.* Set it to {near}\."):
                check_frames(frames, 8, in_pairs=True)

    @pytest.mark.parametrize(
        ("variant", "channels", "said"),
        [
            ("void", 0, "Put CogVideoX-1.5 Object Removal"),
            ("void", 17, "only CogVideoX-Fun-V1.5-InP checkpoints do"),
            ("void", 16, "Put CogVideoX-1.5 Object Removal"),
            ("fun-inp", 16, "Put CogVideoX-1.5 Inpaint in its place"),
            ("fun-inp", 32, "only VOID's checkpoints do"),
            ("fun-inp", 5, "holds latents of 5 channels"),
        ],
    )
    def test_what_a_model_cannot_read(self, built, variant, channels, said):
        latents = torch.zeros(1, 16, 4, 4, 6)
        beside = torch.zeros(1, channels, 4, 4, 6) if channels else None
        with pytest.raises(ValueError, match=said):
            sample(built(variant)[1].model, *draw_prompts(), latents, image_latents=beside, seed=1, steps=1)

    def test_odd_latents(self, built):
        with pytest.raises(ValueError, match=r"9 frames.* Set it to 5 or 13\. CogVideoX-1.5 Inpaint"):
            sample(built("fun-inp")[1].model, *draw_prompts(), torch.zeros(1, 16, 3, 4, 6), seed=1, steps=1)

    def test_diffusers_ddim_where_the_schedule_is_shifted(self, checkpoints):
        config = open_handles(checkpoints("2b"), "fp32", CPU).model.scheduler_config
        # diffusers' own where a config does not say.
        for given in (config, {name: value for name, value in config.items() if name != "snr_shift_scale"}):
            with pytest.raises(ValueError, match="trained with one of 3.0: .* Choose ddim"):
                make_scheduler(given, "ddim_origin")
        assert make_scheduler({}, "ddim").config.snr_shift_scale == 3.0


def test_the_two_ddims_are_one_up_to_rounding(built):
    ours = {
        name: family.ours(family.Case(video=True, mask=True, scheduler=name), built("fun-inp")[1])
        for name in ("ddim", "ddim_origin")
    }
    assert 0 < error(ours["ddim"], ours["ddim_origin"]) < 1e-4


def test_a_quadmask_of_any_greys_is_the_nearest_levels():
    greys = torch.tensor([0.0, 31, 32, 63, 95, 96, 127, 191, 192, 255])[None, None] / 255
    half = 127 / 255
    assert taken_away(greys, "first").flatten().tolist() == pytest.approx([1, 1, 1, 1, 1, half, half, half, 0, 0])
    assert taken_away(greys, "second").flatten().tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="stage is 'third', which is not known here"):
        taken_away(greys, "third")


def test_a_clip_is_mirrored_as_voids_padding_does():
    tree = ast.parse((checkout("void") / "videox_fun" / "utils" / "utils.py").read_text())
    (function,) = (node for node in tree.body if getattr(node, "name", "") == "temporal_padding")
    there = {"torch": torch, "logger": logging.getLogger()}
    exec(compile(ast.Module([function], []), "utils.py", "exec"), there)
    for count in (1, 3, 30, 84, 85, 90):
        clip = torch.arange(count)
        assert mirror(clip, 85).equal(there["temporal_padding"](clip, min_length=85, max_length=85, dim=0))


def test_a_clip_of_another_shape_is_cropped_and_one_of_the_same_is_the_references():
    clip = torch.rand(2, 96, 160, 3)
    theirs = torch.nn.functional.interpolate(rearrange(clip, "f h w c -> c f h w"), (48, 80), mode="area")
    assert torch.equal(fit_area(clip, 80, 48), rearrange(theirs, "c f h w -> f h w c"))
    wide = torch.cat([torch.zeros(2, 96, 16, 3), clip, torch.zeros(2, 96, 16, 3)], dim=2)
    assert torch.equal(fit_area(wide, 80, 48), fit_area(clip, 80, 48))


def test_chunks_begin_with_one_frame_and_end_with_the_rest():
    assert [pair_lengths(length, 2) for length in (1, 2, 3, 4)] == [[1], [1, 1], [1, 2], [1, 2, 1]]


class TestTheCommandLine:
    SMALL = ("--prompt", "a panda", "--width", 80, "--height", 48, "--frames", 13, "--steps", 2, "--dtype", "fp32")

    @pytest.fixture
    def files(self, tmp_path):
        """A clip, and a mask of it, as files."""
        write_mp4(torch.rand(9, 48, 80, 3, generator=torch.Generator().manual_seed(1)), tmp_path / "clip.mp4", 8)
        write_mp4(family.Case().box()[:9, ..., None].expand(-1, -1, -1, 3), tmp_path / "mask.mp4", 8)
        Image.fromarray((255 * family.Case().box()[0]).byte().numpy()).save(tmp_path / "mask.png")
        Image.new("RGB", (80, 48), "teal").save(tmp_path / "start.png")
        return tmp_path

    @pytest.fixture
    def given(self, monkeypatch):
        """What the sampler was given to read beside the noise."""
        seen, real = {}, sampling.sample
        monkeypatch.setattr(sampling, "sample", lambda *a, **more: real(*a, **(seen.update(more) or more)))
        return seen

    @pytest.mark.parametrize(("size", "dtype"), [((80, 48), torch.uint8), ((64, 32), torch.float32)])
    def test_a_clip_of_the_videos_size_stays_in_bytes(self, built, files, size, dtype):
        words = ("--prompt", "x", "--model", "x", "--video", str(files / "clip.mp4"), "--frames", "5", "--fps", "8")
        width, height = map(str, size)
        options = generate.build_parser().parse_args([*words, "--width", width, "--height", height])
        source = read_source(options, built("fun-inp")[1].model.variant, None, Events())
        assert (source.clip.dtype, *source.clip.shape[1:3]) == (dtype, *size[::-1])

    def test_a_mask_and_images(self, built, files, capsys, given):
        model, output = built("fun-inp")[0], files / "out.mp4"
        for more in (
            ("--video", files / "clip.mp4", "--mask", files / "mask.mp4"),
            ("--video", files / "clip.mp4", "--mask", files / "mask.png", "--scheduler", "ddim_origin"),
            ("--start-image", files / "start.png", "--end-image", files / "start.png"),
            ("--end-image", files / "start.png"),
        ):
            code, _, errors = run_generate(
                capsys, "--model", model, *self.SMALL, "--fps", 8, *more, "--output", output, "--overwrite"
            )
            assert (code, errors.count("error")) == (0, 0), errors
            assert len(read_video(output)) == 13
            assert given["image_latents"].shape == (1, 17, 4, 6, 10)
            # What is kept of the first frame: all but the box, or all; and nothing between two images.
            kept = given["image_latents"][0, 0]
            assert (kept[0].min() == 1) == ("--start-image" in more)
            assert (kept.max() == 1) == (more[0] != "--end-image")
            assert kept[-1].min() == 0
            assert given["denoise"] == 1

    def test_a_quadmask_and_noise(self, built, files, capsys, given):
        write_latent(family.Case().noise(), files, "noise")
        (noise,) = files.glob("noise*.latent")
        clip = ("--video", files / "clip.mp4", "--void", files / "mask.mp4", "--fps", 12)
        output = ("--output", files / "x.mp4", "--overwrite")
        for more in ((), ("--noise", noise)):
            code, _, errors = run_generate(capsys, "--model", built("void")[0], *self.SMALL, *clip, *more, *output)
            assert code == 0, errors
            assert given["image_latents"].shape == (1, 32, 4, 6, 10)
        assert torch.equal(given["noise"], family.Case().noise())

    @pytest.mark.parametrize("variant", ["fun-inp", "void"])
    def test_a_clip_of_another_size_is_scaled_as_in_the_nodes(self, pack, built, tmp_path, capsys, given, variant):
        random = torch.Generator().manual_seed(1)
        write_mp4(torch.rand(13, 100, 150, 3, generator=random), tmp_path / "clip.mp4", 8)
        mask = (torch.rand(13, 10, 15, generator=random) > 0.5).float()
        mask = mask.repeat_interleave(10, 1).repeat_interleave(10, 2)[..., None].expand(-1, -1, -1, 3)
        write_mp4(mask, tmp_path / "mask.mp4", 8)
        options = ("--fps", 8, "--video", tmp_path / "clip.mp4", "--mask" if variant == "fun-inp" else "--void")
        output = ("--output", tmp_path / "x.mp4")
        code, _, errors = run_generate(
            capsys, "--model", built(variant)[0], *self.SMALL, *options, tmp_path / "mask.mp4", *output
        )
        assert code == 0, errors
        clip, mask = read_video(tmp_path / "clip.mp4"), read_video(tmp_path / "mask.mp4")[..., 0]
        mask = dict(mask=mask) if variant == "fun-inp" else dict(quadmask=mask, stage="first")
        node = "CogVideoX15Inpaint" if variant == "fun-inp" else "CogVideoX15Void"
        vae = call(pack, "CogVideoX15ModelLoader", model=str(built(variant)[0]), dtype="fp32")[2]
        empty, size = [[torch.zeros(1, 1, 1), {}]], dict(width=80, height=48, length=13)
        ((_, more),), *_ = call(pack, node, positive=empty, negative=empty, vae=vae, video=clip, **size, **mask)
        assert torch.equal(given["image_latents"], more["concat_latent_image"])

    @pytest.mark.parametrize(
        ("variant", "option", "said"),
        [
            ("void", "--mask", "such as CogVideoX-Fun-V1.5-5b-InP"),
            ("fun-inp", "--void", "such as void_pass1"),
            ("void", None, "needs --void"),
        ],
    )
    def test_wrong_combinations_are_refused_before_the_first_step(self, built, files, capsys, variant, option, said):
        more = (option, files / "mask.mp4") if option else ()
        # A plan takes what is missing for given.
        plan = ("--plan",) if option else ()
        video = ("--video", files / "clip.mp4", *more, *plan)
        code, _, errors = run_generate(capsys, "--model", built(variant)[0], *self.SMALL, *video)
        assert code == 1
        assert said in errors

    def test_other_lengths_are_refused(self, built, capsys):
        code, _, errors = run_generate(capsys, "--model", built("fun-inp")[0], *self.SMALL, "--frames", 81)
        assert code == 1
        assert "8N+5" in errors
        assert "Set it to 77 or 85" in errors


@pytest.mark.parametrize("variant", ["fun-inp", "void"])
class TestWhatElseAModelRunsWith:
    SHAPE = (1, 16, 4, 6, 10)

    def sampled(self, model, variant, **settings):
        beside = draw_beside(variant, self.SHAPE, torch.Generator().manual_seed(2))
        return sample(
            model, *draw_prompts(), torch.zeros(self.SHAPE), image_latents=beside, seed=1, steps=3, **settings
        )

    def test_a_reward_lora_is_as_if_its_weights_were_merged(self, built, tmp_path, variant):
        """CogVideoX-Fun's own keys: kohya's, with two lines and no dots."""
        folder, handles = built(variant)
        layer, generator = "transformer_blocks.0.attn1.to_q", torch.Generator().manual_seed(4)
        down, up = torch.randn(2, 128, generator=generator), torch.randn(128, 2, generator=generator)
        key = f"lora_unet__{layer.replace('.', '_')}"
        stored = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
        save_file(stored, tmp_path / "HPS2.1.safetensors")
        merged = shutil.copytree(folder, tmp_path / "merged")
        for file in (merged / "transformer").glob("*.safetensors"):
            tensors = load_file(file)
            if f"{layer}.weight" in tensors:
                tensors[f"{layer}.weight"] += 0.7 * (1 / 2) * up @ down
                save_file(tensors, file)
        ours = self.sampled(with_lora(handles.model, tmp_path / "HPS2.1.safetensors", 0.7), variant)
        expected = self.sampled(open_handles(merged, "fp32", CPU).model, variant)
        assert error(ours, expected) < 1e-5
        assert error(self.sampled(handles.model, variant), expected) > 1e-4

    def test_quantized_and_range_safe_it_is_near(self, built, variant):
        folder, handles = built(variant)
        plain = self.sampled(handles.model, variant)
        for model, most in (
            (quantized(handles.model, "int8_weight_only"), 0.05),
            (open_handles(folder, "fp16", CPU).model, 0.05),
        ):
            assert 0 < error(self.sampled(model, variant), plain) < most

    @pytest.mark.parametrize("kind", ["fp8", "GGUF"])
    def test_a_packed_file_runs_as_its_weights_widened(self, built, tmp_path, variant, kind):
        folder, _ = built(variant)
        rounded = shutil.copytree(folder, tmp_path / "rounded")
        state = {}
        for file in (rounded / "transformer").glob("*.safetensors"):
            state |= load_file(file)
        if kind == "fp8":
            state = {
                name: value.to(torch.float8_e4m3fn) if value.ndim == 2 and "blocks" in name else value
                for name, value in state.items()
            }
            packed = layouts.write_file(tmp_path / "model.safetensors", state)
        else:
            packed = layouts.write_gguf(tmp_path / "model.gguf", state, "Q8_0")
            for name, value in state.items():
                if value.ndim == 2 and "block" in name:
                    blocks = gguf.quants.quantize(value.numpy(), gguf.GGMLQuantizationType.Q8_0)
                    state[name] = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
                elif value.ndim > 1:
                    state[name] = value.half()
        for file in (rounded / "transformer").glob("*.safetensors"):
            save_file({name: state[name].float() for name in load_file(file)}, file)
        parts = {part: folder / part for part in ("text_encoder", "vae")}
        model = open_handles(packed, "fp32", CPU, tokenizer=folder / "tokenizer", **parts).model
        assert model.variant.reads == {"fun-inp": "inpaint", "void": "void"}[variant]
        expected = self.sampled(open_handles(rounded, "fp32", CPU).model, variant)
        # GGUF's blocks are widened in fp16.
        assert error(self.sampled(model, variant), expected) < (1e-5 if kind == "fp8" else 1e-3)
