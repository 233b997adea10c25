"""A tokenizer that is damaged or another model's is refused when the checkpoint is opened; prompts never run with a
vocabulary of nothing."""

import io
import json
import shutil

import pytest

from cogvideox.checkpoint import tokenizer as module
from cogvideox.checkpoint.layout import open_checkpoint
from cogvideox.checkpoint.tokenizer import check_tokenizer
from cogvideox.handles import open_handles
from cogvideox.text import encode_prompt
from tests.conftest import CPU, ROOT
from tests.layouts import open_whole

REAL = ROOT.parent / "shared" / "real-configs" / "CogVideoX1.5-5B-I2V" / "tokenizer"


@pytest.fixture
def copied(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "checkpoint")


def trained(special=("<pad>", "</s>", "<unk>"), model_type="unigram", size=60) -> bytes:
    """A SentencePiece model of a few words."""
    import sentencepiece

    model, ids = (
        io.BytesIO(),
        {name: special.index(name) if name in special else -1 for name in ("<pad>", "</s>", "<unk>", "<s>")},
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [
                "a panda plays the guitar in a bamboo forest",
                "the sun rises over the sea while waves roll onto the beach",
            ]
            * 8
        ),
        model_writer=model,
        vocab_size=size,
        hard_vocab_limit=False,
        model_type=model_type,
        pad_id=ids["<pad>"],
        eos_id=ids["</s>"],
        unk_id=ids["<unk>"],
        bos_id=ids["<s>"],
        minloglevel=2,
    )
    return model.getvalue()


def as_json(folder, target):
    """The same tokenizer in the format of tokenizers."""
    from transformers import T5TokenizerFast

    T5TokenizerFast.from_pretrained(folder).save_pretrained(target)
    return json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real tokenizer is not beside the project")
def test_t5s_own_fits_t5s_table_and_one_changed_byte_is_seen(tmp_path):
    check_tokenizer(REAL, 32128)
    with pytest.raises(ValueError, match="has 32,000 tokens, and the text encoder's table has 31,999 rows"):
        check_tokenizer(REAL, 31999)
    data = bytearray((REAL / "spiece.model").read_bytes())
    data[300_000] ^= 1
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(ValueError, match="the size of T5's own and other bytes"):
        check_tokenizer(tmp_path, 32128)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real tokenizer is not beside the project")
def test_what_is_read_of_a_model_is_what_sentencepiece_reads():
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(REAL / "spiece.model"))
    pieces, kind = module._read_model((REAL / "spiece.model").read_bytes())
    assert pieces == [theirs.id_to_piece(number) for number in range(theirs.get_piece_size())]
    assert kind == module._UNIGRAM


def cut(share):
    return lambda data: data[: int(len(data) * share)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: b"", "is empty, as an interrupted download leaves it"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 791656\n",
            "is a Git LFS pointer",
        ),
        (lambda data: b"<!doctype html><html><body>Log in</body></html>", "is no whole SentencePiece model"),
        (lambda data: bytes(len(data)), "is no whole SentencePiece model"),
        (cut(0.25), "is no whole SentencePiece model"),
        (cut(0.9), "is no whole SentencePiece model"),
        (lambda data: data[:-1], "it breaks off"),
        # Right after the first piece: a whole message, but no whole model.
        (lambda data: data[: 2 + data[1]], "it ends before its settings"),
        (lambda data: data[: 2 + data[1]] + data, "pieces are there twice"),
        (
            lambda data: trained(("<unk>", "<s>", "</s>")),
            "is another model's: T5's is a unigram model that begins with <pad>, </s>, <unk>",
        ),
        (lambda data: trained(model_type="bpe"), "is another model's"),
    ],
)
def test_a_damaged_or_foreign_model_is_refused_at_opening(copied, change, said):
    file = copied / "tokenizer" / "spiece.model"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=said) as caught:
        open_whole(copied)
    assert str(file) in str(caught.value)
    assert "Download tokenizer/spiece.model of a CogVideoX repository again" in str(caught.value)
    assert "tiktoken" not in str(caught.value)


