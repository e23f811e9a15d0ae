"""Files: atomic writes, and tensors with settings in the safetensors format:

    8 bytes     N, the length of the header (little-endian)
    N bytes     JSON: {"__metadata__": {string: string}, NAME: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    the rest    the bytes of the tensors without gaps, in the order of the offsets

The metadata of ours are the "crc32" of the whole file, its own eight digits counted as zeros, the "format" and the
"settings" (JSON). Nothing in a file is executed, and nothing is allocated: tensors are mapped from disk.
"""

import json
import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import IO

import torch
from torch import Tensor

from kit import common
from kit.common import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
DTYPES |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CRC = 8 + len('{"__metadata__":{"crc32":"')  # where its digits stand
MAX_HEADER = 2 << 20  # bytes; XLM-R large's has 0.05 MB


# ----------------------------------------------------------------------------------- atomic writes
@contextmanager
def atomic_write(path: str, mode: str = "wb", temporary: str | None = None) -> Iterator[IO]:
    """Open a temporary neighbour of `path`, and rename it to `path` once it is written completely: a reader never sees
    half a file. Makes the folder if there is none.

    temporary: its name, where several processes may write `path` at once. What a killed one left is overwritten.
    """
    temporary = temporary or f"{path}.part"
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    if not common.writes:
        with open(os.devnull, mode, **text) as file:
            yield file
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    remove(temporary)  # of a killed process, or a link that was planted: "x" follows none
    try:
        with open(temporary, mode.replace("w", "x"), **text) as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path
        raise


def write_text(path: str, text: str) -> None:
    with atomic_write(path, "w") as file:
        file.write(text)


def write_json(path: str, value: dict) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def remove(path: str) -> None:
    if common.writes and os.path.lexists(path):
        os.unlink(path)


def check_writable(folder: str, advice: str = "choose another --out") -> None:
    """Raises UserError for a folder that can't be written, before anything is computed or changed."""
    there = os.path.abspath(folder)
    while not os.path.exists(there) and os.path.dirname(there) != there:
        there = os.path.dirname(there)
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {folder}: {advice}")


# ---------------------------------------------------------------------------------------- tensors
def write_tensors(
    path: str, tensors: dict[str, Tensor], format: str, settings: dict | None = None, temporary: str | None = None
) -> int:
    """Write a file of tensors, atomically. Returns its bytes.  settings: whatever JSON can hold."""
    # The largest elements first: then each tensor begins at a multiple of its element's size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    entries = {"__metadata__": {"crc32": "0" * 8, "format": format, "settings": json.dumps(settings or {})}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    crc = zlib.crc32(head)
    with atomic_write(path, temporary=temporary) as file:
        file.write(head)
        for tensor in tensors.values():
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            file.write(data)
            crc = zlib.crc32(data, crc)
        file.seek(CRC)
        file.write(b"%08x" % crc)
    return len(head) + end


def read_tensors(path: str, format: str, advice: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors, mapped from disk, and settings of a file of ours. Raises UserError if it is missing, damaged or foreign."""
    with mapped(path, advice) as data:
        tensors, metadata = parse(data)
        if metadata.get("format") != format:
            raise UserError(f"{path} holds {metadata.get('format', 'no format')}, not {format}: {advice}")
        crc = zlib.crc32(memoryview(data)[CRC + 8 :], zlib.crc32(data[:CRC] + b"0" * 8))
        if metadata["crc32"] != f"{crc:08x}":
            raise ValueError("another checksum")
        return tensors, dict(json.loads(metadata["settings"]))


def recorded_checksum(path: str) -> str:
    """The CRC-32 in a file of ours, which read_tensors has compared."""
    with open(path, "rb") as file:
        file.seek(CRC)
        return file.read(8).decode()


def map_tensors(path: str, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, mapped from disk, and metadata of any safetensors file. Raises UserError if it is missing or damaged."""
    with mapped(path, advice) as data:
        return parse(data)


@contextmanager
def mapped(path: str, advice: str) -> Iterator[mmap.mmap]:
    """The bytes of a file, copy-on-write. Raises UserError with the advice if they can't be read or parsed.

    While they are mapped the file may be replaced, as atomic_write does, but not be written in place.
    """
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if data[:4] == b"PK\x03\x04":
            raise UserError(f"{path} is a pickle, the format of earlier versions: {advice}")
        yield data
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {advice}") from None
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError):  # also RecursionError, of deep JSON
        raise UserError(f"{path} is damaged or no safetensors file: {advice}") from None


def parse(data: mmap.mmap) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata. Raises ValueError and the like unless the tensors fill the file, without gap or overlap."""
    begin = 8 + int.from_bytes(data[:8], "little")
    if begin > min(len(data), MAX_HEADER):
        raise ValueError("the header is longer than the file")
    entries = json.loads(data[8:begin].decode())  # the bytes of a second entry of a name are a gap
    tensors, metadata, start = {}, entries.pop("__metadata__", {}), begin
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        if len(shape) > 8 or not all(type(n) is int and 0 <= n <= len(data) for n in shape):
            raise ValueError("more elements than the file holds")
        count = prod(shape)
        end = begin + count * dtype.itemsize
        if [begin - start, end - start] != entry["data_offsets"] or end > len(data):
            raise ValueError("a gap, an overlap, or a tensor beyond the end")
        # A map of its own for each, not a view of one: a copy of a tensor copies its whole storage.
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin) if count else torch.empty(0, dtype=dtype)
        tensors[name], begin = flat.view(shape), end
    if begin != len(data):
        raise ValueError("bytes that belong to no tensor")
    return tensors, metadata


def check_tensors(path: str, expected: dict[str, Tensor], tensors: dict[str, Tensor], *dtypes: torch.dtype) -> None:
    """Raises UserError naming the first tensor that is missing, unexpected, of a wrong shape or type, or not finite.

    expected: tensors of the right shapes and types, on any device.  dtypes: the types that are right instead.
    """
    for name, like in expected.items():
        if (tensor := tensors.get(name)) is None:
            raise UserError(f"{path}: tensor {name} is missing")
        if tensor.shape != like.shape:
            raise UserError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
        if tensor.dtype not in (dtypes or [like.dtype]):
            raise UserError(f"{path}: tensor {name} is {tensor.dtype}, expected {dtypes or like.dtype}")
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise UserError(f"{path}: tensor {name} has values that are not finite")
    if extra := sorted(set(tensors) - set(expected)):
        raise UserError(f"{path}: unexpected tensor {extra[0]}")
