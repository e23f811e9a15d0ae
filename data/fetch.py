"""Download, verify, unpack: a file gets its final name only when its size and SHA-256 are right.

    python data/fetch.py xnli           # XNLI dev, test and English training set -> data/raw
    python data/fetch.py xglue          # XGLUE's other tasks, 0.9 GB; pawsx: PAWS-X alone, 30 MB
    python data/fetch.py atis           # downloads nothing: says where ATIS comes from (or snips)
    python data/fetch.py rte            # a task of GLUE: also cola sst2 stsb qqp mnli qnli
    python data/fetch.py glue           # downloads nothing: which of GLUE's files are there

A download goes to NAME.part and is renamed when it is complete and correct. After a cut connection the next call
continues the .part file (HTTP Range); a wrong hash deletes it. Of an archive only the files named below are unpacked,
each to a temporary name first, and an archive with a member that points outside its folder is refused.

The checksums were published by several independent projects for the same addresses. ATIS, SNIPS and GLUE's MRPC are
not downloaded: the command says who publishes them, where to put them, and what is present already.
"""

import argparse
import gzip
import hashlib
import http.client
import os
import shutil
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import IO, NamedTuple

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import kit.interrupt  # noqa: F401

from data.glue import GLUE
from data.tasks import RAW_DIR, file_paths, find_task
from data.xglue import ARCHIVE, XGLUE, official_files
from kit.common import Progress, UserError, status_of
from kit.files import check_writable

CHUNK = 1 << 20
MAX_UNPACKED = 4 << 30  # bytes; the largest file unpacked here is under 100 MB
TIMEOUT = 30  # seconds without a byte
HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Remote:
    """A file to download. size: bytes, None if not published.  members: the files to unpack.  optional: further ones,
    if they are there.
    """

    url: str
    size: int | None
    sha256: str
    members: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]

    @property
    def address(self) -> str:
        """Where it is downloaded: at the mirror of Hugging Face that the variable HF_ENDPOINT names, if it is set."""
        mirror = os.environ.get("HF_ENDPOINT", "").rstrip("/") or HUB
        mirror = mirror if "://" in mirror else f"https://{mirror}"
        return mirror + self.url.removeprefix(HUB) if self.url.startswith(HUB + "/") else self.url


