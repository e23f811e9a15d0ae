"""Checkpoints: float32 models (weights/NAME.safetensors, teachers) and packed students (student.safetensors).

Both are files of tensors with settings (kit/files.py), which the safetensors package opens, too:

    format     "sdq-model-2", or "sdq-student-7" of a student
    config     the fields of ModelConfig
    notes      strings: where it came from, the names of its classes
    NAME       a parameter, float32 (or float16, to save space)
    tokenizer  the bytes of the tokenizer's file, uint8

A student also has "quant", the fields of QuantConfig, and in place of each quantized weight NAME.codes, integers of b
bits, and NAME.scale, float32, one per row, or one for a core of a tensor train. Fake quantization trains in float32, and
a checkpoint of that would be full-size. Packed, 8 bits take one byte per weight, 4 bits two weights per byte, 2 bits four
(3, 5, 6 and 7 bits likewise without gaps). Product quantization has NAME.assignments, a byte per block, and
NAME.centroids, float16, instead (pq.py).

Every tensor is compared with the shape that the config requires before a model is filled with it.
"""

import os
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import TrainConfig, scratch_shape, tt_config
from data.fetch import MODELS
from data.tasks import RAW_DIR, WEIGHTS_DIR, Task, class_names, load, match_labels
from data.tokenizer import Tokenizer, WordTokenizer
from kit.common import UserError
from kit.files import check_tensors, read_tensors, write_tensors
from kit.run import TEACHERS
from model import HEADS, PRESETS, Model, ModelConfig, initialize, with_head
from pq import ProductQuantizer
from prepare import prepare
from quant import FixedQuantizer, QuantConfig, WeightQuantizer, check_codes, dequantize
from tt import TensorTrain, TTConfig, tensorize

MINI = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "mini", "mini.safetensors")
MODEL_FORMAT, STUDENT_FORMAT = "sdq-model-2", "sdq-student-7"
WORDS = "encoder.embeddings.word.weight"
CHUNK = 1 << 22  # weights packed at a time: XLM-R's embedding table alone has 192 million
LIMITS = {  # of the numbers in a ModelConfig
    **dict(vocab_size=(1, 10**7), hidden_size=(1, 2**14), num_layers=(1, 200), num_heads=(1, 2**10)),
    **dict(ffn_size=(1, 2**17), max_tokens=(1, 2**17), type_vocab_size=(1, 16), position_offset=(0, 16)),
    **dict(pad_id=(0, 10**7), num_labels=(0, 10**5), num_slots=(0, 10**5), norm_eps=(0.0, 0.1), dropout=(0.0, 0.99)),
}


# --------------------------------------------------------------------------------- float32 models
class Checkpoint(NamedTuple):
    """The parts of a float32 model, its tensors mapped from disk.  vocabulary: the bytes of its tokenizer."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    notes: dict[str, str]
    vocabulary: Tensor | None


def save_model(path: str, model: Model, tokenizer: bytes, notes: dict[str, str], temporary: str | None = None) -> int:
    """Write a float32 model. Returns the bytes of the file."""
    tensors = model.state_dict() | {"tokenizer": torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)}
    settings = {"config": asdict(model.config), "notes": notes}
    return write_tensors(path, tensors, MODEL_FORMAT, settings, temporary)


def read_model(path: str) -> Checkpoint:
    """The parts of a float32 checkpoint (also of one in float16). Every tensor is accounted for.

    Raises UserError for a missing, damaged or foreign file.
    """
    teacher = os.path.basename(os.path.dirname(os.path.abspath(path))) == TEACHERS
    advice = "delete it, and the next run trains it again" if teacher else "make it with 'python convert.py NAME'"
    tensors, settings = read_tensors(path, MODEL_FORMAT, advice)
    config, vocabulary = config_of(settings, path), tensors.pop("tokenizer", None)
    check_tensors(path, meta_model(config).state_dict(), tensors, torch.float32, torch.float16)
    return Checkpoint(config, tensors, settings.get("notes", {}), vocabulary)


def teacher_model(read: Checkpoint) -> Model:
    """The float32 model of a checkpoint's parts, on CPU, in eval mode."""
    model = meta_model(read.config).to_empty(device="cpu")
    model.load_state_dict(read.tensors)
    return model.eval()


def load_model(path: str) -> Model:
    return teacher_model(read_model(path))


def meta_model(config: ModelConfig) -> Model:
    """A model without storage, its layers replaced by tensor trains if the config says so."""
    with torch.device("meta"):
        model = Model(config)
        if config.tt:
            tensorize(model, config.tt)
    return model


