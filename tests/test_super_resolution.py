"""One-step super-resolution is DOVE's and SparkVSR's own script, in as few pieces as memory allows.

With the environment variables DOVE_PATH and SPARKVSR_PATH at their checkouts (``tests/super_resolution_reference.py``)
the scripts themselves are run too.
"""

import errno
import gc
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import cogvideox.super_resolution as module
import cogvideox.tensors
import cogvideox.text
from cogvideox import video
from cogvideox.handles import open_handles, quantized, with_cache, with_lora
from cogvideox.memory import LiveBytes, plan_memory
from cogvideox.modules.cache import Cache
from cogvideox.pieces import Pieces, axis_spans
from cogvideox.super_resolution import (
    check_references,
    check_scale,
    describe_plan,
    find_kind,
    read_reference_frames,
    upscale,
)
from cogvideox.text import read_embeddings, write_embeddings
from cogvideox.video import read_video, write_mp4
from cogvideox.weights import placements
from tests.conftest import CPU
from tests.helpers import call, is_same_video
from tests.helpers import run_generate as run
from tests.reference import draw_prompts, error
from tests.super_resolution_reference import CASES, RECORDED, SCRIPTS, pipeline, run_script, samples, script
from tests.tiny_checkpoint import build_checkpoint, build_transformer
from tests.told import Told

IMAGES = torch.rand(9, 8, 12, 3, generator=torch.Generator().manual_seed(3))
EMPTY = draw_prompts(8)[0]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """``stored(variant)``: the folder of a tiny checkpoint whose transformer is stored in fp32."""
    built = {}

    def get(variant):
        if variant not in built:
            folder = tmp_path_factory.mktemp("upscale") / f"dove-{variant}"
            built[variant] = build_checkpoint(folder, variant, stored={"transformer": torch.float32})
        return built[variant]

    return get


@pytest.fixture(scope="module")
def opened(stored):
    return lambda variant, dtype="fp32": open_handles(stored(variant), dtype, CPU)


@pytest.fixture
def dove(opened):
    return opened("1.5")


def enlarged(handles, images=IMAGES, embeddings=EMPTY, **how):
    return upscale(handles.model, handles.vae, images, embeddings, **{"scale": 2} | how)


@pytest.fixture(scope="module")
def plain(opened):
    """What nothing is changed of."""
    return enlarged(opened("1.5"))


def run_case(handles, case):
    return upscale(
        handles.model,
        handles.vae,
        case.images,
        draw_prompts()[0],
        scale=case.scale,
        seed=case.seed,
        kind=case.kind,
        references=case.references,
        reference_frames=", ".join(map(str, case.places)),
        reference_guidance=case.guidance,
        piece=case.piece,
    )


class TestReference:
    @pytest.mark.parametrize("name", CASES)
    def test_the_result_is_what_the_script_made(self, opened, name):
        case = CASES[name]
        images = run_case(opened(case.variant), case)
        frames, height, width = case.clip
        assert images.shape == (frames, case.scale * height, case.scale * width, 3)
        assert images.dtype == torch.float32
        assert (samples(images) - torch.tensor(RECORDED[name])).abs().max() < 2e-5

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(
                name,
                marks=pytest.mark.skipif(
                    SCRIPTS[case.kind][0] not in os.environ, reason="needs a checkout of the script"
                ),
            )
            for name, case in CASES.items()
        ],
    )
    def test_given_the_scripts_own_encoding_the_latents_are_the_scripts_bit_for_bit(
        self, opened, stored, name, monkeypatch
    ):
        case, handles, latents = CASES[name], opened(CASES[name].variant), []
        theirs, decoded = run_script(case, stored(case.variant))
        decode, encoder = module.decode, pipeline(case, stored(case.variant)).vae

        def watched(vae, samples, **how):
            latents.append(samples)
            return decode(vae, samples, **how)

        def encoded(vae, clip, prepare, **_):
            with torch.no_grad():
                return encoder.encode(prepare(clip)).latent_dist.parameters

        assert error(run_case(handles, case), theirs) < 1e-5
        monkeypatch.setattr(module, "decode", watched)
        monkeypatch.setattr(module, "moments", encoded)
        run_case(handles, case)
        assert len(latents) == len(decoded)
        assert all(torch.equal(ours, their) for ours, their in zip(latents, decoded, strict=True))

    @pytest.mark.skipif("DOVE_PATH" not in os.environ, reason="needs a checkout of the script")
    def test_pieces_are_the_scripts(self):
        reference = script("dove")
        for whole in ((17, 64, 80), (49, 272, 480), (81, 720, 1280), (161, 256, 96)):
            for size in ((16, 48, 64), (24, 80, 48), (32, 128, 256), (64, 512, 512)):
                pieces = Pieces(whole, size)
                spans = [
                    (*time, *area)
                    for time in reference.make_temporal_chunks(whole[0], min(size[0], whole[0]), 8)
                    for area in reference.make_spatial_tiles(
                        *whole[1:], tuple(min(pair) for pair in zip(size, whole, strict=True))[1:]
                    )
                ]
                ours = [
                    (span.start[0], span.stop[0], span.start[1], span.stop[1], span.start[2], span.stop[2])
                    for span in pieces.spans
                ]
                assert ours == spans
                for span, ends in zip(pieces.spans, spans, strict=True):
                    region = reference.get_valid_tile_region(*ends, (1, 3, *whole), 8, 32, 32)
                    inside, there = pieces.kept(span)
                    assert [(part.start, part.stop) for part in (*inside, *there)] == [
                        (region[f"{kind}_{axis}_start"], region[f"{kind}_{axis}_end"])
                        for kind in ("valid", "out")
                        for axis in "thw"
                    ]


