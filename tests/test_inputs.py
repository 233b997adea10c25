"""Whatever comes in at a node's sockets and widgets: it works, or one sentence names the node, the socket, what came
and what to connect."""

import inspect
import math
import sys
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers import call, inputs

nan, inf = math.nan, math.inf


@pytest.fixture(scope="module")
def loaded(pack, tiny):
    return dict(
        zip(
            ("model", "text_encoder", "vae"),
            call(pack, "CogVideoX15ModelLoader", model=str(tiny), dtype="fp32"),
            strict=False,
        )
    )


@pytest.fixture(scope="module")
def good(pack, loaded):
    """Arguments with which every node runs, by the names of its inputs."""
    entry = [torch.full((1, 226, 32), 0.1), {}]
    sizes = dict(width=16, height=16, length=1, batch_size=1)
    settings = dict(
        seed=1,
        steps=1,
        cfg=6.0,
        scheduler="ddim",
        denoise=1.0,
        prompt="a panda",
        action="pass",
        download=False,
        attention="auto",
    )
    pictures = dict.fromkeys(("images", "start_image", "video"), torch.full((1, 16, 16, 3), 0.5))
    pictures["quadmask"] = torch.full((1, 16, 16), 0.5)
    latents = {name: {"samples": torch.full((1, 16, 1, 2, 2), 0.3)} for name in ("samples", "latent_image")}
    return {**loaded, **sizes, **settings, **pictures, **latents, "positive": [entry], "negative": [entry]}


def arguments(pack, node_id, good):
    """What a node needs; of choices that are not in ``good`` the default or the first."""
    found = {}
    for name, spec in pack.NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()["required"].items():
        found[name] = good.get(
            name, spec[1].get("default", next(iter(spec[0]), None) if isinstance(spec[0], list) else None)
        )
    if node_id == "CogVideoX15ModelLoader":
        found["model"] = "a checkpoint"
    if node_id == "CogVideoX15LoraLoader":
        found["lora_name"] = "a LoRA"
    if node_id in ("CogVideoX15ContextWindows", "CogVideoX15Extend"):
        # What is one frame elsewhere is longer here.
        found["length"] = 81
    if node_id == "CogVideoX15JoinClips":
        found["first"] = found["second"] = good["images"]
    if node_id == "CogVideoX15ModelCheck":
        # As far as a node looks at core's MODEL before it knows it.
        found["model"] = SimpleNamespace(model=None, model_options={}, clone=None)
    return found


def refused(pack, node_id, said, **values):
    """The sentence with which a node refuses these values."""
    with pytest.raises(ValueError) as caught:
        call(pack, node_id, **values)
    text = str(caught.value)
    assert all(words in text for words in (said if isinstance(said, tuple) else (said,))), text
    assert 40 <= len(text) < 900
    assert text.isprintable()
    return text


def every_input(pack, kinds):
    return [
        (node_id, name)
        for node_id, node in pack.NODE_CLASS_MAPPINGS.items()
        for name, spec in inputs(node).items()
        if kind_of(spec) in kinds
    ]


def kind_of(spec):
    return spec[0] if isinstance(spec[0], str) else "COMBO"


SOCKETS = (
    "COGVIDEOX_MODEL",
    "COGVIDEOX_TEXT_ENCODER",
    "COGVIDEOX_TEXT_ENCODER,CLIP",
    "COGVIDEOX_VAE",
    "COGVIDEOX_VAE,VAE",
    "MODEL",
    "LATENT",
    "CONDITIONING",
    "IMAGE",
    "MASK",
    "IMAGE,MASK",
)
#: By type of a widget, values that are none of it.
WRONG = {
    "INT": ("16", 1.5, True, nan, inf, -inf, [16], {}, b"16", object(), 1j, 10**400, np.array([1, 2]), torch.tensor(3)),
    "FLOAT": ("0.5", True, nan, inf, [0.5], (), object(), 1j, 10**400, np.float32("nan"), torch.tensor(0.5)),
    "STRING": (3, True, ["a"], b"a prompt", object(), "half a letter \ud800", "a" * 2_000_000, np.str_),
    "BOOLEAN": ("false", 0, 1, 0.0, [], "", object(), np.array([True, False])),
    "COMBO": (3, True, ["auto"], ("auto",), {}, b"auto", object()),
}


