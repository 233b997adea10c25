"""The fastest exact kernel is found at the run's own shape, and code of the hub is fetched only where it was chosen.

Stand-ins take the place of kernels that only a card has.
"""

import os
import re
import sys
import time
import types
from dataclasses import replace
from importlib import invalidate_caches

import pytest
import torch
from diffusers.models import attention_dispatch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from cogvideox.choices import BACKENDS
from cogvideox.handles import open_handles, with_attention
from cogvideox.modules import attention as attention_module
from cogvideox.modules import internals
from cogvideox.modules.attention import available, check_attention
from cogvideox.modules.fastest import Fastest, Shape, find_fastest
from cogvideox.modules.joint import attend_in_pieces, join
from cogvideox.sampling import sample
from cogvideox.sentinel import OutOfMemory
from tests.conftest import CPU
from tests.helpers import write_package
from tests.tiny_checkpoint import TEXT_WIDTH, build_transformer
from tests.told import Told

HOST, CARD = torch.device("cpu"), torch.device("cuda")
SHAPE = Shape(batch=2, tokens=40, heads=3, channels=16)


def exact(query, key, value):
    tensors = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*tensors).transpose(1, 2)


def slow(kernel, seconds):
    def run(*tensors):
        time.sleep(seconds)
        return kernel(*tensors)

    return run


def broken(*_):
    raise RuntimeError("no such instruction\nat line 5")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Install a package of a name and a version in this process, and with what it does when it is imported."""
    # It looks once which packages there are.
    import diffusers.models.transformers.cogvideox_transformer_3d  # noqa: F401

    monkeypatch.syspath_prepend(tmp_path)

    def install(name, version=None, does=""):
        write_package(tmp_path, name, version, does)
        monkeypatch.delitem(sys.modules, name, raising=False)
        invalidate_caches()

    yield install
    for name in os.listdir(tmp_path):
        sys.modules.pop(name, None)


@pytest.fixture
def card(monkeypatch):
    """A card of NVIDIA's of that compute capability, or one of AMD's."""

    def put(capability=(9, 0), hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)

    put()
    return put


class TestAvailable:
    @pytest.mark.parametrize("version", ["2.6.3", "2.8.0.post2", "2.10.1+cu130torch2.11"])
    def test_a_package_that_diffusers_takes_is_offered(self, package, card, version):
        assert "flash" not in available(CARD)
        package("flash_attn", version)
        assert "flash" in available(CARD)
        card((7, 5))
        assert "flash" not in available(CARD)

    def test_a_folder_of_that_name_is_no_package(self, package, card):
        """Repositories beside ComfyUI are called kernels too."""
        package("kernels")
        assert not {"flash_hub", "flash3_hub", "sage_hub"} & set(available(CARD))
        with pytest.raises(ValueError, match="the package kernels is not installed"):
            check_attention("flash_hub", CARD, torch.float16)

    @pytest.mark.parametrize("name", ["sageattention", "flash_attn", "flash_attn_interface", "xformers", "kernels"])
    def test_what_others_put_in_the_place_of_a_package_is_none(self, package, card, monkeypatch, name):
        package(name, "9.9")
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        assert available(CARD) == ("auto", "sdpa", "cudnn", "fastest")

    @pytest.mark.parametrize("architecture", [(9, 0), (9, 4), (11, 0), (12, 0)])
    def test_amds_cards_have_what_is_made_for_them(self, package, card, architecture):
        for name in ("sageattention", "flash_attn", "flash_attn_interface", "xformers", "kernels"):
            package(name, "9.9")
        card(architecture, hip="7.0")
        assert available(CARD) == ("auto", "sdpa", "flash", "xformers", "fastest")
        with pytest.raises(ValueError, match=r"sage will not run here: it needs an NVIDIA card, .*one of AMD's"):
            check_attention("sage", CARD, torch.float16)

    def test_a_package_for_another_pytorch_is_said_before_the_run(self, package, card, monkeypatch):
        package("flash_attn", "2.8.3", "raise ImportError('undefined symbol: _ZN3c10')")
        package("sageattention", "2.2.0")
        with pytest.raises(
            ValueError, match=r"package flash_attn 2\.8\.3 is .* loaded \(undefined symbol: _ZN3c10\)"
        ) as said:
            check_attention("flash", CARD, torch.float16)
        assert f"the build for PyTorch {torch.__version__}" in str(said.value)
        # Neither what was asked for nor what will not run either.
        assert str(said.value).endswith("Choose one of those that will: auto, sdpa, cudnn, fastest.")
        # What loads, and lacks what diffusers calls.
        with pytest.raises(ValueError, match=r"sageattention 2\.2\.0 is installed but cannot be loaded"):
            check_attention("sage", CARD, torch.float16)
        kernels = attention_module.exact_kernels(CARD, torch.float16)
        with pytest.raises(RuntimeError, match="undefined symbol"):
            kernels["flash"](*torch.zeros(3, 1, 4, 1, 8))
        monkeypatch.setattr("diffusers.models.attention_dispatch._CAN_USE_FLASH_ATTN", True)
        check_attention("flash", CARD, torch.float16)


class TestScores:
    """Where a device has no kernel that goes without them, a card of few gigabytes has no room for all."""

    @pytest.mark.parametrize("most", [1, 40 * 12 * 7, 1 << 30])
    def test_a_few_at_a_time_give_what_all_give(self, most):
        query, key, value = torch.randn(3, 2, 40, 3, 8)
        calls = []

        def kernel(query, key, value):
            calls.append(query.shape[0] * query.shape[1] * query.shape[2] * key.shape[1] * 12)
            return exact(query, key, value)

        ours = attend_in_pieces(kernel, most, query, key, value)
        assert (ours - exact(query, key, value)).abs().max() < 1e-6
        assert max(calls) <= max(most, 40 * 12)
        assert (len(calls) > 1) == (most < 1 << 30)

    @pytest.mark.parametrize(
        ("device", "lacks"), [("cpu", False), ("mps", True), ("privateuseone", True), ("cuda", False), ("meta", False)]
    )
    def test_torch_is_asked_where_it_knows(self, device, lacks, monkeypatch):
        """A card that is not here is not asked."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert internals.lacks_fused_attention(torch.float32, torch.device(device), 64) == lacks
        with sdpa_kernel(SDPBackend.MATH):
            assert internals.lacks_fused_attention(torch.float32, torch.device("cpu"), 64)

    def test_fastest_times_it_so_too(self, monkeypatch):
        monkeypatch.setattr(attention_module, "_MOST_SCORES", 40 * 12 * 7)
        monkeypatch.setattr(internals, "lacks_fused_attention", lambda *_: True)
        (kernel,) = attention_module.exact_kernels(HOST, torch.float32).values()
        query, key, value = torch.randn(3, 2, 40, 3, 8)
        assert kernel.func is attend_in_pieces
        assert (kernel(query, key, value) - exact(query, key, value)).abs().max() < 1e-6


