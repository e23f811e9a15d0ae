"""Checkpoints: float32 (weights/NAME.pt, teachers) and packed students (student.pt). Atomic save, validated
weights-only load.

A checkpoint is a dictionary of plain numbers, strings and tensors, which PyTorch reads with weights_only=True, so that
nothing in the file is executed:

    format     "sdq-checkpoint-1", or "sdq-student-6" of a student
    config     the fields of ModelConfig
    tensors    parameters by name, float32 (or float16, to save space)
    tokenizer  the bytes of the tokenizer's file
    notes      where it came from

A student also has "quant", the fields of QuantConfig, and "packed": each quantized weight as integers of b bits and a
float32 scale per row, or one scale for a core of a tensor train. Fake quantization trains in float32, and a checkpoint
of that would be full-size. Packed, 8 bits take one byte per weight, 4 bits two weights per byte, 2 bits four (3, 5, 6
and 7 bits likewise without gaps). Product quantization has a byte per block and float16 centroids instead (pq.py).

Files may come from anywhere. Before anything is unpickled, the checksums of the archive are compared and its pickle is
scanned: it may name plain tensors and nothing else, and allocates no more than the file holds. Then every config is
checked, and every tensor is compared with the shape that the config requires and must store its elements, finite ones,
before a model is filled with it.
"""

import io
import os
import pickle
import pickletools
import zipfile
from dataclasses import asdict, fields
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config import TrainConfig, scratch_shape, tt_config
from data.fetch import MODELS
from data.tasks import RAW_DIR, WEIGHTS_DIR, Task, class_names, load, match_labels
from data.tokenizer import Tokenizer, WordTokenizer
from kit.common import UserError
from kit.files import atomic_write
from model import HEADS, PRESETS, Model, ModelConfig, initialize, with_head
from pq import CENTROIDS, STAGES, ProductQuantizer, begin_stage
from prepare import prepare
from quant import FixedQuantizer, QuantConfig, WeightQuantizer, check_codes, dequantize
from tt import TensorTrain, TTConfig, tensorize

MINI = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "mini", "mini.safetensors")
TEACHERS = "teachers"  # the folder of those that train.py keeps
CHECKPOINT_FORMAT, STUDENT_FORMAT = "sdq-checkpoint-1", "sdq-student-6"
WORDS = "encoder.embeddings.word.weight"
CHUNK = 1 << 22  # weights packed at a time: XLM-R's embedding table alone has 192 million
LIMITS = {  # of each number in a ModelConfig
    "vocab_size": (1, 10**7),
    "hidden_size": (1, 2**14),
    "num_layers": (1, 200),
    "num_heads": (1, 2**10),
    "ffn_size": (1, 2**17),
    "max_tokens": (1, 2**17),
    "type_vocab_size": (1, 16),
    "position_offset": (0, 16),
    "pad_id": (0, 10**7),
    "num_labels": (0, 10**5),
    "num_slots": (0, 10**5),
    "norm_eps": (0.0, 0.1),
    "dropout": (0.0, 0.99),
}


# --------------------------------------------------------------------------------- float32 models
def save_atomically(payload: dict, path: str) -> int:
    """torch.save, atomically. Returns the bytes of the file.

    Into an open file: given a path, torch.save would write the temporary name into the archive.
    """
    with atomic_write(path) as file:
        try:
            torch.save(payload, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, which torch.save hides
                raise error.__context__ from None
            raise
        return file.tell()


def checkpoint_payload(model: Model, tokenizer: bytes, **notes: str) -> dict:
    """The dictionary of a float32 checkpoint."""
    return {
        "format": CHECKPOINT_FORMAT,
        "config": asdict(model.config),
        "tensors": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        "tokenizer": torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8),
        "notes": notes,
    }


def meta_model(config: ModelConfig) -> Model:
    """A model without storage, its layers replaced by tensor trains if the config says so."""
    with torch.device("meta"):
        model = Model(config)
        if config.tt:
            tensorize(model, config.tt)
    return model


def check_config(config: ModelConfig) -> ModelConfig:
    """Raises UserError for a shape that can't be built: configs may come from strangers' files."""
    for name, (least, most) in LIMITS.items():
        value, kinds = getattr(config, name), (int, float) if isinstance(most, float) else int
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            kind = "a number" if isinstance(most, float) else "an integer"
            raise UserError(f"model config: {name} is {value!r}, not {kind} from {least} to {most}")
    needs_labels = config.head in ("sequence", "token", "joint")
    for is_wrong, message in (
        (
            config.hidden_size % config.num_heads,
            f"hidden size {config.hidden_size} is not divisible by {config.num_heads} heads",
        ),
        (config.pad_id >= config.vocab_size, f"pad_id {config.pad_id} is outside the vocabulary"),
        (config.head not in HEADS, f"unknown head {config.head!r}; known: {', '.join(HEADS)}"),
        (needs_labels and config.num_labels < 1, f"a {config.head} head needs num_labels >= 1"),
        (config.head == "joint" and config.num_slots < 1, "a joint head needs num_slots >= 1"),
        (config.head == "mlm" and config.tt, "an mlm head needs the whole embedding table, not its cores"),
    ):
        if is_wrong:
            raise UserError(f"model config: {message}")
    return config


