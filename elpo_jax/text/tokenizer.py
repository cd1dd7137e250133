"""Text to ids and back: bytes, or a small SentencePiece model.

Control tokens have ids that no text encodes to: `encode` takes "<|im_end|>" for ten ordinary characters, so what a tool
or a user says can never end a turn or open a call. Both tokenizers round-trip any text exactly, whitespace included.
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import numpy as np
import sentencepiece

PAD = "<pad>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<tool_response>", "</tool_response>"
CONTROL = (PAD, IM_START, IM_END, CALL_OPEN, CALL_CLOSE, RESPONSE_OPEN, RESPONSE_CLOSE)

_CONTROL_PATTERN = re.compile("|".join(map(re.escape, CONTROL)))
REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()
SPACE_SYMBOL = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece writes a space as this character
_TRAINING_CHARS = 4096  # longer texts are cut for training; the trainer keeps 16-bit positions
_REMEDY = "delete it and start the run again with --resume, which makes it anew, or make one with train_sentencepiece"
_COPIED_OR_NOT = re.compile(r"[A-Z][a-z]*|\d|[^A-Z\d]+")


class Tokenizer(Protocol):
    """What turns text into ids.

    Attributes:
      name: What kind of tokenizer it is, in a word.
      vocab_size: Number of ids; every id is below it.
      control: Ids of the control strings: those of `CONTROL` in our own, whichever it has in a published one.
      fingerprint: Hash of everything that decides the ids; equal fingerprints encode equally.
    """

    name: str
    vocab_size: int
    control: Mapping[str, int]
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, never a control id. A lone surrogate, which no file can hold, is read as "?"."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; control ids as their strings, broken UTF-8 and ids that mean nothing as U+FFFD."""


def train_sentencepiece(texts: Iterable[str], path: str | os.PathLike, vocab_size: int) -> None:
    """Trains a byte-pair model of exactly `vocab_size` ids on `texts` and writes it to `path`, whole or not at all.

    Merges may cross spaces and punctuation, so that an often repeated line costs one or two tokens. Digits stay single
    and capitalised words are never part of a longer piece: numbers and names, which a policy has to copy, then have the
    same ids wherever they stand. The result is a function of the arguments. Byte pairs rather than the unigram model:
    that one prunes from pieces it finds first, and finds too few of them in small corpora with such long repetitions.

    Args:
      texts: What is going to be encoded. Control strings in it are cut out, as `encode` never sees across them.
      path: The model file to write.
      vocab_size: Number of ids, with 264 for the control tokens and the bytes that any other text falls back to.

    Raises:
      ValueError: If there is no text, or too little or too much of it for `vocab_size`.
    """
    path = pathlib.Path(path)
    sentences = list(_training_sentences(texts))
    if not sentences:
        raise ValueError("cannot train a tokenizer on no text: give at least one non-empty text")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            _train(sentences, file, vocab_size)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _training_sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for run in without_control(text):
            for start in range(0, len(run), _TRAINING_CHARS):
                for sentence in _COPIED_OR_NOT.findall(run[start : start + _TRAINING_CHARS]):
                    # The trainer strips newlines off the end of a sentence. A digit is never part of a longer piece.
                    yield sentence + "0" if sentence[-1] in "\r\n" else sentence


