"""Published tokenizers: `tokenizer.json` of a checkpoint folder, and byte-level BPE trained into the same form.

A text gets the ids that the tokenizer's own library gives it, except that none of it becomes an added token: neither a
special one such as `<|im_end|>` nor an ordinary one such as `<tool_call>`. Those are placed by id alone
(`encode_parts`). Added tokens that are only white space, or a single character, are text like any other.
"""

import collections
import copy
import hashlib
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from elpo_jax.text.hub_sentencepiece import SentencePieceHub
from elpo_jax.text.tokenizer import (
    CONTROL,
    REPLACEMENT,
    SPACE_SYMBOL,
    Tokenizer,
    join_bytes,
    without_control,
    without_surrogates,
)

_REMEDY = "copy tokenizer.json from the checkpoint again"
Space = Literal["always", "first", "never"]
_BEFORE = {"always": "before every text", "first": "before the first text", "never": "before no text"}
_METASPACE = {"Metaspace", "ByteFallback", "Replace"}  # decoders of tokenizers that write a space as `SPACE_SYMBOL`
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_SECRET = secrets.token_hex(12)


class PartsTokenizer(Tokenizer, Protocol):
    """A tokenizer of a checkpoint, which can write text and control tokens together."""

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of texts and control ids in the order given, as the tokenizer's library has them for the whole string.

        Only here is a space put before the very first text, where the tokenizer does so.
        """


class HubTokenizer:
    """A `tokenizer.json` file.

    Attributes:
      control: Ids of all added tokens but the unknown token and those that are text like any other.
      vocab_size: The largest id + 1. Embeddings are often larger.
      space: Before which texts it puts a space; None if it is byte-level.

    Args:
      path: The file.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is damaged, or of a kind that cannot be decoded exactly.
    """

    name = "hub"

    def __init__(self, path: str | os.PathLike):
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no tokenizer {path}: {_REMEDY}, or make one with train_bpe")
        data = path.read_bytes()
        self.fingerprint = hashlib.sha256(data).hexdigest()[:16]
        spec = _spec(data, path)
        added = {token["content"]: token for token in spec["added_tokens"]}
        spec["added_tokens"] = [{**token, "special": not is_blank(text)} for text, token in added.items()]
        self._whole = _backend(spec, path)
        self.space = _space(spec)
        inner = _without_prefix(spec)
        self._inner = self._whole if inner is spec else _backend(inner, path)
        vocab = self._whole.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        unknown = _unknown(spec["model"])
        self.control: Mapping[str, int] = MappingProxyType(
            {text: vocab[text] for text in added if len(text) > 1 and not is_blank(text) and text != unknown}
        )
        self._table = _table(vocab, added, spec, path)
        # A control token's place in a string is taken by a stand-in that strips white space as the token does. Nobody
        # can guess it, so no text holds one.
        self._stand_in: dict[int, str] = {}
        self._stand_in_ids: set[int] = set()
        for text, i in self.control.items():
            flags = {flag: added[text].get(flag, False) for flag in ("lstrip", "rstrip")}
            self._stand_in[i] = self._placeholder(flags)
        self._control_ids = frozenset(self.control.values())
        self._spelled: dict[int, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        return self._as_text(self._inner.encode(without_surrogates(text), add_special_tokens=False).ids)

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """See `PartsTokenizer`."""
        controls = iter([part for part in parts if not isinstance(part, str)])
        text = "".join([without_surrogates(p) if isinstance(p, str) else self._stand_in[p] for p in parts])
        ids: list[int] = []
        run: list[int] = []
        for i in self._whole.encode(text, add_special_tokens=False).ids:
            if i in self._stand_in_ids:
                ids += [*self._as_text(run), next(controls)]
                run = []
            else:
                run.append(i)
        return ids + self._as_text(run)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return join_bytes(self._table, ids)

    def _placeholder(self, flags: dict[str, bool]) -> str:
        key = "".join(str(int(flag)) for flag in flags.values())
        name = f"\ufdd0{key}{_SECRET}\ufdd0"
        if self._whole.token_to_id(name) is None:
            self._whole.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False, **flags)])
            self._stand_in_ids.add(self._whole.token_to_id(name))
        return name

    def _as_text(self, ids: list[int]) -> list[int]:
        """The ids with control ids, which some vocabularies also make of plain text, written in smaller pieces."""
        if self._control_ids.isdisjoint(ids):
            return ids
        return [j for i in ids for j in (self._spell(i) if i in self._control_ids else (i,))]

    def _spell(self, i: int) -> list[int]:
        if i not in self._spelled:
            text = self._table[i].decode()
            self._spelled[i] = [j for half in (text[:1], text[1:]) for j in self.encode(half)]
        return self._spelled[i]


def is_blank(text: str) -> bool:
    """Whether an added token of this text is only white space, hence text like any other."""
    return not text.replace(SPACE_SYMBOL, " ").strip()


def load_tokenizer(folder: str | os.PathLike) -> HubTokenizer | SentencePieceHub:
    """The tokenizer of a checkpoint folder: its `tokenizer.json`, else its `tokenizer.model`.

    Raises:
      FileNotFoundError: If there is no such folder, or neither file in it.
      ValueError: If a file is damaged, or `tokenizer_config.json` belongs to another tokenizer.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: download the checkpoint and give the folder's path")
    if (folder / "tokenizer.json").is_file():
        tokenizer = HubTokenizer(folder / "tokenizer.json")
        _check_added(tokenizer, folder / "tokenizer_config.json")
        return tokenizer
    if (folder / "tokenizer.model").is_file():
        return SentencePieceHub(folder / "tokenizer.model")
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
    old = " (vocab.json and merges.txt alone are not read)" if (folder / "vocab.json").is_file() else ""
    raise FileNotFoundError(
        f"{folder} has neither tokenizer.json nor tokenizer.model{old}, only {there}: copy tokenizer.json from the "
        "checkpoint"
    )


