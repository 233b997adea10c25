"""What a LoRA changes is read right whoever wrote it, and what is no LoRA of this model is refused by the real
reason."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogvideox.checkpoint.catalogue import list_parts
from cogvideox.checkpoint.headers import read_tensor
from cogvideox.checkpoint.layout import open_part
from cogvideox.checkpoint.lora_files import find_lora, read_lora
from cogvideox.lora import open_lora
from generate import build_parser
from tests import layouts
from tests.tiny_checkpoint import build_transformer

RANK = 4
LAYERS = {
    "transformer_blocks.0.attn1.to_q": (128, 128),
    "transformer_blocks.1.attn1.to_out.0": (128, 128),
    "transformer_blocks.0.ff.net.0.proj": (512, 128),
    "transformer_blocks.1.norm1.linear": (768, 64),
    "proj_out": (128, 128),
}


def draw(layers=LAYERS, rank=RANK, seed=0):
    """Random halves: module -> (down, up)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        module: (torch.randn(rank, wide, generator=generator), torch.randn(out, rank, generator=generator))
        for module, (out, wide) in layers.items()
    }


HALVES = draw()


def named(prefix="", down=".lora_A.weight", up=".lora_B.weight", name=str, halves=None):
    tensors = {}
    for module, (first, second) in (halves or HALVES).items():
        tensors |= {f"{prefix}{name(module)}{down}": first, f"{prefix}{name(module)}{up}": second}
    return tensors


def write(path, tensors, metadata=None):
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def values(lora):
    """What a LoRA holds, with numbers read: module -> (down, up, scale)."""
    return {
        module: (
            read_tensor(pair.down).reshape(pair.down.shape),
            read_tensor(pair.up).reshape(pair.up.shape),
            pair.scale,
        )
        for module, pair in lora.pairs.items()
    }


def assert_is(lora, halves, scale=1.0):
    found = values(lora)
    assert set(found) == set(halves)
    for module, (down, up) in halves.items():
        assert torch.equal(found[module][0], down), module
        assert torch.equal(found[module][1], up), module
        assert found[module][2] == pytest.approx(scale, rel=1e-12), module


@pytest.fixture(scope="module")
def from_diffusers(tiny):
    """``from_diffusers(tensors)``: what diffusers' own loader makes of a LoRA."""
    from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

    def get(tensors):
        module = CogVideoXTransformer3DModel.from_pretrained(tiny / "transformer", torch_dtype=torch.float32)
        CogVideoXPipeline.load_lora_into_transformer(dict(tensors), module, adapter_name="a")
        layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
        return {
            name: (layer.lora_A["a"].weight.detach(), layer.lora_B["a"].weight.detach(), layer.scaling["a"])
            for name, layer in layers.items()
        }

    return get


@pytest.mark.parametrize(
    ("down", "up"), [(".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight")]
)
def test_it_holds_what_diffusers_own_loader_reads(tmp_path, part, from_diffusers, down, up):
    tensors = named("transformer.", down, up)
    expected = from_diffusers(tensors)
    lora = open_lora(write(tmp_path / "lora.safetensors", tensors), part)
    assert_is(lora, {module: (first, second) for module, (first, second, _) in expected.items()})
    assert {scale for *_, scale in expected.values()} == {1.0}


@pytest.fixture
def trained(tiny):
    """A transformer with a peft adapter of random halves, of several ranks and alphas; and the adapter by layer."""
    from diffusers import CogVideoXTransformer3DModel
    from peft import LoraConfig

    module = CogVideoXTransformer3DModel.from_pretrained(tiny / "transformer", torch_dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["to_q", "to_out.0", "ff.net.2", "proj_out"],
        rank_pattern={"^proj_out": 2, r"transformer_blocks\.1\..*to_q": 8},
        alpha_pattern={"ff.net.2": 2, r".*\.0\.attn1\.to_q": 6},
        init_lora_weights=False,
    )
    return module, config


def adapter_of(module, name):
    layers = {place: layer for place, layer in module.named_modules() if hasattr(layer, "lora_A")}
    return {
        place.removeprefix("base_model.model."): (
            layer.lora_A[name].weight.detach(),
            layer.lora_B[name].weight.detach(),
            layer.scaling[name],
        )
        for place, layer in layers.items()
    }


def assert_equal(lora, expected):
    found = values(lora)
    assert set(found) == set(expected)
    for module, (down, up, scale) in expected.items():
        assert torch.equal(found[module][0], down), module
        assert torch.equal(found[module][1], up), module
        assert found[module][2] == pytest.approx(scale, rel=1e-12), module


def test_what_diffusers_saves_with_its_settings_is_what_was_trained(tmp_path, part, trained):
    from diffusers import CogVideoXPipeline
    from peft.utils import get_peft_model_state_dict

    module, config = trained
    module.add_adapter(config, "mine")
    state, settings = get_peft_model_state_dict(module, adapter_name="mine"), module.peft_config["mine"].to_dict()
    CogVideoXPipeline.save_lora_weights(
        tmp_path, transformer_lora_layers=state, transformer_lora_adapter_metadata=settings
    )
    expected = adapter_of(module, "mine")
    assert sorted({scale for *_, scale in expected.values()}) == [0.5, 1.5, 3.0, 6.0]
    assert_equal(open_lora(tmp_path, part), expected)