class TestPieces:
    @given(st.integers(1, 400), st.integers(9, 120))
    def test_parts_of_a_line_cover_it_once(self, length, size):
        covered = []
        for start, stop in axis_spans(length, size, 8):
            assert stop - start >= min(size, length)
            covered += range(start + 4 * (start > 0), stop - 4 * (stop < length))
        assert covered == list(range(length))

    def test_there_is_one_where_memory_is_not_counted(self, dove):
        told = Told()
        enlarged(dove, events=told)
        assert not [note for note in told.notes if "pieces" in note]
        assert describe_plan(dove.model, 9, 90, 160).startswith("640x384 pixels and 9 frames are made in one piece.")

    def test_there_are_several_where_the_plan_of_one_does_not_fit(self, dove, monkeypatch):
        whole = (97, 384, 640)
        needed = plan_memory(dove.model, Pieces(whole, whole).largest, False).needed["offload_layers"]
        for free, one in ((needed, True), (needed - 1, False)):
            monkeypatch.setattr(type(dove.model.weights), "free", free)
            assert ("in one piece" in describe_plan(dove.model, 97, 96, 160)) is one

    def test_a_plan_is_of_the_run_with_guidance_and_without_a_cache(self, opened):
        model = opened("1.5-i2v").model

        def plan(model, guidance):
            return describe_plan(model, 9, 90, 160, kind="sparkvsr", guidance=guidance)

        assert plan_memory(model, (1, 16, 3, 46, 80), True).text in plan(model, 2.0)
        assert plan(with_cache(model, Cache("teacache")), 1.0) == plan(model, 1.0) != plan(model, 2.0)

    def test_where_memory_runs_out_smaller_ones_are_tried(self, dove, monkeypatch):
        images, told, lengths = torch.rand(25, 8, 8, 3), Told(), []
        expected = enlarged(dove, images, piece=(16, 32, 32))
        with dove.model.weights.running() as transformer:
            forward = transformer.forward

        def tight(hidden_states, **more):
            lengths.append(hidden_states.shape[1])
            if lengths[-1] > 6:
                raise torch.OutOfMemoryError("out of memory")
            return forward(hidden_states=hidden_states, **more)

        monkeypatch.setattr(module, "choose_placements", lambda *_: placements()[:1])
        monkeypatch.setattr(transformer, "forward", tight)
        assert torch.equal(enlarged(dove, images, events=told), expected)
        assert "smaller pieces" in "".join(told.heals)
        assert lengths == [8, 4, 6]

    @pytest.mark.parametrize(("variant", "dtype", "guidance"), [("1.5", "fp32", 1.0), ("1.5-i2v", "bf16", 2.0)])
    def test_the_plan_is_within_15_percent_of_what_the_step_takes(self, tmp_path, variant, dtype, guidance):
        """Of a transformer that is wider than others here: beside it, latents count as little as in real ones."""

        def widen(parts):
            parts["transformer"] = build_transformer(variant, num_attention_heads=8)

        model = open_handles(build_checkpoint(tmp_path / "wide", variant, change=widen), dtype, CPU).model
        kind, channels = ("sparkvsr", 32) if "i2v" in variant else ("dove", 16)
        step = module._OneStep(model, EMPTY, kind, guidance, "heal", Told())
        noisy = [torch.randn(1, channels, 5, 16, 24)]
        with model.weights.running():
            gc.collect()
        with LiveBytes() as measured:
            step.run(noisy)
        plan = plan_memory(model, (1, 16, 5, 16, 24), guidance != 1, EMPTY.shape[1])
        assert plan.activations == pytest.approx(measured.peak, rel=0.15)

    def test_none_is_as_small_as_its_overlap(self, dove):
        with pytest.raises(ValueError, match="no longer than its overlap"):
            enlarged(dove, piece=(8, 16, 16))