def test_every_type_that_a_node_declares_is_checked(pack):
    module = sys.modules[f"{pack.__name__}.nodes.inputs"]
    kinds = {kind_of(spec) for node in pack.NODE_CLASS_MAPPINGS.values() for spec in inputs(node).values()}
    assert kinds <= set(module._READERS) == set(module._WANTED)
    assert kinds == {*SOCKETS, *WRONG}


def test_every_node_refuses_other_things_at_its_sockets(pack, good, loaded):
    checked, fitting = 0, {"COGVIDEOX_TEXT_ENCODER,CLIP": "text_encoder", "COGVIDEOX_VAE,VAE": "vae", "MODEL": ""}
    for node_id, name in every_input(pack, SOCKETS):
        kind = kind_of(inputs(pack.NODE_CLASS_MAPPINGS[node_id])[name])
        wrong = [
            3,
            "a text",
            {},
            [],
            object(),
            np.ones((1, 16, 16, 3)),
            torch.nn.Linear(1, 1),
            [[]],
            [[torch.ones(1, 226, 32)]],
            {"waveform": 1},
        ]
        wrong += [loaded[part] for part in loaded if part != fitting.get(kind, kind.split("_", 1)[-1].lower())]
        for value in wrong:
            refused(
                pack,
                node_id,
                (pack.NODE_CLASS_MAPPINGS[node_id].DISPLAY_NAME, f"{name} ", "onnect"),
                **{**arguments(pack, node_id, good), name: value},
            )
            checked += 1
    assert checked > 200


@pytest.mark.parametrize("kind", WRONG)
def test_every_node_refuses_other_things_in_its_widgets_when_queued_and_when_run(pack, good, kind):
    for node_id, name in every_input(pack, (kind,)):
        node = pack.NODE_CLASS_MAPPINGS[node_id]
        for value in WRONG[kind]:
            refused(pack, node_id, (node.DISPLAY_NAME, name), **{**arguments(pack, node_id, good), name: value})
            if hasattr(node, "VALIDATE_INPUTS") and name in inspect.signature(node.VALIDATE_INPUTS).parameters:
                assert f"{node.DISPLAY_NAME}: {name} " in node.VALIDATE_INPUTS(**{name: value})
            if hasattr(node, "IS_CHANGED"):
                node.IS_CHANGED(**{**arguments(pack, node_id, good), name: value})


def test_every_node_refuses_a_choice_that_it_does_not_have_when_queued_and_when_run(pack, good):
    for node_id, name in every_input(pack, ("COMBO",)):
        node = pack.NODE_CLASS_MAPPINGS[node_id]
        for value in ("nothing of the kind", "é\x00", "a" * 5000, "../../no/such/file", "/nowhere/at/all", "nul\u202e"):
            given = {**arguments(pack, node_id, good), name: value}
            with pytest.raises((ValueError, RuntimeError)) as caught:
                call(pack, node_id, **given)
            assert 40 <= len(str(caught.value)) < 900, (node_id, name)
            if hasattr(node, "VALIDATE_INPUTS") and name in inspect.signature(node.VALIDATE_INPUTS).parameters:
                assert isinstance(node.VALIDATE_INPUTS(**{name: value}), str), (node_id, name)
            if hasattr(node, "IS_CHANGED"):
                node.IS_CHANGED(**given)


def test_numbers_beyond_a_widgets_limits_are_refused(pack, good):
    """A link brings them past ComfyUI's own look."""
    for node_id, name in every_input(pack, ("INT", "FLOAT")):
        kind, options = inputs(pack.NODE_CLASS_MAPPINGS[node_id])[name][:2]
        for value in (options["min"] - 1, options["max"] + 1, 10**30 if kind == "INT" else 1e30):
            refused(
                pack,
                node_id,
                (name, "beyond its limits", str(options["max"])),
                **{**arguments(pack, node_id, good), name: value},
            )


