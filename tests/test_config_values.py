"""What a config says is looked at when a checkpoint is opened: a wrong value is told with its file, field and what it
may be; nothing is built."""

import json
import math
import shutil
import time

import pytest
import torch

from cogvideox.checkpoint.configs import check_config, known_fields
from cogvideox.checkpoint.layout import open_checkpoint
from cogvideox.handles import open_handles
from cogvideox.loading import empty_module
from cogvideox.schedulers import make_scheduler
from cogvideox.variants import full_config
from tests.conftest import CPU, ROOT
from tests.layouts import open_whole

FILES = {kind: f"{kind}/config.json" for kind in ("transformer", "text_encoder", "vae")} | {
    "scheduler": "scheduler/scheduler_config.json"
}
REAL = ROOT.parent / "shared" / "real-configs" / "CogVideoX1.5-5B-I2V"
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def changed(tiny, tmp_path):
    """``changed(kind, **fields)``: a copy of the tiny checkpoint whose config of a kind says something else; ``...``
    leaves a field out."""

    def change(kind, **fields):
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny, folder)
        file = folder / FILES[kind]
        config = json.loads(file.read_text(encoding="utf-8")) | fields
        file.write_text(
            json.dumps({name: value for name, value in config.items() if value is not ...}), encoding="utf-8"
        )
        return folder

    return change


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.skipif(not REAL.is_dir(), reason="the real configs are not beside the project")
def test_the_releases_own_configs_are_right(kind):
    config = json.loads((REAL / FILES[kind]).read_text(encoding="utf-8"))
    check_config(kind, config, REAL / FILES[kind])


@pytest.mark.parametrize("kind", FILES)
def test_fields_that_old_releases_leave_out_and_fields_that_are_not_known_are_fine(kind, tmp_path):
    check_config(kind, {}, tmp_path)
    check_config(
        kind, {"_diffusers_version": [1], "a": None, "torch_dtype": 3, "quantization_config": {"x": []}}, tmp_path
    )
    assert known_fields(kind, {"a": 1, "torch_dtype": 3}) == {}


@pytest.mark.parametrize(
    ("kind", "field", "value", "said"),
    [
        ("transformer", "num_layers", "2", "is the text '2', and it can only be a whole number"),
        ("transformer", "num_layers", 2.0, "is 2.0, and it can only be a whole number"),
        ("transformer", "num_layers", True, "is true, and it can only be a whole number"),
        ("transformer", "num_layers", 10**9, "is 1000000000, and"),
        ("transformer", "num_layers", 900, r"from 1 to \d+ beside these weights"),
        ("transformer", "num_layers", 10**400, "is a number of about 400 digits"),
        ("transformer", "num_attention_heads", 4096, "beside these weights"),
        ("transformer", "attention_head_dim", 65, "a multiple of 16"),
        ("transformer", "out_channels", None, "is null, and it can only be 16"),
        ("transformer", "patch_size", 0, "from 1 to 8"),
        ("transformer", "patch_size_t", [2], r"is the list \[2\]"),
        ("transformer", "norm_eps", NAN, "is nan, which is no number"),
        ("transformer", "temporal_compression_ratio", 8, "can only be 4"),
        ("transformer", "activation_fn", "sin", "'gelu-approximate' or 'gelu'"),
        ("transformer", "attention_bias", 1, "true or false"),
        ("transformer", "sample_height", 10**6, "from 2 to 4,096"),
        ("transformer", "max_text_seq_length", 0, "from 1 to 4,096"),
        ("text_encoder", "d_ff", None, "is null"),
        ("text_encoder", "vocab_size", 2**40, "beside these weights"),
        ("text_encoder", "d_model", {"a": 1}, "is the object"),
        ("text_encoder", "feed_forward_proj", "relu", "can only be 'gated-gelu'"),
        ("text_encoder", "layer_norm_epsilon", -1, "is -1"),
        ("text_encoder", "relative_attention_max_distance", 8, "must be more than 8"),
        ("vae", "block_out_channels", 0.5, "is 0.5, and it can only be a list of 4"),
        ("vae", "block_out_channels", [8, 8, 8], "can only be a list of 4"),
        ("vae", "block_out_channels", [8, 8, 8, 10**9], "beside these weights"),
        ("vae", "block_out_channels", [8, 8, 8, 15], '"norm_num_groups", 4, does not divide'),
        ("vae", "down_block_types", ["DownBlock2D"] * 4, "'CogVideoXDownBlock3D'"),
        ("vae", "scaling_factor", "0.7", "is the text '0.7', and it can only be a number from 0.01 to 100, or null"),
        ("vae", "scaling_factor", 0, "is 0, and"),
        ("vae", "scaling_factor", -0.7, "is -0.7, and"),
        ("vae", "scaling_factor", 1e30, "is 1e[+]30, and"),
        ("vae", "scaling_factor", True, "is true, and"),
        ("vae", "scaling_factor", NAN, "is nan, which is no number"),
        ("vae", "scaling_factor", INF, "is inf, which is no number"),
        ("vae", "invert_scale_latents", "yes", "true or false"),
        ("vae", "shift_factor", NAN, "is nan"),
        ("scheduler", "num_train_timesteps", "1000", "is the text '1000'"),
        ("scheduler", "num_train_timesteps", 10**9, "from 10 to 10,000"),
        ("scheduler", "beta_start", NAN, "is nan"),
        ("scheduler", "beta_start", 0, "is 0, and"),
        ("scheduler", "beta_start", 0.1, 'is larger than "beta_end"'),
        ("scheduler", "beta_end", 0.9, "no signal is left"),
        ("scheduler", "beta_schedule", "cosine", "'scaled_linear' or 'linear' or 'squaredcos_cap_v2'"),
        ("scheduler", "trained_betas", [0.1], "has 1 numbers"),
        ("scheduler", "trained_betas", [0.001, "x"] * 500, "each a number"),
        ("scheduler", "prediction_type", "flow_prediction", "'v_prediction'"),
        ("scheduler", "prediction_type", "epsilon", "NaN at the first step"),
        ("scheduler", "timestep_spacing", None, "'trailing'"),
        ("scheduler", "snr_shift_scale", 0, "is 0"),
        ("scheduler", "rescale_betas_zero_snr", "true", "true or false"),
        ("scheduler", "_class_name", "FlowMatchEulerDiscreteScheduler", "flow matching"),
    ],
)
def test_a_wrong_value_is_refused_at_opening_by_file_and_field(changed, kind, field, value, said):
    folder = changed(kind, **{field: value})
    start = time.process_time()
    with pytest.raises(ValueError, match=said) as caught:
        open_whole(folder)
    assert time.process_time() - start < 0.5
    assert str(folder / FILES[kind]) in str(caught.value)
    assert field in str(caught.value)
    assert "Download this file again" in str(caught.value)
    assert len(str(caught.value)) < 800