class TestFastest:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_the_fastest_is_taken_and_the_figures_are_said(self, dtype):
        kernels = {"sdpa": slow(exact, 0.02), "quick": exact, "slow": slow(exact, 0.03)}
        found = find_fastest(kernels, SHAPE, dtype, HOST)
        assert found.choice == "quick"
        for text in ("quick is the fastest", "40 tokens", "3 of 3 heads", "sdpa 2", "slow 3"):
            assert text in found.text

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_one_that_is_not_within_rounding_is_out_however_fast(self, dtype):
        def coarse(query, key, value):
            return exact(*(x.to(torch.float8_e4m3fn).to(dtype) for x in (query, key, value)))

        def nan(*tensors):
            return exact(*tensors) * float("nan")

        kernels = {"sdpa": slow(exact, 0.02), "coarse": coarse, "nan": nan, "broken": broken}
        found = find_fastest(kernels, SHAPE, dtype, HOST)
        assert found.choice == "sdpa"
        assert "coarse is out: it is" in found.text
        assert "nan is out: it is nan away from sdpa" in found.text
        assert "broken is out: no such instruction)" in found.text

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda result: result.double(), r"gives float64 \[2, 40, 3, 16\] for float32 \[2, 40, 3, 16\]"),
            (lambda result: result[None], r"gives float32 \[1, 2, 40, 3, 16\] for"),
            (lambda result: (result, None), "gives a tuple for"),
            (lambda result: None, "gives a NoneType for"),
        ],
    )
    def test_one_that_gives_something_else_is_out(self, change, said):
        kernels = {"sdpa": slow(exact, 0.02), "odd": lambda *tensors: change(exact(*tensors))}
        found = find_fastest(kernels, SHAPE, torch.float32, HOST)
        assert found.choice == "sdpa"
        assert re.search(f"odd is out: it {said}", found.text)

    def test_one_that_writes_into_what_it_is_given_spoils_no_other(self):
        def in_place(query, key, value):
            result = exact(query, key, value)
            key.fill_(float("nan"))
            return result

        found = find_fastest({"sdpa": slow(exact, 0.02), "wild": in_place, "good": exact}, SHAPE, torch.float32, HOST)
        assert " is out" not in found.text

    def test_every_result_counts_and_not_the_first_alone(self):
        calls = []

        def tires(*tensors):
            calls.append(1)
            return exact(*tensors) * (len(calls) < 3)

        found = find_fastest({"sdpa": slow(exact, 0.02), "tires": tires}, SHAPE, torch.float32, HOST)
        assert found.choice == "sdpa"
        assert "tires is out: it is 1.0e+00 away" in found.text

    def test_one_that_is_slow_takes_no_more_than_the_time_there_is(self):
        now, calls = [0.0], []

        def takes(seconds):
            def run(*tensors):
                now[0] += seconds
                calls.append(seconds)
                return exact(*tensors)

            return run

        kernels = {"sdpa": takes(0.01), "slow": takes(1.5), "last": takes(0.001)}
        found = find_fastest(kernels, SHAPE, torch.float32, HOST, clock=lambda: now[0])
        # It is begun once more, while there is time; then nothing is.
        assert (calls.count(1.5), calls.count(0.001), found.choice) == (2, 0, "sdpa")
        assert "last is out: no time was left for it" in found.text

    def test_what_is_drawn_afterwards_does_not_depend_on_it(self):
        before = torch.get_rng_state()
        find_fastest({"sdpa": exact, "other": exact}, SHAPE, torch.float32, HOST)
        assert torch.equal(torch.get_rng_state(), before)

    def test_rounding_itself_is_not_an_error(self):
        def by_hand(query, key, value):
            weights = torch.einsum("bqhc,bkhc->bhqk", query.double() / 4, key.double()).softmax(-1)
            return torch.einsum("bhqk,bkhc->bqhc", weights, value.double()).to(query.dtype)

        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert find_fastest({"sdpa": slow(exact, 0.02), "hand": by_hand}, SHAPE, dtype, HOST).choice == "hand"

    def test_a_long_attention_is_timed_on_fewer_heads_in_two_seconds(self):
        """By a clock that a kernel moves on: a tenth of a second a head."""
        now, heads = [0.0], []

        def heavy(query, key, value):
            now[0] += 0.1 * query.shape[2]
            heads.append(query.shape[2])
            assert query.shape[:2] == (2, 40)
            return exact(query, key, value)

        shape = Shape(2, 40, 48, 16)
        found = find_fastest({"sdpa": heavy, "other": heavy}, shape, torch.float32, HOST, clock=lambda: now[0])
        assert now[0] <= 2.0
        assert 1 < max(heads) < 48
        assert f"{max(heads)} of 48 heads" in found.text

    def test_a_card_with_one_kernel_is_not_asked(self):
        assert find_fastest({"sdpa": broken}, SHAPE, torch.float32, HOST) == Fastest(
            "sdpa", "Attention: sdpa is the only exact kernel here."
        )

    def test_a_run_takes_it_at_its_own_shape_and_times_once_in_a_process(self, tiny, monkeypatch):
        """PyTorch's plain kernel stands for one that a card would have."""
        monkeypatch.setitem(BACKENDS, "math", "_native_math")
        monkeypatch.setattr(attention_module, "_EXACT", ("sdpa", "math"))
        monkeypatch.setattr(attention_module, "_FP32", ("sdpa", "math", "fastest"))
        monkeypatch.setattr(attention_module, "_timed", {})
        asked = []

        def find(kernels, shape, dtype, device):
            asked.append((tuple(kernels), shape, dtype))
            return Fastest("math", "Attention: math is the fastest.")

        monkeypatch.setattr(attention_module, "find_fastest", find)
        used, real = [], torch.nn.attention.sdpa_kernel
        monkeypatch.setattr(
            torch.nn.attention, "sdpa_kernel", lambda *kind, **more: (used.append(kind), real(*kind, **more))[1]
        )
        latents, prompts = torch.zeros(1, 16, 3, 6, 10), torch.randn(2, 1, 226, TEXT_WIDTH)
        for dtype, ran in (("fp32", torch.float32), ("fp16", torch.float16)):
            model, said = with_attention(open_handles(tiny, dtype, CPU).model, "fastest"), []
            for _ in range(2):
                sample(model, *prompts, latents, seed=1, steps=1, events=Told(said))
            # A run that is not guided has half the batch.
            sample(model, *prompts, latents, seed=1, steps=1, cfg=1.0)
            assert [entry[2] for entry in asked] == [ran, ran]
            assert [entry[1] for entry in asked] == [Shape(batch, 226 + 2 * 3 * 5, 2, 64) for batch in (2, 1)]
            assert asked[0][0] == ("sdpa", "math")
            assert said.count("Attention: math is the fastest.") == 2
            asked.clear()
        assert used

    def test_on_a_host_it_is_sdpa_bit_for_bit(self, handles):
        latents, prompts = torch.zeros(1, 16, 3, 6, 10), torch.randn(2, 1, 226, TEXT_WIDTH)
        given = (*prompts, latents)
        said = []
        ours = sample(with_attention(handles.model, "fastest"), *given, seed=1, steps=2, events=Told(said))
        assert torch.equal(ours, sample(with_attention(handles.model, "sdpa"), *given, seed=1, steps=2))
        assert "sdpa is the only exact kernel here" in " ".join(said)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_what_another_program_sets_in_diffusers_changes_nothing(tiny, dtype):
    """Another pack's ``set_attention_backend`` holds for the whole process, as DIFFUSERS_ATTN_BACKEND does."""
    from diffusers.models.attention_dispatch import attention_backend

    model = open_handles(tiny, dtype, CPU).model
    latents, prompts = torch.zeros(1, 16, 3, 6, 10), torch.randn(2, 1, 8, TEXT_WIDTH)
    given = dict(seed=1, steps=2)
    expected = sample(model, *prompts, latents, **given)
    module = join(build_transformer("1.5")).eval()
    text, video = torch.randn(1, 8, 128), torch.randn(1, 40, 128)
    attend = module.transformer_blocks[0].attn1
    plain = attend(video, encoder_hidden_states=text)
    used, real = [], torch.nn.attention.sdpa_kernel
    with attention_backend("_native_math"), pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            torch.nn.attention, "sdpa_kernel", lambda *kind, **more: (used.append(kind), real(*kind, **more))[1]
        )
        assert torch.equal(sample(model, *prompts, latents, **given), expected)
        assert all(torch.equal(*pair) for pair in zip(attend(video, encoder_hidden_states=text), plain, strict=True))
    assert not used