def test_what_is_missing_is_named_and_what_is_unknown_too(pack, good):
    for node_id, node in pack.NODE_CLASS_MAPPINGS.items():
        given = arguments(pack, node_id, good)
        for name in given:
            refused(pack, node_id, (node.DISPLAY_NAME, f"nothing comes in at {name}"), **{**given, name: None})
        refused(pack, node_id, ("no input called colour", "It has"), **given, colour=3)
    refused(pack, "CogVideoX15Sampler", "nothing comes in at model")
    refused(
        pack, "CogVideoX15TextEncode", "CogVideoX-1.5 Quantize gives one only if", text_encoder=None, prompt="a panda"
    )


def test_what_is_optional_may_be_none(pack, good):
    (latent,) = call(
        pack, "CogVideoX15Sampler", **arguments(pack, "CogVideoX15Sampler", good), dynamic_cfg=None, on_nan=None
    )
    assert latent["samples"].isfinite().all()
    assert (
        len(call(pack, "CogVideoX15ImageToVideo", **arguments(pack, "CogVideoX15ImageToVideo", good), end_image=None))
        == 3
    )


def test_a_seed_may_be_any_whole_number_of_64_bits(pack, good, monkeypatch):
    seeds = []
    monkeypatch.setattr(
        sys.modules[f"{pack.__name__}.cogvideox.sampling"], "sample", lambda *_, seed, **__: seeds.append(seed)
    )
    for seed in (2**64 - 1, 2**63 + 1, np.uint64(2**64 - 1), 2**53 + 1):
        call(pack, "CogVideoX15Sampler", **{**arguments(pack, "CogVideoX15Sampler", good), "seed": seed})
    assert seeds == [2**64 - 1, 2**63 + 1, 2**64 - 1, 2**53 + 1]


@pytest.mark.parametrize("number", [int, float, np.int64, np.float32, np.uint16, Fraction])
def test_whole_numbers_of_any_library_are_taken(pack, number):
    (latent,) = call(
        pack, "CogVideoX15EmptyLatent", width=number(32), height=number(16), length=number(17), batch_size=number(2)
    )
    assert latent["samples"].shape == (2, 16, 5, 2, 4)