def train_bpe(texts: Iterable[str], path: str | os.PathLike, vocab_size: int) -> None:
    """Trains a byte-level BPE of exactly `vocab_size` ids on `texts` and writes it to `path`, whole or not at all.

    Digits stay single, and any text is kept as it is. The control tokens of `CONTROL` have the ids from 0 on. The
    result is a function of the arguments.

    Args:
      texts: What is going to be encoded. Control strings in it are cut out.
      path: The file to write; `load_tokenizer` wants it to be called `tokenizer.json`.
      vocab_size: Number of ids, with 263 for the control tokens and the bytes.

    Raises:
      ValueError: If there is no text, or too little of it for `vocab_size`, or no room for the bytes.
    """
    least = 256 + len(CONTROL)
    if vocab_size < least:
        raise ValueError(
            f"tokenizer.vocab_size={vocab_size} has no room for the {least} bytes and control tokens: raise it"
        )
    runs = [run for text in texts for run in without_control(text)]
    if not runs:
        raise ValueError("cannot train a tokenizer on no text: give at least one non-empty text")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[tokenizers.AddedToken(text, special=True, normalized=False) for text in CONTROL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(runs, trainer)
    if (size := backend.get_vocab_size()) < vocab_size:
        raise ValueError(
            f"the texts hold only {size} pieces: set tokenizer.vocab_size to at most {size}, not {vocab_size}, or give "
            "more varied texts"
        )
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(backend.to_str(pretty=True), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _spec(data: bytes, path: pathlib.Path) -> dict[str, Any]:
    """The file's content, without what a tokenizer does beyond turning text into ids."""
    try:
        spec = json.loads(data)
        spec = {**spec, "truncation": None, "padding": None, "post_processor": None}
        spec["added_tokens"] = spec.get("added_tokens") or []
        spec["model"] = {**spec["model"]}
        texts = _strings(token["content"] for token in spec["added_tokens"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no tokenizer.json ({error}): {_REMEDY}") from None
    if spec["model"].get("dropout"):
        spec["model"]["dropout"] = None  # random pieces are for training a model, not for talking to one
    if twice := [text for text, count in collections.Counter(texts).items() if count > 1]:
        raise ValueError(f"{path} has the added token {twice[0]!r} twice: {_REMEDY}")
    return spec


def _backend(spec: dict[str, Any], path: pathlib.Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{path} is no tokenizer.json that the tokenizers library reads ({error}): {_REMEDY}"
        ) from None
    for token in spec["added_tokens"]:
        if (i := backend.token_to_id(token["content"])) != token["id"]:
            raise ValueError(
                f"{path} gives the added token {token['content']!r} the id {token['id']}, not {i}: {_REMEDY}"
            )
    backend.encode_special_tokens = True
    return backend


def _nodes(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder."""
    if spec is None:
        return []
    inner = next((spec[key] for key in ("normalizers", "pretokenizers", "decoders") if key in spec), None)
    return [spec] if inner is None else [node for child in inner for node in _nodes(child)]


def _without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer without the space that it puts before a text, so that ids decode to the text itself."""
    normalizers = [node for node in _nodes(spec.get("normalizer")) if node["type"] != "Prepend"]
    pretokenizers = copy.deepcopy(_nodes(spec.get("pre_tokenizer")))
    for node in pretokenizers:
        if node["type"] == "Metaspace":
            node["prepend_scheme"] = "never"
            node.pop("add_prefix_space", None)
        elif node["type"] == "ByteLevel":
            node["add_prefix_space"] = False
    if (normalizers, pretokenizers) == (_nodes(spec.get("normalizer")), _nodes(spec.get("pre_tokenizer"))):
        return spec
    return {
        **spec,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pretokenizers},
    }


def _unknown(model: dict[str, Any]) -> str | None:
    """The token that stands for characters that the vocabulary lacks."""
    if model.get("type") == "Unigram":
        return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _table(
    vocab: Mapping[str, int], added: Mapping[str, Any], spec: dict[str, Any], path: pathlib.Path
) -> tuple[bytes, ...]:
    """What each id stands for. Kept here because the library drops ids that it does not know."""
    kinds = {node["type"] for node in _nodes(spec.get("decoder"))}
    if "ByteLevel" not in kinds and not kinds & _METASPACE:
        kind = ", ".join(sorted(kinds)) or "none"
        raise ValueError(
            f"{path} has a decoder that cannot be read exactly ({kind}): byte-level and SentencePiece ones can"
        )
    byte_of = {character: byte for byte, character in _byte_characters()}
    table = [REPLACEMENT] * (max(vocab.values()) + 1)
    for token, i in vocab.items():
        if "ByteLevel" not in kinds:
            byte = _BYTE.fullmatch(token) if "ByteFallback" in kinds else None
            table[i] = (
                bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_SYMBOL, " ").encode("utf-8", "replace")
            )
        elif token not in added and all(character in byte_of for character in token):
            table[i] = bytes([byte_of[character] for character in token])
        else:
            table[i] = token.encode("utf-8", "replace")
    return tuple(table)


def _byte_characters() -> Iterator[tuple[int, str]]:
    """The character that stands for each byte in a byte-level vocabulary: itself where printable, else 256 and up."""
    others = iter(range(256, 512))
    for byte in range(256):
        printable = 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)
        yield byte, chr(byte if printable else next(others))


def _strings(texts: Iterable[Any]) -> list[str]:
    texts = list(texts)
    if odd := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"an added token's content is {odd[0]!r}, which is no text")
    return texts


def _space(spec: dict[str, Any]) -> Space | None:
    """Before which texts the tokenizer puts a space; None if it is not of the kind that was SentencePiece's."""
    if any(node["type"] == "Prepend" for node in _nodes(spec.get("normalizer"))):
        return "always"
    for node in _nodes(spec.get("pre_tokenizer")):
        if node["type"] == "Metaspace":  # older files have only add_prefix_space
            return node.get("prepend_scheme") or ("always" if node.get("add_prefix_space", True) else "never")
    return None


def _check_space(space: Space | None, config: Mapping[str, Any], path: pathlib.Path) -> None:
    """Raises ValueError if the configuration of a Llama tokenizer wants the space elsewhere than tokenizer.json.

    Versions of transformers read such folders differently: version 4 goes by the file, version 5 by the configuration.
    """
    if space is None or config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return
    legacy, prefix = config.get("legacy"), config.get("add_prefix_space")
    wanted = "never" if prefix is False else "always" if legacy else "first"
    if wanted != space:
        keep = {"always": "legacy to true", "first": "legacy to false", "never": "add_prefix_space to false"}
        undo = " and take add_prefix_space out" if prefix is False else ""
        raise ValueError(
            f"{path} puts a space {_BEFORE[wanted]} (legacy={legacy}, add_prefix_space={prefix}), and tokenizer.json "
            f"{_BEFORE[space]}, so that transformers 4 and 5 have different ids: set {keep[space]}{undo} for those of "
            "tokenizer.json, or save the tokenizer anew with transformers 5"
        )


def _same(text: str, other: str) -> bool:
    return text.replace(SPACE_SYMBOL, " ") == other.replace(SPACE_SYMBOL, " ")


def _check_added(tokenizer: HubTokenizer, path: pathlib.Path) -> None:
    """Raises ValueError if the folder's configuration names added tokens that the tokenizer does not have."""
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_bytes())
        entries = {token["content"]: int(i) for i, token in (config.get("added_tokens_decoder") or {}).items()}
        _strings(entries)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): copy it from the checkpoint again") from None
    _check_space(tokenizer.space, config, path)
    for text, i in entries.items():
        if not 0 <= i < tokenizer.vocab_size or not _same(tokenizer.decode([i]), text):
            raise ValueError(
                f"{path} has the added token {text!r} with id {i}, which tokenizer.json has not: the two files are of "
                "different checkpoints"
            )
