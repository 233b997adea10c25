"""Folders may be fine-tunes, training runs, caches, sets side by side: each opens to the weights that are meant, or a
sentence says why not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import generate
from cogvideox.checkpoint import folders
from cogvideox.checkpoint.catalogue import find_entry, list_checkpoints
from cogvideox.checkpoint.convert import convert_checkpoint
from cogvideox.checkpoint.headers import read_tensor
from cogvideox.checkpoint.layout import open_checkpoint, open_part
from cogvideox.checkpoint.lora_places import find_lora
from cogvideox.handles import open_handles
from cogvideox.precision.policy import plan_dtypes
from interop.check import is_config
from tests import layouts
from tests.conftest import CPU, ROOT

REAL = ROOT.parent / "shared" / "real-configs" / "CogVideoX1.5-5B-I2V"
INDEX, SINGLE = "diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint in diffusers layout, and its transformer's weights by their names."""
    folder, modules = layouts.build_modules(tmp_path_factory.mktemp("folders") / "whole")
    return folder, {name: value.contiguous() for name, value in modules["transformer"].state_dict().items()}


@pytest.fixture
def copy(source, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(source[0], tmp_path / "checkpoint")


@pytest.fixture
def bare(copy):
    """A copy whose transformer/ holds its config alone."""
    for file in (copy / "transformer").glob("*safetensors*"):
        file.unlink()
    return copy


def is_the_one(checkpoint, state, add=0.0):
    """Whether a checkpoint's transformer is these weights, all of them, bit for bit."""
    tensors = checkpoint.part("transformer").tensors
    return tensors.keys() == state.keys() and all(
        torch.equal(read_tensor(stored), state[name].to(stored.dtype) + add)
        for name, stored in tensors.items()
        if stored.shape
    )


def write_shards(
    folder: Path,
    state: dict,
    index: str = INDEX,
    name: str = "diffusion_pytorch_model-{:05}-of-00002.safetensors",
    save=save_file,
):
    folder.mkdir(parents=True, exist_ok=True)
    halves = [dict(list(state.items())[part::2]) for part in range(2)]
    for number, half in enumerate(halves, 1):
        save(half, folder / name.format(number))
    weight_map = {key: name.format(number) for number, half in enumerate(halves, 1) for key in half}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def other(state):
    """Weights that are told from the right ones."""
    return {name: value + 1 for name, value in state.items()}


def refused(path, *said, **given):
    with pytest.raises(ValueError) as caught:
        open_checkpoint(path, **given)
    for words in said:
        assert words in str(caught.value)
    return str(caught.value)


class TestAPartThatIsNotWhole:
    BROKEN = {
        "its weights are missing": lambda part: [file.unlink() for file in part.glob("*.safetensors*")],
        "a shard is missing": lambda part: sorted(part.glob("*.safetensors"))[-1].unlink(),
        "its config is damaged": lambda part: (part / "config.json").write_text("{"),
        "its config is missing": lambda part: (part / "config.json").unlink(),
        "its weights are cut": lambda part: os.truncate(sorted(part.glob("*.safetensors"))[0], 500),
    }

    @pytest.mark.parametrize("how", BROKEN)
    @pytest.mark.parametrize("kind", ["text_encoder", "vae"])
    def test_is_not_looked_at_where_another_is_given(self, source, copy, kind, how):
        self.BROKEN[how](copy / kind)
        assert open_checkpoint(copy, **{kind: source[0] / kind}).part(kind).source == source[0] / kind

    @pytest.mark.parametrize("how", BROKEN)
    @pytest.mark.parametrize("kind", ["text_encoder", "vae"])
    def test_is_told_when_it_is_needed_and_stops_nothing_else(self, copy, kind, how, capsys):
        self.BROKEN[how](copy / kind)
        checkpoint = open_checkpoint(copy)
        whole = {"text_encoder", "vae"} - {kind}
        assert set(checkpoint.parts) == {"transformer", *whole}
        with pytest.raises(ValueError) as caught:
            checkpoint.part(kind)
        assert str(copy / kind) in str(caught.value)
        assert checkpoint.incomplete[kind] in str(caught.value)
        assert (
            f"[incomplete] {'VAE' if kind == 'vae' else 'text encoder'}: " in plan_dtypes(checkpoint, "auto", CPU).text
        )
        assert "[absent]" not in plan_dtypes(checkpoint, "auto", CPU).text
        # A check is of all that is there.
        assert generate.main(["--check", str(copy), "--device", "cpu"]) == 1
        assert checkpoint.incomplete[kind] in capsys.readouterr().err

    def test_is_told_before_anything_is_made(self, copy, tmp_path, capsys):
        next((copy / "vae").glob("*.safetensors")).unlink()
        command = [
            "--model",
            copy,
            "--prompt",
            "a panda",
            "--output",
            tmp_path / "out.mp4",
            "--width",
            32,
            "--height",
            32,
        ]
        command += ["--frames", 1, "--steps", 1]
        assert generate.main([*map(str, command)]) == 1
        shown = capsys.readouterr()
        assert f"{copy / 'vae'} should hold the VAE's weights" in shown.err
        assert "sampling" not in shown.err
        assert generate.main([*map(str, command), "--plan"]) == 0

    def test_can_be_left_out_of_a_file_but_not_of_a_folder_that_is_converted(self, copy, tmp_path):
        next((copy / "vae").glob("*.safetensors")).unlink()
        checkpoint = open_checkpoint(copy)
        convert_checkpoint(checkpoint, tmp_path / "one.safetensors")
        with pytest.raises(ValueError, match="the VAE's weights"):
            convert_checkpoint(checkpoint, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()

    def test_changes_the_fingerprint_when_it_is_repaired(self, source, copy):
        (copy / "vae" / SINGLE).unlink()
        before = open_checkpoint(copy).fingerprint
        shutil.copy(source[0] / "vae" / SINGLE, copy / "vae")
        assert open_checkpoint(copy).fingerprint != before

    @pytest.mark.parametrize("file", ["scheduler/scheduler_config.json", "tokenizer/spiece.model"])
    def test_changes_the_fingerprint_with_what_is_no_weight(self, copy, file):
        before = open_checkpoint(copy).fingerprint
        assert open_checkpoint(copy).fingerprint == before
        if file.endswith(".json"):
            config = json.loads((copy / file).read_text(encoding="utf-8"))
            (copy / file).write_text(json.dumps(config | {"snr_shift_scale": 2.5}), encoding="utf-8")
        else:
            os.utime(copy / file, (1, 1))
        assert open_checkpoint(copy).fingerprint != before

    @pytest.mark.parametrize("left", [(), (".gitattributes", ".DS_Store", "desktop.ini")])
    def test_is_none_if_its_folder_is_empty(self, copy, left):
        shutil.rmtree(copy / "vae")
        (copy / "vae").mkdir()
        for name in left:
            (copy / "vae" / name).write_text("x")
        checkpoint = open_checkpoint(copy)
        assert "vae" not in checkpoint.parts
        assert not checkpoint.incomplete
        assert "[absent] VAE" in plan_dtypes(checkpoint, "auto", CPU).text

    def test_is_said_in_the_list(self, copy, source):
        def label():
            return list_checkpoints([copy.parent], [])[0].label

        assert label().endswith(" · bf16 · diffusers")
        (copy / "vae" / SINGLE).rename(copy / "vae" / "away")
        assert label().endswith(" · bf16 · diffusers · VAE incomplete")
        (copy / "vae" / "away").rename(copy / "vae" / SINGLE)
        assert label().endswith(" · bf16 · diffusers")
        shard = next((copy / "transformer").glob("*.safetensors"))
        shard.unlink()
        assert label().endswith(" · incomplete · diffusers")
        # Whatever came since is seen: nothing is remembered of what has changed.
        shutil.copy(source[0] / "transformer" / shard.name, shard)
        assert label().endswith(" · bf16 · diffusers")


class TestFineTunes:
    BIN = [
        "diffusion_pytorch_model.bin",
        "pytorch_model.bin",
        "model.pt",
        "pytorch_model_fsdp.bin",
        "weights.ckpt",
        "A.BIN",
    ]

    @pytest.mark.parametrize("name", BIN)
    def test_saved_by_torch(self, source, bare, name):
        torch.save(source[1], bare / "transformer" / name)
        assert is_the_one(open_checkpoint(bare), source[1])

    def test_saved_by_torch_in_shards(self, source, bare):
        write_shards(
            bare / "transformer",
            source[1],
            "pytorch_model.bin.index.json",
            "pytorch_model-{:05}-of-00002.bin",
            torch.save,
        )
        assert is_the_one(open_checkpoint(bare), source[1])

    PREFIXES = [
        "module.",
        "_orig_mod.",
        "model.",
        "transformer.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.transformer.module._orig_mod.",
        "_fsdp_wrapped_module.",
    ]

    @pytest.mark.parametrize("prefix", PREFIXES)
    @pytest.mark.parametrize("place", ["folder", "file"])
    def test_under_any_stack_of_prefixes(self, source, bare, prefix, place):
        file = bare / "transformer" / "model.safetensors" if place == "folder" else bare / "alone.safetensors"
        layouts.write_file(file, source[1], prefix)
        assert is_the_one(open_checkpoint(bare if place == "folder" else file), source[1])

    @pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
    def test_with_wrappers_around_each_block(self, source, bare, wrapper):
        state = {
            name.replace("transformer_blocks.0.", f"transformer_blocks.0.{wrapper}."): value
            for name, value in source[1].items()
        }
        save_file({f"module.{name}": value for name, value in state.items()}, bare / "transformer" / SINGLE)
        assert is_the_one(open_checkpoint(bare), source[1])

    def test_with_another_programs_names_beside_a_config(self, source, bare):
        save_file(layouts.comfy_names(source[1]), bare / "transformer" / SINGLE)
        assert is_the_one(open_checkpoint(bare), source[1])

    def test_with_an_average_in_the_same_file(self, source, bare):
        save_file(
            {f"{place}.{name}": value.clone() for place in ("model", "ema") for name, value in source[1].items()},
            bare / "transformer" / SINGLE,
        )
        refused(bare, "several sets of weights in one (", "ema.…", "model.…", "EMA")

    @pytest.mark.parametrize("name", ["my_finetune", "v1.0 [best] модель", "transformer"])
    def test_config_and_weights_in_one_folder(self, source, tmp_path, name):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        shutil.copy(source[0] / "transformer" / "config.json", folder)
        save_file(source[1], folder / "model.safetensors")
        assert is_the_one(open_checkpoint(folder), source[1])
        for roots in (([folder.parent], []), ([], [folder.parent])):
            assert [(entry.name, entry.path) for entry in list_checkpoints(*roots)] == [(name, folder)]

    def test_shards_and_no_config(self, source, tmp_path):
        write_shards(
            tmp_path / "run" / "out", source[1], "model.safetensors.index.json", "model-{:05}-of-00002.safetensors"
        )
        assert is_the_one(open_checkpoint(tmp_path / "run" / "out"), source[1])
        assert [entry.name for entry in list_checkpoints([], [tmp_path])] == ["run/out"]

    def test_a_transformer_alone_has_the_schedule_of_the_release_and_says_so(self, source, copy, capsys):
        for name in ("scheduler", "text_encoder", "vae", "tokenizer"):
            shutil.rmtree(copy / name)
        (copy / "model_index.json").unlink()
        opened = open_handles(copy, "fp32", CPU)
        assert opened.model.scheduler_config["snr_shift_scale"] == 1.0
        assert opened.model.scheduler_config["prediction_type"] == "v_prediction"
        assert opened.model.latent_scale == 0.7
        said = f"note: {copy / 'transformer'} comes without a noise schedule"
        assert said in opened.plan.text
        assert opened.plan.as_dict()["notes"] == list(opened.checkpoint.notes)
        assert generate.main(["--check", str(copy), "--device", "cpu"]) == 0
        assert said in capsys.readouterr().out

    def test_a_schedule_that_the_folder_promises_is_not_guessed(self, copy):
        shutil.rmtree(copy / "scheduler")
        refused(copy, "scheduler_config.json is missing", "guessing one would spoil the picture")

    def test_parts_of_another_checkpoint_go_with_it(self, source, copy):
        for name in ("text_encoder", "vae", "tokenizer"):
            shutil.rmtree(copy / name)
        # The whole checkpoint may be given where a part of it is meant.
        checkpoint = open_checkpoint(copy, text_encoder=source[0], vae=source[0])
        assert checkpoint.part("text_encoder").source == source[0] / "text_encoder"
        assert checkpoint.part("vae").source == source[0] / "vae"
        assert checkpoint.tokenizer == source[0] / "tokenizer"

    def test_averages_are_read_where_they_are_alone_or_asked_for(self, source, copy):
        shutil.copytree(copy / "transformer", copy / "transformer_ema")
        for file in (copy / "transformer_ema").glob("*safetensors*"):
            file.unlink()
        save_file(other(source[1]), copy / "transformer_ema" / SINGLE)
        assert is_the_one(open_checkpoint(copy), source[1])
        assert is_the_one(open_checkpoint(copy / "transformer_ema"), other(source[1]))
        assert open_checkpoint(copy / "transformer_ema").part("vae").source == copy / "vae"
        assert [entry.name for entry in list_checkpoints([copy.parent], [])] == [
            "checkpoint",
            "checkpoint/transformer_ema",
        ]
        shutil.rmtree(copy / "transformer")
        assert is_the_one(open_checkpoint(copy), other(source[1]))


class TestTrainingRuns:
    @pytest.fixture
    def run(self, source, tmp_path):
        for step, state in ((500, other(source[1])), (1000, source[1])):
            folder = tmp_path / "run" / f"checkpoint-{step}" / "transformer"
            folder.mkdir(parents=True)
            shutil.copy(source[0] / "transformer" / "config.json", folder)
            save_file(state, folder / SINGLE)
            for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "scaler.pt"):
                (folder.parent / name).write_bytes(b"a training's state")
        return tmp_path / "run"

    def test_each_step_is_a_checkpoint_and_the_run_is_its_last(self, source, run):
        assert is_the_one(open_checkpoint(run / "checkpoint-500"), other(source[1]))
        last = open_checkpoint(run)
        assert is_the_one(last, source[1])
        assert any("checkpoint-1000 in it, the last of 2 training steps" in note for note in last.notes)
        assert [entry.name for entry in list_checkpoints([run.parent], [])] == [
            "run/checkpoint-1000",
            "run/checkpoint-500",
        ]

    def test_the_result_comes_before_its_steps_which_stay_listed(self, source, run):
        shutil.copytree(run / "checkpoint-500" / "transformer", run / "transformer")
        assert is_the_one(open_checkpoint(run), other(source[1]))
        assert [entry.name for entry in list_checkpoints([run.parent], [])] == [
            "run",
            "run/checkpoint-1000",
            "run/checkpoint-500",
        ]

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_what_accelerate_saves_without_a_config(self, source, tmp_path, name):
        step = tmp_path / "checkpoint-500"
        step.mkdir()
        (save_file if name.endswith("s") else torch.save)(
            {f"module.{key}": value for key, value in source[1].items()}, step / name
        )
        for beside in ("optimizer.bin", "scheduler.bin", "sampler.bin", "training_args.bin"):
            torch.save({"state": 1}, step / beside)
        assert is_the_one(open_checkpoint(step), source[1])

    def test_the_run_of_what_has_no_config_is_its_last_step_too(self, source, tmp_path):
        """As accelerate saves with FSDP, and VideoX-Fun's trainer."""
        for step, state in ((500, other(source[1])), (1000, source[1])):
            (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
            save_file(state, tmp_path / "run" / f"checkpoint-{step}" / SINGLE)
        last = open_checkpoint(tmp_path / "run")
        assert is_the_one(last, source[1])
        assert any("checkpoint-1000 in it, the last of 2 training steps" in note for note in last.notes)

    def test_finetrainers_calls_steps_by_their_numbers_alone(self, source, run):
        (run.parent / "out").mkdir()
        weights = run.rename(run.parent / "out" / "model_weights")
        for step in (500, 1000):
            (weights / f"checkpoint-{step}").rename(weights / f"{step:06d}")
        for path in (weights, weights.parent):
            assert is_the_one(open_checkpoint(path), source[1])

    def test_the_transformers_folder_counts_before_deepspeeds_states_beside_it(self, source, run):
        """They hold the same weights, and no config."""
        step = run / "checkpoint-1000"
        (step / "pytorch_model").mkdir()
        (step / "latest").write_text("pytorch_model")
        torch.save({"module": source[1]}, step / "pytorch_model" / "mp_rank_00_model_states.pt")
        for path in (step, run):
            assert open_checkpoint(path).part("transformer").source == step / "transformer"

    def test_what_zero_to_fp32_writes_into_a_folder_that_is_called_as_a_file(self, source, tmp_path):
        step = tmp_path / "run" / "checkpoint-500"
        (step / "pytorch_model").mkdir(parents=True)
        (step / "pytorch_model" / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(b"x")
        named = "pytorch_model.bin.index.json", "pytorch_model-{:05}-of-00002.bin"
        write_shards(step / "pytorch_model.bin", source[1], *named, torch.save)
        for path in (step, step.parent):
            assert is_the_one(open_checkpoint(path), source[1])

    def test_what_deepspeed_saves(self, source, tmp_path):
        (tmp_path / "checkpoint-500" / "pytorch_model").mkdir(parents=True)
        (tmp_path / "checkpoint-500" / "latest").write_text("pytorch_model")
        torch.save({"module": source[1]}, tmp_path / "checkpoint-500" / "pytorch_model" / "mp_rank_00_model_states.pt")
        assert is_the_one(open_checkpoint(tmp_path / "checkpoint-500"), source[1])

    PIECES = {
        "pytorch_model_fsdp_0/__0_0.distcp": "accelerate merge-weights",
        "pytorch_model/zero_pp_rank_0_mp_rank_00_model_states.pt": "zero_to_fp32.py",
        "pytorch_lora_weights.safetensors": "holds a LoRA",
        "adapter_model.safetensors": "holds a LoRA",
    }

    @pytest.mark.parametrize("name", PIECES)
    def test_what_cannot_run_as_it_is_says_what_to_do(self, tmp_path, name):
        file = tmp_path / "checkpoint-500" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
        refused(tmp_path / "checkpoint-500", "is not a CogVideoX checkpoint", self.PIECES[name])


class TestSat:
    @pytest.fixture
    def run(self, source, tmp_path):
        """As SAT's trainer saves them: several steps, and latest."""
        run = tmp_path / "ckpts" / "my-run-11-28-10-00"
        for step, state in (("500", source[1]), ("1000", other(source[1]))):
            (run / step).mkdir(parents=True)
            torch.save({"module": layouts.sat_names(state)}, run / step / "mp_rank_00_model_states.pt")
        (run / "latest").write_text("500")
        (run / "training_config.yaml").write_text("model: {}\n")
        return run

    def test_the_run_is_the_step_that_latest_names_and_a_step_or_file_is_itself(self, source, run):
        opened = open_checkpoint(run)
        assert is_the_one(opened, source[1])
        assert any("2 training steps: read is 500" in note for note in opened.notes)
        for path in (run / "latest", run / "500", run / "500" / "mp_rank_00_model_states.pt"):
            assert is_the_one(open_checkpoint(path), source[1])
        assert is_the_one(open_checkpoint(run / "1000"), other(source[1]))
        assert [entry.name for entry in list_checkpoints([run.parents[1]], [])] == ["ckpts/my-run-11-28-10-00"]

    @pytest.mark.parametrize("latest", ["", "..", "../1000", "a" * 5000, "\0", "/", "2000", "é\n", None])
    def test_a_latest_that_names_no_step_gives_the_last_one(self, source, run, latest):
        (run / "latest").unlink()
        if latest is not None:
            (run / "latest").write_text(latest)
        assert is_the_one(open_checkpoint(run), other(source[1]))
        assert folders.sat_step(run) == run / "1000" / "mp_rank_00_model_states.pt"

    def test_other_parts_are_found_from_any_depth(self, source, tmp_path):
        folder = tmp_path / "sat"
        modules = layouts.build_modules(tmp_path / "again")[1]
        file = layouts.write_sat(folder, modules) / "transformer" / "1000" / "mp_rank_00_model_states.pt"
        for path in (folder, folder / "transformer", folder / "transformer" / "1000", file):
            assert open_checkpoint(path).part("vae").source == folder / "vae" / "3d-vae.pt"
        (folder / "vae" / "3d-vae.pt").write_bytes(b"cut")
        assert "vae" in open_checkpoint(folder).incomplete

    def test_a_model_in_pieces_is_refused(self, run):
        shutil.copy(run / "500" / "mp_rank_00_model_states.pt", run / "500" / "mp_rank_01_model_states.pt")
        refused(run, "trained in several pieces", "Join them")


class TestSetsSideBySide:
    """The first that is whole, plain or the most exact, and safetensors."""

    def test_plain_comes_before_a_variant(self, source, bare):
        save_file(source[1], bare / "transformer" / SINGLE)
        save_file(other(source[1]), bare / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
        opened = open_checkpoint(bare)
        assert is_the_one(opened, source[1])
        (note,) = opened.notes
        assert "read is diffusion_pytorch_model.safetensors, not diffusion_pytorch_model.fp16.safetensors" in note

    def test_of_variants_the_more_exact_one_for_what_the_model_was_trained_in(self, source, bare):
        for variant, state in (("fp16", other(source[1])), ("bf16", source[1])):
            save_file(state, bare / "transformer" / f"diffusion_pytorch_model.{variant}.safetensors")
        assert is_the_one(open_checkpoint(bare), source[1])
        # 2b was trained in fp16.
        config = json.loads((bare / "transformer" / "config.json").read_text())
        assert (
            folders.choose_weights(bare / "transformer", "transformer", exact=("fp16",)).label
            == "diffusion_pytorch_model.fp16.safetensors"
        )
        assert config["use_rotary_positional_embeddings"]

    @pytest.mark.parametrize("index", ["safetensors.index.fp16.json", "fp16.safetensors.index.json"])
    @pytest.mark.parametrize("name", [".fp16-{:05}-of-00002.safetensors", "-{:05}-of-00002.fp16.safetensors"])
    def test_a_variant_in_shards(self, source, bare, index, name):
        index, name = f"diffusion_pytorch_model.{index}", f"diffusion_pytorch_model{name}"
        write_shards(bare / "transformer", source[1], index, name)
        assert is_the_one(open_checkpoint(bare), source[1])
        write_shards(bare / "transformer", other(source[1]))
        opened = open_checkpoint(bare)
        assert is_the_one(opened, other(source[1]))
        assert f"read is {INDEX}, not {index}" in opened.notes[0]

    def test_safetensors_come_before_bin(self, source, bare):
        save_file(source[1], bare / "transformer" / SINGLE)
        torch.save(other(source[1]), bare / "transformer" / "diffusion_pytorch_model.bin")
        assert is_the_one(open_checkpoint(bare), source[1])
        (bare / "transformer" / SINGLE).unlink()
        save_file(source[1], bare / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
        assert is_the_one(open_checkpoint(bare), other(source[1]))

    def test_shards_come_before_a_file_left_over_unless_one_is_missing(self, source, bare):
        write_shards(bare / "transformer", source[1])
        save_file(other(source[1]), bare / "transformer" / SINGLE)
        assert is_the_one(open_checkpoint(bare), source[1])
        (bare / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
        opened = open_checkpoint(bare)
        assert is_the_one(opened, other(source[1]))
        assert "lacks 1 of 2 shards" in opened.notes[0]

    def test_shards_without_an_index_and_a_config_are_listed_and_stand_for_each_other(self, source, tmp_path):
        write_shards(tmp_path / "cog", source[1])
        (tmp_path / "cog" / INDEX).unlink()
        (entry,) = list_checkpoints([tmp_path], [tmp_path])
        assert entry.name == "cog"
        shards = sorted((tmp_path / "cog").iterdir())
        for path in (entry.path, *shards):
            assert is_the_one(open_checkpoint(path), source[1])
        shards[0].unlink()
        refused(tmp_path / "cog", "lacks 1 of 2 shards of the transformer", shards[0].name)
        refused(shards[1], "lacks 1 of 2 shards of the transformer", shards[0].name)
        assert list_checkpoints([tmp_path], [tmp_path]) == []

    def test_another_models_shards_and_files_stand_in_no_ones_way(self, source, tmp_path):
        models = tmp_path / "diffusion_models"
        write_shards(models, other(source[1]))
        for shard in sorted(models.iterdir()):
            shard.rename(models / shard.name.replace("diffusion_pytorch_model", "wan2.1"))
        (models / INDEX.replace("diffusion_pytorch_model", "wan2.1")).unlink()
        save_file(source[1], models / "cog.safetensors")
        assert is_the_one(open_checkpoint(models), source[1])
        assert [entry.name for entry in list_checkpoints([tmp_path], [tmp_path])] == [
            "diffusion_models/cog.safetensors"
        ]
        # A shard that is named is one of its set, whatever lies beside it.
        assert is_the_one(open_checkpoint(models / "wan2.1-00002-of-00002.safetensors"), other(source[1]))
        (models / "cog.safetensors").rename(models / "model.safetensors")
        assert [entry.name for entry in list_checkpoints([tmp_path], [tmp_path])] == [
            "diffusion_models/model.safetensors"
        ]

    def test_shards_of_a_text_encoder_need_no_config_as_a_file_needs_none(self, source, tmp_path):
        shutil.copytree(source[0] / "text_encoder", tmp_path / "t5")
        for beside in tmp_path.glob("t5/*.json"):
            beside.unlink()
        shard, *_ = sorted((tmp_path / "t5").iterdir())
        ours, own = open_part(shard, "text_encoder"), open_part(source[0] / "text_encoder", "text_encoder")
        assert ours.tensors.keys() == own.tensors.keys()

    def test_a_training_s_state_is_no_second_checkpoint_beside_what_came_of_it(self, source, tmp_path):
        shutil.copytree(source[0], tmp_path / "run" / "final")
        (tmp_path / "run" / "checkpoint-500").mkdir()
        save_file(other(source[1]), tmp_path / "run" / "checkpoint-500" / "model.safetensors")
        assert is_the_one(open_checkpoint(tmp_path / "run"), source[1])

    def test_a_whole_file_comes_before_shards_without_an_index(self, source, bare):
        write_shards(bare / "transformer", other(source[1]))
        (bare / "transformer" / INDEX).unlink()
        save_file(source[1], bare / "transformer" / SINGLE)
        assert is_the_one(open_checkpoint(bare), source[1])

    def test_shards_of_another_saving_are_left(self, source, bare):
        write_shards(bare / "transformer", source[1])
        save_file(other(source[1]), bare / "transformer" / "diffusion_pytorch_model-00003-of-00003.safetensors")
        assert is_the_one(open_checkpoint(bare), source[1])

    def test_two_files_of_no_usual_name_are_told(self, source, bare):
        for name in ("one", "two"):
            save_file(source[1], bare / "transformer" / f"{name}.safetensors")
        refused(bare, "it is not known which of these is meant: one.safetensors, two.safetensors")
        # A LoRA is none of them, and the usual name comes first.
        (bare / "transformer" / "two.safetensors").rename(bare / "transformer" / "pytorch_lora_weights.safetensors")
        assert is_the_one(open_checkpoint(bare), source[1])

    PLACES = [
        "sub/x.safetensors",
        "../x.safetensors",
        "/etc/x.safetensors",
        "C:\\x.safetensors",
        "..",
        "",
        "a\0.safetensors",
        "config.json",
    ]

    @pytest.mark.parametrize("place", [*PLACES, None, 3, ["a"], {"a": 1}, True, "\ud800.safetensors"])
    def test_an_index_names_files_beside_it(self, source, bare, place):
        write_shards(bare / "transformer", source[1])
        index = bare / "transformer" / INDEX
        tree = json.loads(index.read_text())
        tree["weight_map"]["proj_out.weight"] = place
        index.write_text(json.dumps(tree))
        said = refused(bare, f"{index} names ", "as a file of weights")
        said.encode()
        assert [entry.label.split(" · ")[-2:] for entry in list_checkpoints([bare.parent], [])] == [
            ["incomplete", "diffusers"]
        ]

    @pytest.mark.parametrize(
        "text", ["[" * 50_000, "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "\ufeff{", "\x00"]
    )
    def test_an_index_that_is_none(self, source, bare, text):
        write_shards(bare / "transformer", source[1])
        (bare / "transformer" / INDEX).write_text(text)
        refused(bare, str(bare / "transformer" / INDEX))
        assert list_checkpoints([bare.parent], [])

    def test_a_download_that_was_broken_off_is_named(self, source, bare, monkeypatch):
        write_shards(bare / "transformer", source[1])
        shard = bare / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
        shard.rename(f"{shard}.aria2")
        refused(bare, "lacks 1 of 2 shards", f"A download was broken off ({shard.name}.aria2)")
        (shard.parent / f"{shard.name}.aria2").unlink()
        # As hf download --local-dir leaves it.
        kept = bare / ".cache" / "huggingface" / "download" / "transformer"
        kept.mkdir(parents=True)
        (kept / "hash.etag.incomplete").write_bytes(b"x")
        refused(bare, "lacks 1 of 2 shards", "A download was broken off (hash.etag.incomplete)")
        monkeypatch.chdir(bare / "transformer")
        refused(".", "lacks 1 of 2 shards", "A download was broken off (hash.etag.incomplete)")


def to_cache(checkpoint: Path, hub: Path, name: str = "zai-org/CogVideoX1.5-5B", commit: str = "a" * 40) -> Path:
    """Put a checkpoint's files into the Hugging Face cache, as huggingface_hub does: contents in blobs, links to them
    in a snapshot."""
    repository = hub / f"models--{name.replace('/', '--')}"
    for folder in ("blobs", "refs"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        link = repository / "snapshots" / commit / file.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / f"{commit[:4]}{len(list((repository / 'blobs').iterdir())):036x}"
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repository


class TestTheHuggingFaceCache:
    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        monkeypatch.delenv("HF_HUB_CACHE", raising=False)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        return tmp_path / "hf" / "hub"

    def test_is_opened_by_its_folder_its_snapshots_one_of_them_or_its_name_on_the_hub(self, source, hub, monkeypatch):
        repository = to_cache(source[0], hub)
        (snapshot,) = (repository / "snapshots").iterdir()
        for path in (
            repository,
            repository / "snapshots",
            snapshot,
            snapshot / "model_index.json",
            hub,
            "zai-org/CogVideoX1.5-5B",
        ):
            checkpoint = open_checkpoint(path)
            assert checkpoint.path == snapshot
            assert checkpoint.part("vae").source == snapshot / "vae"
            assert is_the_one(checkpoint, source[1])
        assert open_part("zai-org/CogVideoX1.5-5B", "text_encoder").source == snapshot / "text_encoder"
        refused("zai-org/CogVideoX-2b", "There is no zai-org/CogVideoX-2b", "hf download zai-org/CogVideoX-2b")
        with pytest.raises(ValueError, match="hf download me/style"):
            find_lora(Path("me/style"))
        monkeypatch.chdir(hub.parent)
        for path in ("hub/gone", "elsewhere/gone.safetensors", "模型/gone", "-x/gone"):
            assert "hf download" not in refused(path, f"There is no {path}")

    def test_a_lora_in_it_is_opened_so_too(self, tmp_path, hub):
        (tmp_path / "style").mkdir()
        save_file({"x": torch.ones(1)}, tmp_path / "style" / "pytorch_lora_weights.safetensors")
        for commit in ("a" * 40, "b" * 40):
            repository = to_cache(tmp_path / "style", hub, "me/style", commit=commit)
        (repository / "refs" / "main").write_text("b" * 40)
        for path in (repository, repository / "snapshots", Path("me/style")):
            assert find_lora(path) == repository / "snapshots" / ("b" * 40) / "pytorch_lora_weights.safetensors"

    def test_is_listed_by_the_name_on_the_hub(self, source, hub):
        repository = to_cache(source[0], hub)
        to_cache(source[0] / "vae", hub, "stabilityai/sd-vae")
        (hub / "datasets--x--y" / "snapshots").mkdir(parents=True)
        (entry,) = list_checkpoints([hub], [])
        assert (entry.name, entry.path) == ("zai-org/CogVideoX1.5-5B", repository)
        (entry,) = list_checkpoints([hub.parent], [hub.parent])
        assert entry.name == "hub/zai-org/CogVideoX1.5-5B"

    def test_single_files_in_it_are_listed_and_found_by_the_name_they_had(self, source, hub):
        (hub.parent / "kijai").mkdir(parents=True)
        layouts.write_file(hub.parent / "kijai" / "cog.safetensors", source[1])
        to_cache(hub.parent / "kijai", hub, "Kijai/Cog")
        (entry,) = list_checkpoints([], [hub])
        assert entry.name == "Kijai/Cog/cog.safetensors"
        assert find_entry([entry], f"models--Kijai--Cog/snapshots/{'a' * 40}/cog.safetensors · bf16") == entry

    def test_main_decides_among_snapshots_else_the_newest_whole_one(self, source, copy, hub):
        shutil.rmtree(copy / "vae")
        repository = to_cache(copy, hub, commit="c" * 40)
        to_cache(source[0], hub, commit="b" * 40)
        old, new = (repository / "snapshots" / (letter * 40) for letter in "cb")
        (repository / "refs" / "main").write_text("c" * 40)
        assert open_checkpoint(repository).path == old
        (repository / "refs" / "main").write_text("gone")
        os.utime(old, (1, 1))
        assert open_checkpoint(repository).path == new
        next((new / "transformer").glob("*.safetensors")).unlink()
        assert open_checkpoint(repository).path == old

    def test_a_file_that_was_removed_from_it_is_named(self, source, hub):
        repository = to_cache(source[0], hub)
        vae, shard = (
            next((repository / "snapshots" / ("a" * 40) / part).glob("*.safetensors"))
            for part in ("vae", "transformer")
        )
        vae.resolve().unlink()
        checkpoint = open_checkpoint(repository)
        assert (
            f"{vae} is a link to {os.readlink(vae)}, which is gone (removed from the cache)"
            in checkpoint.incomplete["vae"]
        )
        shard.resolve().unlink()
        (repository / "blobs" / "1234.incomplete").write_bytes(b"")
        refused(
            repository,
            f"{shard} is a link to",
            "which is gone (removed from the cache)",
            "A download was broken off (1234.incomplete)",
        )
        assert [entry.label.split(" · ")[-2:] for entry in list_checkpoints([hub], [])] == [["incomplete", "diffusers"]]
        (repository / "snapshots" / ("a" * 40) / "transformer" / "config.json").resolve().unlink()
        refused(repository, "config.json")

    def test_an_empty_one_says_so(self, hub):
        (hub / "models--zai-org--CogVideoX1.5-5B" / "snapshots").mkdir(parents=True)
        refused(
            hub / "models--zai-org--CogVideoX1.5-5B", "holds no files of zai-org/CogVideoX1.5-5B", "Download it again"
        )
        assert list_checkpoints([hub], [hub]) == []


class TestPaths:
    @pytest.mark.parametrize(
        "name",
        ["model_index.json", "transformer/config.json", f"transformer/{INDEX}", "scheduler/scheduler_config.json"],
    )
    def test_a_json_file_stands_for_its_folder(self, copy, name, capsys):
        checkpoint = open_checkpoint(copy / name)
        assert checkpoint.part("transformer").source == copy / "transformer"
        assert checkpoint.part("vae").source == copy / "vae"
        assert not is_config(copy / name)
        assert generate.main(["--check", str(copy / name), "--device", "cpu"]) == 0
        assert "[ok] VAE" in capsys.readouterr().out

    def test_a_shard_stands_for_its_set(self, source, copy):
        for shard in (copy / "transformer").glob("*.safetensors"):
            assert is_the_one(open_checkpoint(shard), source[1])
        part = open_part(next((copy / "text_encoder").glob("*.safetensors")), "text_encoder")
        assert part.source == copy / "text_encoder"

    def test_weights_beside_their_config_are_opened_with_it(self, copy):
        assert open_part(copy / "vae" / SINGLE, "vae").config["scaling_factor"] == 0.7

    def test_quotes_that_were_pasted_with_a_path_are_taken_off(self, copy):
        for text in (f'"{copy}"', f"'{copy}'", f' "{copy}" ', f'{copy}"', f"{copy}/", f'"{copy}/transformer"'):
            assert open_checkpoint(text).part("transformer").source == copy / "transformer"

    def test_a_folder_that_has_quotes_in_its_name_is_taken_as_it_is(self, copy, tmp_path):
        odd = copy.rename(tmp_path / '"quoted"')
        assert open_checkpoint(odd).path == odd

    def test_home_is_expanded(self, copy, monkeypatch):
        monkeypatch.setenv("HOME", str(copy.parent))
        assert open_checkpoint("~/checkpoint").path == copy
        refused("~nobody-of-this-name/checkpoint", "There is no ~nobody-of-this-name/checkpoint")

    @pytest.mark.parametrize("path", ["", "\0", "a" * 5000, "\ud800", "C:\\Users\\me\\model", "///"])
    def test_anything_else_is_told(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        said = refused(path if path != "///" else tmp_path / "nowhere")
        said.encode()
        assert len(said) < 1000

    def test_a_link_to_nothing(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "gone")
        refused(tmp_path / "link", f"is a link to {tmp_path / 'gone'}, which is gone")

    @pytest.mark.parametrize("ending", ["SAFETENSORS", "Safetensors", "sft"])
    def test_endings_may_be_written_in_any_case(self, source, tmp_path, ending):
        layouts.write_file(tmp_path / f"Cog.{ending}", source[1])
        assert is_the_one(open_checkpoint(tmp_path / f"Cog.{ending}"), source[1])
        assert [entry.name for entry in list_checkpoints([], [tmp_path])] == [f"Cog.{ending}"]

    def test_one_checkpoint_in_a_folder_of_folders_is_opened_and_of_several_the_names_are_told(self, copy, tmp_path):
        (tmp_path / "a" / "zai-org").mkdir(parents=True)
        copy.rename(tmp_path / "a" / "zai-org" / "one")
        opened = open_checkpoint(tmp_path / "a")
        assert opened.path == tmp_path / "a" / "zai-org" / "one"
        assert "read is one in it" in opened.notes[0]
        (tmp_path / "above").mkdir()
        (tmp_path / "a").rename(tmp_path / "above" / "a")
        assert open_checkpoint(tmp_path / "above").path == tmp_path / "above" / "a" / "zai-org" / "one"
        (tmp_path / "above" / "a").rename(tmp_path / "a")
        shutil.copytree(opened.path, tmp_path / "a" / "zai-org" / "two")
        refused(tmp_path / "a", "holds 2 checkpoints (zai-org/one, zai-org/two)", "Give the path of one of them")


@pytest.mark.skipif(not REAL.is_dir(), reason="the JSON files of a real checkpoint are not beside the project")
class TestARealFolder:
    def test_lacks_the_weights_its_real_index_names(self, tmp_path):
        folder = shutil.copytree(REAL, tmp_path / "CogVideoX1.5-5B-I2V")
        refused(folder, "lacks 3 of 3 shards of the transformer", "diffusion_pytorch_model-00003-of-00003.safetensors")
        assert [entry.label for entry in list_checkpoints([tmp_path], [])] == [
            "CogVideoX1.5-5B-I2V · incomplete · diffusers"
        ]
        place = folders.find_place(folder / "model_index.json")
        assert (place.path, place.own("text_encoder")) == (folder, folder / "text_encoder")
        assert folders.names_scheduler(folder)