def config_of(settings: dict, path: str) -> ModelConfig:
    """The model config of a file's settings. Raises UserError for one of another version, or that can't be built."""
    try:
        values = dict(settings["config"])
        if values.get("tt") is not None:
            values["tt"] = TTConfig(**{**values["tt"], "keep": tuple(values["tt"]["keep"])})
        config = ModelConfig(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the model config is of another version ({error}): make the file again") from None
    return check_config(config)


def check_config(config: ModelConfig) -> ModelConfig:
    """Raises UserError for a shape that can't be built: configs may come from strangers' files."""
    for name, (least, most) in LIMITS.items():
        value, kinds = getattr(config, name), (int, float) if isinstance(most, float) else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            kind = "a number" if isinstance(most, float) else "an integer"
            raise UserError(f"model config: {name} is {value!r}, not {kind} from {least} to {most}")
    needs_labels = config.head in ("sequence", "token", "joint")
    undivided = f"hidden size {config.hidden_size} is not divisible by {config.num_heads} heads"
    for is_wrong, message in (
        (config.hidden_size % config.num_heads, undivided),
        (config.pad_id >= config.vocab_size, f"pad_id {config.pad_id} is outside the vocabulary"),
        (config.head not in HEADS, f"unknown head {config.head!r}; known: {', '.join(HEADS)}"),
        (needs_labels and config.num_labels < 1, f"a {config.head} head needs num_labels >= 1"),
        (config.head == "joint" and config.num_slots < 1, "a joint head needs num_slots >= 1"),
        (config.head == "mlm" and config.tt, "an mlm head needs the whole embedding table, not its cores"),
    ):
        if is_wrong:
            raise UserError(f"model config: {message}")
    return config


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
def quantized_weights(student: Model) -> dict[str, str]:
    """Name of each quantized weight -> name of the quantizer that it goes through."""
    found = {}
    for name, module in student.named_modules():
        for attribute in ("weight_quantizer", "row_quantizer"):
            if isinstance(getattr(module, attribute, None), WeightQuantizer):
                found[f"{name}.weight"] = f"{name}.{attribute}"
        if isinstance(module, TensorTrain) and module.core_quantizers is not None:
            for k in range(len(module.cores)):
                found[f"{name}.cores.{k}"] = f"{name}.core_quantizers.{k}"
    return found


def is_quantizer_state(name: str) -> bool:
    """Whether a tensor only says how a weight was rounded: the codes and their scale replace it."""
    return name.endswith(("_quantizer.clip", ".log_scale", ".centroids", ".assignments", ".counts"))


class Weight(NamedTuple):
    """A quantized matrix, codes int8 (rows, N) and scale float32 (rows, 1) or (); or a core."""

    codes: Tensor
    scale: Tensor


def weight_of(quantizer: WeightQuantizer, weight: Tensor) -> Weight:
    codes, scale = quantizer.codes(weight)
    return Weight(check_codes(quantizer, codes).to(torch.int8), scale)


def table_of(quantizer: WeightQuantizer, weight: Tensor) -> Weight:
    """weight_of for a table, each row of which has its own scale: in pieces, to bound the memory."""
    codes, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), 1)
    step, decodes = max(1, CHUNK // weight.shape[1]), isinstance(quantizer, ProductQuantizer)
    for rows in (slice(start, start + step) for start in range(0, len(weight), step)):
        part, scale[rows] = quantizer.codes(weight, rows) if decodes else quantizer.codes(weight[rows])
        codes[rows] = check_codes(quantizer, part)
    return Weight(codes, scale)


@torch.no_grad()
def weight_codes(student: Model) -> dict[str, Weight]:
    """The integers of every quantized weight of a fake-quantized student, on CPU."""
    found, parameters = {}, dict(student.named_parameters())
    for name, quantizer_name in quantized_weights(student).items():
        weight, quantizer = parameters[name].detach(), student.get_submodule(quantizer_name)
        make = table_of if name == WORDS else weight_of
        found[name] = Weight(*(part.cpu() for part in make(quantizer, weight)))
    return found


def float_tensors(student: Model) -> dict[str, Tensor]:
    """All tensors of a student that are not quantized, on CPU."""
    quantized = quantized_weights(student)
    return {
        name: tensor.detach().cpu()
        for name, tensor in student.state_dict().items()
        if name not in quantized and not is_quantizer_state(name)
    }


def save_student(path: str, student: Model, config: QuantConfig, tokenizer: bytes, notes: dict[str, str]) -> int:
    """Write a student: packed integers and scales, or blocks and centroids, and float32 tensors. Returns the bytes."""
    tensors = float_tensors(student) | {"tokenizer": torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)}
    if config.weights == "pq":
        for name, at in quantized_weights(student).items():
            quantizer = student.get_submodule(at)
            assert not quantizer.waiting, f"{name} has no centroids before its stage"
            tensors[f"{name}.assignments"] = quantizer.assignments
            tensors[f"{name}.centroids"] = quantizer.centroids.half()
    else:
        for name, (codes, scale) in weight_codes(student).items():
            tensors |= {f"{name}.codes": pack(codes, config.weight_bits), f"{name}.scale": scale}
    settings = {"config": asdict(student.config), "quant": asdict(config), "notes": notes}
    return write_tensors(path, tensors, STUDENT_FORMAT, settings)


