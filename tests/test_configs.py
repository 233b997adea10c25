"""A config that would run a bf16-trained CogVideoX in fp16 is told by its shapes, and an inference.yaml is put right
flag by flag."""

import json
import os
import pickle
import stat
import time

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interop.check import check_config, fix_config, is_config
from tests.conftest import ROOT

#: As zai-org/CogVideo has it (sat/configs/inference.yaml), with the flag of the black-video reports.
OFFICIAL = """\
args:
#  image2video: True  # True for image2video, False for text2video
  latent_channels: 16
  mode: inference
  load: "{your CogVideoX SAT folder}/transformer" # This is for Full model without lora adapter
  batch_size: 1
  input_type: txt
  input_file: configs/test.txt
  sampling_image_size: [768, 1360] # remove this for I2V
  sampling_num_frames: 22  # 42 for 10 seconds and 22 for 5 seconds
  sampling_fps: 16
  fp16: True # For CogVideoX-2B
  # bf16: True # For CogVideoX-5B
  output_dir: outputs
  force_inference: True
"""


def network(positions="Rotary3D", patch="[2, 2, 2]", layers=42, heads=48, channels=16):
    """The part of a SAT model config that says which model it is."""
    return f"""\
model:
  scale_factor: 0.7
  network_config:
    target: dit_video_concat.DiffusionTransformer
    params:
      num_layers: {layers}
      patch_size: {patch} # spatial and temporal
      in_channels: {channels}
      hidden_size: {heads * 64}
      num_attention_heads: {heads}
      modules:
        pos_embed_config:
          target: dit_video_concat.{positions}PositionEmbeddingMixin
"""


NETWORKS = {
    "CogVideoX1.5-5B": (network(), "bf16"),
    "CogVideoX1.5-5B-I2V": (network(channels=32), "bf16"),
    "CogVideoX-5b": (network(patch=2), "bf16"),
    "CogVideoX-5b-I2V": (network(patch=2, channels=32), "bf16"),
    "CogVideoX-2b": (network("Basic3D", 2, 30, 30), "fp16"),
}
BF16, FP16 = NETWORKS["CogVideoX1.5-5B"][0], NETWORKS["CogVideoX-2b"][0]


