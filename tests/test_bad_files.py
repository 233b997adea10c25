"""One bad file, folder or link takes no other away from the lists, and no name in them is long or cannot be printed."""

import json
import logging
import os
import struct
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from cogvideox.checkpoint import catalogue
from cogvideox.checkpoint.catalogue import find_entry, list_checkpoints, list_parts
from tests import layouts
from tests.helpers import lock
from tests.tiny_checkpoint import build_transformer

needs_posix = pytest.mark.skipif(os.name == "nt", reason="names and files that Windows does not have")


@pytest.fixture(scope="module")
def state():
    return build_transformer().state_dict()


@pytest.fixture
def models(tmp_path, state):
    """A folder of models with one good file, deep in it."""
    layouts.write_file(tmp_path / "good.safetensors", state)
    return tmp_path


def listed(models):
    return [entry.name for entry in list_checkpoints([models], [models])]


def header(text):
    return struct.pack("<Q", len(text)) + text


def bomb(place):
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + b"]" * 1_000_000)


def sat(name, write):
    def make(models):
        (models / name / "1000").mkdir(parents=True)
        write(models / name / "1000" / "mp_rank_00_model_states.pt")

    return make


def gguf_array(models):
    note = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 5, 2**64 - 1)
    (models / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + note + b"patch_embed.text_proj.weight")


