"""The rules for a part's tensors say what its module has, for every config; and a part that cannot run is told from
headers alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
from cogvideox.checkpoint.architecture import expected_tensors
from cogvideox.checkpoint.foreign import ForeignError
from cogvideox.checkpoint.layout import open_checkpoint, open_part
from cogvideox.dtypes import RANGE_SAFE_FP16, Precision
from cogvideox.loading import load_module
from tests import layouts
from tests.tiny_checkpoint import TEXT_WIDTH, VARIANTS, build_text_encoder, build_transformer, build_vae

CPU, FP32 = torch.device("cpu"), Precision(torch.float32)
TRANSFORMERS = {
    **VARIANTS,
    "the class's own sizes": dict(num_attention_heads=30, num_layers=1, time_embed_dim=512, text_embed_dim=4096),
    "other sizes": dict(
        num_attention_heads=3, attention_head_dim=32, num_layers=3, time_embed_dim=48, text_embed_dim=24
    ),
    "one layer, other patches": dict(num_layers=1, patch_size=4, out_channels=8, in_channels=12),
    "1.5 with other patches": dict(patch_size=1, patch_size_t=3, in_channels=33, patch_bias=True),
    "no biases, no affine norms": dict(attention_bias=False, norm_elementwise_affine=False, patch_bias=False),
    "ofs of another size": dict(patch_size_t=2, ofs_embed_dim=32),
    "no ofs": dict(patch_size_t=2, ofs_embed_dim=0),
    "learned positions of another size": dict(
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
        sample_width=20,
        sample_height=14,
        sample_frames=17,
        temporal_compression_ratio=8,
        max_text_seq_length=12,
    ),
    **{
        f"activation {name}": dict(activation_fn=name)
        for name in ("gelu", "geglu", "geglu-approximate", "swiglu", "linear-silu")
    },
}
TEXT_ENCODERS = {
    "T5 v1.1": dict(feed_forward_proj="gated-gelu"),
    "other sizes": dict(
        feed_forward_proj="gated-gelu", vocab_size=99, d_model=24, d_kv=5, d_ff=31, num_layers=3, num_heads=3
    ),
    "other buckets": dict(feed_forward_proj="gated-silu", relative_attention_num_buckets=8),
    "transformers' own names": dict(
        feed_forward_proj="gated-gelu", hidden_size=24, num_attention_heads=3, head_dim=8, num_hidden_layers=1
    ),
    "the first T5": dict(),
}
VAES = {
    "all defaults of the class": dict(),
    "the tests'": dict(block_out_channels=(8, 8, 8, 16), norm_num_groups=4, layers_per_block=1),
    "every level wider": dict(block_out_channels=(4, 8, 12, 16), norm_num_groups=2, layers_per_block=2),
    "other latents": dict(block_out_channels=(8, 4, 4, 8), norm_num_groups=4, latent_channels=4, layers_per_block=1),
    "other pictures": dict(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, in_channels=4, out_channels=5, layers_per_block=1
    ),
    "quant convolutions": dict(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        use_quant_conv=True,
        use_post_quant_conv=True,
    ),
    "three levels": dict(
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=["CogVideoXDownBlock3D"] * 3,
        up_block_types=["CogVideoXUpBlock3D"] * 3,
    ),
}


def shapes(module):
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


class TestRulesAndModules:
    @pytest.mark.parametrize("name", TRANSFORMERS)
    def test_transformers(self, name):
        from diffusers import CogVideoXTransformer3DModel

        config = (
            dict(num_attention_heads=2, num_layers=2, time_embed_dim=64, text_embed_dim=TEXT_WIDTH) | TRANSFORMERS[name]
        )
        with torch.device("meta"):
            module = CogVideoXTransformer3DModel(**config)
        assert expected_tensors("transformer", config) == shapes(module)
        assert expected_tensors("transformer", dict(module.config)) == shapes(module)

    @pytest.mark.parametrize("name", TEXT_ENCODERS)
    def test_text_encoders(self, name):
        from transformers import T5Config, T5EncoderModel

        with torch.device("meta"):
            module = T5EncoderModel(T5Config.from_dict(TEXT_ENCODERS[name]))
        assert expected_tensors("text_encoder", TEXT_ENCODERS[name]) == shapes(module)

    @pytest.mark.parametrize("name", VAES)
    def test_vaes(self, name):
        from diffusers import AutoencoderKLCogVideoX

        with torch.device("meta"):
            module = AutoencoderKLCogVideoX(**VAES[name])
        assert expected_tensors("vae", VAES[name]) == shapes(module)
        assert expected_tensors("vae", dict(module.config)) == shapes(module)

    @pytest.mark.parametrize(
        ("kind", "config"),
        [
            ("transformer", {"num_layers": "42"}),
            ("transformer", {"num_layers": 10**9}),
            ("transformer", {"num_layers": 0}),
            ("transformer", {"attention_head_dim": None}),
            ("transformer", {"in_channels": True}),
            ("transformer", {"patch_size_t": 2.0}),
            ("transformer", {"ofs_embed_dim": [512]}),
            ("transformer", {"activation_fn": "relu"}),
            ("transformer", {"use_learned_positional_embeddings": True}),
            ("text_encoder", {"d_model": {"a": 1}}),
            ("text_encoder", {"num_hidden_layers": -1}),
            ("vae", {"block_out_channels": "128"}),
            ("vae", {"block_out_channels": [128, 256]}),
            ("vae", {"block_out_channels": [128, float("nan"), 1, 1]}),
            ("vae", {"norm_num_groups": 7}),
            ("vae", {"down_block_types": ["DownEncoderBlock2D"] * 4}),
        ],
    )
    def test_what_no_module_is_made_of_is_told_by_its_name(self, kind, config):
        name = next(iter(config))
        with pytest.raises(
            ValueError, match="cannot be used: (use_rotary|down_block_types|norm_num)|cannot be used: " + name
        ):
            expected_tensors(kind, config)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return layouts.build_modules(tmp_path_factory.mktemp("architecture") / "diffusers")


@pytest.fixture
def states(source):
    return {kind: module.state_dict() for kind, module in source[1].items()}


@pytest.fixture
def copy(source, tmp_path):
    return shutil.copytree(source[0], tmp_path / "checkpoint")


def change(folder, edit):
    """The tensors of a part's folder, edited, in one file."""
    state = {}
    for file in sorted(folder.glob("*.safetensors*")):
        if file.suffix == ".safetensors":
            state |= load_file(file)
        file.unlink()
    edit(state)
    save_file(
        state,
        folder / ("model.safetensors" if folder.name == "text_encoder" else "diffusion_pytorch_model.safetensors"),
    )


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(open_it, *said, error=ValueError):
    with pytest.raises(error) as caught:
        open_it()
    for words in said:
        assert words in str(caught.value), str(caught.value)


