"""The integer model that is deployed. Its file format is in checkpoint.py.

An activation is x = s_x (q_x - z_x), q_x in 0..255, a weight is w = s_w q_w. A Linear layer is then a product of 8-bit
integers, accumulated in 32 bits, and a correction, quant.rescale:

    y = s_x s_w (sum_k q_x q_w  -  z_x sum_k q_w) + b            s_x, z_x: per token or per tensor

The student computes the same in evaluation, so on CPU both give the same bits, whatever the kernel.

Weights of fewer than 8 bits are unpacked to 8 and multiplied in the same way. Query, key and value are one product,
since they read one activation; a tensor train is merged to two thin matrices and is two products. Word embeddings are
looked up in int8. Norms, softmax, GELU and the head stay in float32 (beside tensor trains the head is quantized, too).
With static ranges the feed-forward network stays in 8 bits: the kernel applies GELU to its 32-bit sums and passes 8-bit
integers to the next product. Then a CPU with VNNI spends 67 % of the time on products and 15 % on attention (XLM-R
base, 8 x 128 tokens).

Saturation. CPUs with AVX2 or AVX-512 but without VNNI multiply 8 bits with the instruction vpmaddubsw, which adds
*two* products in 16 bits and saturates at 32,767. Full-range operands give 255 * 127 * 2 = 64,770: silently wrong, by
half. With weights in -64..64 the sum is at most 32,640 and every CPU is right. So QuantConfig.grid is part of training
and of the checkpoint: "portable" weights are trained on the grid on which they are multiplied everywhere. A "full"
student (-127..127) is exact on VNNI and CUDA; choose_kernel finds out by trying whether a CPU would saturate, and then
multiplies integers in float32, at float32 speed: exact below 2^24, which typical sums are.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import WORDS, Checkpoint, Weight, fake_quantized, float_tensors, meta_model, weight_codes, weight_of
from kit.common import UserError
from model import Attention, FeedForward, Model
from prepare import QKV
from quant import ActQuantizer, Codes, QuantConfig, QuantLinear, quantize, rescale
from tt import QuantTTLinear, TTLinear, TTMEmbedding, lookup


# --------------------------------------------------------------------------------------- kernels
def activation_codes(quantizer: ActQuantizer, x: Tensor) -> Codes:
    """The integers that the student's quantizer rounds x to, one byte each (uint8), also with fewer than 8 bits."""
    x = x.float()  # see in_bfloat16
    scale, zero_point = quantizer.qparams(x)
    if x.is_cuda or torch.compiler.is_compiling() or not rounds_in_one_pass():
        return Codes(quantize(x, scale, zero_point, 0, quantizer.quant_max).to(torch.uint8), scale, zero_point)
    # The same in fewer passes over memory, which take the time here: half of it, with static ranges a third.
    shift = int(zero_point) if quantizer.static else 0
    q = torch.mul(x, scale.reciprocal())
    if not quantizer.static:
        q.add_(zero_point)
    if quantizer.quant_max < 255:
        q.clamp_(max=quantizer.quant_max - shift)
    return Codes(round_in_one_pass(q, shift), scale, zero_point)


def round_in_one_pass(x: Tensor, shift: int) -> Tensor:
    """clamp(round(x + shift), 0, 255), halves to even: uint8.

    PyTorch's quantized tensors will be removed (pytorch#184982), but no other operator does this in one pass. Their
    bytes are taken, and the rest is left.
    """
    quantized = torch.quantize_per_tensor(x, 1.0, shift, torch.quint8)
    values = torch.empty(0, dtype=torch.uint8)
    return values.set_(quantized.untyped_storage(), 0, quantized.shape, quantized.stride())


@cache
def rounds_in_one_pass() -> bool:
    """Whether this PyTorch has the operator, and adds before it rounds, which not all builds do."""
    x, one = torch.tensor([-1e30, -0.5, 0.5, 1.5, 2.5, 253.6, 1e30] * 9), torch.ones(())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will be removed
        return computes(lambda: round_in_one_pass(x, 1).float(), quantize(x, one, one, 0, 255))


