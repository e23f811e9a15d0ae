"""Label texts with a student: the integer model of its file, one text per line, two texts separated by a tab. Or make
their vectors, or evaluate it on the test sets of its task.

    python predict.py out/NAME/student.safetensors texts.tsv
    echo "The girl reads a book.	The girl reads." | python predict.py out/NAME/student.safetensors
    python predict.py out/NAME/student.safetensors sentences.txt --out vectors.npy    # of --task embed
    python predict.py out/NAME/student.safetensors --evaluate

Each line becomes one line: the label and its probability, or the number of a regression. Of words with tags, the tag of
each word, separated by spaces, behind the label if there is one. A blank line stays blank, and so does one that this
student can't read, which is told on stderr. Row i of vectors.npy, float32 (N, C) of length 1, is that of line i. In
Python:

    student = load("out/NAME/student.safetensors")
    for label, probability in predict(student, [("The girl reads a book.", "The girl reads.")]):
        print(label, probability)
    vectors = embed(load("out/embed-NAME/student.safetensors"), ["The girl reads a book."])
"""

if __name__ == "__main__":
    import kit.interrupt  # noqa: F401

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch

from aot import compile_layers
from checkpoint import fake_quantized, read_student, tokenizer_of
from config import COUNT
from data.batches import (
    IGNORE,
    Dataset,
    cut_note,
    encode_sentences,
    encode_split,
    encode_texts,
    encode_unlabelled,
    evaluation_batches,
    evaluation_order,
)
from data.files import Example, Sentence, refuse_utf16
from data.metrics import joint_scores, score_sequences, sentence_scores, token_scores
from data.slots import Names
from data.tasks import Task, class_names, find_data, find_task, languages_of, with_classes
from data.tokenizer import Encoder
from int8 import integer_model
from kit import parallel
from kit.common import Progress, UserError, choose_device, clock, exit_status, hardware
from kit.files import atomic_write
from kit.report import caveats, report_table, summarize_languages
from model import Model
from quant import ActQuantizer

EVAL_TOKENS = {"cpu": 1024, "cuda": 16384}  # tokens per evaluation batch, padding included
CHUNK = 1024  # texts that are sorted by length together
TOKENS = 4096  # per batch, padding included


class Student(NamedTuple):
    """A model that is ready to predict; unless it is compiled, it can be copied and pickled.

    labels: of a text; slots: tags of words, () if the model has none.  max_length: where texts are cut, and texts: 1
    or 2, both as in training.
    """

    model: Model
    tokenizer: Encoder
    labels: tuple[str, ...]
    slots: tuple[str, ...]
    max_length: int
    texts: int


def load(path: str, device: str = "auto", threads: int | None = None, compiled: bool = False) -> Student:
    """A student as an integer model. Worker processes must be spawned: PyTorch hangs in one that is forked after a
    prediction with several threads.  compiled: through aot.compile_layers.

    Raises UserError for a damaged file or one without integers.
    """
    read, device = read_student(path), choose_device(device, threads)
    labels, slots = read.classes
    if read.config.head == "token":  # its labels are those of words
        labels, slots = (), labels
    texts, tokenizer = int(read.notes.get("texts", 1)), tokenizer_of(path, read)
    model = integer_model(read, device)
    if compiled:
        compile_layers(model)
    return Student(model, tokenizer, labels, slots, read.max_length, texts)


def problem(student: Student, text: str | tuple[str, str]) -> str:
    """Why the student can't read a text, "" if it can: it was trained on single texts or on pairs, and words whose tags
    stand beside a label are never cut.
    """
    texts = (text,) if isinstance(text, str) else text
    if not texts[0].strip():
        return "has an empty first text"
    if len(texts) != student.texts:
        found = "1 text" if len(texts) == 1 else f"{len(texts)} texts"
        return f"has {found}, and this student reads {('one text', 'two texts')[student.texts - 1]}, separated by a tab"
    if student.slots and student.labels:
        ((ids, _),), most = student.tokenizer.encode_words([words_of(text)]), student.model.config.max_tokens
        if len(ids) > most:
            return f"has {len(ids)} tokens, the model takes {most}: split it"
    return ""


