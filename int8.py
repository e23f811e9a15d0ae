"""The integer model that is deployed. Its file format is in checkpoint.py.

An activation is x = s_x (q_x - z_x), q_x in 0..255, a weight is w = s_w q_w. A Linear layer is then a product of 8-bit
integers, accumulated in 32 bits, and a correction, quant.rescale:

    y = s_x s_w (sum_k q_x q_w  -  z_x sum_k q_w) + b            s_x, z_x: per token or per tensor

The student computes the same in evaluation, so on CPU both give the same bits, whatever the kernel.

Weights of fewer than 8 bits are unpacked to 8 and multiplied in the same way. Query, key and value are
one product, since they read one activation; a tensor train is merged to two thin matrices and is two
products. Word embeddings are looked up in int8. Norms, softmax, GELU and the head stay in float32
(beside tensor trains the head is quantized, too). With static ranges the feed-forward network stays in
8 bits: the kernel applies GELU to its 32-bit sums and passes 8-bit integers to the next product. Then a CPU with VNNI
spends 67 % of the time on products and 15 % on attention (XLM-R base, 8 x 128 tokens).

Saturation. CPUs with AVX2 or AVX-512 but without VNNI multiply 8 bits with the instruction vpmaddubsw, which adds
*two* products in 16 bits and saturates at 32,767. Full-range operands give 255 * 127 * 2 = 64,770: silently wrong, by
half. With weights in -64..64 the sum is at most 32,640 and every CPU is right. So QuantConfig.grid is part of training
and of the checkpoint: "portable" weights are trained on the grid on which they are multiplied everywhere. A "full"
student (-127..127) is exact on VNNI and CUDA; choose_kernel finds out by trying whether a CPU would saturate, and then
multiplies integers in float32, at float32 speed: exact below 2^24, which typical sums are.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from kit.common import UserError
from model import Attention, FeedForward, Model
from prepare import prepare
from quant import ActQuantizer, Codes, QuantConfig, QuantLinear, quantize, rescale
from tt import QuantTTLinear, TTLinear, TTMEmbedding, lookup

Range = tuple[float, int] | None  # scale and zero point of a uint8 result; None: float32


# --------------------------------------------------------------------------------------- kernels
def activation_codes(quantizer: ActQuantizer, x: Tensor) -> Codes:
    """The integers that the student's quantizer rounds x to, one byte each (uint8), also with fewer than 8 bits.

    The same as quantize(...).to(torch.uint8) in fewer passes over memory, which take the time here.
    """
    scale, zero_point = quantizer.qparams(x)
    if torch.compiler.is_compiling():  # the compiler makes one pass of these, and does not know the other operators
        return Codes(quantize(x, scale, zero_point, 0, quantizer.quant_max).to(torch.uint8), scale, zero_point)
    q, shift = torch.mul(x, scale.reciprocal()), 0
    if quantizer.static and not x.is_cuda:  # there int() would wait
        shift = int(zero_point)
    else:
        q.add_(zero_point)
    if quantizer.quant_max < 255:
        q.clamp_(max=quantizer.quant_max - shift)
    return Codes(round_to_bytes(q, shift), scale, zero_point)


def round_to_bytes(x: Tensor, shift: int) -> Tensor:
    """clamp(round(x + shift), 0, 255), halves to even: uint8. x may be overwritten.

    PyTorch's quantized tensors will be removed (pytorch#184982), but no other operator does this in one pass. Their
    bytes are taken, and the rest is left.
    """
    if x.is_cuda or not quantizes_in_one_pass():
        return to_bytes((x.add_(shift) if shift else x).clamp_(0, 255))
    quantized = torch.quantize_per_tensor(x, 1.0, shift, torch.quint8)
    values = torch.empty(0, dtype=torch.uint8)
    return values.set_(quantized.untyped_storage(), 0, quantized.shape, quantized.stride())


def to_bytes(x: Tensor) -> Tensor:
    """Round numbers in 0..255 in place. Between 2^23 and 2^24 the float32 numbers are the integers: adding this rounds
    a small number to the nearest integer, halves to even, and leaves it in the lowest bits.
    """
    return x.add_(1.5 * 2**23).contiguous().view(torch.uint8)[..., ::4].contiguous()


@cache
def quantizes_in_one_pass() -> bool:
    """Whether this PyTorch has the operator of round_to_bytes, and adds before it rounds, which not all builds do."""
    x = torch.tensor([-1e30, -0.5, 0.5, 1.5, 2.5, 253.6, 1e30] * 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it will be removed
        try:
            found = torch.quantize_per_tensor(x, 1.0, 1, torch.quint8).int_repr()
        except (AttributeError, RuntimeError):
            return False
    return torch.equal(found, to_bytes((x + 1).clamp(0, 255)))


# A kernel packs an int8 matrix (N, K) once and multiplies uint8 activations (M, K) by it many times: sums(q_x) = sum_k
# (q_x - offset) q_w, float32 (M, N). A `fused` kernel computes a whole layer in one call if the activation's range is
# static: see OneDNNKernel.
class FloatKernel:
    """Integers multiplied in float32, whose sums are exact below 2^24 and rounded in the seventh digit above; or in
    float64, where every sum is exact ("reference").
    """

    offset, fused = 0, False

    def __init__(self, weight: Tensor, dtype: torch.dtype = torch.float32):
        self.weight = weight.to(dtype)

    def sums(self, values: Tensor) -> Tensor:
        return F.linear(values.to(self.weight.dtype), self.weight).float()


class OneDNNKernel:
    """oneDNN's u8 x s8 product on CPU. The operator is undocumented, made for PyTorch's compiler: choose_kernel tries
    it before it is used.
    """

    offset, fused = 0, True

    def __init__(self, weight: Tensor):
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self.ones = torch.ones(len(weight))
        self.zero_points = torch.zeros(len(weight), dtype=torch.int32)

    def __reduce__(self) -> tuple:
        """A copy, or a kernel in another process, packs the weight again."""
        return OneDNNKernel, (self.weight.to_dense().t().contiguous(),)

    def sums(self, values: Tensor) -> Tensor:
        return self.layer(values, 0, self.ones, None)

    def layer(
        self, values: Tensor, zero_point: int, scale: Tensor, bias: Tensor | None, post: str = "none", out: Range = None
    ) -> Tensor:
        """post(scale * sum_k (q_x - zero_point) q_w + bias) in one call; post: "none" or "gelu".

        scale: s_x s_w (N). oneDNN could multiply by s_x, but in an order that depends on the CPU.
        """
        out_scale, out_zero_point = out or (1.0, 0)
        return torch.ops.onednn.qlinear_pointwise(
            values, 1.0, zero_point, self.weight, scale, self.zero_points, bias,
            out_scale, out_zero_point, torch.uint8 if out else torch.float32, post, [], "none",
        )  # fmt: skip


class CudaKernel:
    """cuBLAS's s8 x s8 product, torch._int_mm, with activations shifted by 128 to be signed.

    It requires M > 16 and K, N in multiples of 8: operands are padded with zeros.
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
    "reference": partial(FloatKernel, dtype=torch.float64),
    "float": FloatKernel,
    "onednn": OneDNNKernel,
    "cuda": CudaKernel,
}


