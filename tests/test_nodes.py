"""The nodes keep their contract, explain themselves, and work together without ComfyUI."""

import importlib
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogvideox.events import Events
from tests import layouts
from tests.conftest import CPU
from tests.drawings import CLIP
from tests.helpers import call, inputs
from tests.tiny_checkpoint import build_checkpoint, build_text_encoder, build_transformer, build_vae

CONTRACT = {
    "CogVideoX15ModelLoader": (
        "CogVideoX-1.5 Model Loader",
        {
            "model": "COMBO",
            "dtype": "COMBO",
            "on_mismatch": "COMBO",
            "memory": "COMBO",
            "scan_weights": "BOOLEAN",
            "text_encoder_name": "COMBO",
            "vae_name": "COMBO",
        },
        {
            "model": "COGVIDEOX_MODEL",
            "text_encoder": "COGVIDEOX_TEXT_ENCODER",
            "vae": "COGVIDEOX_VAE",
            "report": "STRING",
        },
    ),
    "CogVideoX15TextEncode": (
        "CogVideoX-1.5 Text Encode",
        {"text_encoder": "COGVIDEOX_TEXT_ENCODER,CLIP", "prompt": "STRING"},
        {"conditioning": "CONDITIONING"},
    ),
    "CogVideoX15EmptyLatent": (
        "Empty CogVideoX-1.5 Latent",
        {"width": "INT", "height": "INT", "length": "INT", "batch_size": "INT"},
        {"latent": "LATENT"},
    ),
    "CogVideoX15Sampler": (
        "CogVideoX-1.5 Sampler",
        {
            "model": "COGVIDEOX_MODEL",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "seed": "INT",
            "steps": "INT",
            "cfg": "FLOAT",
            "scheduler": "COMBO",
            "denoise": "FLOAT",
            "dynamic_cfg": "BOOLEAN",
            "on_nan": "COMBO",
            "noise": "LATENT",
            "cfg_start": "FLOAT",
            "cfg_end": "FLOAT",
        },
        {"latent": "LATENT"},
    ),
    "CogVideoX15VAEDecode": (
        "CogVideoX-1.5 VAE Decode",
        {"samples": "LATENT", "vae": "COGVIDEOX_VAE,VAE"},
        {"images": "IMAGE"},
    ),
    "CogVideoX15BlackFrameCheck": (
        "CogVideoX-1.5 Black Frame Check",
        {
            "images": "IMAGE",
            "action": "COMBO",
            "pixel_black_threshold": "FLOAT",
            "picture_black_ratio": "FLOAT",
            "video_black_ratio": "FLOAT",
        },
        {"images": "IMAGE", "is_black": "BOOLEAN", "black_frame_count": "INT", "report": "STRING"},
    ),
}
CONTRACT["CogVideoX15ImageToVideo"] = (
    "CogVideoX-1.5 Image to Video",
    {
        "positive": "CONDITIONING",
        "negative": "CONDITIONING",
        "vae": "COGVIDEOX_VAE,VAE",
        "start_image": "IMAGE",
        "width": "INT",
        "height": "INT",
        "length": "INT",
        "batch_size": "INT",
        "end_image": "IMAGE",
    },
    {"positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT"},
)
CONTRACT["CogVideoX15VAEEncode"] = (
    "CogVideoX-1.5 VAE Encode",
    {"images": "IMAGE", "vae": "COGVIDEOX_VAE,VAE"},
    {"latent": "LATENT"},
)
CONTRACT["CogVideoX15LoraLoader"] = (
    "CogVideoX-1.5 LoRA Loader",
    {"model": "COGVIDEOX_MODEL", "lora_name": "COMBO", "strength": "FLOAT"},
    {"model": "COGVIDEOX_MODEL"},
)
CONTRACT["CogVideoX15Downloader"] = (
    "CogVideoX-1.5 Downloader",
    {"checkpoint": "COMBO", "download": "BOOLEAN"},
    {"model_name": "STRING", "report": "STRING"},
)
CONTRACT["CogVideoX15Attention"] = (
    "CogVideoX-1.5 Attention",
    {"model": "COGVIDEOX_MODEL", "attention": "COMBO"},
    {"model": "COGVIDEOX_MODEL"},
)
CONTRACT["CogVideoX15Cache"] = (
    "CogVideoX-1.5 Cache",
    {"model": "COGVIDEOX_MODEL", "method": "COMBO", "strength": "FLOAT", "start": "FLOAT", "end": "FLOAT"},
    {"model": "COGVIDEOX_MODEL"},
)
CONTRACT["CogVideoX15Compile"] = (
    "CogVideoX-1.5 Compile",
    {"model": "COGVIDEOX_MODEL", "mode": "COMBO", "dynamic": "BOOLEAN"},
    {"model": "COGVIDEOX_MODEL"},
)
CONTRACT["CogVideoX15Quantize"] = (
    "CogVideoX-1.5 Quantize",
    {"model": "COGVIDEOX_MODEL", "method": "COMBO", "text_encoder": "COGVIDEOX_TEXT_ENCODER"},
    {"model": "COGVIDEOX_MODEL", "text_encoder": "COGVIDEOX_TEXT_ENCODER", "report": "STRING"},
)
CONTRACT["CogVideoX15ToComfyUI"] = (
    "CogVideoX-1.5 to ComfyUI",
    {"model": "COGVIDEOX_MODEL", "text_encoder": "COGVIDEOX_TEXT_ENCODER", "vae": "COGVIDEOX_VAE"},
    {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"},
)
CONTRACT["CogVideoX15SecondGPU"] = (
    "CogVideoX-1.5 Second GPU",
    {"model": "COGVIDEOX_MODEL", "device": "COMBO"},
    {"model": "COGVIDEOX_MODEL"},
)
CONTRACT["CogVideoX15ModelCheck"] = (
    "CogVideoX-1.5 Model Check",
    {"model": "MODEL", "action": "COMBO"},
    {"model": "MODEL", "report": "STRING"},
)
CONTRACT["CogVideoX15SuperResolution"] = (
    "CogVideoX-1.5 Super-Resolution",
    {
        "model": "COGVIDEOX_MODEL",
        "vae": "COGVIDEOX_VAE,VAE",
        "images": "IMAGE",
        "scale": "INT",
        "seed": "INT",
        "text_encoder": "COGVIDEOX_TEXT_ENCODER,CLIP",
        "references": "IMAGE",
        "reference_frames": "STRING",
        "kind": "COMBO",
        "reference_guidance": "FLOAT",
    },
    {"images": "IMAGE"},
)
CONTRACT["CogVideoX15ContextWindows"] = (
    "CogVideoX-1.5 Context Windows",
    {"model": "COGVIDEOX_MODEL", "length": "INT", "overlap": "INT", "blend": "COMBO"},
    {"model": "COGVIDEOX_MODEL"},
)
CONTRACT["CogVideoX15Extend"] = (
    "CogVideoX-1.5 Extend",
    {
        "positive": "CONDITIONING",
        "negative": "CONDITIONING",
        "vae": "COGVIDEOX_VAE,VAE",
        "images": "IMAGE",
        "length": "INT",
        "overlap": "INT",
    },
    {"positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT", "video": "IMAGE", "mask": "MASK"},
)
CONTRACT["CogVideoX15JoinClips"] = (
    "CogVideoX-1.5 Join Clips",
    {"first": "IMAGE", "second": "IMAGE", "overlap": "INT"},
    {"images": "IMAGE"},
)
CONTRACT["CogVideoX15Inpaint"] = (
    "CogVideoX-1.5 Inpaint",
    {
        "positive": "CONDITIONING",
        "negative": "CONDITIONING",
        "vae": "COGVIDEOX_VAE,VAE",
        "width": "INT",
        "height": "INT",
        "length": "INT",
        "batch_size": "INT",
        "video": "IMAGE",
        "mask": "MASK",
        "start_image": "IMAGE",
        "end_image": "IMAGE",
        "noise_aug": "FLOAT",
    },
    {"positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT"},
)
CONTRACT["CogVideoX15Void"] = (
    "CogVideoX-1.5 Object Removal (VOID)",
    {
        "positive": "CONDITIONING",
        "negative": "CONDITIONING",
        "vae": "COGVIDEOX_VAE,VAE",
        "video": "IMAGE",
        "quadmask": "IMAGE,MASK",
        "width": "INT",
        "height": "INT",
        "length": "INT",
        "stage": "COMBO",
    },
    {"positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT"},
)
DEFAULTS = {
    "CogVideoX15ContextWindows": {"length": 161, "overlap": 4, "blend": "linear"},
    "CogVideoX15Extend": {"length": 81, "overlap": 1},
    "CogVideoX15JoinClips": {"overlap": 1},
    "CogVideoX15SuperResolution": {"scale": 4, "reference_frames": "", "kind": "auto", "reference_guidance": 1.0},
    "CogVideoX15Inpaint": {"width": 1008, "height": 576, "length": 85, "batch_size": 1, "noise_aug": 0.0563},
    "CogVideoX15Void": {"width": 672, "height": 384, "length": 85},
    "CogVideoX15Cache": {"method": "teacache", "strength": 0.6, "start": 0.1, "end": 0.95},
    "CogVideoX15Compile": {"mode": "default", "dynamic": False},
    "CogVideoX15Downloader": {"download": False},
    "CogVideoX15ModelLoader": {"dtype": "auto", "on_mismatch": "fix", "scan_weights": False},
    "CogVideoX15ImageToVideo": {"width": 1360, "height": 768, "length": 81, "batch_size": 1},
    "CogVideoX15LoraLoader": {"strength": 1.0},
    "CogVideoX15EmptyLatent": {"width": 1360, "height": 768, "length": 81, "batch_size": 1},
    "CogVideoX15Sampler": {"steps": 50, "cfg": 6.0, "denoise": 1.0, "dynamic_cfg": False, "on_nan": "heal"}
    | {"cfg_start": 0.0, "cfg_end": 1.0},
    "CogVideoX15BlackFrameCheck": {
        "pixel_black_threshold": 0.10,
        "picture_black_ratio": 0.98,
        "video_black_ratio": 1.0,
    },
}
COMBOS = {
    ("CogVideoX15ContextWindows", "blend"): ["linear"],
    ("CogVideoX15Cache", "method"): ["teacache", "first_block", "taylorseer", "pab", "faster_cache"],
    ("CogVideoX15Compile", "mode"): ["default", "max-autotune-no-cudagraphs"],
    ("CogVideoX15ModelLoader", "dtype"): ["auto", "bf16", "fp16", "fp32"],
    ("CogVideoX15ModelLoader", "on_mismatch"): ["fix", "warn", "stop"],
    ("CogVideoX15ModelLoader", "memory"): ["auto", "gpu", "offload_blocks", "offload_layers", "cpu"],
    ("CogVideoX15Quantize", "method"): ["int8_weight_only", "fp8_weight_only", "int8_dynamic", "fp8_dynamic"],
    ("CogVideoX15Sampler", "scheduler"): ["ddim", "dpm", "ddim_origin"],
    ("CogVideoX15Void", "stage"): ["first", "second"],
    ("CogVideoX15Sampler", "on_nan"): ["heal", "stop"],
    ("CogVideoX15BlackFrameCheck", "action"): ["stop", "warn", "pass"],
    ("CogVideoX15ModelCheck", "action"): ["stop", "warn"],
    ("CogVideoX15SuperResolution", "kind"): ["auto", "dove", "sparkvsr"],
}


@pytest.fixture(params=CONTRACT)
def node_id(request):
    return request.param


def test_every_node_is_in_the_contract(pack):
    assert set(pack.NODE_CLASS_MAPPINGS) == set(CONTRACT) == set(pack.NODE_DISPLAY_NAME_MAPPINGS)


def test_ids_sockets_and_their_order_are_the_contracts(pack, node_id):
    node, (name, wanted, outputs) = pack.NODE_CLASS_MAPPINGS[node_id], CONTRACT[node_id]
    assert pack.NODE_DISPLAY_NAME_MAPPINGS[node_id] == name
    kinds = {key: spec[0] if isinstance(spec[0], str) else "COMBO" for key, spec in inputs(node).items()}
    assert list(kinds.items()) == list(wanted.items())
    assert list(zip(node.RETURN_NAMES, node.RETURN_TYPES, strict=True)) == list(outputs.items())
    assert node.CATEGORY == "CogVideoX-1.5"
    assert callable(getattr(node(), node.FUNCTION))
    for key, value in DEFAULTS.get(node_id, {}).items():
        assert inputs(node)[key][1]["default"] == value
    for (owner, key), choices in COMBOS.items():
        if owner == node_id:
            assert inputs(node)[key][0] == choices


def test_every_node_explains_itself(pack, node_id):
    node = pack.NODE_CLASS_MAPPINGS[node_id]
    assert len(node.DESCRIPTION) > 60
    assert len(node.SEARCH_ALIASES) >= 3
    # The page looks for what is typed in names and these alone, whatever its language: 黑屏, 双卡.
    assert any("\u4e00" <= name[0] <= "\u9fff" or "\u4e00" <= name[-1] <= "\u9fff" for name in node.SEARCH_ALIASES)
    assert len(node.OUTPUT_TOOLTIPS) == len(node.RETURN_TYPES)
    assert all(node.OUTPUT_TOOLTIPS)
    for key, spec in inputs(node).items():
        assert len(spec[1]["tooltip"]) > 15, key


@pytest.fixture(scope="module")
def loaded(pack, tiny):
    return call(pack, "CogVideoX15ModelLoader", model=str(tiny), dtype="fp32")


def test_a_prompt_becomes_frames_through_the_nodes(pack, loaded):
    model, text_encoder, vae, report = loaded
    assert "transformer: stored bf16" in report
    (positive,) = call(pack, "CogVideoX15TextEncode", text_encoder=text_encoder, prompt="a panda plays the guitar")
    (negative,) = call(pack, "CogVideoX15TextEncode", text_encoder=text_encoder, prompt="")
    (empty,) = call(pack, "CogVideoX15EmptyLatent", width=80, height=48, length=17, batch_size=2)
    (latent,) = call(
        pack,
        "CogVideoX15Sampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=empty,
        seed=1,
        steps=2,
        cfg=6.0,
        scheduler="ddim",
        denoise=1.0,
    )
    (images,) = call(pack, "CogVideoX15VAEDecode", samples=latent, vae=vae)
    checked, is_black, count, text = call(pack, "CogVideoX15BlackFrameCheck", images=images, action="stop")
    assert positive[0][0].shape == (1, 226, 32)
    assert latent["samples"].shape == empty["samples"].shape == (2, 16, 5, 6, 10)
    assert checked is images
    assert images.shape == (34, 48, 80, 3)
    assert (is_black, count) == (False, 0)
    assert "verdict: ok" in text


def test_the_loader_fixes_warns_or_stops_where_the_dtype_does_not_suit_the_weights(pack, tiny):
    report = call(pack, "CogVideoX15ModelLoader", model=str(tiny), dtype="fp16")[3]
    assert "[mismatch, fixed] transformer" in report
    model, _, _, report = call(pack, "CogVideoX15ModelLoader", model=str(tiny), dtype="fp16", on_mismatch="warn")
    assert "[mismatch] transformer" in report
    assert not model.weights.precision.range_safe
    with pytest.raises(ValueError, match="was trained in bf16"):
        call(pack, "CogVideoX15ModelLoader", model=str(tiny), dtype="fp16", on_mismatch="stop")


def test_the_loader_scans_the_weights_when_asked(pack, tiny):
    assert "no NaN" not in call(pack, "CogVideoX15ModelLoader", model=str(tiny), dtype="auto")[3]
    report = call(pack, "CogVideoX15ModelLoader", model=str(tiny), dtype="auto", scan_weights=True)[3]
    assert report.count("no NaN") == 3


@pytest.fixture
def shown(pack, monkeypatch):
    """What nodes show, themselves and while the engine is at work."""
    told = []
    for module in ("nodes.host", "nodes.host.page"):
        monkeypatch.setattr(sys.modules[f"{pack.__name__}.{module}"], "show", told.append)
    return told


def test_the_sampler_shows_that_it_healed_and_stops_if_told_to(pack, tiny, shown, monkeypatch):
    """NaN from a block in every dtype but fp32, through the nodes."""
    weights = sys.modules[f"{pack.__name__}.cogvideox.weights"]
    real = weights.load_module

    def load(part, precision, *rest):
        module = real(part, precision, *rest)
        if part.kind == "transformer" and precision.name != "fp32":
            module.proj_out.register_forward_hook(lambda _m, _a, output: output * float("nan"))
        return module

    monkeypatch.setattr(weights, "load_module", load)
    model, text_encoder, _, _ = call(pack, "CogVideoX15ModelLoader", model=str(tiny), dtype="bf16")
    (prompt,) = call(pack, "CogVideoX15TextEncode", text_encoder=text_encoder, prompt="a panda")
    (empty,) = call(pack, "CogVideoX15EmptyLatent", width=80, height=48, length=17)
    inputs = dict(
        model=model,
        positive=prompt,
        negative=prompt,
        latent_image=empty,
        seed=1,
        steps=2,
        cfg=6.0,
        scheduler="ddim",
        denoise=1.0,
    )
    (latent,) = call(pack, "CogVideoX15Sampler", **inputs)
    assert latent["samples"].isfinite().all()
    assert shown[-1].startswith("step 1 of 2: the transformer in bf16 gave NaN or Inf; the first module")
    with pytest.raises(RuntimeError, match="step 1 of 2"):
        call(pack, "CogVideoX15Sampler", **inputs, on_nan="stop")


def test_a_black_video_is_stopped_before_it_is_saved(pack):
    with pytest.raises(RuntimeError, match="not passed on to be saved"):
        call(pack, "CogVideoX15BlackFrameCheck", images=torch.full((5, 16, 16, 3), float("nan")), action="stop")
    _, is_black, count, _ = call(pack, "CogVideoX15BlackFrameCheck", images=torch.zeros(5, 16, 16, 3), action="pass")
    assert (is_black, count) == (True, 5)


def test_combined_conditionings_are_refused_with_a_sentence(pack, loaded):
    entry = [torch.zeros(1, 226, 32), {}]
    settings = dict(
        latent_image={"samples": torch.zeros(1, 16, 2, 2, 2)}, seed=1, steps=1, cfg=6.0, scheduler="ddim", denoise=1.0
    )
    with pytest.raises(ValueError, match="2 prompts side by side"):
        call(pack, "CogVideoX15Sampler", model=loaded[0], positive=[entry, entry], negative=[entry], **settings)


class Clip:
    """What ComfyUI's CLIPLoader gives, as far as it is used; ``names`` are the encoders inside."""

    def __init__(self, *names):
        self.loaded, self.patcher = False, SimpleNamespace(load_device="cpu")
        t5 = SimpleNamespace(enable_attention_masks=True, encode=self._encode)
        model = {"reset_clip_options": lambda: None, "set_clip_options": lambda options: None}
        self.cond_stage_model = SimpleNamespace(**model, **dict.fromkeys(names, t5))
        self.tokenizer = SimpleNamespace(**{name: SimpleNamespace(tokenizer=self._tokenize) for name in names})

    def _tokenize(self, prompt, padding, max_length, truncation):
        return {"input_ids": [len(prompt), 1] + [0] * (max_length - 2)}

    def load_model(self):
        self.loaded = True

    def _encode(self, tokens):
        assert self.loaded
        assert not self.cond_stage_model.t5xxl.enable_attention_masks
        return torch.tensor(tokens)[..., None].expand(-1, -1, 4096), None


def test_comfyuis_own_text_encoder_can_be_connected(pack):
    clip = Clip("t5xxl", "clip_l")
    (conditioning,) = call(pack, "CogVideoX15TextEncode", text_encoder=clip, prompt="a cat")
    assert conditioning[0][0].shape == (1, 226, 4096)
    assert conditioning[0][0][0, :3, 0].tolist() == [5, 1, 0]
    assert clip.cond_stage_model.t5xxl.enable_attention_masks  # as it was
    with pytest.raises(ValueError, match="without a T5-XXL"):
        call(pack, "CogVideoX15TextEncode", text_encoder=Clip("clip_l"), prompt="a cat")


def test_the_nodes_for_cores_graphs_say_outside_comfyui_that_they_need_it(pack, loaded):
    with pytest.raises(RuntimeError, match="Run it in ComfyUI"):
        call(pack, "CogVideoX15ToComfyUI", model=loaded[0])
    core = SimpleNamespace(model=None, model_options={}, clone=None)
    with pytest.raises(RuntimeError, match="Run it in ComfyUI"):
        call(pack, "CogVideoX15ModelCheck", model=core)


class CoreVAE:
    """What ComfyUI's Load VAE gives, as far as it is used, around a module."""

    def __init__(self, module):
        self.first_stage_model, self.vae_dtype, self.device = module, torch.float32, "cpu"
        self.decode = self.patcher = None


class AutoencoderKLCogVideoX(torch.nn.Module):
    """Core's class of that name: the same tensors under the same names, and no config."""

    def __init__(self, module):
        super().__init__()
        self._module = module

    def state_dict(self, *_):
        return self._module.state_dict()


def test_cores_vae_is_run_with_its_own_weights_and_another_models_is_refused_by_name(pack):
    torch.manual_seed(0)
    reference = build_vae((32, 32, 32, 32), groups=32).eval()
    core, latent = CoreVAE(AutoencoderKLCogVideoX(reference)), torch.randn(1, 16, 3, 2, 2)

    def decoded():
        return call(pack, "CogVideoX15VAEDecode", samples={"samples": latent}, vae=core)[0]

    with torch.no_grad():
        wanted = reference.decode(latent).sample[0].mul(0.5).add(0.5).clamp(0, 1).permute(1, 2, 3, 0)
        assert (decoded() - wanted).norm() / wanted.norm() < 1e-5
        # The weights are those: what changes them changes the frames.
        reference.decoder.conv_out.conv.bias += 0.5
        assert (decoded() - wanted).abs().max() > 0.1
    with pytest.raises(ValueError, match="another model's .*Linear"):
        call(pack, "CogVideoX15VAEDecode", samples={"samples": latent}, vae=CoreVAE(torch.nn.Linear(1, 1)))


def test_a_note_about_the_prompt_reaches_the_log(pack, loaded, caplog):
    call(pack, "CogVideoX15TextEncode", text_encoder=loaded[1], prompt="一只熊猫在竹林里弹吉他")
    assert "only English" in caplog.text


def test_the_handles_of_one_load_do_not_change_while_they_are_used(pack, loaded):
    """ComfyUI caches node outputs: the same handles must give the same frames in any order, any number of times."""
    _, _, vae, _ = loaded
    latent = {"samples": torch.randn(1, 16, 3, 2, 2)}
    first = call(pack, "CogVideoX15VAEDecode", samples=latent, vae=vae)[0]
    call(pack, "CogVideoX15TextEncode", text_encoder=loaded[1], prompt="x")
    assert torch.equal(first, call(pack, "CogVideoX15VAEDecode", samples=latent, vae=vae)[0])


class TestModelFolders:
    """The model list, with ComfyUI's folders stood in for by two of our own."""

    @pytest.fixture
    def host(self, pack, tmp_path, monkeypatch):
        import sys

        host = sys.modules[f"{pack.__name__}.nodes.host"]
        roots = [tmp_path / "CogVideo", tmp_path / "diffusers"]
        for root in roots:
            root.mkdir()
        monkeypatch.setattr(host.comfyui, "IN_COMFYUI", True)
        monkeypatch.setattr(host.page, "_context", lambda: None)
        folders = {"CogVideo": roots[:1], "diffusers": roots[1:]}
        for name in ("diffusion_models", "checkpoints", "text_encoders", "vae"):
            (tmp_path / name).mkdir()
            folders[name] = [tmp_path / name]
        monkeypatch.setattr(host.folders, "_roots", lambda *names: [root for name in names for root in folders[name]])
        monkeypatch.setattr(host, "tokenizer_folder", lambda: None)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        return host

    def test_folders_are_looked_through_once_for_all_lists_of_the_loader(self, pack, host, tiny, monkeypatch):
        """On a network drive looking takes seconds, and ComfyUI asks for the lists at its start and at each run."""
        module, looked = importlib.import_module(f"{pack.__name__}.cogvideox.checkpoint.catalogue"), []
        shutil.copytree(tiny, host.folders._roots("CogVideo")[0] / "tiny")
        look = module._look
        monkeypatch.setattr(module, "_look", lambda root: looked.append(root.name) or look(root))
        loader = pack.NODE_CLASS_MAPPINGS["CogVideoX15ModelLoader"]
        assert loader.INPUT_TYPES()["required"]["model"][0]
        assert len(looked) == len(set(looked))
        looked.clear()
        assert loader.objections({"dtype": "bf16"}) == {}
        assert len(looked) == len(set(looked))

    def test_only_real_cogvideox_checkpoints_are_listed_and_each_once(self, pack, host, tiny):
        ours, diffusers = host.folders._roots("CogVideo", "diffusers")
        for place in (ours / "tiny", diffusers / "tiny"):
            shutil.copytree(tiny, place)
        (diffusers / "other").symlink_to(tiny)
        flux = diffusers / "flux" / "transformer"
        flux.mkdir(parents=True)
        (flux / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
        (ours / "notes.txt").write_text("x")
        what = "CogVideoX1.5 (custom size: 2 layers x 2 heads) · bf16 · diffusers"
        assert [entry.label for entry in host.checkpoints()] == [f"tiny · {what}", f"other · {what}"]
        assert host.checkpoint_path("tiny").parent.name == "CogVideo"
        assert host.checkpoint_path("tiny · what it was before") == host.checkpoint_path("tiny")
        assert pack.NODE_CLASS_MAPPINGS["CogVideoX15ModelLoader"].INPUT_TYPES()["required"]["model"][0] == [
            f"tiny · {what}",
            f"other · {what}",
        ]

    def test_an_empty_model_folder_says_what_to_download_and_where(self, pack, host):
        said = pack.NODE_CLASS_MAPPINGS["CogVideoX15ModelLoader"].VALIDATE_INPUTS(model="CogVideoX1.5-5B")
        assert "zai-org/CogVideoX1.5-5B" in said
        assert "CogVideoX-1.5 Downloader" in said
        for root in host.folders._roots("CogVideo", "diffusers", "diffusion_models", "checkpoints"):
            assert str(root) in said

    def test_a_checkpoint_that_is_gone_names_those_that_are_there(self, pack, host, tiny):
        shutil.copytree(tiny, host.folders._roots("CogVideo", "diffusers")[0] / "tiny")
        loader = pack.NODE_CLASS_MAPPINGS["CogVideoX15ModelLoader"]
        assert "tiny" in loader.VALIDATE_INPUTS(model="CogVideoX1.5-5B")
        # What else a list says of a file is no part of its name.
        said = loader.VALIDATE_INPUTS(model="CogVideoX1.5-5B · bf16 · diffusers")
        assert "called 'CogVideoX1.5-5B' in" in said
        assert "put CogVideoX1.5-5B there" in said
        said = loader.VALIDATE_INPUTS(text_encoder_name="t5xxl.safetensors · fp16")
        assert "called 't5xxl.safetensors' in" in said
        assert loader.VALIDATE_INPUTS(model="tiny") is True

    @pytest.mark.parametrize("action", ["warn", "stop"])
    def test_a_picture_that_cannot_be_saved_takes_nothing_along(
        self, pack, host, tmp_path, monkeypatch, action, caplog
    ):
        """The sheet of black frames, where the disk of ComfyUI's temp folder is full."""
        (tmp_path / "temp").write_text("no folder")
        paths = SimpleNamespace(get_temp_directory=lambda: str(tmp_path / "temp"))
        monkeypatch.setattr(host.comfyui, "folder_paths", paths, raising=False)
        monkeypatch.setattr(host, "NodeEvents", Events)
        black = dict(images=torch.zeros(2, 16, 16, 3), action=action)
        if action == "stop":
            with pytest.raises(RuntimeError, match="The video is black"):
                call(pack, "CogVideoX15BlackFrameCheck", **black)
        else:
            assert call(pack, "CogVideoX15BlackFrameCheck", **black)[1] is True
        assert "could not be saved" in caplog.text

    def test_a_changed_file_is_noticed(self, pack, host, tiny):
        folder = shutil.copytree(tiny, host.folders._roots("CogVideo", "diffusers")[0] / "tiny")
        loader = pack.NODE_CLASS_MAPPINGS["CogVideoX15ModelLoader"]
        before = loader.IS_CHANGED(model="tiny", dtype="auto")
        assert loader.IS_CHANGED(model="tiny", dtype="auto") == before
        os.utime(folder / "vae" / "config.json", (1, 1))
        assert loader.IS_CHANGED(model="tiny", dtype="auto") != before

    def test_single_files_in_models_checkpoints_and_the_hugging_face_cache_are_listed(self, host, tiny, tmp_path):
        state = load_transformer(tiny)
        save_file(state, tmp_path / "checkpoints" / "cog.safetensors")
        shutil.copytree(tiny, tmp_path / "hub" / "models--zai-org--CogVideoX1.5-5B" / "snapshots" / "abc")
        assert [entry.name for entry in host.checkpoints()] == ["zai-org/CogVideoX1.5-5B", "cog.safetensors"]
        assert host.checkpoint_path("zai-org/CogVideoX1.5-5B") == tmp_path / "hub" / "models--zai-org--CogVideoX1.5-5B"

    def test_auto_takes_a_part_that_is_found_where_the_checkpoints_own_is_not_whole(
        self, pack, host, tiny, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(host, "hardware", lambda *_: CPU)
        monkeypatch.setattr(host, "show", lambda text: None)
        folder = shutil.copytree(tiny, host.folders._roots("CogVideo")[0] / "tiny")
        weights = next((folder / "vae").glob("*.safetensors"))
        file = weights.rename(tmp_path / "away.safetensors")
        graph = {"2": {"class_type": "CogVideoX15VAEDecode", "inputs": {"vae": ["1", 2], "samples": ["3", 0]}}}
        loader = {"model": "tiny", "dtype": "fp32", "unique_id": "1"}
        assert "[incomplete] VAE: " in call(pack, "CogVideoX15ModelLoader", **loader)[3]
        # Nothing that the graph is to make needs it; or the video will be decoded by it.
        assert call(pack, "CogVideoX15ModelLoader", **loader, prompt={"2": {"inputs": {"text_encoder": ["1", 1]}}})[0]
        with pytest.raises(ValueError, match="should hold the VAE's weights"):
            call(pack, "CogVideoX15ModelLoader", **loader, prompt=graph)
        build_vae((32, 32, 32, 64), 32).save_pretrained(tmp_path / "other")
        shutil.copy(
            tmp_path / "other" / "diffusion_pytorch_model.safetensors", tmp_path / "vae" / "cog_vae.safetensors"
        )
        _, _, vae, report = call(pack, "CogVideoX15ModelLoader", **loader, prompt=graph)
        assert vae.weights.part.source == tmp_path / "vae" / "cog_vae.safetensors"
        assert "VAE: the checkpoint's own cannot be used (" in report
        assert "so cog_vae.safetensors" in report
        shutil.copy(file, weights)
        assert call(pack, "CogVideoX15ModelLoader", **loader, prompt=graph)[2].weights.part.source == folder / "vae"


def load_transformer(checkpoint):
    """The weights of a checkpoint's transformer, by their names."""
    return {
        name: value
        for file in (checkpoint / "transformer").glob("*.safetensors")
        for name, value in load_file(file).items()
    }

    @pytest.fixture
    def parts(self, host, tmp_path, monkeypatch):
        """A transformer alone, and in the folders of text encoders several that go with it and several that do not, by
        their names."""
        _, modules = layouts.build_modules(tmp_path / "whole")
        layouts.write_file(tmp_path / "diffusion_models" / "cog.safetensors", modules["transformer"].state_dict())
        layouts.write_file(tmp_path / "vae" / "cog_vae.safetensors", modules["vae"].state_dict())
        state = {
            name: value for name, value in modules["text_encoder"].state_dict().items() if "embed_tokens" not in name
        }
        umt5 = state | {
            "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": torch.ones(32, 2),
            "spiece_model": torch.ones(99999),
        }
        fp8 = {name: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for name, value in state.items()}
        files = {
            "a_fp8.safetensors": fp8,
            "b_bf16.safetensors": {name: value.bfloat16() for name, value in state.items()},
            # Larger than all others, for a decoder that is not used.
            "c_whole_fp8.safetensors": fp8 | {"decoder.final_layer_norm.weight": torch.ones(99999)},
            "umt5_xxl.safetensors": umt5,
            "wide.safetensors": build_text_encoder(width=48).state_dict(),
        }
        for name, tensors in files.items():
            layouts.write_file(tmp_path / "text_encoders" / name, tensors)
        monkeypatch.setattr(host, "hardware", lambda *_: CPU)
        monkeypatch.setattr(host, "show", lambda text: None)
        return tmp_path

    def test_auto_takes_the_most_exact_part_that_goes_with_the_checkpoint_and_says_so(self, pack, host, parts):
        assert [entry.name for entry in host.parts("text_encoder")] == [
            "b_bf16.safetensors",
            "a_fp8.safetensors",
            "c_whole_fp8.safetensors",
        ]
        _, text_encoder, vae, report = call(pack, "CogVideoX15ModelLoader", model="cog.safetensors", dtype="fp32")
        assert text_encoder.weights.part.source.name == "b_bf16.safetensors"
        assert vae.weights.part.source.name == "cog_vae.safetensors"
        said = (
            "text encoder: the checkpoint has none, so b_bf16.safetensors · T5 encoder · bf16 · single file is used, "
            "the most exact of those that go"
        )
        assert f"{said} with it (the others: a_fp8.safetensors, c_whole_fp8.safetensors)." in report

    def test_auto_takes_flan_t5_last_whatever_its_dtype_and_says_what_it_is(self, pack, host, parts):
        folder = parts / "text_encoders"
        state = load_file(folder / "b_bf16.safetensors")
        layouts.write_file(
            folder / "t5xxl_flan_fp32.safetensors", {name: value.float() for name, value in state.items()}
        )
        assert [entry.name for entry in host.parts("text_encoder")][-1] == "t5xxl_flan_fp32.safetensors"
        for file in folder.glob("[a-c]_*.safetensors"):
            file.unlink()
        report = call(pack, "CogVideoX15ModelLoader", model="cog.safetensors", dtype="fp32")[3]
        assert "so t5xxl_flan_fp32.safetensors · T5 encoder · fp32 · single file is used" in report
        assert "t5xxl_flan_fp32.safetensors is Flan-T5 by its name" in report

    def test_auto_finds_a_text_encoder_with_a_config_beside_it(self, pack, host, parts):
        folder = parts / "text_encoders"
        for file in folder.glob("*.safetensors"):
            file.unlink()
        build_text_encoder().save_pretrained(folder / "t5-v1_1-xxl-encoder-bf16")
        text_encoder = call(pack, "CogVideoX15ModelLoader", model="cog.safetensors", dtype="fp32")[1]
        assert text_encoder.weights.part.source == folder / "t5-v1_1-xxl-encoder-bf16"

    def test_where_none_goes_with_it_auto_takes_none_and_says_so(self, pack, host, parts):
        for file in (parts / "text_encoders").glob("*.safetensors"):
            if file.name != "wide.safetensors":
                file.unlink()
        # Another checkpoint reads it, so it is offered.
        folder = build_checkpoint(
            parts / "CogVideo" / "other",
            change=lambda built: built.update(transformer=build_transformer(text_embed_dim=48)),
        )
        shutil.rmtree(folder / "text_encoder")
        assert [entry.name for entry in host.parts("text_encoder")] == ["wide.safetensors"]
        report = call(pack, "CogVideoX15ModelLoader", model="cog.safetensors", dtype="fp32")[3]
        assert "text encoder: the checkpoint has none, and none that is here goes with it (wide.safetensors" in report
        assert "wide.safetensors · T5 encoder" in call(pack, "CogVideoX15ModelLoader", model="other", dtype="fp32")[3]

    def test_what_is_not_offered_says_why_when_it_is_asked_for(self, pack, host, parts):
        loader = pack.NODE_CLASS_MAPPINGS["CogVideoX15ModelLoader"]
        assert "UMT5" in loader.VALIDATE_INPUTS(
            model="cog.safetensors", text_encoder_name="umt5_xxl.safetensors · T5 encoder · fp32 · single file"
        )
        layouts.write_file(
            parts / "diffusion_models" / "fun.safetensors", build_transformer(in_channels=64).state_dict()
        )
        assert "three more latent videos" in loader.VALIDATE_INPUTS(model="fun.safetensors")
        assert "text_encoder for" not in loader.VALIDATE_INPUTS(
            model="cog.safetensors", text_encoder_name="gone.safetensors"
        )
        with pytest.raises(ValueError, match="gives 48 numbers a token.* reads 32"):
            call(
                pack,
                "CogVideoX15ModelLoader",
                model="cog.safetensors",
                dtype="fp32",
                text_encoder_name="wide.safetensors",
            )


class TestImagesVideosAndLoras:
    @pytest.fixture(scope="class")
    def image_model(self, pack, checkpoints):
        return call(pack, "CogVideoX15ModelLoader", model=str(checkpoints("1.5-i2v")), dtype="fp32")

    def settings(self, **changes):
        return dict(seed=1, steps=2, cfg=6.0, scheduler="ddim", denoise=1.0) | changes

    def test_an_image_becomes_a_video(self, pack, image_model):
        model, text_encoder, vae, _ = image_model
        (prompt,) = call(pack, "CogVideoX15TextEncode", text_encoder=text_encoder, prompt="it moves")
        sizes = dict(width=80, height=48, length=17, batch_size=2)
        images = torch.rand(3, 60, 60, 3)
        positive, negative, latent = call(
            pack, "CogVideoX15ImageToVideo", positive=prompt, negative=prompt, vae=vae, start_image=images, **sizes
        )
        assert latent["samples"].shape == (2, 16, 5, 6, 10)
        assert not latent["samples"].any()
        image = positive[0][1]["concat_latent_image"]
        assert torch.equal(image, negative[0][1]["concat_latent_image"])
        assert image[:, :, 0].any()
        assert not image[:, :, 1:].any()
        # The conditioning that came in is not changed, and the first image is the one that counts.
        assert "concat_latent_image" not in prompt[0][1]
        other, _, _ = call(
            pack, "CogVideoX15ImageToVideo", positive=prompt, negative=prompt, vae=vae, start_image=images[:1], **sizes
        )
        assert torch.equal(other[0][1]["concat_latent_image"], image)
        (sampled,) = call(
            pack,
            "CogVideoX15Sampler",
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
            **self.settings(),
        )
        assert sampled["samples"].shape == (2, 16, 5, 6, 10)
        # A negative prompt that did not pass through the node takes the positive one's image.
        (again,) = call(
            pack,
            "CogVideoX15Sampler",
            model=model,
            positive=positive,
            negative=prompt,
            latent_image=latent,
            **self.settings(),
        )
        assert torch.equal(again["samples"], sampled["samples"])

    def test_two_different_start_images_are_refused(self, pack, image_model):
        model, _, vae, _ = image_model
        prompt, sizes = [[torch.zeros(1, 226, 32), {}]], dict(width=80, height=48, length=17, batch_size=1)
        made = [
            call(
                pack,
                "CogVideoX15ImageToVideo",
                positive=prompt,
                negative=prompt,
                vae=vae,
                start_image=torch.full((1, 48, 80, 3), level),
                **sizes,
            )
            for level in (0.2, 0.8)
        ]
        inputs = dict(positive=made[0][0], negative=made[1][1], latent_image=made[0][2])
        with pytest.raises(ValueError, match="different start images"):
            call(pack, "CogVideoX15Sampler", model=model, **inputs, **self.settings())

    @pytest.mark.parametrize(
        ("image", "said"),
        [
            (torch.rand(1, 8, 8, 4), "alpha"),
            (torch.rand(1, 8, 8, 1), "grey"),
            (torch.full((1, 8, 8, 3), torch.nan), "NaN"),
            (torch.full((1, 8, 8, 3), 9.0), "0 to 1"),
        ],
    )
    def test_what_is_no_image_is_refused_before_the_vae_is_read(self, pack, checkpoints, image, said):
        vae = call(pack, "CogVideoX15ModelLoader", model=str(checkpoints("1.5-i2v")), dtype="fp32")[2]
        prompt = [[torch.zeros(1, 226, 32), {}]]
        with pytest.raises(ValueError, match=said):
            call(
                pack,
                "CogVideoX15ImageToVideo",
                positive=prompt,
                negative=prompt,
                vae=vae,
                start_image=image,
                width=80,
                height=48,
                length=17,
                batch_size=1,
            )
        assert not vae.weights.is_loaded

    def test_a_video_becomes_latents_and_what_was_changed_is_said(self, pack, loaded, shown, caplog):
        (latent,) = call(pack, "CogVideoX15VAEEncode", images=torch.rand(20, 50, 70, 3), vae=loaded[2])
        assert latent["samples"].shape == (1, 16, 5, 6, 8)
        assert "cropped to 64x48" in shown[0]
        assert "the last 3 were cut: 17 are left" in shown[0]
        assert "the last 3 were cut" in caplog.text
        (fitting,) = call(pack, "CogVideoX15VAEEncode", images=torch.rand(17, 48, 64, 3), vae=loaded[2])
        assert len(shown) == 1
        assert fitting["samples"].shape == (1, 16, 5, 6, 8)

    def test_a_cache_changes_its_own_branch_only_and_says_what_it_skipped(self, pack, loaded, shown):
        said = shown
        model, text_encoder, *_ = loaded
        (cached,) = call(pack, "CogVideoX15Cache", model=model, method="pab", strength=0.5, start=0.0, end=1.0)
        assert "50% of the attention of the block evaluations between 0% and 100% of the steps" in said[-1]
        assert "cache" in said[-1].splitlines()[1]
        (prompt,) = call(pack, "CogVideoX15TextEncode", text_encoder=text_encoder, prompt="a panda")
        inputs = dict(positive=prompt, negative=prompt, latent_image={"samples": torch.zeros(1, 16, 4, 6, 10)})
        plain, ours, again = (
            call(pack, "CogVideoX15Sampler", model=m, **inputs, **self.settings())[0]["samples"]
            for m in (model, cached, model)
        )
        assert torch.equal(plain, again)
        assert not torch.equal(plain, ours)
        assert any(text.startswith("PAB skipped the attention of") for text in said)

    def test_choices_that_do_not_work_together_are_refused_before_a_weight_is_read(self, pack, tiny):
        model, *_ = call(pack, "CogVideoX15ModelLoader", model=str(tiny), dtype="fp32")
        (compiled,) = call(pack, "CogVideoX15Compile", model=model, mode="default")
        with pytest.raises(ValueError, match="pab and compiling do not work together"):
            call(pack, "CogVideoX15Cache", model=compiled, method="pab")
        assert not model.weights.is_loaded

    def test_a_lora_changes_its_own_branch_only(self, pack, loaded, tmp_path, tiny):
        path = tmp_path / "lora.safetensors"
        name = "transformer.transformer_blocks.0.attn1.to_out.0"
        save_file({f"{name}.lora_A.weight": torch.randn(2, 128), f"{name}.lora_B.weight": torch.randn(128, 2)}, path)
        model, text_encoder, *_ = loaded
        (changed,) = call(pack, "CogVideoX15LoraLoader", model=model, lora_name=str(path), strength=0.5)
        (prompt,) = call(pack, "CogVideoX15TextEncode", text_encoder=text_encoder, prompt="a panda")
        inputs = dict(positive=prompt, negative=prompt, latent_image={"samples": torch.zeros(1, 16, 4, 6, 10)})
        results = [
            call(pack, "CogVideoX15Sampler", model=m, **inputs, **self.settings())[0]["samples"]
            for m in (model, changed, model)
        ]
        assert torch.equal(results[0], results[2])
        assert not torch.equal(results[0], results[1])
        node = pack.NODE_CLASS_MAPPINGS["CogVideoX15LoraLoader"]
        before = node.IS_CHANGED(lora_name=str(path))
        os.utime(path, (1, 1))
        assert node.IS_CHANGED(lora_name=str(path)) != before


def test_bad_widgets_are_refused_with_the_engines_sentences_and_linked_ones_left_to_the_run(pack):
    nodes = pack.NODE_CLASS_MAPPINGS
    assert nodes["CogVideoX15EmptyLatent"].VALIDATE_INPUTS(width=160, height=96, length=17, batch_size=1) is True
    assert nodes["CogVideoX15EmptyLatent"].VALIDATE_INPUTS() is True
    said = nodes["CogVideoX15EmptyLatent"].VALIDATE_INPUTS(width=100, length=80)
    assert "Set it to 96 or 112" in said
    assert "Set it to 65 or 81" in said
    assert nodes["CogVideoX15ImageToVideo"].VALIDATE_INPUTS(length=49) is True
    assert "Set it to 49 or 65" in nodes["CogVideoX15ImageToVideo"].VALIDATE_INPUTS(length=50)
    sampler = nodes["CogVideoX15Sampler"]
    assert sampler.VALIDATE_INPUTS(steps=50, cfg=6.0, scheduler="ddim", denoise=1.0, on_nan="heal") is True
    assert "leaves no step" in sampler.VALIDATE_INPUTS(steps=5, denoise=0.1)
    assert "guidance begins at 1" in sampler.VALIDATE_INPUTS(cfg=0.5)
    assert "no step would be guided" in sampler.VALIDATE_INPUTS(cfg_start=0.8, cfg_end=0.8)
    assert "no step would be guided" in sampler.VALIDATE_INPUTS(cfg=6.0, cfg_start=0.0, cfg_end=0.0)
    assert sampler.VALIDATE_INPUTS(cfg=1.0, cfg_start=0.0, cfg_end=0.0) is True
    assert sampler.VALIDATE_INPUTS(cfg_start=0.2, cfg_end=0.8) is True
    between = dict(cfg_start=0.51, cfg_end=0.7, denoise=1.0, cfg=6.0)
    assert "none of 4 steps lies between" in sampler.VALIDATE_INPUTS(steps=4, **between)
    assert sampler.VALIDATE_INPUTS(steps=10, **between) is True
    assert sampler.VALIDATE_INPUTS(steps=4, **between | {"cfg": 1.0}) is True
    assert "Choose one of ddim, dpm" in sampler.VALIDATE_INPUTS(scheduler="euler")
    assert "between 0 and 1" in nodes["CogVideoX15BlackFrameCheck"].VALIDATE_INPUTS(video_black_ratio=1.5)
    assert "No LoRA is chosen" in nodes["CogVideoX15LoraLoader"].VALIDATE_INPUTS(lora_name="")


class TestExampleClip:
    """The clip of the examples, in ComfyUI's input folder."""

    @pytest.fixture
    def bring(self, pack, tmp_path, monkeypatch):
        host = sys.modules[f"{pack.__name__}.nodes.host"]
        folders = SimpleNamespace(get_input_directory=lambda: str(tmp_path / "input"))
        monkeypatch.setattr(host.comfyui, "IN_COMFYUI", True)
        monkeypatch.setattr(host.comfyui, "folder_paths", folders, raising=False)
        return host.bring_example_clip

    def test_it_is_copied_where_it_is_missing(self, bring, tmp_path):
        bring()
        assert (tmp_path / "input" / CLIP.name).read_bytes() == CLIP.read_bytes()
        assert len(list((tmp_path / "input").iterdir())) == 1

    def test_a_file_of_the_users_stays(self, bring, tmp_path):
        (tmp_path / "input").mkdir()
        (tmp_path / "input" / CLIP.name).write_bytes(b"theirs")
        bring()
        assert (tmp_path / "input" / CLIP.name).read_bytes() == b"theirs"

    def test_a_folder_that_cannot_be_written_does_not_stop_comfyui(self, bring, tmp_path):
        (tmp_path / "input").write_text("not a folder")
        bring()
        assert (tmp_path / "input").read_text() == "not a folder"