def predict(student: Student, texts: Iterable[str | tuple[str, str]]) -> Iterator[tuple]:
    """For each text or pair, in order: (label, probability); (number,) of a regression; (tags,) of words, or (label,
    probability, tags). Pairs get the token types that they were trained with. As in training, a long text is cut, which
    is told on stderr, and a long sentence of words with tags is split.

    Raises UserError for a text that the student can't read, see problem().
    """
    if student.model.config.head == "embedding":
        raise UserError("this student makes vectors: use embed, or --out vectors.npy")
    for chunk in chunks(student, texts):
        yield from predict_chunk(student, chunk)


def embed(student: Student, texts: Iterable[str]) -> np.ndarray:
    """The vectors of sentences, float32 (N, C), of length 1, so that the dot product of two is their cosine. The student's
    prompt (student.tokenizer.prompt) is put before each.

    Raises UserError for a text that the student can't read, and for a student that makes no vectors.
    """
    check_makes_vectors(student)
    device = next(student.model.parameters()).device
    parts = (
        sentence_vectors(student.model, encode(student, chunk), device, None, TOKENS)
        for chunk in chunks(student, texts)
    )
    return np.concatenate([np.empty((0, student.model.config.hidden_size), dtype=np.float32), *parts])


def check_makes_vectors(student: Student) -> None:
    if student.model.config.head != "embedding":
        raise UserError("this student predicts labels: vectors come from one of --task embed")


def chunks(student: Student, texts: Iterable) -> Iterator[list]:
    """Texts in parts of CHUNK. Raises UserError for one that the student can't read."""
    if isinstance(texts, str):
        raise UserError("give a list of texts, not a string: [text]")
    numbered = enumerate(texts, start=1)
    while chunk := list(islice(numbered, CHUNK)):
        for number, text in chunk:
            if wrong := problem(student, text):
                raise UserError(f"text {number} {wrong}")
        yield [text for _, text in chunk]


@torch.no_grad()
def predict_chunk(student: Student, texts: list[str | tuple[str, str]]) -> list[tuple]:
    model, device = student.model, next(student.model.parameters()).device
    dataset = replace(encode(student, texts), pad=student.tokenizer.pad_id)
    rows, tags = [], []
    for batch in batches_on(device, dataset, batch_tokens(model, device, TOKENS)):
        logits, _ = model(batch.ids, batch.mask, types=batch.types)
        logits, slots = logits if isinstance(logits, tuple) else (logits, logits)
        rows += best(logits, student.labels) if student.labels else ()
        if student.slots:
            words, found = (batch.tags != IGNORE).cpu(), slots.argmax(dim=-1).cpu()
            tags += [[student.slots[tag] for tag in found[i][words[i]].tolist()] for i in range(len(words))]
    order = np.argsort(evaluation_order(dataset))
    rows = [rows[i] for i in order] if student.labels else [()] * len(texts)
    if not student.slots:
        return rows
    every = (tag for i in order for tag in tags[i])  # a long sentence is several rows: its words follow each other
    return [(*row, list(islice(every, len(words_of(text))))) for row, text in zip(rows, texts, strict=True)]


def best(logits: torch.Tensor, labels: tuple[str, ...]) -> Iterable[tuple]:
    """(the likeliest label, its probability) of each row; (the number,) of a regression."""
    if len(labels) == 1:
        return zip(logits[:, 0].tolist(), strict=True)
    probability, index = logits.float().softmax(dim=-1).max(dim=-1)
    return zip([labels[i] for i in index.tolist()], probability.tolist(), strict=True)


def words_of(text: str) -> list[str]:
    """Words are separated by spaces alone, as in files of tags: other white space is part of a word."""
    return [word for word in text.split(" ") if word]


def encode(student: Student, texts: list[str | tuple[str, str]]) -> Dataset:
    if student.slots:  # any tag: it says where a word begins
        names = Names(("",), student.slots[:1], 1, 1)
        sentences = [Sentence(words, student.slots[:1] * len(words), "") for words in map(words_of, texts)]
        longest = student.model.config.max_tokens if student.labels else student.max_length
        return encode_sentences(sentences, names, student.tokenizer, longest, cuts=not student.labels)
    if student.model.config.head == "embedding":
        dataset = encode_unlabelled(
            [Example(text, None, None) for text in texts], student.tokenizer, student.max_length
        )
    else:
        first, *second = zip(*([text] if isinstance(text, str) else text for text in texts), strict=True)
        labels = np.zeros(len(texts), dtype=np.int64)
        dataset = encode_texts(student.tokenizer, first, second[0] if second else None, student.max_length, labels)
    if note := cut_note([dataset], "texts", student.max_length):
        print(f"NOTE: {note}", file=sys.stderr)
    return dataset