@cache
def is_exact(kernel: str, largest: int) -> bool:
    """Whether a CPU kernel computes the largest products of a grid exactly: found out by trying."""
    weight = torch.full((32, 256), largest, dtype=torch.int8)
    weight[1::2] = -largest
    values = torch.full((17, 256), 255, dtype=torch.uint8)
    try:
        found = KERNELS[kernel](weight).sums(values)
    except (RuntimeError, AttributeError):  # not built for this machine
        return False
    return torch.equal(found, KERNELS["reference"](weight).sums(values))


def choose_kernel(device: str, largest: int) -> str:
    """The fastest kernel that is exact for weights up to `largest`."""
    if torch.device(device).type == "cuda":
        return "cuda"
    return "onednn" if is_exact("onednn", largest) else "float"


class IntLinear(nn.Module):
    """A Linear layer in integers, for x float32 or Codes: (..., K) -> (..., N)."""

    def __init__(self, weight: checkpoint.Weight, bias: Tensor | None, act: ActQuantizer, kernel: str, device: str):
        super().__init__()
        codes, N = weight.codes.to(device), len(weight.codes)
        self.act_quantizer, self.kernel = act, KERNELS[kernel](codes)
        self.register_buffer("bias", None if bias is None else bias.to(device))
        self.register_buffer("column", codes.sum(dim=1, dtype=torch.float32))
        self.register_buffer("scale", weight.scale.to(device).flatten().expand(N).contiguous())
        self.constants = None  # s_x s_w and z_x of a static range
        if act.static:
            scale, zero_point = act.static_range()
            self.constants = scale.to(device) * self.scale, int(zero_point)

    def codes(self, x: Tensor | Codes) -> Codes:
        return x if isinstance(x, Codes) else activation_codes(self.act_quantizer, x)

    def forward(self, x: Tensor | Codes) -> Tensor:
        x = self.codes(x)
        if self.kernel.fused and not x.scale.dim():  # per tensor
            return self.fused(x)
        sums = self.kernel.sums(x.values.flatten(0, -2)).view(*x.values.shape[:-1], -1)
        if self.kernel.offset:
            x = x._replace(zero_point=x.zero_point - self.kernel.offset)
        return rescale(sums, self.column, x, self.scale, self.bias)

    def fused(self, x: Codes, post: str = "none", out: Range = None) -> Tensor:
        """post(the layer) in one call of the kernel."""
        scale, zero_point = self.constants or (x.scale * self.scale, int(x.zero_point))
        y = self.kernel.layer(x.values.flatten(0, -2), zero_point, scale, self.bias, post, out)
        return y.view(*x.values.shape[:-1], -1)