class TestChosen:
    """A kernel of another package, which a stand-in for diffusers' dispatch takes the place of."""

    @pytest.fixture
    def chosen(self, tiny, monkeypatch):
        """``chosen(kernel, dtype)``: the model with the attention ``flash``, which is ``kernel``."""
        dispatch = attention_dispatch.dispatch_attention_fn

        def choose(kernel, dtype="bf16"):
            def stand_in(query, key, value, backend, **more):
                if backend.value == "flash":
                    return kernel(query, key, value)
                return dispatch(query, key, value, backend=backend, **more)

            monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", stand_in)
            return replace(open_handles(tiny, dtype, CPU).model, attention="flash")

        return choose

    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_a_run_that_is_healed_in_fp32_goes_on_in_sdpa_where_it_computes_in_16_bits(self, chosen, dtype):
        calls = []

        def flash(query, key, value):
            if query.dtype == torch.float32:
                raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
            calls.append(query.dtype)
            return exact(query, key, value) * (torch.nan if len(calls) > 4 else 1.0)

        events = Told()
        latents, prompts = torch.zeros(1, 16, 3, 6, 10), torch.randn(2, 1, 8, TEXT_WIDTH)
        assert sample(chosen(flash, dtype), *prompts, latents, seed=1, steps=3, events=events).isfinite().all()
        assert "Going on from here in fp32" in events.heals[-1]
        assert "flash computes in 16 bits only, so in fp32 sdpa takes its place" in " ".join(events.notes)

    def test_one_that_raises_ends_the_run_before_its_first_step_with_a_sentence(self, chosen):
        def unbuilt(*_):
            raise ValueError("Unsupported CUDA architecture: sm100")

        latents, prompts, steps = torch.zeros(1, 16, 3, 6, 10), torch.randn(2, 1, 8, TEXT_WIDTH), []
        with pytest.raises(RuntimeError, match=r"flash does not run on this card \(Unsup.*sm100\)\. Choose fastest or"):
            sample(chosen(unbuilt), *prompts, latents, seed=1, steps=1, events=Told(step=lambda *_: steps.append(1)))
        assert not steps

    def test_memory_that_runs_out_while_it_is_tried_is_that(self, chosen):
        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        latents, prompts = torch.zeros(1, 16, 3, 6, 10), torch.randn(2, 1, 8, TEXT_WIDTH)
        with pytest.raises(OutOfMemory):
            sample(chosen(full), *prompts, latents, seed=1, steps=1)