def lines_of(path: str) -> Iterator[tuple[str | tuple[str, str], str]]:
    """(text or pair, what is wrong) of each line of a file, or of standard input for "-"; ("", "") of a blank line."""
    with open(0 if path == "-" else path, "rb") as file:
        refuse_utf16(file, path)
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield "", f"is not UTF-8 text (byte {error.start})"
                continue
            texts = tuple(text.split("\t"))
            yield "" if not text.strip() else texts if len(texts) > 1 else text, ""


# ------------------------------------------------------------------------------------- evaluation
def batch_tokens(model: Model, device: torch.device, tokens: int = 0) -> int:
    """The tokens of a batch, padding included; by default those of an evaluation. Dynamic ranges per tensor are those of
    a batch: such a student gets one row at a time, or its result would depend on the others and their padding.
    """
    acts = (module for module in model.modules() if isinstance(module, ActQuantizer))
    alone = any(not (act.static or act.per_token) for act in acts)
    return 1 if alone else tokens or EVAL_TOKENS[device.type]


def batches_on(device: torch.device, dataset: Dataset, tokens: int) -> Iterator:
    """Batches of all rows once, longest first.  tokens: see batch_tokens."""
    return (batch.to(device) for batch in evaluation_batches(dataset, tokens))


Cache = dict[bytes, np.ndarray]  # the ids of a sentence -> its vector


@torch.no_grad()
def sentence_vectors(
    model: Model, dataset: Dataset, device: torch.device, cache: Cache | None = None, tokens: int = 0
) -> np.ndarray:
    """The vectors of a data set's sentences, float32 (N, C).

    cache: of the same model; what it holds is not computed again, and all others are added.  tokens: see batch_tokens.
    """
    model.eval()
    cache, found = {} if cache is None else cache, []
    keys = [row.tobytes() for row in np.split(dataset.ids, dataset.starts[1:-1])]
    last = {key: i for i, key in enumerate(keys) if key not in cache}  # one row per different sentence
    order = np.array([i for i in evaluation_order(dataset) if last.get(keys[i]) == i], dtype=np.int64)
    for batch in parallel.mine(evaluation_batches(dataset, batch_tokens(model, device, tokens), order)):
        batch = batch.to(device)
        found.append(model(batch.ids, batch.mask, types=batch.types)[0].float().cpu().numpy())
    cache |= zip((keys[i] for i in order), chain.from_iterable(parallel.gather(found)), strict=True)
    return np.stack([cache[key] for key in keys])


def set_references(teacher: Model, datasets: list[Dataset], device: torch.device) -> Cache:
    """Where there are no labels, give each data set the teacher's vectors, which students are compared with. Returns the
    cache of its vectors.
    """
    cache: Cache = {}
    datasets = [dataset for dataset in datasets if dataset.labels is None]
    progress = Progress("vectors to compare with, data sets", len(datasets))
    for i, dataset in enumerate(datasets):
        dataset.reference = sentence_vectors(teacher, dataset, device, cache)
        progress.update(i + 1)
    progress.clear()
    return cache


