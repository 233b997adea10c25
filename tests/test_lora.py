"""LoRAs in every format change the model as peft does, and only while it runs."""

import copy
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import save_file

import cogvideox.lora as lora_module
from cogvideox.checkpoint.catalogue import list_parts
from cogvideox.checkpoint.convert import convert_checkpoint
from cogvideox.checkpoint.layout import open_checkpoint, open_part
from cogvideox.checkpoint.naming import comfy_name
from cogvideox.dtypes import FP32, RANGE_SAFE_FP16, Precision
from cogvideox.handles import open_handles, with_lora
from cogvideox.loading import load_module
from cogvideox.lora import applied, open_lora
from cogvideox.modules.packed import PackedLinear
from cogvideox.sampling import sample
from tests import layouts
from tests.conftest import CPU
from tests.reference import error
from tests.reference import run_module as run
from tests.told import Told

RANK = 3
#: The layers that trainers choose, and those that some choose too.
LAYERS = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "norm1.linear",
    "norm2.linear",
)
OTHERS = ("patch_embed.proj", "patch_embed.text_proj", "time_embedding.linear_1", "proj_out", "norm_out.linear")


def draw(part, seed=0, rank=RANK, layers=LAYERS, others=OTHERS):
    """Random halves of every layer: module -> (down, up)."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in layers] + list(others)
    halves = {}
    for name in names:
        out, *inside = part.tensors[f"{name}.weight"].shape
        kernel = inside[1:]
        down = torch.randn(rank, *inside, generator=generator) * inside[0] ** -0.5
        halves[name] = down, torch.randn(out, rank, *[1 for _ in kernel], generator=generator) * 0.2
    return halves


def write(path, halves, name, down="lora_A.weight", up="lora_B.weight", alpha=None, metadata=None, dtype=torch.float32):
    tensors = {}
    for module, (first, second) in halves.items():
        tensors[f"{name(module)}.{down}"] = first.to(dtype).contiguous()
        tensors[f"{name(module)}.{up}"] = second.to(dtype).contiguous()
        if alpha is not None:
            tensors[f"{name(module)}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path, metadata)
    return path


def flat(name):
    return name.replace(".", "_")


FORMATS = {
    "peft": dict(name=lambda m: f"base_model.model.{m}"),
    "diffusers": dict(name=lambda m: f"transformer.{m}"),
    "bare names": dict(name=lambda m: m),
    "a named adapter": dict(
        name=lambda m: f"transformer.{m}", down="lora_A.default.weight", up="lora_B.default.weight"
    ),
    "old diffusers": dict(name=lambda m: f"transformer.{m}", down="lora.down.weight", up="lora.up.weight"),
    "kohya": dict(name=lambda m: f"lora_unet_{flat(m)}", down="lora_down.weight", up="lora_up.weight", alpha=RANK),
    "CogVideoX-Fun": dict(
        name=lambda m: f"lora_unet__{flat(m)}", down="lora_down.weight", up="lora_up.weight", alpha=RANK
    ),
    "ComfyUI": dict(
        name=lambda m: f"diffusion_model.{comfy_name(m)}", down="lora_down.weight", up="lora_up.weight", alpha=RANK
    ),
}


@pytest.fixture(scope="module")
def with_peft(tiny):
    """``with_peft(halves, alpha)``: the unmodified transformer in float64 with a peft adapter of these halves."""
    from diffusers import CogVideoXTransformer3DModel
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    base = CogVideoXTransformer3DModel.from_pretrained(tiny / "transformer", torch_dtype=torch.float64)

    def get(*loras):
        module = copy.deepcopy(base)
        for number, (halves, alpha, strength) in enumerate(loras):
            rank = next(iter(halves.values()))[0].shape[0]
            config = LoraConfig(
                r=rank, lora_alpha=alpha * strength, target_modules=list(halves), init_lora_weights=False
            )
            inject_adapter_in_model(config, module, adapter_name=f"a{number}")
            state = {
                f"{n}.lora_{half}.weight": t.double()
                for n, pair in halves.items()
                for half, t in zip("AB", pair, strict=True)
            }
            set_peft_model_state_dict(module, state, adapter_name=f"a{number}")
        for layer in module.modules():
            if hasattr(layer, "active_adapter"):
                layer.set_adapter([f"a{number}" for number in range(len(loras))])
        return module.double()

    return get


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_what_peft_makes_of_it_in_float64(tmp_path, part, inputs, with_peft, form):
    halves = draw(part)
    lora = open_lora(write(tmp_path / "lora.safetensors", halves, **FORMATS[form]), part, 0.8)
    assert set(lora.pairs) == set(halves)
    module = load_module(part, FP32, torch.device("cpu"))
    base = run(module, inputs)
    with applied([lora], module, FP32):
        ours = run(module, inputs)
    expected = run(with_peft((halves, RANK, 0.8)), inputs, torch.float64)
    assert error(ours, expected) < 1e-5
    assert error(base, expected) > 0.05
    assert torch.equal(run(module, inputs), base)


@pytest.mark.parametrize("strength", [1.0, -0.7, 2.5])
def test_alpha_and_any_strength_scale_it(tmp_path, part, inputs, with_peft, strength):
    halves = draw(part)
    lora = open_lora(write(tmp_path / "lora.safetensors", halves, **FORMATS["kohya"] | {"alpha": 12}), part, strength)
    module = load_module(part, FP32, torch.device("cpu"))
    with applied([lora], module, FP32):
        assert error(run(module, inputs), run(with_peft((halves, 12, strength)), inputs, torch.float64)) < 1e-5


def test_alpha_is_read_from_diffusers_metadata_and_from_pefts_config(tmp_path, part):
    halves = draw(part)
    metadata = {
        "lora_adapter_metadata": json.dumps(
            {"transformer.r": RANK, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"ff.net.2": 9}}
        )
    }
    lora = open_lora(write(tmp_path / "lora.safetensors", halves, **FORMATS["diffusers"], metadata=metadata), part)
    assert {pair.scale for name, pair in lora.pairs.items() if name.endswith("ff.net.2")} == {3.0}
    assert {pair.scale for name, pair in lora.pairs.items() if not name.endswith("ff.net.2")} == {2.0}
    folder = tmp_path / "adapter"
    folder.mkdir()
    write(folder / "adapter_model.safetensors", halves, **FORMATS["peft"])
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 6, "use_rslora": True}))
    assert {pair.scale for pair in open_lora(folder, part).pairs.values()} == {6 / RANK**0.5}


def test_they_stack(tmp_path, part, inputs, with_peft):
    first, second = draw(part, 1), draw(part, 2, rank=5, others=())
    loras = [
        open_lora(write(tmp_path / "first.safetensors", first, **FORMATS["diffusers"]), part, 0.5),
        open_lora(write(tmp_path / "second.safetensors", second, **FORMATS["kohya"] | {"alpha": 5}), part, -1.5),
    ]
    module = load_module(part, FP32, torch.device("cpu"))
    with applied(loras, module, FP32):
        ours = run(module, inputs)
    assert error(ours, run(with_peft((first, RANK, 0.5), (second, 5, -1.5)), inputs, torch.float64)) < 1e-5


@pytest.mark.parametrize(
    ("precision", "limit"),
    [(Precision(torch.bfloat16), 2e-2), (Precision(torch.float16), 3e-3), (RANGE_SAFE_FP16, 3e-3)],
    ids=["bf16", "fp16", "range-safe"],
)
def test_it_works_in_every_dtype(tmp_path, part, inputs, with_peft, precision, limit):
    halves = draw(part)
    lora = open_lora(write(tmp_path / "lora.safetensors", halves, **FORMATS["diffusers"]), part)
    module = load_module(part, precision, torch.device("cpu"))
    with applied([lora], module, precision):
        ours = run(module, inputs, precision.activations)
    assert error(ours, run(with_peft((halves, RANK, 1.0)), inputs, torch.float64)) < limit


def test_a_loud_lora_does_not_overflow_in_range_safe_fp16(tmp_path, part, inputs, with_peft):
    """Uneven columns make the halves scale per column, also where the layer's own input comes scaled per token."""
    halves = draw(part, layers=("attn1.to_q", "attn1.to_v", "ff.net.0.proj"), others=())
    for down, up in halves.values():
        down[:, ::7] *= 3e4
        up *= 1e3
    lora = open_lora(write(tmp_path / "lora.safetensors", halves, **FORMATS["diffusers"]), part)
    module = load_module(part, RANGE_SAFE_FP16, torch.device("cpu"))
    with applied([lora], module, RANGE_SAFE_FP16):
        ours = run(module, inputs)
    assert ours.isfinite().all()
    assert error(ours, run(with_peft((halves, RANK, 1.0)), inputs, torch.float64)) < 3e-2


