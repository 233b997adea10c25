"""The joined stream is the unmodified transformer, bit for bit; the attention is the one that was chosen."""

from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideox import choices
from cogvideox.geometry import rotary_embedding
from cogvideox.handles import open_handles, with_attention
from cogvideox.memory import LiveBytes
from cogvideox.modules import attention as attention_module
from cogvideox.modules import joint as joint_module
from cogvideox.modules.attention import available, check_attention
from cogvideox.modules.joint import (
    blocks_replaced,
    join,
    projection_attached,
    room_attached,
    rotate_,
    side_by_side,
)
from cogvideox.sampling import sample
from cogvideox.variants import full_config
from tests.conftest import CPU
from tests.tiny_checkpoint import TEXT_WIDTH, build_transformer

LAYERS = "to_q", "to_k", "to_v"
HOST = torch.device("cpu")


def inputs(module, dtype, batch=2, length=4, height=6, width=10):
    config = full_config(module.config)
    draw = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(batch, length, config["in_channels"], height, width, generator=draw).to(dtype),
        encoder_hidden_states=torch.randn(
            batch, config["max_text_seq_length"], config["text_embed_dim"], generator=draw
        ).to(dtype),
        timestep=torch.full((batch,), 481),
        ofs=None if config["ofs_embed_dim"] is None else torch.full((1,), 2.0, dtype=dtype),
        image_rotary_emb=rotary_embedding(config, length, height, width, HOST),
        return_dict=False,
    )


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        *product(["1.5", "1.5-i2v", "5b", "2b"], [torch.float32, torch.bfloat16, torch.float16]),
        # More channels beside the noise change one layer alone, which is not joined.
        ("fun-inp", torch.float32),
        ("void", torch.bfloat16),
    ],
)
@torch.no_grad()
def test_a_joined_transformer_gives_the_unmodified_ones_numbers_bit_for_bit(monkeypatch, variant, dtype):
    # CogVideoX 1.0 has positions of the one size it was trained on.
    size = {} if variant not in ("5b", "2b") else dict(sample_height=6, sample_width=10)
    plain, joined = build_transformer(variant, **size).to(dtype).eval(), build_transformer(variant, **size)
    joined.load_state_dict(plain.state_dict())
    joined = join(joined.to(dtype).eval())
    given = inputs(plain, dtype)
    expected = plain(**given)[0]
    assert expected.isfinite().all()
    for long in (0, 10**6):
        # Queries, keys and values lie head by head in memory, and token by token.
        monkeypatch.setattr(joint_module, "_LONG", long)
        assert torch.equal(joined(**given)[0], expected)
    # Nor does it write into what it is given.
    assert all(
        torch.equal(tensor, inputs(plain, dtype)[name]) for name, tensor in given.items() if torch.is_tensor(tensor)
    )


@torch.no_grad()
def test_what_a_block_makes_is_worked_on_in_place():
    module = build_transformer("1.5").eval()
    given = inputs(module, torch.float32, height=48, width=80)
    with LiveBytes() as plain:
        module(**given)
    join(module)
    with LiveBytes() as joined:
        module(**given)
    tokens = module.config.max_text_seq_length + 2 * 24 * 40
    stream = 2 * tokens * module.transformer_blocks[0].ff.net[2].out_features * 4
    # The stream as the block was given it and as attention left it, its norm, the feed-forward's inner activations
    # (four streams, once), its result.
    assert joined.peak < 8.5 * stream < 12 * stream < plain.peak