class TestRun:
    def test_eight_bits_are_the_same_in_both_forms(self, dove):
        images = torch.randint(256, (3, 8, 12, 3)).to(torch.uint8)
        assert torch.equal(enlarged(dove, images), enlarged(dove, images / 255))

    def test_the_seed_draws_the_sample(self, dove, plain):
        first = enlarged(dove, seed=1)
        assert torch.equal(first, enlarged(dove, seed=1))
        assert not torch.equal(first, plain)

    def test_references_are_shown_where_they_stand_in_any_order(self, opened):
        handles, references = opened("1.5-i2v"), torch.rand(2, 30, 50, 3)
        first = enlarged(handles, kind="sparkvsr", references=references, reference_frames="0, 4")
        turned = enlarged(handles, kind="sparkvsr", references=references.flip(0), reference_frames="4, 0")
        assert torch.equal(first, turned)
        assert not torch.equal(
            first, enlarged(handles, kind="sparkvsr", references=references, reference_frames="0, 8")
        )

    def test_guidance_in_two_halves_is_that_in_one_batch(self, opened, monkeypatch):
        handles, references = opened("1.5-i2v"), torch.rand(1, 16, 24, 3)
        how = dict(kind="sparkvsr", references=references, reference_frames="4", reference_guidance=3.0)
        whole = enlarged(handles, **how)
        choose = module.choose_placements
        monkeypatch.setattr(
            module,
            "choose_placements",
            lambda *given: tuple(replace(placement, batched=False) for placement in choose(*given)[-1:]),
        )
        assert error(enlarged(handles, **how), whole) < 1e-5
        assert error(enlarged(handles, **how | {"reference_guidance": 1.0}), whole) > 1e-3

    def test_without_references_it_is_not_guided_and_says_so(self, opened):
        handles, told = opened("1.5-i2v"), Told()
        guided = enlarged(handles, kind="sparkvsr", reference_guidance=3.0, events=told)
        assert torch.equal(guided, enlarged(handles, kind="sparkvsr"))
        assert any("no effect" in note for note in told.notes)

    def test_a_cache_is_left_out_in_a_sentence(self, dove, plain, monkeypatch):
        told, caches, make = Told(), [], module.make_speedups

        def noted(model, *given):
            caches.append(model.cache)
            return make(model, *given)

        monkeypatch.setattr(module, "make_speedups", noted)
        cached = replace(dove, model=with_cache(dove.model, Cache("teacache")))
        assert torch.equal(enlarged(cached, events=told), plain)
        assert any("cache is left out" in note for note in told.notes)
        assert caches == [None]

    def test_a_lora_is_applied_and_gone_afterwards(self, dove, plain, tmp_path):
        name = "transformer.transformer_blocks.0.attn1.to_out.0"
        halves = {f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(128, 2)}
        save_file(halves, tmp_path / "lora.safetensors")
        changed = replace(dove, model=with_lora(dove.model, tmp_path / "lora.safetensors"))
        assert not torch.equal(enlarged(changed), plain)
        assert torch.equal(enlarged(dove), plain)

    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_in_16_bits_it_is_near(self, plain, opened, dtype):
        assert error(enlarged(opened("1.5", dtype)), plain) < 0.03

    def test_loud_weights_are_finite_in_fp16(self, loud):
        in_16, whole = (enlarged(open_handles(loud, dtype, CPU)) for dtype in ("fp16", "fp32"))
        assert in_16.isfinite().all()
        assert error(in_16, whole) < 0.03

    def test_what_is_not_finite_is_healed(self, loud):
        told = Told()
        healed = enlarged(open_handles(loud, "fp16", CPU, on_mismatch="warn"), events=told)
        assert healed.isfinite().all()
        assert any("piece 1 of 1" in heal for heal in told.heals)

    def test_it_is_near_with_quantized_weights(self, dove, plain):
        small = replace(dove, model=quantized(dove.model, "int8_weight_only"))
        assert 0 < error(enlarged(small), plain) < 0.05

    def test_progress_ends_with_all_done_and_counts_blocks_and_pieces(self, dove):
        heard = []

        class Heard(Told):
            def progress(self, what, done, total, unit):
                heard.append((what, done, total))

        enlarged(dove, torch.rand(25, 8, 8, 3), piece=(16, 32, 32), events=Heard())
        for what in ("encoding", "upscaling", "decoding"):
            told = [(done, total) for name, done, total in heard if name == what]
            assert len({total for _, total in told}) == 1
            assert [done for done, _ in told] == sorted({done for done, _ in told})
            assert told[-1][0] == told[-1][1]

    def test_it_can_be_cancelled_within_the_step(self, dove):
        class Cancelled(Exception):
            pass

        def stop(done, total):
            if done < total:
                raise Cancelled

        with pytest.raises(Cancelled):
            enlarged(dove, events=Told(progress=stop, of="upscaling"))
        enlarged(dove)


