"""Prompt to embeddings: T5 as the reference pipeline runs it (padded to the maximum, no attention mask)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import dropwhile
from pathlib import Path

import torch
from torch import nn

from .checkpoint.tokenizer import SPECIAL, check_tokenizer, has_tokenizer, wrong_tokenizer
from .dependencies import unimportable
from .events import Events
from .files import read_bytes, write_whole
from .finite import check_finite
from .handles import TextEncoder
from .modules.internals import LibraryModule
from .sentinel import Sentinel
from .weights import placements
from .words import listed, reason, short

#: Letters of a prompt that are looked at: what a model reads of it, 226 tokens, is never so long.
_MAX_LETTERS = 50_000
#: Letters of a prompt's end that are quoted where it was cut.
_QUOTED = 2000
#: What transformers imports to read a tokenizer.
_TOKENIZING = (
    *("tokenizers", "sentencepiece", "google.protobuf", "sentencepiece.sentencepiece_model_pb2"),
    *("transformers.models.t5.tokenization_t5", "transformers.models.t5.tokenization_t5_fast"),
)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's embeddings ``[1, tokens, width]`` and what its writer should know.

    Attributes:
        cut: the end of the prompt that did not fit, or "".
        notes: sentences for the user, such as that the prompt was cut or is not English.
    """

    embeddings: torch.Tensor
    cut: str
    notes: tuple[str, ...]


def encode_prompt(
    encoder: TextEncoder,
    prompt: str,
    on_nan: str = "heal",
    events: Events | None = None,
) -> EncodedPrompt:
    """Encode a prompt exactly as diffusers' ``CogVideoXPipeline.encode_prompt`` does.

    Args:
        on_nan: what to do about embeddings that are not finite: ``heal`` encodes in the next safer precision, ``stop``
            raises.
        events: told of the loading, of each layer of the encoder, and when the encoding had to be healed.

    Returns:
        Embeddings ``[1, tokens, width]``, finite, in the encoder's dtype, on the CPU (released models: 226 x 4096).

    Raises:
        ValueError: for what is no text, or if the tokenizer is missing or damaged, or the checkpoint holds no text
            encoder.
        NonFiniteError: if the embeddings are not finite and are not, or cannot be, healed.
    """
    check_prompt(prompt)
    notes, text = [], prompt[:_MAX_LETTERS]
    if len(prompt) > len(text):
        notes.append(
            f"The prompt has {len(prompt):,} letters, of which only the first {_MAX_LETTERS:,} were looked at."
        )
    ids, whole, cut = _tokenize(encoder, text)
    if cut:
        # All of it, unless it is a book.
        notes.append(
            f"The prompt has {whole} tokens and the model reads {encoder.tokens}: this end was cut off: "
            f'"{short(cut, _QUOTED)}"'
        )
    note = language_note(text)
    if note:
        notes.append(note)
    mode = encoder.weights.fitting_mode()
    smaller = tuple(dropwhile(lambda placement: placement.mode != mode, placements()))
    with Sentinel(encoder.weights, on_nan, events, placements=smaller) as sentinel, torch.no_grad():

        def encode(module: nn.Module, _) -> torch.Tensor:
            with _layers_told(module, events):
                return module(ids.to(encoder.weights.device))[0]

        embeddings = sentinel.run(encode, "encoding the prompt")
    return EncodedPrompt(embeddings.to("cpu", copy=True), cut, tuple(notes))


def check_prompt(prompt: str) -> None:
    """Refuse what is no text, or holds what is no letter.

    Raises:
        ValueError: saying what it is, or where the first such place is.
    """
    if not isinstance(prompt, str):
        raise ValueError(
            f"The prompt is no text but a {type(prompt).__name__}, so it cannot be encoded. Connect or give a text; "
            "an empty one will do."
        )
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The prompt has bytes that are no UTF-8 (at letter {error.start + 1:,} of {len(prompt):,}), so the words "
            "there are not known. It was typed or saved in another encoding, such as GBK: set the terminal to UTF-8, "
            "or save the file it comes from as UTF-8."
        ) from error


