"""A student on disk: integers of few bits, and float32 for the rest.

Fake quantization trains in float32; a checkpoint of it would be full-size. In student.pt each
quantized weight is its integers, b bits each, plus one float32 scale a row, or one for a core of a
tensor train:

    8 bits  one byte a weight       4 bits  two weights a byte       2 bits  four weights a byte

(3, 5, 6 and 7 bits are packed just as densely.) What is not quantized stays float32. A file is read
without running anything in it, and each of its parts is checked against the model that it names.

    student, tokenizer = load_student("out/NAME/student.pt")     # fake-quantized; as integers: int8.py
"""

from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import check_tensors, config_of, holds_its_numbers, read_checkpoint
from data import UserError
from data.tokenizer import Tokenizer
from learned import LearnedScale
from model import Model, ModelConfig
from prepare import prepare
from quant import QuantConfig, WeightQuantizer, dequantize
from tt import TensorTrain, TTConfig

STUDENT_FORMAT = "sdq-student-3"
WORDS = "encoder.embeddings.word.weight"
CHUNK = 1 << 22  # weights handled at a time: XLM-R's embedding table alone has 192 million


# ---------------------------------------------------------------------------------------- packing
def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers -2^(b-1) .. 2^(b-1) - 1 -> bytes, b bits each, the first one in the lowest bits
    (uint8, flat).

    >>> pack(torch.tensor([-1, 0, 1, 1]), bits=2)      # + 2: 1, 2, 3, 3 = 0b11_11_10_01
    tensor([249], dtype=torch.uint8)
    """
    unsigned = (codes.flatten().to(torch.int16) + 2 ** (bits - 1)).numpy().astype(np.uint8)
    if bits == 8:
        return torch.from_numpy(unsigned)
    planes = (unsigned[:, None] >> np.arange(bits, dtype=np.uint8)) & 1  # (number of codes, bits)
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of pack: `count` integers, int16."""
    unsigned = packed.numpy()
    if bits != 8:
        planes = np.unpackbits(unsigned, count=count * bits, bitorder="little").reshape(count, bits)
        unsigned = planes @ (1 << np.arange(bits)).astype(np.uint8)
    return torch.from_numpy(unsigned.astype(np.int16)) - 2 ** (bits - 1)


def packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


# --------------------------------------------------------------------------------------- students
def quantized_weights(student: Model) -> dict[str, WeightQuantizer | LearnedScale]:
    """Name of each quantized weight -> the quantizer it goes through."""
    found = {}
    for name, module in student.named_modules():
        for attribute in ("weight_quantizer", "row_quantizer"):
            quantizer = getattr(module, attribute, None)
            if isinstance(quantizer, (WeightQuantizer, LearnedScale)):
                found[name + ".weight"] = quantizer
        if isinstance(module, TensorTrain) and module.core_quantizers is not None:
            for k, quantizer in enumerate(module.core_quantizers):
                found[f"{name}.cores.{k}"] = quantizer
    return found


def left_out(name: str) -> bool:
    """Whether a tensor of a student's state says only how a weight was rounded to its codes."""
    return name.endswith(("_quantizer.clip", ".log_scale"))


class Weight(NamedTuple):
    """A quantized matrix, codes int8 (rows, N) and its scale, float32 (rows, 1) or (); or a core."""

    codes: Tensor
    scale: Tensor


def weight_of(quantizer: WeightQuantizer, weight: Tensor) -> Weight:
    codes, scale = quantizer.codes(weight)
    return Weight(codes.to(torch.int8), scale)