class TestTensors:
    """Each kind of tensor that other nodes and scripts make."""

    def bad(self, shape):
        plain = torch.full(shape, 0.5)
        freed = plain.clone()
        freed.untyped_storage().resize_(0)
        fp8 = plain.to(torch.float8_e4m3fn)
        return {
            "meta device": torch.empty(shape, device="meta"),
            "sparse_coo": plain.to_sparse(),
            "complex64": plain.to(torch.complex64),
            "float8_e4m3fn": fp8,
            "int64": plain.long(),
            "uint8": plain.to(torch.uint8),
            "bool": plain.bool(),
            "quint8": torch.quantize_per_tensor(plain, 0.1, 0, torch.quint8),
            "nested": torch.nested.nested_tensor([plain, plain[:0]]),
            "freed": freed,
            "no tensor" if len(shape) != 4 else "NumPy array (float32 [1, 16, 16, 3])": plain.numpy(),
            "list": plain.tolist(),
            "B of memory": torch.full([1] * len(shape), 0.5).expand(2**46, *shape[1:]),
        }

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_what_cannot_be_read_as_numbers_is_refused_at_each_socket(self, pack, good):
        for said, images in self.bad((1, 16, 16, 3)).items():
            for node_id, name in every_input(pack, ("IMAGE",)):
                refused(pack, node_id, (name, said, "onnect"), **{**arguments(pack, node_id, good), name: images})
        for said, embeddings in self.bad((1, 226, 32)).items():
            for node_id, name in every_input(pack, ("CONDITIONING",)):
                given = {**arguments(pack, node_id, good), name: [[embeddings, {}]]}
                refused(pack, node_id, (name, said, "CogVideoX-1.5 Text Encode"), **given)
        for said, samples in self.bad((1, 16, 1, 2, 2)).items():
            for node_id, name in every_input(pack, ("LATENT",)):
                given = {**arguments(pack, node_id, good), name: {"samples": samples}}
                refused(pack, node_id, (name, said, "LATENT"), **given)

    def test_pixels_from_0_to_255_are_told_what_to_be_divided_by(self, pack, good):
        refused(
            pack,
            "CogVideoX15BlackFrameCheck",
            "255 by 255",
            images=torch.full((1, 16, 16, 3), 200, dtype=torch.uint8),
            action="pass",
        )

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ({}, "an empty dictionary"),
            ({"a": 1, "b": 2}, "a dictionary (with a, b)"),
            ({"samples": 1}, "a LATENT (with samples)"),
            ({"waveform": 1}, "an AUDIO (with waveform)"),
            ([[torch.ones(1), {}]], "a CONDITIONING"),
            ([[torch.ones(1), {}, 3]], "a list of 1"),
            ([], "a list of 0"),
            ("x", "the text 'x'"),
            (5, "5"),
            (True, "True"),
            (SimpleNamespace(), "a SimpleNamespace"),
        ],
    )
    def test_what_came_is_said_as_a_person_sees_it(self, pack, good, value, said):
        given = {**arguments(pack, "CogVideoX15VAEEncode", good), "vae": value}
        refused(pack, "CogVideoX15VAEEncode", f"vae is {said}, and a video VAE", **given)

    def test_truth_values_are_not(self, pack, good):
        given = dict(images=torch.ones(1, 16, 16, 3, dtype=torch.bool), action="pass")
        assert "255" not in refused(pack, "CogVideoX15BlackFrameCheck", "holds bool", **given)

    @pytest.mark.parametrize(
        ("entry", "said"),
        [
            (5, "is a list with 5 in it"),
            ("ab", "is a list with the text 'ab' in it"),
            ([torch.ones(1, 226, 32)], "is a list with a list of 1 in it"),
            ([torch.ones(1, 226, 32), 5], "has 5 where the settings of the prompt are"),
        ],
    )
    def test_a_prompt_is_a_pair_of_embeddings_and_settings(self, pack, good, entry, said):
        given = {**arguments(pack, "CogVideoX15Sampler", good), "positive": [entry]}
        refused(pack, "CogVideoX15Sampler", said, **given)

    def test_a_mask_where_an_image_is_wanted_is_refused(self, pack, good):
        for node_id, name in every_input(pack, ("IMAGE",)):
            refused(pack, node_id, "[1, 16, 16]", **{**arguments(pack, node_id, good), name: torch.ones(1, 16, 16)})

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_other_floats_are_taken(self, pack, good, dtype):
        self.same(pack, good, lambda tensor: tensor.to(dtype), 0.02)

    @pytest.mark.parametrize(
        "change",
        [
            lambda tensor: tensor.clone().requires_grad_(),
            torch.nn.Parameter,
            lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
            lambda tensor: tensor.mT.contiguous().mT,
            lambda tensor: tensor[:1].expand_as(tensor),
        ],
    )
    def test_other_ways_to_hold_the_same_numbers_are_taken(self, pack, good, change):
        self.same(pack, good, change, 0)

    def same(self, pack, good, change, tolerance):
        entry, latent = (
            [change(good["positive"][0][0]), {"pooled_output": None}],
            {"samples": change(good["samples"]["samples"]), "batch_index": [0]},
        )
        images = change(good["images"])
        for node_id, values in {
            "CogVideoX15Sampler": dict(
                positive=[entry], negative=((*entry, "more"),), latent_image=latent, denoise=1.0
            ),
            "CogVideoX15VAEDecode": dict(samples=latent),
            "CogVideoX15VAEEncode": dict(images=images),
            "CogVideoX15ImageToVideo": dict(start_image=images, positive=[entry], negative=[entry]),
            "CogVideoX15Inpaint": dict(video=images, mask=images[..., 0], start_image=images, positive=[entry]),
            "CogVideoX15Void": dict(video=images, quadmask=images[..., 0], negative=[entry]),
            "CogVideoX15BlackFrameCheck": dict(images=images),
        }.items():
            given = arguments(pack, node_id, good)
            usual = {name: good["images"][..., 0] if name == "mask" else good.get(name) for name in values}
            ours, theirs = (call(pack, node_id, **{**given, **changed}) for changed in (values, usual))
            for one, other in zip(tensors(ours), tensors(theirs), strict=True):
                assert not one.requires_grad
                assert torch.allclose(one.double(), other.double(), atol=tolerance or 1e-6), node_id

    def test_latents_of_other_places_and_with_other_keys_are_taken(self, pack, good):
        latent = {
            "samples": torch.zeros(1, 16, 1, 2, 2),
            "noise_mask": None,
            "batch_index": [0],
            "downscale_ratio_spacial": 8,
        }
        (given,) = call(
            pack, "CogVideoX15Sampler", **{**arguments(pack, "CogVideoX15Sampler", good), "latent_image": latent}
        )
        assert list(latent) == ["samples", "noise_mask", "batch_index", "downscale_ratio_spacial"]
        # What core's samplers keep is kept.
        assert given["batch_index"] == [0]

    @pytest.mark.parametrize(
        "start", [3, "x", [], {}, torch.ones(1, 16, 1, 2, 2).to_sparse(), torch.empty(1, 16, 1, 2, 2, device="meta")]
    )
    def test_an_odd_start_image_in_a_conditioning_is_refused(self, pack, good, start):
        entry = [good["positive"][0][0], {"concat_latent_image": start}]
        given = {**arguments(pack, "CogVideoX15Sampler", good), "positive": [entry]}
        refused(pack, "CogVideoX15Sampler", ("start image's latent", "Connect CogVideoX-1.5 Image to Video"), **given)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize(("kind", "shape"), [("IMAGE", (1, 8, 8, 3)), ("MASK", (1, 8, 8))])
