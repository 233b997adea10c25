"""Whatever layout the same weights lie in, they load to the same tensors and make the same latents; what is wrong is
told in a sentence."""

import os
import pickle
import shutil

import pytest
import torch

from cogvideox.checkpoint.layout import open_checkpoint, open_part
from cogvideox.dtypes import RANGE_SAFE_FP16, Precision
from cogvideox.geometry import rotary_embedding
from cogvideox.handles import open_handles
from cogvideox.loading import load_module
from cogvideox.text import encode_prompt
from tests import layouts
from tests.conftest import CPU
from tests.layouts import LAYOUTS, latents, one_file, sat_file, two_folders
from tests.tiny_checkpoint import TEXT_WIDTH, build_transformer

FP32, BF16 = Precision(torch.float32), Precision(torch.bfloat16)
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The checkpoint in diffusers layout that all others are made from, and its modules."""
    return layouts.build_modules(tmp_path_factory.mktemp("layouts") / "diffusers")


@pytest.fixture(scope="module")
def truth(source):
    return latents(open_handles(source[0], "fp32", CPU))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_loads_to_the_same_tensors_and_the_same_latents(tmp_path, source, truth, name):
    write, layout = LAYOUTS[name]
    checkpoint = open_checkpoint(write(tmp_path / "x", source))
    assert checkpoint.part("transformer").layout == layout
    for kind, part in checkpoint.parts.items():
        ours = load_module(part, FP32, DEVICE).state_dict()
        theirs = source[1][kind].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key].float()) for key in ours), kind
    assert torch.equal(latents(open_handles(checkpoint.path, "fp32", CPU)), truth)


@pytest.mark.parametrize("precision", [BF16, RANGE_SAFE_FP16])
def test_sats_fused_tensors_are_cast_piece_by_piece_to_the_same(tmp_path, source, precision):
    ours = load_module(
        open_checkpoint(layouts.write_sat(tmp_path / "sat", source[1])).part("transformer"), precision, DEVICE
    )
    theirs = load_module(open_checkpoint(source[0]).part("transformer"), precision, DEVICE)
    mine, other = (dict((*module.named_parameters(), *module.named_buffers())) for module in (ours, theirs))
    assert all(torch.equal(mine[key], other[key]) for key in other)


@pytest.mark.parametrize("variant", ["1.5", "1.5-i2v", "fun-inp", "void", "5b", "2b"])
@pytest.mark.parametrize("names", [lambda state: state, layouts.comfy_names, None], ids=["diffusers", "ComfyUI", "SAT"])
def test_the_config_is_that_of_the_release_for_every_variant(tmp_path, variant, names):
    """From shapes alone; 2b, whose positions leave no trace, by its 30 heads."""
    changes = {"num_attention_heads": 30, "attention_head_dim": 64, "num_layers": 1} if variant == "2b" else {}
    with torch.device("meta"):
        module = build_transformer(variant, **changes).to(torch.bfloat16)
    module.to_empty(device=DEVICE)
    if names is None:
        file = layouts.write_sat(tmp_path, {"transformer": module})
    else:
        file = layouts.write_file(tmp_path / "x.safetensors", names(module.state_dict()))
    config = open_checkpoint(file).part("transformer").config
    # 1.5's rotary grid is absolute, so the size it was trained at is not in the result.
    for key in config.keys() - {"_class_name", "sample_width", "sample_height"}:
        assert config[key] == module.config[key], key


def test_parts_in_files_of_their_own_go_with_a_transformer(tmp_path, source):
    folder, modules = source
    transformer = layouts.write_file(
        tmp_path / "transformer.safetensors", layouts.comfy_names(modules["transformer"].state_dict())
    )
    (tmp_path / "t5").mkdir()
    text = layouts.write_file(tmp_path / "t5" / "t5xxl_fp16.safetensors", modules["text_encoder"].state_dict())
    for name, state, prefix in (
        ("a", modules["vae"].state_dict(), ""),
        ("b", modules["vae"].state_dict(), "first_stage_model."),
    ):
        vae = layouts.write_file(tmp_path / f"vae_{name}.safetensors", state, prefix)
        opened = open_handles(transformer, "fp32", CPU, text_encoder=text, vae=vae, tokenizer=folder / "tokenizer")
        wanted = open_handles(folder, "fp32", CPU)
        assert torch.equal(
            encode_prompt(opened.text_encoder, "a panda").embeddings,
            encode_prompt(wanted.text_encoder, "a panda").embeddings,
        )
        with opened.vae.weights.running() as ours, wanted.vae.weights.running() as theirs:
            assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
            assert ours.config["scaling_factor"] == theirs.config["scaling_factor"]
        assert opened.model.latent_scale == wanted.model.latent_scale


def test_without_a_text_encoder_its_output_says_what_to_connect(tmp_path, source):
    opened = open_handles(one_file()(tmp_path / "x", source), "fp32", CPU)
    shutil.copytree(source[0] / "tokenizer", tmp_path / "x" / "tokenizer")
    opened = open_handles(opened.checkpoint.path, "fp32", CPU)
    with pytest.raises(ValueError, match=r"no text encoder.*text_encoder_name.*CLIPLoader"):
        encode_prompt(opened.text_encoder, "a panda")
    assert "[absent] VAE" in opened.plan.text


class TestRefusals:
    def refused(self, path, *words, **options):
        def load():
            for part in layouts.open_whole(path, **options).parts.values():
                load_module(part, FP32, DEVICE)

        with pytest.raises(ValueError) as caught:
            load()
        for word in words:
            assert word in str(caught.value), word

    def state(self, source, **changes):
        return {name: value for name, value in source[1]["transformer"].state_dict().items() if name not in changes}

    def test_two_transformers_and_no_choice(self, tmp_path, source):
        self.refused(
            two_folders(tmp_path / "x", source).parent,
            "2 checkpoints, transformer_T2V and transformer_I2V",
            "Give the path",
        )

    def test_missing_and_left_over_tensors(self, tmp_path, source):
        state = self.state(source)
        del state["norm_final.weight"]
        self.refused(
            layouts.write_file(tmp_path / "a.safetensors", state),
            "1 missing (norm_final.weight)",
            "layout: diffusers file",
        )
        extra = {f"transformer_blocks.0.extra.{index}": torch.ones(1) for index in range(5)}
        self.refused(
            layouts.write_file(tmp_path / "b.safetensors", self.state(source) | extra),
            "5 unknown (transformer_blocks.0.extra.0, ",
            ", …)",
        )

    def test_a_wrong_shape(self, tmp_path, source):
        state = self.state(source) | {"norm_final.weight": torch.ones(3)}
        self.refused(layouts.write_file(tmp_path / "x.safetensors", state), "1 of another shape (norm_final.weight)")

    def test_a_lora(self, tmp_path):
        state = {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 8)}
        self.refused(
            layouts.write_file(tmp_path / "x.safetensors", state), "is a LoRA", "Load the model it was made for"
        )

    def test_another_family(self, tmp_path):
        state = {"double_blocks.0.img_attn.qkv.weight": torch.ones(4, 8), "img_in.weight": torch.ones(2, 2)}
        self.refused(
            layouts.write_file(tmp_path / "x.safetensors", state),
            "another model's",
            "double_blocks.0.img_attn.qkv.weight",
        )

    def test_a_vae_or_text_encoder_given_as_the_model(self, tmp_path, source):
        file = layouts.write_file(tmp_path / "vae.safetensors", source[1]["vae"].state_dict())
        self.refused(file, "holds a VAE and no transformer")
        self.refused(source[0], "holds a VAE and no text encoder", text_encoder=file)

    def test_a_truncated_file(self, tmp_path, source):
        file = one_file()(tmp_path / "x", source)
        os.truncate(file, file.stat().st_size - 10)
        self.refused(file, "is truncated")

    def test_a_truncated_or_foreign_pickle(self, tmp_path, source):
        file = sat_file(tmp_path / "sat", source)
        os.truncate(file, file.stat().st_size - 1000)
        self.refused(file, "is not a readable torch checkpoint")
        (tmp_path / "x.pt").write_bytes(b"not a checkpoint at all")
        self.refused(tmp_path / "x.pt", "is not a readable torch checkpoint")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_pickle_with_code_in_it_is_not_run(self, tmp_path, legacy):
        trap = tmp_path / "it-ran"

        class Trap:
            def __reduce__(self):
                return os.mkdir, (str(trap),)

        file = tmp_path / "mp_rank_00_model_states.pt"
        if legacy:
            file.write_bytes(pickle.dumps({"module": Trap()}))
        else:
            torch.save({"module": {"w": torch.ones(2), "x": Trap()}}, file)
        self.refused(file, "is not a readable torch checkpoint" if legacy else "could run code on your computer")
        assert not trap.exists()

    def test_shapes_that_no_cogvideox_has(self, tmp_path, source):
        state = {
            name: value
            for name, value in source[1]["vae"].state_dict().items()
            if not name.startswith("encoder.down_blocks.0")
        }
        file = layouts.write_file(tmp_path / "x.safetensors", state)
        with pytest.raises(ValueError, match="cannot be told from its shapes"):
            open_part(file, "vae")


def fp8_state(state, dtype, scaled=None):
    """Linear weights of blocks in fp8, as the casts in use have them; with ``scaled``, multiplied up to fp8's range
    first."""
    cast = {}
    for name, value in state.items():
        if (
            value.ndim != 2
            or not name.startswith(("transformer_blocks.", "encoder.block."))
            or "relative_attention_bias" in name
        ):
            cast[name] = value
            continue
        scale = value.float().abs().max() / torch.finfo(dtype).max if scaled else torch.tensor(1.0)
        cast[name] = (value.float() / scale).to(dtype)
        if scaled:
            cast[f"{name.removesuffix('.weight')}.{scaled}"] = scale
    return cast


def widened(state):
    """The weights that an fp8 file stands for, in float32."""
    scales = {
        f"{name.rpartition('.')[0]}.weight": value
        for name, value in state.items()
        if name.endswith(("scale_weight", "weight_scale"))
    }
    return {
        name: value.float() * scales.get(name, 1.0)
        for name, value in state.items()
        if not name.endswith(("scale_weight", "weight_scale"))
    }


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scaled", [None, "scale_weight", "weight_scale"])
@pytest.mark.parametrize("kind", ["transformer", "text_encoder"])
def test_fp8_files_stay_in_fp8_in_memory_and_compute_as_the_widened_weights_do(tmp_path, source, dtype, scaled, kind):
    state = fp8_state(source[1][kind].state_dict(), dtype, scaled)
    file = layouts.write_file(tmp_path / "fp8.safetensors", state | ({"scaled_fp8": torch.zeros(2)} if scaled else {}))
    wide = layouts.write_file(tmp_path / "wide.safetensors", widened(state))
    part, truth = open_part(file, kind), load_module(open_part(wide, kind), FP32, DEVICE)
    ids = torch.arange(64)[None] % 200

    def run(module, activations):
        if kind == "text_encoder":
            return module(ids)[0].float()
        config = module.config
        torch.manual_seed(1)
        return module(
            hidden_states=torch.randn(1, 4, config.in_channels, 6, 10).to(activations),
            encoder_hidden_states=torch.randn(1, 8, TEXT_WIDTH).to(activations),
            timestep=torch.tensor([500]),
            image_rotary_emb=rotary_embedding(config, 4, 6, 10, DEVICE),
            return_dict=False,
        )[0].float()

    fp8_bytes = sum(tensor.nbytes for tensor in part.tensors.values() if tensor.dtype == dtype)
    assert fp8_bytes > 10_000
    with torch.no_grad():
        wanted = run(truth, torch.float32)
        for precision, limit in ((FP32, 0 if not scaled else 1e-6), (BF16, None), (RANGE_SAFE_FP16, 2e-3)):
            module = load_module(part, precision, DEVICE)
            kept = sum(tensor.nbytes for tensor in module.parameters() if tensor.dtype == dtype)
            assert kept == fp8_bytes
            made = run(module, precision.activations)
            if limit is None:
                assert torch.equal(made, run(load_module(open_part(wide, kind), BF16, DEVICE), torch.bfloat16))
            else:
                assert (made - wanted).norm() / wanted.norm() <= limit


def test_an_fp8_checkpoint_samples_in_bf16_and_in_range_safe_fp16(tmp_path, source):
    state = fp8_state(source[1]["transformer"].state_dict(), torch.float8_e4m3fn)
    file = layouts.write_file(tmp_path / "fp8.safetensors", layouts.comfy_names(state), "model.diffusion_model.")
    truth = latents(open_handles(file, "fp32", CPU))
    for dtype, limit in (("bf16", 0.05), ("fp16", 2e-3)):
        opened = open_handles(file, dtype, CPU)
        assert ((latents(opened) - truth).norm() / truth.norm()) < limit
        assert "weights kept in fp8" in opened.plan.text
        assert opened.model.weights.nbytes < 0.75 * open_handles(source[0], dtype, CPU).model.weights.nbytes


@pytest.mark.parametrize("names", [lambda state: state, layouts.comfy_names], ids=["diffusers", "ComfyUI"])
@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_0"])
def test_gguf_transformers_stay_quantized_in_memory_and_compute_as_diffusers_dequantizes_them(
    tmp_path, source, quantization, names
):
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
    from gguf import GGMLQuantizationType, GGUFReader

    file = layouts.write_gguf(tmp_path / "cog.gguf", names(source[1]["transformer"].state_dict()), quantization)
    kind, state = GGMLQuantizationType[quantization], {}
    for tensor in GGUFReader(file).tensors:
        data = torch.from_numpy(tensor.data.copy())
        state[tensor.name] = (
            dequantize_gguf_tensor(GGUFParameter(data, quant_type=kind)).float()
            if tensor.tensor_type == kind
            else data.float()
        )
    truth = latents(open_handles(layouts.write_file(tmp_path / "wide.safetensors", state), "fp32", CPU))
    opened = open_handles(file, "fp32", CPU)
    assert torch.equal(latents(opened), truth)
    assert f"stored GGUF {quantization}" in opened.plan.text
    assert f"quantized copy (GGUF {quantization})" in opened.plan.text
    with opened.model.weights.running() as module:
        linears = [
            child
            for name, child in module.named_modules()
            if "transformer_blocks" in name and type(child).__name__ == "PackedLinear"
        ]
        assert len(linears) == 2 * 8
    for dtype, limit in (("bf16", 0.05), ("fp16", 2e-3)):
        assert (latents(open_handles(file, dtype, CPU)) - truth).norm() / truth.norm() < limit


def test_a_gguf_file_that_is_none_or_truncated(tmp_path, source):
    (tmp_path / "x.gguf").write_bytes(b"not a gguf file at all, is it")
    with pytest.raises(ValueError, match="is not a readable GGUF file"):
        open_checkpoint(tmp_path / "x.gguf")
    file = layouts.write_gguf(tmp_path / "cog.gguf", source[1]["transformer"].state_dict(), "Q8_0")
    os.truncate(file, file.stat().st_size - 100_000)
    with pytest.raises(ValueError, match="is not a readable GGUF file"):
        open_checkpoint(file)


def test_without_the_gguf_package_its_absence_is_told(tmp_path, source, monkeypatch):
    import sys

    from cogvideox.dependencies import DependencyError

    file = layouts.write_gguf(tmp_path / "cog.gguf", source[1]["transformer"].state_dict(), "Q8_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DependencyError, match="pip install gguf"):
        open_checkpoint(file)