#: What a person's file may have come to, per kind the name of one tensor of it, and what is said.
EDITS = {
    "a tensor missing": (lambda state, last: state.pop(last), "1 missing ({last})", "Download it again, whole"),
    "a head of training": (
        lambda state, last: state.update({"projectors.0.weight": torch.ones(2)}),
        "1 unknown (projectors.0.weight)",
        "left in by",
    ),
    "an average of training": (
        lambda state, last: state.update({f"ema.{last}": torch.ones(2)}),
        "1 unknown (ema.{last})",
        "left in by",
    ),
    "an optimizer's state": (
        lambda state, last: state.update({"optimizer.exp_avg": torch.ones(2)}),
        "1 unknown (optimizer.exp_avg)",
        "left in by",
    ),
    "another shape": (
        lambda state, last: state.update({last: torch.ones(3)}),
        "1 of another shape ({last})",
        "{last} is (3,), and should be (",
    ),
}
LAST = {
    "transformer": "proj_out.bias",
    "text_encoder": "encoder.final_layer_norm.weight",
    "vae": "decoder.norm_out.norm_layer.bias",
}


@pytest.mark.parametrize("kind", LAST)
@pytest.mark.parametrize("name", EDITS)
def test_in_every_part_each_tensor_is_looked_for_at_opening(copy, kind, name):
    edit, *said = EDITS[name]
    change(copy / kind, lambda state: edit(state, LAST[kind]))
    said = [words.replace("{last}", LAST[kind]) for words in said]
    refused(lambda: layouts.open_whole(copy), *said)
    refused(lambda: open_part(copy / kind, kind), *said)
    assert generate.main(["--check", str(copy), "--device", "cpu"]) == 1


