"""What a quantized student looks like on disk: integers, packed, with their scales.

Fake quantization trains in float32; a checkpoint of it would be full-size. Here each quantized
weight is stored as its integers, b bits each, plus one float32 scale a row:

    8 bits  one byte a weight       4 bits  two weights a byte       2 bits  four weights a byte

(3, 5, 6 and 7 bits are packed just as densely.) What is not quantized stays float32. Reading it
back gives weights (q - 0) * scale, the very floats that the student computed with: the same logits,
bit for bit.

    student, tokenizer = load_student("out/NAME/student.pt")
    logits, _ = student(ids, mask)
"""

from dataclasses import asdict, replace

import numpy as np
import torch
from torch import Tensor

from data import UserError
from data.tokenizer import Tokenizer
from model import Model, check_tensors, config_of, holds_its_numbers, read_checkpoint
from quant import QuantConfig, WeightQuantizer, dequantize, prepare, quant_range, quantize

STUDENT_FORMAT = "sdq-student-1"
CHUNK = 1 << 22  # weights handled at a time: XLM-R's embedding table alone has 192 million


# ---------------------------------------------------------------------------------------- packing
def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers of a symmetric grid -> bytes, `bits` bits each, the first one in the lowest bits
    (uint8, flat).

    >>> pack(torch.tensor([-1, 0, 1, 1]), bits=2)      # +1: 0, 1, 2, 2 = 0b10_10_01_00
    tensor([164], dtype=torch.uint8)
    """
    unsigned = (codes.flatten() - quant_range(bits, symmetric=True)[0]).numpy().astype(np.uint8)
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
    return torch.from_numpy(unsigned.astype(np.int16)) + quant_range(bits, symmetric=True)[0]


def packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


# --------------------------------------------------------------------------------------- students
def quantized_weights(student: Model) -> dict[str, WeightQuantizer]:
    """Name of each quantized weight -> the quantizer it goes through."""
    found = {}
    for name, module in student.named_modules():
        for attribute in ("weight_quantizer", "row_quantizer"):
            quantizer = getattr(module, attribute, None)
            if isinstance(quantizer, WeightQuantizer):
                found[name + ".weight"] = quantizer
    return found


@torch.no_grad()
def student_payload(student: Model, config: QuantConfig, tokenizer: bytes, **notes: str) -> dict:
    """What student.pt holds: packed integers and scales, and float32 for the rest."""
    tensors = {
        k: t.detach().cpu()
        for k, t in student.state_dict().items()
        if not k.endswith("_quantizer.clip")
    }
    packed = {}
    for name, quantizer in quantized_weights(student).items():
        weight = tensors.pop(name)
        scale, zero_point = (t.cpu() for t in quantizer.qparams(weight.to(quantizer.clip.device)))
        rows = max(8, CHUNK // weight.shape[1] // 8 * 8)  # a multiple of 8 rows fills whole bytes
        pieces = []
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            of_rows = (scale[part], zero_point[part]) if scale.dim() else (scale, zero_point)
            codes = quantize(weight[part], *of_rows, quantizer.quant_min, quantizer.quant_max)
            pieces.append(pack(codes, quantizer.bits))
        packed[name] = {"codes": torch.cat(pieces), "shape": list(weight.shape), "scale": scale}
    settings = asdict(config)
    settings["keep"] = list(config.keep)
    return {
        "format": STUDENT_FORMAT,
        "config": asdict(student.config),
        "quant": settings,
        "tensors": tensors,
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


def load_student(path: str) -> tuple[Model, Tokenizer]:
    """A packed student, ready to predict on CPU, and its tokenizer.

    Weights come back as the floats the student computed with; activations are quantized as in
    training.
    Raises UserError for a missing, truncated, tampered or foreign file; nothing in it is executed.
    """
    payload = read_checkpoint(path, STUDENT_FORMAT)
    try:
        config = config_of(payload, path)
        quant = QuantConfig(**{**payload["quant"], "keep": tuple(payload["quant"]["keep"])})
        tensors, packed = dict(payload["tensors"]), dict(payload["packed"])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: the student checkpoint is damaged") from None
    tokenizer = Tokenizer.from_payload(payload, path, config.vocab_size)
    with torch.device("meta"):
        student = Model(config)
    # The weights arrive on the grid already, so only the activation quantizers are put in.
    prepare(student, replace(quant, weight_bits=32))
    expected = {name: tensor.shape for name, tensor in student.state_dict().items()}
    for name, entry in packed.items():
        tensors[name] = unpack_weight(path, name, entry, expected.get(name), quant.weight_bits)
    check_tensors(path, expected, tensors)
    student.to_empty(device="cpu")
    student.load_state_dict(tensors, strict=True)
    return student.eval(), tokenizer


def unpack_weight(path: str, name: str, entry: dict, shape: torch.Size | None, bits: int) -> Tensor:
    """One packed weight -> float32 (rows, N), after checking its parts against the shape the model
    wants.
    """
    if not isinstance(entry, dict) or set(entry) != {"codes", "shape", "scale"} or shape is None:
        raise UserError(f"{path}: packed tensor {name} is damaged or has no place in the model")
    codes, scale = entry["codes"], entry["scale"]
    sound = (
        list(shape) == entry["shape"]
        and isinstance(codes, Tensor)
        and codes.dtype == torch.uint8
        and codes.shape == (packed_bytes(shape.numel(), bits),)
        and holds_its_numbers(codes)
        and isinstance(scale, Tensor)
        and scale.dtype == torch.float32
        and scale.shape in ((), (shape[0], 1))
    )
    if not sound:
        raise UserError(
            f"{path}: packed tensor {name} does not have the shape {tuple(shape)} at {bits} bits"
        )
    weight = torch.empty(shape)
    flat, step = weight.view(-1), CHUNK // 8 * 8  # a multiple of 8 codes fills whole bytes
    for start in range(0, flat.numel(), step):
        count = min(step, flat.numel() - start)
        piece = codes[start * bits // 8 : start * bits // 8 + packed_bytes(count, bits)]
        flat[start : start + count] = unpack(piece, bits, count)
    return dequantize(weight, scale, torch.zeros(()))
