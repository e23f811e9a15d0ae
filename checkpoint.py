"""Checkpoints: float models (weights/NAME.safetensors, teachers, data/mini) and packed students.

Both are files of tensors (kit/files.py). Their settings are "config", the fields of ModelConfig, and "notes", where it
came from; a student also has "quant", the fields of QuantConfig. The tensors:

    model      every parameter, float32 (or float16, to save space)
    student    NAME.codes and NAME.scale for each quantized weight, and all other parameters, float32
    both       "tokenizer", the bytes of the tokenizer's file

Fake quantization trains in float32. Packed, 8 bits take one byte per weight, 4 bits two weights per byte, 2 bits four
(3, 5, 6 and 7 bits likewise without gaps). A scale is a float32 per row, or one for a core of a tensor train. Product
quantization has NAME.assignments, a byte per block, and float16 NAME.centroids instead (pq.py).
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
from data.tokenizer import Encoder, Tokenizer, WordTokenizer, load_tokenizer
from kit.common import UserError
from kit.files import check_tensors, read_tensors, recorded_checksum, write_tensors
from kit.run import TEACHERS
from model import PRESETS, Model, ModelConfig, initialize, with_head
from pq import CENTROIDS, ProductQuantizer
from prepare import prepare
from quant import FixedQuantizer, QuantConfig, WeightQuantizer, check_codes, dequantize
from tt import TTConfig, tensorize

MINI = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "mini", "mini.safetensors")
MODEL_FORMAT, STUDENT_FORMAT = "sdq-model-2", "sdq-student-7"
WORDS = "encoder.embeddings.word.weight"
CHUNK = 1 << 22  # codes made or unpacked at a time, a multiple of 8: XLM-R's embedding table alone has 192 million
LIMITS = {"vocab_size": (1, 10**7), "hidden_size": (1, 2**14), "num_layers": (1, 200), "num_heads": (1, 2**10)}
LIMITS |= {"ffn_size": (1, 2**17), "max_tokens": (1, 2**17), "type_vocab_size": (1, 16), "position_offset": (0, 16)}
LIMITS |= {"pad_id": (0, 10**7), "num_labels": (0, 10**5), "num_slots": (0, 10**5)}
LIMITS |= {"norm_eps": (0.0, 0.1), "dropout": (0.0, 0.99)}
POOLINGS = ("", "mean", "first", "other")  # the last is not implemented


# ----------------------------------------------------------------------------------- float models
class Weight(NamedTuple):
    """A quantized matrix, codes int8 (rows, N) and scale float32 (rows, 1) or (); or a core."""

    codes: Tensor
    scale: Tensor


class Checkpoint(NamedTuple):
    """The parts of a file, of which the integer model is made. A float model has no quant and no weights."""

    config: ModelConfig
    quant: QuantConfig | None
    weights: dict[str, Weight]  # all quantized ones
    tensors: dict[str, Tensor]  # all others, mapped from disk
    notes: dict[str, str]  # of train.run_student
    vocabulary: Tensor | None  # the bytes of its tokenizer

    @property
    def max_length(self) -> int:
        """Maximum sequence length in tokens, as in training."""
        return min(int(self.notes.get("max_length", self.config.max_tokens)), self.config.max_tokens)

    @property
    def classes(self) -> list[tuple[str, ...]]:
        """The names of the classes of a sequence (or of the words of a token head), and of a joint head's slots."""
        return [tuple(filter(None, self.notes.get(kind, "").split("\t"))) for kind in ("labels", "slots")]


def meta_model(config: ModelConfig, quant: QuantConfig | None = None) -> Model:
    """A model without storage: with tensor trains if the config says so, fake-quantized if quant is given."""
    with torch.device("meta"):
        model = Model(config)
        if config.tt:
            tensorize(model, config.tt)
        if quant:
            prepare(model, quant)
    return model