XNLI = (
    Remote(
        "https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip",
        17_865_352,
        "4ba1d5e1afdb7161f0f23c66dc787802ccfa8a25a3ddd3b165a35e50df346ab1",
        ("XNLI-1.0/xnli.dev.tsv", "XNLI-1.0/xnli.test.tsv"),
    ),
    Remote(
        "https://dl.fbaipublicfiles.com/XNLI/XNLI-MT-1.0.zip",
        466_098_360,
        "f732517ba2fb1d550e9f3c2aabaef6017c91ee2dcec90e878f138764d224db05",
        ("XNLI-MT-1.0/multinli/multinli.train.en.tsv",),
    ),
)
_XLMR = "https://huggingface.co/FacebookAI/xlm-roberta-base/resolve/e73636d4f797dec63c3081bb6ed5c7b0bb3f2089/"
_XLMR_TOKENIZER = Remote(
    _XLMR + "sentencepiece.bpe.model", 5_069_051, "cfc8146abe2a0488e9e2a0c56de7952f7c11ab059eca145a0a727afce0db2865"
)
_MINILM = (
    "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/1110a243fdf4706b3f48f1d95db1a4f5529b4d41/"
)
MODELS = {
    "xlmr-base": (
        Remote(
            _XLMR + "model.safetensors",
            1_115_567_652,
            "6fd4797bc397c3b8b55d6bb5740366b57e6a3ce91c04c77f22aafc0c128e6feb",
        ),
        _XLMR_TOKENIZER,
    ),
    # InfoXLM was trained from XLM-R with its vocabulary: the same tokenizer file serves.
    "infoxlm-base": (
        Remote(
            "https://huggingface.co/microsoft/infoxlm-base/resolve/main/pytorch_model.bin",
            None,
            "2d90db785b5a6ebb57b70aa44f6182b9414c64fa302933c3bad68e97d4d82162",
        ),
        _XLMR_TOKENIZER,
    ),
    # BERT's architecture in small: 6 layers, 384 wide, WordPiece. Apache 2.0.
    "minilm": (
        Remote(
            _MINILM + "model.safetensors",
            90_868_376,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        Remote(_MINILM + "config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        Remote(_MINILM + "vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        Remote(
            _MINILM + "tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
        ),
    ),
    # BERT's architecture with XLM-R's tokenizer: 12 layers, 384 wide, 100 languages. MIT; MIT; Apache 2.0.
    "multilingual-minilm": (
        Remote(
            "https://huggingface.co/microsoft/Multilingual-MiniLM-L12-H384/resolve/main/pytorch_model.bin",
            470_657_952,
            "cce170910f4d4f3b45be025508f51ef1ad6a1de69f2d46dce7e4603ad31aaaeb",
        ),
        _XLMR_TOKENIZER,
    ),
    "multilingual-e5-small": (
        Remote(
            "https://huggingface.co/intfloat/multilingual-e5-small/resolve/614241f622f53c4eeff9890bdc4f31cfecc418b3/"
            "model.safetensors",
            470_641_600,
            "1a55775f53449dac10a2bcbc312469fac40b96d53198c407081a831f81c98477",
        ),
        _XLMR_TOKENIZER,
    ),
    "paraphrase-multilingual-minilm": (
        Remote(
            "https://huggingface.co/sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2/resolve/"
            "e8f8c211226b894fcb81acc59f3b34ba3efd5f42/model.safetensors",
            470_641_600,
            "eaa086f0ffee582aeb45b36e34cdd1fe2d6de2bef61f8a559a1bbc9bd955917b",
        ),
        _XLMR_TOKENIZER,
    ),
}
_LAYOUT = (
    "in this very layout with https://github.com/monologg/JointBERT (data/{0}), and with "
    "https://github.com/MiuLab/SlotGated-SLU (data/{0}; rename its folder valid to dev)"
)
BY_HAND = {  # what the user gets, its licence, and who publishes it in the layout that is read here
    "atis": "ATIS: 4,478 + 500 + 893 questions about air travel (Hemphill et al. 1990, Dahl et al. 1994)\n"
    "licence: Linguistic Data Consortium user agreement, for LDC93S4B, LDC93S5, LDC94S19 and LDC95S26: "
    "https://catalog.ldc.upenn.edu/LDC95S26\nfiles:   " + _LAYOUT.format("atis"),
    "snips": "SNIPS: 13,084 + 700 + 700 requests to a voice assistant (Coucke et al. 2018, arXiv 1805.10190)\n"
    "licence: CC0 1.0, published by Snips: https://github.com/sonos/nlu-benchmark (2017-06-custom-intent-engines)\n"
    "files:   " + _LAYOUT.format("snips"),
    "mrpc": "MRPC: 3,668 + 408 pairs of sentences from the news (Dolan and Brockett 2005)\n"
    "licence: Microsoft's, shown with the download\n"
    "files:   https://www.microsoft.com/en-us/download/details.aspx?id=52398, which becomes GLUE's train.tsv and "
    "dev.tsv by the list https://dl.fbaipublicfiles.com/glue/data/mrpc_dev_ids.tsv",
    "glue": "GLUE: eight tasks of one or two English texts (Wang et al. 2019, arXiv 1804.07461)\n"
    "licence: each task has its own, told by its publisher: https://gluebenchmark.com/tasks links them\n"
    "files:   'python data/fetch.py TASK' downloads any of them but mrpc, of which it says where it is",
}
# Task of GLUE -> archive under _GLUE, bytes, SHA-256; its files are what the task is read from.
_GLUE = "https://dl.fbaipublicfiles.com/glue/data/"
_ARCHIVES = {
    "cola": ("CoLA.zip", 376_971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    "sst2": ("SST-2.zip", 7_439_277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "stsb": ("STS-B.zip", 802_872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    "qqp": ("QQP-clean.zip", 41_696_084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    "mnli": ("MNLI.zip", 312_783_507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    "qnli": ("QNLIv2.zip", 10_627_589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "rte": ("RTE.zip", 697_150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
}


def glue_archive(task: str) -> Remote:
    """The archive of a task of GLUE, and which of its files are unpacked."""
    name, size, sha256 = _ARCHIVES[task]
    row = find_task(task)
    files = (*row.files["train"], *row.files["test"])
    members = tuple(f"{GLUE[task].folder}/{file}" for file in files)
    return Remote(_GLUE + name, size, sha256, members)


# The tasks' own licences apply; XGLUE's site allows non-commercial research only. Files of further languages are
# optional: lists of XGLUE's languages do not agree.
XGLUE_ARCHIVE = Remote(
    "https://huggingface.co/datasets/microsoft/xglue/resolve/refs%2Fpr%2F7/xglue_full_dataset.tar.gz",
    875_905_871,
    "e11016c02d8565d00119833a16679bbbe0fec437f5ad53c2d3f9eef6fa03f65b",
    tuple(f"{ARCHIVE}/{path}" for name in XGLUE for path in official_files(name, 0, ("en",))),
    tuple(f"{ARCHIVE}/{path}" for name in XGLUE for path in official_files(name, 0)),
)
PAWSX = Remote(
    "https://storage.googleapis.com/paws/pawsx/x-final.tar.gz",
    30_282_057,
    "4146db499101d66e68ae4c8ed3cf9dadecd625f44b7d8cf3d4a0fe93afc4fd9f",
    official_files("pawsx", 1),
)
DATASETS = {
    "xnli": XNLI,
    "xglue": (XGLUE_ARCHIVE,),
    "pawsx": (PAWSX,),
    **{task: (glue_archive(task),) for task in _ARCHIVES},
}


# ------------------------------------------------------------------------------------ downloading
def download(remote: Remote, folder: str, tries: int = 5, pause: float = 2.0, instead: str = "") -> str:
    """Download a file into `folder` and return its path. An existing file with the right hash is kept. instead: what
    the user can do where there is no network.

    Raises UserError for a refused, cut, truncated or wrong download.
    """
    path = os.path.join(folder, remote.name)
    if os.path.exists(path):
        if sha256_of(path) == remote.sha256:
            return path
        raise UserError(f"{path} exists but is not the published file: delete it and run this again")
    check_writable(folder, "choose another folder")
    os.makedirs(folder, exist_ok=True)
    part, cause = path + ".part", "the server hung up"
    for attempt in range(tries):
        try:
            if receive(remote, part):
                break
        except urllib.error.HTTPError as error:
            raise UserError(f"{remote.address} answered {error.code} {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or error
            if attempt == tries - 1 and not (os.path.exists(part) and os.path.getsize(part)):
                raise UserError(f"cannot reach {remote.address}: {cause}{instead}") from None
        if attempt < tries - 1:
            time.sleep(pause * 2**attempt)
    else:
        have = os.path.getsize(part) if os.path.exists(part) else 0
        raise UserError(f"{remote.url}: cut at {have:,} bytes, {tries} times ({cause}); run this again to continue")
    found = sha256_of(part)
    if found != remote.sha256:
        os.unlink(part)
        raise UserError(f"{remote.name}: SHA-256 is {found}, published is {remote.sha256}; the file was deleted")
    os.replace(part, path)
    return path


def receive(remote: Remote, part: str) -> bool:
    """Append what is missing of a file to `part`. True if it is complete, False if the connection was cut."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    if remote.size is not None and have >= remote.size:
        return True  # complete (or too long, which the hash will tell)
    headers = {"User-Agent": "sdq-fetch/1", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(remote.address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the server has no byte after ours
            if remote.size is None:
                return True
            os.unlink(part)
            raise UserError(
                f"{remote.url} holds only {have:,} bytes, published are {remote.size:,}; nothing was kept"
            ) from None
        raise
    with response:
        if response.status != 206:  # the server sends the whole file: start over
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        if remote.size is not None and total is not None and total != remote.size:
            if os.path.exists(part):
                os.unlink(part)
            raise UserError(f"{remote.url} holds {total:,} bytes, published are {remote.size:,}; nothing was kept")
        limit = remote.size or total or MAX_UNPACKED
        with open(part, "ab" if have else "wb", buffering=0) as file:
            started, megabytes = time.monotonic(), (remote.size or total or 0) / 1e6 or None
            progress = Progress(f"{remote.name}, MB:", megabytes, have / 1e6)
            while True:
                try:
                    chunk = response.read(CHUNK)
                except http.client.IncompleteRead as error:  # cut in the middle: keep what came
                    append(file, error.partial)
                    return False
                if not chunk:
                    break
                append(file, chunk)
                have += len(chunk)
                speed = (have / 1e6 - progress.first) / max(time.monotonic() - started, 1e-9)
                progress.update(have / 1e6, f"{speed:.1f} MB/s")
                if have > limit:
                    break
            progress.clear()
    if have > limit:
        os.unlink(part)
        raise UserError(f"{remote.url} sends more than the published {limit:,} bytes; nothing was kept")
    expected = remote.size if remote.size is not None else total
    return expected is None or have == expected


def append(file: IO[bytes], data: bytes) -> None:
    """Write all of it. Raises UserError for a full disk, which is no reason to try again."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise UserError(f"cannot write {file.name}: {error.strerror}") from None


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# -------------------------------------------------------------------------------------- unpacking
class Member(NamedTuple):
    """A file in an archive."""

    name: str
    size: int
    is_link: bool
    open: Callable[[], IO[bytes]]


def members_of(file: zipfile.ZipFile | tarfile.TarFile) -> list[Member]:
    if isinstance(file, zipfile.ZipFile):
        return [
            Member(info.filename, info.file_size, stat.S_ISLNK(info.external_attr >> 16), partial(file.open, info))
            for info in file.infolist()
        ]
    found = [
        Member(info.name, info.size, not info.isfile(), partial(file.extractfile, info))
        for info in file
        if not info.isdir()
    ]
    while file.fileobj.read(CHUNK):  # to the end, where gzip compares the checksum
        pass
    return found


def unpack(archive: str, members: tuple[str, ...], folder: str, optional: tuple[str, ...] = ()) -> list[str]:
    """Unpack the named members of a .zip or .tar.gz file into `folder`: all of them and the optional ones that are
    there, or none.

    The whole archive is refused if any member is absolute, climbs out with "..", or is a link.
    """
    name = os.path.basename(archive)
    try:
        with closing(zipfile.ZipFile(archive) if name.endswith(".zip") else tarfile.open(archive, "r:gz")) as file:
            present = {member.name: member for member in members_of(file)}  # the last of two with one name
            for member in present.values():
                check_member(name, member)
            if missing := set(members) - set(present):
                raise UserError(f"{name} has no file {min(missing)}")
            chosen = [member for member in present.values() if member.name in {*members, *optional}]
            if sum(member.size for member in chosen) > MAX_UNPACKED:
                raise UserError(f"{name} unpacks to more than {MAX_UNPACKED >> 30} GB and was refused")
            written = []
            try:
                for member in chosen:
                    target = os.path.join(folder, *member.name.split("/"))
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    with member.open() as source, open(target + ".part", "wb") as sink:
                        written.append(target)
                        shutil.copyfileobj(source, sink, CHUNK)
            except BaseException:
                for target in written:
                    os.unlink(target + ".part")
                raise
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        gzip.BadGzipFile,
        zlib.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise UserError(f"{name} is not a sound archive ({error}): delete it and fetch it again") from None
    except OSError as error:
        raise UserError(f"cannot unpack {name} into {folder}: {error.strerror or error}") from None
    for target in written:
        os.replace(target + ".part", target)
    return written


def check_member(archive: str, member: Member) -> None:
    parts = member.name.replace("\\", "/").split("/")
    outside = ".." in parts or parts[0] == "" or ":" in parts[0]
    if outside or member.is_link:
        raise UserError(f"{archive} has a member that points outside its folder ({member.name!r}) and was refused")


def fetch_dataset(name: str, folder: str) -> None:
    if name in BY_HAND:
        return explain(name, folder)
    folder = os.path.join(folder, "glue") if name in GLUE else folder
    for remote in DATASETS[name]:
        targets = [os.path.join(folder, *member.split("/")) for member in remote.members]
        if all(os.path.exists(target) for target in targets):
            print(f"already there: {', '.join(targets)}")
            continue
        archive = download(remote, os.path.join(folder, "downloads"))
        for target in unpack(archive, remote.members, folder, remote.optional):
            print(f"wrote {target}")


def explain(name: str, folder: str) -> None:
    """Print where a data set comes from, where its files belong, and which of them are there."""
    print(f"{BY_HAND[name]}\nNothing is downloaded now. This is where the files belong:")
    for task in map(find_task, GLUE if name == "glue" else [name]):
        for path in dict.fromkeys(path for split in task.files for path in file_paths(task, folder, split)):
            print(f"  {path}: {'there' if os.path.exists(path) else 'missing'}")


def fetch_model(name: str, folder: str) -> None:
    for remote in MODELS[name]:
        download(remote, folder, instead="; if you have the model's folder, give it with --from DIR")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Download the published data sets and check them, or say who publishes them.",
        epilog="example: python data/fetch.py xnli",
    )
    parser.add_argument("dataset", choices=sorted([*DATASETS, *BY_HAND]))
    parser.add_argument("--data-dir", default=RAW_DIR, help="where to put it (default: data/raw)")
    args = parser.parse_args(argv)
    again = "; run the same command again to continue"
    return status_of(lambda: fetch_dataset(args.dataset, args.data_dir), again)


if __name__ == "__main__":
    sys.exit(main())
