"""The dtype plan: what is stored, trained and run, judged per part before a second is spent."""

import json
from types import SimpleNamespace

import pytest
import torch

from cogvideox.checkpoint.layout import open_checkpoint
from cogvideox.dtypes import FP32, RANGE_SAFE_FP16, Precision, dtype_name
from cogvideox.precision import hardware as hw
from cogvideox.precision.hardware import ABSENT, EMULATED, NATIVE, Hardware
from cogvideox.precision.policy import CHOICES, plan_dtypes, safer, scan_parts
from cogvideox.precision.quantizing import check_method
from tests.tiny_checkpoint import build_checkpoint

CPU = torch.device("cpu")
RTX_3090 = Hardware(CPU, "an RTX 3090")
V100 = Hardware(CPU, "a V100", bf16=ABSENT)
T4 = Hardware(CPU, "a T4", bf16=EMULATED)
GTX_1660 = Hardware(CPU, "a GTX 1660", bf16=EMULATED, half_convolutions=False)
OLD_CPU = Hardware(CPU, "an old CPU", bf16=EMULATED, fp16=EMULATED)

BF16, FP16 = Precision(torch.bfloat16), Precision(torch.float16)


def plan(checkpoint, choice="auto", hardware=RTX_3090, on_mismatch="fix"):
    return plan_dtypes(open_checkpoint(checkpoint), choice, hardware, on_mismatch)


def part(plan, kind):
    return next(part for part in plan.parts if part.kind == kind)


def runs(plan):
    return [part(plan, kind).run for kind in ("transformer", "text_encoder", "vae")]


