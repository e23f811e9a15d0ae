"""Files: atomic writes, and tensors with settings in the safetensors format.

A file of tensors, as the safetensors package writes and reads it:

    8 bytes     N, the length of the header (little-endian)
    N bytes     JSON: {"__metadata__": {string: string}, NAME: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    the rest    the bytes of the tensors without gaps, in the order of the offsets

In the metadata of ours stand the "format", the "settings" (JSON) and a "crc32" of the whole file, itself counted as
zeros. Nothing in a file is executed, nothing is allocated that the file does not hold, and tensors are mapped from disk.
"""

import json
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
MAX_HEADER = 4 << 20  # bytes; XLM-R large's has 0.05 MB
CHUNK = 1 << 20  # bytes that a checksum reads at a time


# ----------------------------------------------------------------------------------- atomic writes
@contextmanager
def atomic_write(path: str, mode: str = "wb", temporary: str | None = None) -> Iterator[IO]:
    """Open a temporary neighbour of `path`, and rename it to `path` once it is written completely: a reader never sees
    half a file. Makes the folder if there is none.

    temporary: its name, where several processes may write `path` at once. What a killed one left is overwritten.
    """
    path = os.fspath(path)
    temporary = temporary or path + ".part"
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
    """Write a file of tensors, atomically. Returns its bytes.  settings: any JSON."""
    metadata = {"crc32": "0" * 8, "format": format, "settings": json.dumps(settings or {})}
    entries, end = {"__metadata__": metadata}, 0
    # The largest elements first: then each tensor begins at a multiple of its element's size.
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    for name in order:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        offsets = {"shape": list(tensors[name].shape), "data_offsets": [begin, end]}
        entries[name] = {"dtype": NAMES[tensors[name].dtype]} | offsets
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with atomic_write(path, temporary=temporary) as file:
        file.write(head)
        crc = zlib.crc32(head)
        for name in order:
            data = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            file.write(data)
            crc = zlib.crc32(data, crc)
        file.seek(head.index(b'"crc32":"') + 9)
        file.write(b"%08x" % crc)
    return len(head) + end


def read_tensors(path: str, format: str, advice: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors, mapped from disk, and the settings of a file that write_tensors wrote.

    Raises UserError with the advice for a missing, damaged or foreign file.
    """
    tensors, metadata = map_tensors(path, advice)
    if metadata.get("format") != format:
        raise UserError(f"{path} is not a file of this project ({format}): {advice}")
    try:
        if metadata["crc32"] != f"{checksum(path):08x}":
            raise ValueError
        settings = json.loads(metadata["settings"])
        if not isinstance(settings, dict):
            raise ValueError
    except (KeyError, ValueError, RecursionError):
        raise UserError(f"{path} is damaged: {advice}") from None
    return tensors, settings


def checksum(path: str) -> int:
    """CRC-32 of a file, its own eight digits counted as zeros."""
    with open(path, "rb") as file:
        head = file.read(8)
        head += file.read(int.from_bytes(head, "little"))
        start = head.index(b'"crc32":"') + 9
        crc = zlib.crc32(head[:start] + b"0" * 8 + head[start + 8 :])
        while piece := file.read(CHUNK):
            crc = zlib.crc32(piece, crc)
    return crc


def map_tensors(path: str, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of any safetensors file.

    Raises UserError with the advice for a missing or damaged file.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            begin = file.read(8)
            if begin[:4] == b"PK\x03\x04":
                raise UserError(f"{path} is of an earlier version, or no safetensors file: {advice}")
            length = int.from_bytes(begin, "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise ValueError
            entries = json.loads(file.read(length).decode(), object_pairs_hook=unique)
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError
        check_layout(entries, size - 8 - length)
        data = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)[8 + length :]
        tensors = {}
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            piece, dtype = data[start:end], DTYPES[entry["dtype"]]
            if (8 + length + start) % dtype.itemsize:  # only in files of others
                piece = piece.clone()
            tensors[name] = piece.view(dtype).view(entry["shape"])
    except FileNotFoundError:
        raise UserError(f"there is no {path}: {advice}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, RecursionError):
        raise UserError(f"{path} is damaged or no safetensors file: {advice}") from None
    return tensors, metadata


def unique(pairs: list[tuple[str, object]]) -> dict:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def check_layout(entries: dict, size: int) -> None:
    """Raises ValueError and the like unless the tensors fill the data without gaps and overlaps."""
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry["data_offsets"]):
        begin, shape = entry["data_offsets"][0], entry["shape"]
        if begin != end or not all(type(n) is int and n >= 0 for n in (*shape, *entry["data_offsets"])):
            raise ValueError
        end = begin + prod(shape) * DTYPES[entry["dtype"]].itemsize
        if [begin, end] != entry["data_offsets"]:
            raise ValueError
    if end != size:
        raise ValueError