class TestHub:
    @pytest.fixture(autouse=True)
    def kernels(self, package, card):
        package("kernels", "0.17.2")

    def test_they_are_offered_where_the_package_is_there_and_the_card_fits(self, card, package, monkeypatch):
        monkeypatch.setattr(attention_module, "is_at_least", lambda *_: True)
        assert {"flash_hub", "flash3_hub", "sage_hub"} <= set(available(CARD))
        card((8, 9))
        assert {"flash_hub", "flash3_hub", "sage_hub"} & set(available(CARD)) == {"flash_hub", "sage_hub"}
        card()
        package("kernels", "0.11.0")
        with pytest.raises(ValueError, match=r"the package kernels is 0\.11\.0, and diffusers calls 0\.12"):
            check_attention("flash_hub", CARD, torch.float16)
        card((7, 5))
        with pytest.raises(ValueError, match="does not support this card"):
            check_attention("sage_hub", CARD, torch.float16)

    def test_their_names_are_diffusers(self):
        from diffusers.models.attention_dispatch import AttentionBackendName

        if attention_module.is_at_least("diffusers", "0.37"):
            for choice in ("flash_hub", "flash3_hub", "sage_hub"):
                assert AttentionBackendName(BACKENDS[choice])

    def test_an_old_diffusers_is_named(self, monkeypatch):
        monkeypatch.setattr(attention_module, "is_at_least", lambda *_: False)
        with pytest.raises(ValueError, match=r"diffusers is .*, and has this kernel from 0\.37"):
            check_attention("flash_hub", CARD, torch.float16)

    def test_nothing_is_fetched_unless_it_was_chosen(self, monkeypatch):
        fetched = []
        monkeypatch.setattr(attention_module, "_fetched", set())
        monkeypatch.setattr("diffusers.models.attention_dispatch._maybe_download_kernel_for_backend", fetched.append)
        monkeypatch.setattr(
            "diffusers.models.attention_dispatch._check_attention_backend_requirements", lambda backend: None
        )
        assert "flash_hub" not in attention_module.exact_kernels(CARD, torch.bfloat16)
        assert fetched == []
        said = []
        attention_module._fetch("flash_hub", lambda text, level: said.append(text))
        attention_module._fetch("flash_hub", lambda text, level: said.append(text))
        assert [backend.value for backend in fetched] == ["flash_hub"]
        assert ["downloaded when it is first used" in text for text in said] == [True]
        # What was chosen before takes part.
        assert "flash_hub" in attention_module.exact_kernels(CARD, torch.bfloat16)

    def test_a_kernel_that_cannot_be_fetched_ends_in_a_sentence(self, monkeypatch):
        def unreachable(backend):
            raise OSError("no route to host")

        monkeypatch.setattr(attention_module, "_fetched", set())
        monkeypatch.setattr("diffusers.models.attention_dispatch._maybe_download_kernel_for_backend", unreachable)
        monkeypatch.setattr(
            "diffusers.models.attention_dispatch._check_attention_backend_requirements", lambda backend: None
        )
        with pytest.raises(
            RuntimeError, match=r"sage_hub could not be loaded .*no route to host.*Choose fastest or sdpa"
        ):
            attention_module._fetch("sage_hub", lambda text, level: None)

    def test_the_sageattention_of_the_index_is_named_for_what_it_is(self, package):
        package("sageattention", "1.0.6")
        with pytest.raises(ValueError, match=r"pip install sageattention gives 1\.0\.6, which makes black frames"):
            check_attention("sage", CARD, torch.float16)
