"""Torch checkpoints: every tensor is found where it lies, and nothing of what a pickle says is run or believed."""

import argparse
import io
import os
import pickle
import random
import time
import zipfile
from collections import OrderedDict
from contextlib import suppress

import numpy as np
import pytest
import torch

from cogvideox.checkpoint.layout import open_checkpoint
from cogvideox.checkpoint.pickles import read_pickle_header
from tests import layouts
from tests.tiny_checkpoint import build_transformer


def saved(file, state, **options):
    torch.save(state, file, **options)
    return file


def refused(file):
    with pytest.raises(ValueError, match=r".{40}") as caught:
        read_pickle_header(file)
    return str(caught.value)


def records(file, change):
    """An archive written again, each record as ``change(archive, name, content)`` writes it."""
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in contents.items():
            change(archive, name, content)
    return file


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_of_every_dtype_lie_where_they_are_said_to(tmp_path, protocol):
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    state = {
        str(dtype): (base * 3).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    }
    state |= {str(dtype): (base * 9).to(dtype) for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool)}
    state |= {
        "part": base[2:4],
        "same": base,
        "scalar": torch.tensor(3.0),
        "none": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(base.clone()),
    }
    state["marked"] = torch.nn.Parameter(base + 1)
    state["marked"].model_parallel = True
    file = saved(
        tmp_path / "x.pt", {"module": OrderedDict(state), "size": base.shape, "set": {1}}, pickle_protocol=protocol
    )
    found, content = read_pickle_header(file), file.read_bytes()
    assert set(found) == set(state)
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (state[name].dtype, tuple(state[name].shape))
        numbers = torch.frombuffer(
            bytearray(content[tensor.offset : tensor.offset + tensor.nbytes] or b"\0"), dtype=torch.uint8
        )
        assert numbers[: tensor.nbytes].equal(state[name].detach().contiguous().view(-1).view(torch.uint8)), name