PLAIN = {  # what a file may name
    "collections OrderedDict",
    "torch Size",
    "torch.storage UntypedStorage",
    "torch device",
    "_codecs encode",  # bytes
    *(f"torch {kind}" for kind in ("float64", "float32", "float16", "bfloat16", "int64")),
    *(f"torch._utils _rebuild_{kind}" for kind in ("tensor_v2", "tensor_v3", "parameter")),
    *(f"torch {kind}Storage" for kind in "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()),
    *(f"torch float8_{kind}" for kind in ("e4m3fn", "e5m2")),
}
MAX_PICKLE = 4 << 20  # bytes; XLM-R large's has 0.1 MB
MAX_NUMBER = 10**7  # in the pickle of a smaller file: what LIMITS allow


def load_untrusted(path: str, advice: str, mmap: bool = False) -> object:
    """torch.load that executes nothing. Raises UserError with the advice for pickled code or damage."""
    try:
        check_archive(path)
        return torch.load(open(path, "rb"), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = f" ({error})" if len(str(error)) < 80 else ""
        what = f"holds pickled code{named} or is no PyTorch file, and was not loaded"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception:  # the libraries raise whatever a damaged file leads them to
        what = "is damaged or no PyTorch file"
    raise UserError(f"{path} {what}: {advice}")


def check_archive(path: str) -> None:
    """Raises ValueError for a damaged archive, and UnpicklingError for a pickle that names more than plain tensors.

    torch.load compares no checksums, and what it unpickles could ask for any amount of memory.
    """
    size = max(os.path.getsize(path), MAX_NUMBER)
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # the format before PyTorch 1.6: five pickles, then the numbers
            file.seek(0)
            for i in range(5):
                check_pickle(file, size if i > 2 else None)  # the first is a magic number
            return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        names = {record.filename.lower() for record in records}  # PyTorch finds them in any case
        plain = all(record.compress_type == zipfile.ZIP_STORED for record in records)
        pickles = [record for record in records if record.filename.lower().endswith(".pkl")]
        if not plain or len(names) < len(records) or len(pickles) != 1 or archive.testzip():
            raise ValueError
        if pickles[0].file_size > MAX_PICKLE:
            raise ValueError
        check_pickle(io.BytesIO(archive.read(pickles[0])), size)


def check_pickle(file: IO[bytes], largest: int | None) -> None:
    """Read a pickle without executing it.  largest: of its integers, which may be sizes."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL") and argument not in PLAIN:
            raise pickle.UnpicklingError(str(argument))
        if largest is not None and isinstance(argument, int) and argument > largest:
            raise ValueError


def read_checkpoint(path: str, expected_format: str = CHECKPOINT_FORMAT) -> dict:
    """The raw dictionary of a checkpoint, with tensors mapped from disk.

    Raises UserError for a missing, truncated or foreign file, or one that holds pickled code.
    """
    advice = "make one with 'python convert.py NAME --from DIR'"
    if expected_format != CHECKPOINT_FORMAT:
        advice = "train.py writes student.pt and state.pt, run it again"
    elif os.path.basename(os.path.dirname(os.path.abspath(path))) == TEACHERS:
        advice = "delete it, and the next run trains it again"
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}: {advice}")
    payload = load_untrusted(path, advice, mmap=True)
    if not isinstance(payload, dict) or payload.get("format") != expected_format:
        raise UserError(f"{path} is not a checkpoint of this project ({expected_format}): {advice}")
    return payload


def check_kinds(payload: dict, **kinds: type) -> None:
    """Raises TypeError for a part of another type: a tensor, say, can be iterated as well, but slowly."""
    for name, kind in kinds.items():
        if not isinstance(payload.get(name), kind):
            raise TypeError(f"{name} is no {kind.__name__}")


def config_of(payload: dict, path: str) -> ModelConfig:
    """The checked model config of a checkpoint's dictionary."""
    config = payload.get("config")
    known = {field.name for field in fields(ModelConfig)}
    try:
        later = {"num_slots", "tt"}  # fields that older files don't have
        if not isinstance(config, dict) or not known - later <= set(config) <= known:
            raise ValueError
        tt = config.get("tt")
        if tt is not None:
            tt = TTConfig(**{**tt, "keep": tuple(tt["keep"])})
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: the model config is damaged or of another version ({error}): convert it again"
        ) from None
    return check_config(ModelConfig(**{**config, "tt": tt}))


def load_checkpoint(path: str) -> Model:
    """The float32 model of a checkpoint (also of one in float16), on CPU, in eval mode. Every tensor is accounted for."""
    return float32_model(read_checkpoint(path), path)


def float32_model(payload: dict, path: str) -> Model:
    """The model of a checkpoint's dictionary."""
    config, tensors = config_of(payload, path), payload.get("tensors")
    if not isinstance(tensors, dict):
        raise UserError(f"{path} is damaged: it holds no tensors; convert it again")
    model = meta_model(config)
    check_tensors(path, {name: tensor.shape for name, tensor in model.state_dict().items()}, tensors)
    model.to_empty(device="cpu")
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def check_tensors(
    path: str,
    shapes: dict[str, torch.Size],
    tensors: dict,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16),
) -> None:
    """Raises UserError naming the first tensor that is missing, unexpected, or of a wrong shape or type."""
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: tensor {name} is missing")
        if tensor.shape != shape:
            raise UserError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if dtypes and tensor.dtype not in dtypes:
            known = " or ".join(map(str, dtypes))
            raise UserError(f"{path}: tensor {name} is {tensor.dtype}, expected {known}")
        if not stores_its_elements(tensor):
            raise UserError(f"{path}: tensor {name} claims more elements than the file holds")
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(f"{path}: tensor {name} has values that are not finite")
    extra = sorted(map(str, set(tensors) - set(shapes)))
    if extra:
        more = f" and {len(extra) - 1} more" if extra[1:] else ""
        raise UserError(f"{path}: unexpected tensor {extra[0]}{more}")