@pytest.mark.parametrize("hardware", [RTX_3090, V100, T4, GTX_1660, OLD_CPU], ids=lambda hardware: hardware.name)
@pytest.mark.parametrize("variant", ["1.5", "1.5-i2v", "fun-inp", "void", "5b", "2b"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_fixed_plan_never_runs_what_could_turn_black(checkpoints, choice, variant, hardware):
    made = plan(checkpoints(variant), choice, hardware)
    for planned in made.parts:
        if planned.run.dtype == torch.float16 and planned.kind != "vae":
            assert planned.run.range_safe or planned.trained == torch.float16
        if planned.kind == "vae" and planned.run.dtype == torch.float16:
            assert hardware.half_convolutions
        assert hardware.support(planned.run.dtype) != ABSENT
    if choice == "auto":
        assert made.verdict == "ok"
        assert all(hardware.support(planned.run.dtype) == NATIVE for planned in made.parts)


class TestBf16WeightsInFp16:
    def test_run_range_safe_and_say_so(self, checkpoints):
        made = plan(checkpoints("1.5"), "fp16")
        assert runs(made) == [RANGE_SAFE_FP16, RANGE_SAFE_FP16, FP16]
        assert made.verdict == part(made, "transformer").verdict == "mismatch"
        assert part(made, "vae").verdict == "ok"
        assert "[mismatch, fixed] transformer: stored bf16" in made.text
        assert "changed: runs in range-safe fp16 instead of fp16" in made.text
        (finding,) = part(made, "transformer").findings
        assert "65504" in finding.reason
        assert "auto" in finding.remedy

    def test_are_told_on_the_node_with_a_line_a_part_and_each_reason_once(self, checkpoints):
        made = plan(checkpoints("1.5"), "fp16")
        head, memory, *lines = made.short_text("memory").splitlines()
        assert head.endswith("dtype fp16: mismatch")
        assert memory == "memory"
        assert lines[:3] == [
            "[mismatch, fixed] transformer: stored bf16, runs in range-safe fp16",
            "[mismatch, fixed] text encoder: stored fp32, runs in range-safe fp16",
            "[ok] VAE: stored fp32, runs in fp16",
        ]
        assert "\n".join(lines).count("65504") == 1
        (reason,) = [line for line in lines if "65504" in line]
        assert reason.startswith("transformer, text encoder: dtype fp16 was chosen, but it was trained in bf16")
        # Nothing that is said at length is missing but what the lines of the parts say.
        findings = [finding for part in made.parts for finding in part.findings]
        assert all(finding.remedy in "\n".join(lines) for finding in findings)

    def test_run_as_chosen_under_warn_and_are_refused_under_stop(self, checkpoints):
        made = plan(checkpoints("1.5"), "fp16", on_mismatch="warn")
        assert runs(made) == [FP16, FP16, FP16]
        assert made.verdict == "mismatch"
        assert "fixed" not in made.text
        with pytest.raises(
            ValueError,
            match=r"on_mismatch is stop.\ntransformer: dtype fp16 was chosen, but CogVideoX1.5 .* was trained in",
        ) as caught:
            plan(checkpoints("1.5"), "fp16", on_mismatch="stop")
        assert "text encoder: dtype fp16 was chosen, but T5 was trained in bf16" in str(caught.value)

    def test_that_were_cast_to_fp16_on_disk_are_told_as_lost(self, tmp_path):
        made = plan(build_checkpoint(tmp_path / "cast", stored={"transformer": torch.float16}))
        assert runs(made)[0] == BF16
        assert part(made, "transformer").verdict == "warning"
        assert "fp16 copy of weights trained in bf16" in made.text
        assert "stored fp16" in made.text


def test_fp16_trained_2b_is_at_home_in_fp16_and_coarser_in_bf16(checkpoints):
    assert (
        runs(plan(checkpoints("2b"), "auto")) == runs(plan(checkpoints("2b"), "fp16")) == [FP16, RANGE_SAFE_FP16, FP16]
    )
    assert part(plan(checkpoints("2b"), "fp16"), "transformer").verdict == "ok"
    made = plan(checkpoints("2b"), "bf16")
    assert runs(made) == [BF16, BF16, BF16]
    assert part(made, "transformer").verdict == "warning"
    assert "coarser" in made.text


def test_fp32_t5_and_vae_beside_a_bf16_transformer_are_normal(checkpoints):
    made = plan(checkpoints("1.5"))
    assert runs(made) == [BF16, BF16, BF16]
    assert made.verdict == "ok"
    assert "[ok] transformer: stored bf16" in made.text
    assert "[ok] text encoder: stored fp32" in made.text
    assert "[ok] VAE: stored fp32" in made.text


@pytest.mark.parametrize(
    ("variant", "choice", "hardware", "said"),
    [
        ("1.5", "auto", RTX_3090, {}),
        ("1.5", "bf16", RTX_3090, {}),
        ("1.5", "fp32", RTX_3090, {}),
        ("1.5", "fp16", RTX_3090, {"transformer": "65504", "text_encoder": "65504", "vae": "Every chunk of frames"}),
        ("2b", "auto", RTX_3090, {"text_encoder": "T5 was trained in bf16: range-safe fp16"}),
        ("2b", "bf16", RTX_3090, {"transformer": "but coarser"}),
        (*("1.5", "auto", T4), dict.fromkeys(("transformer", "text_encoder"), "bf16, which a T4 has not natively")),
        ("1.5", "auto", OLD_CPU, dict.fromkeys(("transformer", "text_encoder", "vae"), "so fp32 is right")),
        ("2b", "auto", OLD_CPU, dict.fromkeys(("transformer", "text_encoder", "vae"), "so fp32 is right")),
        (
            *("1.5", "auto", GTX_1660),
            {"transformer": "range-safe", "text_encoder": "range-safe", "vae": "Convolutions in fp16 give NaN"},
        ),
        (
            *("1.5", "fp16", GTX_1660),
            {"transformer": "65504", "text_encoder": "65504", "vae": "but convolutions in fp16 give NaN"},
        ),
    ],
)
def test_what_is_said_of_a_part_is_of_that_part(checkpoints, variant, choice, hardware, said):
    made = plan(checkpoints(variant), choice, hardware)
    found = {part.kind: part.findings for part in made.parts if part.findings}
    assert {kind: len(findings) for kind, findings in found.items()} == dict.fromkeys(said, 1)
    assert all(said[kind] in finding.reason for kind, (finding,) in found.items())
    assert made.text.count("changed: ") == sum(bool(part.changed) for part in made.parts)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float8_e4m3fn, 4), (torch.float8_e5m2, 3)])
