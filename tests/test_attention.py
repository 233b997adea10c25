"""The fastest exact kernel is found at the run's own shape, and code of the hub is fetched only where it was chosen.

Stand-ins take the place of kernels that only a card has.
"""

import time

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cogvideox.choices import BACKENDS
from cogvideox.handles import open_handles, with_attention
from cogvideox.modules import attention as attention_module
from cogvideox.modules.attention import available, check_attention
from cogvideox.modules.fastest import Fastest, Shape, find_fastest
from cogvideox.sampling import sample
from tests.conftest import CPU
from tests.tiny_checkpoint import TEXT_WIDTH
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


class TestHub:
    @pytest.fixture
    def card(self, monkeypatch):
        """A card of that compute capability, and that version of the package ``kernels``."""

        def put(capability=(9, 0), version="0.17.2"):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
            monkeypatch.setattr(attention_module, "find_spec", lambda name: name == "kernels" or None)
            real = attention_module.version
            monkeypatch.setattr(attention_module, "version", lambda name: version if name == "kernels" else real(name))

        return put

    def test_they_are_offered_where_the_package_is_there_and_the_card_fits(self, card):
        card()
        assert {"flash_hub", "flash3_hub", "sage_hub"} <= set(available(CARD))
        card((8, 9))
        assert {"flash_hub", "flash3_hub", "sage_hub"} & set(available(CARD)) == {"flash_hub", "sage_hub"}
        card(version="0.11.0")
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

    def test_an_old_diffusers_is_named(self, card, monkeypatch):
        card()
        monkeypatch.setattr(attention_module, "is_at_least", lambda *_: False)
        with pytest.raises(ValueError, match=r"diffusers is .*, and has this kernel from 0\.37"):
            check_attention("flash_hub", CARD, torch.float16)

    def test_nothing_is_fetched_unless_it_was_chosen(self, card, monkeypatch):
        fetched = []
        card()
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

    def test_the_sageattention_of_the_index_is_named_for_what_it_is(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(attention_module, "find_spec", lambda name: name == "sageattention" or None)
        monkeypatch.setattr(attention_module, "version", lambda name: "1.0.6")
        with pytest.raises(ValueError, match=r"pip install sageattention gives 1\.0\.6, which makes black frames"):
            check_attention("sage", CARD, torch.float16)