def test_checkpoints_of_sats_own_trainer_open(tmp_path):
    """What ``save_ds_checkpoint`` of SAT and DeepSpeed's ``_save_checkpoint`` put beside the weights."""
    state = layouts.sat_names(build_transformer().state_dict())
    beside = {
        "iteration": 500,
        "client_lr_scheduler": {"start_lr": 1e-4, "num_iters": 500, "decay_style": "cosine", "best": np.float64(0.1)},
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "optimizer": None,
        "buffer_names": ["a"],
        "param_shapes": [OrderedDict(a=torch.ones(2, 3).shape)],
        "sparse_tensor_module_names": set(),
        "ds_config": {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}},
        "ds_version": "0.15.1",
    }
    (tmp_path / "500").mkdir()
    (tmp_path / "latest").write_text("500")
    file = saved(tmp_path / "500" / "mp_rank_00_model_states.pt", {"module": state, **beside})
    assert set(read_pickle_header(file)) == set(state)
    assert open_checkpoint(tmp_path).variant.name.startswith("CogVideoX1.5")
    # The same from a machine with numpy 1.
    content = file.read_bytes()
    old = tmp_path / "old.pt"
    with zipfile.ZipFile(old, "w") as archive, zipfile.ZipFile(io.BytesIO(content)) as new:
        for name in new.namelist():
            archive.writestr(name, new.read(name).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    assert set(read_pickle_header(old)) == set(state)


class Calls:
    """Pickles to a call."""

    def __init__(self, function, *args):
        self.what = function, args

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("where", ["in the place of a tensor", "beside", "as a whole", "in a list"])
def test_what_would_run_code_is_refused_by_its_name_and_not_run(tmp_path, where):
    trap = tmp_path / "it-ran"
    for call in (
        Calls(os.mkdir, str(trap)),
        Calls(eval, f"open({str(trap)!r}, 'w')"),
        Calls(torch.load, str(trap)),
        Calls(np.load, str(trap)),
    ):
        place = {
            "in the place of a tensor": {"module": {"a": call}},
            "beside": {"module": {"a": torch.ones(1)}, "x": call},
            "as a whole": call,
        }
        said = refused(saved(tmp_path / "x.pt", place.get(where, [call])))
        assert "holds more than tensors" in said
        assert f".{call.what[0].__name__})" in said
        assert not trap.exists()
    assert "argparse.Namespace" in refused(saved(tmp_path / "x.pt", {"module": {}, "args": argparse.Namespace(lr=1)}))


UNREADABLE = {
    "sparse": lambda: torch.ones(3).to_sparse(),
    "quantized by torch": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "meta": lambda: torch.ones(3, device="meta"),
    "complex64": lambda: torch.ones(3, dtype=torch.complex64),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "one piece": lambda: torch.ones(4, 6).t(),
    "in 4 bytes": lambda: torch.zeros(1).expand(10**6, 10**6),
    "uint16": lambda: torch.ones(3, dtype=torch.uint16),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", UNREADABLE)
def test_tensors_that_are_no_plain_numbers_are_refused_by_name(tmp_path, what):
    said = refused(saved(tmp_path / "x.pt", {"module": {"layer.weight": UNREADABLE[what]()}}))
    assert what in said
    assert "layer.weight" in said
    assert "cannot be read in place" in said


def test_such_tensors_beside_the_weights_do_not_matter(tmp_path):
    file = saved(
        tmp_path / "x.pt",
        {"module": {"a": torch.ones(2)}, "optimizer": {0: torch.ones(4, 6).t(), "b": UNREADABLE["sparse"]()}},
    )
    assert set(read_pickle_header(file)) == {"a"}


def test_names_that_are_none(tmp_path):
    assert "has tensors under 1" in refused(saved(tmp_path / "x.pt", {"module": {1: torch.ones(2)}}))
    assert "and weights have names" in refused(saved(tmp_path / "x.pt", {"module": {("a", 1): torch.ones(2)}}))


def test_a_state_that_holds_itself(tmp_path):
    state = {"a": torch.ones(2)}
    state["module"] = state
    assert set(read_pickle_header(saved(tmp_path / "x.pt", state))) == {"a"}


def pickled(content):
    """Another list of tensors in the place of an archive's."""
    return lambda archive, name, old: archive.writestr(name, content if name.endswith("data.pkl") else old)


class TestArchives:
    """An archive is what torch.save writes, or is said not to be."""

    @pytest.fixture
    def file(self, tmp_path):
        return saved(tmp_path / "x.pt", {"module": {"a": torch.ones(2, 3)}})

    def test_packed_again_with_compression(self, file):
        said = refused(
            records(file, lambda archive, name, content: archive.writestr(name, content, zipfile.ZIP_DEFLATED))
        )
        assert "packed again, with compression" in said

    def test_a_list_of_tensors_of_200_mb_in_a_file_of_200_kb(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.writestr("x/data.pkl", b"\x80\x02" + b"]" * 20_000_000)
        assert "with compression" in refused(tmp_path / "x.pt")

    def test_a_list_of_tensors_of_endless_instructions(self, file):
        start = time.process_time()
        for content in (b"\x80\x02" + b"]" * 17_000_000, b"\x80\x02" + b"]" * 1_500_000 + b"."):
            said = refused(records(file, pickled(content)))
            assert "would take 17,000,002 bytes" in said or "more than 400,000 instructions" in said
        assert time.process_time() - start < 10

    def test_tuples_in_tuples_as_a_name(self, file):
        content = b"\x80\x02}(" + b")" + b"\x85" * 300_000 + b"K\x01u."
        records(file, pickled(content))
        assert read_pickle_header(file) == {}

    @pytest.mark.parametrize(
        "content",
        [
            b"\x80\x02.",
            b"\x80\x02(((",
            b"\x80\x02h\x07.",
            b"",
            b"\x80\x02}u.",
            b"\x80\x02X\xff\xff\xff\x7f.",
            b"(lp0\n.",
        ],
    )
    def test_a_list_of_tensors_that_makes_no_sense(self, file, content):
        assert "its list of tensors" in refused(records(file, pickled(content)))

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_two_records_of_one_name(self, file):
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(archive.namelist()[-1], b"x")
        assert "two records of the archive have one name" in refused(file)

    def test_no_list_of_tensors_or_two(self, file):
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("other/data.pkl", b"\x80\x02}.")
        assert "holds 2 data.pkl" in refused(file)
        records(file, lambda archive, name, old: None if name.endswith("data.pkl") else archive.writestr(name, old))
        assert "holds no data.pkl" in refused(file)

    def test_a_password(self, file):
        content = file.read_bytes()
        at = content.index(b"PK\x01\x02")
        file.write_bytes(content[: at + 8] + b"\x01" + content[at + 9 :])
        assert "password" in refused(file)

    def test_another_byte_order(self, file):
        big = records(
            file, lambda archive, name, old: archive.writestr(name, b"big" if name.endswith("byteorder") else old)
        )
        assert "big-endian" in refused(big)

    def test_a_storage_that_is_gone_or_too_short(self, file):
        short = records(
            file, lambda archive, name, old: archive.writestr(name, old[:8] if name.endswith("data/0") else old)
        )
        assert "a of shape [2, 3] cannot lie in 8 bytes" in refused(short)
        gone = records(
            file, lambda archive, name, old: None if name.endswith("data/0") else archive.writestr(name, old)
        )
        assert "a should lie in the record data/0, which is not there" in refused(gone)

    def test_a_directory_that_would_not_fit_memory(self, file):
        content = bytearray(file.read_bytes())
        at = content.rindex(b"PK\x06\x06")
        content[at + 40 : at + 48] = (2**31).to_bytes(8, "little")
        file.write_bytes(content)
        assert "archive" in refused(file)
        # A file that has so many bytes for it.
        os.truncate(file, 2**31)
        with file.open("ab") as end:
            end.write(content[at:])
        assert "the directory of the archive would take 2,147,483,648 bytes" in refused(file)

    def test_bytes_that_are_changed_anywhere_give_the_tensors_or_a_sentence(self, file):
        content, rng, works = file.read_bytes(), random.Random(1), 0
        for _ in range(300):
            changed = bytearray(content)
            for _ in range(rng.choice((1, 3))):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            file.write_bytes(changed)
            with suppress(ValueError):
                assert {name: tensor.shape for name, tensor in read_pickle_header(file).items()} == {"a": (2, 3)}
                works += 1
        assert 30 < works < 270

    def test_torchs_format_before_archives(self, tmp_path):
        file = saved(tmp_path / "x.pt", {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
        assert "as torch wrote before version 1.6" in refused(file)
        file.write_bytes(pickle.dumps({"a": 1}))
        assert "a Python pickle" in refused(file)


def test_of_several_sets_of_weights_none_is_taken_for_the_one_that_is_meant(tmp_path):
    state = {"a.weight": torch.ones(2)}
    ema = {"generator": state, "generator_ema": state, "critic": state}
    assert "holds several sets of weights (generator, generator_ema), and" in refused(saved(tmp_path / "x.pt", ema))
    others = {"student": state, "teacher": state, "optimizer": {"state": {"b": torch.ones(2)}}}
    assert "holds several sets of weights (student, teacher), and" in refused(saved(tmp_path / "x.pt", others))
    for one in (
        {"generator": state, "critic": {"b": torch.ones(2)}},
        {"model_state": state, "optimizer": {"state": {"b": torch.ones(2)}}},
        {"mine": state, "optimizer_state": {"b": torch.ones(2)}},
        # A generator of random numbers, and how far a training came.
        {"generator": {"state": torch.ones(2)}, "model_state": {"step": 1}, "lora": state},
        {"model": state, "model_ema": {"b": torch.ones(2)}},
    ):
        assert set(read_pickle_header(saved(tmp_path / "x.pt", one))) == set(state)


@pytest.mark.parametrize("name", ["zero_pp_rank_0_mp_rank_00_model_states.pt", "renamed.pt"])
def test_a_piece_of_a_training_on_several_cards_is_told(tmp_path, name):
    state = {"module": {"a.weight": torch.empty(0)}, "param_shapes": [OrderedDict(a=torch.ones(2, 3).shape)]}
    said = refused(saved(tmp_path / name, state))
    assert "is a piece of a training on several cards (DeepSpeed ZeRO)" in said
    assert "zero_to_fp32.py" in said