def test_fp8_copies_are_told_with_what_they_keep(tmp_path, dtype, bits):
    made = plan(build_checkpoint(tmp_path / "fp8", stored={"transformer": dtype}))
    assert runs(made)[0] == BF16
    assert part(made, "transformer").verdict == "warning"
    assert f"keep {bits} significant bits" in made.text
    assert "stored fp8" in made.text
    assert ["weights kept in fp8" in part.text for part in made.parts] == [True, False, False]
    assert "weights kept" not in part(made, "vae").text


def test_dtypes_mixed_in_one_part_are_told_apart(tmp_path):
    def mix(parts):
        parts["transformer"].to(torch.bfloat16)
        parts["transformer"].norm_final.float()

    folder = build_checkpoint(tmp_path / "mixed", stored={"transformer": None}, change=mix)
    stored = part(plan(folder), "transformer").stored
    assert set(stored) == {torch.bfloat16, torch.float32}
    assert "stored bf16 (" in plan(folder).text
    assert "+ fp32 (" in plan(folder).text


def test_without_bf16_auto_and_bf16_both_run_range_safe(checkpoints):
    for choice in ("auto", "bf16"):
        assert runs(plan(checkpoints("1.5"), choice, V100)) == [RANGE_SAFE_FP16, RANGE_SAFE_FP16, FP16]
    assert plan(checkpoints("1.5"), "auto", V100).verdict == "ok"
    made = plan(checkpoints("1.5"), "bf16", V100)
    assert made.verdict == "mismatch"
    assert "a V100 has no bf16" in made.text
    with pytest.raises(ValueError, match="a V100 has no bf16"):
        plan(checkpoints("1.5"), "bf16", V100, "stop")


def test_emulated_bf16_is_right_but_told_to_be_slow(checkpoints):
    made = plan(checkpoints("1.5"), "bf16", T4)
    assert runs(made) == [BF16, BF16, BF16]
    assert made.verdict == "warning"
    assert "only emulates bf16" in made.text
    assert "range-safe fp16 here" in made.text
    assert runs(plan(checkpoints("1.5"), "auto", OLD_CPU)) == [FP32, FP32, FP32]


def test_where_half_convolutions_fail_the_vae_runs_in_fp32(checkpoints):
    assert runs(plan(checkpoints("1.5"), "auto", GTX_1660)) == [RANGE_SAFE_FP16, RANGE_SAFE_FP16, FP32]
    made = plan(checkpoints("1.5"), "fp16", GTX_1660)
    assert part(made, "vae").changed == "runs in fp32 instead of fp16"


def test_a_flag_that_comfyui_was_started_with_counts_as_a_choice_and_a_choice_beats_it(checkpoints):
    forced = {"transformer": (torch.float16, "--fp16-unet"), "vae": (torch.float32, "--fp32-vae")}
    hardware = Hardware(CPU, "an RTX 3090", forced=forced)
    made = plan(checkpoints("1.5"), "auto", hardware)
    assert runs(made) == [RANGE_SAFE_FP16, BF16, FP32]
    assert "ComfyUI was started with --fp16-unet" in made.text
    assert "Start ComfyUI without --fp16-unet" in made.text
    assert runs(plan(checkpoints("1.5"), "bf16", hardware)) == [BF16, BF16, BF16]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({}, {}),
        ({"force_fp16", "fp16_unet"}, {"transformer": "--force-fp16"}),
        ({"bf16_unet"}, {"transformer": "--bf16-unet"}),
        ({"force_fp32"}, {"transformer": "--force-fp32", "text_encoder": "--force-fp32", "vae": "--force-fp32"}),
        ({"fp16_vae", "bf16_text_enc"}, {"vae": "--fp16-vae", "text_encoder": "--bf16-text-enc"}),
    ],
)
def test_comfyuis_flags_are_read(pack, flags, wanted):
    import sys

    host = sys.modules[f"{pack.__name__}.nodes.host"]
    forced = host.forced_dtypes(SimpleNamespace(**dict.fromkeys(flags, True)))
    assert {kind: flag for kind, (_, flag) in forced.items()} == wanted
    for dtype, flag in forced.values():
        assert dtype_name(dtype) in flag