class TestRefused:
    def test_a_checkpoint_that_is_neither(self, opened, checkpoints):
        assert find_kind(opened("1.5").model) == find_kind(opened("2b").model) == "dove"
        image = opened("1.5-i2v").model
        assert find_kind(image, "sparkvsr") == "sparkvsr"
        for model, kind, words in (
            (image, "auto", "set kind to sparkvsr"),
            (image, "dove", "kind is dove"),
            (opened("1.5").model, "sparkvsr", "kind is sparkvsr"),
            (open_handles(checkpoints("5b"), "fp32", CPU).model, "auto", "not of a kind"),
            (image, "x", "Choose one of auto"),
        ):
            with pytest.raises(ValueError, match=words):
                find_kind(model, kind)

    def test_its_name_tells_sparkvsr(self, stored, tmp_path):
        (tmp_path / "SparkVSR-S2").symlink_to(stored("1.5-i2v"))
        assert find_kind(open_handles(tmp_path / "SparkVSR-S2", "fp32", CPU).model) == "sparkvsr"

    def test_a_name_without_dove_is_a_note(self, checkpoints, dove):
        for handles, noted in ((dove, False), (open_handles(checkpoints("1.5"), "fp32", CPU), True)):
            told = Told()
            enlarged(handles, events=told)
            assert any("says DOVE" in note for note in told.notes) is noted

    @pytest.mark.parametrize(
        ("text", "words"), [("0, x", "no frame"), ("-1", "no frame"), ("0, 3", "apart"), ("5 5", "apart")]
    )
    def test_reference_frames_that_are_none(self, text, words):
        with pytest.raises(ValueError, match=words):
            read_reference_frames(text)

    def test_reference_frames_are_read(self):
        assert read_reference_frames(" 48,0 ; 24，30") == (48, 0, 24, 30)
        assert read_reference_frames("") == ()

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (("dove", None, "0"), "which reads none"),
            (("sparkvsr", 0, "0"), "no reference images"),
            (("sparkvsr", 2, "0"), "2 reference images"),
            (("sparkvsr", None, ""), "does not say which frames"),
            (("sparkvsr", 1, "9", 9), "its last is 8"),
        ],
    )
    def test_references_that_fit_nothing(self, given, words):
        with pytest.raises(ValueError, match=words):
            check_references(*given)

    @pytest.mark.parametrize("scale", [0, 9, 2.5])
    def test_a_scale_that_is_none(self, scale):
        with pytest.raises(ValueError, match="1 to 8 times"):
            check_scale(scale)

    def test_anothers_embeddings_and_guidance(self, dove):
        with pytest.raises(ValueError, match="another model's text encoder"):
            enlarged(dove, embeddings=torch.zeros(1, 8, 48))
        with pytest.raises(ValueError, match="factor from 0"):
            enlarged(dove, reference_guidance=-1.0)