def computes(function: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether a function, which not every build of PyTorch has, gives what is expected here."""
    try:
        return torch.equal(function(), expected)
    except (AttributeError, RuntimeError):
        return False


FLOATS = ("none", 1.0, 0, torch.float32)  # of OneDNNKernel.layer: y as it is


# A kernel packs an int8 matrix (N, K) once and multiplies uint8 activations (M, K) by it many times: sums(q_x) = sum_k
# (q_x - offset) q_w, float32 (M, N). A `fused` kernel computes a whole layer in one call if the activation's range is
# static: see OneDNNKernel.
class FloatKernel(nn.Module):
    """Integers multiplied in float32, whose sums are exact below 2^24 and rounded in the seventh digit above."""

    offset, fused = 0, False

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Buffer(weight.float())

    def sums(self, values: Tensor) -> Tensor:
        return F.linear(values.float(), self.weight)


class OneDNNKernel(nn.Module):
    """oneDNN's u8 x s8 product on CPU. The operator is undocumented, made for PyTorch's compiler: choose_kernel tries
    it before it is used.
    """

    offset, fused = 0, True

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None)  # no buffer: its layout is oneDNN's own
        self.ones = nn.Buffer(torch.ones(len(weight)))
        self.zero_points = nn.Buffer(torch.zeros(len(weight), dtype=torch.int32))

    def __reduce__(self) -> tuple:
        """A copy, or a kernel in another process, packs the weight again."""
        return OneDNNKernel, (self.weight.to_dense().t().contiguous(),)

    def sums(self, values: Tensor) -> Tensor:
        return self.layer(values, 0, self.ones, None, FLOATS)

    def layer(self, values: Tensor, zero_point: int, scale: Tensor, bias: Tensor | None, then: tuple) -> Tensor:
        """post(scale * sum_k (q_x - zero_point) q_w + bias) in one call.

        scale: s_x s_w (N). oneDNN could multiply by s_x, but in an order that depends on the CPU.  then: post, "none"
        or "gelu", and the scale, zero point and type of the result.
        """
        post, *result = then
        return torch.ops.onednn.qlinear_pointwise(
            values, 1.0, zero_point, self.weight, scale, self.zero_points, bias, *result, post, [], "none"
        )


class CudaKernel(nn.Module):
    """cuBLAS's s8 x s8 product, torch._int_mm, with activations shifted by 128 to be signed.

    It requires M > 16 and K, N in multiples of 8: operands are padded with zeros.
    """

    offset, fused = 128, False

    def __init__(self, weight: Tensor):
        super().__init__()
        (self.N, K) = weight.shape
        self.more_k = -K % 8
        self.weight = nn.Buffer(F.pad(weight, (0, self.more_k, 0, -self.N % 8)).contiguous())

    def sums(self, values: Tensor) -> Tensor:
        M = len(values)
        signed = values.bitwise_xor(128).view(torch.int8)  # q - 128, in one pass
        more_rows = max(0, 17 - M)
        if more_rows or self.more_k:
            signed = F.pad(signed, (0, self.more_k, 0, more_rows))
        return torch._int_mm(signed, self.weight.t())[:M, : self.N].float()


KERNELS = {"float": FloatKernel, "onednn": OneDNNKernel, "cuda": CudaKernel}


@cache
def is_exact(kernel: str, largest: int) -> bool:
    """Whether a CPU kernel computes the largest products of a grid exactly: found out by trying."""
    weight = torch.full((32, 256), largest, dtype=torch.int8)
    weight[1::2] = -largest
    values = torch.full((17, 256), 255, dtype=torch.uint8)
    return computes(lambda: KERNELS[kernel](weight).sums(values), F.linear(values.float(), weight.float()))


def choose_kernel(device: str, largest: int) -> str:
    """The fastest kernel that is exact for weights up to `largest`."""
    if torch.device(device).type == "cuda":
        return "cuda"
    return "onednn" if is_exact("onednn", largest) else "float"


class IntLinear(nn.Module):
    """A Linear layer in integers, for x in floats or Codes: (..., K) -> (..., N).

    few: multiply the integers of up to FEW tokens in float32. A call of an integer kernel takes some 40 microseconds,
    twice the time of that with a thin matrix.
    """

    FEW, floats = 64, torch.float32

    def __init__(
        self, weight: Weight, bias: Tensor | None, act: ActQuantizer, kernel: str, device: str, few: bool = False
    ):
        super().__init__()
        codes, N = weight.codes.to(device), len(weight.codes)
        self.act_quantizer, self.kernel = act, KERNELS[kernel](codes)
        self.few_kernel = FloatKernel(codes) if few and not codes.is_cuda else None
        self.register_buffer("bias", None if bias is None else bias.to(device))
        self.register_buffer("column", codes.sum(dim=1, dtype=torch.float32))
        self.register_buffer("scale", weight.scale.to(device).flatten().expand(N).contiguous())
        if act.static:
            scale, zero_point = act.static_range()
            self.both = nn.Buffer(scale.to(device) * self.scale)  # s_x s_w
            self.shifted = nn.Buffer((0 if bias is None else self.bias) - int(zero_point) * self.column * self.both)
            self.constants = self.both, int(zero_point)
        self.then, self.next_grid = FLOATS, None  # see pass_codes

    def pass_codes(self, act: ActQuantizer, post: str = "none") -> None:
        """Return Codes of post(y) for `act` from now on, where range and kernel allow it; for few tokens still y."""
        if self.kernel.fused and act.static and act.quant_max == 255:
            scale, zero_point = self.next_grid = act.static_range()
            self.then = post, float(scale), int(zero_point), torch.uint8

    def codes(self, x: Tensor | Codes) -> Codes:
        return x if isinstance(x, Codes) else activation_codes(self.act_quantizer, x)

    def forward(self, x: Tensor | Codes) -> Tensor | Codes:
        x = self.codes(x)
        values, shape = x.values.flatten(0, -2), (*x.values.shape[:-1], -1)
        static, compiling = self.act_quantizer.static, torch.compiler.is_compiling()
        few = self.few_kernel is not None and not compiling and len(values) <= self.FEW
        kernel = self.few_kernel if few else self.kernel
        if kernel.fused and static and compiling:  # a program is of all layers and lengths: no numbers but in tensors
            return kernel.layer(values, 0, self.both, self.shifted, FLOATS).view(shape)
        if kernel.fused and not x.scale.dim() and not compiling:  # per tensor
            scale, zero_point = self.constants if static else (x.scale * self.scale, int(x.zero_point))
            y = kernel.layer(values, zero_point, scale, self.bias, self.then).view(shape)
            return Codes(y, *self.next_grid) if self.next_grid else y
        sums = kernel.sums(values).view(shape)
        if kernel.offset:
            x = x._replace(zero_point=x.zero_point - kernel.offset)
        return rescale(sums, self.column, x, self.scale, self.bias).to(self.floats)


class IntTTLinear(nn.Module):
    """A tensor train merged to A (r, K) and B (N, r), two integer layers: (..., K) -> (..., N).

    With static ranges the activation between the two stays in 8 bits.
    """

    def __init__(self, layer: QuantTTLinear, kernel: str, device: str):
        super().__init__()
        (A, B), act, middle = layer.halves(), layer.act_quantizer, layer.middle_quantizer
        A, B = weight_of(layer.A_quantizer, A), weight_of(layer.B_quantizer, B)
        self.A = IntLinear(A, None, act, kernel, device, few=act.static)
        self.B = IntLinear(B, layer.bias, middle, kernel, device, few=act.static)
        self.A.pass_codes(middle)
        self.act_quantizer, self.kernel = act, self.B.kernel

    def pass_codes(self, act: ActQuantizer, post: str) -> None:
        self.B.pass_codes(act, post)

    def forward(self, x: Tensor | Codes) -> Tensor | Codes:
        return self.B(self.A(x))


class MergedTable(nn.Module):
    """A tensor-train table with its cores merged to two halves once: (B, T) -> (B, T, C)."""

    def __init__(self, table: TTMEmbedding):
        super().__init__()
        self.num_embeddings = table.num_embeddings
        self.left, self.right = (nn.Buffer(half.contiguous()) for half in table.halves())

    def forward(self, ids: Tensor) -> Tensor:
        return lookup(ids, self.left, self.right, self.num_embeddings)


class IntEmbedding(nn.Module):
    """Rows of an int8 table, in floats: (B, T) -> (B, T, C)."""

    floats = torch.float32

    def __init__(self, weight: Weight):
        super().__init__()
        self.weight, self.scale = nn.Buffer(weight.codes), nn.Buffer(weight.scale)

    def forward(self, ids: Tensor) -> Tensor:
        return (F.embedding(ids, self.weight).float() * F.embedding(ids, self.scale)).to(self.floats)


class IntAttention(Attention):
    """Attention whose query, key and value come from one product, or from layers that read the same integers."""

    def __init__(self, attention: Attention, qkv: IntLinear | None):
        adopt(self, attention)
        if qkv is not None:
            del self.query, self.key, self.value
        self.qkv = qkv

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is not None:
            return self.qkv(x).chunk(3, dim=-1)
        inputs = activation_codes(self.input_quantizer, x)
        return self.query(inputs), self.key(inputs), self.value(inputs)


class IntFeedForward(FeedForward):
    """Feed-forward whose inner activation stays in 8 bits if ranges and kernel allow it.

    Otherwise it is in float32, the largest tensor of the model: a CPU then works on PIECE tokens at a time and reuses
    their memory (1.5 times as fast on 32 x 64 tokens, with the same bits).
    """

    PIECE = 512

    def __init__(self, ffn: FeedForward):
        adopt(self, ffn)
        self.up.pass_codes(self.down.act_quantizer, "gelu")
        self.in_pieces = self.down.act_quantizer.per_token

    def forward(self, x: Tensor) -> Tensor:
        if self.in_pieces and not (x.is_cuda or torch.compiler.is_compiling()) and x.shape[:-1].numel() > self.PIECE:
            pieces = x.flatten(0, -2).split(self.PIECE)
            return torch.cat([super(IntFeedForward, self).forward(p) for p in pieces]).view_as(x)
        return super().forward(x)

    def expand(self, x: Tensor) -> Tensor | Codes:
        inner = self.up(x)
        return inner if isinstance(inner, Codes) else F.gelu(inner)


def adopt(module: nn.Module, source: nn.Module) -> None:
    """Give a new module everything that one of its base class has."""
    nn.Module.__init__(module)
    vars(module).update(vars(source))


def in_bfloat16(model: Model) -> None:
    """Compute in bfloat16 what stands between the products of an encoder of integers on CUDA: half the bytes. The logits
    are then the student's to two or three digits.
    """
    model.head.register_forward_pre_hook(lambda head, inputs: (inputs[0].float(), *inputs[1:]))
    for module in model.encoder.modules():
        if isinstance(module, (nn.LayerNorm, nn.Embedding, nn.Linear, MergedTable)):
            module.bfloat16()
        elif isinstance(module, (IntLinear, IntEmbedding)):
            module.floats = torch.bfloat16


@torch.no_grad()
def to_integer(student: Model, config: QuantConfig, device: str | torch.device = "cpu", kernel: str = "auto") -> Model:
    """The integer model of a fake-quantized student, in tensors of its own; it gives the same logits."""
    tensors = {name: tensor.clone() for name, tensor in float_tensors(student).items()}
    parts = Checkpoint(student.config, config, weight_codes(student), tensors, notes={}, vocabulary=None)
    return integer_model(parts, device, kernel)


@torch.no_grad()
def integer_model(student: Checkpoint, device: str | torch.device = "cpu", kernel: str = "auto") -> Model:
    """The integer model of the parts of a student.  kernel: a key of KERNELS, or "auto".  Raises UserError if weights or
    activations are not quantized.
    """
    if 32 in (student.quant.weight_bits, student.quant.act_bits):
        raise UserError("integers need quantized weights and activations: --bits and --act-bits 2 to 8")
    if student.config.tt:  # small enough to build its fake-quantized model, which merges the cores
        model = fake_quantized(student)
    else:
        model = meta_model(student.config, student.quant)
        # Not strict: the quantized weights are missing, and their modules are replaced below.
        model.load_state_dict(student.tensors, strict=False, assign=True)
    if any(type(module) in (nn.Linear, TTLinear) for module in model.encoder.modules()):
        raise UserError(f"integers need every Linear layer of the encoder: keep is {student.quant.keep}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantTTLinear))}
    if kernel == "auto":
        quantizers = (m.B_quantizer if isinstance(m, QuantTTLinear) else m.weight_quantizer for m in layers.values())
        kernel = choose_kernel(device, max(-quantizer.quant_min for quantizer in quantizers))

    def linear(*names: str) -> IntLinear:
        """One IntLinear of one QuantLinear, or of several that read the same activation."""
        parts = [student.weights[name + ".weight"] for name in names]
        scales = [part.scale.reshape(-1).expand(len(part.codes)) for part in parts]
        weight = Weight(torch.cat([part.codes for part in parts]), torch.cat(scales))
        bias = torch.cat([layers[name].bias for name in names])
        return IntLinear(weight, bias, layers[names[0]].act_quantizer, kernel, device)

    for i, block in enumerate(model.encoder.layers):
        names = [f"encoder.layers.{i}.attention.{part}" for part in QKV]
        for name in names:
            layers[name].act_quantizer = block.attention.input_quantizer  # which the three share
        dense = all(isinstance(layers[name], QuantLinear) for name in names)
        block.attention = IntAttention(block.attention, linear(*names) if dense else None)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantTTLinear):
            model.set_submodule(name, IntTTLinear(module, kernel, device))
        elif isinstance(module, QuantLinear):
            model.set_submodule(name, linear(name))
        elif isinstance(module, TTMEmbedding):
            model.set_submodule(name, MergedTable(module))
    for block in model.encoder.layers:
        block.ffn = IntFeedForward(block.ffn)
    if WORDS in student.weights:
        model.encoder.embeddings.word = IntEmbedding(student.weights[WORDS])
    return model.to(device).requires_grad_(False).eval()