@torch.no_grad()
def evaluate(model: Model, dataset: Dataset, device: torch.device, cache: Cache | None = None) -> dict:
    """The metrics of the dataset in %, "score" (the mean of those that models are compared by) and the counts behind them.
    cache: see sentence_vectors.
    """
    if dataset.labels is None:
        vectors = sentence_vectors(model, dataset, device, cache)
        return sentence_scores(*dataset.metrics, vectors, dataset.scores, dataset.reference)
    model.eval()
    predictions, labels = [], []  # of sequences, one array per batch
    tags, slots = [], []  # labels and predictions of words, one list of arrays per batch, one array per sequence
    for batch in parallel.mine(evaluation_batches(dataset, batch_tokens(model, device))):
        batch = batch.to(device)
        logits, _ = model(batch.ids, batch.mask, types=batch.types)
        if batch.tags is not None:
            logits, slot_logits = logits if isinstance(logits, tuple) else (None, logits)
            words = batch.tags != IGNORE
            borders = words.sum(dim=1).cumsum(dim=0)[:-1].cpu()
            tags.append(np.split(batch.tags[words].cpu().numpy(), borders))
            slots.append(np.split(slot_logits.argmax(dim=-1)[words].cpu().numpy(), borders))
        if logits is not None:
            is_class = not batch.labels.is_floating_point()
            predictions.append((logits.argmax(dim=-1) if is_class else logits[:, 0]).cpu().numpy())
            labels.append(batch.labels.cpu().numpy())
    predictions, labels, tags, slots = map(parallel.gather, (predictions, labels, tags, slots))
    tags, slots = list(chain(*tags)), list(chain(*slots))
    if not predictions:
        return token_scores(slots, tags, dataset.slots, dataset.metrics)
    predictions, labels = np.concatenate(predictions), np.concatenate(labels)
    if tags:
        return joint_scores(predictions, labels, slots, tags, dataset.slots)
    in_file_order = np.argsort(evaluation_order(dataset))
    return score_sequences(dataset.metrics, predictions[in_file_order], labels[in_file_order])


def in_words(evaluation: dict, dataset: Dataset) -> str:
    return ", ".join(f"{name} {evaluation[name]:.2f}" for name in dataset.metrics)


def evaluate_languages(
    name: str, model: Model, tests: dict[str, Dataset], task: Task, device: torch.device, cache: Cache | None = None
) -> dict:
    """A row of results.json without its size and time.  cache: see sentence_vectors; languages share it."""
    progress, found, cache = Progress(name + ", languages", len(tests)), {}, {} if cache is None else cache
    for i, (language, dataset) in enumerate(tests.items()):
        found[language] = evaluate(model, dataset, device, cache)
        progress.update(i + 1, f"{language} {in_words(found[language], dataset)}")
    progress.clear()
    return summarize_languages(found, task.train_language)


def load_tests(task: Task, split: str, languages: Sequence[str], folder: str, *how) -> dict[str, Dataset]:
    """The encoded test set of each language: all, or the training language and the given ones.  how: the tokenizer, the
    longest sequence and the limit of rows, as in encode_split.
    """
    known = languages_of(task, folder, split)
    for language in languages:
        if language not in known:
            raise UserError(f"--languages {language!r}: {task.name} has {' '.join(known)}")
    chosen = [name for name in known if name in {task.train_language, *(languages or known)}]
    return {name: encode_split(task, split, name, folder, *how) for name in chosen}


def evaluate_student(path: str, args: argparse.Namespace) -> None:
    """Print the table of a student on the test sets of its task, of which the training files need not be there."""
    started, device = time.monotonic(), choose_device(args.device, args.threads)
    read = read_student(path)
    notes, quant = read.notes, read.quant
    task = find_task(notes.get("task", ""), notes.get("train_language"))
    if task.name in ("tsv", "tags"):  # its classes are in its training file, and in the student
        task = with_classes(task, read.classes[0])
    if notes.get("data") == "own" and not args.data_dir:
        raise UserError(f"{path} was trained on files of --data-dir: name it")
    folder = find_data(task, args.data_dir, task.models[-1] if notes.get("data") == "built in" else "")
    how = folder, tokenizer_of(path, read), read.max_length, args.max_eval
    tests = load_tests(task, args.eval_split, args.languages, *how)
    if read.classes != list(class_names(task, folder)):
        raise UserError(f"{path} has other labels than {folder}: name its --data-dir")
    if any(each.pairs != (notes.get("texts") == "2") for each in tests.values()):
        raise UserError(f"{path} reads {notes['texts']} text(s) per row, {folder} has others")
    if note := cut_note([*tests.values()], "texts", read.max_length):
        print(f"NOTE: {note}, as in training")
    floats = 32 in (quant.weight_bits, quant.act_bits) and not args.compiled  # there are no integers to multiply
    model = fake_quantized(read).to(device) if floats else integer_model(read, device)
    kind = "fake-quantized" if floats else f"integers, {type(model.encoder.layers[0].ffn.up.kernel).__name__}"
    if args.compiled:
        compile_layers(model)
        kind += ", compiled"
    row = evaluate_languages("student", model, tests, task, device)
    row |= {"size_bytes": os.path.getsize(path), "train_seconds": 0}
    name = f"{notes.get('method')} W{quant.weight_bits}A{quant.act_bits}"
    results = {"methods": {name: row}, "languages": list(tests)}
    print("", report_table(results, task), "", *caveats(results, task), sep="\n")
    print(f"{kind}, {hardware(device)}, {torch.get_num_threads()} threads; ", end="")
    print(f"{clock(time.monotonic() - started)} in all")