def test_positions_that_no_machine_has_room_for_are_refused(checkpoints, tmp_path):
    file = checkpoints("2b") / FILES["transformer"]
    config = json.loads(file.read_text(encoding="utf-8"))
    check_config("transformer", config, file)
    with pytest.raises(ValueError, match="53,248,000 positions"):
        check_config("transformer", config | {"sample_height": 4096, "sample_width": 4000}, file)
    # Rotary ones are made for each run.
    check_config(
        "transformer",
        config | {"sample_height": 4096, "sample_width": 4000, "use_rotary_positional_embeddings": True},
        file,
    )


@pytest.mark.parametrize("value", [None, ...])
def test_a_scale_that_is_null_or_left_out_is_that_of_the_release_and_it_is_said(changed, caplog, value):
    model = open_handles(changed("vae", scaling_factor=value), "fp32", CPU).model
    assert model.latent_scale == 0.7
    assert "gives no scaling_factor: taken is 0.7" in caplog.text
    assert open_handles(changed("vae", scaling_factor=0.9), "fp32", CPU).model.latent_scale == 0.9


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("text_encoder", {"is_encoder_decoder": 1.5, "torch_dtype": "x"}), ("vae", {"force_upcast": "x"})],
)
def test_values_that_nothing_uses_do_not_matter(changed, tiny, kind, fields):
    ours = empty_module(open_checkpoint(changed(kind, **fields)).part(kind))[0]
    plain = empty_module(open_checkpoint(tiny).part(kind))[0]
    assert repr(ours) == repr(plain)


def test_the_schedule_is_the_one_that_the_config_says_and_not_the_classes_own(changed):
    fields = dict(
        num_train_timesteps=500,
        beta_start=0.001,
        beta_end=0.02,
        beta_schedule="linear",
        snr_shift_scale=2.0,
        timestep_spacing="leading",
    )
    handles = open_handles(changed("scheduler", **fields), "fp32", CPU)
    scheduler = make_scheduler(handles.model.scheduler_config, "dpm")
    assert {name: scheduler.config[name] for name in fields} == fields
    assert scheduler.betas.tolist() == pytest.approx(torch.linspace(0.001, 0.02, 500).tolist())


def test_what_a_library_raises_while_it_builds_becomes_a_sentence(tiny, monkeypatch):
    """Should a table allow what a version of diffusers does not."""
    from diffusers import AutoencoderKLCogVideoX

    def fail(config):
        raise AttributeError("no such thing\nin two lines")

    monkeypatch.setattr(AutoencoderKLCogVideoX, "from_config", fail)
    with pytest.raises(
        ValueError, match=r"VAE that .*config\.json describes cannot be built \(no such thing in two lines\)"
    ):
        empty_module(open_checkpoint(tiny).part("vae"))


def test_a_full_config_has_the_fields_of_the_class_and_no_others(tiny):
    config = full_config({"num_layers": 3, "a": 1})
    assert config["num_layers"] == 3
    assert config["num_attention_heads"] == 30
    assert "a" not in config
    assert math.isclose(config["norm_eps"], 1e-5)


def test_a_vae_of_another_release_is_used_at_the_scale_that_the_transformer_was_trained_with(tiny, tmp_path):
    """All releases have one VAE, whose config says what the transformer beside it was trained with."""
    file = shutil.copytree(tiny, tmp_path / "other") / "vae" / "config.json"
    for written, taken in ((1.15258426, 0.7), (0.7, 0.7), (0.9, 0.9)):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": written}), encoding="utf-8")
        assert open_handles(tiny, "fp32", CPU, vae=file.parent).model.latent_scale == taken
        assert open_handles(tmp_path / "other", "fp32", CPU).model.latent_scale == written