def _tokenize(encoder: TextEncoder, text: str) -> tuple[torch.Tensor, int, str]:
    """The ids of a prompt, padded or cut to the encoder's tokens ``[1, tokens]``, their number before that, and the
    text of those cut off.

    Raises:
        ValueError: if the tokenizer cannot be used.
        RuntimeError: if a package that it is read with cannot.
    """
    folder = encoder.tokenizer_folder
    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder} holds no spiece.model, so prompts cannot be turned into tokens. Download tokenizer/ of a "
            "CogVideoX repository into the checkpoint's folder, or beside the text encoder's file."
        )
    tensors = encoder.weights.part.tensors
    rows = (tensors.get("shared.weight") or tensors["encoder.embed_tokens.weight"]).shape[0]
    check_tokenizer(folder, rows)
    failed: BaseException | None = None
    try:
        tokenizer = _load_tokenizer(folder)
        special = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL]
        ends = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        whole = tokenizer(text).input_ids
        padded = tokenizer(
            text,
            padding="max_length",
            max_length=encoder.tokens,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        ids = padded.input_ids
        cut = tokenizer.decode(whole[encoder.tokens - 1 : -1]) if len(whole) > encoder.tokens else ""
    # Of any type, even one that is no Exception (tokenizers is written in Rust, whose panics are such): libraries find
    # out what is wrong with a tokenizer while they use it, and say so in their own terms or advise to install another
    # package.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        failed = error
    if failed is not None:
        # Of a package that cannot be imported, too, they say that the file is wrong.
        said = f"holds a tokenizer that cannot be used ({type(failed).__name__})"
        raise (unimportable(_TOKENIZING) or wrong_tokenizer(folder, said)) from failed
    if special != [0, 1, 2] or ends != (0, 1) or tuple(ids.shape) != (1, encoder.tokens):
        said = (
            f"holds settings of a tokenizer (tokenizer_config.json or its like) that give {', '.join(SPECIAL)} "
            "another meaning"
        )
        raise wrong_tokenizer(folder, said)
    if not 0 <= ids.min() <= ids.max() < rows:
        raise wrong_tokenizer(
            folder,
            f"holds a tokenizer that gives the token {ids.max()}, and the text encoder's table has {rows:,} rows",
        )
    return ids, len(whole), cut


def _load_tokenizer(folder: Path):
    import transformers

    fast = not (folder / "spiece.model").is_file()
    return getattr(transformers, "T5TokenizerFast" if fast else "T5Tokenizer").from_pretrained(folder)


@contextmanager
def _layers_told(module: LibraryModule, events: Events | None) -> Iterator[None]:
    """Tell of each layer of a T5 encoder that is done."""
    layers = module.encoder.block
    told = (events or Events()).counter("encoding", "layer")
    hooks = [
        layer.register_forward_hook(lambda *_, done=done: told(done, len(layers)))
        for done, layer in enumerate(layers, 1)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


#: What a prompt's embedding is called in a file: as DOVE's authors have it (https://github.com/zhengchen1999/DOVE,
#: ``pretrained_models/prompt_embeddings``).
_EMBEDDING = "prompt_embedding"
#: Bytes of such a file: 226 tokens of 4096 numbers in fp32 have 3.7 MB.
_MAX_EMBEDDING = 64 << 20


def empty_prompt_files(width: int) -> tuple[str, ...]:
    """Return the names of files that hold the empty prompt's embedding of so many numbers a token: ours first, then
    that of DOVE's authors, who name prompts by their SHA-256."""
    return f"empty_prompt_{width}.safetensors", f"{sha256(b'').hexdigest()}.safetensors"


def write_embeddings(embeddings: torch.Tensor, path: Path) -> None:
    """Write a prompt's embeddings ``[1, tokens, width]`` to a safetensors file, whole or not at all.

    Raises:
        ValueError: if it exists, or cannot be written.
    """
    from safetensors.torch import save

    content = save({_EMBEDDING: embeddings.cpu().contiguous()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise ValueError(
            f"{short(path, 400)} cannot be written ({reason(error)}), so the prompt's embedding is not kept. Choose "
            "another folder."
        ) from error


def read_embeddings(path: Path, width: int) -> torch.Tensor:
    """Read a prompt's embeddings as ``write_embeddings`` and DOVE's authors write them.

    Args:
        width: that the model reads.

    Returns:
        ``[1, tokens, width]``, finite, as stored.

    Raises:
        ValueError: if it is not there, damaged, or of another kind or model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = read_bytes(path, _MAX_EMBEDDING)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, MemoryError) as error:
        raise ValueError(
            f"{short(path, 400)} cannot be read as a prompt's embedding ({reason(error)}): it is cut off, or something "
            "else. Take it away and connect a text encoder, which makes it anew."
        ) from error
    found = tensors.get(_EMBEDDING)
    if found is None or not found.is_floating_point():
        raise ValueError(
            f"{short(path, 400)} holds no prompt's embedding ({listed(sorted(tensors)) or 'nothing'}). Take it away "
            "and connect a text encoder, which makes one."
        )
    found = found[None] if found.ndim == 2 else found
    check_width(found, width)
    check_finite(found, f"The embedding in {short(path, 400)}", "Take the file away and connect a text encoder.")
    return found


def check_width(embeddings: torch.Tensor, width: int) -> None:
    """Refuse the embeddings of a prompt that are not ``[1, tokens, width]``.

    Raises:
        ValueError: with their shape.
    """
    if embeddings.ndim != 3 or embeddings.shape[0] != 1 or embeddings.shape[2] != width or not embeddings.numel():
        raise ValueError(
            f"The prompt's embedding has the shape {list(embeddings.shape)}, and this model reads [1, tokens, "
            f"{width}]: it was made by another model's text encoder. Connect the text encoder of this checkpoint."
        )


# Words that mark a language, none of them an English word: enough to notice a sentence, silent on a list of names.
_FOREIGN = set(
    """der das und ein eine einen einem mit auf im ist nicht durch von zu über eines
    le la les une et avec dans sur est qui aux du pour au des
    el los las una con por para del que es y su sus en
    il gli di della nel nella che sono con un
    os uma com na no da em do ao pelo
    het een van op met en
    i w na z się jest do""".split()
) - {"no", "do", "i", "on", "an", "a", "in", "is", "to", "as", "van", "at", "z", "w"}
_ENGLISH = set(
    "the a an of in on with and is are to at by from as its his her their into through while over under".split()
)


def language_note(prompt: str) -> str | None:
    """A sentence if the prompt does not look English (the only language CogVideoX was trained on), else None.

    Scripts other than Latin are seen by their letters, Latin ones by their commonest words. A hint, never an obstacle.
    """
    letters = [letter for letter in prompt if letter.isalpha()]
    foreign_letters = sum(ord(letter) > 0x24F for letter in letters)
    words = re.findall(r"[^\W\d_]+", prompt.lower())
    foreign_words = sum(word in _FOREIGN for word in words)
    english_words = sum(word in _ENGLISH for word in words)
    if foreign_letters * 5 > len(letters) or (foreign_words >= 2 and foreign_words > english_words):
        return (
            "The prompt does not look English, and CogVideoX understands only English: translate it for a picture "
            "that follows it."
        )
    return None