def test_pictures_that_a_program_keeps_on_a_card_are_worked_on_beside_it(pack, monkeypatch, kind, shape):
    inputs = sys.modules[f"{pack.__name__}.nodes.inputs"]
    given, moved = torch.rand(shape), torch.rand(shape)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moved if tensor is given else tensor)
    node = pack.NODE_CLASS_MAPPINGS["CogVideoX15BlackFrameCheck"]
    assert inputs.check_value(node, "picture", (kind,), given) is moved


def test_comfyuis_own_parts_are_called_so(pack, good):
    for module, name, said in (
        ("comfy.sd", "VAE", "a VAE of ComfyUI's own loaders"),
        ("comfy.sd", "CLIP", "a CLIP of ComfyUI's own loaders"),
        ("comfy.model_patcher", "ModelPatcher", "a MODEL of ComfyUI's own loaders"),
    ):
        value = type(name, (), {"__module__": module})()
        refused(
            pack,
            "CogVideoX15VAEDecode",
            (said, "Connect the vae of CogVideoX-1.5 Model Loader"),
            samples=good["samples"],
            vae=value,
        )


@pytest.mark.parametrize("node_id", ["CogVideoX15EmptyLatent", "CogVideoX15ImageToVideo"])
def test_sizes_that_no_machine_has_are_refused_when_queued_with_their_bytes(pack, good, node_id):
    node, huge = pack.NODE_CLASS_MAPPINGS[node_id], dict(width=16384, height=16384, length=16001, batch_size=64)
    said = node.VALIDATE_INPUTS(**huge)
    assert "64 videos of 16384x16384 pixels and 16001 frames would take 120.3 TB of memory" in said
    refused(pack, node_id, "120.3 TB", **{**arguments(pack, node_id, good), **huge})
    assert node.VALIDATE_INPUTS(width=1360, height=768, length=161, batch_size=1) is True