def test_a_config_of_more_layers_than_there_are_is_told_as_such(copy):
    change_config(copy / "transformer", num_layers=42)
    refused(
        lambda: layouts.open_whole(copy),
        "missing (transformer_blocks.10.attn1",
        "says num_layers 42, and the weights have 2 blocks",
    )


@pytest.mark.parametrize(
    ("channels", "changes", "said"),
    [
        (48, {"patch_size_t": None}, "a video-editing model of CogVideoX 1.0"),
        (64, {}, "three more latent videos"),
        (17, {}, "another model's descendant"),
        (33, {"patch_size_t": None}, "CogVideoX-Fun InP"),
        (32, {"patch_size_t": None}, "CogVideoX-Fun Control or Pose"),
    ],
)
def test_transformers_with_other_inputs_are_named_in_file_and_folder(copy, tmp_path, channels, changes, said):
    module = build_transformer(in_channels=channels, **changes)
    shutil.rmtree(copy / "transformer")
    module.save_pretrained(copy / "transformer")
    file = layouts.write_file(tmp_path / "x.safetensors", layouts.comfy_names(module.state_dict()))
    for path in (copy, file):
        refused(
            lambda path=path: layouts.open_whole(path),
            f"takes {channels} input channels",
            said,
            "image to video",
            error=ForeignError,
        )
        assert generate.main(["--check", str(path), "--device", "cpu"]) == 1


PACKED = {
    "bitsandbytes nf4": (
        "bitsandbytes",
        {"to_q.weight": ["to_q.weight.absmax", "to_q.weight.quant_map", "to_q.weight.quant_state.bitsandbytes__nf4"]},
    ),
    "bitsandbytes int8": ("bitsandbytes", {"to_q.weight": ["to_q.SCB", "to_q.weight_format"]}),
    "Quanto": (
        "Quanto",
        {"to_q.weight": ["to_q.weight._data", "to_q.weight._scale", "to_q.input_scale", "to_q.output_scale"]},
    ),
    "torchao": ("torchao", {"to_q.weight": ["to_q._weight_qdata", "to_q._weight_scale"]}),
    "GPTQ": ("GPTQ or AWQ", {"to_q.weight": ["to_q.qweight", "to_q.qzeros", "to_q.scales", "to_q.g_idx"]}),
    "nunchaku": (
        "nunchaku",
        {"to_q.weight": ["to_q.qweight", "to_q.wscales", "to_q.smooth_factor", "to_q.lora_down", "to_q.lora_up"]},
    ),
    "NVFP4": ("NVFP4", {"to_q.weight": ["to_q.weight", "to_q.weight_scale", "to_q.weight_scale_2"]}),
    "ComfyUI": ("ComfyUI (int8 or int4)", {"to_q.weight": ["to_q.weight", "to_q.weight_scale", "to_q.comfy_quant"]}),
    "fp8 in blocks": ("transformers or DeepSeek", {"to_q.weight": ["to_q.weight", "to_q.weight_scale_inv"]}),
    "ModelOpt": ("NVIDIA's ModelOpt", {"to_q.weight": ["to_q.weight", "to_q.weight_quantizer._amax"]}),
}