# ----------------------------------------------------------------------------------- command line
def npy(path: str) -> str:
    """An argparse type."""
    if not path.endswith(".npy"):
        raise argparse.ArgumentTypeError(f"{path}: choose a name that ends with .npy")
    return path


def write_vectors(student: Student, path: str, out: str) -> None:
    """Write the vectors of all lines of a file as one .npy. Raises UserError naming the first line that has none."""
    check_makes_vectors(student)
    texts = []
    for number, (text, wrong) in enumerate(lines_of(path), start=1):
        if wrong := wrong or (problem(student, text) if text else "is empty"):
            raise UserError(f"{'standard input' if path == '-' else path}, line {number} {wrong}; nothing was written")
        texts.append(text)
    vectors = embed(student, texts)
    with atomic_write(out) as file:
        np.save(file, vectors)
    print(f"wrote {out}: {vectors.dtype} {vectors.shape}")


def label_lines(student: Student, path: str) -> None:
    """Print one line per line of a file. Raises UserError if some have no label."""
    source, lines, failed = "standard input" if path == "-" else path, enumerate(lines_of(path), start=1), 0
    while chunk := list(islice(lines, CHUNK)):
        readable = {}
        for number, (text, wrong) in chunk:
            if wrong := wrong or (text and problem(student, text)):
                print(f"error: {source}, line {number} {wrong}", file=sys.stderr)
                failed += 1
            elif text:
                readable[number] = text
        found = dict(zip(readable, predict(student, readable.values()), strict=True))
        for number, _ in chunk:
            row = found.get(number, ())
            cells = (f"{x:.4f}" if isinstance(x, float) else " ".join(x) if isinstance(x, list) else x for x in row)
            print(*cells, sep="\t")
    if failed:
        raise UserError(f"lines without a label, see above: {failed:,}; in the output they are blank")


@exit_status()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Label texts with the integer model of a student, make their vectors, or evaluate it on the test sets.",
        epilog="example: python predict.py out/xnli-mini-w8a8-s0/student.safetensors pairs.tsv",
    )
    parser.add_argument("student", help="a student.safetensors of train.py")
    about = "one text per line, two separated by a tab (default: standard input)"
    parser.add_argument("texts", nargs="?", default="-", help=about)
    parser.add_argument(
        "--out", type=npy, metavar="FILE.npy", help="of a student of --task embed: write vectors, one row per line"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="put before every sentence instead of the model's own")
    about = "faster with few tokens, after half a minute the first time; not to the last bit (aot.py)"
    parser.add_argument("--compiled", action="store_true", help=about)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    parser.add_argument("--threads", type=COUNT, help="CPU threads (default: all cores)")
    group = parser.add_argument_group("evaluation")
    group.add_argument("--evaluate", action="store_true", help="print the metrics of each test set instead")
    group.add_argument("--data-dir", metavar="DIR", help="folder of the files (default: data/raw, or built-in data)")
    group.add_argument("--languages", nargs="+", default=(), metavar="X", help="besides the training language")
    group.add_argument("--eval-split", default="test", choices=("test", "dev"), help="default: test")
    group.add_argument("--max-eval", type=COUNT, metavar="N", help="N random examples per language (default: all)")
    args = parser.parse_args(argv)
    if args.evaluate and args.out:
        parser.error("--evaluate prints a table, --out writes vectors: choose one")
    if args.evaluate:
        evaluate_student(args.student, args)
        return
    student = load(args.student, args.device, args.threads, args.compiled)
    if args.prompt is not None:
        student.tokenizer.set_prompt(args.prompt)
    if args.out:
        write_vectors(student, args.texts, args.out)
    else:
        label_lines(student, args.texts)


if __name__ == "__main__":
    sys.exit(main())