class TestRoom:
    """The largest products of all blocks, in the same memory."""

    class Asked(TorchDispatchMode):
        """Counts all bytes that operations ask for, and products that are told where to go."""

        def __init__(self):
            super().__init__()
            self.nbytes = self.placed = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            with LiveBytes() as made:
                result = function(*args, **(kwargs or {}))
            self.nbytes += made.peak
            self.placed += function is torch.ops.aten.addmm.out
            return result

    @staticmethod
    def layers(module):
        attention = [getattr(block.attn1, name) for block in module.transformer_blocks for name in LAYERS]
        return attention + [block.ff.net[0].proj for block in module.transformer_blocks]

    # Torch's remedy for a place that is too small.
    @pytest.mark.filterwarnings("error:An output with one or more elements was resized")
    @pytest.mark.parametrize("variant", ["1.5", "5b", "2b"])
    @pytest.mark.parametrize("long", [0, 10**6])
    @torch.no_grad()
    def test_the_numbers_are_the_same_at_one_length_after_the_other(self, monkeypatch, variant, long):
        monkeypatch.setattr(joint_module, "_LONG", long)
        size = {} if variant == "1.5" else dict(sample_height=6, sample_width=10)
        module = join(build_transformer(variant, **size).eval())
        some = [inputs(module, torch.float32), inputs(module, torch.float32, batch=1)]
        if variant == "1.5":
            some.append(inputs(module, torch.float32, length=6, height=10))
        expected = [module(**given)[0] for given in some]
        with room_attached(module):
            for number in (0, 1, -1, 0):
                with self.Asked() as asked:
                    assert module(**some[number])[0].equal(expected[number])
                assert asked.placed == 8
        assert not any("forward" in vars(layer) for layer in self.layers(module))
        with self.Asked() as asked:
            assert module(**some[0])[0].equal(expected[0])
        assert not asked.placed

    @pytest.mark.parametrize(("long", "streams"), [(0, 8), (10**6, 7)])
    @torch.no_grad()
    def test_a_block_asks_for_half_the_memory_and_at_most_as_much_is_there_at_once(self, monkeypatch, long, streams):
        """For two norms, those of queries and keys, values by heads, what attention mixed, and two results; the angles
        of tables are another half of the stream at this width."""
        monkeypatch.setattr(joint_module, "_LONG", long)

        def asked(layers, shared):
            module = join(build_transformer("1.5", num_layers=layers).eval())
            given = inputs(module, torch.float32, height=48, width=80)
            stream = 2 * (module.config.max_text_seq_length + 2 * 24 * 40) * 128 * 4
            with room_attached(module) if shared else nullcontext():
                with LiveBytes() as live:
                    module(**given)
                with self.Asked() as all_:
                    module(**given)
            return all_.nbytes / stream, live.peak / stream

        (one, _), (two, plain_peak) = asked(1, False), asked(2, False)
        assert two - one > 14.4
        (one, _), (two, peak) = asked(1, True), asked(2, True)
        assert two - one == pytest.approx(streams + 0.5, abs=0.2)
        # Of a short clip the normed queries and keys have a place of their own.
        assert peak < plain_peak + (0.1 if long == 0 else 1.1)

    @torch.no_grad()
    def test_layers_that_are_not_plain_are_left_as_they_are(self):
        module = join(build_transformer("1.5", num_layers=2).eval())
        first, last = module.transformer_blocks
        given = inputs(module, torch.float32)
        kept = []
        first.attn1.to_k.register_forward_hook(lambda layer, given, output: kept.append((output, output.clone())))
        own = first.ff.net[0].proj.forward = partial(type(first.ff.net[0].proj).forward, first.ff.net[0].proj)
        last.attn1.to_v = torch.nn.utils.parametrizations.weight_norm(last.attn1.to_v)
        expected = module(**given)[0]
        kept.clear()
        with room_attached(module):
            with self.Asked() as asked:
                assert module(**given)[0].equal(expected)
            assert asked.placed == 5
            assert first.ff.net[0].proj.forward is own
        assert first.ff.net[0].proj.forward is own
        # In 16 bits there is next to nothing to gain.
        module.to(torch.bfloat16)
        with room_attached(module), self.Asked() as asked:
            module(**inputs(module, torch.bfloat16))
        assert not asked.placed

    def test_a_run_on_a_cpu_has_it_and_leaves_nothing_behind(self, handles):
        with self.Asked() as asked:
            sample(handles.model, *torch.randn(2, 1, 8, TEXT_WIDTH), torch.zeros(1, 16, 3, 6, 10), seed=1, steps=2)
        assert asked.placed == 2 * 8
        with handles.model.weights.running() as module:
            assert not any("forward" in vars(layer) for layer in self.layers(module))