@pytest.mark.parametrize("name", PACKED)
def test_weights_packed_by_other_programs_are_refused_by_its_name(copy, tmp_path, states, name):
    program, parts = PACKED[name]
    keeps = name in ("bitsandbytes nf4", "bitsandbytes int8")

    def pack(state):
        for old in [key for key in state if key.endswith(".attn1.to_q.weight")]:
            value = state[old] if keeps else state.pop(old)
            start = old.removesuffix("to_q.weight")
            state |= {start + end: torch.ones(2, dtype=torch.uint8) for end in parts["to_q.weight"]}
            if keeps:
                state[old] = torch.ones(value.numel() // 2, 1, dtype=torch.uint8)

    change(copy / "transformer", pack)
    state = dict(states["transformer"])
    pack(state)
    for path in (copy, layouts.write_file(tmp_path / "x.safetensors", state)):
        refused(
            lambda path=path: layouts.open_whole(path),
            f"is packed by {program}",
            "Quantize",
            "GGUF",
            error=ForeignError,
        )


@pytest.mark.parametrize(
    "state",
    [{"state": {0: {"exp_avg": torch.ones(2)}}}, {"decay": 0.99, "shadow_params": [torch.ones(2)]}],
    ids=["an optimizer's", "diffusers' average"],
)
def test_what_a_training_keeps_beside_its_model_is_called_that(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    refused(lambda: open_checkpoint(tmp_path / "x.pt"), "no weights that have names", "(EMA)", error=ForeignError)


def test_a_config_that_says_its_weights_are_packed_is_believed(copy):
    change_config(copy / "transformer", quantization_config={"quant_method": "torchao", "quant_type": "int8wo"})
    refused(lambda: layouts.open_whole(copy), "is packed by torchao", "its config.json says so", error=ForeignError)


class TestTextEncoders:
    def test_umt5_is_not_t5(self, copy, tmp_path):
        from transformers import UMT5Config, UMT5EncoderModel

        config = UMT5Config(
            vocab_size=600,
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
        module = UMT5EncoderModel(config)
        state = {name: value for name, value in module.state_dict().items() if "embed_tokens" not in name}
        file = layouts.write_file(tmp_path / "umt5_xxl.safetensors", state)
        refused(lambda: open_part(file, "text_encoder"), "UMT5", "text encoder of Wan", "T5 v1.1", error=ForeignError)
        module.save_pretrained(tmp_path / "umt5")
        refused(
            lambda: open_part(tmp_path / "umt5", "text_encoder"),
            "UMT5EncoderModel, not T5EncoderModel",
            error=ForeignError,
        )
        change_config(tmp_path / "umt5", architectures=["T5EncoderModel"])
        refused(lambda: layouts.open_whole(copy, text_encoder=tmp_path / "umt5"), "UMT5", error=ForeignError)

    def test_a_t5_of_many_languages_is_told_by_its_vocabulary(self, tmp_path):
        state = build_text_encoder(vocabulary=70_000).state_dict()
        refused(
            lambda: open_part(layouts.write_file(tmp_path / "mt5.safetensors", state), "text_encoder"),
            "mT5",
            "70,000 tokens",
            error=ForeignError,
        )

    def test_the_first_t5_is_told_by_its_feed_forward_layers(self, tmp_path):
        from transformers import T5Config, T5EncoderModel

        module = T5EncoderModel(
            T5Config(vocab_size=99, d_model=TEXT_WIDTH, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        )
        module.save_pretrained(tmp_path / "t5")
        file = layouts.write_file(tmp_path / "t5.safetensors", module.state_dict())
        refused(lambda: open_part(file, "text_encoder"), "the first T5", "wi_0 and wi_1", error=ForeignError)
        refused(lambda: open_part(tmp_path / "t5", "text_encoder"), "'relu'", "can only be 'gated-gelu'")

    def test_one_of_another_width_is_refused_beside_the_transformer_with_both_widths(self, copy, tmp_path):
        file = layouts.write_file(tmp_path / "t5_base.safetensors", build_text_encoder(width=48).state_dict())
        assert open_part(file, "text_encoder").config["d_model"] == 48
        refused(
            lambda: layouts.open_whole(copy, text_encoder=file),
            "gives 48 numbers a token",
            "reads 32",
            error=ForeignError,
        )
        shutil.rmtree(copy / "text_encoder")
        build_text_encoder(width=48).save_pretrained(copy / "text_encoder")
        refused(lambda: layouts.open_whole(copy), "gives 48 numbers a token", "reads 32")

    def test_a_whole_t5_is_its_encoder(self, tmp_path, states):
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
        )
        whole = T5ForConditionalGeneration(config)
        whole.save_pretrained(tmp_path / "t5")
        file = layouts.write_file(tmp_path / "t5.safetensors", whole.state_dict())
        wanted = whole.encoder.state_dict()
        for path in (file, tmp_path / "t5"):
            part = open_part(path, "text_encoder")
            assert not [name for name in part.tensors if name.startswith(("decoder.", "lm_head."))]
            made = load_module(part, FP32, CPU).encoder.state_dict()
            assert all(torch.equal(made[name], wanted[name]) for name in wanted)

    @pytest.mark.parametrize(
        "prefix",
        [
            "text_encoders.t5xxl.transformer.",
            "t5xxl.transformer.",
            "transformer.",
            "cond_stage_model.transformer.",
            "text_encoder.",
        ],
    )
    def test_prefixes_and_what_comfyui_adds_are_no_part_of_it(self, tmp_path, states, prefix):
        state = {name: value for name, value in states["text_encoder"].items() if "embed_tokens" not in name}
        extras = {
            "scaled_fp8": torch.zeros(2),
            "spiece_model": torch.zeros(9, dtype=torch.uint8),
            "logit_scale": torch.ones(()),
        }
        file = layouts.write_file(tmp_path / "t5.safetensors", state | extras, prefix)
        made = load_module(open_part(file, "text_encoder"), FP32, CPU).state_dict()
        assert all(torch.equal(made[name], states["text_encoder"][name]) for name in made)

    @pytest.mark.parametrize("quantization", ["Q8_0", "Q4_0"])
    @pytest.mark.parametrize("whole", [False, True])
    def test_llama_cpps_gguf_encodes_as_the_dequantized_weights_do(self, tmp_path, states, quantization, whole):
        from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_gguf_tensor
        from gguf import GGMLQuantizationType, GGUFReader

        state = {name: value for name, value in states["text_encoder"].items() if "embed_tokens" not in name}
        named, kind = layouts.llama_names(state), GGMLQuantizationType[quantization]
        decoder = {
            "dec.blk.0.attn_q.weight": torch.ones(32, 32),
            "dec.output_norm.weight": torch.ones(32),
            "output.weight": torch.ones(256, 32),
        }
        file = layouts.write_gguf(tmp_path / "t5.gguf", named | (decoder if whole else {}), quantization)
        stored = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        wide = {}
        for (name, value), tensor in zip(state.items(), (stored[name] for name in named), strict=True):
            data = torch.from_numpy(tensor.data.copy())
            packed = tensor.tensor_type == kind
            wide[name] = (
                (dequantize_gguf_tensor(GGUFParameter(data, quant_type=kind)) if packed else data)
                .float()
                .reshape(value.shape)
            )
            assert (wide[name] - value).norm() <= (0.01 if quantization == "Q8_0" else 0.12) * value.norm(), name
        truth = load_module(
            open_part(layouts.write_file(tmp_path / "wide.safetensors", wide), "text_encoder"), FP32, CPU
        )
        part = open_part(file, "text_encoder")
        assert part.layout == "llama.cpp"
        assert f"GGUF {quantization}" in part.stored
        ids = torch.arange(64)[None]
        with torch.no_grad():
            wanted = truth(ids)[0]
            assert torch.equal(load_module(part, FP32, CPU)(ids)[0], wanted)
            assert (load_module(part, RANGE_SAFE_FP16, CPU)(ids)[0] - wanted).norm() <= 2e-3 * wanted.norm()

    def test_a_token_embedding_in_fp8_is_read_in_every_precision(self, tmp_path, states):
        """As t5xxl_fp8_e4m3fn.safetensors has it."""
        state = {name: value for name, value in states["text_encoder"].items() if "embed_tokens" not in name}
        cast = {name: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for name, value in state.items()}
        wide = {name: value.float() for name, value in cast.items()}
        part, truth = (
            open_part(layouts.write_file(tmp_path / f"{name}.safetensors", tensors), "text_encoder")
            for name, tensors in (("a", cast), ("b", wide))
        )
        ids = torch.arange(64)[None]
        with torch.no_grad():
            wanted = load_module(truth, FP32, CPU)(ids)[0]
            for precision in (FP32, RANGE_SAFE_FP16):
                assert (load_module(part, precision, CPU)(ids)[0] - wanted).norm() <= 2e-3 * wanted.norm()


class TestDescendants:
    @pytest.mark.parametrize(
        ("layer", "model"),
        [
            ("local_facial_extractor.latents", "ConsisID"),
            ("combine_linears.0.weight", "Diffusion as Shader"),
            ("ref_patch_embed.proj.weight", "TrajectoryCrafter"),
            ("traj_extractor.conv.weight", "Tora"),
            ("controlnet_encode_first.0.weight", "a ControlNet"),
        ],
    )
    def test_a_model_that_adds_layers_is_named(self, tmp_path, states, layer, model):
        state = states["transformer"] | {layer: torch.ones(2, 2)}
        if model == "ConsisID":
            # TrajectoryCrafter's are called so too.
            state["perceiver_cross_attention.0.norm1.weight"] = torch.ones(2)
        if model == "a ControlNet":
            # It has no end of its own.
            state = {name: value for name, value in state.items() if not name.startswith("proj_out")}
        file = layouts.write_file(tmp_path / "x.safetensors", state)
        refused(
            lambda: layouts.open_whole(file), f"x.safetensors is {model}, which adds", f"({layer}", error=ForeignError
        )

    def test_what_a_training_left_in_is_told_as_before(self, tmp_path, states):
        state = states["transformer"] | {"projectors.0.weight": torch.ones(2)}
        refused(
            lambda: layouts.open_whole(layouts.write_file(tmp_path / "x.safetensors", state)),
            "1 unknown (projectors.0.weight)",
            "save the model without it",
        )


class TestVaes:
    def test_other_latents_are_refused(self, copy, tmp_path):
        module = build_vae((32, 32, 32, 64), 32)
        other = type(module).from_config(dict(module.config) | {"latent_channels": 4})
        file = layouts.write_file(tmp_path / "vae.safetensors", other.state_dict())
        shutil.rmtree(copy / "vae")
        other.save_pretrained(copy / "vae")
        refused(lambda: open_part(file, "vae"), "has 4 latent channels, and CogVideoX's have 16", error=ForeignError)
        refused(lambda: layouts.open_whole(copy), '"latent_channels" is 4, and it can only be 16')

    def test_other_sizes_of_latents_are_refused(self, tmp_path):
        from diffusers import AutoencoderKLCogVideoX

        config = VAES["three levels"] | {"block_out_channels": (32, 32, 64), "norm_num_groups": 32}
        file = layouts.write_file(tmp_path / "vae.safetensors", AutoencoderKLCogVideoX(**config).state_dict())
        refused(lambda: open_part(file, "vae"), "3 levels, and CogVideoX's have 4", error=ForeignError)
        AutoencoderKLCogVideoX(**VAES["the tests'"], temporal_compression_ratio=8).save_pretrained(tmp_path / "vae")
        refused(lambda: open_part(tmp_path / "vae", "vae"), '"temporal_compression_ratio" is 8, and it can only be 4')

    @pytest.mark.parametrize("half", ["encoder", "decoder"])
    def test_half_a_vae_is_named(self, tmp_path, states, half):
        state = {name: value for name, value in states["vae"].items() if name.startswith(half)}
        file = layouts.write_file(tmp_path / "vae.safetensors", state)
        refused(
            lambda: open_part(file, "vae"),
            f"the {half} of a VAE without its {'decoder' if half == 'encoder' else 'encoder'}",
        )

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("decoder.middle.0.residual.0.gamma", "Wan's VAE"),
            ("decoder.mid_block.resnets.0.norm1.gamma", "Wan's VAE"),
            ("decoder.mid_block.resnets.0.conv1.conv.weight", "HunyuanVideo's VAE"),
            ("first_stage_model.decoder.mid.block_1.conv1.weight", "a VAE of pictures"),
            ("decoder.up_blocks.0.res_blocks.0.conv1.conv.weight", "LTX-Video's VAE"),
            ("decoder.block_in.resnets.0.conv1.conv.weight", "Mochi's VAE"),
            ("text_model.encoder.layers.0.mlp.fc1.weight", "CLIP's text encoder"),
            ("blocks.0.pos_embedding.embedding.weight", "UMT5"),
            ("model.layers.0.self_attn.q_proj.weight", "a language model"),
        ],
    )
    def test_other_models_parts_are_named(self, tmp_path, name, said):
        file = layouts.write_file(tmp_path / "x.safetensors", {name: torch.ones(2)})
        for kind in ("vae", "text_encoder"):
            refused(lambda kind=kind: open_part(file, kind), f"holds {said}", "another model's", error=ForeignError)


class TestFiles:
    def test_one_piece_of_several_says_so(self, tmp_path, states):
        file = layouts.write_file(tmp_path / "model-00001-of-00002.safetensors", states["text_encoder"])
        refused(lambda: open_part(file, "text_encoder"), "lacks 1 of 2 shards of the text encoder", "00002-of-00002")
        assert open_part(file.rename(tmp_path / "model-00001-of-00001.safetensors"), "text_encoder")

    def test_two_transformers_and_no_choice(self, tmp_path, states):
        state = states["transformer"]
        file = layouts.write_file(
            tmp_path / "x.safetensors",
            {f"{prefix}.{name}": state[name] for prefix in ("ema", "model") for name in state},
        )
        refused(lambda: layouts.open_whole(file), "holds 2 transformers", "model.…", "ema.…")

    def test_another_part_of_cogvideox_is_called_that(self, copy):
        for held, said in (("vae", "a VAE"), ("text_encoder", "a text encoder")):
            refused(lambda held=held: open_checkpoint(copy / held), f"{held} holds {said} and no transformer, so")
        refused(lambda: open_part(copy / "transformer", "vae"), "transformer holds a transformer and no VAE. Choose")

    def test_a_part_that_is_replaced_is_not_looked_into(self, tmp_path, states):
        state = {f"model.diffusion_model.{name}": value for name, value in states["transformer"].items()}
        state |= {f"first_stage_model.{name}": value for name, value in states["vae"].items() if "conv_out" not in name}
        file = layouts.write_file(tmp_path / "all.safetensors", state)
        vae = layouts.write_file(tmp_path / "vae.safetensors", states["vae"])
        refused(lambda: layouts.open_whole(file), "4 missing (decoder.conv_out.conv.bias")
        assert open_checkpoint(file, vae=vae).part("vae").source == vae

    def test_scales_of_what_is_not_in_fp8_are_refused(self, tmp_path, states):
        state = states["transformer"] | {"transformer_blocks.0.attn1.to_q.scale_weight": torch.ones(1)}
        refused(
            lambda: layouts.open_whole(layouts.write_file(tmp_path / "x.safetensors", state)),
            "1 scales that fit no fp8 weight",
        )

    def test_scales_of_mxfp8_are_named(self, tmp_path, states):
        state = dict(states["transformer"])
        weight = state["transformer_blocks.0.attn1.to_q.weight"]
        state["transformer_blocks.0.attn1.to_q.weight"] = weight.to(torch.float8_e4m3fn)
        scales = torch.full((weight.shape[0], weight.shape[1] // 32), 127, dtype=torch.uint8)
        state["transformer_blocks.0.attn1.to_q.weight_scale"] = scales
        refused(
            lambda: layouts.open_whole(layouts.write_file(tmp_path / "x.safetensors", state)),
            "is packed by ComfyUI or torchao (MXFP8 or MXFP4) (1 scales in uint8",
            error=ForeignError,
        )

    def test_flan_t5_says_that_it_is_another_text_encoder(self, tmp_path, states):
        said = {}
        for name in ("t5xxl", "Flan_T5_xxl"):
            file = layouts.write_file(tmp_path / f"{name}.safetensors", states["text_encoder"])
            said[name] = open_part(file, "text_encoder").note
        assert said["t5xxl"] == ""
        assert said["Flan_T5_xxl"].startswith("Flan_T5_xxl.safetensors is Flan-T5 by its name")

    def test_2b_from_sat_has_its_positions_from_its_module(self, tmp_path):
        module = build_transformer("2b", num_attention_heads=30, attention_head_dim=16, num_layers=1)
        positions = module.patch_embed.pos_embedding
        file = layouts.write_file(
            tmp_path / "x.safetensors", module.state_dict() | {"patch_embed.pos_embedding": positions}
        )
        made = load_module(open_checkpoint(file).part("transformer"), FP32, CPU)
        assert torch.equal(made.patch_embed.pos_embedding, positions)