def act_of(model: nn.Module, name: str) -> ActQuantizer:
    """The quantizer of a layer's input: its own, or for query, key and value that of the attention."""
    own = model.get_submodule(name).act_quantizer
    if isinstance(own, ActQuantizer):
        return own
    return model.get_submodule(name.rpartition(".")[0]).input_quantizer


def uint8_output_range(kernel: FloatKernel | OneDNNKernel, act: ActQuantizer) -> Range:
    """What a kernel needs to pass its result on in 8 bits; None if it can't."""
    if kernel.fused and act.static and act.quant_max == 255:
        scale, zero_point = act.static_range()
        return float(scale), int(zero_point)
    return None


class IntTTLinear(nn.Module):
    """A tensor train merged to A (r, K) and B (N, r), two integer layers: (..., K) -> (..., N).

    Called like an IntLinear. With static ranges the activation between the two stays in 8 bits.

    A call of an integer kernel takes some 40 microseconds, twice the time in which float32 multiplies a few tokens by a
    thin matrix. So with static ranges, integers of up to FEW tokens are multiplied in float32.
    """

    FEW = 64

    def __init__(self, layer: QuantTTLinear, act: ActQuantizer, kernel: str, device: str):
        super().__init__()
        merged = zip(layer.halves(), (layer.A_quantizer, layer.B_quantizer), strict=True)
        A, B = (checkpoint.weight_of(quantizer, half) for half, quantizer in merged)
        self.A = IntLinear(A, None, act, kernel, device)
        self.B = IntLinear(B, layer.bias, layer.middle_quantizer, kernel, device)
        self.act_quantizer, self.middle_quantizer, self.kernel = act, layer.middle_quantizer, self.B.kernel
        self.inner = uint8_output_range(self.A.kernel, layer.middle_quantizer)
        self.small = None
        if act.static and layer.middle_quantizer.static:
            one, two = (A, None, act), (B, layer.bias, layer.middle_quantizer)
            self.small = nn.ModuleList(IntLinear(*arguments, "float", device) for arguments in (one, two))

    def is_small(self, x: Tensor) -> bool:
        return self.small is not None and not x.is_cuda and x.shape[:-1].numel() <= self.FEW

    def codes(self, x: Tensor | Codes) -> Codes:
        if isinstance(x, Codes):
            return x
        return self.act_quantizer(x) if self.is_small(x) else self.A.codes(x)

    def middle(self, x: Tensor | Codes) -> Tensor | Codes:
        if self.inner is None:
            return self.A(x)
        values = self.A.fused(self.A.codes(x), out=self.inner)
        return Codes(values, *self.B.act_quantizer.static_range())

    def forward(self, x: Tensor | Codes) -> Tensor:
        x = self.codes(x)
        if self.is_small(x.values):
            return self.small[1](self.middle_quantizer(self.small[0](x)))
        return self.B(self.middle(x))

    def fused(self, x: Codes, post: str, out: Range) -> Tensor:
        return self.B.fused(self.B.codes(self.middle(x)), post, out)