class Student(NamedTuple):
    """The parts of a student, as they are on disk and as the integer model needs them.

    weights: all quantized ones.  tensors: all others.  notes: of train.run_student.  vocabulary: the bytes of its
    tokenizer.
    """

    config: ModelConfig
    quant: QuantConfig
    weights: dict[str, Weight]
    tensors: dict[str, Tensor]
    notes: dict[str, str]
    vocabulary: Tensor | None

    @property
    def max_length(self) -> int:
        """Maximum sequence length in tokens, as in training."""
        length, most = self.notes.get("max_length", ""), self.config.max_tokens
        return min(int(length), most) if length.isdecimal() else most

    @property
    def classes(self) -> list[tuple[str, ...]]:
        """The names of the classes of a sequence (or of the words of a token head), and of a joint head's slots."""
        return [tuple(filter(None, self.notes.get(kind, "").split("\t"))) for kind in ("labels", "slots")]


def read_student(path: str) -> Student:
    """The parts of a student's file. Raises UserError for a missing, damaged or foreign one."""
    tensors, settings = read_tensors(path, STUDENT_FORMAT, "train.py writes it, run it again")
    config, vocabulary = config_of(settings, path), tensors.pop("tokenizer", None)
    try:
        quant = QuantConfig(**{**settings["quant"], "keep": tuple(settings["quant"]["keep"])})
        empty = meta_model(config)
        prepare(empty, quant)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: the student is of another version ({str(error)[:200]}): train it again") from None
    quantizers = {name: empty.get_submodule(at) for name, at in quantized_weights(empty).items()}
    whole = {name: tensor for name, tensor in empty.state_dict().items() if not is_quantizer_state(name)}
    expected = {name: tensor for name, tensor in whole.items() if name not in quantizers}
    for name, quantizer in quantizers.items():
        if isinstance(quantizer, ProductQuantizer):
            expected |= {f"{name}.assignments": quantizer.assignments, f"{name}.centroids": quantizer.centroids.half()}
        else:
            size, rows = packed_bytes(whole[name].numel(), quantizer.bits), (len(whole[name]), 1)
            expected[f"{name}.codes"] = torch.empty(size, dtype=torch.uint8, device="meta")
            expected[f"{name}.scale"] = torch.empty(rows if quantizer.per_row else (), device="meta")
    check_tensors(path, expected, tensors)
    weights = {}
    for name, quantizer in quantizers.items():
        if isinstance(quantizer, ProductQuantizer):
            assignments, centroids = (tensors.pop(f"{name}.{part}") for part in ("assignments", "centroids"))
            weights[name] = unpack_blocks(name, assignments, centroids, whole[name].shape, quantizer)
        else:
            codes, scale = (tensors.pop(f"{name}.{part}") for part in ("codes", "scale"))
            weights[name] = Weight(unpack_weight(codes, quantizer.bits, whole[name].shape), scale)
    return Student(config, quant, weights, tensors, settings.get("notes", {}), vocabulary)


