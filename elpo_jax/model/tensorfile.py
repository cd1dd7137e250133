"""The safetensors format: a JSON header, then raw little-endian tensors.

Only the header is read to know what a file holds. Tensors are read and written in pieces of two megabytes and never
mapped into memory, so the host holds no more of them than the caller does.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
PIECE = 2 << 20  # bytes of a tensor that are in memory at once while it is read or written
_LONGEST_HEADER = 100_000_000  # of the reference implementation


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file.

    Attributes:
      path: The file.
      dtype: As the format names it, such as "BF16".
      shape: Its dimensions.
      start: Offset of its first byte in the file.
    """

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a file by name. No tensor is read, but the file's length is that which they need.

    Raises:
      ValueError: If the file is missing, truncated, or no safetensors file; the message names it and the remedy.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}: copy it from the checkpoint again")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if first == b"version ":
            raise ValueError(f"{path} is a git-lfs pointer, not the tensors: fetch the file itself (git lfs pull)")
        length = int.from_bytes(first, "little")
        if len(first) < 8 or (8 + length > size and length <= _LONGEST_HEADER):
            raise ValueError(f"{path} is truncated ({size} bytes end within its header): copy it again")
        if length > _LONGEST_HEADER:
            raise ValueError(f"{path} is not a safetensors file (its header would have {length} bytes): copy it again")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            spans = {name: _span(entry) for name, entry in header.items()}
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            raise ValueError(f"the header of {path} is damaged: copy the file again") from None
    end = 0
    for name, (dtype, shape, begin, stop) in sorted(spans.items(), key=lambda item: item[1][2:]):
        item = DTYPES[dtype].itemsize if dtype in DTYPES else None
        if begin != end or stop < begin or (item and stop - begin != item * math.prod(shape)):
            raise ValueError(f"the header of {path} is damaged at {name}: copy the file again")
        end = stop
    if 8 + length + end != size:
        state = "is truncated" if 8 + length + end > size else "has bytes beyond its tensors"
        raise ValueError(f"{path} {state} ({size} bytes, its header needs {8 + length + end}): copy it again")
    return {name: Tensor(path, dtype, shape, 8 + length + begin) for name, (dtype, shape, begin, _) in spans.items()}


def pieces(tensor: Tensor, rows: slice = slice(None)) -> Iterator[tuple[slice, np.ndarray]]:
    """The rows (first dimension) of a tensor of at least one dimension, some megabytes at a time.

    Args:
      tensor: From `read_header`, of a dtype of `DTYPES`.
      rows: Which rows.

    Yields:
      Where the piece lies among the rows asked for, and the piece [r, ...] in the tensor's dtype.

    Raises:
      ValueError: If the file has become shorter.
    """
    start, stop, _ = rows.indices(tensor.shape[0])
    width, dtype = math.prod(tensor.shape[1:]), DTYPES[tensor.dtype]
    step = max(1, PIECE // max(1, width * dtype.itemsize))
    with tensor.path.open("rb") as file:
        file.seek(tensor.start + start * width * dtype.itemsize)
        for row in range(start, stop, step):
            count = min(step, stop - row)
            piece = np.fromfile(file, dtype.newbyteorder("<"), count * width)
            if len(piece) < count * width:
                raise ValueError(f"{tensor.path} has become shorter while it was read: copy it again")
            yield slice(row - start, row - start + count), piece.reshape(count, *tensor.shape[1:])


def write_file(
    path: str | os.PathLike,
    tensors: Mapping[str, tuple[np.dtype, Sequence[int]]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Writes a file; the arrays are asked for one at a time.

    Args:
      path: The file; replaced if there is one.
      tensors: dtype, one of `DTYPES`, and shape by name.
      arrays: The tensors themselves, in that order.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with pathlib.Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), array in zip(tensors.items(), arrays, strict=True):
            if array.dtype != dtype or array.shape != tuple(shape):
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, not {dtype}{list(shape)}")
            step = max(1, PIECE // max(1, array[:1].nbytes))
            for row in range(0, len(array), step):
                file.write(np.ascontiguousarray(array[row : row + step]).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _span(entry: Mapping) -> tuple[str, tuple[int, ...], int, int]:
    dtype, shape, (begin, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if type(dtype) is not str or not all(type(n) is int and n >= 0 for n in (*shape, begin, stop)):
        raise ValueError
    return dtype, shape, begin, stop