class MergedTable(nn.Module):
    """A tensor-train table with its cores merged to two halves once: (B, T) -> (B, T, C)."""

    def __init__(self, table: TTMEmbedding):
        super().__init__()
        self.num_embeddings = table.num_embeddings
        self.left, self.right = (nn.Buffer(half.contiguous()) for half in table.halves())

    def forward(self, ids: Tensor) -> Tensor:
        return lookup(ids, self.left, self.right, self.num_embeddings)


class IntEmbedding(nn.Module):
    """Rows of an int8 table, as float32: (B, T) -> (B, T, C)."""

    def __init__(self, weight: checkpoint.Weight):
        super().__init__()
        self.weight, self.scale = nn.Buffer(weight.codes), nn.Buffer(weight.scale)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float() * F.embedding(ids, self.scale)


class IntAttention(Attention):
    """Attention whose query, key and value come from one product, or from layers that read the same integers."""

    def __init__(self, attention: Attention, qkv: IntLinear | None = None):
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)  # all of its parts
        if qkv is not None:
            del self.query, self.key, self.value
        self.qkv = qkv

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is not None:
            return self.qkv(x).chunk(3, dim=-1)
        inputs = self.query.codes(x)
        return self.query(inputs), self.key(inputs), self.value(inputs)


class IntFeedForward(FeedForward):
    """Feed-forward whose inner activation stays in 8 bits if ranges and kernel allow it.

    Otherwise it is in float32, the largest tensor of the model: a CPU then works on PIECE tokens at a time and reuses
    their memory (1.5 times as fast on 32 x 64 tokens, with the same bits).
    """

    PIECE = 512

    def __init__(self, ffn: FeedForward):
        nn.Module.__init__(self)
        self.up, self.down, self.norm, self.dropout = ffn.up, ffn.down, ffn.norm, ffn.dropout
        inner = ffn.down.act_quantizer
        self.inner = uint8_output_range(ffn.up.kernel, inner)
        self.in_pieces = self.inner is None and inner.per_token

    def forward(self, x: Tensor) -> Tensor:
        if self.in_pieces and not (x.is_cuda or torch.compiler.is_compiling()) and x.shape[:-1].numel() > self.PIECE:
            pieces = x.flatten(0, -2).split(self.PIECE)
            return torch.cat([super(IntFeedForward, self).forward(p) for p in pieces]).view_as(x)
        return super().forward(x)

    def expand(self, x: Tensor) -> Tensor | Codes:
        if self.inner is None or (isinstance(self.up, IntTTLinear) and self.up.is_small(x)):
            return super().expand(x)
        values = self.up.fused(self.up.codes(x), "gelu", self.inner)
        return Codes(values, *self.down.act_quantizer.static_range())


def compiled(model: Model) -> Callable:
    """An integer model through torch.compile, faster with few tokens: (ids, mask) -> (logits, taps).

    It needs a C++ compiler, static ranges or ranges per token, and a minute (again for other lengths, and for batches).
    Its loops add in another order, so activations halfway between two integers may round to the other one: the logits
    are not the student's bit for bit.
    """
    program = torch.compile(model)

    def run(*inputs: Tensor) -> tuple:
        # oneDNN's weights must be constants ("freezing"); no Python between operators ("cpp_wrapper")
        with torch.no_grad(), torch._inductor.config.patch(freezing=True, cpp_wrapper=True):
            return program(*inputs)

    return run