class TestEmbeddings:
    def test_they_are_read_as_written_and_as_doves_authors_write_them(self, tmp_path):
        write_embeddings(EMPTY, tmp_path / "new" / "a.safetensors")
        save_file({"prompt_embedding": EMPTY[0].clone()}, tmp_path / "b.safetensors")
        for path in (tmp_path / "new" / "a.safetensors", tmp_path / "b.safetensors"):
            assert torch.equal(read_embeddings(path, EMPTY.shape[2]), EMPTY)
            with pytest.raises(ValueError, match="another model's text encoder"):
                read_embeddings(path, 48)

    def test_none_is_replaced_and_others_are_refused(self, tmp_path):
        path = tmp_path / "a.safetensors"
        path.write_bytes(b"\x08\0\0\0\0\0\0\0{")
        with pytest.raises(ValueError, match="exists already"):
            write_embeddings(EMPTY, path)
        with pytest.raises(ValueError, match="cut off"):
            read_embeddings(path, 32)
        save_file({"x": torch.ones(1)}, tmp_path / "b.safetensors")
        with pytest.raises(ValueError, match="no prompt's embedding"):
            read_embeddings(tmp_path / "b.safetensors", 32)
        save_file({"prompt_embedding": EMPTY / 0}, tmp_path / "c.safetensors")
        with pytest.raises(ValueError, match="NaN or Inf"):
            read_embeddings(tmp_path / "c.safetensors", 32)