@pytest.mark.parametrize(
    "precision", [FP32, Precision(torch.bfloat16), RANGE_SAFE_FP16], ids=["fp32", "bf16", "range-safe"]
)
def test_what_is_read_of_the_file_is_not_kept(tmp_path, part, monkeypatch, precision):
    read, real = [], lora_module._read

    def noted(*given):
        tensor = real(*given)
        # Of those before, only what a layer's other half is waited for with.
        assert sum(other() is not None for other in read) <= 1
        read.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(lora_module, "_read", noted)
    lora = open_lora(write(tmp_path / "lora.safetensors", draw(part), **FORMATS["diffusers"]), part)
    with applied([lora], load_module(part, precision, torch.device("cpu")), precision):
        assert len(read) == 2 * len(lora.pairs)
        assert all(other() is None for other in read)


@pytest.mark.parametrize(
    "precision", [FP32, Precision(torch.bfloat16), RANGE_SAFE_FP16], ids=["fp32", "bf16", "range-safe"]
)
@pytest.mark.parametrize("layout", ["fp8", "gguf"])
def test_it_works_on_weights_that_stay_packed(tmp_path, tiny, part, inputs, layout, precision):
    """What the LoRA adds to packed weights is what it adds to the same weights widened."""
    state = load_module(part, FP32, torch.device("cpu")).state_dict()
    packed = open_part(layouts.write_packed(tmp_path, state, layout), "transformer")
    halves = draw(part)
    lora = open_lora(write(tmp_path / "lora.safetensors", halves, **FORMATS["diffusers"]), packed)
    module = load_module(packed, precision, torch.device("cpu"))
    base = run(module, inputs, precision.activations)
    with applied([lora], module, precision):
        ours = run(module, inputs, precision.activations)
    plain = load_module(packed, FP32, torch.device("cpu"))
    for name, child in list(plain.named_modules()):
        if isinstance(child, PackedLinear):
            linear = torch.nn.Linear(child.in_features, child.out_features, child.bias is not None)
            linear.weight.data, linear.bias = child.packed.scaled(torch.float32), child.bias
            plain.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = linear
    with applied([lora], plain, FP32):
        expected = run(plain, inputs)
    assert error(ours, expected.double()) < (1e-5 if precision == FP32 else 2e-2)
    assert torch.equal(run(module, inputs, precision.activations), base)


