"""Integer models whose layers are compiled programs: faster with few tokens on a CPU, and on a GPU at all. Needs a C++
compiler.

All layers compute the same with other numbers, so one is compiled, for all lengths and batches. On a CPU PyTorch's
AOTInductor makes a program of it, which is loaded once per layer, with the tensors of that layer. It is kept in PyTorch's
folder for compiled code (TORCHINDUCTOR_CACHE_DIR): it is machine code, which should not come with a student, who may be a
stranger's. Its name tells what it was made of, and it is compared with its layer before it is used.

Compiled loops add in another order, so activations halfway between two integers may round to the other one: the logits
are not the student's bit for bit. On CUDA, moreover, what stands between products is in bfloat16.
"""

import glob
import hashlib
import io
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from int8 import OneDNNKernel, in_bfloat16
from kit.common import UserError, cpuinfo
from kit.files import atomic_write
from model import Layer, Model, Taps

Run = Callable[[Tensor, Tensor, Taps], Tensor]


class Program(nn.Module):
    """A layer and its program, which has the layer's tensors and leaves to it what it can't do: taps, single tokens."""

    def __init__(self, layer: Layer, run: Run | None = None):
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, x: Tensor, key_mask: Tensor | None, taps: Taps) -> Tensor:
        if self.run is None or {*taps} - {"hidden"} or x.shape[1] == 1:
            return self.layer(x, key_mask, taps)
        shape = len(x), 1, 1, x.shape[1]
        mask = x.new_ones(shape, dtype=torch.bool) if key_mask is None else key_mask.expand(shape)
        return self.run(x.contiguous(), mask.contiguous(), {})  # a program does not check it


def has_compiler(device: torch.device) -> bool:
    """Whether there is what compile_layers needs: a C++ compiler with Python's headers; on CUDA also Triton."""
    headers = os.path.isfile(os.path.join(sysconfig.get_path("include"), "Python.h"))
    found = headers and shutil.which(os.environ.get("CXX", "g++")) is not None
    return found and (device.type != "cuda" or torch.utils._triton.has_triton())


@torch.no_grad()
def compile_layers(model: Model) -> Model:
    """Replace the layers of an integer model by programs, and return it. The first time it takes half a minute.

    Raises UserError where there is no compiler.
    """
    layers, device = list(model.encoder.layers), next(model.parameters()).device
    if not has_compiler(device):
        raise UserError("compiling needs a C++ compiler and Python's headers, on a GPU also Triton")
    if device.type == "cuda":
        in_bfloat16(model)
        how = dict(mode="max-autotune-no-cudagraphs", dynamic=True)  # Triton's products, with the passes around them
        programs = [Program(layer, torch.compile(Program(layer), **how)) for layer in layers]
    else:
        path = program_path(layers[0].eval())
        if not os.path.isfile(path):
            print("compiling a layer, once for all students of this shape ...", file=sys.stderr)
            compile_layer(layers[0], path)
        programs = [Program(layer, load_program(layer, path)) for layer in layers]
    model.encoder.layers = nn.ModuleList(programs)
    return model


def program_path(layer: Layer) -> str:
    """Named after what a program is made of: the code, PyTorch, this processor, and the layer but its numbers."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    made_of = [torch.__version__, cpuinfo("flags"), torch.backends.cpu.get_cpu_capability()]
    made_of += [Path(name).read_bytes() for name in sorted(glob.glob(os.path.join(os.path.dirname(__file__), "*.py")))]
    for name, part in layer.named_modules(remove_duplicate=False):
        settings = {key: value for key, value in vars(part).items() if isinstance(value, (int, float, str))}
        made_of += [name, type(part).__name__, settings]
    made_of += [(name, tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()]
    return os.path.join(cache_dir(), "sdq", hashlib.sha256(repr(made_of).encode()).hexdigest()[:16] + ".pt2")


def compile_layer(layer: Layer, path: str) -> None:
    """Write the program of all layers like this one. It holds this one's tensors, which others replace.

    Raises UserError if a number of this layer has become part of the code.
    """
    import torch.fx.experimental._config as shapes

    batch, length = torch.export.Dim("batch", min=1, max=2**16), torch.export.Dim("length", min=2, max=2**16)
    sizes, x, mask = ({0: batch, 1: length}, {0: batch, 3: length}, {}), *example(layer, 40)
    how = {"always_keep_tensor_constants": True, "joint_graph_constant_folding": False, "cpp.dynamic_threads": True}
    program = io.BytesIO()
    with shapes.patch(backed_size_oblivious=True):  # a batch of one is like others
        exported = torch.export.export(Program(layer), (x, mask, {}), dynamic_shapes=sizes)
        torch._inductor.aoti_compile_and_package(exported, package_path=program, inductor_configs=how)
    tensors = exported.graph_signature.inputs_to_parameters | exported.graph_signature.inputs_to_buffers
    used = {tensors[node.name] for node in exported.graph.nodes if node.name in tensors and node.users}
    if used - {*torch._inductor.aoti_load_package(program).get_constant_fqns()}:
        raise UserError(f"PyTorch {torch.__version__} compiles numbers of a layer into its program: not --compiled")
    with atomic_write(path, temporary=f"{path}.{os.getpid()}") as file:
        file.write(program.getvalue())


def load_program(layer: Layer, path: str) -> Run:
    """The program with the tensors of a layer. Raises UserError if it is not one of this layer."""
    attention, ffn, (x, mask) = layer.attention, layer.ffn, example(layer, 9)
    inputs = (attention.query, attention.key, attention.value) if attention.qkv is None else (attention.qkv,)
    parts = [part for product in (*inputs, attention.output, ffn.up, ffn.down) for part in product.modules()]
    packed = [part.weight for part in parts if isinstance(part, OneDNNKernel)]  # in the order of their use
    tensors = {f"_tensor_constant{i}": weight for i, weight in enumerate(packed)}
    tensors |= {"layer." + name: tensor for name, tensor in layer.state_dict().items()}
    expected = layer(x, mask, {})
    try:
        package = torch._inductor.aoti_load_package(path)
        names = {*package.get_constant_fqns()} - {"x_scale", "x_zp"}  # 1 and 0, see OneDNNKernel.layer
        given = {name: tensors[name] for name in names}
        package.load_constants(given, check_full_update=False, user_managed=True)
        close = (package(x, mask, {}) - expected).norm() < 0.1 * expected.norm()  # some integers are the neighbours
    except (RuntimeError, KeyError):
        close = False
    if not close:
        raise UserError(f"{path} does not compute what its layer does: delete it")
    return package


def example(layer: Layer, tokens: int) -> tuple[Tensor, Tensor]:
    """Input (2, T, C) and mask (2, 1, 1, T) of a layer."""
    x = torch.randn(2, tokens, layer.ffn.norm.normalized_shape[0], generator=torch.Generator().manual_seed(0))
    return x, (torch.arange(tokens) < torch.tensor([[tokens], [tokens - 2]]))[:, None, None]