class TestCommandLine:
    @pytest.fixture
    def clip(self, tmp_path):
        path = tmp_path / "small.mp4"
        sound = torch.rand(2, 24_000).numpy() - 0.5
        write_mp4(torch.rand(9, 16, 24, 3), path, Fraction(24), sound=(sound, 48_000))
        return path

    def test_a_clip_becomes_larger_at_its_own_rate_with_its_sound(self, stored, tmp_path, capsys, clip):
        output, empty = tmp_path / "large.mp4", tmp_path / "empty.safetensors"
        arguments = ("--upscale", clip, "--model", stored("1.5"), "--scale", 2, "--empty-prompt", empty)
        code, said, _ = run(capsys, *arguments, "--output", output)
        assert code == 0
        assert said.index("empty prompt's embedding is now in") < said.index("verdict: ok")
        with av.open(str(output)) as container:
            video = container.streams.video[0]
            assert (video.width, video.height, video.average_rate) == (48, 32, 24)
            assert sum(1 for _ in container.decode(video=0)) == 9
            assert container.streams.audio
        second = tmp_path / "again.mp4"
        model = tmp_path / "dove"
        shutil.copytree(stored("1.5"), model, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
        assert run(capsys, "--model", model, *arguments[:2], *arguments[4:], "--output", second)[0] == 0
        assert is_same_video(second, output)

    def test_an_embedding_that_cannot_be_kept_is_used_all_the_same(self, stored, tmp_path, capsys, clip):
        (tmp_path / "file").write_bytes(b"")
        arguments = ("--upscale", clip, "--model", stored("1.5"), "--scale", 1, "--output", tmp_path / "large.mp4")
        code, told, _ = run(capsys, *arguments, "--empty-prompt", tmp_path / "file" / "empty.safetensors")
        assert code == 0
        assert (tmp_path / "large.mp4").is_file()
        assert "so the prompt's embedding is not kept" in told

    def test_a_name_that_another_process_took_meanwhile_loses_no_video(
        self, stored, tmp_path, capsys, clip, monkeypatch
    ):
        output, real, written = tmp_path / "large.mp4", video.write_mp4, []

        def write(images, path, *given, **how):
            if not written:
                output.write_bytes(b"another's")
            written.append(path)
            return real(images, path, *given, **how)

        monkeypatch.setattr(video, "write_mp4", write)
        code, _, error = run(capsys, "--upscale", clip, "--model", stored("1.5"), "--scale", 1, "--output", output)
        assert code == 1
        assert f"The video is not lost: it is in {tmp_path / 'large_00002.mp4'}." in error
        assert len(read_video(tmp_path / "large_00002.mp4")) == 9

    @pytest.mark.parametrize("plan", [(), ("--plan",)])
    def test_a_clip_that_would_be_too_large_is_refused_before_t5_is_read(
        self, stored, tmp_path, capsys, clip, monkeypatch, plan
    ):
        monkeypatch.setattr(cogvideox.tensors, "host_bytes", lambda: 10**6)
        monkeypatch.setattr(cogvideox.text, "encode_prompt", None)
        output = tmp_path / "large.mp4"
        code, _, error = run(
            capsys, "--upscale", clip, "--model", stored("1.5"), "--scale", 8, "--output", output, *plan
        )
        assert code == 1
        assert "A clip of 24x16 pixels and 9 frames, made 8 times larger, would take" in error

    def test_references_are_files(self, stored, tmp_path, capsys, clip):
        for name in ("a.png", "b.png"):
            Image.new("RGB", (60, 40), "green").save(tmp_path / name)
        output = tmp_path / "large.mp4"
        arguments = ("--upscale", clip, "--model", stored("1.5-i2v"), "--kind", "sparkvsr", "--scale", 1)
        shown = ("--references", tmp_path / "a.png", tmp_path / "b.png", "--reference-frames", "0,8")
        assert run(capsys, *arguments, *shown, "--output", output)[0] == 0
        assert output.is_file()
        code, _, error = run(capsys, *arguments, *shown[:2], "--reference-frames", "9", "--output", tmp_path / "x.mp4")
        assert code == 1
        assert "its last is 8" in error

    def test_a_video_that_cannot_be_where_it_was_to_go_is_not_lost(self, stored, tmp_path, capsys, clip, monkeypatch):
        import cogvideox.video as module

        encode, full = module._encode, tmp_path / "full"
        fail = {full}
        full.mkdir()
        (tmp_path / "large.mp4").write_text("another")
        monkeypatch.chdir(tmp_path)

        def encoded(images, path, *more):
            if path.parent in fail:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            encode(images, path, *more)

        monkeypatch.setattr(module, "_encode", encoded)
        arguments = ("--upscale", clip, "--model", stored("1.5"), "--scale", 1, "--output", full / "large.mp4")
        code, _, error = run(capsys, *arguments)
        assert code == 1
        assert "No space left on device" in error
        assert f"The video is not lost: it is in {tmp_path / 'large_00002.mp4'}." in error
        assert len(read_video(tmp_path / "large_00002.mp4")) == 9
        assert (tmp_path / "large.mp4").read_text() == "another"
        assert list(full.iterdir()) == []
        fail |= {tmp_path, Path(tempfile.gettempdir())}
        code, _, error = run(capsys, *arguments)
        assert code == 1
        assert f"{full / 'large.mp4'} could not be written" in error
        assert "not lost" not in error

    @pytest.mark.parametrize("bright", [None, 8])
    def test_a_black_clip_is_refused_before_it_is_made_larger(self, stored, tmp_path, capsys, monkeypatch, bright):
        frames = torch.zeros(9, 16, 24, 3)
        if bright is not None:
            frames[bright] = 1
        write_mp4(frames, tmp_path / "dark.mp4", 8)
        monkeypatch.setattr(cogvideox.super_resolution, "upscale", lambda *_, **__: frames)
        arguments = ("--upscale", tmp_path / "dark.mp4", "--model", stored("1.5"), "--scale", 1)
        code, _, error = run(capsys, *arguments, "--output", tmp_path / "large.mp4")
        assert ("is black in all of its frames" in error) == (bright is None), error
        assert (tmp_path / "large.mp4").exists() == (code == 0) == (bright is not None)
        assert run(capsys, *arguments, "--on-black", "warn", "--output", tmp_path / "other.mp4")[0] == 0

    def test_what_it_does_not_read_is_said(self, stored, tmp_path, capsys, clip):
        arguments = ("--upscale", clip, "--model", stored("1.5"), "--plan", "--output", tmp_path / "x.mp4")
        assert "does not read" not in run(capsys, *arguments)[1]
        more = ("--steps", 4, "--cfg", 1, "--cfg-range", 0, 0.5, "--cache", "teacache", "--context-windows", 161)
        code, said, _ = run(capsys, *arguments, *more)
        assert code == 0
        assert "does not read --steps, --cfg, --cfg-range, --cache, --context-windows." in said
        assert "TeaCache" not in said

    def test_a_plan_makes_nothing(self, stored, tmp_path, capsys, clip):
        code, said, _ = run(
            capsys, "--upscale", clip, "--model", stored("1.5"), "--plan", "--output", tmp_path / "x.mp4"
        )
        assert code == 0
        assert "128x64 pixels and 9 frames are made in one piece" in said
        assert "says DOVE" not in said
        assert not (tmp_path / "x.mp4").exists()

    def test_a_plan_notes_what_its_run_would(self, stored, tmp_path, capsys, clip):
        shutil.copytree(stored("1.5"), tmp_path / "base")
        said = run(capsys, "--upscale", clip, "--model", tmp_path / "base", "--plan", "--output", tmp_path / "x.mp4")[1]
        assert "Nothing in the checkpoint's name says DOVE" in said

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--upscale", "x.mp4"), "--upscale needs --model"),
            (("--upscale", "x.mp4", "--model", "x", "--prompt", "y"), "--prompt makes a new video"),
            (("--upscale", "x.mp4", "--model", "x", "--end-image", "y"), "--end-image makes a new video"),
            (("--upscale", "x.mp4", "--model", "x", "--seconds", 9), "--seconds makes a new video"),
            (("--prompt", "x", "--model", "x", "--references", "y"), "goes with --upscale"),
            (("--prompt", "x", "--model", "x", "--scale", "2"), "--scale goes with --upscale"),
            (("--prompt", "x", "--model", "x", "--kind", "dove"), "--kind goes with --upscale"),
            (("--prompt", "x", "--model", "x", "--reference-frames", "0"), "--reference-frames goes with --upscale"),
            (("--prompt", "x", "--model", "x", "--reference-guidance", "2"), "--reference-guidance goes with"),
        ],
    )
    def test_options_that_do_not_go_together(self, capsys, arguments, words):
        with pytest.raises(SystemExit):
            run(capsys, *arguments)
        assert words in capsys.readouterr().err