def test_a_convolution_can_have_one(tmp_path, checkpoints, inputs, long_prompts):
    part = open_part(checkpoints("2b") / "transformer", "transformer")
    halves = draw(part, layers=(), others=("patch_embed.proj",))
    lora = open_lora(write(tmp_path / "lora.safetensors", halves, **FORMATS["CogVideoX-Fun"]), part)
    module = load_module(part, FP32, torch.device("cpu"))
    merged = load_module(part, FP32, torch.device("cpu"))
    down, up = halves["patch_embed.proj"]
    merged.patch_embed.proj.weight.data = merged.patch_embed.proj.weight + torch.einsum("orkl,rihw->oihw", up, down)
    with applied([lora], module, FP32):
        given = inputs | {"encoder_hidden_states": long_prompts[0]}
        assert error(run(module, given), run(merged, given).double()) < 1e-5


def test_two_branches_of_a_graph_use_their_own_and_the_base_stays_bit_for_bit(tmp_path, tiny, prompts, part):
    handles = open_handles(tiny, "fp32", CPU)
    latent = torch.zeros(1, 16, 4, 6, 10)

    def make(model):
        return sample(model, *prompts, latent, seed=1, steps=2)

    base = make(handles.model)
    weights = {name: tensor.clone() for name, tensor in handles.model.weights._module.state_dict().items()}
    files = [write(tmp_path / f"{seed}.safetensors", draw(part, seed), **FORMATS["diffusers"]) for seed in (1, 2)]
    one, two = (with_lora(handles.model, file) for file in files)
    results = [make(model) for model in (one, two, one, handles.model, with_lora(handles.model, files[0], 0.0))]
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[3], base)
    assert torch.equal(results[4], base)
    assert one.weights is two.weights is handles.model.weights
    assert not handles.model.loras
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in handles.model.weights._module.state_dict().items()
    )


