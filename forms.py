"""The forms of one model that bench.py compares: ours, and other people's where they are installed.

`write_files` makes random weights and the file of every form; `load` makes one of them ready to run
from its file alone, as a user would. So the memory of a form can be measured in a process of its own:

    python forms.py FORM FOLDER ROWS TOKENS      # prints the peak in bytes, on Linux and macOS

"dynamic" int8 finds the range of each activation as it comes; "static" had it from calibration.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable

import torch
from packed import float_model, read_student, student_payload
from torch import Tensor

from checkpoint import checkpoint_payload, load_checkpoint, save_atomically
from convert import key_table
from int8 import integer_model
from model import Model, ModelConfig, build_model
from prepare import calibrate, prepare
from quant import QuantConfig

Runner = Callable[[Tensor, Tensor | None], Tensor]  # (ids, mask) -> logits

FILES = {  # form -> its file. The first one that is there is what the others are compared with.
    "Hugging Face fp32": "hugging-face/model.safetensors",
    "fp32": "fp32.pt",
    "fake-quantized": "dynamic.pt",
    "int8 dynamic": "dynamic.pt",
    "int8 static": "static.pt",
    "torch.ao int8 dynamic": "hugging-face/torch-ao.pt",
    "ONNX Runtime int8 dynamic": "int8.onnx",
}
NEEDS = {
    "Hugging Face fp32": ("transformers", "safetensors"),
    "torch.ao int8 dynamic": ("transformers", "safetensors"),
    "ONNX Runtime int8 dynamic": ("transformers", "onnx", "onnxruntime"),
}


def available(device: torch.device) -> tuple[str, ...]:
    """The forms that can be made here. The int8 ones of others know no CUDA."""
    names = []
    for name in FILES:
        missing = [m for m in NEEDS.get(name, ()) if importlib.util.find_spec(m) is None]
        others = name in NEEDS and "int8" in name
        if name.startswith("torch.ao") and not has_torch_ao():
            print(f"{name}: not measured, this PyTorch has no kernels for it")
        elif missing:
            print(f"{name}: not measured, {' and '.join(missing)} not installed")
        elif not (others and device.type == "cuda"):
            names.append(name)
    return tuple(names)


# ------------------------------------------------------------------------------------------ files
def write_files(config: ModelConfig, folder: str, names: tuple[str, ...]) -> None:
    """One model with random weights, in the file of every form."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    no_tokenizer = b"x"  # texts are not what these models are for
    save_atomically(checkpoint_payload(model, no_tokenizer), os.path.join(folder, FILES["fp32"]))
    if any(name in NEEDS for name in names):
        write_others(model, folder, names)
    for kind in ("dynamic", "static"):
        student, quant = copy.deepcopy(model), QuantConfig(act_range=kind)
        prepare(student, quant)
        if kind == "static":
            rows = torch.randint(4, config.vocab_size - 1, (8, min(128, config.max_tokens)))
            calibrate(student, [(rows, None)], quant.observer)
        payload = student_payload(student, quant, no_tokenizer)
        save_atomically(payload, os.path.join(folder, FILES[f"int8 {kind}"]))


def write_others(model: Model, folder: str, names: tuple[str, ...]) -> None:
    """The same weights as Hugging Face's model, and what ONNX Runtime makes of it."""
    import transformers

    config = model.config
    shape = transformers.XLMRobertaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.ffn_size,
        max_position_embeddings=config.max_tokens + config.position_offset,
        type_vocab_size=config.type_vocab_size,
        num_labels=config.num_labels,
        pad_token_id=config.pad_id,
        layer_norm_eps=config.norm_eps,
    )
    reference = transformers.XLMRobertaForSequenceClassification(shape).eval()
    ours, theirs = model.state_dict(), {}
    for source, target in key_table(config).items():
        prefix = "" if source.startswith("classifier") else "roberta."
        theirs[prefix + source] = ours[target]
    reference.load_state_dict(theirs)
    reference.save_pretrained(os.path.join(folder, "hugging-face"))
    if "torch.ao int8 dynamic" in names:
        state = torch_ao(reference).state_dict()
        torch.save(state, os.path.join(folder, FILES["torch.ao int8 dynamic"]))
    if "ONNX Runtime int8 dynamic" in names:
        write_onnx(reference, folder)


class _Logits(torch.nn.Module):
    """Hugging Face's model with plain tensors in and out: what ONNX can say."""

    def __init__(self, reference):
        super().__init__()
        self.reference = reference

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.reference(ids, attention_mask=mask).logits


def write_onnx(reference, folder: str) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole, ids = os.path.join(folder, "fp32.onnx"), torch.full((2, 16), 5)
    free = {0: "rows", 1: "tokens"}
    with warnings.catch_warnings():  # that this exporter grows old; the new one's file is refused
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Logits(reference), (ids, torch.ones_like(ids)), whole, dynamo=False,
            input_names=["ids", "mask"], output_names=["logits"],
            dynamic_axes={"ids": free, "mask": free},
        )  # fmt: skip
        # 7-bit weights: with 8 its kernels clip on CPUs without VNNI, and the logits are wrong.
        quantize_dynamic(
            whole,
            os.path.join(folder, FILES["ONNX Runtime int8 dynamic"]),
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
    os.unlink(whole)


def has_torch_ao() -> bool:
    """Whether this build of PyTorch has kernels for its own dynamic quantization."""
    return torch.backends.quantized.engine not in (None, "none")


def torch_ao(reference):
    with warnings.catch_warnings():  # that it goes away
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(reference, {torch.nn.Linear}, torch.qint8)


# ---------------------------------------------------------------------------------------- loading
def load(name: str, folder: str, device: torch.device) -> Runner:
    """A form, ready to run, from its file."""
    path = os.path.join(folder, FILES[name])
    if name == "ONNX Runtime int8 dynamic":
        return load_onnx(path)
    if name in NEEDS:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        kind = transformers.XLMRobertaForSequenceClassification
        reference = kind.from_pretrained(os.path.dirname(path)).eval().to(device)
        if name == "torch.ao int8 dynamic":
            reference = torch_ao(reference)
        return lambda ids, mask: reference(ids, attention_mask=mask).logits
    if name == "fp32":
        model = load_checkpoint(path).to(device)
    elif name == "fake-quantized":
        model = float_model(read_student(path)).to(device)
    else:
        model = integer_model(read_student(path), device)
    return lambda ids, mask: model(ids, mask)[0]


def load_onnx(path: str) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(ids: Tensor, mask: Tensor | None) -> Tensor:
        mask = torch.ones_like(ids) if mask is None else mask.long()
        return torch.from_numpy(session.run(None, {"ids": ids.numpy(), "mask": mask.numpy()})[0])

    return run


# ----------------------------------------------------------------------------------------- memory
def peak_memory(name: str, folder: str, rows: int, tokens: int) -> int | None:
    """Bytes at the peak of a fresh process that loads a form and runs one batch on CPU; None where
    the system does not tell.
    """
    command = [sys.executable, os.path.abspath(__file__), name, folder, str(rows), str(tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_this_process() -> int | None:
    try:  # on Linux ru_maxrss starts at what the parent process had
        with open("/proc/self/status", encoding="ascii") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def main(name: str, folder: str, rows: str, tokens: str) -> None:
    form = load(name, folder, torch.device("cpu"))
    with torch.inference_mode():
        form(torch.full((int(rows), int(tokens)), 5), None)
    print(json.dumps(peak_of_this_process()))


if __name__ == "__main__":
    main(*sys.argv[1:])