def test_unknown_choices_are_refused(checkpoints):
    with pytest.raises(ValueError, match="'int3'"):
        plan(checkpoints("1.5"), "int3")
    with pytest.raises(ValueError, match="'ignore'"):
        plan(checkpoints("1.5"), on_mismatch="ignore")


def test_scripts_get_the_report_as_data(checkpoints):
    checkpoint = open_checkpoint(checkpoints("1.5"))
    made = plan_dtypes(checkpoint, "fp16", RTX_3090)
    data = json.loads(json.dumps(scan_parts(checkpoint, made).as_dict()))
    assert data["verdict"] == "mismatch"
    transformer = data["parts"][0]
    assert (transformer["part"], transformer["trained"], transformer["runs_in"], transformer["range_safe"]) == (
        "transformer",
        "bf16",
        "fp16",
        True,
    )
    assert transformer["stored"] == {
        "bf16": sum(tensor.nbytes for tensor in checkpoint.part("transformer").tensors.values())
    }
    assert len(data["weights"]) == 3


def test_a_scan_tells_its_progress_over_all_parts_and_finds_damage(tmp_path):
    def damage(parts):
        with torch.no_grad():
            parts["transformer"].proj_out.weight[0, 0] = float("nan")

    checkpoint = open_checkpoint(build_checkpoint(tmp_path / "damaged", change=damage))
    seen = []
    made = scan_parts(
        checkpoint, plan_dtypes(checkpoint, "auto", RTX_3090), lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for p in checkpoint.parts.values() for t in p.tensors.values())
    assert made.verdict == "mismatch"
    assert "proj_out.weight" in made.text


def test_the_ladder_of_safer_ways_ends_in_fp32():
    assert safer("transformer", FP16, RTX_3090) == [RANGE_SAFE_FP16, BF16, FP32]
    assert safer("transformer", FP16, T4) == [RANGE_SAFE_FP16, FP32]
    assert safer("text_encoder", RANGE_SAFE_FP16, RTX_3090) == [BF16, FP32]
    assert safer("transformer", BF16, RTX_3090) == safer("transformer", BF16, T4) == [FP32]
    assert safer("vae", FP16, RTX_3090) == safer("vae", BF16, RTX_3090) == [FP32]
    assert safer("vae", FP32, RTX_3090) == safer("transformer", FP32, RTX_3090) == []