def test_latents_whose_frames_this_computer_cannot_hold_are_refused_before_a_weight_is_read(pack, tiny, monkeypatch):
    monkeypatch.setattr(sys.modules[f"{pack.__name__}.cogvideox.tensors"], "host_bytes", lambda: 2_000_000_000)
    model, _, vae, _ = call(pack, "CogVideoX15ModelLoader", model=str(tiny), dtype="fp32")
    latent, entry = (
        {"samples": torch.zeros(1, 1, 1, 1, 1).expand(1, 16, 1, 1 << 12, 1 << 12)},
        [torch.zeros(1, 226, 32), {}],
    )
    refused(
        pack,
        "CogVideoX15VAEDecode",
        ("32768x32768 pixels", "would take 12.9 GB of memory, and this computer has 2.0 GB"),
        samples=latent,
        vae=vae,
    )
    settings = dict(seed=1, steps=1, cfg=6.0, scheduler="ddim", denoise=1.0)
    refused(
        pack,
        "CogVideoX15Sampler",
        ("A step of a video of 32768x32768 pixels and 1 frames would take 16.1 GB",),
        model=model,
        positive=[entry],
        negative=[entry],
        latent_image=latent,
        **settings,
    )
    assert not vae.weights.is_loaded
    assert not model.weights.is_loaded


def test_the_memory_that_this_process_may_have_is_told(pack):
    from cogvideox.tensors import host_bytes
    from cogvideox.words import size_text

    assert 1 << 28 < host_bytes() <= 1 << 50
    assert [size_text(count, 1) for count in (1_500_000, 12_500_000_000, 68_719_476_736_000)] == [
        "1.5 MB",
        "12.5 GB",
        "68.7 TB",
    ]
    assert size_text(10**400, 1) == "more than 1,000,000 EB"


def test_a_limit_of_the_system_counts():
    resource = pytest.importorskip("resource")
    from cogvideox.tensors import host_bytes

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (200 << 30, before[1]))
    try:
        limited = host_bytes()
        resource.setrlimit(resource.RLIMIT_AS, (100 << 30, before[1]))
        assert host_bytes() <= limited
        assert host_bytes() < 100 << 30
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class TestNames:
    """Names that people type come into sentences cut and printable."""

    @pytest.fixture
    def host(self, pack, tmp_path, monkeypatch):
        host = sys.modules[f"{pack.__name__}.nodes.host"]
        monkeypatch.setattr(host.comfyui, "IN_COMFYUI", True)
        monkeypatch.setattr(host.folders, "_roots", lambda *names: [tmp_path / name for name in names])
        return host

    @pytest.mark.parametrize("name", ["a" * 5000, "two\nlines", "right\u202eleft", "\ud800", "é\x00"])
    def test_of_models_and_loras(self, pack, host, name):
        for node, widget in (
            ("ModelLoader", "model"),
            ("LoraLoader", "lora_name"),
            ("ModelLoader", "vae_name"),
            ("ModelLoader", "text_encoder_name"),
        ):
            cls = pack.NODE_CLASS_MAPPINGS[f"CogVideoX15{node}"]
            said = cls.VALIDATE_INPUTS(**{widget: name})
            assert said.replace("\n", "").isprintable()
            assert "a" * 100 not in said
            assert cls.IS_CHANGED(**{"model": "x", widget: name} if node == "ModelLoader" else {widget: name})

    def test_a_lora_is_looked_for_below_its_folders_only(self, host, tmp_path):
        (tmp_path / "loras" / "sub").mkdir(parents=True)
        (tmp_path / "secret.safetensors").touch()
        style = tmp_path / "loras" / "sub" / "style.safetensors"
        style.touch()
        assert host.lora_path("sub/style.safetensors") == style
        assert host.lora_path("sub\\style.safetensors").resolve() == style.resolve()
        for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "sub/../../secret.safetensors"):
            with pytest.raises(ValueError, match="There is no LoRA called"):
                host.lora_path(name)
