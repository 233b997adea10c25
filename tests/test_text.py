"""Prompts become the reference's embeddings, and a person is told what of them the model cannot use."""

import json
import os
import shutil
import time

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


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (os.fsdecode(b"a \xd0\xdc\xc3\xa8"), r"bytes that are no UTF-8 \(at letter 3 of 5\).* such as GBK"),
        ("\ud800", "bytes that are no UTF-8"),
        (None, "The prompt is no text but a NoneType"),
        (["a"], "no text but a list"),
        (b"a", "no text but a bytes"),
        (3, "no text but a int"),
    ],
)
def test_what_is_no_text_is_refused_before_the_encoder_is_read(tiny, prompt, said):
    encoder = open_handles(tiny, "fp32", CPU).text_encoder
    with pytest.raises(ValueError, match=said) as caught:
        encode_prompt(encoder, prompt)
    assert str(caught.value).isprintable()
    assert not encoder.weights.is_loaded


@pytest.mark.parametrize("prompt", ["a\0panda", "\n\t", "a" * 40_000, "\U0001f43c" * 300, " " * 40_000 + "a"])
@torch.no_grad()
def test_odd_text_is_encoded_as_the_pipeline_encodes_it(handles, pipeline, prompt):
    expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    assert torch.equal(encode_prompt(handles.text_encoder, prompt).embeddings, expected)


def test_of_a_prompt_of_a_megabyte_only_the_beginning_is_looked_at_and_that_is_said(handles):
    start = time.process_time()
    encoded = encode_prompt(handles.text_encoder, "a panda " * 130_000)
    assert time.process_time() - start < 5
    assert "The prompt has 1,040,000 letters, of which only the first 50,000 were looked at." in encoded.notes[0]
    assert torch.equal(encoded.embeddings, encode_prompt(handles.text_encoder, "a panda " * 1000).embeddings)
    assert sum(map(len, encoded.notes)) < 3000


def test_a_token_beyond_the_text_encoders_table_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<new>": 9999}), encoding="utf-8")
    settings = {"added_tokens_decoder": {"9999": {"content": "<new>", "special": True}}, "extra_ids": 200}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    encoder = open_handles(folder, "fp32", CPU).text_encoder
    # Wherever a version of transformers puts such tokens, none of them reaches the table's end.
    with pytest.raises(ValueError, match="table has 256 rows|cannot be used"):
        encode_prompt(encoder, "<extra_id_0> <extra_id_199> <new>")