def check_config(config: ModelConfig) -> ModelConfig:
    """Raises UserError for a shape that can't be built, or is larger than any of ours: it may come from a file."""
    for name, (least, most) in LIMITS.items():
        value = getattr(config, name)
        if type(value) not in (int, type(most)) or not least <= value <= most:
            raise UserError(f"model config: {name} is {value!r}, not a number from {least} to {most}")
    if config.pooling not in POOLINGS:
        raise UserError(f"model config: pooling is {config.pooling!r}, none of {POOLINGS}")
    if config.hidden_size % config.num_heads:
        raise UserError("model config: hidden_size is not divisible by num_heads")
    return config


def save_model(path: str, model: Model, tokenizer: bytes, notes: dict[str, str], temporary: str | None = None) -> int:
    """Write a model's file. Returns its bytes.  temporary: see kit.files.atomic_write."""
    tensors = {**model.state_dict(), "tokenizer": torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)}
    return write_tensors(path, tensors, MODEL_FORMAT, {"config": asdict(model.config), "notes": notes}, temporary)


def read_model(path: str) -> Checkpoint:
    """The parts of a model's file. Raises UserError if it is missing, damaged or foreign, saying how to make it."""
    is_teacher = os.path.basename(os.path.dirname(os.path.abspath(path))) == TEACHERS
    advice = "delete it, and it is trained again" if is_teacher else "make one: python convert.py NAME --from DIR"
    empty, read = read_file(path, MODEL_FORMAT, advice)
    check_tensors(path, empty.state_dict(), read.tensors, torch.float32, torch.float16)
    return read


def read_file(path: str, format: str, advice: str) -> tuple[Model, Checkpoint]:
    """A model without storage, and the parts of either kind of file, quantized weights still among the tensors."""
    tensors, settings = read_tensors(path, format, advice)
    try:
        config, quant = settings["config"], settings.get("quant")
        if config["tt"]:
            config["tt"] = TTConfig(**{**config["tt"], "keep": tuple(config["tt"]["keep"])})
        if quant:
            quant = QuantConfig(**{**quant, "keep": tuple(quant["keep"])})
        empty = meta_model(check_config(ModelConfig(**config)), quant)
        notes = {name: str(note) for name, note in settings["notes"].items()}
        return empty, Checkpoint(empty.config, quant, {}, tensors, notes, tensors.pop("tokenizer").view(torch.uint8))
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or of another version ({str(error)[:200]}): {advice}") from None


def teacher_model(read: Checkpoint) -> Model:
    """The float32 model of a file (also of one in float16), on CPU, in eval mode."""
    model = meta_model(read.config).to_empty(device="cpu")
    model.load_state_dict(read.tensors)
    return model.eval()


def load_model(path: str) -> Model:
    return teacher_model(read_model(path))