def test_what_peft_saves_is_what_was_trained(tmp_path, part, trained):
    from peft import get_peft_model

    module, config = trained
    config.use_rslora = True
    model = get_peft_model(module, config)
    model.save_pretrained(tmp_path)
    assert_equal(open_lora(tmp_path, part), adapter_of(model, "default"))


PREFIXES = (
    "",
    "transformer.",
    "base_model.model.",
    "diffusion_model.",
    "model.",
    "module.",
    "_orig_mod.",
    "model.diffusion_model.",
    "transformer.base_model.model.",
    "base_model.model.transformer.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "pipeline.transformer.",
    "unet.",
    "transformer._orig_mod.base_model.model.",
    "state_dict.model.diffusion_model.",
    "my_trainer_wrapper.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_stack_of_prefixes_is_taken_off(tmp_path, part, prefix):
    assert_is(open_lora(write(tmp_path / "lora.safetensors", named(prefix)), part), HALVES)


def test_what_compiling_puts_into_the_middle_of_names_is_taken_out(tmp_path, part):
    tensors = named("transformer.", name=lambda module: module.replace(".0.", ".0._orig_mod.", 1))
    assert_is(open_lora(write(tmp_path / "lora.safetensors", tensors), part), HALVES)


@pytest.mark.parametrize(
    "adapter", ["default", "default_0", "my-style", "my style", "v1.5", "風景", "lora", "weight", "up", "alpha 2"]
)
@pytest.mark.parametrize("end", [".weight", ""])
def test_an_adapter_may_have_any_name(tmp_path, part, adapter, end):
    tensors = named("transformer.", f".lora_A.{adapter}{end}", f".lora_B.{adapter}{end}")
    assert_is(open_lora(write(tmp_path / "lora.safetensors", tensors), part), HALVES)


def flat(module):
    return module.replace(".", "_")


SPELLINGS = {
    "lora_A without weight": dict(down=".lora_A", up=".lora_B"),
    "lora.down": dict(down=".lora.down.weight", up=".lora.up.weight"),
    "_lora.down": dict(down="_lora.down.weight", up="_lora.up.weight"),
    "linear layers": dict(down=".lora_linear_layer.down.weight", up=".lora_linear_layer.up.weight"),
    "lora_down": dict(down=".lora_down.weight", up=".lora_up.weight"),
    "kohya": dict(prefix="lora_unet_", name=flat, down=".lora_down.weight", up=".lora_up.weight"),
    "CogVideoX-Fun": dict(prefix="lora_unet__", name=flat, down=".lora_down.weight", up=".lora_up.weight"),
    "kohya, transformer": dict(prefix="lora_transformer_", name=flat, down=".lora_down.weight", up=".lora_up.weight"),
    "kohya, prefixes inside": dict(
        prefix="lora_unet_model_diffusion_model_", name=flat, down=".lora_down.weight", up=".lora_up.weight"
    ),
    "LyCORIS": dict(prefix="lycoris_", name=flat, down=".lora_down.weight", up=".lora_up.weight"),
    "processors": dict(
        prefix="transformer.",
        name=lambda m: m.replace("attn1.", "attn1.processor."),
        down="_lora.down.weight",
        up="_lora.up.weight",
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_lora(tmp_path, part, spelling):
    assert_is(open_lora(write(tmp_path / "lora.safetensors", named(**SPELLINGS[spelling])), part), HALVES)


def test_diffusers_first_format_leaves_the_number_of_the_output_layer_out(tmp_path, part):
    halves = draw({"transformer_blocks.0.attn1.to_out.0": (128, 128)})
    tensors = named(
        "",
        "_lora.down.weight",
        "_lora.up.weight",
        lambda m: m.replace("attn1.to_out.0", "attn1.processor.to_out"),
        halves,
    )
    assert_is(open_lora(write(tmp_path / "lora.safetensors", tensors), part), halves)


def test_alphas_of_weights_count_before_those_of_settings(tmp_path, part):
    tensors = named("transformer.") | {
        f"transformer.{module}.alpha": torch.tensor(2, dtype=torch.int64) for module in HALVES
    }
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": RANK})}
    assert_is(open_lora(write(tmp_path / "lora.safetensors", tensors, metadata), part), HALVES, 0.5)


def test_finetrainers_settings_are_read(tmp_path, part):
    metadata = {
        "lora_config": json.dumps({"r": RANK, "lora_alpha": 12, "init_lora_weights": True, "target_modules": ["to_q"]})
    }
    lora = open_lora(write(tmp_path / "lora.safetensors", named("transformer."), metadata), part)
    assert_is(lora, HALVES, 3.0)
    assert "scale 3 (alpha / rank)" in lora.text


def test_kohyas_metadata_may_be_any_text(tmp_path, part):
    metadata = {"ss_network_dim": "4", "ss_network_alpha": "none", "ss_network_args": "{", "format": "pt"}
    tensors = named(**SPELLINGS["kohya"]) | {
        f"lora_unet_{flat(module)}.alpha": torch.tensor(2.0, dtype=torch.bfloat16) for module in HALVES
    }
    assert_is(open_lora(write(tmp_path / "lora.safetensors", tensors, metadata), part), HALVES, 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_halves_may_be_of_any_floating_point_dtype(tmp_path, part, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in named("transformer.").items()}
    assert_is(
        open_lora(write(tmp_path / "lora.safetensors", tensors), part),
        {m: (a.to(dtype), b.to(dtype)) for m, (a, b) in HALVES.items()},
    )


# --- SAT, and layers that are fused -------------------------------------------

QKV = {f"transformer_blocks.0.attn1.to_{name}": (128, 128) for name in "qkv"}


def sat_matrices(halves, dense, prefix="model.diffusion_model."):
    attention = f"{prefix}transformer.layers.0.attention."
    tensors = {}
    for number, (down, up) in enumerate(halves.values()):
        tensors |= {
            f"{attention}query_key_value.matrix_A.{number}": down,
            f"{attention}query_key_value.matrix_B.{number}": up,
        }
    return tensors | {f"{attention}dense.matrix_A.0": dense[0], f"{attention}dense.matrix_B.0": dense[1]}


@pytest.mark.parametrize(
    ("yaml", "alpha"),
    [("", 1.0), ("      lora_config:\n        params:\n          r: 4\n          lora_alpha: 2 # more\n", 2.0)],
)
def test_sats_matrices_are_the_halves_of_q_k_and_v_at_sats_scale(tmp_path, part, yaml, alpha):
    halves, dense = draw(QKV), draw({"d": (128, 128)}, seed=1)["d"]
    (tmp_path / "500").mkdir()
    file = tmp_path / "500" / "mp_rank_00_model_states.pt"
    torch.save({"module": sat_matrices(halves, dense), "iteration": 500}, file)
    (tmp_path / "latest").write_text("500")
    if yaml:
        (tmp_path / "training_config.yaml").write_text(yaml)
    expected = halves | {"transformer_blocks.0.attn1.to_out.0": dense}
    for path in (file, tmp_path):
        lora = open_lora(path, part)
        assert_is(lora, expected, alpha / RANK)
        assert f"strength 1 is alpha {alpha:g}" in lora.text


@pytest.mark.parametrize(
    "name", ["transformer.layers.0.attention.query_key_value", "transformer_blocks.0.attn1.to_qkv"]
)
def test_the_rows_of_a_fused_layer_go_where_they_belong(tmp_path, part, name):
    down, up = torch.randn(RANK, 128), torch.randn(384, RANK)
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(8.0)}
    expected = {
        f"transformer_blocks.0.attn1.to_{which}": (down, up[128 * n : 128 * (n + 1)]) for n, which in enumerate("qkv")
    }
    assert_is(open_lora(write(tmp_path / "lora.safetensors", tensors), part), expected, 2.0)


def test_the_rows_of_sats_modulations_are_those_of_its_weights(tmp_path, part):
    up = torch.randn(1536, RANK)
    name = "mixins.adaln_layer.adaLN_modulations.1.1"
    lora = open_lora(
        write(tmp_path / "l.safetensors", {f"{name}.lora_A.weight": torch.ones(RANK, 64), f"{name}.lora_B.weight": up}),
        part,
    )
    pieces = up.chunk(12)
    found = {module: up for module, (_, up, _) in values(lora).items()}
    assert torch.equal(found["transformer_blocks.1.norm1.linear"], torch.cat([pieces[n] for n in (0, 1, 2, 6, 7, 8)]))
    assert torch.equal(found["transformer_blocks.1.norm2.linear"], torch.cat([pieces[n] for n in (3, 4, 5, 9, 10, 11)]))


def test_halves_written_as_convolutions_of_one_pixel_are_matrices(tmp_path, part):
    tensors = {name: tensor[..., None, None] for name, tensor in named("transformer.").items()}
    assert_is(open_lora(write(tmp_path / "lora.safetensors", tensors), part), HALVES)


# --- Where it lies ------------------------------------------------------------

PICKLED = {
    "the tensors alone": lambda t: t,
    "under lora": lambda t: {"lora": t, "epoch": 3},
    "under model_state_dict": lambda t: {"model_state_dict": t, "global_step": 500, "loss": 0.1},
    "under state_dict": lambda t: {"state_dict": t, "epoch": 7, "hyper_parameters": {"lr": 1e-4}},
    "under module": lambda t: {"module": t, "iteration": 500},
    "two levels down": lambda t: {"model": {"state_dict": t}, "step": 1},
    "under a name of its own": lambda t: {"my_lora_weights": t, "epoch": 1, "args": {"lr": 0.1}},
    "beside an optimizer": lambda t: {
        "lora_state_dict": t,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
    },
}


@pytest.mark.parametrize("end", [".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("layout", PICKLED)
def test_pickles_of_trainers_are_looked_through(tmp_path, part, layout, end):
    torch.save(PICKLED[layout](named("transformer.")), tmp_path / f"lora{end}")
    assert_is(open_lora(tmp_path / f"lora{end}", part), HALVES)


@pytest.mark.parametrize(
    "beside",
    [
        {"lora_alpha": 8, "rank": 4},
        {"alpha": 8},
        {"lora_config": {"r": 4, "lora_alpha": 8}},
        {"peft_config": {"default": {"r": 4, "lora_alpha": 8}}},
    ],
)
def test_an_alpha_beside_the_weights_of_a_pickle_counts(tmp_path, part, beside):
    torch.save({"lora": named("transformer.")} | beside, tmp_path / "lora.pt")
    assert_is(open_lora(tmp_path / "lora.pt", part), HALVES, 2.0)


def test_the_rank_of_a_process_is_no_rank_of_a_lora(tmp_path, part):
    torch.save({"lora": named("transformer."), "rank": 0}, tmp_path / "lora.pt")
    assert_is(open_lora(tmp_path / "lora.pt", part), HALVES)


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "adapter_model.bin",
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights.bin",
        "my_style.safetensors",
    ],
)
@pytest.mark.parametrize("below", ["", "checkpoint-500", "lora_weights/000500"])
def test_a_trainers_folder_is_taken_for_the_lora_in_it(tmp_path, part, name, below):
    folder = tmp_path / "run" / below
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("A LoRA.")
    torch.save({"state": {}}, folder / "optimizer.bin")
    torch.save({"step": 1}, folder / "scheduler.bin")
    file = folder / name
    torch.save(named("base_model.model."), file) if name.endswith(".bin") else write(file, named("base_model.model."))
    assert find_lora(tmp_path / "run") == file
    assert_is(open_lora(tmp_path / "run", part), HALVES)


def test_pefts_config_counts_beside_any_file_that_is_alone_with_it(tmp_path, part):
    for name, save in (
        ("adapter_model.bin", lambda tensors, file: torch.save(tensors, file)),
        ("mine.safetensors", lambda t, f: write(f, t)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        save(named("base_model.model."), folder / name)
        (folder / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK})
        )
        assert_is(open_lora(folder, part), HALVES, 2.0)


def test_beside_other_files_pefts_config_is_that_of_pefts_own(tmp_path, part):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}))
    scales = {"adapter_model.safetensors": 2.0, "another.safetensors": 1.0}
    for name in scales:
        write(tmp_path / name, named("base_model.model."))
    for name, scale in scales.items():
        assert_is(open_lora(tmp_path / name, part), HALVES, scale)


