"""Float32 checkpoints: weights/NAME.pt and the teachers, written whole or not at all, read with distrust.

A checkpoint is a dictionary of plain numbers, strings and tensors, so that PyTorch can read it with
weights_only=True, which runs no code of the file:

    format     "sdq-checkpoint-1"
    config     the fields of ModelConfig
    tensors    the parameters by name, float32 (or float16, to be small)
    tokenizer  the bytes of the tokenizer's file: a model without its words is of no use
    notes      where it came from

A file may come from anywhere. Each tensor is checked against the shape that the config asks for,
and must hold its numbers, before a model is filled with it. packed.py (integer students) uses the same
checks.
"""

import os
import pickle
from dataclasses import asdict, fields

import torch
from torch import Tensor

from data import UserError
from model import Model, ModelConfig
from tt import TTConfig

CHECKPOINT_FORMAT = "sdq-checkpoint-1"


def save_atomically(payload: dict, path: str) -> int:
    """torch.save into a temporary neighbour, then rename: a reader never sees half a file. Returns
    the bytes.
    """
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.part"
    try:
        torch.save(payload, temporary)
        size = os.path.getsize(temporary)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    return size


def checkpoint_payload(model: Model, tokenizer: bytes, **notes: str) -> dict:
    """What a float32 checkpoint holds: plain numbers, strings and tensors only, so that
    weights_only can read it.
    """
    return {
        "format": CHECKPOINT_FORMAT,
        "config": asdict(model.config),
        "tensors": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        "tokenizer": torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8),
        "notes": notes,
    }


def load_untrusted(path: str, advice: str, mmap: bool = False) -> object:
    """torch.load that runs no code of the file. Raises UserError with the advice if there is any, or damage."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        what = "holds pickled code or is no PyTorch file, and was not loaded"
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError):
        what = "is damaged or no PyTorch file"
    raise UserError(f"{path} {what}: {advice}")


def read_checkpoint(path: str, expected_format: str = CHECKPOINT_FORMAT) -> dict:
    """The raw dictionary of a checkpoint, tensors mapped from disk. Never executes anything in the
    file.

    Raises UserError for a missing, truncated, foreign or code-carrying file.
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}: make one with 'python convert.py xlmr-base'")
    payload = load_untrusted(path, "make one with 'python convert.py NAME --from DIR'", mmap=True)
    if not isinstance(payload, dict) or payload.get("format") != expected_format:
        raise UserError(
            f"{path} is not a checkpoint of this project ({expected_format}): "
            f"convert Hugging Face files with 'python convert.py NAME --from DIR'"
        )
    return payload


def config_of(payload: dict, path: str) -> ModelConfig:
    """The checked model config of a checkpoint's dictionary."""
    config = payload.get("config")
    known = {field.name for field in fields(ModelConfig)}
    try:
        if not known - {"num_slots", "tt"} <= set(config) <= known:  # those two came later
            raise ValueError
        tt = config.get("tt")
        if tt is not None:
            tt = TTConfig(**{**tt, "keep": tuple(tt["keep"])})
    except (TypeError, ValueError, KeyError):
        raise UserError(
            f"{path}: the model config is damaged or of another version; convert it again"
        ) from None
    return ModelConfig(**{**config, "tt": tt})


def load_checkpoint(path: str) -> Model:
    """The model that convert.py wrote, on CPU, in eval mode; every tensor accounted for. It is
    float32, also where the file holds float16.
    """
    payload = read_checkpoint(path)
    config = config_of(payload, path)
    tensors = payload.get("tensors")
    if not isinstance(tensors, dict):
        raise UserError(f"{path} is damaged: it holds no tensors; convert it again")
    with torch.device("meta"):
        model = Model(config)
    check_tensors(
        path, {name: tensor.shape for name, tensor in model.state_dict().items()}, tensors
    )
    model.to_empty(device="cpu")
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def check_tensors(
    path: str,
    shapes: dict[str, torch.Size],
    tensors: dict,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16),
) -> None:
    """Refuse, by name, the first tensor that is missing, extra, misshapen or of another type."""
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: tensor {name} is missing")
        if tensor.shape != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}"
            )
        if dtypes and tensor.dtype not in dtypes:
            known = " or ".join(map(str, dtypes))
            raise UserError(f"{path}: tensor {name} is {tensor.dtype}, expected {known}")
        if not holds_its_numbers(tensor):
            raise UserError(f"{path}: tensor {name} claims more numbers than the file holds")
    extra = sorted(map(str, set(tensors) - set(shapes)))
    if extra:
        more = f" and {len(extra) - 1} more" if extra[1:] else ""
        raise UserError(f"{path}: unexpected tensor {extra[0]}{more}")


def holds_its_numbers(tensor: Tensor) -> bool:
    """False for a tensor that repeats a few stored numbers (stride 0): a small file could ask for
    any amount of memory with it.
    """
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