# ---------------------------------------------------------------------------------------- packing
def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers -2^(b-1) .. 2^(b-1) - 1 -> bytes (uint8, flat), b bits each, the first one in the lowest bits.

    >>> pack(torch.tensor([-1, 0, 1, 1]), bits=2)      # + 2: 1, 2, 3, 3 = 0b11_11_10_01
    tensor([249], dtype=torch.uint8)
    """
    unsigned = (codes.flatten().to(torch.int16) + 2 ** (bits - 1)).numpy().astype(np.uint8)
    if bits == 8:
        return torch.from_numpy(unsigned)
    planes = (unsigned[:, None] >> np.arange(bits, dtype=np.uint8)) & 1  # (number of codes, bits)
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of pack: `count` integers, int8, a piece at a time, to bound the memory."""
    codes = torch.empty(count, dtype=torch.int8)
    for start in range(0, count, CHUNK):
        part, unsigned = codes[start : start + CHUNK], packed[start * bits // 8 : (start + CHUNK) * bits // 8].numpy()
        if bits != 8:
            planes = np.unpackbits(unsigned, count=len(part) * bits, bitorder="little").reshape(-1, bits)
            unsigned = planes @ (1 << np.arange(bits)).astype(np.uint8)
        part.copy_(torch.from_numpy(unsigned - np.uint8(2 ** (bits - 1))).view(torch.int8))
    return codes


# --------------------------------------------------------------------------------------- students
def quantized_weights(student: Model) -> dict[str, str]:
    """Name of each quantized weight -> name of the quantizer that it goes through."""
    found = {}
    for at, module in student.named_modules():
        name = at.replace("row_quantizer", "weight").replace("weight_quantizer", "weight")
        name = name.replace("core_quantizers", "cores")
        if name != at and isinstance(module, WeightQuantizer):
            found[name] = at
    return found


def weight_of(quantizer: WeightQuantizer, weight: Tensor, name: str = "") -> Weight:
    """The integers of a weight; in pieces for the word table, whose rows have their own scales, to bound the memory."""
    if name != WORDS:
        codes, scale = quantizer.codes(weight)
        return Weight(check_codes(quantizer, codes).to(torch.int8), scale)
    codes, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), 1)
    step, decodes = max(1, CHUNK // weight.shape[1]), isinstance(quantizer, ProductQuantizer)
    for rows in (slice(start, start + step) for start in range(0, len(weight), step)):
        part, scale[rows] = quantizer.codes(weight, rows) if decodes else quantizer.codes(weight[rows])
        codes[rows] = check_codes(quantizer, part)
    return Weight(codes, scale)


@torch.no_grad()
def weight_codes(student: Model) -> dict[str, Weight]:
    """The integers of every quantized weight of a fake-quantized student, on CPU."""
    places = quantized_weights(student)
    weights = (weight_of(student.get_submodule(at), student.get_parameter(name), name) for name, at in places.items())
    return {name: Weight(codes.cpu(), scale.cpu()) for name, (codes, scale) in zip(places, weights, strict=True)}


def float_tensors(student: Model) -> dict[str, Tensor]:
    """All tensors of a student, on its device, but quantized weights and what only says how these were rounded."""
    quantized, tensors = quantized_weights(student), student.state_dict().items()
    rounding = ("_quantizer.clip", ".log_scale", ".centroids", ".assignments", ".counts")
    return {name: tensor for name, tensor in tensors if name not in quantized and not name.endswith(rounding)}


def save_student(path: str, student: Model, quant: QuantConfig, tokenizer: bytes, notes: dict[str, str]) -> int:
    """Pack a fake-quantized student into a file. Returns its bytes.  quant: what it was prepared with."""
    tensors = {**float_tensors(student), "tokenizer": torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)}
    if quant.weights == "pq":
        for name, at in quantized_weights(student).items():
            quantizer = student.get_submodule(at)
            assert not quantizer.waiting, f"{name} waits for its stage: see pq.begin_stage"
            quantizer.assign(student.get_parameter(name))  # as its first use would
            tensors[f"{name}.assignments"] = quantizer.assignments
            tensors[f"{name}.centroids"] = quantizer.centroids.half()
    else:
        for name, weight in weight_codes(student).items():
            tensors[f"{name}.codes"] = pack(weight.codes, quant.weight_bits)
            tensors[f"{name}.scale"] = weight.scale
    fields = {"config": asdict(student.config), "quant": asdict(quant), "notes": notes}
    return write_tensors(path, tensors, STUDENT_FORMAT, fields)


def read_student(path: str) -> Checkpoint:
    """The parts of a student's file. Raises UserError if it is missing, damaged or foreign, saying how to make it."""
    empty, read = read_file(path, STUDENT_FORMAT, "run train.py again, which writes it")
    expected, tensors = float_tensors(empty), read.tensors
    places = quantized_weights(empty).items()
    quantized = {name: (empty.get_parameter(name), empty.get_submodule(at)) for name, at in places}
    for name, (weight, quantizer) in quantized.items():
        expected |= stored_parts(name, weight, quantizer)
    check_tensors(path, expected, tensors)
    for name, (weight, quantizer) in quantized.items():
        first, second = (tensors.pop(part) for part in stored_parts(name, weight, quantizer))
        if isinstance(quantizer, ProductQuantizer):
            state = {"assignments": first, "centroids": second.float(), "counts": torch.ones(CENTROIDS)}
            quantizer.load_state_dict(state, strict=False, assign=True)
            read.weights[name] = weight_of(quantizer, weight, name)
        else:
            read.weights[name] = Weight(unpack(first, quantizer.bits, weight.numel()).view(weight.shape), second)
    return read


