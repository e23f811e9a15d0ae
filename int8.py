"""What is deployed: the student in integers, on disk and in memory.

On disk. Fake quantization trains in float32; a checkpoint of it would be full-size. In student.pt
each quantized weight is its integers, b bits each, plus one float32 scale a row:

    8 bits  one byte a weight       4 bits  two weights a byte       2 bits  four weights a byte

(3, 5, 6 and 7 bits are packed just as densely.) What is not quantized stays float32.

In memory. An activation is x = s_x (q_x - z_x), q_x in 0..255, a weight is w = s_w q_w. So a Linear
layer is a product of small integers, summed in 32 bits, and a correction afterwards, quant.rescale:

    y = s_x s_w (sum_k q_x q_w  -  z_x sum_k q_w) + b            s_x, z_x: of each token, or of all

The student does the same in evaluation, so on CPU both give the same bits, whatever the kernel.

Weights of fewer than 8 bits are unpacked to 8 and multiplied the same way. Query, key and value are
one product, for they read one activation. Word embeddings are looked up in int8. Norms, softmax,
GELU and the head stay float32. With static ranges the whole feed-forward step stays in 8 bits: the
kernel applies GELU to its 32-bit sums and hands 8-bit integers to the next one.

Saturation, or why a grid is a contract. CPUs with AVX2 or AVX-512 but without VNNI multiply 8 bits
with the instruction vpmaddubsw, which adds *two* products in 16 bits and clips the sum to 32,767.
Full-range operands give 255 * 127 * 2 = 64,770: silently wrong, by half. With weights in -64..64
the sum is at most 32,640 and every CPU is right. So QuantConfig.grid is part of training and of the
checkpoint: "portable" weights are what they will be multiplied as, everywhere. A "full" student
(-127..127) is exact on VNNI and CUDA; where a CPU would clip, choose_kernel notices, by trying, and
multiplies its integers in float32: right, at float32 speed.

    model, tokenizer = load_integer("out/NAME/student.pt")       # or load_student: fake-quantized
    logits, _ = model(ids, mask)
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import UserError
from data.tokenizer import Tokenizer
from model import (
    Attention,
    FeedForward,
    Model,
    ModelConfig,
    check_tensors,
    config_of,
    holds_its_numbers,
    read_checkpoint,
)
from quant import (
    ActQuantizer,
    Codes,
    LearnedScale,
    QuantConfig,
    QuantLinear,
    WeightQuantizer,
    dequantize,
    prepare,
    quantize,
    rescale,
)
from tt import QuantTTLinear, TensorTrain, TTConfig, TTMEmbedding, lookup

STUDENT_FORMAT = "sdq-student-2"
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
            if isinstance(quantizer, WeightQuantizer):
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
        scale, zero_point = quantizer.qparams(weight)
        codes = torch.empty(weight.shape, dtype=torch.int8)
        rows = max(1, CHUNK // weight.shape[1])
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            of_rows = (scale[part], zero_point[part]) if scale.dim() else (scale, zero_point)
            codes[part] = quantize(weight[part], *of_rows, quantizer.quant_min, quantizer.quant_max)
        found[name] = Weight(codes, scale.cpu())
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
        if name == "encoder.embeddings.word.weight":  # on its grid, and only looked up
            student.encoder.embeddings.word.row_quantizer = nn.Identity()
    # Not strict: read_student has checked the names, all but those of left_out(), which is not used.
    student.load_state_dict(tensors, strict=False)
    return student.eval()


def load_integer(path: str, device: str = "cpu", kernel: str = "auto") -> tuple[Model, Tokenizer]:
    """A packed student as an integer model, and its tokenizer."""
    read = read_student(path)
    return integer_model(read, device, kernel), tokenizer_of(path, read)


# ---------------------------------------------------------------------------------- integer model
# Between 2^23 and 2^24 the float32 numbers are the whole numbers: adding this rounds a small number to
# the nearest integer, halves to even, and leaves it in the lowest bits.
TO_INTEGER = 1.5 * 2**23


def activation_codes(quantizer: ActQuantizer, x: Tensor) -> Codes:
    """The integers that the student's quantizer rounds x to, in one byte each (uint8).

    It is quantize() and .to(torch.uint8), in fewer passes over memory, which is what takes the time
    here. (Codes of less than 8 bits take a byte, too.)
    """
    scale, zero_point = quantizer.qparams(x)
    q = torch.mul(x, scale.reciprocal()).add_(zero_point)
    # A range of x's own is missed at its upper end alone, by a tie.
    q.clamp_(quantizer.quant_min if quantizer.static else None, quantizer.quant_max)
    low_bytes = q.add_(TO_INTEGER).view(torch.uint8)[..., ::4]
    return Codes(low_bytes.contiguous(), scale, zero_point)


# A kernel packs an int8 matrix (N, K) once, and multiplies uint8 activations (M, K) by it many
# times: sums(q_x) = sum_k (q_x - offset) q_w, float32 (M, N). A `fused` kernel can do a whole layer
# in one call where the activation's range is fixed: see OneDNNKernel.
class FloatKernel:
    """The integers multiplied in float32, or in float64, where every sum is exact: the reference.

    float32 sums are exact below 2^24 and rounded in the seventh digit above, as everywhere else in
    the model.
    """

    offset, fused = 0, False

    def __init__(self, weight: Tensor, dtype: torch.dtype = torch.float32):
        self.weight = weight.to(dtype)

    def sums(self, values: Tensor) -> Tensor:
        return F.linear(values.to(self.weight.dtype), self.weight).float()


class ReferenceKernel(FloatKernel):
    def __init__(self, weight: Tensor):
        super().__init__(weight, torch.float64)


class OneDNNKernel:
    """oneDNN's u8 x s8 product on CPU. It packs plain int8 tensors and warns of nothing, but it is
    an operator that PyTorch made for its own compiler: choose_kernel tries it before it is used.
    """

    offset, fused = 0, True

    def __init__(self, weight: Tensor):
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.ones = torch.ones(len(weight))
        self.zero_points = torch.zeros(len(weight), dtype=torch.int32)

    def sums(self, values: Tensor) -> Tensor:
        return self.layer(values, 0, self.ones, None)

    def layer(
        self,
        values: Tensor,
        zero_point: int,
        scale: Tensor,
        bias: Tensor | None,
        post: str = "none",
        out: tuple[float, int] | None = None,
    ) -> Tensor:
        """post(scale * sum_k (q_x - zero_point) q_w + bias) in one call.

        scale: s_x s_w (N). oneDNN would multiply by s_x itself, but in an order that depends on the
        CPU.  post: "none" or "gelu".  out: scale and zero point of results in uint8, else float32.
        """
        out_scale, out_zero_point = out or (1.0, 0)
        return torch.ops.onednn.qlinear_pointwise(
            values, 1.0, zero_point, self.weight, scale, self.zero_points, bias,
            out_scale, out_zero_point, torch.uint8 if out else torch.float32, post, [], "none",
        )  # fmt: skip


class CudaKernel:
    """cuBLAS's s8 x s8 product, torch._int_mm: activations are shifted by 128 to be signed.

    It wants M > 16 and K, N in multiples of 8: smaller ones are padded with zeros.
    """

    offset, fused = 128, False

    def __init__(self, weight: Tensor):
        (self.N, K) = weight.shape
        self.more_k = -K % 8
        self.weight = F.pad(weight, (0, self.more_k, 0, -self.N % 8)).contiguous()

    def sums(self, values: Tensor) -> Tensor:
        M = len(values)
        signed = values.bitwise_xor(128).view(torch.int8)  # q - 128, in one pass
        more_rows = max(0, 17 - M)
        if more_rows or self.more_k:
            signed = F.pad(signed, (0, self.more_k, 0, more_rows))
        return torch._int_mm(signed, self.weight.t())[:M, : self.N].float()


KERNELS: dict[str, Callable] = {
    "reference": ReferenceKernel,
    "float": FloatKernel,
    "onednn": OneDNNKernel,
    "cuda": CudaKernel,
}


@cache
def is_exact(kernel: str, largest: int) -> bool:
    """Whether a CPU kernel gets the largest products of a grid right: tried, not looked up."""
    weight = torch.full((32, 256), largest, dtype=torch.int8)
    weight[1::2] = -largest
    values = torch.full((17, 256), 255, dtype=torch.uint8)
    try:
        found = KERNELS[kernel](weight).sums(values)
    except (RuntimeError, AttributeError):  # not built for this machine
        return False
    return torch.equal(found, ReferenceKernel(weight).sums(values))


def choose_kernel(device: str, largest: int) -> str:
    """The fastest kernel that is right for weights up to `largest`."""
    if torch.device(device).type == "cuda":
        return "cuda"
    return "onednn" if is_exact("onednn", largest) else "float"


class IntLinear(nn.Module):
    """A Linear layer in integers, for x float32 or Codes: (..., K) -> (..., N)."""

    def __init__(
        self, weight: Weight, bias: Tensor | None, act: ActQuantizer, kernel: str, device: str
    ):
        super().__init__()
        codes, N = weight.codes.to(device), len(weight.codes)
        self.act_quantizer, self.kernel = act, KERNELS[kernel](codes)
        self.register_buffer("bias", None if bias is None else bias.to(device))
        self.register_buffer("column", codes.sum(dim=1, dtype=torch.float32))
        self.register_buffer("scale", weight.scale.to(device).flatten().expand(N).contiguous())
        self.constants = None  # of a static range: s_x s_w and z_x
        if act.static:
            self.constants = act.scale.to(device) * self.scale, int(act.zero_point)

    def codes(self, x: Tensor | Codes) -> Codes:
        return x if isinstance(x, Codes) else activation_codes(self.act_quantizer, x)

    def forward(self, x: Tensor | Codes) -> Tensor:
        x = self.codes(x)
        if self.kernel.fused and not x.scale.dim():  # one range for all tokens
            return self.fused(x)
        sums = self.kernel.sums(x.values.flatten(0, -2)).view(*x.values.shape[:-1], -1)
        if self.kernel.offset:
            x = x._replace(zero_point=x.zero_point - self.kernel.offset)
        return rescale(sums, self.column, x, self.scale, self.bias)

    def fused(self, x: Codes, post: str = "none", out: tuple[float, int] | None = None) -> Tensor:
        """post(the layer), in one call of the kernel; in uint8 if `out` has their scale and zero."""
        scale, zero_point = self.constants or (x.scale * self.scale, int(x.zero_point))
        y = self.kernel.layer(x.values.flatten(0, -2), zero_point, scale, self.bias, post, out)
        return y.view(*x.values.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"kernel={type(self.kernel).__name__}"


class IntTTLinear(nn.Module):
    """A tensor train merged to A (r, K) and B (N, r), two integer layers: (..., K) -> (..., N).

    It is called as an IntLinear is. With static ranges what is between the two never leaves 8 bits.
    """

    def __init__(self, layer: QuantTTLinear, act: ActQuantizer, kernel: str, device: str):
        super().__init__()
        merged = zip(layer.halves(), (layer.A_quantizer, layer.B_quantizer), strict=True)
        A, B = (weight_of(quantizer, half) for half, quantizer in merged)
        middle = layer.middle_quantizer
        self.A = IntLinear(A, None, act, kernel, device)
        self.B = IntLinear(B, layer.bias, middle, kernel, device)
        self.act_quantizer, self.codes, self.kernel = act, self.A.codes, self.B.kernel
        self.inner = None
        if self.A.kernel.fused and act.static and middle.quant_max == 255:
            self.inner = float(middle.scale), int(middle.zero_point)

    def middle(self, x: Tensor | Codes) -> Tensor | Codes:
        if self.inner is None:
            return self.A(x)
        values = self.A.fused(self.codes(x), out=self.inner)
        return Codes(values, self.B.act_quantizer.scale, self.B.act_quantizer.zero_point)

    def forward(self, x: Tensor | Codes) -> Tensor:
        return self.B(self.middle(x))

    def fused(self, x: Codes, post: str, out: tuple[float, int]) -> Tensor:
        return self.B.fused(self.B.codes(self.middle(x)), post, out)


class MergedTable(nn.Module):
    """A table as a tensor train, its cores merged to two halves once: (B, T) -> (B, T, C)."""

    def __init__(self, table: TTMEmbedding):
        super().__init__()
        self.num_embeddings = table.num_embeddings
        for name, half in zip(("left", "right"), table.halves(), strict=True):
            self.register_buffer(name, half.contiguous())

    def forward(self, ids: Tensor) -> Tensor:
        return lookup(ids, self.left, self.right, self.num_embeddings)


class IntEmbedding(nn.Module):
    """Rows of an int8 table, as float32: (B, T) -> (B, T, C)."""

    def __init__(self, weight: Weight):
        super().__init__()
        self.register_buffer("weight", weight.codes)
        self.register_buffer("scale", weight.scale)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float() * F.embedding(ids, self.scale)


class IntAttention(Attention):
    """Attention whose query, key and value come from one product."""

    def __init__(self, attention: Attention, qkv: IntLinear):
        nn.Module.__init__(self)
        self.num_heads, self.qkv, self.output = attention.num_heads, qkv, attention.output
        self.norm, self.dropout = attention.norm, attention.dropout

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).chunk(3, dim=-1)


class IntSharedAttention(Attention):
    """Attention whose query, key and value are layers of their own, which read the same integers."""

    def __init__(self, attention: Attention):
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)  # all of its parts

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = self.query.codes(x)
        return self.query(inputs), self.key(inputs), self.value(inputs)


class IntFeedForward(FeedForward):
    """Feed-forward whose inner activation never leaves 8 bits, where ranges and kernel allow it.

    Where they don't, it is float32 and the largest tensor of the model: a CPU then works on PIECE
    tokens at a time, whose memory is used again (1.5 times as fast on 32 x 64 tokens; same bits).
    """

    PIECE = 512

    def __init__(self, ffn: FeedForward):
        nn.Module.__init__(self)
        self.up, self.down, self.norm, self.dropout = ffn.up, ffn.down, ffn.norm, ffn.dropout
        inner = ffn.down.act_quantizer
        self.inner = None
        if ffn.up.kernel.fused and inner.static and inner.quant_max == 255:
            self.inner = float(inner.scale), int(inner.zero_point)
        self.in_pieces = self.inner is None and inner.per_token

    def forward(self, x: Tensor) -> Tensor:
        if self.in_pieces and not x.is_cuda and x.shape[:-1].numel() > self.PIECE:
            pieces = x.flatten(0, -2).split(self.PIECE)
            return torch.cat([super(IntFeedForward, self).forward(p) for p in pieces]).view_as(x)
        return super().forward(x)

    def expand(self, x: Tensor) -> Tensor | Codes:
        if self.inner is None:
            return super().expand(x)
        values = self.up.fused(self.up.codes(x), "gelu", self.inner)
        return Codes(values, self.down.act_quantizer.scale, self.down.act_quantizer.zero_point)


@torch.no_grad()
def convert(
    student: Model, config: QuantConfig, device: str | torch.device = "cpu", kernel: str = "auto"
) -> Model:
    """A fake-quantized student -> the integer model that gives the same logits."""
    weights, tensors = weight_codes(student), float_tensors(student)
    parts = Student(student.config, config, weights, tensors, notes={}, vocabulary=None)
    return integer_model(parts, device, kernel)


@torch.no_grad()
def integer_model(
    student: Student, device: str | torch.device = "cpu", kernel: str = "auto"
) -> Model:
    """The integer model of a student.  kernel: a name of KERNELS, or "auto".

    Raises UserError if there is nothing to multiply in integers.
    """
    config, quant, weights, tensors = student[:4]
    if quant.weight_bits == 32 or quant.act_bits == 32:
        raise UserError(
            "integers need quantized weights and activations: --bits and --act-bits 2 to 8"
        )
    if quant.keep != default_keep(config.tt):
        raise UserError(f"integers need every Linear layer of the encoder: keep is {quant.keep}")
    if config.tt:
        return integer_trains(student, device, kernel)
    with torch.device("meta"):
        model = Model(config)
        prepare(model, replace(quant, weight_bits=32))
    matrices = [w.codes for name, w in weights.items() if "word" not in name]
    largest = max(int(codes.abs().max()) for codes in matrices)
    kernel = choose_kernel(device, largest) if kernel == "auto" else kernel

    # Not strict: what is missing are the quantized weights, whose modules are replaced below.
    there = {name: tensor.to(device) for name, tensor in tensors.items()}
    model.load_state_dict(there, strict=False, assign=True)

    def linear(*names: str) -> IntLinear:
        """One IntLinear of one QuantLinear, or of several that read the same activation."""
        parts = [weights[name + ".weight"] for name in names]
        rows = [len(part.codes) for part in parts]
        scales = [part.scale.reshape(-1).expand(n) for part, n in zip(parts, rows, strict=True)]
        whole = Weight(torch.cat([part.codes for part in parts]), torch.cat(scales))
        bias = torch.cat([tensors[name + ".bias"] for name in names])
        module = model.get_submodule(names[0])
        act = module.act_quantizer
        if not isinstance(act, ActQuantizer):  # query, key and value: their attention has it
            act = model.get_submodule(names[0].rpartition(".")[0]).input_quantizer
        return IntLinear(whole, bias, act, kernel, device)

    model.encoder.embeddings.word = IntEmbedding(weights["encoder.embeddings.word.weight"]).to(
        device
    )
    for i, layer in enumerate(model.encoder.layers):
        at = f"encoder.layers.{i}."
        qkv = linear(*(f"{at}attention.{name}" for name in ("query", "key", "value")))
        layer.attention.output = linear(f"{at}attention.output")
        layer.attention = IntAttention(layer.attention, qkv)
        layer.ffn.up, layer.ffn.down = linear(f"{at}ffn.up"), linear(f"{at}ffn.down")
        layer.ffn = IntFeedForward(layer.ffn)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def integer_trains(student: Student, device: str | torch.device, kernel: str) -> Model:
    """integer_model for tensor trains: small enough to be made of the fake-quantized model's parts."""
    model = float_model(student)
    linears = {
        n: m for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantTTLinear))
    }
    if kernel == "auto":
        quantizers = (q for q in model.modules() if isinstance(q, WeightQuantizer))
        kernel = choose_kernel(device, max(quantizer.quant_max for quantizer in quantizers))
    for name, linear in linears.items():
        above, _, attribute = name.rpartition(".")
        parent, act = model.get_submodule(above), linear.act_quantizer
        if not isinstance(act, ActQuantizer):  # query, key and value: their attention has it
            act = parent.input_quantizer
        if isinstance(linear, QuantTTLinear):
            new = IntTTLinear(linear, act, kernel, device)
        else:
            weight = weight_of(linear.weight_quantizer, linear.weight)
            new = IntLinear(weight, linear.bias, act, kernel, device)
        setattr(parent, attribute, new)
    embeddings = model.encoder.embeddings
    for name in ("word", "position"):
        table = getattr(embeddings, name)
        if isinstance(table, TTMEmbedding):
            setattr(embeddings, name, MergedTable(table))
    if "encoder.embeddings.word.weight" in student.weights:
        embeddings.word = IntEmbedding(student.weights["encoder.embeddings.word.weight"])
    for layer in model.encoder.layers:
        layer.attention = IntSharedAttention(layer.attention)
        layer.ffn = IntFeedForward(layer.ffn)
    return model.to(device).requires_grad_(False).eval()
