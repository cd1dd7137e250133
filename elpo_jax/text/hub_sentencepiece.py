"""Published tokenizers that are SentencePiece models (`tokenizer.model`), as of Llama 2, Mistral and Gemma.

Such models have control pieces, which no text gives, and user-defined ones such as Gemma's `<start_of_turn>`, which
SentencePiece finds in text before all else. The latter are made control pieces on loading, so that no text gives them
either, unless they are only white space. Unlike our own models they may rewrite text and put a space before it.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from elpo_jax.text.tokenizer import REPLACEMENT, SPACE_SYMBOL, join_bytes, without_surrogates

_REMEDY = "copy tokenizer.model from the checkpoint again"
_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


class SentencePieceHub:
    """A `tokenizer.model` file, and what `tokenizer_config.json` beside it adds.

    Attributes:
      control: Ids of control pieces, of user-defined pieces that are not white space, and of added tokens.
      vocab_size: The largest id + 1.

    Args:
      path: The model file.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it or the configuration is damaged.
    """

    name = "hub"

    def __init__(self, path: str | os.PathLike):
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no tokenizer model {path}: {_REMEDY}")
        data = path.read_bytes()
        model = _model(data, path)
        added, options = _config(path.with_name("tokenizer_config.json"))
        identity = (sorted(added.items()), sorted(options.items()))
        self.fingerprint = hashlib.sha256(data + repr(identity).encode()).hexdigest()[:16]
        control = {piece.piece: i for i, piece in enumerate(model.pieces) if _is_control(piece)}
        for i in control.values():
            model.pieces[i].type = _Piece.CONTROL
        # A space before the text: the first one, as the library's own `legacy=False` has it, or each.
        self._first = model.normalizer_spec.add_dummy_prefix and options["add_prefix_space"]
        self._later = self._first and options["legacy"]
        self._prefixed = _processor(model, path) if self._first else None
        model.normalizer_spec.add_dummy_prefix = False
        self._processor = _processor(model, path)
        for text, i in added.items():
            if i < len(model.pieces) and model.pieces[i].piece != text:
                raise ValueError(
                    f"{path.with_name('tokenizer_config.json')} has the added token {text!r} with id {i}, which is "
                    f"{model.pieces[i].piece!r} in {path.name}: the two files are of different checkpoints"
                )
        control.update({text: i for text, i in added.items() if i >= len(model.pieces)})
        self.control: Mapping[str, int] = MappingProxyType(control)
        self.vocab_size = max(len(model.pieces), 1 + max(added.values(), default=0))
        table = [REPLACEMENT] * self.vocab_size
        for i, piece in enumerate(model.pieces):
            table[i] = _bytes(piece)
        for text, i in control.items():
            table[i] = text.encode()
        self._table = tuple(table)

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(without_surrogates(text))

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of texts and control ids in the order given; a space goes before a text where the checkpoint has one."""
        ids: list[int] = []
        text = ""
        for part in (*parts, -1):
            if isinstance(part, str):
                text += part
                continue
            if text:
                prefixed = self._later if ids else self._first
                ids += self._prefixed.encode(without_surrogates(text)) if prefixed else self.encode(text)
            ids.append(part)
            text = ""
        return ids[:-1]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return join_bytes(self._table, ids)


def _model(data: bytes, path: pathlib.Path) -> sentencepiece_model_pb2.ModelProto:
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:  # google.protobuf.message.DecodeError, of a package that we do not import
        model.Clear()
    if not model.pieces:
        raise ValueError(f"the tokenizer model {path} is damaged or no SentencePiece model: {_REMEDY}")
    return model


def _processor(model: sentencepiece_model_pb2.ModelProto, path: pathlib.Path) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model.SerializeToString())
    except (RuntimeError, OSError) as error:
        raise ValueError(f"the tokenizer model {path} is damaged ({error}): {_REMEDY}") from None
    return processor


def _is_control(piece: Any) -> bool:
    blank = not piece.piece.replace(SPACE_SYMBOL, " ").strip()
    return piece.type == _Piece.CONTROL or (piece.type == _Piece.USER_DEFINED and not blank)


def _bytes(piece: Any) -> bytes:
    if piece.type == _Piece.UNKNOWN:
        return REPLACEMENT
    if piece.type == _Piece.BYTE:
        return bytes([int(piece.piece[3:5], 16)])
    return piece.piece.replace(SPACE_SYMBOL, " ").encode()


def _config(path: pathlib.Path) -> tuple[dict[str, int], dict[str, bool]]:
    """Added tokens by text, and what the configuration says of the space before a text."""
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else {}
        added = {token["content"]: int(i) for i, token in (config.get("added_tokens_decoder") or {}).items()}
        if odd := [text for text in added if not isinstance(text, str)]:
            raise TypeError(f"an added token's content is {odd[0]!r}, which is no text")
        prefix = config.get("add_prefix_space")
        return added, {"legacy": bool(config.get("legacy")), "add_prefix_space": prefix is None or bool(prefix)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): copy it from the checkpoint again") from None