def test_what_macos_writes_beside_files_on_other_disks_is_no_lora(tmp_path, part):
    """Nor does it keep peft's settings from being those of the one file that is there."""
    for name in ("mine.safetensors", "._mine.safetensors"):
        write(tmp_path / name, named("base_model.model."))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}))
    assert find_lora(tmp_path) == tmp_path / "mine.safetensors"
    assert_is(open_lora(tmp_path, part), HALVES, 2.0)


def test_a_folder_of_a_run_that_may_not_be_read_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "checkpoint-500").mkdir()
    file = write(tmp_path / "checkpoint-500" / "pytorch_lora_weights.safetensors", named("transformer."))
    monkeypatch.setattr(os, "access", lambda folder, mode: folder.name != "wandb")
    monkeypatch.setattr(os, "listdir", locked_out(os.listdir))
    assert find_lora(tmp_path) == file


def locked_out(real):
    def look(path):
        if str(path).endswith("wandb"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    return look


def test_of_what_videox_funs_trainer_writes_twice_its_own_form_is_read(tmp_path, part):
    own = write(tmp_path / "lora_diffusion_pytorch_model.safetensors", named("transformer."))
    write(tmp_path / "lora_diffusion_pytorch_model_compatible_with_comfyui.safetensors", named("transformer."))
    assert find_lora(tmp_path) == own


def test_a_folder_of_several_is_not_guessed_in(tmp_path, part):
    for step in (500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write(tmp_path / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors", named("transformer."))
    with pytest.raises(ValueError, match="holds 2 LoRAs, in checkpoint-1000, checkpoint-500"):
        open_lora(tmp_path, part)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder without a LoRA"):
        open_lora(tmp_path / "empty", part)


def test_a_checkpoint_chosen_as_a_lora_is_called_one(tiny, part):
    with pytest.raises(ValueError, match="is a CogVideoX checkpoint and no LoRA"):
        open_lora(tiny, part)
    with pytest.raises(ValueError, match="a model or a part of one"):
        open_lora(next((tiny / "vae").glob("*.safetensors")), part)


# --- Settings are data --------------------------------------------------------


def with_settings(tmp_path, **settings):
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    write(folder / "adapter_model.safetensors", named("base_model.model."))
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


PATTERNS = {
    "attn1.to_q": {"transformer_blocks.0.attn1.to_q"},
    "to_q": {"transformer_blocks.0.attn1.to_q"},
    "o_q": set(),
    "^proj_out": {"proj_out"},
    "^to_q$": set(),
    "^transformer_blocks.0.attn1.to_q$": {"transformer_blocks.0.attn1.to_q"},
    r"transformer_blocks\.\d+\.attn1\..*": {"transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_out.0"},
    r".*\.attn1\.to_q": {"transformer_blocks.0.attn1.to_q"},
    r".*attn1.*": {"transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn1.to_out.0"},
    r"^transformer_blocks\.[0-9]+\.(attn1|ff)\..+": {
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.1.attn1.to_out.0",
        "transformer_blocks.0.ff.net.0.proj",
    },
    "to_q|proj_out": {"transformer_blocks.0.attn1.to_q", "proj_out"},
    ".*.*": set(LAYERS),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_names_mean_what_they_mean_to_peft(tmp_path, pattern):
    from peft.utils.other import get_pattern_key

    folder = with_settings(tmp_path, r=RANK, lora_alpha=RANK, alpha_pattern={pattern: 2 * RANK})
    hit = {module for module, pair in read_lora(find_lora(folder)).pairs.items() if pair.scale == 2.0}
    assert hit == PATTERNS[pattern] == {module for module in LAYERS if get_pattern_key([pattern], module) == pattern}


@pytest.mark.parametrize(
    "pattern", ["(", "(a+)+$", "(x*)*y", "(.*.*)*z", ".*" * 30 + "z", "", "\\", "[a-z]+", "a{1,9}", "(?=a)b", "x" * 301]
)
def test_a_regular_expression_of_a_file_is_never_run(tmp_path, part, pattern):
    folder = with_settings(tmp_path, r=RANK, lora_alpha=RANK, alpha_pattern={pattern: 1})
    before = time.process_time()
    with pytest.raises(ValueError, match="a regular expression that is not run here"):
        open_lora(folder, part)
    assert time.process_time() - before < 1


def test_ranks_that_peft_names_per_layer_are_checked_too(tmp_path, part):
    assert_is(open_lora(with_settings(tmp_path, r=8, lora_alpha=4, rank_pattern={".*": RANK}), part), HALVES)
    with pytest.raises(ValueError, match="they say rank 8 for proj_out, and it has 4"):
        open_lora(with_settings(tmp_path, r=8, lora_alpha=8), part)


NO_NUMBERS = [-1, "8", True, [8], {"a": 1}, float("nan"), float("inf"), float("-inf"), 10**400]


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [
        *((key, value, 0) for key in ("lora_alpha", "alpha_pattern") for value in NO_NUMBERS),
        *((key, value, 1) for key in ("r", "rank_pattern") for value in (0, 0.5, *NO_NUMBERS)),
    ],
)
def test_alphas_are_finite_and_not_negative_and_ranks_at_least_one(tmp_path, part, key, value, least):
    settings = {"r": RANK, "lora_alpha": RANK} | {key: {"to_q": value} if "pattern" in key else value}
    with pytest.raises(
        ValueError, match=rf"adapter_model\.safetensors is refused: .*must be a finite number of at least {least}"
    ):
        open_lora(with_settings(tmp_path, **settings), part)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "a DoRA"),
        ({"lora_bias": True}, "LoRA with biases"),
        ({"bias": "lora_only"}, "a LoRA with biases"),
        ({"bias": "all"}, "a LoRA with biases"),
        ({"modules_to_save": ["proj_out"]}, "whole layers"),
        ({"peft_type": "LOHA"}, "a LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "began with pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "changes the model's own weights"),
        ({"init_lora_weights": "loftq"}, "changes the model's own weights"),
        ({"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["to_q"]}}, "a LoRA of blocks"),
        ({"kasa_config": {"beta": 0.0001}}, "a KaSA"),
        ({"monteclora_config": {"num_samples": 8}}, "a MonteCLoRA"),
        ({"use_rslora": "yes"}, "must be true or false"),
        ({"alpha_pattern": [4]}, "must be a table"),
    ],
)
def test_settings_that_mean_more_than_a_lora_are_refused_by_name(tmp_path, part, settings, said):
    with pytest.raises(ValueError, match=said):
        open_lora(with_settings(tmp_path, r=RANK, lora_alpha=RANK, **settings), part)


def test_a_lora_that_begins_with_what_the_weights_have_least_of_leaves_them_as_they_are(tmp_path, part, trained):
    """MiCA: peft's up half is frozen, and its down half begins at zero."""
    from peft import LoraConfig, get_peft_model

    weight = trained[0].transformer_blocks[0].attn1.to_q.weight.clone()
    module = get_peft_model(
        trained[0], LoraConfig(r=4, lora_alpha=8, target_modules=["to_q"], init_lora_weights="mica")
    )
    assert torch.equal(trained[0].transformer_blocks[0].attn1.to_q.base_layer.weight, weight)
    module.save_pretrained(tmp_path)
    assert_equal(open_lora(tmp_path, part), adapter_of(module, "default"))


def test_settings_without_effect_on_a_linear_layer_are_passed_over(tmp_path, part):
    more = {
        "fan_in_fan_out": True,
        "init_lora_weights": "gaussian",
        "modules_to_save": None,
        "bias": "none",
        "lora_dropout": 0.1,
        "use_dora": False,
    }
    assert_is(open_lora(with_settings(tmp_path, r=RANK, lora_alpha=RANK, peft_type="LORA", **more), part), HALVES)


@pytest.mark.parametrize("text", ["{", "[1]", "7", '"a"', "null", "[" * 5000 + "]" * 5000])
def test_metadata_that_is_no_table_is_refused(tmp_path, part, text):
    with pytest.raises(ValueError, match="so its strength is not known"):
        open_lora(write(tmp_path / "lora.safetensors", named("transformer."), {"lora_adapter_metadata": text}), part)


@pytest.mark.parametrize(
    "alpha", [torch.tensor(v) for v in (-4.0, float("nan"), float("inf"), -0.25)] + [torch.tensor(True)]
)
def test_an_alpha_among_the_weights_is_a_finite_number_that_is_not_negative(tmp_path, part, alpha):
    tensors = named("transformer.") | {"transformer.proj_out.alpha": alpha}
    with pytest.raises(ValueError, match=r"the alpha transformer\.proj_out\.alpha is .*finite number of at least 0"):
        open_lora(write(tmp_path / "lora.safetensors", tensors), part, 0.0)


# --- What is refused, and why -------------------------------------------------

Q = "transformer.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({f"{Q}.lokr_w1": torch.ones(2)}, "a LoKr"),
        ({f"{Q}.oft_blocks": torch.ones(2)}, "an OFT"),
        ({f"{Q}.ia3_l.default": torch.ones(2)}, "an IA3"),
        ({f"{Q}.a1.weight": torch.ones(2)}, "a GLoRA"),
        ({f"{Q}.diff": torch.ones(2)}, "full weights"),
        ({f"{Q}.diff_b": torch.ones(2)}, "full weights"),
        ({f"{Q}.dora_scale": torch.ones(2)}, "a DoRA"),
        ({f"{Q}.lora_mid.weight": torch.ones(2)}, "LoCon"),
        ({f"{Q}.lambda_layer": torch.ones(1, 2)}, "a T-LoRA"),
        ({f"{Q}.lora_B.bias": torch.ones(128)}, "biases"),
        ({f"{Q}.lora_A.scale_weight": torch.ones(1)}, "scaled fp8"),
        ({"transformer.x.lora_embedding_A": torch.ones(2)}, "LoRA of an embedding"),
        ({"transformer.proj_out.modules_to_save.weight": torch.ones(2)}, "full weights"),
        ({"transformer.norm_out.linear.weight": torch.ones(2)}, "whole weights beside its LoRA"),
    ],
)
def test_relatives_of_loras_are_called_by_their_names(tmp_path, part, more, said):
    with pytest.raises(ValueError, match=f"cannot be applied: it .*{said}"):
        open_lora(write(tmp_path / "lora.safetensors", named("transformer.") | more), part)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_peft_trained_are_never_left_out_in_silence(tmp_path, part, bias):
    """With its settings, or by the names in the file alone."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, bias=bias, target_modules=["to_q", "to_k"])
    get_peft_model(build_transformer(), config).save_pretrained(tmp_path)
    file = (tmp_path / "adapter_model.safetensors").rename(tmp_path / "mine.safetensors")
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be applied: .*it is a LoRA with biases, and only LoRAs are known"):
            open_lora(file, part)
        (tmp_path / "adapter_config.json").unlink(missing_ok=True)


def test_the_biases_of_a_whole_model_are_told_where_nothing_says_whether_they_were_trained(tmp_path, part):
    tensors = named("transformer.") | {
        "transformer.proj_out.base_layer.weight": torch.ones(128, 128),
        "transformer.proj_out.base_layer.bias": torch.ones(128),
        "transformer.norm_final.bias": torch.ones(128),
    }
    said = "does not say whether the 2 biases in it were trained too"
    assert said in open_lora(write(tmp_path / "lora.safetensors", tensors), part).text
    settings = {"lora_adapter_metadata": json.dumps({"transformer.bias": "none"})}
    lora = open_lora(write(tmp_path / "said.safetensors", tensors, settings), part)
    assert "holds the model it was trained on too (3 tensors)" in lora.text
    assert "biases" not in lora.text


OTHERS = {
    "Wan": "diffusion_model.blocks.0.self_attn.q",
    "Wan ": "lora_unet_blocks_0_cross_attn_k",
    "Flux or HunyuanVideo": "transformer.single_transformer_blocks.0.attn.to_q",
    "Flux or HunyuanVideo ": "lora_unet_double_blocks_0_img_attn_qkv",
    "LTX-Video": "diffusion_model.transformer_blocks.0.attn2.to_q",
    "Stable Diffusion": "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    "Qwen-Image": "transformer_blocks.0.img_mlp.net.2",
    "a language model": "base_model.model.model.layers.0.self_attn.q_proj",
}


@pytest.mark.parametrize("model", OTHERS)
def test_loras_of_other_models_are_told_by_their_names(tmp_path, part, model):
    tensors = {
        f"{OTHERS[model]}.lora_A.weight": torch.ones(4, 128),
        f"{OTHERS[model]}.lora_B.weight": torch.ones(128, 4),
    }
    with pytest.raises(ValueError, match=f"match no layer of this CogVideoX transformer.* as those of {model.strip()}"):
        open_lora(write(tmp_path / "lora.safetensors", tensors), part)


@pytest.mark.parametrize(
    "name",
    ["controlnet.proj_out", "single_transformer_blocks.0.proj_out", "gpt_neox.layers.0.attention.dense", "proj_out_2"],
)
def test_a_layer_of_another_part_is_not_taken_for_one_of_the_transformer(tmp_path, part, name):
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 128), f"{name}.lora_B.weight": torch.ones(128, 4)}
    with pytest.raises(ValueError, match="match no layer"):
        open_lora(write(tmp_path / "lora.safetensors", tensors), part)


@pytest.mark.parametrize(
    "second",
    [
        {"transformer.proj_out.lora_A.other.weight": torch.zeros(RANK, 128)},
        {"diffusion_model.proj_out.lora_A.weight": torch.zeros(RANK, 128)},
        {"lora_unet_proj_out.lora_down.weight": torch.zeros(RANK, 128)},
    ],
)
def test_two_loras_in_one_file_are_never_mixed(tmp_path, part, second):
    with pytest.raises(ValueError, match="holds the down half of proj_out twice, as .*two LoRAs in one file"):
        open_lora(write(tmp_path / "lora.safetensors", named("transformer.") | second), part)


def test_two_adapters_of_different_layers_are_told_too(tmp_path, part):
    second = named(
        "transformer.",
        ".lora_A.other.weight",
        ".lora_B.other.weight",
        halves=draw({"transformer_blocks.1.ff.net.2": (128, 512)}),
    )
    with pytest.raises(ValueError, match=r"holds 2 LoRAs, called \(no name\), other"):
        open_lora(write(tmp_path / "lora.safetensors", named("transformer.") | second), part)


def test_two_alphas_and_an_alpha_without_halves_are_refused(tmp_path, part):
    alphas = {"transformer.proj_out.alpha": torch.tensor(2.0), "lora_unet_proj_out.alpha": torch.tensor(4.0)}
    with pytest.raises(ValueError, match="gives proj_out two alphas"):
        open_lora(write(tmp_path / "lora.safetensors", named("transformer.") | alphas), part)
    with pytest.raises(ValueError, match="an alpha of norm_out.linear and no halves"):
        open_lora(
            write(tmp_path / "lora.safetensors", named("transformer.") | {"norm_out.linear.alpha": torch.tensor(2.0)}),
            part,
        )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_halves_of_whole_numbers_are_refused(tmp_path, part, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in named("transformer.").items()}
    with pytest.raises(ValueError, match=f"is stored as {str(dtype).removeprefix('torch.')}"):
        open_lora(write(tmp_path / "lora.safetensors", tensors), part)


def test_an_empty_file_and_rank_zero_are_refused(tmp_path, part):
    with pytest.raises(ValueError, match="holds no tensors"):
        open_lora(write(tmp_path / "lora.safetensors", {}), part)
    with pytest.raises(ValueError, match="of rank 0"):
        open_lora(write(tmp_path / "lora.safetensors", named("transformer.", halves=draw(rank=0))), part)


@pytest.mark.parametrize(
    ("of", "on", "said"),
    [
        (
            "5b",
            "1.5",
            "its patch embedding is a convolution, as CogVideoX 1.0 .* and this model's is a matrix over two frames, "
            "as 1.5",
        ),
        ("1.5", "5b", "its patch embedding is a matrix over two frames"),
        (
            "1.5-i2v",
            "1.5",
            "its patch embedding takes 256 inputs and this model's 128, and image to video takes twice as many",
        ),
        ("5b", "5b-i2v", "its patch embedding takes 16 inputs and this model's 32"),
    ],
)
def test_models_of_one_width_are_told_apart_by_what_differs(tmp_path, checkpoints, of, on, said):
    trained, model = (open_part(checkpoints(variant) / "transformer", "transformer") for variant in (of, on))
    out, *inside = trained.tensors["patch_embed.proj.weight"].shape
    tensors = {
        "patch_embed.proj.lora_A.weight": torch.ones(4, *inside),
        "patch_embed.proj.lora_B.weight": torch.ones(out, 4, *[1 for _ in inside[1:]]),
    }
    path = write(tmp_path / "lora.safetensors", tensors)
    open_lora(path, trained)
    with pytest.raises(ValueError, match=said):
        open_lora(path, model)


def test_layers_that_only_another_cogvideox_has_are_said_to_be_its(tmp_path, part):
    deep = draw({"transformer_blocks.41.attn1.to_q": (128, 128)})
    with pytest.raises(ValueError, match="a model of at least 42 blocks, and this one has 2"):
        open_lora(write(tmp_path / "lora.safetensors", named("transformer.", halves=deep)), part)
    ofs = draw({"ofs_embedding.linear_1": (64, 64)})
    with pytest.raises(ValueError, match="Only CogVideoX1.5-5B-I2V has ofs_embedding"):
        open_lora(write(tmp_path / "lora.safetensors", named("transformer.", halves=ofs)), part)


def test_a_lora_of_1_0_whose_layers_fit_is_taken_and_said(tmp_path, part):
    folder = with_settings(tmp_path, r=RANK, lora_alpha=RANK, base_model_name_or_path="THUDM/CogVideoX-5b")
    lora = open_lora(folder, part)
    assert_is(lora, HALVES)
    assert "It was trained on THUDM/CogVideoX-5b, and this is CogVideoX1.5" in lora.text
    same = open_lora(
        with_settings(tmp_path, r=RANK, lora_alpha=RANK, base_model_name_or_path="zai-org/CogVideoX1.5-5B"), part
    )
    assert "trained on" not in same.text


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e300, "1", None, True])
def test_a_strength_that_is_no_number_is_refused(tmp_path, part, strength):
    with pytest.raises(ValueError, match="strength of lora.safetensors is"):
        open_lora(write(tmp_path / "lora.safetensors", named("transformer.")), part, strength)


# --- The list -----------------------------------------------------------------


def test_the_list_holds_what_opens(tmp_path):
    write(tmp_path / "safe.safetensors", named("my_wrapper."))
    write(tmp_path / "st.sft", named("transformer."))
    torch.save({"lora": named("transformer.")}, tmp_path / "pickled.pt")
    torch.save({"module": sat_matrices(draw(QKV), draw({"d": (128, 128)})["d"])}, tmp_path / "sat.ckpt")
    torch.save({"state_dict": {"a": torch.ones(3)}}, tmp_path / "other.pt")
    torch.save({"state": {0: torch.ones(2)}}, tmp_path / "optimizer.bin")
    write(tmp_path / "half.safetensors", {f"{Q}.lora_A.weight": torch.ones(4, 128)})
    write(tmp_path / "dora.safetensors", named("transformer.") | {f"{Q}.dora_scale": torch.ones(2)})
    (tmp_path / "broken.pt").write_bytes(b"lora" * 10)
    assert [entry.name for entry in list_parts("lora", [tmp_path])] == [
        "pickled.pt",
        "safe.safetensors",
        "sat.ckpt",
        "st.sft",
    ]


def test_five_hundred_files_that_are_no_loras_of_cogvideox_are_listed_in_time(tmp_path):
    sd = [
        f"lora_unet_down_blocks_{n}_attentions_0_transformer_blocks_{n}_attn1_to_q.lora_down.weight" for n in range(300)
    ]
    wan = [f"diffusion_model.blocks.{n}.cross_attn.{layer}.lora_A.weight" for n in range(40) for layer in "qkvo"]
    files = [
        write(tmp_path / f"{len(names)}.safetensors", {name: torch.zeros(1) for name in names}) for names in (sd, wan)
    ]
    files.append(tmp_path / "pickled.pt")
    torch.save({f"layer.{n}": torch.ones(2) for n in range(50)}, files[2])
    contents = [file.read_bytes() for file in files]
    for number in range(1000, 1497):
        (tmp_path / f"{number}{files[number % 3].suffix}").write_bytes(contents[number % 3])
    before = time.process_time()
    assert list_parts("lora", [tmp_path]) == []
    first = time.process_time() - before
    assert list_parts("lora", [tmp_path]) == []
    again = time.process_time() - before - first
    # 49 and 4 ms on two cores that others used too.
    assert first < 0.4
    assert again < 0.1


def test_a_lora_in_gguf_is_refused_for_its_quantization_alone(tmp_path, part):
    file = layouts.write_gguf(
        tmp_path / "lora.gguf",
        {f"transformer_blocks.0.attn1.to_q.lora_{h}.weight": torch.ones(128, 128) for h in "AB"},
        "Q8_0",
    )
    with pytest.raises(ValueError, match="is stored as GGUF Q8_0"):
        open_lora(file, part)


# --- On the command line ------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("a folder/style:-1", "a folder/style", -1.0),
        ("style.safetensors:1e-1", "style.safetensors", 0.1),
        ("C:\\loras\\style.safetensors", "C:\\loras\\style.safetensors", 1.0),
        ("C:\\loras\\style.safetensors:0.5", "C:\\loras\\style.safetensors", 0.5),
    ],
)
def test_a_strength_stands_behind_a_colon(text, path, strength):
    (lora,) = build_parser().parse_args(["--lora", text]).lora
    assert (str(lora[0]), lora[1]) == (path, strength)


def test_a_colon_in_a_name_that_exists_is_a_part_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("style:2").touch()
    assert build_parser().parse_args(["--lora", "style:2"]).lora == [(Path("style:2"), 1.0)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("style.pt:nan", "'nan' would make every frame black"),
        ("style.pt:-inf", "'-inf' would make every frame black"),
        ("style.pt:strong", "'strong' is not a number"),
        ("style.pt:0,8", "'0,8' is not a number"),
        ("style.pt:", "'' is not a number"),
        (":0.8", "no LoRA stands before the colon"),
    ],
)
def test_a_strength_that_is_none_is_told_before_anything_is_opened(tmp_path, monkeypatch, capsys, text, said):
    monkeypatch.chdir(tmp_path)
    Path("style.pt").touch()
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--lora", text])
    assert said in capsys.readouterr().err