def stores_its_elements(tensor: Tensor) -> bool:
    """False for a tensor that repeats few stored elements (stride 0), with which a small file could request any amount
    of memory.
    """
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


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


def left_out(name: str) -> bool:
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
        if name not in quantized and not left_out(name)
    }


def student_payload(student: Model, config: QuantConfig, tokenizer: bytes, **notes: str) -> dict:
    """The dictionary of a student.pt: packed integers and scales, or blocks and centroids, and float32 tensors."""
    if config.weights == "pq":
        begin_stage(student, len(STAGES) - 1)  # nothing waits any more
        quantizers = {name: student.get_submodule(at) for name, at in quantized_weights(student).items()}
        packed = {
            name: {"assignments": quantizer.assignments.cpu(), "centroids": quantizer.centroids.detach().half().cpu()}
            for name, quantizer in quantizers.items()
        }
    else:
        packed = {
            name: {"codes": pack(weight.codes, config.weight_bits), "scale": weight.scale}
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
    """The parts of a student.pt, checked.

    Raises UserError for a missing, truncated, tampered or foreign file; nothing in it is executed.
    """
    payload = read_checkpoint(path, STUDENT_FORMAT)
    config = config_of(payload, path)
    try:
        check_kinds(payload, quant=dict, tensors=dict, packed=dict, notes=dict)
        check_kinds(payload["quant"], keep=list)
        quant, tensors, packed = quant_of(payload["quant"]), payload["tensors"], payload["packed"]
        notes = payload["notes"]
        check_kinds(notes, **dict.fromkeys(notes, str))
        empty = meta_model(config)
        prepare(empty, quant)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: the student checkpoint is damaged: {str(error)[:200]}") from None
    wanted = quantized_weights(empty)
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    weights = {}
    for name, entry in packed.items():
        if name not in wanted:
            raise UserError(f"{path}: packed tensor {name} has no place in the model")
        quantizer = empty.get_submodule(wanted[name])
        unpacked = unpack_blocks if isinstance(quantizer, ProductQuantizer) else unpack_weight
        weights[name] = unpacked(path, name, entry, shapes[name], quantizer)
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise UserError(f"{path}: packed tensor {missing[0]} is missing")
    expected = {name: shape for name, shape in shapes.items() if name not in wanted and not left_out(name)}
    check_tensors(path, expected, tensors, (torch.float32,))
    for name in expected:
        if name.endswith(".zero_point") and not (0 <= (value := tensors[name].item()) <= 255 and value.is_integer()):
            raise UserError(f"{path}: tensor {name} is {value}, not an integer of the grid")
    return Student(config, quant, weights, tensors, notes, payload.get("tokenizer"))


def quant_of(settings: dict) -> QuantConfig:
    """The QuantConfig of a file. Raises TypeError and the like for values of other types; prepare checks the rest."""
    quant = QuantConfig(**{**settings, "keep": tuple(settings["keep"])})
    for field in fields(QuantConfig):
        kinds = (int, float) if field.name == "noise" else (type(field.default),)
        if type(getattr(quant, field.name)) not in kinds:
            raise TypeError(f"{field.name} is {getattr(quant, field.name)!r}")
    if not all(isinstance(name, str) for name in quant.keep):
        raise TypeError(f"keep is {quant.keep}")
    return quant


def check_parts(path: str, name: str, entry: dict, sizes: dict[str, tuple], dtypes: tuple) -> list[Tensor]:
    """The tensors of a packed weight, each of its shape and type. Raises UserError if they are not."""
    if not isinstance(entry, dict) or set(entry) != set(sizes):
        raise UserError(f"{path}: packed tensor {name} is damaged")
    for (part, size), dtype in zip(sizes.items(), dtypes, strict=True):
        check_tensors(f"{path}: {name}", {part: size}, {part: entry[part]}, (dtype,))
    return [entry[part] for part in sizes]


def unpack_weight(path: str, name: str, entry: dict, shape: torch.Size, quantizer: WeightQuantizer) -> Weight:
    """The integers of a packed weight, after checking its parts against what the model requires."""
    bits, rows = quantizer.bits, (shape[0], 1) if quantizer.per_row else ()
    sizes = {"codes": (packed_bytes(shape.numel(), bits),), "scale": rows}
    packed, scale = check_parts(path, name, entry, sizes, (torch.uint8, torch.float32))
    codes = torch.empty(shape, dtype=torch.int8)
    flat, step = codes.view(-1), CHUNK // 8 * 8  # a multiple of 8 codes fills whole bytes
    for start in range(0, flat.numel(), step):
        count = min(step, flat.numel() - start)
        piece = packed[start * bits // 8 : start * bits // 8 + packed_bytes(count, bits)]
        flat[start : start + count] = unpack(piece, bits, count)
    if codes.numel() and (codes.min() < quantizer.quant_min or codes.max() > quantizer.quant_max):
        raise UserError(f"{path}: packed tensor {name} has codes outside the grid that the file names")
    return Weight(codes, scale)


def unpack_blocks(path: str, name: str, entry: dict, shape: torch.Size, quantizer: ProductQuantizer) -> Weight:
    """The integers of a weight that was stored as blocks, after checking its parts."""
    sizes = {"assignments": quantizer.assignments.shape, "centroids": (CENTROIDS, quantizer.block)}
    assignments, centroids = check_parts(path, name, entry, sizes, (torch.uint8, torch.float16))
    quantizer.to_empty(device="cpu")
    with torch.no_grad():
        quantizer.centroids.copy_(centroids)
        quantizer.assignments.copy_(assignments)
        quantizer.counts.fill_(1)
    return (table_of if name == WORDS else weight_of)(quantizer, torch.empty(shape, device="meta"))


def load_student(path: str) -> tuple[Model, Tokenizer]:
    """A packed student, fake-quantized as it was trained, on CPU; and its tokenizer."""
    read = read_student(path)
    return float_model(read), tokenizer_of(path, read)


def tokenizer_of(path: str, read: Student) -> Tokenizer:
    return Tokenizer.from_payload({"tokenizer": read.vocabulary}, path, read.config.vocab_size)


def float_model(read: Student) -> Model:
    """The fake-quantized model of the parts of a student.pt."""
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
    # Not strict: read_student has checked the names except those of left_out(), which are not used.
    student.load_state_dict(tensors, strict=False)
    return student.eval()


# shim until the new format
class Checkpoint(NamedTuple):
    config: ModelConfig
    tensors: dict
    notes: dict
    vocabulary: Tensor | None


def read_model(path):
    payload = read_checkpoint(path)
    return Checkpoint(config_of(payload, path), payload["tensors"], payload.get("notes", {}), payload["tokenizer"])


def teacher_model(read):
    model = meta_model(read.config)
    model.to_empty(device="cpu")
    model.load_state_dict(read.tensors, strict=True)
    return model.eval()


def save_model(path, model, tokenizer, notes, temporary=None):
    return save_atomically(checkpoint_payload(model, tokenizer, **notes), path)


def save_student(path, student, quant, tokenizer, notes):
    return save_atomically(student_payload(student, quant, tokenizer, **notes), path)


fake_quantized = float_model


# ------------------------------------------------------------------------------- before fine-tuning
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