class TestNode:
    NODE = "CogVideoX15SuperResolution"

    def test_the_embedding_is_kept_and_then_no_text_encoder_is_needed(self, pack, stored, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        model, text_encoder, vae, _ = call(pack, "CogVideoX15ModelLoader", model=str(stored("1.5")), dtype="fp32")
        given = dict(model=model, vae=vae, images=IMAGES, scale=1)
        with pytest.raises(ValueError, match="Connect the text_encoder of the model loader once"):
            call(pack, self.NODE, **given)
        (first,) = call(pack, self.NODE, **given, text_encoder=text_encoder)
        assert [path.name for path in (tmp_path / "models").rglob("*.safetensors")] == ["empty_prompt_32.safetensors"]
        (second,) = call(pack, self.NODE, **given)
        assert torch.equal(first, second)
        assert first.shape == IMAGES.shape
        call(pack, "CogVideoX15BlackFrameCheck", images=first, action="stop")

    def test_an_embedding_that_cannot_be_kept_is_used_all_the_same(self, pack, stored, tmp_path, monkeypatch, caplog):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "models").write_bytes(b"")
        model, text_encoder, vae, _ = call(pack, "CogVideoX15ModelLoader", model=str(stored("1.5")), dtype="fp32")
        (images,) = call(pack, self.NODE, model=model, vae=vae, images=IMAGES, scale=1, text_encoder=text_encoder)
        assert images.shape == IMAGES.shape
        assert "so the prompt's embedding is not kept" in caplog.text

    def test_a_clip_that_would_be_too_large_is_refused_before_t5_is_read(self, pack, stored, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        model, text_encoder, vae, _ = call(pack, "CogVideoX15ModelLoader", model=str(stored("1.5")), dtype="fp32")
        monkeypatch.setattr(sys.modules[f"{pack.__name__}.cogvideox.tensors"], "host_bytes", lambda: 10**6)
        with pytest.raises(ValueError, match="made 8 times larger, would take"):
            call(pack, self.NODE, model=model, vae=vae, images=IMAGES, scale=8, text_encoder=text_encoder)
        assert not text_encoder.weights.is_loaded

    def test_a_core_clip_encodes_too(self, pack, stored, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        host = sys.modules[f"{pack.__name__}.nodes.host"]
        monkeypatch.setattr(host, "encode_with_clip", lambda *_: EMPTY)
        model, _, vae, _ = call(pack, "CogVideoX15ModelLoader", model=str(stored("1.5")), dtype="fp32")
        clip = SimpleNamespace(cond_stage_model=None, tokenizer=None)
        (images,) = call(pack, self.NODE, model=model, vae=vae, images=IMAGES, scale=1, seed=0, text_encoder=clip)
        ours = open_handles(stored("1.5"), "fp32", CPU)
        assert torch.equal(images, enlarged(ours, scale=1))