@torch.no_grad()
def to_integer(student: Model, config: QuantConfig, device: str | torch.device = "cpu", kernel: str = "auto") -> Model:
    """The integer model of a fake-quantized student; it gives the same logits."""
    weights, tensors = checkpoint.weight_codes(student), checkpoint.float_tensors(student)
    parts = checkpoint.Student(student.config, config, weights, tensors, notes={}, vocabulary=None)
    return integer_model(parts, device, kernel)


@torch.no_grad()
def integer_model(student: checkpoint.Student, device: str | torch.device = "cpu", kernel: str = "auto") -> Model:
    """The integer model of the parts of a student.  kernel: a key of KERNELS, or "auto".

    Raises UserError if weights or activations are not quantized.
    """
    config, quant, weights, tensors = student.config, student.quant, student.weights, student.tensors
    if quant.weight_bits == 32 or quant.act_bits == 32:
        raise UserError("integers need quantized weights and activations: --bits and --act-bits 2 to 8")
    if config.tt:
        return integer_trains(student, device, kernel)
    if quant.keep != QuantConfig.keep:
        raise UserError(f"integers need every Linear layer of the encoder: keep is {quant.keep}")
    with torch.device("meta"):
        model = Model(config)
        prepare(model, replace(quant, weight_bits=32, weights="uniform", weight_range="minmax"))
    largest = max(int(w.codes.abs().max()) for name, w in weights.items() if name != checkpoint.WORDS)
    kernel = choose_kernel(device, largest) if kernel == "auto" else kernel

    # Not strict: the quantized weights are missing, and their modules are replaced below.
    model.load_state_dict({name: tensor.to(device) for name, tensor in tensors.items()}, strict=False, assign=True)

    def linear(*names: str) -> IntLinear:
        """One IntLinear of one QuantLinear, or of several that read the same activation."""
        parts = [weights[name + ".weight"] for name in names]
        scales = [part.scale.reshape(-1).expand(len(part.codes)) for part in parts]
        whole = checkpoint.Weight(torch.cat([part.codes for part in parts]), torch.cat(scales))
        bias = torch.cat([tensors[name + ".bias"] for name in names])
        return IntLinear(whole, bias, act_of(model, names[0]), kernel, device)

    model.encoder.embeddings.word = IntEmbedding(weights[checkpoint.WORDS]).to(device)
    for i, layer in enumerate(model.encoder.layers):
        at = f"encoder.layers.{i}."
        qkv = linear(*(f"{at}attention.{name}" for name in ("query", "key", "value")))
        layer.attention.output = linear(f"{at}attention.output")
        layer.attention = IntAttention(layer.attention, qkv)
        layer.ffn.up, layer.ffn.down = linear(f"{at}ffn.up"), linear(f"{at}ffn.down")
        layer.ffn = IntFeedForward(layer.ffn)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def integer_trains(student: checkpoint.Student, device: str | torch.device, kernel: str) -> Model:
    """integer_model for tensor trains, which are small enough to go through the fake-quantized model."""
    model = checkpoint.float_model(student)
    if any(type(module) in (nn.Linear, TTLinear) for module in model.encoder.modules()):
        raise UserError(f"integers need every Linear layer of the encoder: keep is {student.quant.keep}")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantTTLinear))}
    if kernel == "auto":
        quantizers = (getattr(m, "B_quantizer", None) or m.weight_quantizer for m in linears.values())
        kernel = choose_kernel(device, max(quantizer.quant_max for quantizer in quantizers))
    for name, linear in linears.items():
        act = act_of(model, name)
        if isinstance(linear, QuantTTLinear):
            new = IntTTLinear(linear, act, kernel, device)
        else:
            weight = checkpoint.weight_of(linear.weight_quantizer, linear.weight)
            new = IntLinear(weight, linear.bias, act, kernel, device)
        model.set_submodule(name, new)
    for name, table in [(n, m) for n, m in model.named_modules() if isinstance(m, TTMEmbedding)]:
        model.set_submodule(name, MergedTable(table))
    if checkpoint.WORDS in student.weights:
        model.encoder.embeddings.word = IntEmbedding(student.weights[checkpoint.WORDS])
    for layer in model.encoder.layers:
        layer.attention = IntAttention(layer.attention)
        layer.ffn = IntFeedForward(layer.ffn)
    return model.to(device).requires_grad_(False).eval()