@torch.no_grad()
def weight_codes(student: Model) -> dict[str, Weight]:
    """The integers of every quantized weight of a fake-quantized student, on CPU."""
    found, parameters = {}, dict(student.named_parameters())
    for name, quantizer in quantized_weights(student).items():
        weight = parameters[name].detach()
        if name != WORDS:
            found[name] = Weight(*(part.cpu() for part in weight_of(quantizer, weight)))
            continue
        # Each row of the table has a scale of its own: so it can be done in pieces.
        pieces = [
            weight_of(quantizer, rows) for rows in weight.split(max(1, CHUNK // len(weight[0])))
        ]
        codes, scales = ([part.cpu() for part in parts] for parts in zip(*pieces, strict=True))
        found[name] = Weight(torch.cat(codes), torch.cat(scales))
    return found


def float_tensors(student: Model) -> dict[str, Tensor]:
    """What of a student is not quantized, on CPU."""
    quantized = quantized_weights(student)
    return {
        name: tensor.detach().cpu()
        for name, tensor in student.state_dict().items()
        if name not in quantized and not left_out(name)
    }


def student_payload(student: Model, config: QuantConfig, tokenizer: bytes, **notes: str) -> dict:
    """What student.pt holds: packed integers and scales, and float32 for the rest."""
    packed = {
        name: {
            "codes": pack(weight.codes, config.weight_bits),
            "shape": list(weight.codes.shape),
            "scale": weight.scale,
        }
        for name, weight in weight_codes(student).items()
    }
    settings = asdict(config)
    settings["keep"] = list(config.keep)
    return {
        "format": STUDENT_FORMAT,
        "config": asdict(student.config),
        "quant": settings,
        "tensors": float_tensors(student),
        "packed": packed,
        "tokenizer": torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8),
        "notes": notes,
    }


class _Counter:
    """A file that only counts: what a checkpoint would take on disk."""

    def __init__(self):
        self.size = 0

    def write(self, data) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        pass


def bytes_on_disk(payload: dict) -> int:
    """The size of the file that torch.save would write."""
    counter = _Counter()
    torch.save(payload, counter)
    return counter.size


class Student(NamedTuple):
    """A student in pieces, as it is on disk and as the integer model wants it.

    weights: every quantized one, tensors: all others.  vocabulary: the bytes of its tokenizer.
    """

    config: ModelConfig
    quant: QuantConfig
    weights: dict[str, Weight]
    tensors: dict[str, Tensor]
    notes: dict[str, str]
    vocabulary: Tensor | None


def read_student(path: str) -> Student:
    """What a student.pt says, checked.

    Raises UserError for a missing, truncated, tampered or foreign file; nothing in it is run.
    """
    payload = read_checkpoint(path, STUDENT_FORMAT)
    try:
        config = config_of(payload, path)
        quant = QuantConfig(**{**payload["quant"], "keep": tuple(payload["quant"]["keep"])})
        tensors, packed = dict(payload["tensors"]), dict(payload["packed"])
        notes = {str(name): str(text) for name, text in payload["notes"].items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: the student checkpoint is damaged") from None
    with torch.device("meta"):
        empty = Model(config)
    prepare(empty, replace(quant, weight_range="minmax"))  # there are no weights to search
    wanted = quantized_weights(empty)
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    weights = {}
    for name, entry in packed.items():
        if name not in wanted:
            raise UserError(f"{path}: packed tensor {name} has no place in the model")
        quantizer = wanted[name]
        weights[name] = unpack_weight(path, name, entry, shapes[name], quantizer)
    expected = {
        name: shape for name, shape in shapes.items() if name not in wanted and not left_out(name)
    }
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise UserError(f"{path}: packed tensor {missing[0]} is missing")
    check_tensors(path, expected, tensors, (torch.float32,))
    return Student(config, quant, weights, tensors, notes, payload.get("tokenizer"))


def unpack_weight(
    path: str,
    name: str,
    entry: dict,
    shape: torch.Size,
    quantizer: WeightQuantizer | LearnedScale,
) -> Weight:
    """One packed weight -> its integers, after checking its parts against what the model wants."""
    if not isinstance(entry, dict) or set(entry) != {"codes", "shape", "scale"}:
        raise UserError(f"{path}: packed tensor {name} is damaged")
    packed, scale, bits = entry["codes"], entry["scale"], quantizer.bits
    sound = (
        list(shape) == entry["shape"]
        and isinstance(packed, Tensor)
        and packed.dtype == torch.uint8
        and packed.shape == (packed_bytes(shape.numel(), bits),)
        and holds_its_numbers(packed)
        and isinstance(scale, Tensor)
        and scale.dtype == torch.float32
        and scale.shape == ((shape[0], 1) if quantizer.per_row else ())
    )
    if not sound:
        raise UserError(
            f"{path}: packed tensor {name} does not have the shape {tuple(shape)} at {bits} bits"
        )
    codes = torch.empty(shape, dtype=torch.int8)
    flat, step = codes.view(-1), CHUNK // 8 * 8  # a multiple of 8 codes fills whole bytes
    for start in range(0, flat.numel(), step):
        count = min(step, flat.numel() - start)
        piece = packed[start * bits // 8 : start * bits // 8 + packed_bytes(count, bits)]
        flat[start : start + count] = unpack(piece, bits, count)
    if len(codes) and (codes.min() < quantizer.quant_min or codes.max() > quantizer.quant_max):
        raise UserError(f"{path}: packed tensor {name} leaves the grid that the file names")
    return Weight(codes, scale)


def default_keep(tt: TTConfig | None) -> tuple[str, ...]:
    """What stays in float32. The head, if it is a small part; tensor trains make the rest smaller."""
    return () if tt else QuantConfig.keep


def load_student(path: str) -> tuple[Model, Tokenizer]:
    """A packed student as it was trained, fake-quantized, on CPU, and its tokenizer."""
    read = read_student(path)
    return float_model(read), tokenizer_of(path, read)


def tokenizer_of(path: str, read: Student) -> Tokenizer:
    return Tokenizer.from_payload({"tokenizer": read.vocabulary}, path, read.config.vocab_size)


def float_model(read: Student) -> Model:
    """The fake-quantized model of what a student.pt says."""
    with torch.device("meta"):
        student = Model(read.config)
        prepare(student, replace(read.quant, weight_range="minmax"))  # no weights to search
    student.to_empty(device="cpu")
    tensors = dict(read.tensors)
    for name, quantizer in quantized_weights(student).items():
        codes, scale = read.weights[name]
        tensors[name] = dequantize(codes, scale, torch.zeros(()))
        quantizer.fixed_scale = scale
        if name == WORDS:  # on its grid, and only looked up
            student.encoder.embeddings.word.row_quantizer = nn.Identity()
    # Not strict: read_student has checked the names, all but those of left_out(), which is not used.
    student.load_state_dict(tensors, strict=False)
    return student.eval()