@pytest.fixture
def write(tmp_path):
    """``write(text)``: the path of an inference.yaml with that text."""

    def put(text, name="inference.yaml"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return put


def only(report):
    (finding,) = report.findings
    return finding


# --- Which dtype SAT runs in --------------------------------------------------

FLAGS = {
    "fp16: True": "fp16",
    "bf16: True": "bf16",
    "fp16: True\n  bf16: False": "fp16",
    "fp16: False\n  bf16: True": "bf16",
    "fp16: yes": "fp16",
    "bf16: on": "bf16",
    "fp16: TRUE": "fp16",
    '"fp16": true': "fp16",
    "fp16: True\n  bf16: True": "both",
    "batch_size: 1": "neither",
    "fp16: no\n  bf16: off": "neither",
    "zero_stage: 2": "fp16",
    "batch_size: 1\n  # bf16: True": "neither",
}
VERDICTS = {
    "bf16": {"bf16": "ok", "fp16": "mismatch", "both": "mismatch", "neither": "warning"},
    "fp16": {"bf16": "warning", "fp16": "ok", "both": "mismatch", "neither": "warning"},
    None: {"bf16": "ok", "fp16": "warning", "both": "mismatch", "neither": "warning"},
}


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize(("section", "trained"), [(BF16, "bf16"), (FP16, "fp16"), ("", None)])
def test_the_flags_are_judged_against_the_dtype_the_model_was_trained_in(write, section, trained, flags):
    finding = only(check_config(write(f"args:\n  {flags}\n{section}")))
    assert finding.verdict == VERDICTS[trained][FLAGS[flags]]
    assert bool(finding.remedy) == (finding.verdict != "ok")


def test_each_kind_of_mistake_is_told_in_its_own_words(write):
    def told(flags):
        return only(check_config(write(f"args:\n  {flags}\n{BF16}")))

    assert "65504" in told("fp16: True").reason
    assert "bf16: True" in told("fp16: True").remedy
    assert "refuses to start" in told("fp16: True\n  bf16: True").reason
    assert "fp16: False" in told("fp16: True\n  bf16: True").remedy
    assert "fp32" in told("batch_size: 1").reason
    assert "twice the memory" in told("batch_size: 1").reason
    assert "zero_stage" in told("zero_stage: 2").reason
    assert "8 significant bits" in only(check_config(write(f"args:\n  bf16: True\n{FP16}"))).reason
    assert "only for CogVideoX-2b" in only(check_config(write("args:\n  fp16: True\n"))).reason


def test_a_finding_names_its_line(write):
    assert only(check_config(write(OFFICIAL))).where == "args.fp16 (line 12)"
    assert (
        only(check_config(write("args:\n  fp16: True\n  a: 1\n  bf16: True\n"))).where
        == "args.bf16 and args.fp16 (lines 2 and 4)"
    )
    assert only(check_config(write("# hello\n\nargs:\n  a: 1\n"))).where == "args (line 3)"


def test_a_flag_set_twice_is_a_mismatch_because_sat_refuses_it(write):
    report = check_config(write(f"args:\n  fp16: True\n  fp16: False\n  bf16: True\n{BF16}"))
    assert [finding.verdict for finding in report.findings] == ["mismatch", "ok"]
    assert report.findings[0].where == "args.fp16 (lines 2 and 3)"
    assert report.verdict == "mismatch"


# --- Which model it is --------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_the_model_is_known_by_its_own_model_section(write, name):
    section, trained = NETWORKS[name]
    assert check_config(write(f"args:\n  bf16: True\n  sampling_fps: 16\n{section}")).model.startswith(
        f"{name}, trained in {trained}, "
    )


def test_a_file_name_says_nothing(write):
    write(BF16, "cogvideox_2b.yaml")
    assert check_config(write("args:\n  fp16: True\n  load: CogVideoX-2b-sat/transformer\n")).verdict == "mismatch"


def weights(
    folder,
    width=3072,
    channels=16,
    layers=2,
    patch_t=None,
    extra=(),
    prefix="model.diffusion_model.",
    step="1000",
    latest="1000",
):
    """A SAT checkpoint: the names and shapes of ``sat/dit_video_concat.py``, without the weights."""
    patch = torch.zeros(1).expand(width, channels * 8) if patch_t else torch.zeros(1).expand(width, channels, 2, 2)
    state = {"mixins.patch_embed.proj.weight": patch, **{name: torch.zeros(1) for name in extra}}
    state |= {f"transformer.layers.{layer}.attention.dense.bias": torch.zeros(1) for layer in range(layers)}
    (folder / step).mkdir(parents=True)
    if latest:
        (folder / "latest").write_text(latest + "\n")
    torch.save(
        {"module": {prefix + name: value for name, value in state.items()}},
        folder / step / "mp_rank_00_model_states.pt",
    )


CHECKPOINTS = {
    "1.5": (dict(patch_t=2, layers=42), "CogVideoX1.5-5B, trained in bf16"),
    "1.5 I2V": (dict(patch_t=2, layers=42, channels=32), "CogVideoX1.5-5B-I2V, trained in bf16"),
    "a tiny 1.5": (dict(patch_t=2, width=128), "CogVideoX1.5 (custom size: 2 layers x 2 heads), trained in bf16"),
    "5b": (dict(layers=42), "CogVideoX-5b, trained in bf16"),
    "5b I2V with its learned table": (
        dict(layers=42, channels=32, extra=["mixins.pos_embed.pos_embedding"]),
        "CogVideoX-5b-I2V, trained in bf16",
    ),
    "2b": (dict(width=1920, layers=30), "CogVideoX-2b, trained in fp16"),
    "a tiny 2b by its sin-cos table": (
        dict(width=128, extra=["mixins.pos_embed.pos_embedding"]),
        "CogVideoX-2b (custom size",
    ),
    "a tiny 5b by its rotary angles": (
        dict(width=128, extra=["mixins.pos_embed.freqs_sin"]),
        "CogVideoX-5b (custom size",
    ),
    "a tiny 1.0 with neither": (dict(width=128), "an unknown CogVideoX"),
    "without prefix": (dict(patch_t=2, layers=42, prefix=""), "CogVideoX1.5-5B, trained in bf16"),
    "step 1 without latest": (dict(patch_t=2, layers=42, step="1", latest=None), "CogVideoX1.5-5B, trained in bf16"),
    "the step that latest names": (
        dict(patch_t=2, layers=42, step="7500", latest="7500"),
        "CogVideoX1.5-5B, trained in bf16",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_model_is_known_by_the_shapes_in_the_checkpoint_that_args_load_names(write, tmp_path, name):
    options, model = CHECKPOINTS[name]
    weights(tmp_path / "weights", **options)
    assert check_config(write(f"args:\n  load: {tmp_path}/weights\n")).model.startswith(model)
    assert check_config(write("args:\n  load: weights\n", "configs/inference.yaml")).model.startswith(
        model
    )  # from the folder SAT is started in


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def test_a_checkpoint_that_would_run_code_is_refused_with_a_sentence_and_runs_none(write, tmp_path):
    (tmp_path / "weights/1").mkdir(parents=True)
    torch.save({"module": Bomb(str(tmp_path / "ran"))}, tmp_path / "weights/1/mp_rank_00_model_states.pt")
    report = check_config(write(f"args:\n  bf16: True\n  sampling_fps: 16\n  load: {tmp_path}/weights\n"))
    assert not (tmp_path / "ran").exists()
    assert report.verdict == "warning"
    assert "could run code" in report.findings[-1].reason
    assert report.model.startswith("CogVideoX1.5, trained in bf16, known by sampling_fps")


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 half a zip", pickle.dumps({"module": {}}), b"version https://git-lfs.github.com/spec/v1"],
)
def test_a_damaged_checkpoint_is_told_and_the_other_sources_still_count(write, tmp_path, content):
    write(content, "weights/1/mp_rank_00_model_states.pt")
    report = check_config(write(f"args:\n  fp16: True\n  sampling_fps: 16\n  load: {tmp_path}/weights\n"))
    assert [finding.verdict for finding in report.findings] == ["mismatch", "warning"]
    assert "mp_rank_00_model_states.pt" in report.findings[-1].where


def test_no_weight_is_read(write, tmp_path, monkeypatch):
    weights(tmp_path / "weights", patch_t=2)
    calls = []
    for name in ("load", "empty"):
        monkeypatch.setattr(torch, name, lambda *args, **options: calls.append(args))
    assert "known by the shapes in" in check_config(write(f"args:\n  load: {tmp_path}/weights\n")).model
    assert calls == []


def test_model_configs_beside_it_count_where_they_agree(write):
    file = write("args:\n  fp16: True\n  sampling_fps: 8\n")
    write(NETWORKS["CogVideoX-5b"][0], "first.yaml")
    write(NETWORKS["CogVideoX-5b-I2V"][0], "second.yaml")
    write("data: [1, 2]\n", "unrelated.yaml")
    write("a: [1, 2", "broken.yaml")
    assert check_config(file).model == (
        "CogVideoX-5b or CogVideoX-5b-I2V, trained in bf16, known by the model config beside it (first.yaml, "
        "second.yaml)"
    )
    write(FP16, "third.yaml")
    assert check_config(file).model.startswith("an unknown CogVideoX")


def test_the_surer_source_wins(write, tmp_path):
    """Its own section, then the weights, then the configs beside it, then the frame rate."""
    start = f"args:\n  fp16: True\n  sampling_fps: 16\n  load: {tmp_path}/weights\n"
    assert "known by sampling_fps" in check_config(write(start)).model
    write(FP16, "beside.yaml")
    assert "CogVideoX-2b, trained in fp16, known by the model config beside it" in check_config(write(start)).model
    weights(tmp_path / "weights", layers=42)
    assert "CogVideoX-5b, trained in bf16, known by the shapes in" in check_config(write(start)).model
    assert (
        "CogVideoX1.5-5B-I2V, trained in bf16, known by its own model"
        in check_config(write(start + NETWORKS["CogVideoX1.5-5B-I2V"][0])).model
    )


@pytest.mark.parametrize(
    ("frames", "known"), [(22, True), (42, True), (13, False), ("22", False), (True, False), ([22], False)]
)
def test_latent_frames_tell_the_newer_model(write, frames, known):
    report = check_config(write(f"args:\n  fp16: True\n  sampling_num_frames: {frames!r}\n"))
    assert report.model.startswith(
        "CogVideoX1.5, trained in bf16, known by sampling_num_frames" if known else "an unknown CogVideoX"
    )
    assert report.verdict == ("mismatch" if known else "warning")


@pytest.mark.parametrize(
    ("load", "name", "trained"),
    [
        ("CogVideoX1.5-5B-SAT/transformer_t2v", "CogVideoX1.5", "bf16"),
        ("/models/CogVideoX-5b-sat/transformer/1", "CogVideoX-5b", "bf16"),
        ("D:\\models\\CogVideoX-2b-sat\\transformer", "CogVideoX-2b", "fp16"),
        (
            "{your_CogVideoX-2b-sat_path}/transformer",
            None,
            None,
        ),  # as the authors' file has it until somebody fills it in
        ("CogVideoX-2b-sat/my/own/checkpoints/transformer", None, None),
        ("transformer", None, None),
    ],
)
def test_the_checkpoints_folder_is_the_last_hint_and_said_to_be_one(write, load, name, trained):
    report = check_config(write(f"args:\n  fp16: True\n  load: '{load}'\n"))
    assert report.verdict == {"bf16": "mismatch", "fp16": "ok", None: "warning"}[trained]
    if name:
        assert report.model.startswith(
            f"{name} (by its folder's name), trained in {trained}, going by the name of the checkpoint's folder alone"
        )
        assert "can be wrong" in report.model
        # The frames are surer.
        surer = check_config(write(f"args:\n  fp16: True\n  load: '{load}'\n  sampling_num_frames: 22\n"))
        assert surer.model.startswith("CogVideoX1.5, trained in bf16, known by sampling_num_frames")


def test_a_folders_name_is_enough_for_the_safe_dtype_and_not_for_fp16(write):
    _, backup = fix_config(write("args:\n  fp16: True\n  load: CogVideoX-5b-sat/transformer\n"))
    assert backup is not None
    with pytest.raises(ValueError, match="folder alone.*not known either"):
        fix_config(write("args:\n  bf16: True\n  load: CogVideoX-2b-sat/transformer\n"))


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "m0: &m0 {a: 1, b: 2}\n" + "".join(
    f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}, *m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 14)
)
BOMBS = {
    "laughs": (f"{LAUGHS}args: {{fp16: True, x: *a11}}\n", "repeats its parts"),
    "laughs beside args": (f"{LAUGHS}args: {{fp16: True}}\n", "repeats its parts"),
    "merges": (f"{MERGES}args:\n  <<: *m13\n  fp16: True\n", "repeats its parts"),
    "itself": ("args:\n  fp16: True\n  x: &x [*x]\n", "repeats its parts.*in themselves"),
    "depth": ("args:\n  fp16: True\nx: " + "[" * 5000, "not YAML|nested deeper"),
    "depth of many lines": (
        "args:\n  fp16: True\nx:\n" + "".join("  " * i + "k:\n" for i in range(1, 450)),
        "not YAML|nested deeper",
    ),
    "length": ("args:\n  fp16: True\n" + "# a\n" * 100_000, "has .* bytes, and a file of its kind has at most"),
    "a tag of a boolean": ("args:\n  fp16: !!bool x\n", "x is no bool"),
    "a tag of a number": ("args:\n  a: !!int ''\n", "cannot read"),
    "a tag that runs code": ("args:\n  fp16: True\n  a: !!python/object/apply:os.getcwd []\n", "has the tag"),
    "a date of February": ("args:\n  fp16: True\n  a: 2001-02-30\n", None),
    "a list as a key": ("args:\n  fp16: True\n  ? [a]\n  : 1\n", "cannot be the name of a setting"),
    "5000 keys": ("args:\n  fp16: True\n" + "".join(f"  k{i}: {i}\n" for i in range(5000)), None),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_would_burst_is_read_or_refused_in_time(write, bomb):
    text, said = BOMBS[bomb]
    file = write(text)
    write(text, "beside.yaml")
    for call in (check_config, fix_config):
        begin = time.process_time()
        if said is None and call is check_config:
            assert call(file).verdict == "warning"
        else:
            with pytest.raises(ValueError, match=f"(?s){said or 'not known either'}"):
                call(file)
        assert time.process_time() - begin < 3
    assert file.read_text() == text


def test_an_anchor_that_is_used_as_it_is_meant_is_read(write):
    report = check_config(
        write("common: &common {fp16: True, sampling_fps: 16}\nargs:\n  <<: *common\n  a: &b [1]\n  c: *b\n")
    )
    assert report.verdict == "mismatch"
    assert report.model.startswith("CogVideoX1.5, trained in bf16, known by sampling_fps")


def test_a_model_section_that_does_not_say_is_no_evidence(write):
    for section in (
        "model:\n",
        "model: [1]\n",
        "model: {network_config: {params: {}}}\n",
        "model: {network_config: {params: {num_layers: 42}}}\n",
    ):
        assert check_config(write(f"args:\n  bf16: True\n{section}")).model.startswith("an unknown CogVideoX")
    assert check_config(
        write("args: {bf16: True}\nmodel: {network_config: {params: {patch_size: [2, 2, 2]}}}\n")
    ).model.startswith("CogVideoX1.5, ")


# --- Putting it right ---------------------------------------------------------

FIXES = {
    "the flag changes, its comment stays": (
        "args:\n  fp16: True # For 2B\n  a: 1\n",
        "args:\n  bf16: True # For 2B\n  a: 1\n",
    ),
    "quoted key": ('args:\n  "fp16": yes\n', 'args:\n  "bf16": yes\n'),
    "both on": ("args:\n  bf16: True\n  fp16: True # why\n", "args:\n  bf16: True\n  fp16: False # why\n"),
    "both on, in capitals and as on": ("args:\n  fp16: ON\n  bf16: TRUE\n", "args:\n  fp16: OFF\n  bf16: TRUE\n"),
    "the wrong one on": ("args:\n  fp16: true\n  bf16: false\n", "args:\n  fp16: false\n  bf16: true\n"),
    "both off": ("args:\n  fp16: no\n  bf16: no\n", "args:\n  fp16: no\n  bf16: yes\n"),
    "only fp16, off": ("args:\n  fp16: False\n", "args:\n  fp16: False\n  bf16: True\n"),
    "only bf16, off": ("args:\n  bf16: False\n", "args:\n  bf16: True\n"),
    "neither": ("args:\n    a: 1 # one\n\n# the rest\n", "args:\n    a: 1 # one\n    bf16: True\n\n# the rest\n"),
    "neither, commented out": ("args:\n  a: 1\n  # bf16: True\n", "args:\n  a: 1\n  bf16: True\n  # bf16: True\n"),
    "neither, no last line end": ("args:\n  a: 1", "args:\n  a: 1\n  bf16: True"),
    "neither, a list last": (
        "args:\n  b: 1\n  a:\n  - 1\n  - 2 # two\n# end\n",
        "args:\n  b: 1\n  bf16: True\n  a:\n  - 1\n  - 2 # two\n# end\n",
    ),
    "neither, a mapping last": (
        "args:\n  b: 1\n  a:\n    b: {c: 1}\n",
        "args:\n  b: 1\n  bf16: True\n  a:\n    b: {c: 1}\n",
    ),
    "neither, nothing last": ("args:\n  a:   # empty\nb: 1\n", "args:\n  a:   # empty\n  bf16: True\nb: 1\n"),
    "zero_stage": ("args:\n  zero_stage: 1\n", "args:\n  zero_stage: 1\n  bf16: True\n"),
    "CRLF": (
        "args:\r\n  a: 1\r\n  b: 2 # two\r\nc: 3\r\n",
        "args:\r\n  a: 1\r\n  b: 2 # two\r\n  bf16: True\r\nc: 3\r\n",
    ),
    "byte order mark": ("\ufeffargs:\n  fp16: True\n", "\ufeffargs:\n  bf16: True\n"),
    "other scripts": (
        "# 推理\nargs:\n  a: 1 # 精度 🎬\n  fp16: True # 半精度 é\n",
        "# 推理\nargs:\n  a: 1 # 精度 🎬\n  bf16: True # 半精度 é\n",
    ),
    "a document marker": ("---\nargs:\n  a: 1\n...\n", "---\nargs:\n  a: 1\n  bf16: True\n...\n"),
    "fp16 elsewhere in the file": ("x: {fp16: True}\nargs:\n  fp16: True\n", "x: {fp16: True}\nargs:\n  bf16: True\n"),
    "a date": ("args:\n  fp16: True\n  day: 2024-13-45\n", "args:\n  bf16: True\n  day: 2024-13-45\n"),
}


@pytest.mark.parametrize("case", FIXES)
def test_a_fix_changes_the_flags_and_nothing_else(write, case):
    before, after = FIXES[case]
    write(BF16, "model.yaml")
    file = write(before)
    report, backup = fix_config(file)
    assert file.read_bytes() == after.encode()
    assert backup.read_bytes() == before.encode()
    assert report.verdict == "ok"


def test_for_an_fp16_trained_model_the_other_flag_is_set(write):
    write(FP16, "model.yaml")
    for before, after in [
        ("bf16: True # x", "fp16: True # x"),
        ("bf16: True\n  fp16: True", "bf16: False\n  fp16: True"),
        ("a: 1", "a: 1\n  fp16: True"),
    ]:
        file = write(f"args:\n  {before}\n")
        assert fix_config(file)[0].verdict == "ok"
        assert file.read_text() == f"args:\n  {after}\n"
    for right in ("fp16: True", "zero_stage: 1"):
        assert fix_config(write(f"args:\n  {right}\n"))[1] is None


def test_what_is_right_already_is_left_alone(write, tmp_path):
    file = write(OFFICIAL.replace("fp16: True", "bf16: True"))
    before = os.stat(file)
    assert fix_config(file) == (check_config(file), None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["inference.yaml"]
    assert (os.stat(file).st_ino, os.stat(file).st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert fix_config(write("args:\n  bf16: True\n"))[1] is None  # the model is not known, and bf16 is finite with all


def test_an_older_backup_is_never_overwritten(write, tmp_path):
    names = []
    for batch in range(3):
        _, backup = fix_config(write(OFFICIAL.replace("batch_size: 1", f"batch_size: {batch}")))
        assert f"batch_size: {batch}" in backup.read_text()
        names.append(backup.name)
    assert names == ["inference.yaml.bak", "inference.yaml.bak.1", "inference.yaml.bak.2"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["inference.yaml", *names]


def test_a_fixed_file_keeps_its_permissions_and_a_link_stays_a_link(write, tmp_path):
    file = write(OFFICIAL, "real/inference.yaml")
    file.chmod(0o640)
    mode = stat.S_IMODE(file.stat().st_mode)  # Windows has fewer.
    link = tmp_path / "inference.yaml"
    link.symlink_to(file)
    _, backup = fix_config(link)
    assert link.is_symlink()
    assert "bf16: True # For" in file.read_text()
    assert backup.parent == file.parent
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(backup.stat().st_mode) == mode


def test_a_write_that_fails_leaves_the_file_as_it_was(write, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    file = write(OFFICIAL)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match="No space left on device.*as it was.*by hand"):
        fix_config(file)
    assert file.read_text() == OFFICIAL
    assert list(tmp_path.iterdir()) == [file]


#: Forms that hardly anybody writes -> which line is to say what.
BY_HAND = {
    "base: &base {fp16: True}\nargs:\n  <<: *base\n  a: 1\n": (
        "have args (line 2) say bf16: True and have args (line 2) say fp16: False"
    ),
    "yes: &on True\nargs:\n  bf16: True\n  fp16: *on\n": "have line 3 say bf16: True and have line 4 say fp16: False",
    "args:\n  fp16: &on True\n  bf16: *on\n": "have line 3 say bf16: True and have line 2 say fp16: False",
    "args:\n  fp16:\n    True\n  fp16: True\n": (
        "have args (line 1) say bf16: True and delete fp16 in line 2 and have line 4 say fp16: False"
    ),
    "my: &key fp16\nargs:\n  *key : True\n": "have args (line 2) say bf16: True and have args (line 2) say fp16: False",
    "args:\n  fp16: !!bool true\n": "have args (line 1) say bf16: True and have line 2 say fp16: False",
    "args: {fp16: True, a: 1} # short\n": "have args (line 1) say bf16: True and have line 1 say fp16: False",
    "args: {fp16: True, a: 1, fp16: False}\n": (
        "have args (line 1) say bf16: True and delete fp16 in line 1 and have line 1 say fp16: False"
    ),
    "args:\n  fp16: False # old\n  a: 1\n  fp16: True # new\n": (
        "have args (line 1) say bf16: True and delete fp16 in line 2 and have line 4 say fp16: False"
    ),
    "args:\n  bf16: True\n  bf16: True\n": "delete bf16 in line 2 and have line 3 say bf16: True",
}
#: The same, where neither flag is on.
ADDED_BY_HAND = {
    "args: {a: [1, 2], }\n": 1,
    "args: {}\n": 1,
    "args:\n  a: |\n    some\n    text\nb: 1\n": 1,
    "x: &x 1\nargs:\n  a: *x\nb: 1\n": 2,
}


@pytest.mark.parametrize("text", BY_HAND)
def test_a_fix_that_would_touch_more_than_the_flags_is_left_to_the_user(write, text):
    write(BF16, "model.yaml")
    file = write(text)
    assert check_config(file).verdict == "mismatch"
    with pytest.raises(ValueError, match="was not changed.*by hand") as refused:
        fix_config(file)
    assert f"by hand: {BY_HAND[text]}. Then check it again." in str(refused.value)
    assert file.read_text() == text


@pytest.mark.parametrize("text", ADDED_BY_HAND)
def test_a_flag_that_has_no_usual_place_is_left_to_the_user(write, text):
    write(BF16, "model.yaml")
    file = write(text)
    with pytest.raises(ValueError, match="was not changed.*by hand") as refused:
        fix_config(file)
    assert f"by hand: have args (line {ADDED_BY_HAND[text]}) say bf16: True. Then" in str(refused.value)
    assert file.read_text() == text


def test_where_the_model_is_not_known_a_fix_says_what_to_do(write):
    for flags in ("fp16: True", "fp16: True\n  bf16: True", "a: 1"):
        with pytest.raises(ValueError, match="not known.*fp16 for CogVideoX-2b.*by hand"):
            fix_config(write(f"args:\n  {flags}\n"))


words = st.text(st.sampled_from("abcxyz 0:-#'\"{}[]é精🎬"), max_size=12)
spelled = {
    True: st.sampled_from(["True", "true", "TRUE", "yes", "on", "On"]),
    False: st.sampled_from(["False", "false", "no", "Off"]),
}
values = st.sampled_from(
    ["1", "txt", "[768, 1360]", '"{a folder}/transformer"', "0.5", "", "{a: 1, b: [2]}", "'it''s'", "fp16"]
)
keys = st.lists(
    st.sampled_from(["latent_channels", "batch_size", "input_type", "output_dir", "my_fp16", "bf16x"]),
    unique=True,
    min_size=1,
)


@st.composite
def configs(draw):
    """An inference.yaml in lines: (text, is it a flag's line)."""
    indent = " " * draw(st.integers(1, 6))

    def comment():
        return draw(st.one_of(st.just(""), words.map(lambda text: f" # {text}")))

    lines = [(f"{indent}{key}: {draw(values)}{comment()}", False) for key in draw(keys)]
    for flag in ("fp16", "bf16"):
        on = draw(st.sampled_from([None, True, False]))
        if on is not None:
            key = draw(st.sampled_from(["{}", '"{}"', "'{}'"])).format(flag)
            line = (f"{indent}{key}:{' ' * draw(st.integers(1, 3))}{draw(spelled[on])}{comment()}", True)
            lines.insert(draw(st.integers(0, len(lines))), line)
    for text in draw(
        st.lists(st.one_of(st.just(""), st.just("  # bf16: True"), words.map(lambda text: f"#{text}")), max_size=3)
    ):
        lines.insert(draw(st.integers(0, len(lines))), (text, False))
    before = draw(st.sampled_from([[], ["# head"], ["---"], ["other: {fp16: True}"]]))
    after = draw(st.sampled_from([[], ["", "# tail"], ["seed: 1"]]))
    return [(text, False) for text in [*before, "args:"]] + lines + [(text, False) for text in after]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs(), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans(), st.sampled_from(["bf16", "fp16"]))
def test_whatever_the_file_looks_like_a_fix_changes_only_flags_and_is_done_once(
    tmp_path, lines, end, ended, marked, want
):
    for old in tmp_path.iterdir():
        old.unlink()
    (tmp_path / "model.yaml").write_text(BF16 if want == "bf16" else FP16)
    file, other = tmp_path / "inference.yaml", {"bf16": "fp16", "fp16": "bf16"}[want]
    text = ("\ufeff" if marked else "") + end.join(text for text, _ in lines) + (end if ended else "")
    file.write_bytes(text.encode())
    right = check_config(file).verdict == "ok"

    report, backup = fix_config(file)
    fixed = file.read_bytes().decode()
    assert report.verdict == "ok"
    assert (backup is None) == right == (fixed == text)
    assert backup is None or backup.read_bytes() == text.encode()

    args, was = yaml.safe_load(fixed)["args"], yaml.safe_load(text)["args"]
    assert args.pop(want) is True
    assert args.pop(other, False) is False
    assert args == {key: value for key, value in was.items() if key not in ("bf16", "fp16")}

    # Every line but those of the flags is where it was, and at most one line, the new flag's, came in.
    now = fixed.removeprefix("\ufeff").split(end)
    kept = [line for line, is_flag in lines if not is_flag] + [""] * ended
    had_flags = [line for line, is_flag in lines if is_flag]
    added = len(now) - len(kept) - len(had_flags)
    assert added in (0, 1)
    assert fixed.startswith("\ufeff") == marked
    remaining = iter(now)
    assert all(line in remaining for line in kept)
    changed = [line.partition(":")[2] for line in now if line.partition(":")[0].strip(" \"'") in ("fp16", "bf16")]
    for line in had_flags:  # a flag's comment stays with it
        comment = line.partition(" #")[2]
        assert any(found.partition(" #")[2] == comment for found in changed)

    assert fix_config(file) == (report, None)
    assert file.read_bytes().decode() == fixed


# --- Workflows ---


def ui(*nodes, **more):
    return {"nodes": list(nodes), "links": [], "version": 0.4, **more}


def node(kind, *values, id=1, mode=0, **more):
    return {"id": id, "type": kind, "mode": mode, "widgets_values": list(values), **more}


def api(kind, **inputs):
    return {"1": {"class_type": kind, "inputs": inputs, "_meta": {"title": "Loader"}}}


@pytest.fixture
def judged(tmp_path):
    """``judged(workflow)``: the report on it."""

    def check(workflow):
        file = tmp_path / "workflow.json"
        file.write_text(json.dumps(workflow), encoding="utf-8")
        return check_config(file)

    return check


OURS, DOWNLOAD, LOADER = "CogVideoX15ModelLoader", "DownloadAndLoadCogVideoModel", "CogVideoXModelLoader"
GGUF, VAE = "DownloadAndLoadCogVideoGGUFModel", "CogVideoXVAELoader"
LOADERS = [
    (OURS, ["CogVideoX1.5-5B", "auto"], "ok"),
    (OURS, ["CogVideoX1.5-5B", "bf16", "stop"], "ok"),
    (OURS, ["CogVideoX1.5-5B", "fp16"], "ok"),
    (OURS, ["CogVideoX1.5-5B", "fp16", "fix"], "ok"),
    (OURS, ["CogVideoX1.5-5B", "fp16", "warn"], "mismatch"),
    (OURS, ["CogVideoX1.5-5B", "fp16", "stop"], "mismatch"),
    (OURS, ["CogVideoX-2b", "fp16", "stop"], "ok"),
    (DOWNLOAD, ["THUDM/CogVideoX-5b", "fp16", "disabled", False, "sdpa", "main_device"], "mismatch"),
    (DOWNLOAD, ["kijai/CogVideoX-5b-1.5-T2V", "fp16"], "mismatch"),
    (DOWNLOAD, ["THUDM/CogVideoX-5b", "bf16"], "ok"),
    (DOWNLOAD, ["THUDM/CogVideoX-5b", "fp32"], "ok"),
    (DOWNLOAD, ["THUDM/CogVideoX-5b"], "ok"),
    (DOWNLOAD, ["THUDM/CogVideoX-2b", "fp16"], "ok"),
    (DOWNLOAD, ["feizhengcong/CogvideoX-Interpolation", "fp16"], "mismatch"),
    (DOWNLOAD, ["someone/CogVideoX-12B", "fp16"], "mismatch"),
    (LOADER, ["CogVideoX_1_5_5b.safetensors", "fp16", "disabled", "main_device", False, "sdpa"], "mismatch"),
    (LOADER, ["CogVideoX-2B_fp16.safetensors", "fp16"], "ok"),
    (LOADER, ["CogVideoX_1_5_5b.safetensors", "bf16"], "ok"),
    (GGUF, ["CogVideoX_5b_GGUF_Q4_0.safetensors", "fp16", False], "warning"),
    (GGUF, ["CogVideoX_5b_GGUF_Q4_0.safetensors", "bf16", False], "ok"),
    (VAE, ["cogvideox_vae.safetensors", "fp16"], "warning"),
    (VAE, ["cogvideox_vae.safetensors"], "ok"),
    (LOADER, ["CogVideoX_1_5_5b.safetensors", "fp8_e4m3fn"], "warning"),
    # Other public packs', and ComfyUI's own where the name is a CogVideoX's.
    ("MZ_CogVideoXLoader", ["CogVideoX_5b.safetensors", "vae.safetensors", "fp16", False, False, False], "mismatch"),
    ("MZ_CogVideoXLoader", ["CogVideoX_5b.safetensors", "vae.safetensors", "fp8_e4m3fn", True], "mismatch"),
    ("MZ_CogVideoXLoader", ["CogVideoX_5b.safetensors", "vae.safetensors", "fp8_e5m2", False], "ok"),
    ("MZ_CogVideoXLoader", ["CogVideoX_5b.safetensors", "vae.safetensors", "bf16"], "ok"),
    ("MZ_CogVideoXLoader", ["CogVideoX_5b_GGUF_Q4_0.safetensors", "vae.safetensors", "GGUF"], "ok"),
    ("MZ_CogVideoXLoader", ["CogVideoX_2b.safetensors", "vae.safetensors", "fp16"], "ok"),
    ("LoadCogVideoXFunModel", ["CogVideoX-Fun-V1.5-5b-InP", "Inpaint", "model_cpu_offload", "fp16"], "mismatch"),
    ("LoadCogVideoXFunModel", ["CogVideoX-Fun-V1.5-5b-InP", "Inpaint", "model_cpu_offload", "bf16"], "ok"),
    ("LoadCogVideoXFunModel", ["CogVideoX-Fun-V1.1-2b-InP", "Inpaint", "model_cpu_offload", "fp16"], "ok"),
    # fp16 is that node's default.
    ("LoadCogVideoXFunModel", ["CogVideoX-Fun-V1.1-5b-InP"], "mismatch"),
    ("LoadCogVideoX_Fun_Model", ["CogVideoX-Fun-5b-InP", "Inpaint", False, "fp16"], "mismatch"),
    ("UNETLoader", ["CogVideoX_5b.safetensors", "default"], "ok"),
    ("UNETLoader", ["cogvideox-5b.safetensors", "fp8_e4m3fn"], "ok"),
    ("UnetLoaderGGUF", ["cogvideox1.5-5b-Q4_K_M.gguf"], "ok"),
    ("DiffusionModelLoaderKJ", ["CogVideoX_5b.safetensors", "fp8_e4m3fn", "fp16"], "mismatch"),
    ("DiffusionModelLoaderKJ", ["CogVideoX_5b.safetensors", "fp16", "default"], "mismatch"),
    ("DiffusionModelLoaderKJ", ["CogVideoX_5b.safetensors", "fp16", "bf16"], "ok"),
    ("DiffusionModelLoaderKJ", ["void_pass1.safetensors", "default", "fp16"], "mismatch"),
]
WIDGETS = {
    OURS: ["model", "dtype", "on_mismatch"],
    DOWNLOAD: ["model", "precision", "quantization", "enable_sequential_cpu_offload", "attention_mode", "load_device"],
    LOADER: [
        "model",
        "base_precision",
        "quantization",
        "load_device",
        "enable_sequential_cpu_offload",
        "attention_mode",
    ],
    GGUF: ["model", "vae_precision", "fp8_fastmode"],
    VAE: ["model_name", "precision"],
    "MZ_CogVideoXLoader": [
        *(
            "unet_name",
            "vae_name",
            "weight_dtype",
            "fp8_fast_mode",
            "enable_sequential_cpu_offload",
            "enable_vae_encode_tiling",
        ),
    ],
    "LoadCogVideoXFunModel": ["model", "model_type", "GPU_memory_mode", "precision"],
    "LoadCogVideoX_Fun_Model": ["model", "model_type", "low_gpu_memory_mode", "precision"],
    "UNETLoader": ["unet_name", "weight_dtype"],
    "UnetLoaderGGUF": ["unet_name"],
    "DiffusionModelLoaderKJ": ["model_name", "weight_dtype", "compute_dtype"],
}


@pytest.mark.parametrize(("kind", "values", "verdict"), LOADERS)
def test_every_loader_is_judged_alike_in_every_format(judged, kind, values, verdict):
    named = dict(zip(WIDGETS[kind], values, strict=False))
    swapped = dict(reversed(named.items()))
    inputs = [{"name": name, "widget": {"name": name}, "link": None} for name in swapped]
    workflows = [
        ui(node(kind, *values)),
        ui(node(kind) | {"widgets_values": named}),
        ui(node(kind, *("?" for _ in values), widgets_values_named=named)),
        ui(node(kind, *swapped.values(), inputs=inputs)),
        ui(node("uuid"), definitions={"subgraphs": [{"id": "uuid", "name": "Load", "nodes": [node(kind, *values)]}]}),
        api(kind, **named),
        {"prompt": api(kind, **named), "client_id": "x"},
        {"prompt": None, "workflow": ui(node(kind, *values))},
    ]
    reports = [judged(workflow) for workflow in workflows]
    assert [report.verdict for report in reports] == [verdict] * len(workflows)
    assert {report.findings[0].reason for report in reports} == {reports[0].findings[0].reason}
    assert bool(only(reports[0]).remedy) == (verdict != "ok")


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        (["fp16"], "ok"),  # of 2b, the only model of the first version
        (["THUDM/CogVideoX-5b", "fp16", "disabled", "disabled", False], "mismatch"),
        (["THUDM/CogVideoX-5b", "bf16", "fastmode", "torch", False, "sdpa", "main_device"], "ok"),
        (["THUDM/CogVideoX-5b", "fp16", True, False], "mismatch"),
    ],
)
def test_the_wrappers_loader_is_judged_as_it_was_in_every_age(judged, values, verdict):
    assert judged(ui(node(DOWNLOAD, *values))).verdict == verdict


def test_loaders_of_all_models_count_where_the_name_is_a_cogvideox(judged):
    for kind in ("UNETLoader", "DiffusionModelLoaderKJ", "UnetLoaderGGUF", "CheckpointLoaderSimple"):
        assert judged(ui(node(kind, "wan2.1_t2v_14B_fp16.safetensors", "fp16", "fp16"))).model == "none"
        for name in ("CogVideoX_5b", "void_pass2"):
            assert name in judged(ui(node(kind, f"video/{name}.safetensors", "default", "default"))).model


def test_a_loader_without_a_dtype_says_what_decides(judged):
    assert (
        "ComfyUI computes in bf16 where the card has it"
        in only(judged(ui(node("UnetLoaderGGUF", "cogvideox.gguf")))).reason
    )


def test_a_mismatch_says_what_will_happen(judged):
    def told(*values):
        return only(judged(ui(node(*values)))).reason

    assert "will stop" in told(OURS, "CogVideoX1.5-5B", "fp16", "stop")
    assert "black" in told(OURS, "CogVideoX1.5-5B", "fp16", "warn")
    assert "range-safe fp16" in told(OURS, "CogVideoX1.5-5B", "fp16")
    assert "stops with an error" in told(DOWNLOAD, "kijai/CogVideoX-5b-1.5-T2V", "fp16")
    assert "going by the name" in told(DOWNLOAD, "THUDM/CogVideoX-2b", "fp16")
    assert "65504" in told(LOADER, "CogVideoX_5b.safetensors", "fp16")


def test_a_finding_names_its_node_and_subgraph(judged):
    bad = node(DOWNLOAD, "THUDM/CogVideoX-5b", "fp16", id=12)
    inner = [
        {
            "id": "outer",
            "name": "Load",
            "nodes": [bad],
            "definitions": {"subgraphs": [{"id": "x", "nodes": [bad | {"id": 3}]}]},
        }
    ]
    report = judged(ui(bad, definitions={"subgraphs": inner}))
    assert [finding.where for finding in report.findings] == [
        f'node 12 "{DOWNLOAD}"',
        f'node 12 "{DOWNLOAD}" in subgraph "Load"',
        f'node 3 "{DOWNLOAD}" in subgraph "x"',
    ]


def test_a_widget_that_a_subgraph_shows_is_read(judged):
    """As ComfyUI's own templates have them: a link from the subgraph's inputs, and the value inside or outside."""

    def socket(name, link):
        return {"name": name, "type": "COMBO", "widget": {"name": name}, "link": link}

    inner = node("UNETLoader", "CogVideoX_5b.safetensors", "default") | {
        "type": "DiffusionModelLoaderKJ",
        "widgets_values": ["CogVideoX_5b.safetensors", "default", "fp16"],
        "inputs": [socket("model_name", 7), socket("weight_dtype", None), socket("compute_dtype", 8)],
    }
    links = [{"id": 7 + slot, "origin_id": -10, "origin_slot": slot, "target_id": 1} for slot in (0, 1)]
    names = [{"name": "model"}, {"name": "compute_dtype"}]
    part = {"id": "uuid", "name": "Load", "nodes": [inner], "links": links, "inputs": names}

    def report(*values, link=None):
        shown = node("uuid", *values, id=2) | {"inputs": [socket("model", None), socket("compute_dtype", link)]}
        return judged(ui(shown, definitions={"subgraphs": [part]}))

    assert report().verdict == report("CogVideoX_5b.safetensors", "fp16").verdict == "mismatch"
    assert report("CogVideoX_5b.safetensors", "bf16").verdict == "ok"
    assert report("wan.safetensors", "fp16").model == "none"
    assert "comes from another node" in only(report("CogVideoX_5b.safetensors", "bf16", link=9)).reason
    # Of two that stand for it each is judged, whichever comes last.
    for values in (("fp16", "bf16"), ("bf16", "fp16")):
        both = [
            node("uuid", "CogVideoX_5b.safetensors", value, id=2 + number)
            | {"inputs": [socket("model", None), socket("compute_dtype", None)]}
            for number, value in enumerate(values)
        ]
        twice = judged(ui(*both, both[0] | {"id": 4}, definitions={"subgraphs": [part]}))
        assert sorted(finding.verdict for finding in twice.findings) == ["mismatch", "ok"]
    for odd in ([None], None, {}, [{}]):
        assert judged(ui(node("uuid"), definitions={"subgraphs": [part | {"inputs": odd, "links": [*links, None]}]}))


@pytest.mark.parametrize("mode", [2, 4])
def test_what_is_muted_or_bypassed_does_not_run_and_is_not_judged(judged, mode):
    bad = node(DOWNLOAD, "THUDM/CogVideoX-5b", "fp16")
    assert judged(ui(bad | {"mode": mode})).verdict == "ok"
    subgraphs = {"subgraphs": [{"id": "uuid", "nodes": [bad]}]}
    assert judged(ui(node("uuid", mode=mode), definitions=subgraphs)).verdict == "ok"
    assert judged(ui(node("uuid", mode=mode), node("uuid", id=2), definitions=subgraphs)).verdict == "mismatch"
    assert judged(ui(definitions=subgraphs)).verdict == "mismatch"


def test_a_dtype_that_comes_over_a_link_is_a_warning_unless_any_would_do(judged):
    def linked(kind, widget, *values):
        return ui(node(kind, *values, inputs=[{"name": widget, "widget": {"name": widget}, "link": 7}]))

    assert judged(linked(DOWNLOAD, "precision", "THUDM/CogVideoX-5b", "bf16")).verdict == "warning"
    assert judged(api(LOADER, model="CogVideoX_5b.safetensors", base_precision=["4", 0])).verdict == "warning"
    assert judged(linked(VAE, "precision", "vae.safetensors", "bf16")).verdict == "warning"
    assert judged(linked(OURS, "on_mismatch", "CogVideoX1.5-5B", "fp16", "fix")).verdict == "warning"
    assert judged(linked(OURS, "dtype", "CogVideoX1.5-5B", "auto", "fix")).verdict == "ok"
    assert judged(linked(DOWNLOAD, "precision", "THUDM/CogVideoX-2b", "bf16")).verdict == "ok"
    assert (
        judged(linked(DOWNLOAD, "model", "THUDM/CogVideoX-2b", "fp16")).verdict == "mismatch"
    )  # the name in the file is not the one that runs


def test_a_workflow_without_a_cogvideox_loader_is_ok_and_says_so(judged):
    for workflow in (ui(), ui(node("KSampler", 1, "fixed")), api("CheckpointLoaderSimple", ckpt_name="sd.safetensors")):
        finding = only(judged(workflow))
        assert finding.verdict == "ok"
        assert "no loader of a CogVideoX" in finding.reason


def test_odd_nodes_do_not_stop_the_check(judged):
    odd = [
        None,
        3,
        {},
        {"type": ["x"]},
        {"type": OURS},
        {"type": OURS, "widgets_values": None, "inputs": [None, {"widget": 1}]},
    ]
    assert judged(ui(*odd, definitions={"subgraphs": [None, {}, {"nodes": None}]})).verdict == "ok"
    assert (
        judged(api(OURS) | {"2": {"class_type": None}, "3": {"class_type": DOWNLOAD, "inputs": None}}).verdict == "ok"
    )


@pytest.mark.parametrize("file", sorted((ROOT / "example_workflows").glob("*.json")), ids=lambda file: file.name)
def test_our_own_workflows_are_right(file):
    report = check_config(file)
    assert report.verdict == "ok"
    assert OURS in report.text


# --- What is a config, what is said of what is none ---------------------------


def test_configs_are_told_from_checkpoints(write, tmp_path, tiny):
    assert is_config(write("", "a/some.yaml"))
    assert is_config(write("", "a/some.YML"))
    assert is_config(write("", "a/some.json"))
    assert not is_config(write("", "a/some.safetensors"))
    assert not is_config(tmp_path / "a")
    assert not is_config(tmp_path / "missing.yaml")
    assert not is_config(tiny)
    for place in ("", "configs/", "sat/configs/"):
        write(OFFICIAL, f"b{len(place)}/{place}inference.yaml")
        assert is_config(tmp_path / f"b{len(place)}")
        assert check_config(tmp_path / f"b{len(place)}").path == tmp_path / f"b{len(place)}/{place}inference.yaml"
    write(OFFICIAL, "released/inference.yaml")
    write("", "released/transformer/1000/mp_rank_00_model_states.pt")
    assert is_config(str(tmp_path / "released"))
    for diffusers in ("model_index.json", "transformer/config.json"):
        write(OFFICIAL, f"{diffusers[0]}/inference.yaml")
        write("{}", f"{diffusers[0]}/{diffusers}")
        assert not is_config(tmp_path / diffusers[0])


ERRORS = {
    "not YAML": ("a.yaml", "args: {fp16: [", "not YAML.*SAT cannot read it.*Correct it"),
    "two documents": ("a.yaml", "args: {}\n---\nargs: {}\n", "not YAML.*Correct it"),
    "not UTF-8": (
        "a.yaml",
        "args:\n  a: 1 # 精度\n".encode("gbk"),
        "not UTF-8 .byte 15 is 0x.*SAT reads.*Save it as UTF-8",
    ),
    "empty": ("a.yaml", "", "no args: at all.*bf16 and fp16.*Choose"),
    "a list": ("a.yaml", "- args\n", "no args: at all.*Choose"),
    "a model's config": ("a.yaml", BF16, "no args: at all.*describes a model.*inference.yaml"),
    "args is a list": ("a.yaml", "args: [fp16]\n", "not a mapping.*bf16 and fp16.*Choose"),
    "args is empty": ("a.yaml", "args:\n", "not a mapping"),
    "args twice": ("a.yaml", "args: {}\nargs: {}\n", "args: more than once"),
    "a tag": (
        "a.yaml",
        "args:\n  a: !!python/object/apply:os.getcwd []\n",
        "a value in args: that SAT cannot read.*Correct it",
    ),
    "a text for a flag": (
        "a.yaml",
        "args:\n  fp16: 'True'\n",
        "args.fp16 .line 2. of .* is 'True', which is not a boolean.*Write fp16: True or",
    ),
    "a number for a flag": (
        "a.yaml",
        "args:\n  bf16: 1\n",
        "args.bf16 .line 2. .* is 1, which is not a boolean.*Write bf16",
    ),
    "an empty flag": ("a.yaml", "args:\n  bf16:\n", "is empty, which is not a boolean"),
    "a training config": (
        "a.yaml",
        "args: {mode: finetune}\ndeepspeed: {bf16: {enabled: True}}\n",
        "for training.*'finetune'.*deepspeed.*Choose",
    ),
    "not JSON": ("a.json", '{"nodes": [', "not JSON.*no nodes.*Save the workflow again"),
    "a model's JSON": (
        "a.json",
        '{"_class_name": "CogVideoXTransformer3DModel"}',
        "_class_name, which is not a ComfyUI workflow.*Choose",
    ),
    "an empty JSON": ("a.json", "{}", "nothing in it, which is not a ComfyUI workflow"),
    "a JSON list": ("a.json", "[1]", "a JSON list, which is not a ComfyUI workflow"),
    "another file": ("a.txt", "args: {}", "neither YAML nor JSON.*txt.*Choose"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_cannot_be_checked_is_refused_with_what_why_and_what_to_do(write, case):
    name, content, message = ERRORS[case]
    file = write(content, name)
    for call in (check_config, *([fix_config] if name.endswith("yaml") else [])):
        with pytest.raises(
            ValueError, match=f"(?s)a\\.(yaml|json|txt).*{message}" if "args." not in message else message
        ):
            call(file)
    assert [entry.name for entry in file.parent.iterdir()] == [name]


def test_a_folder_needs_exactly_one_inference_yaml(write, tmp_path):
    with pytest.raises(ValueError, match="no inference.yaml.*Choose"):
        check_config(tmp_path)
    write(OFFICIAL)
    write(OFFICIAL, "sat/configs/inference.yaml")
    with pytest.raises(ValueError, match="2 configs: inference.yaml, sat.configs.inference.yaml.*Give the path of one"):
        check_config(tmp_path)
    with pytest.raises(ValueError, match="There is no .*Check the path"):
        check_config(tmp_path / "missing.yaml")


def test_a_workflow_is_not_fixed_but_told_how_to(judged, tmp_path):
    judged(ui())
    with pytest.raises(ValueError, match="only a SAT inference.yaml can be fixed.*saved over.*change the dtype widget"):
        fix_config(tmp_path / "workflow.json")


def test_the_report_reads_as_text_and_as_json(write):
    file = write(OFFICIAL)
    report = check_config(file)
    lines = report.text.splitlines()
    assert lines[0] == f"{file} (SAT inference.yaml)"
    assert lines[1].startswith("model: CogVideoX1.5, trained in bf16")
    assert lines[2].startswith("[mismatch] args.fp16 (line 12): fp16 is on")
    assert lines[3].startswith("    do: Set bf16: True")
    again = json.loads(json.dumps(report.as_dict()))
    assert (again["path"], again["kind"], again["verdict"], again["model"]) == (
        str(file),
        report.kind,
        "mismatch",
        report.model,
    )
    assert again["findings"][0]["where"] == "args.fp16 (line 12)"