class TestHardware:
    @pytest.mark.parametrize(
        ("name", "capability", "wanted"),
        [
            ("NVIDIA H100 80GB HBM3", (9, 0), (NATIVE, NATIVE, NATIVE, NATIVE, True)),
            ("NVIDIA GeForce RTX 4090", (8, 9), (NATIVE, NATIVE, NATIVE, NATIVE, True)),
            ("NVIDIA GeForce RTX 3090", (8, 6), (NATIVE, NATIVE, ABSENT, NATIVE, True)),
            ("NVIDIA GeForce RTX 2080 Ti", (7, 5), (EMULATED, NATIVE, ABSENT, NATIVE, True)),
            ("NVIDIA GeForce GTX 1660 SUPER", (7, 5), (EMULATED, NATIVE, ABSENT, ABSENT, False)),
            ("Tesla V100-SXM2-16GB", (7, 0), (EMULATED, NATIVE, ABSENT, ABSENT, True)),
            ("NVIDIA GeForce GTX 1080", (6, 1), (EMULATED, EMULATED, ABSENT, ABSENT, True)),
            ("Tesla P100-PCIE-16GB", (6, 0), (EMULATED, NATIVE, ABSENT, ABSENT, True)),
        ],
    )
    def test_nvidia_cards_are_known_by_their_compute_capability(self, name, capability, wanted):
        found = hw.cuda_support(name, capability)
        assert tuple(found.values()) == wanted
        if wanted[0] == EMULATED:
            assert hw.cuda_support(name, capability, emulates_bf16=False)["bf16"] == ABSENT

    @pytest.mark.parametrize(
        ("architecture", "bf16", "fp8", "int8"),
        [
            ("gfx942:sramecc+:xnack-", NATIVE, ABSENT, NATIVE),
            ("gfx950:sramecc+:xnack-", NATIVE, NATIVE, NATIVE),
            ("gfx90a:sramecc+:xnack-", NATIVE, ABSENT, NATIVE),
            ("gfx1100", NATIVE, ABSENT, ABSENT),
            ("gfx1201", NATIVE, NATIVE, ABSENT),
            ("gfx1030", EMULATED, ABSENT, ABSENT),
        ],
    )
    def test_amd_cards_are_known_by_their_architecture(self, architecture, bf16, fp8, int8):
        assert hw.rocm_support(architecture) == dict(bf16=bf16, fp16=NATIVE, fp8=fp8, int8=int8)

    def test_a_cuda_device_is_asked(self, monkeypatch):
        import contextlib

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 2080 Ti")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.version, "hip", None)
        assert Hardware.detect("cuda").text == "NVIDIA GeForce RTX 2080 Ti (bf16 emulated, fp16 native, fp8 absent)"
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName="gfx1030"))
        assert Hardware.detect("cuda").bf16 == EMULATED

    @pytest.mark.parametrize(
        ("capability", "built_for", "runs"),
        [
            # An RTX 5090 with the build for CUDA 12.4, and with those that have its code, or PTX.
            ((12, 0), "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", False),
            ((12, 0), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120", True),
            ((12, 0), "sm_50 sm_90 compute_90", True),
            # A GTX 1080 and a V100 with builds for CUDA 12.8 and 13.
            ((6, 1), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120", False),
            ((7, 0), "sm_75 sm_80", False),
            ((6, 1), "sm_60 sm_80", True),
            # Of one major version the later ones run what was built for the earlier, and not the other way round.
            ((8, 9), "sm_80", True),
            ((8, 0), "sm_86", False),
            ((8, 6), "compute_89", False),
            ((9, 0), "sm_90a", True),
            ((10, 0), "sm_90a", False),
            ((12, 1), "sm_120a", False),
            ((12, 1), "sm_120f", True),
            ((12, 0), "compute_100f", False),
            ((12, 0), "compute_90a", False),
            # Nothing is known of these.
            ((8, 0), "", True),
            ((8, 0), "ivcore11", True),
        ],
    )
    def test_code_of_another_card_does_not_run(self, capability, built_for, runs):
        assert hw.has_code(built_for.split(), capability) == runs

    def test_a_card_that_torch_was_not_built_for_is_a_sentence(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 5090")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
        monkeypatch.setattr(torch.version, "hip", None)
        with pytest.raises(ValueError, match=r"RTX 5090 has compute capability 12\.0.* built for sm_80, sm_90, so"):
            Hardware.detect("cuda")

    def test_directml_has_no_bf16(self, checkpoints):
        hardware = Hardware.detect(torch.device("privateuseone:0"))
        assert hardware.text == "DirectML (bf16 absent, fp16 native, fp8 absent)"
        assert runs(plan(checkpoints("1.5"), hardware=hardware)) == [RANGE_SAFE_FP16, RANGE_SAFE_FP16, FP16]
        with pytest.raises(ValueError, match="DirectML has no such dtype"):
            check_method("fp8_weight_only", hardware)

    def test_macos_before_14_has_no_bf16(self, monkeypatch):
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
        assert Hardware.detect(torch.device("mps")).bf16 == ABSENT

    def test_this_machine_is_told(self):
        assert Hardware.detect("cpu").support(torch.float32) == NATIVE
        assert Hardware.detect().device.type in ("cpu", "cuda", "mps", "xpu")

    def test_a_device_that_is_not_there_is_a_sentence(self):
        with pytest.raises(ValueError, match="'gpu', which torch does not know"):
            Hardware.detect("gpu")
        if not torch.cuda.is_available():
            with pytest.raises(ValueError, match="sees no GPU"):
                Hardware.detect("cuda")
        for name in ("meta", "vulkan", "hpu", "cpu:9", "x" * 5000, ""):
            with pytest.raises(ValueError, match=r"Here are cpu") as caught:
                Hardware.detect(name)
            assert len(str(caught.value)) < 400

    def test_a_card_that_is_not_there_is_told_by_the_cards_that_are(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(ValueError, match="The device is cuda:9, which is not there.* cuda:0, cuda:1"):
            Hardware.detect("cuda:9")
