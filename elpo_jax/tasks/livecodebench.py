"""Reads the test cases of LiveCodeBench's problems.

Private ones are published as base64(zlib(pickle(JSON text))). Nothing is unpickled here: the pickle's opcodes are
listed, any that does more than hold one text is refused, and the text is taken from the list. What it inflates to is
bounded.
"""

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any

from elpo_jax.tasks.rows import DatasetError

MOST_BYTES = 1 << 29  # of one problem's tests, inflated
KINDS = ("stdin", "functional")

_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
_HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}


def read_tests(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The tests of one published problem, public ones first: {"inputs", "outputs", "fn_name"}.

    Args:
      raw: With `public_test_cases`, `private_test_cases` and `metadata`, each JSON (or already decoded); private test
        cases also as base64(zlib(pickle(JSON))).

    Raises:
      DatasetError: If they cannot be read.
    """
    cases = []
    for key in ("public_test_cases", "private_test_cases"):
        value = raw.get(key) or []
        if isinstance(value, str):
            value = _json(value if value.lstrip()[:1] == "[" else unpack(value), key)
        if not isinstance(value, list):
            raise DatasetError(f"{key} is not a list")
        cases += value
    for i, case in enumerate(cases):
        if not isinstance(case, dict) or not {"input", "output"} <= case.keys() or case.get("testtype") not in KINDS:
            raise DatasetError(f'test case {i} needs "input", "output" and a "testtype" of {" or ".join(KINDS)}')
    metadata = raw.get("metadata") or {}
    if isinstance(metadata, str):
        metadata = _json(metadata, "metadata")
    if len({case["testtype"] for case in cases}) > 1:
        raise DatasetError("its test cases are of both kinds, stdin and functional")
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    if cases and cases[0]["testtype"] == "functional":
        if not name:
            raise DatasetError("its test cases call a function, and metadata names none in func_name")
    else:
        name = None
    return {"inputs": [c["input"] for c in cases], "outputs": [c["output"] for c in cases], "fn_name": name}


def unpack(packed: str, most: int = MOST_BYTES) -> str:
    """The text in base64(zlib(pickle(text))).

    Raises:
      DatasetError: If it is anything else, or inflates to `most` bytes or more.
    """
    try:
        inflater = zlib.decompressobj()
        data = inflater.decompress(base64.b64decode(packed, validate=True), most)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise DatasetError(f"packed test cases are neither JSON nor base64 of zlib ({error})") from None
    if not inflater.eof:
        cause = f"inflate to {most} bytes or more" if len(data) >= most else "are cut off"
        raise DatasetError(f"packed test cases {cause}")
    texts, refused = [], ""
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _TEXT:
                texts.append(argument)
            elif opcode.name not in _HARMLESS:
                refused = opcode.name
                break
    except ValueError as error:
        raise DatasetError(f"packed test cases are no pickle ({error})") from None
    if refused or len(texts) != 1:
        what = f"has the opcode {refused}" if refused else f"holds {len(texts)} texts"
        raise DatasetError(f"packed test cases must be a pickle of one text, and this one {what}: refused")
    return texts[0]


def _json(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{key} is not JSON ({type(error).__name__})") from None
