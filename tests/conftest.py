import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from cogvideox.checkpoint.layout import open_part
from cogvideox.handles import open_handles
from cogvideox.precision.hardware import Hardware
from tests.loud_models import loud_stream, loud_t5
from tests.reference import draw_prompts
from tests.tiny_checkpoint import TEXT_WIDTH, build_checkpoint, build_deep

ROOT = Path(__file__).parent.parent
CPU = Hardware(torch.device("cpu"), "CPU")


SIDE_BY_SIDE = "PYTEST_XDIST_WORKER" in os.environ

if SIDE_BY_SIDE:
    # For what the tests start: two processes that wait for each other's threads take many times as long.
    os.environ["OMP_NUM_THREADS"] = "1"
    # For the few kernels that inductor compiles here, processes to do it in take longer to start.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"


def _draw_nothing(name):
    """Have a tensor without memory left alone where values would be drawn: torch takes a third of the time of building
    a module to do nothing."""
    draw = getattr(torch.Tensor, name)
    setattr(torch.Tensor, name, lambda self, *given, **more: self if self.is_meta else draw(self, *given, **more))


for _name in ("uniform_", "normal_"):
    _draw_nothing(_name)


def pytest_collection_finish():
    # Some million objects of torch, transformers and the tests live to the end: a collection need not look at them.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


@pytest.fixture(scope="session", autouse=True)
def _repeatable():
    torch.manual_seed(0)
    torch.set_num_threads(1 if SIDE_BY_SIDE else 2)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """``checkpoints(variant)``: the folder of a tiny checkpoint of that variant, built once."""
    built = {}

    def get(variant="1.5"):
        if variant not in built:
            built[variant] = build_checkpoint(tmp_path_factory.mktemp("checkpoints") / f"tiny-{variant}", variant)
        return built[variant]

    return get


@pytest.fixture(scope="session")
def tiny(checkpoints):
    """The folder of a tiny CogVideoX-1.5 text-to-video checkpoint. Tests that change files copy it first."""
    return checkpoints("1.5")


@pytest.fixture(scope="session")
def handles(tiny):
    return open_handles(tiny, "fp32", CPU)


@pytest.fixture(scope="session")
def pipeline(tiny):
    """The unmodified reference pipeline on the tiny checkpoint, in fp32."""
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(tiny, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def use_backend(monkeypatch):
    """Sets what stands in for inductor, which needs no C++ compiler."""
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda *_: "none")
    return lambda backend: monkeypatch.setattr("cogvideox.modules.compiled._BACKEND", backend)


@pytest.fixture(scope="session")
def prompts():
    """Short ones, which all variants but 2b and 5b-i2v run with."""
    return draw_prompts(8)


@pytest.fixture(scope="session")
def long_prompts():
    return draw_prompts()


@pytest.fixture(scope="session")
def part(tiny):
    """The transformer of the tiny checkpoint, as it lies on disk."""
    return open_part(tiny / "transformer", "transformer")


@pytest.fixture(scope="session")
def inputs():
    """What the tiny transformer is called with."""
    generator = torch.Generator().manual_seed(6)
    return dict(
        hidden_states=torch.randn(1, 2, 16, 6, 10, generator=generator),
        encoder_hidden_states=torch.randn(1, 8, TEXT_WIDTH, generator=generator),
        timestep=torch.tensor([500]),
        image_rotary_emb=None,
        return_dict=False,
    )


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """The folder of a tiny checkpoint of several blocks, stored in fp32, for what works block by block."""
    return build_deep(tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="session")
def loud(tmp_path_factory):
    """The folder of a tiny checkpoint whose residual streams pass 1e5: plain fp16 cannot hold them."""

    def change(parts):
        loud_stream(parts["transformer"], 3e4, gate=10.0)
        loud_t5(parts["text_encoder"], 3e4, 3e3)

    return build_checkpoint(tmp_path_factory.mktemp("loud") / "loud", change=change)


@pytest.fixture(scope="module")
def model(deep):
    return open_handles(deep, "fp32", CPU).model


@pytest.fixture(scope="session")
def pack():
    return load_pack()


def load_pack():
    """The pack, loaded as ComfyUI loads a custom node: from its folder, under a name that is not its own."""
    name = "custom_nodes_cogvideox"
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