def test_one_with_more_tokens_than_the_text_encoders_table_has_rows_is_refused(copied, monkeypatch):
    """As UMT5's, of 256,384 tokens, is for T5's 32,128 rows."""
    monkeypatch.setattr(module, "_count_pieces", lambda *_: 256_384)
    with pytest.raises(
        ValueError, match="has 256,384 tokens, and the text encoder's table has 256 rows: it is another model's"
    ):
        open_whole(copied)


def test_where_there_is_no_text_encoder_its_tokenizer_does_not_matter(copied):
    shutil.rmtree(copied / "text_encoder")
    (copied / "tokenizer" / "spiece.model").write_bytes(b"")
    assert open_checkpoint(copied).tokenizer == copied / "tokenizer"


def test_a_file_that_changes_is_looked_at_again(copied):
    file = copied / "tokenizer" / "spiece.model"
    whole = file.read_bytes()
    open_whole(copied)
    file.write_bytes(whole[:500])
    with pytest.raises(ValueError, match="no whole SentencePiece model"):
        open_whole(copied)
    file.write_bytes(whole)
    open_whole(copied)


class TestInTheFormatOfTokenizers:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (
                lambda tree: tree.update(model={"type": "BPE", "vocab": {"a": 1}, "merges": []}),
                "a model of the kind BPE, and T5's is Unigram",
            ),
            (lambda tree: tree.pop("model"), "a model of the kind none"),
            (lambda tree: tree["model"].update(vocab=[]), "another model's, or damaged"),
            (lambda tree: tree["model"]["vocab"].insert(0, ["<s>", 0.0]), "begins with <pad>, </s>, <unk>"),
            (lambda tree: tree["model"]["vocab"].append(["x", float("nan")]), "texts, each with a number"),
            (
                lambda tree: tree["model"]["vocab"].extend([f"x{i}", -1.0] for i in range(300)),
                "tokens, and the text encoder's table has 256 rows",
            ),
        ],
    )
    def test_one_that_is_damaged_or_another_models_is_refused_at_opening(self, copied, change, said):
        folder = copied / "tokenizer"
        tree = as_json(folder, folder)
        (folder / "spiece.model").unlink()
        open_whole(copied)
        change(tree)
        (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
        with pytest.raises(ValueError, match=said) as caught:
            open_whole(copied)
        assert "tokenizer.json" in str(caught.value)

    def test_what_only_its_library_finds_becomes_a_sentence(self, copied):
        folder = copied / "tokenizer"
        tree = as_json(folder, folder)
        (folder / "spiece.model").unlink()
        tree["pre_tokenizer"] = {"type": "Nonsense"}
        (folder / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
        with pytest.raises(ValueError, match="holds a tokenizer that cannot be used") as caught:
            encode_prompt(open_handles(copied, "fp32", CPU).text_encoder, "a panda")
        assert str(folder) in str(caught.value)

    def test_settings_that_give_the_special_tokens_another_meaning_are_refused(self, copied):
        (copied / "tokenizer" / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": "panda", "pad_token": "</s>"}), encoding="utf-8"
        )
        with pytest.raises(
            ValueError, match=r"settings of a tokenizer .* another meaning|holds a tokenizer that cannot be used"
        ):
            encode_prompt(open_handles(copied, "fp32", CPU).text_encoder, "a panda")


def test_a_panic_in_rust_becomes_a_sentence_and_an_interruption_stays_one(tiny, monkeypatch):
    from cogvideox import text

    class PanicException(BaseException):
        """As pyo3's: no Exception."""

    encoder = open_handles(tiny, "fp32", CPU).text_encoder
    for error, wanted in (
        (PanicException("index out of bounds"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def fail(folder, error=error):
            raise error

        monkeypatch.setattr(text, "_load_tokenizer", fail)
        with pytest.raises(wanted):
            encode_prompt(encoder, "a panda")