def unpack_weight(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The integers of a packed weight, int8 of the given shape."""
    codes = torch.empty(shape, dtype=torch.int8)
    flat, step = codes.view(-1), CHUNK // 8 * 8  # a multiple of 8 codes fills whole bytes
    for start in range(0, flat.numel(), step):
        count = min(step, flat.numel() - start)
        piece = packed[start * bits // 8 : start * bits // 8 + packed_bytes(count, bits)]
        flat[start : start + count] = unpack(piece, bits, count)
    return codes


@torch.no_grad()
def unpack_blocks(
    name: str, assignments: Tensor, centroids: Tensor, shape: torch.Size, quantizer: ProductQuantizer
) -> Weight:
    """The integers of a weight that was stored as blocks."""
    quantizer.to_empty(device="cpu")
    quantizer.centroids.copy_(centroids)
    quantizer.assignments.copy_(assignments)
    quantizer.counts.fill_(1)
    return (table_of if name == WORDS else weight_of)(quantizer, torch.empty(shape, device="meta"))


def fake_quantized(read: Student) -> Model:
    """The fake-quantized model of a student's parts, as it was trained, on CPU, in eval mode."""
    with torch.device("meta"):
        student = meta_model(read.config)
        prepare(student, read.quant)
    student.to_empty(device="cpu")
    tensors = dict(read.tensors)
    for name, quantizer in quantized_weights(student).items():
        codes, scale = read.weights[name]
        tensors[name] = dequantize(codes, scale, torch.zeros(()))
        fixed = FixedQuantizer(student.get_submodule(quantizer), scale)
        # The word table lies on its grid and is only looked up.
        student.set_submodule(quantizer, nn.Identity() if name == WORDS else fixed)
    # Not strict: read_student has checked the names except those of is_quantizer_state(), which are not used.
    student.load_state_dict(tensors, strict=False)
    return student.eval()


def load_student(path: str) -> tuple[Model, Tokenizer]:
    """A packed student, fake-quantized as it was trained, on CPU; and its tokenizer."""
    read = read_student(path)
    return fake_quantized(read), tokenizer_of(path, read)


def tokenizer_of(path: str, read: Student | Checkpoint) -> Tokenizer:
    return Tokenizer.from_payload({"tokenizer": read.vocabulary}, path, read.config.vocab_size)


# ------------------------------------------------------------------------------ before fine-tuning
class Start:
    """What fine-tuning starts from: a converted checkpoint, or random weights; and the task that it is fine-tuned on."""

    def __init__(self, config: TrainConfig, task: Task, folder: str):
        self.task, self.seed, self.read = task, config.seed, None
        self.data = "own" if config.data_dir else "official" if folder == RAW_DIR else "built in"
        self.labels, self.slots = class_names(task, folder)
        self.head = {"head": task.head, "num_labels": len(self.labels), "num_slots": len(self.slots)}
        self.classes: list[int] | None = None  # of the model's own head, in the order of the task's labels
        if shape := scratch_shape(config.model):
            if config.tokenizer:
                self.tokenizer = Tokenizer.from_file(config.tokenizer)
            else:
                sentences = load(task, "train", task.train_language, folder)
                self.tokenizer = WordTokenizer.build(sentence.words for sentence in sentences)
            layers, hidden = shape
            sizes = dict(hidden_size=hidden, num_layers=layers, num_heads=max(1, hidden // 64), ffn_size=4 * hidden)
            vocabulary = {"vocab_size": self.tokenizer.vocab_size, "max_tokens": 512}
            self.config = ModelConfig(**vocabulary, **sizes, tt=tt_config(config), **self.head)
            check_config(self.config)
            self.name = config.model + (f"-tt{config.tt_rank}" if config.tt_rank else "")
            self.identity = [repr(self.config), self.tokenizer.sha256]
        else:
            path = find_model(config.model)
            self.read = read_model(path)  # its tensors are mapped from disk
            self.config = self.read.config
            self.tokenizer = tokenizer_of(path, self.read)
            self.name = os.path.splitext(os.path.basename(path))[0]
            stat = os.stat(path)
            self.identity = [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]
            if self.config.num_labels:
                self.find_classes(self.read.notes.get("labels", "").split("\t"))
        if not config.epochs and self.classes is None:
            raise UserError(f"--epochs 0: {self.name} has no head of classes for {task.name}; train one")

    def find_classes(self, names: list[str]) -> None:
        """Whether the model's own head has the classes of the task, which are known by their names. Says so."""
        known = len(names) == self.config.num_labels
        if known and self.config.head == self.task.head != "joint" and not self.config.tt:
            self.classes = match_labels(names, self.labels)
        if self.classes is None:
            of = ", ".join(names)[:200] if known else "classes without names; to keep it, convert the model again"
            print(f"{self.name} has a {self.config.head} head for {of}: {self.task.name} gets a new one")
        else:
            pairs = [f"{names[i]} is {label}" for i, label in zip(self.classes, self.labels, strict=True)]
            print(f"{self.name} has a head for {self.task.name}, which is kept: {', '.join(pairs)[:200]}")

    def build(self) -> Model:
        """A model to fine-tune: the encoder with its own head, if it fits, or a new one. One seed, one model."""
        torch.manual_seed(self.seed)
        if self.read is None:
            return initialize(meta_model(self.config))
        model = teacher_model(self.read)
        if self.classes is not None:
            for parameter in model.head.out_proj.parameters():
                parameter.data = parameter.data[self.classes]
            return model
        model = with_head(model, **self.head)
        if model.config.tt:
            tensorize(model, model.config.tt)  # the new head
        return model


def find_model(name: str) -> str:
    """The checkpoint that --model means. Raises UserError saying how to get one."""
    if name == "mini":
        return MINI
    is_path = name.endswith((".safetensors", ".pt")) or os.sep in name or "/" in name
    path = name if is_path else os.path.join(WEIGHTS_DIR, name + ".safetensors")
    if os.path.isfile(path):
        return path
    if is_path or name not in {*PRESETS, *MODELS}:
        known = " ".join(["mini", *MODELS])
        raise UserError(f"no model {name!r}: give a .safetensors file of convert.py, 'scratch', or one of: {known}")
    how = name if name in MODELS else f"{name} --from DIR"
    raise UserError(f"no weights for {name} yet: make them with 'python convert.py {how}'")