def stored_parts(name: str, weight: Tensor, quantizer: WeightQuantizer) -> dict[str, Tensor]:
    """The two tensors of a quantized weight in a file, as empty as the weight."""
    if isinstance(quantizer, ProductQuantizer):
        return {f"{name}.assignments": quantizer.assignments, f"{name}.centroids": quantizer.centroids.half()}
    codes = weight.new_empty(-(-weight.numel() * quantizer.bits // 8), dtype=torch.uint8)
    return {f"{name}.codes": codes, f"{name}.scale": weight.new_empty((len(weight), 1) if quantizer.per_row else ())}


def fake_quantized(read: Checkpoint) -> Model:
    """The student of a file, fake-quantized as it was trained, on CPU."""
    student, tensors = meta_model(read.config, read.quant).to_empty(device="cpu"), dict(read.tensors)
    for name, quantizer in quantized_weights(student).items():
        tensors[name] = dequantize(*read.weights[name], torch.zeros(()))
        fixed = FixedQuantizer(student.get_submodule(quantizer), read.weights[name].scale)
        student.set_submodule(quantizer, nn.Identity() if name == WORDS else fixed)  # a table is only looked up
    student.load_state_dict(tensors, strict=False)  # of read_student, which has no state of quantizers
    return student.eval()


def tokenizer_of(path: str, read: Checkpoint, head: str = "") -> Encoder:
    """The tokenizer (of any kind) of a file, with the model's prompt for an embedding head.  head: of the model to be built,
    if not the file's. Raises UserError unless its ids fit into the model's table.
    """
    tokenizer = load_tokenizer(read.vocabulary.numpy().tobytes(), path)
    if tokenizer.vocab_size > read.config.vocab_size:  # a table may have reserved rows
        raise UserError(f"{path}: its tokenizer has {tokenizer.vocab_size:,} ids, its model {read.config.vocab_size:,}")
    if (head or read.config.head) == "embedding":
        tokenizer.set_prompt(read.notes.get("prompt", ""))
    return tokenizer


# ------------------------------------------------------------------------------ before fine-tuning
class Start:
    """What fine-tuning starts from: a converted checkpoint, or random weights; and the task that it is fine-tuned on."""

    def __init__(self, config: TrainConfig, task: Task, folder: str):
        self.task, self.folder, self.seed, self.read = task, folder, config.seed, None
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
            sizes = dict(vocab_size=self.tokenizer.vocab_size, hidden_size=hidden, num_layers=layers)
            sizes |= dict(num_heads=max(1, hidden // 64), ffn_size=4 * hidden)
            self.config = check_config(ModelConfig(**sizes, tt=tt_config(config), **self.head))
            self.name = config.model + (f"-tt{config.tt_rank}" if config.tt_rank else "")
            self.identity = [repr(self.config), self.tokenizer.sha256]
        else:
            path = find_model(config.model)
            self.read = read_model(path)  # its tensors are mapped from disk
            self.config = self.read.config
            self.tokenizer = tokenizer_of(path, self.read, task.head)
            self.name = os.path.splitext(os.path.basename(path))[0]
            self.identity = [self.name, recorded_checksum(path)]
            if self.config.num_labels:
                self.find_classes(self.read.notes.get("labels", "").split("\t"))
        if task.head == "embedding":
            self.check_pooling()
        elif not config.epochs and self.classes is None:
            raise UserError(f"--epochs 0: {self.name} has no head of classes for {task.name}; train one")

    def check_pooling(self) -> None:
        """Say how the model's vectors are made, if it does not say so itself."""
        if self.config.pooling == "other":
            how = self.read.notes.get("modules", "")
            raise UserError(f"{self.name} makes its vectors in a way that is not implemented: {how}")
        if not self.config.pooling:
            print(f"{self.name} does not say how it makes sentence vectors: taken for the mean over the tokens")
        if self.tokenizer.prompt:
            print(f"before every sentence stands {self.tokenizer.prompt!r}")

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
