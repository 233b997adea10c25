"""Memory that runs out is known by what each back end says of it, and every part of a run goes on in less."""

import pytest
import torch

from cogvideox import weights as weights_module
from cogvideox.handles import open_handles
from cogvideox.modules.strips import Strips
from cogvideox.out_of_memory import empty_cache, is_out_of_memory
from cogvideox.sampling import sample
from cogvideox.sentinel import OutOfMemory
from cogvideox.text import encode_prompt
from cogvideox.vae import decode
from tests.conftest import CPU
from tests.told import Told

SAID = {
    "mps": "MPS backend out of memory (MPS allocated: 18.06 GB, other allocations: 1.2 MB, max allowed: 18.13 GB). "
    "Tried to allocate 512.00 MB on private pool.",
    "mps buffer": "Invalid buffer size: 24.05 GiB",
    "cuda": "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "rocm": "HIP error: out of memory",
    "cublas": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cudnn": "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "xpu": "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "linux": "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "6442450944 bytes. Error code 12 (Cannot allocate memory)",
    "windows": "[enforce fail at alloc_cpu.cpp:116] data. DefaultCPUAllocator: not enough memory: you tried to "
    "allocate 6442450944 bytes.",
}


class TestWhatIsRecognised:
    @pytest.mark.parametrize("said", SAID.values(), ids=SAID)
    def test_what_each_back_end_says(self, said):
        assert is_out_of_memory(RuntimeError(said))

    def test_errors_of_a_class_of_their_own(self):
        assert is_out_of_memory(torch.OutOfMemoryError("full"))
        assert is_out_of_memory(MemoryError())
        if hasattr(torch, "AcceleratorError"):
            assert is_out_of_memory(torch.AcceleratorError(SAID["cuda"], 2))
            assert not is_out_of_memory(torch.AcceleratorError("CUDA error: an illegal memory access", 700))

    def test_nothing_else(self):
        assert not is_out_of_memory(None)
        assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        # What the engine says itself has been dealt with.
        assert not is_out_of_memory(OutOfMemory("cuda:0 ran out of memory"))
        assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_the_cache_of_each_device_is_emptied(monkeypatch, kind):
    emptied = []
    for name in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(getattr(torch, name), "empty_cache", lambda name=name: emptied.append(name))
    empty_cache(torch.device(kind))
    empty_cache(torch.device("cpu"))
    assert emptied == [kind]


class TestARunGoesOn:
    @pytest.fixture(params=["mps", "linux"])
    def fail(self, request):
        def fail(*_):
            raise RuntimeError(SAID[request.param])

        return fail

    @pytest.fixture
    def loaded(self, monkeypatch):
        """``loaded(kind, hook)``: a part of that kind has a hook before it runs."""
        real = weights_module.load_module

        def inject(kind, hook):
            def load(part, *given):
                module = real(part, *given)
                if part.kind == kind:
                    module.register_forward_pre_hook(hook)
                return module

            monkeypatch.setattr(weights_module, "load_module", load)

        return inject

    def test_the_transformer_in_the_next_mode(self, tiny, prompts, fail, loaded):
        latent, said, calls = torch.zeros(1, 16, 4, 6, 10), [], []
        loaded("transformer", lambda *_: calls.append(1) or (fail() if len(calls) == 3 else None))
        how = dict(seed=1, steps=4, cfg=1.0)
        sample(open_handles(tiny, "fp32", CPU).model, *prompts, latent, **how, events=Told(heals=said))
        assert "step 3 of 4: cpu ran out of memory with the transformer in gpu" in said[0]

    def test_with_the_latents_where_there_is_no_smaller_one(self, tiny, prompts, fail, loaded):
        latent, calls = torch.zeros(1, 16, 4, 6, 10), []
        loaded("transformer", lambda *_: calls.append(1) or (fail() if len(calls) > 2 else None))
        with pytest.raises(OutOfMemory, match="step 3 of 4") as caught:
            sample(open_handles(tiny, "fp32", CPU).model, *prompts, latent, seed=1, steps=4, cfg=1.0)
        assert caught.value.latents.any()

    def test_the_vae_in_half_the_memory(self, tiny, fail, monkeypatch):
        real, calls, said = Strips._tick, [], []
        latents = torch.randn(1, 16, 5, 4, 4)
        vae = open_handles(tiny, "fp32", CPU).vae
        expected = decode(vae, latents)
        monkeypatch.setattr(
            Strips, "_tick", lambda strips: fail() if len(calls) == 20 and not said else calls.append(1) or real(strips)
        )
        assert (decode(vae, latents, events=Told(heals=said)) - expected).abs().max() < 1e-5
        assert "ran out of memory. Going on from here with at most 8.59 GB" in said[0]


class TestWhatDoesNotEvenLoad:
    @pytest.fixture
    def opened(self, tiny, monkeypatch):
        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        monkeypatch.setattr(weights_module, "load_module", fail)
        return open_handles(tiny, "fp32", CPU)

    def test_the_vae_says_so_in_a_sentence(self, opened):
        with pytest.raises(
            OutOfMemory,
            match=r"^cpu ran out of memory while the VAE was loaded, which takes .* so something else fills it",
        ):
            decode(opened.vae, torch.randn(1, 16, 1, 4, 4))

    def test_the_text_encoders_sentence_is_not_about_the_video(self, opened):
        with pytest.raises(OutOfMemory, match="^loading: cpu ran out of memory with the text encoder") as caught:
            encode_prompt(opened.text_encoder, "a panda")
        assert "Make the video smaller" not in str(caught.value)
        assert "quantize the text encoder" in str(caught.value)

    def test_the_latents_of_the_decode_node_are_saved(self, pack, tiny, tmp_path, monkeypatch):
        import sys

        monkeypatch.chdir(tmp_path)
        nodes = pack.NODE_CLASS_MAPPINGS
        _, _, vae, _ = nodes["CogVideoX15ModelLoader"]().run(model=str(tiny), dtype="fp32")

        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

        monkeypatch.setattr(sys.modules[f"{pack.__name__}.cogvideox.weights"], "load_module", fail)
        with pytest.raises(
            RuntimeError, match="while the VAE was loaded.* CogVideoX_unfinished_00001.latent can be opened"
        ):
            nodes["CogVideoX15VAEDecode"]().run(samples={"samples": torch.randn(1, 16, 3, 4, 4)}, vae=vae)
        assert (tmp_path / "CogVideoX_unfinished_00001.latent").is_file()