BAD = {
    "a header of 50,000 brackets": lambda m: (m / "a.safetensors").write_bytes(
        header(b'{"patch_embed.text_proj.weight":' + b"[" * 50_000)
    ),
    "a header that is no UTF-8": lambda m: (m / "a.safetensors").write_bytes(
        header(b'{"patch_embed.text_proj.weight\xff":1}')
    ),
    "a GGUF file of endless arrays": gguf_array,
    "a config of 50,000 brackets": lambda m: (
        (m / "a" / "transformer").mkdir(parents=True),
        (m / "a/transformer/config.json").write_text("[" * 50_000),
    ),
    "a folder whose latest step has 5,000 letters": lambda m: (
        (m / "a").mkdir(),
        (m / "a" / "latest").write_text("a" * 5000),
    ),
    "a folder whose latest step is a folder": lambda m: (m / "a" / "latest").mkdir(parents=True),
    "a torch file of a million lists": sat("a", bomb),
    "a torch file with numbers for names": sat("a", lambda place: torch.save({"module": {1: torch.ones(3)}}, place)),
    "a torch file of sparse tensors": sat(
        "a", lambda place: torch.save({"module": {"a": torch.ones(3).to_sparse()}}, place)
    ),
    "a file in 10,000 models' names": lambda m: (m / "a.safetensors").write_bytes(
        header(
            json.dumps(
                {
                    f"{number}.{name}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
                    for number in range(5000)
                    for name in ("transformer_blocks.0.attn1.to_q.weight", "patch_embed.text_proj.weight")
                }
            ).encode()
        )
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_costs_itself_alone_and_is_told_once(models, caplog, what):
    BAD[what](models)
    with caplog.at_level(logging.INFO, logger=catalogue.__name__):
        assert listed(models) == ["good.safetensors"]
        assert list_parts("vae", [models]) == list_parts("lora", [models]) == []
        told = len(caplog.records)
        assert listed(models) == ["good.safetensors"]
    assert len(caplog.records) == told
    # What folders hold is told by who looks into them.
    assert told or what.startswith(("a folder whose latest", "a config of"))


@needs_posix
def test_pipes_links_and_sockets_are_passed_by(models, caplog):
    import socket

    os.mkfifo(models / "pipe.safetensors")
    (models / "device.safetensors").symlink_to("/dev/zero")
    (models / "gone.safetensors").symlink_to("nowhere")
    (models / "itself.safetensors").symlink_to("itself.safetensors")
    (models / "folder.safetensors").mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(models)
        made.bind("socket.gguf")
        os.chdir(here)
    with caplog.at_level(logging.INFO, logger=catalogue.__name__):
        assert listed(models) == ["good.safetensors"]
    assert "gone.safetensors is passed over" in caplog.text


@needs_posix
def test_links_that_lead_back_end(models):
    for name in ("a", "b", "c"):
        (models / name).mkdir()
    for name in ("a", "b", "c"):
        for other in ("a", "b", "c"):
            (models / name / f"to_{other}").symlink_to(models / other)
        (models / name / "up").symlink_to(models)
    (models / "b" / "also.safetensors").symlink_to(models / "good.safetensors")
    found = listed(models)
    assert {"good.safetensors", "b/also.safetensors", "a/to_b/also.safetensors"} <= set(found)
    assert len(found) <= 2 * 8


@needs_posix
def test_folders_deeper_than_paths_may_be_long(models):
    here = os.getcwd()
    os.chdir(models)
    for _ in range(40):
        os.mkdir("x" * 200)
        os.chdir("x" * 200)
    os.chdir(here)
    assert listed(models) == ["good.safetensors"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="everything may be read by root")
def test_a_folder_that_may_not_be_read(models):
    (models / "locked").mkdir(mode=0)
    assert listed(models) == ["good.safetensors"]


def test_a_folder_that_cannot_be_read_is_told(models, monkeypatch, caplog):
    lock(models / "locked", monkeypatch)
    with caplog.at_level(logging.INFO, logger=catalogue.__name__):
        assert listed(models) == ["good.safetensors"]
    assert "locked is passed over: Permission denied" in caplog.text


def test_a_file_that_goes_while_it_is_looked_at(models, state, monkeypatch):
    layouts.write_file(models / "going.safetensors", state)
    real = catalogue._describe_file

    def describe(path):
        if path.name == "going.safetensors":
            path.unlink()
        return real(path)

    describe.__name__ = "going"
    monkeypatch.setattr(catalogue, "_describe_file", describe)
    assert listed(models) == ["good.safetensors"]


def test_roots_that_are_files_or_gone(models):
    roots = [models / "good.safetensors", models / "nowhere", models]
    assert [entry.name for entry in list_checkpoints(roots, roots)] == ["good.safetensors"]


def test_a_config_that_strayed_into_the_folder_of_models_hides_none(models):
    (models / "config.json").write_text("{}")
    assert listed(models) == ["good.safetensors"]


@needs_posix
@pytest.mark.skipif(sys.platform == "darwin", reason="names there are always UTF-8")
def test_names_are_printable_and_short_and_lead_to_their_files(models, state):
    raw = [
        b"a\xff\xfe.safetensors",
        b"a\xff\xfd.safetensors",
        b"line\nbreak.safetensors",
        b"line\\nbreak.safetensors",
        b"\xe2\x80\xae.safetensors",
    ]
    raw += [b"x" * 120 + end + b".safetensors" for end in (b"", b"1", b"2")]
    raw += [b"a \xc2\xb7 b.safetensors", b"a.safetensors"]
    (models / "good.safetensors").rename(models / "0.safetensors")
    for name in raw:
        os.link(models / "0.safetensors", os.fsencode(models) + b"/" + name)
    entries = list_checkpoints([], [models])
    assert len({entry.label for entry in entries}) == len(entries) == len(raw) + 1
    for entry in entries:
        assert entry.name.isprintable()
        assert len(entry.name) <= 80
        entry.label.encode("utf-8")
        assert find_entry(entries, entry.label).path == find_entry(entries, entry.name).path == entry.path
    # A workflow that was saved before long names were cut.
    assert (
        find_entry(entries, f"{'x' * 120}1.safetensors · CogVideoX1.5-5B · bf16").path.name
        == f"{'x' * 120}1.safetensors"
    )


@needs_posix
def test_a_lora_whose_name_is_cut_is_found_again(pack, tmp_path, monkeypatch):
    host = sys.modules[f"{pack.__name__}.nodes.host"]
    for name in ("y" * 200, "plain"):
        halves = {"lora_A": torch.ones(4, 8), "lora_B": torch.ones(8, 4)}
        save_file(
            {f"transformer_blocks.0.attn1.to_q.{half}.weight": value for half, value in halves.items()},
            tmp_path / f"{name}.safetensors",
        )
    monkeypatch.setattr(host.comfyui, "IN_COMFYUI", True)
    monkeypatch.setattr(host.folders, "_lora_roots", lambda: [tmp_path])
    names = host.loras()
    assert [len(name) for name in names] == [len("plain.safetensors"), 80]
    assert [host.lora_path(name).name for name in names] == ["plain.safetensors", f"{'y' * 200}.safetensors"]
    with pytest.raises(ValueError, match="There is no LoRA"):
        host.lora_path("z" * 5000)