def test_neighbours_are_joined_without_a_copy_and_strangers_with_one():
    whole = torch.randn(2, 7, 4)
    text, video = whole[:, :3], whole[:, 3:]
    assert side_by_side(text, video).data_ptr() == whole.data_ptr()
    for one, other in ((text, video.clone()), (video, text), (text[:1], video[1:]), (text, whole[:, 4:])):
        if one.shape[0] == other.shape[0]:
            assert torch.equal(side_by_side(one, other), torch.cat([one, other], dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_positions_are_diffusers(dtype):
    from diffusers.models.embeddings import apply_rotary_emb

    x, angles = torch.randn(2, 30, 3, 64).to(dtype), torch.rand(30, 32).repeat_interleave(2, dim=1) * 7
    expected = apply_rotary_emb(x.transpose(1, 2), (angles.cos(), angles.sin())).transpose(1, 2)
    rotate_(x, angles.cos(), angles.sin())
    assert torch.equal(x, expected)


@torch.no_grad()
def test_a_prompt_is_projected_once_a_run_and_afterwards_nothing_is_left():
    module, calls = build_transformer("1.5").eval(), []
    layer = module.patch_embed.text_proj
    given = inputs(module, torch.float32)
    plain = module(**given)[0]
    layer.forward = lambda x: (calls.append(x), type(layer).forward(layer, x))[1]
    before = layer.forward
    with projection_attached(module):
        assert torch.equal(module(**given)[0], plain)
        assert torch.equal(module(**given)[0], plain)
        assert len(calls) == 1
        # Another prompt is another prompt, even one of the same numbers.
        module(**given | {"encoder_hidden_states": given["encoder_hidden_states"].clone()})
        assert len(calls) == 2
    assert layer.forward is before
    del layer.forward
    with projection_attached(module):
        pass
    assert "forward" not in vars(layer)


class TestAttention:
    def test_only_what_will_run_is_listed(self):
        assert available(HOST) == ("auto", "sdpa", "fastest")

    @pytest.mark.parametrize(
        "choice", [choice for choice in choices.BACKENDS if choice not in ("auto", "sdpa", "fastest")]
    )
    def test_what_will_not_run_is_refused_with_what_is_missing(self, handles, choice):
        with pytest.raises(
            ValueError, match=r"will not run here: it needs an NVIDIA card.*Choose one of those that will: auto, sdpa"
        ):
            with_attention(handles.model, choice)

    def test_16_bits_are_asked_for_where_a_kernel_needs_them(self, monkeypatch):
        monkeypatch.setattr(attention_module, "_missing", lambda choice, device: None)
        monkeypatch.setattr(attention_module, "_unloadable", lambda choice: None)
        for choice in ("cudnn", "flash", "flash3", "sage"):
            check_attention(choice, HOST, torch.float16)
            with pytest.raises(ValueError, match="16 bits only"):
                check_attention(choice, HOST, torch.float32)

    def test_a_card_too_old_and_a_package_that_is_not_there_are_told(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert available(torch.device("cuda")) == ("auto", "sdpa", "fastest")
        with pytest.raises(ValueError, match=r"does not support this card \(compute capability 7.5\)"):
            check_attention("sage", torch.device("cuda"), torch.float16)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        with pytest.raises(ValueError, match="the package flash_attn is not installed"):
            check_attention("flash", torch.device("cuda"), torch.float16)

    @pytest.mark.parametrize(("found", "runs"), [("1.0.6", False), ("2.1.0", False), ("2.1.1", True), ("2.10.0", True)])
    def test_a_package_older_than_diffusers_calls_is_not_offered(self, monkeypatch, found, runs):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(attention_module, "importable", lambda name: name == "sageattention")
        monkeypatch.setattr(attention_module, "installed", lambda name: found)
        assert ("sage" in available(torch.device("cuda"))) == runs
        if not runs:
            with pytest.raises(
                ValueError, match=f"the package sageattention is {found}, and diffusers calls 2.1.1 and newer only"
            ):
                check_attention("sage", torch.device("cuda"), torch.float16)

    def test_the_lowest_versions_are_those_of_diffusers(self):
        from diffusers.models import attention_dispatch

        needs = attention_module._NEEDS.items()
        lowest = {choice: least for choice, (name, least, _) in needs if least and name != "kernels"}
        assert lowest == {
            choice: getattr(attention_dispatch, f"_REQUIRED_{choice.upper()}_VERSION")
            for choice in ("flash", "xformers", "sage")
        }

    @pytest.mark.parametrize("dtype", ["fp32", "fp16"])
    def test_what_is_chosen_runs_and_afterwards_the_model_is_as_it_was(self, tiny, monkeypatch, dtype):
        """PyTorch's plain kernel stands for one that a card would have; fp16 runs range-safe."""
        monkeypatch.setitem(attention_module.BACKENDS, "sdpa", "_native_math")
        model = open_handles(tiny, dtype, CPU).model
        used, latents, prompts = [], torch.zeros(1, 16, 3, 6, 10), torch.randn(2, 1, 8, TEXT_WIDTH)
        real = torch.nn.attention.sdpa_kernel
        monkeypatch.setattr(
            torch.nn.attention, "sdpa_kernel", lambda *kind, **more: (used.append(kind), real(*kind, **more))[1]
        )
        plain = sample(model, *prompts, latents, seed=1, steps=2)
        assert not used
        chosen = sample(with_attention(model, "sdpa"), *prompts, latents, seed=1, steps=2)
        assert used
        assert ((chosen - plain).norm() / plain.norm()).item() < 2e-3
        used.clear()
        assert torch.equal(sample(model, *prompts, latents, seed=1, steps=2), plain)
        assert not used


def test_the_joined_transformer_is_what_a_checkpoint_loads_to(handles):
    with handles.model.weights.running() as module:
        assert isinstance(module, CogVideoXTransformer3DModel)
        assert all("forward" in vars(block) for block in module.transformer_blocks)


@torch.no_grad()
def test_a_block_that_is_replaced_is_the_others_own_again_afterwards():
    """Skipped it is a transformer without that block; told to run its own it is the same."""
    module = join(build_transformer("1.5").eval())
    given = inputs(module, torch.float32)
    expected = module(**given)[0]

    def skip(own, hidden_states, encoder_hidden_states, *_, **__):
        return hidden_states, encoder_hidden_states

    def same(own, *args, **kwargs):
        return own(*args, **kwargs)

    with blocks_replaced(module, {0: same, 7: skip}):
        assert module(**given)[0].equal(expected)
    with blocks_replaced(module, {1: skip}):
        skipped = module(**given)[0]
    shorter = join(build_transformer("1.5", num_layers=1).eval())
    shorter.load_state_dict({k: v for k, v in module.state_dict().items() if "transformer_blocks.1." not in k})
    assert skipped.equal(shorter(**given)[0])
    assert not skipped.equal(expected)
    assert module(**given)[0].equal(expected)
