"""Backends that bench.py compares: ours and other libraries', where these are installed.

`write_files` saves one model with random weights in the file of each backend, and `load_backend` loads a backend from
its file alone, as its user would. So a process of its own can measure memory:

    python tools/backends.py BACKEND FOLDER ROWS TOKENS    # prints the peak in bytes (Linux)

int8 is "dynamic" if activation ranges are found at run time, "static" if calibration set them.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import opt_einsum
from torch.utils.flop_counter import FlopCounterMode

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import checkpoint
from aot import compile_layers, has_compiler
from convert import CONFIG_NAMES, key_table
from data.batches import IGNORE, Batch
from int8 import IntLinear, MergedTable, choose_kernel, integer_model, to_integer
from kit.common import multiplies_bf16
from model import Model, ModelConfig, build_model, initialize
from prepare import calibrate, prepare
from quant import ActQuantizer, QuantConfig, UniformQuantizer, choose_qparams
from tt import TTConfig, TTLinear, TTMEmbedding

Runner = Callable[[Tensor, Tensor | None], Tensor]  # (ids, mask) -> logits

HUGGING_FACE = ("transformers", "safetensors")
BACKENDS = {  # name -> (its file, the packages that it needs). The first one that is available is the baseline.
    "Hugging Face fp32": ("hugging-face/model.safetensors", HUGGING_FACE),
    "Hugging Face bf16": ("hugging-face/model.safetensors", HUGGING_FACE),
    "fp32": ("fp32.safetensors", ()),
    "bf16": ("fp32.safetensors", ()),
    "fake-quantized": ("dynamic.safetensors", ()),
    "int8 dynamic": ("dynamic.safetensors", ()),
    "int8 static": ("static.safetensors", ()),
    "int8 dynamic compiled": ("dynamic.safetensors", ()),
    "int8 static compiled": ("static.safetensors", ()),
    "torch.ao int8 dynamic": ("hugging-face/torch-ao.pt", HUGGING_FACE),
    "ONNX Runtime int8 dynamic": ("int8.onnx", ("onnx", "onnxruntime")),
    "OpenVINO": ("openvino.bin", ("openvino",)),
    "OpenVINO int8 static": ("openvino-int8.bin", ("openvino", "nncf")),
}
ATIS_INTENTS, ATIS_SLOTS, ATIS_SENTENCES = 21, 120, 4478  # of the training set
NO_TOKENIZER = b"x"  # these models never see text
TT_INTEGER = {  # backend of tensor trains -> bits of the cores, ranges of the activations
    "TT W8A8 dynamic": (8, "dynamic"),
    "TT W8A8 static": (8, "static"),
    "TT W4A8 static": (4, "static"),
    "TT W2A8 static": (2, "static"),
}
TT_TOKENIZER = b"x" * 4500  # as long as ATIS's list of words, which every file contains


def available_backends(device: torch.device) -> tuple[str, ...]:
    """The backends that can run here; prints what is missing for the others. Other libraries' int8 has no CUDA
    kernels.
    """
    names = []
    for name, (_, packages) in BACKENDS.items():
        missing = [package for package in packages if not is_installed(package)]
        cpu_only = packages and not name.startswith("Hugging Face")
        if name == "bf16" and not multiplies_bf16(device):
            print(f"{name}: not measured, this processor does not multiply it")
        elif name.startswith("torch.ao") and not has_torch_ao():
            print(f"{name}: not measured, this PyTorch has no kernels for it")
        elif name.endswith("compiled") and not has_compiler(device):
            print(f"{name}: not measured, no C++ compiler with Python's headers, or no Triton for a GPU")
        elif missing:
            print(f"{name}: not measured, {' and '.join(missing)} not installed")
        elif not (cpu_only and device.type == "cuda"):
            names.append(name)
    return tuple(names)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def path_of(name: str, folder: str) -> str:
    return os.path.join(folder, BACKENDS[name][0])


# ------------------------------------------------------------------------------- shapes and inputs
def encoder_config(args: Namespace) -> ModelConfig:
    """The encoder that bench.py's options describe, with a sequence head of three labels."""
    sizes = dict(hidden_size=args.hidden, num_layers=args.layers, num_heads=args.hidden // 64, ffn_size=4 * args.hidden)
    tokens = max(512, args.tokens)
    return checkpoint.check_config(ModelConfig(args.vocab, **sizes, max_tokens=tokens, head="sequence", num_labels=3))


def joint_configs(args: Namespace) -> tuple[ModelConfig, ModelConfig]:
    """The model for ATIS's intents and slots: dense, and as tensor trains."""
    dense = replace(encoder_config(args), head="joint", num_labels=ATIS_INTENTS, num_slots=ATIS_SLOTS)
    return dense, replace(dense, tt=TTConfig(args.rank))


def random_sequences(rows: int, tokens: int, vocab_size: int) -> Tensor:
    """Random ids (rows, tokens) without padding, the same at every call."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(4, vocab_size - 1, (rows, tokens), generator=generator)


def random_batches(args: Namespace, device: torch.device, labels: int, slots: int = 0) -> list[Batch]:
    """Four training batches of similar lengths: some rows are a little shorter, so there is a mask.

    args: options of bench.py.  slots: how many tags there are; every token but the first gets one. 0: no tags.
    """
    batches, size = [], (args.batch_size, args.tokens)
    for _ in range(4):
        ids = torch.randint(4, args.vocab - 1, size)
        lengths = torch.randint(max(1, args.tokens - 4), args.tokens + 1, (args.batch_size, 1))
        mask = torch.arange(args.tokens) < lengths
        ids = ids.masked_fill(~mask, 1)
        classes, tags = torch.randint(labels, (args.batch_size,)), None
        if slots:
            tags = torch.randint(slots, size).masked_fill(~mask, IGNORE)
            tags[:, 0] = IGNORE
        batches.append(Batch(ids, mask, classes, int(mask.sum()), tags).to(device))
    return batches


def quantized_copy(model: Model, quant: QuantConfig, ids: Tensor) -> Model:
    """A fake-quantized copy of a model; static ranges are calibrated on ids (B, T)."""
    student = copy.deepcopy(model)
    prepare(student, quant)
    if quant.act_range == "static":
        calibrate(student, [(ids, None)])
    return student


# ------------------------------------------------------------------------------------------ files
def write_files(config: ModelConfig, folder: str, names: tuple[str, ...]) -> None:
    """Save one model with random weights as our backends' files and the others' in `names`."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    checkpoint.save_model(path_of("fp32", folder), model, NO_TOKENIZER, {})
    if "Hugging Face fp32" in names:
        write_hugging_face(model, folder, names)
    if "ONNX Runtime int8 dynamic" in names:
        write_onnx(model, path_of("ONNX Runtime int8 dynamic", folder))
    ids = random_sequences(8, min(128, config.max_tokens), config.vocab_size)  # for calibration
    texts = [Batch(row[None], None, torch.zeros(1), len(row)) for row in ids]
    for name, batches in {"OpenVINO": None, "OpenVINO int8 static": texts}.items():
        if name in names:
            write_openvino(model, path_of(name, folder), batches)
    for act_range in ("dynamic", "static"):
        quant = QuantConfig(act_range=act_range)
        student = quantized_copy(model, quant, ids)
        checkpoint.save_student(path_of(f"int8 {act_range}", folder), student, quant, NO_TOKENIZER, {})


def write_hugging_face(model: Model, folder: str, names: tuple[str, ...]) -> None:
    """Save the weights as a Hugging Face model, and as int8 for torch.ao."""
    import transformers

    config = model.config
    settings = {theirs: getattr(config, our) for our, theirs in CONFIG_NAMES.items()}
    settings |= {"max_position_embeddings": config.max_tokens + config.position_offset}
    shape = transformers.XLMRobertaConfig(**settings, num_labels=config.num_labels)
    reference = transformers.XLMRobertaForSequenceClassification(shape).eval()
    ours, theirs = model.state_dict(), {}
    for source, target in key_table(config):
        prefix = "" if source.startswith("classifier") else "roberta."
        theirs[prefix + source] = ours[target]
    reference.load_state_dict(theirs)
    reference.save_pretrained(os.path.join(folder, "hugging-face"))
    if "torch.ao int8 dynamic" in names:
        torch.save(torch_ao(reference).state_dict(), path_of("torch.ao int8 dynamic", folder))


class Exportable(nn.Module):
    """A copy of our float32 model with plain tensors as inputs and output, as ONNX and OpenVINO want it."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = copy.deepcopy(model)
        words = model.encoder.embeddings.word.weight.detach()
        self.model.encoder.embeddings.word = nn.Embedding.from_pretrained(words)  # no search for distinct ids
        self.eval()  # this module too: the exporter returns all to its mode

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, mask.bool())[0]


def write_onnx(model: Model, path: str) -> None:
    """Export to ONNX and quantize: weights per channel and in advance, activations per tensor while it runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole, ids, free = path + ".fp32", torch.full((2, 16), 5), {0: "rows", 1: "tokens"}
    names = dict(input_names=["ids", "mask"], output_names=["logits"], dynamic_axes={"ids": free, "mask": free})
    with warnings.catch_warnings():  # this exporter is deprecated; the new one's file is rejected
        warnings.simplefilter("ignore")
        torch.onnx.export(Exportable(model), (ids, torch.ones_like(ids)), whole, dynamo=False, **names)
        # 7-bit weights: with 8 its kernels saturate on CPUs without VNNI, and the logits are wrong.
        quantize_dynamic(whole, path, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    os.unlink(whole)


def write_openvino(model: Model, path: str, calibration: Iterable[Batch] | None) -> None:
    """Convert to OpenVINO and quantize after training (NNCF, its settings for Transformers): weights per channel,
    activations per tensor with ranges from the calibration batches, which have no padding. None: floats.

    path: of the weights, NAME.bin. The description of the model is NAME.xml.
    """
    import openvino

    ids = torch.full((2, 16), 5)
    converted = openvino.convert_model(Exportable(model), example_input=(ids, torch.ones_like(ids)))
    if calibration is not None:
        import nncf

        dataset = nncf.Dataset([arrays(batch.ids, batch.mask) for batch in calibration])
        converted = nncf.quantize(converted, dataset, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(converted, path.removesuffix(".bin") + ".xml")


def has_torch_ao() -> bool:
    """Whether this build of PyTorch has kernels for its own dynamic quantization."""
    return torch.backends.quantized.engine not in (None, "none")


def torch_ao(reference: nn.Module) -> nn.Module:
    """A copy whose Linear layers are quantized by PyTorch."""
    with warnings.catch_warnings():  # deprecated
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(reference, {nn.Linear}, torch.qint8)


# ---------------------------------------------------------------------------------------- loading
def load_backend(name: str, folder: str, device: torch.device) -> Runner:
    """A backend, loaded from its file and ready to run."""
    path = path_of(name, folder)
    if name == "ONNX Runtime int8 dynamic":
        return load_onnx(path)
    if name.startswith("OpenVINO"):
        return load_openvino(path)
    if BACKENDS[name][1]:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        kind = transformers.XLMRobertaForSequenceClassification
        reference = kind.from_pretrained(os.path.dirname(path)).eval().to(device)
        if name == "torch.ao int8 dynamic":
            reference = torch_ao(reference)
        if name == "Hugging Face bf16":
            reference = reference.bfloat16()
        return lambda ids, mask: reference(ids, attention_mask=mask).logits
    if name in ("fp32", "bf16"):
        model = checkpoint.load_model(path).to(device, torch.float32 if name == "fp32" else torch.bfloat16)
    elif name == "fake-quantized":
        model = checkpoint.fake_quantized(checkpoint.read_student(path)).to(device)
    else:
        model = integer_model(checkpoint.read_student(path), device)
    if name.endswith("compiled"):
        compile_layers(model)
    return lambda ids, mask: model(ids, mask)[0]


def errors_of(runners: dict[str, Runner], ids: Tensor) -> dict[str, float]:
    """Distance of each backend's logits from those of our fp32 model, relative to their norm."""
    logits = {name: run(ids, None).double().cpu() for name, run in runners.items()}
    return {name: relative_error(found, logits["fp32"]) for name, found in logits.items()}


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def arrays(ids: Tensor, mask: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of an Exportable for other libraries."""
    mask = torch.ones_like(ids) if mask is None else mask.long()
    return ids.numpy(), mask.numpy()


def load_onnx(path: str) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(ids: Tensor, mask: Tensor | None) -> Tensor:
        return torch.from_numpy(session.run(None, dict(zip(("ids", "mask"), arrays(ids, mask), strict=True)))[0])

    return run


def load_openvino(path: str) -> Runner:
    import openvino

    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    program = openvino.compile_model(path.removesuffix(".bin") + ".xml", "CPU", options)
    return lambda ids, mask: torch.from_numpy(program(arrays(ids, mask))[0])


# ----------------------------------------------------------------------------------------- memory
def peak_memory(name: str, folder: str, rows: int, tokens: int, device: torch.device) -> int | None:
    """Bytes at the peak while a backend runs one batch: on CUDA of all tensors, on CPU of a fresh process that also
    loads the backend; None where the system does not report it.
    """
    if device.type == "cuda":
        run, ids = load_backend(name, folder, device), torch.full((rows, tokens), 5, device=device)
        run(ids, None)  # may compile
        torch.cuda.reset_peak_memory_stats()
        run(ids, None)
        return torch.cuda.max_memory_allocated()
    if name.endswith("compiled"):
        load_backend(name, folder, device)  # so that the process does not compile, which takes memory
    command = [sys.executable, os.path.abspath(__file__), name, folder, str(rows), str(tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_this_process() -> int | None:
    """On Linux; getrusage would start at the peak of the parent process."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def saved_bytes(model: nn.Module, step: Callable[[], object]) -> int:
    """Bytes that a training step keeps for its backward pass, at the end of the forward pass. A storage is counted
    once; parameters are not counted.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # keeps the storages alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(storage.nbytes() for storage in kept.values())


def state_bytes(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of the parameters, gradients and optimizer states after a training step."""
    tensors = [t for p in model.parameters() for t in (p.detach(), p.grad) if t is not None]
    for optimizer in optimizers:
        tensors += [value for entry in optimizer.state.values() for value in entry.values()]
    return sum(map(tensor_bytes, filter(torch.is_tensor, tensors)))


def tensor_bytes(tensor: Tensor) -> int:
    parts = (tensor.coalesce().values(), tensor.coalesce().indices()) if tensor.is_sparse else (tensor,)
    return sum(part.nbytes for part in parts)


# ------------------------------------------------------------------------ models of tensor trains
def tt_models(
    dense: ModelConfig, trains: ModelConfig, tokens: int, device: torch.device
) -> dict[str, tuple[Callable, int]]:
    """name -> (model with random weights, bytes of its file): dense, tensor trains, and these as integers. Static
    ranges are calibrated on 32 sequences.
    """
    dense_model, model = (initialize(checkpoint.meta_model(config)).eval() for config in (dense, trains))
    ids = random_sequences(32, tokens, dense.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        size = checkpoint.save_model(path, model, TT_TOKENIZER, {})
        models = {"dense fp32": (dense_model, checkpoint.save_model(path, dense_model, TT_TOKENIZER, {}))}
        models |= {"TT fp32": (model, size), "TT fp32, merged": (merge_cores(model), size)}  # merged after loading
        for name, (bits, act_range) in TT_INTEGER.items():
            quant = QuantConfig(weight_bits=bits, act_range=act_range, keep=())
            student = quantized_copy(model, quant, ids)
            size = checkpoint.save_student(path, student, quant, TT_TOKENIZER, {})
            models[name] = to_integer(student, quant, device), size
    models = {name: (model.to(device), size) for name, (model, size) in models.items()}
    if has_compiler(device):
        static, size = models["TT W8A8 static"]
        models["TT W8A8 static compiled"] = compile_layers(copy.deepcopy(static)), size
    return models


@torch.no_grad()
def merge_cores(model: Model) -> Model:
    """A copy whose layers and tables multiply their cores out to two halves once, not at every call: float32 tensor
    trains as they would be deployed.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, TTLinear):
            A, B = module.halves()
            new = nn.Sequential(nn.Linear(*A.T.shape, bias=False), nn.Linear(*B.T.shape))
            for parameter, value in zip(new.parameters(), (A, B, module.bias), strict=True):
                parameter.copy_(value)
        elif isinstance(module, TTMEmbedding):
            new = MergedTable(module)
        else:
            continue
        model.set_submodule(name, new)
    return model


# -------------------------------------------------------------------------------------- one layer
def linear_layers(M: int, K: int, N: int, device: torch.device) -> tuple[dict[str, Callable[[], Tensor]], Tensor]:
    """({name: a function that applies the same Linear layer K -> N to the same x (M, K)}, its exact result in
    float64).

    "int8 product" leaves out the quantization of x: a bound of what an integer layer can reach.
    """
    generator = torch.Generator().manual_seed(M + K + N)
    x, weight, bias = (torch.randn(*size, generator=generator).to(device) for size in ((M, K), (N, K), (N,)))
    layers = {"fp32": partial(F.linear, x, weight, bias)}
    for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16}.items():
        if name == "bf16" or device.type == "cuda":
            layers[name] = partial(F.linear, *(tensor.to(dtype) for tensor in (x, weight, bias)))
    for act_range in ("dynamic", "static"):
        layer = integer_layer(x, weight, bias, act_range)
        layers[f"int8 {act_range}"] = partial(layer, x)
    layers["int8 product"] = partial(layer, layer.codes(x))
    if device.type == "cpu" and has_torch_ao():
        reference = nn.Linear(K, N)
        reference.weight.data, reference.bias.data = weight, bias
        layers["torch.ao int8 dynamic"] = partial(torch_ao(nn.Sequential(reference)), x)
    return layers, F.linear(x.double(), weight.double(), bias.double())


def integer_layer(x: Tensor, weight: Tensor, bias: Tensor, act_range: str) -> IntLinear:
    """The IntLinear of a float32 layer; a static range is that of x."""
    config = QuantConfig(act_range=act_range)
    quantizer = UniformQuantizer(config, weight, per_row=True, multiplied=True)
    act = ActQuantizer(config).to(x.device)
    if act.static:
        low, high = torch.aminmax(x)
        act.set_range(*choose_qparams(low, high, act.quant_min, act.quant_max, symmetric=False))
    kernel = choose_kernel(x.device, quantizer.quant_max)
    return IntLinear(checkpoint.weight_of(quantizer, weight), bias, act, kernel, x.device)


def tt_layers(K: int, N: int, rank: int, device: torch.device) -> dict[str, nn.Module]:
    """name -> a layer K -> N with random weights: dense, and tensor trains."""
    dense = nn.Linear(K, N)
    layers = {"dense": dense, "TTLinear": TTLinear.like(dense, TTConfig(rank))}
    if is_installed("tltorch"):
        layers |= tltorch_layers(layers["TTLinear"])
    return {name: layer.to(device) for name, layer in layers.items()}


def forward_flops(layer: nn.Module, tokens: int) -> int | None:
    """Operations of a forward pass; None for other libraries, whose contraction is unknown."""
    if not isinstance(layer, (TTLinear, nn.Linear)):
        return None
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(tokens, layer.in_features, device=next(layer.parameters()).device))
    return counter.get_total_flops()


def tltorch_version() -> dict | None:
    """The version of TensorLy-Torch (pip install tensorly tensorly-torch scipy opt_einsum), None if it is not
    installed; its einsum finds a better contraction path where opt_einsum is installed.
    """
    if not is_installed("tltorch"):
        print("tltorch: not measured, it is not installed")
        return None
    return {"version": version("tensorly-torch"), "opt_einsum": opt_einsum.is_available()}


def tltorch_layers(layer: TTLinear) -> dict[str, nn.Module]:
    """TensorLy-Torch's tensor-train layers, at the rank whose parameter count is nearest to ours.

    A "blocktt" core has one digit of the output and one of the input. "contracted": x is multiplied by one core after
    the other; "rebuilt": the cores are multiplied out to the matrix.
    """
    import tltorch

    out_modes, in_modes = layer.modes[: layer.cut], layer.modes[layer.cut :]
    pairs = [n * m for n, m in zip(out_modes, in_modes, strict=True)]
    ours = sum(core.numel() for core in layer.cores)

    def difference(ranks: tuple[int, ...]) -> int:
        return abs(sum(ranks[k] * n * ranks[k + 1] for k, n in enumerate(pairs)) - ours)

    ranks = min(((1, *[rank] * (len(pairs) - 1), 1) for rank in range(1, 400)), key=difference)
    layers = partial(tltorch.FactorizedLinear, in_modes, out_modes, factorization="blocktt", rank=ranks)
    contracted, rebuilt = layers(implementation="factorized"), layers(implementation="reconstructed")
    return {"tltorch, contracted": contracted, "tltorch, rebuilt": rebuilt}


def main(name: str, folder: str, rows: str, tokens: str) -> None:
    """Print the peak memory of this process, which loads a backend and runs one batch on CPU."""
    run = load_backend(name, folder, torch.device("cpu"))
    with torch.inference_mode():
        run(torch.full((int(rows), int(tokens)), 5), None)
    print(json.dumps(peak_of_this_process()))


if __name__ == "__main__":
    main(*sys.argv[1:])