@pytest.mark.parametrize("variant", ["1.5", "2b"])
def test_the_steps_of_a_run_are_those_of_the_weights_with_it_merged(tmp_path, checkpoints, long_prompts, variant):
    """Of what a run computes once for all steps, too: the prompt's projection."""
    part = open_part(checkpoints(variant) / "transformer", "transformer")
    halves = {name: (down, 0.2 * up) for name, (down, up) in draw(part).items()}
    file, latent = write(tmp_path / "lora.safetensors", halves, **FORMATS["diffusers"]), torch.zeros(1, 16, 3, 6, 10)
    plain, into = (open_handles(checkpoints(variant), "fp32", CPU).model for _ in range(2))
    with into.weights.running() as merged:
        state = merged.state_dict()
        for name, (down, up) in halves.items():
            weight = state[f"{name}.weight"]
            weight += (up.flatten(1) @ down.flatten(1)).view_as(weight)
        expected = sample(into, *long_prompts, latent, seed=1, steps=4)
    assert error(sample(with_lora(plain, file), *long_prompts, latent, seed=1, steps=4), expected) < 1e-5


def test_a_lora_stays_on_when_a_step_is_healed(tmp_path, tiny, prompts, part):
    """A LoRA too loud for fp16: the step is done again in a safer way to run, with the LoRA."""
    halves = draw(part, layers=("ff.net.2",), others=())
    for _, up in halves.values():
        up *= 3e6
    file, said = write(tmp_path / "loud.safetensors", halves, **FORMATS["diffusers"]), []
    latent = torch.zeros(1, 16, 4, 6, 10)
    plain = open_handles(tiny, "fp16", CPU, on_mismatch="warn").model
    ours = sample(with_lora(plain, file), *prompts, latent, seed=1, steps=2, events=Told(heals=said))
    assert any("range-safe fp16" in text for text in said)
    expected = sample(with_lora(open_handles(tiny, "fp32", CPU).model, file), *prompts, latent, seed=1, steps=2)
    assert error(ours, expected.double()) < 5e-2


def sat_lora_run(folder, part, layers=2):
    """What SAT's LoRA training saves: each attention layer's own weights under ``.original``, the halves beside.

    Also returned is the transformer with the LoRA merged. The scale is SAT's: its ``lora_alpha`` of 1 by the rank.
    """
    module = load_module(part, FP32, torch.device("cpu"))
    merged = copy.deepcopy(module)
    state = layouts.sat_names(module.state_dict())
    for block in range(layers):
        attention = f"model.diffusion_model.transformer.layers.{block}.attention"
        targets = {
            f"{attention}.query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            f"{attention}.dense": ("attn1.to_out.0",),
        }
        for name, places in targets.items():
            for leaf in ("weight", "bias"):
                state[f"{name}.original.{leaf}"] = state.pop(f"{name}.{leaf}")
            for number, place in enumerate(places):
                down, up = torch.randn(RANK, 128) * 0.3, torch.randn(128, RANK)
                state |= {f"{name}.matrix_A.{number}": down, f"{name}.matrix_B.{number}": up}
                merged.get_submodule(f"transformer_blocks.{block}.{place}").weight.data += up @ down / RANK
    (folder / "500").mkdir(parents=True)
    (folder / "latest").write_text("500")
    torch.save({"module": state, "iteration": 500}, folder / "500" / "mp_rank_00_model_states.pt")
    return folder, merged


def test_a_lora_run_of_sats_trainer_runs_as_the_model_that_was_trained(tmp_path, part, inputs):
    folder, merged = sat_lora_run(tmp_path / "run", part)
    handles = open_handles(folder, "fp32", CPU)
    assert "SAT, with a LoRA inside" in handles.plan.text
    (lora,) = handles.model.loras
    assert len(lora.pairs) == 8
    with handles.model.weights.running() as module:
        base = run(module, inputs)
        with applied(handles.model.loras, module, FP32):
            ours = run(module, inputs)
    expected = run(merged, inputs).double()
    assert error(ours, expected) < 1e-6
    assert error(base, expected) > 1e-2


def test_it_makes_the_latents_that_base_and_the_same_file_as_a_lora_make(tmp_path, tiny, part, prompts):
    """Both ways to load a run of SAT's are one, and neither merges anything."""
    folder, _ = sat_lora_run(tmp_path / "run", part)
    latent = torch.zeros(1, 16, 4, 6, 10)
    whole = sample(open_handles(folder, "fp32", CPU).model, *prompts, latent, seed=1, steps=2)
    base = open_handles(tiny, "fp32", CPU).model
    beside = with_lora(base, folder)
    assert "holds the model it was trained on too" in beside.loras[0].text
    assert torch.equal(whole, sample(beside, *prompts, latent, seed=1, steps=2))
    assert not torch.equal(whole, sample(base, *prompts, latent, seed=1, steps=2))


