"""Prompts become the reference's embeddings, and a person is told what of them the model cannot use."""

import shutil

import pytest
import torch

from cogvideox.handles import open_handles
from cogvideox.text import encode_prompt, language_note
from tests.conftest import CPU

LONG = "a panda plays the guitar in a bamboo forest while the sun rises over the sea " * 30


@pytest.mark.parametrize("prompt", ["", "a panda plays the guitar", LONG])
@torch.no_grad()
def test_embeddings_equal_the_pipelines_own(handles, pipeline, prompt):
    expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    assert torch.equal(encode_prompt(handles.text_encoder, prompt).embeddings, expected)


@torch.no_grad()
def test_embeddings_equal_the_pipelines_own_in_bf16(tiny):
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(tiny, torch_dtype=torch.bfloat16)
    expected, _ = pipeline.encode_prompt("a cat", do_classifier_free_guidance=False)
    assert torch.equal(encode_prompt(open_handles(tiny, "bf16", CPU).text_encoder, "a cat").embeddings, expected)


def test_the_tokenizer_is_a_sentencepiece_model_alone(tiny):
    assert [file.name for file in (tiny / "tokenizer").iterdir()] == ["spiece.model"]


def test_a_cut_prompt_says_which_part_was_cut(handles, pipeline):
    encoded = encode_prompt(handles.text_encoder, LONG)
    tokens = pipeline.tokenizer(LONG).input_ids
    assert encoded.embeddings.shape == (1, 226, 32)
    assert encoded.cut == pipeline.tokenizer.decode(tokens[225:-1])
    assert LONG.strip().endswith(encoded.cut)
    assert encoded.cut in encoded.notes[0]
    assert f"{len(tokens)} tokens" in encoded.notes[0]


def test_a_prompt_that_just_fits_is_not_reported_as_cut(handles, pipeline):
    words = "a " * 500
    count = 225
    prompt = words[: 2 * count].strip()
    assert len(pipeline.tokenizer(prompt).input_ids) == 226
    assert encode_prompt(handles.text_encoder, prompt).cut == ""
    assert encode_prompt(handles.text_encoder, prompt + " a").cut == "a"


@pytest.mark.parametrize(
    "prompt",
    [
        "一只熊猫在竹林里弹吉他",
        "Кот гуляет по саду",
        "Ein Hund läuft durch die Wiese und der Himmel ist blau",
        "Un chat se promène dans le jardin avec les enfants",
    ],
)
def test_a_prompt_that_is_not_english_is_noted(prompt):
    assert "only English" in language_note(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "A panda plays the guitar in a bamboo forest, café, naïve style.",
        "cinematic, 4k, sunset, dramatic lighting",
        "Los Angeles at night seen from Las Vegas, neon on wet streets",
        "A street sign that says 東京, filmed from a car at dusk with soft rain",
    ],
)
def test_an_english_prompt_is_not(prompt):
    assert language_note(prompt) is None


def test_a_missing_tokenizer_is_told(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy", ignore=shutil.ignore_patterns("spiece.model"))
    with pytest.raises(ValueError, match=r"spiece\.model"):
        encode_prompt(open_handles(folder, "fp32", CPU).text_encoder, "a cat")
