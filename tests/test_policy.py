"""The dtype plan: what is stored, trained and run, told per part."""

import pytest
import torch

from cogvideox.checkpoint.layout import open_checkpoint
from cogvideox.precision.policy import Hardware, plan_dtypes

BF16_CARD = Hardware(torch.device("cpu"), "an RTX 3090", bf16=True)
OLD_CARD = Hardware(torch.device("cpu"), "a V100", bf16=False)


def runs(checkpoint, choice, hardware):
    return {part.run for part in plan_dtypes(open_checkpoint(checkpoint), choice, hardware).parts}


def test_auto_is_the_trained_dtype_where_the_device_has_it(checkpoints):
    assert runs(checkpoints("1.5"), "auto", BF16_CARD) == {torch.bfloat16}
    assert runs(checkpoints("2b"), "auto", BF16_CARD) == {torch.float16}


def test_auto_never_runs_bf16_weights_in_plain_fp16(checkpoints):
    assert runs(checkpoints("1.5"), "auto", OLD_CARD) == {torch.float32}


@pytest.mark.parametrize(("choice", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_a_chosen_dtype_is_used(checkpoints, choice, dtype):
    assert runs(checkpoints("1.5"), choice, BF16_CARD) == {dtype}


def test_a_dtype_the_device_cannot_compute_in_is_refused(checkpoints):
    with pytest.raises(ValueError, match="a V100 cannot compute in it"):
        runs(checkpoints("1.5"), "bf16", OLD_CARD)


def test_an_unknown_dtype_is_refused(checkpoints):
    with pytest.raises(ValueError, match="'int3'"):
        runs(checkpoints("1.5"), "int3", BF16_CARD)


def test_the_report_tells_three_dtypes_per_part(checkpoints):
    text = plan_dtypes(open_checkpoint(checkpoints("1.5")), "auto", BF16_CARD).text
    assert "an RTX 3090" in text
    assert "transformer: stored bf16" in text
    assert "text encoder: stored fp32" in text
    assert text.count("trained in bf16, runs in bf16") == 3


def test_fp16_for_weights_trained_in_bf16_is_warned_of(checkpoints):
    assert "WARNING" in plan_dtypes(open_checkpoint(checkpoints("1.5")), "fp16", BF16_CARD).text
    assert "WARNING" not in plan_dtypes(open_checkpoint(checkpoints("2b")), "fp16", BF16_CARD).text


def test_the_hardware_of_this_machine_is_told():
    assert Hardware.detect("cpu").computes_in(torch.float32)
    assert Hardware.detect().device.type in ("cpu", "cuda", "mps", "xpu")