def test_the_lora_inside_is_not_applied_twice_without_a_word(tmp_path, part):
    folder, _ = sat_lora_run(tmp_path / "run", part)
    assert "runs with its LoRA already" in with_lora(open_handles(folder, "fp32", CPU).model, folder).loras[-1].text


def test_a_model_saved_with_pefts_lora_inside_runs_with_it(tmp_path, tiny, part, inputs, with_peft):
    """``save_pretrained`` while an adapter is on writes the layers' own weights under ``.base_layer`` and the halves
    beside."""
    halves = draw(part, others=())
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny, folder)
    shutil.rmtree(folder / "transformer")
    with_peft((halves, RANK, 1.0)).float().save_pretrained(folder / "transformer")
    handles = open_handles(folder, "fp32", CPU)
    assert "with a LoRA inside" in handles.plan.text
    with handles.model.weights.running() as module, applied(handles.model.loras, module, FP32):
        ours = run(module, inputs)
    assert error(ours, run(with_peft((halves, RANK, 1.0)), inputs, torch.float64)) < 1e-5


def test_a_model_with_a_lora_inside_is_not_converted_to_one_without_it(tmp_path, part):
    folder, _ = sat_lora_run(tmp_path / "run", part)
    with pytest.raises(
        ValueError, match=r"was saved with a LoRA inside \(16 tensors\), which a converted copy would not have"
    ):
        convert_checkpoint(open_checkpoint(folder), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_a_lora_inside_that_is_not_whole_is_told_when_the_checkpoint_is_opened(tmp_path, part):
    folder, _ = sat_lora_run(tmp_path / "run", part)
    file = folder / "500" / "mp_rank_00_model_states.pt"
    state = torch.load(file, weights_only=True)
    del state["module"]["model.diffusion_model.transformer.layers.0.attention.dense.matrix_B.0"]
    torch.save(state, file)
    with pytest.raises(
        ValueError, match="holds the down half of transformer_blocks.0.attn1.to_out.0 and not its up half"
    ):
        open_checkpoint(folder)


def rewritten(path, change):
    from safetensors.torch import load

    tensors = load(path.read_bytes())
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


Q = "transformer.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.update({"transformer.single_blocks.0.q.lora_A.weight": torch.zeros(3, 8)}),
            r"1 of its \d+ tensors \(transformer.single_blocks.0.q",
        ),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(128, 5)}), "the ranks 3 and 5"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.zeros(3, 64)}),
            r"holds \[3, 64\].*the layer of this model is \[128, 128\]",
        ),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "the down half of transformer_blocks.0.attn1.to_q and not its up half"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(128)}), "it is a DoRA, and only LoRAs"),
        (lambda t: t.update({f"{Q}.hada_w1_a": torch.zeros(128)}), "it is a LoHa"),
        (lambda t: t.update({f"{Q}.alpha": torch.zeros(2)}), "an alpha has the shape"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_names(tmp_path, part, change, said):
    path = rewritten(write(tmp_path / "lora.safetensors", draw(part), **FORMATS["diffusers"]), change)
    with pytest.raises(ValueError, match=said):
        open_lora(path, part)


def test_a_lora_of_another_size_of_the_model_is_refused(tmp_path, part):
    other = {name: (torch.zeros(4, 1920), torch.zeros(1920, 4)) for name in draw(part, others=())}
    with pytest.raises(ValueError, match="was trained on another model"):
        open_lora(write(tmp_path / "lora.safetensors", other, **FORMATS["diffusers"]), part)


def test_a_model_a_missing_file_and_a_strength_that_is_no_number_are_refused(tmp_path, tiny, part):
    with pytest.raises(ValueError, match="A model is loaded with"):
        open_lora(next((tiny / "transformer").glob("*.safetensors")), part)
    with pytest.raises(ValueError, match="There is no LoRA"):
        open_lora(tmp_path / "none.safetensors", part)
    with pytest.raises(ValueError, match="strength"):
        open_lora(tmp_path / "none.safetensors", part, float("nan"))


def test_a_lora_with_nan_is_refused_by_name_and_leaves_no_hook(tmp_path, tiny, prompts, part):
    halves = draw(part)
    next(iter(halves.values()))[0][0, 0] = torch.nan
    model = open_handles(tiny, "fp32", CPU).model
    broken = with_lora(model, write(tmp_path / "broken.safetensors", halves, **FORMATS["diffusers"]))
    with pytest.raises(ValueError, match=r"broken.safetensors holds 1 values that are NaN"):
        sample(broken, *prompts, torch.zeros(1, 16, 4, 6, 10), seed=1, steps=1)
    assert not any(module._forward_hooks for module in model.weights._module.modules())
    sample(model, *prompts, torch.zeros(1, 16, 4, 6, 10), seed=1, steps=1)


@pytest.mark.parametrize("precision", [FP32, RANGE_SAFE_FP16], ids=["fp32", "range-safe"])
def test_a_lora_that_was_not_written_to_its_end_is_refused_by_name(tmp_path, part, precision):
    module = load_module(part, precision, torch.device("cpu"))
    halves = draw(part)
    # Those that were not trained.
    halves |= {name: (down, 0 * up) for name, (down, up) in halves.items() if name.endswith("to_q")}
    whole = write(tmp_path / "lora.safetensors", halves, **FORMATS["diffusers"])
    with applied([open_lora(whole, part)], module, precision):
        pass
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    with (
        pytest.raises(ValueError, match="lora.safetensors is not whole: its weights for .* are zeros throughout"),
        applied([open_lora(whole, part)], module, precision),
    ):
        pass
    assert not any(child._forward_hooks for child in module.modules())


def test_a_lora_that_was_taken_out_of_some_layers_is_whole(tmp_path, part):
    """Merging it with weights by block scales both halves to nothing."""
    module = load_module(part, FP32, torch.device("cpu"))
    halves = draw(part)
    halves |= {name: (0 * down, 0 * up) for name, (down, up) in halves.items() if ".1." in name}
    some = write(tmp_path / "some.safetensors", halves, **FORMATS["diffusers"])
    with applied([open_lora(some, part)], module, FP32):
        pass
    nothing = {name: (0 * down, 0 * up) for name, (down, up) in halves.items()}
    empty = write(tmp_path / "empty.safetensors", nothing, **FORMATS["diffusers"])
    with (
        pytest.raises(ValueError, match="empty.safetensors is not whole"),
        applied([open_lora(some, part), open_lora(empty, part)], module, FP32),
    ):
        pass
    assert not any(child._forward_hooks for child in module.modules())


@pytest.mark.parametrize("alpha", [0.5, 1e-3, 0])
@pytest.mark.parametrize("place", ["weights", "settings"])
def test_an_alpha_below_one_is_what_peft_makes_of_it(tmp_path, part, inputs, with_peft, alpha, place):
    """Trainers take any that is positive, and peft 0, of which nothing comes."""
    halves = {name: (down, up * 100) for name, (down, up) in draw(part).items()}
    beside = {"alpha": alpha}
    if place == "settings":
        said = {"r": RANK, "lora_alpha": alpha}
        beside = {"metadata": {"lora_adapter_metadata": json.dumps({f"transformer.{key}": said[key] for key in said})}}
    lora = open_lora(write(tmp_path / "lora.safetensors", halves, **(FORMATS["diffusers"] | beside)), part)
    assert all(pair.scale == pytest.approx(alpha / RANK) for pair in lora.pairs.values())
    module = load_module(part, FP32, torch.device("cpu"))
    base = run(module, inputs)
    with applied([lora], module, FP32):
        ours = run(module, inputs)
    assert error(ours, run(with_peft((halves, alpha, 1.0)), inputs, torch.float64)) < 1e-5
    assert torch.equal(ours, base) == (alpha == 0)


def test_what_it_holds_for_the_text_encoder_is_left_out_and_said(tmp_path, part):
    path = write(tmp_path / "lora.safetensors", draw(part), **FORMATS["kohya"])
    rewritten(
        path,
        lambda t: t.update({"lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": torch.zeros(3, 8)}),
    )
    assert "trains the text encoder too (1 tensors)" in open_lora(path, part).text


def test_the_list_holds_loras_of_cogvideox_only(tmp_path, part):
    for form in FORMATS:
        write(tmp_path / f"{form}.safetensors", draw(part), **FORMATS[form])
    save_file(
        {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.zeros(1)},
        tmp_path / "sd15.safetensors",
    )
    save_file(
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(1)}, tmp_path / "flux.safetensors"
    )
    ltx = {
        f"diffusion_model.transformer_blocks.0.{attention}.to_q.lora_A.weight": torch.zeros(1)
        for attention in ("attn1", "attn2")
    }
    save_file(ltx, tmp_path / "ltx.safetensors")
    assert sorted(entry.name for entry in list_parts("lora", [tmp_path])) == sorted(
        f"{form}.safetensors" for form in FORMATS
    )