def _train(sentences: list[str], file, vocab_size: int) -> None:
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            # The text as it is: no Unicode normalisation, no space put in front, none removed.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Pieces over anything but digits, and any rare character as its bytes.
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_by_number=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=128,
            character_coverage=1.0,
            byte_fallback=True,
            control_symbols=list(CONTROL[1:]),
            pad_id=0,
            pad_piece=PAD,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            max_sentence_length=8 * _TRAINING_CHARS,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if high := re.search(r"too high .*<= (\d+)", str(error)):
            raise ValueError(
                f"the texts hold only {high[1]} pieces: set tokenizer.vocab_size to at most {high[1]}, not "
                f"{vocab_size}, or give more varied texts"
            ) from None
        if low := re.search(r"(\d+) vs (\d+)\. Increase vocab_size", str(error)):
            raise ValueError(
                f"tokenizer.vocab_size={vocab_size} has no room for the {low[2]} bytes, characters and control tokens: "
                "raise it"
            ) from None
        raise


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then the control tokens. Needs no training and no file."""

    name = "byte"
    vocab_size = 256 + len(CONTROL)
    control: Mapping[str, int] = MappingProxyType({text: 256 + i for i, text in enumerate(CONTROL)})
    fingerprint = hashlib.sha256("\n".join(("byte", *CONTROL)).encode()).hexdigest()[:16]

    _table = tuple([bytes([i]) for i in range(256)] + [text.encode() for text in CONTROL])

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return join_bytes(self._table, ids)


class SentencePieceTokenizer:
    """A model written by `train_sentencepiece`.

    Args:
      path: The model file.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is damaged, or a model that lacks the control tokens or does not keep text as it is.
    """

    name = "sentencepiece"

    def __init__(self, path: str | os.PathLike):
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no tokenizer model {path}: make one with train_sentencepiece")
        data = path.read_bytes()
        self.fingerprint = hashlib.sha256(data).hexdigest()[:16]
        self._processor = _load(data, path)
        self.vocab_size = self._processor.vocab_size()
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        ids = {piece: i for i, piece in enumerate(pieces)}
        self.control: Mapping[str, int] = MappingProxyType({text: ids.get(text, -1) for text in CONTROL})
        self._space_symbol = [ids.get(f"<0x{byte:02X}>", -1) for byte in SPACE_SYMBOL.encode()]
        self._table = tuple(self._bytes(i, piece) for i, piece in enumerate(pieces))
        self._check(path)

    def encode(self, text: str) -> list[int]:
        text = without_surrogates(text)
        if SPACE_SYMBOL not in text:
            return self._processor.encode(text)
        # SentencePiece would read this character as a space; its bytes say what it is.
        ids: list[int] = []
        for i, run in enumerate(text.split(SPACE_SYMBOL)):
            ids += self._space_symbol * (i > 0) + self._processor.encode(run)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return join_bytes(self._table, ids)

    def _bytes(self, i: int, piece: str) -> bytes:
        """What piece `i` stands for. Kept here because SentencePiece drops control pieces and rewrites whitespace."""
        if self._processor.is_unknown(i):
            return REPLACEMENT
        if self._processor.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        return piece.encode() if self._processor.is_control(i) else piece.replace(SPACE_SYMBOL, " ").encode()

    def _check(self, path: pathlib.Path) -> None:
        missing = [text for text, i in self.control.items() if i < 0 or not self._processor.is_control(i)]
        if missing:
            raise ValueError(f"the tokenizer model {path} has no control token {missing[0]}: {_REMEDY}")
        probe = f" \tA\r\n\n  \ufb01{SPACE_SYMBOL} é\x01 "
        ids = self.encode(probe)
        if self.decode(ids) != probe or any(self._processor.is_unknown(i) for i in ids):
            raise ValueError(f"the tokenizer model {path} does not keep text as it is, byte for byte: {_REMEDY}")


def _load(data: bytes, path: pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(data) and processor.LoadFromSerializedProto(data)
    except (RuntimeError, OSError):
        loaded = False
    if not loaded:
        raise ValueError(f"the tokenizer model {path} is damaged or no SentencePiece model: {_REMEDY}")
    return processor


def join_bytes(table: Sequence[bytes], ids: Sequence[int] | np.ndarray) -> str:
    """The text of `ids` by a table of what each stands for; what is not in it or is not UTF-8 becomes U+FFFD."""
    size = len(table)
    listed = ids.tolist() if isinstance(ids, np.ndarray) else ids
    return b"".join([table[i] if 0 <= i < size else REPLACEMENT for i in listed]).decode("utf-8", "replace")


def without_control(text: str) -> list[str]:
    """The non-empty texts that are left when the control strings are cut out."""
    return [run for run in _CONTROL_PATTERN.split(without_surrogates(text)) if run]


def without_surrogates(text: str) -> str:
    """The text with "?" for each lone surrogate, which no file and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()
