"""Download, verify, unpack: a file gets its final name only when its size and SHA-256 are right.

    python data/fetch.py xnli           # XNLI dev, test and English training set -> data/raw
    python data/fetch.py xglue          # XGLUE's other tasks, 0.9 GB; pawsx: PAWS-X alone, 30 MB
    python data/fetch.py rte            # a task of GLUE: also cola sst2 stsb qqp mnli qnli
    python data/fetch.py atis           # downloads nothing: says where the files come from (or snips, mrpc)
    python data/fetch.py glue           # downloads nothing: which of GLUE's files are there

A download goes to NAME.part and is renamed when it is complete and correct. After a cut connection the next call
continues the .part file (HTTP Range); a wrong hash deletes it. Of an archive only the files named below are unpacked,
all or none.

The checksums were published by several independent projects for the same addresses.
"""

import argparse
import hashlib
import http.client
import os
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass

if __package__ in (None, ""):  # run as a script: put the repository root on the path
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import kit.interrupt  # noqa: F401

from data.glue import GLUE
from data.tasks import RAW_DIR, file_paths, find_task
from data.xglue import ARCHIVE, XGLUE
from kit.common import Progress, UserError, exit_status
from kit.files import check_writable

CHUNK = 1 << 20
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


def remotes(address: str, *files: tuple) -> tuple[Remote, ...]:
    """Files below an address: name, size and SHA-256 of each, and of an archive what to unpack."""
    return tuple(Remote(f"{address}/{name}", *facts) for name, *facts in files)


# ------------------------------------------------------------------------------------------ models
_XLMR = f"{HUB}/FacebookAI/xlm-roberta-base/resolve/e73636d4f797dec63c3081bb6ed5c7b0bb3f2089"
_PIECES = ("sentencepiece.bpe.model", 5_069_051, "cfc8146abe2a0488e9e2a0c56de7952f7c11ab059eca145a0a727afce0db2865")
MODELS = {
    "xlmr-base": remotes(
        _XLMR, ("model.safetensors", 1_115_567_652, "6fd4797bc397c3b8b55d6bb5740366b57e6a3ce91c04c77f22aafc0c128e6feb")
    ),
    # InfoXLM was trained from XLM-R with its vocabulary.
    "infoxlm-base": remotes(
        f"{HUB}/microsoft/infoxlm-base/resolve/main",
        ("pytorch_model.bin", None, "2d90db785b5a6ebb57b70aa44f6182b9414c64fa302933c3bad68e97d4d82162"),
    ),
    # BERT's architecture in small: 6 layers, 384 wide, WordPiece. Apache 2.0.
    "minilm": remotes(
        f"{HUB}/sentence-transformers/all-MiniLM-L6-v2/resolve/1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        ("model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
        ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
        ("vocab.txt", 231_508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
        ("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    ),
    # BERT's architecture with XLM-R's tokenizer: 12 layers, 384 wide, 100 languages. MIT; MIT; Apache 2.0.
    "multilingual-minilm": remotes(
        f"{HUB}/microsoft/Multilingual-MiniLM-L12-H384/resolve/main",
        ("pytorch_model.bin", 470_657_952, "cce170910f4d4f3b45be025508f51ef1ad6a1de69f2d46dce7e4603ad31aaaeb"),
    ),
    "multilingual-e5-small": remotes(
        f"{HUB}/intfloat/multilingual-e5-small/resolve/614241f622f53c4eeff9890bdc4f31cfecc418b3",
        ("model.safetensors", 470_641_600, "1a55775f53449dac10a2bcbc312469fac40b96d53198c407081a831f81c98477"),
    ),
    "paraphrase-multilingual-minilm": remotes(
        f"{HUB}/sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2/resolve/"
        "e8f8c211226b894fcb81acc59f3b34ba3efd5f42",
        ("model.safetensors", 470_641_600, "eaa086f0ffee582aeb45b36e34cdd1fe2d6de2bef61f8a559a1bbc9bd955917b"),
    ),
}
for name in {*MODELS} - {"minilm"}:  # one tokenizer file serves all
    MODELS[name] += remotes(_XLMR, _PIECES)

# --------------------------------------------------------------------------------------- data sets
FACEBOOK = "https://dl.fbaipublicfiles.com"
_XNLI = find_task("xnli").files
_TRAIN, _TESTS = _XNLI["train"], (*_XNLI["dev"], *_XNLI["test"])
XNLI = remotes(
    f"{FACEBOOK}/XNLI",
    ("XNLI-1.0.zip", 17_865_352, "4ba1d5e1afdb7161f0f23c66dc787802ccfa8a25a3ddd3b165a35e50df346ab1", _TESTS),
    ("XNLI-MT-1.0.zip", 466_098_360, "f732517ba2fb1d550e9f3c2aabaef6017c91ee2dcec90e878f138764d224db05", _TRAIN),
)
# Task of GLUE -> archive, bytes, SHA-256; unpacked is what the task is read from.
_GLUE = {
    "cola": ("CoLA.zip", 376_971, "f212fcd832b8f7b435fb991f101abf89f96b933ab400603bf198960dfc32cbff"),
    "sst2": ("SST-2.zip", 7_439_277, "d67e16fb55739c1b32cdce9877596db1c127dc322d93c082281f64057c16deaa"),
    "stsb": ("STS-B.zip", 802_872, "e60a6393de5a8b5b9bac5020a1554b54e3691f9d600b775bd131e613ac179c85"),
    "qqp": ("QQP-clean.zip", 41_696_084, "40e7c862c04eb26ee04b67fd900e76c45c6ba8e6d8fab4f8f1f8072a1a3fbae0"),
    "mnli": ("MNLI.zip", 312_783_507, "e7c1d896d26ed6caf700110645df426cc2d8ebf02a5ab743d5a5c68ac1c83633"),
    "qnli": ("QNLIv2.zip", 10_627_589, "e634e78627a29adaecd4f955359b22bf5e70f2cbd93b493f2d624138a0c0e5f5"),
    "rte": ("RTE.zip", 697_150, "6bf86de103ecd335f3441bd43574d23fef87ecc695977a63b82d5efb206556ee"),
}
# The tasks' own licences apply; XGLUE's site allows non-commercial research only. Files of further languages are
# optional: lists of XGLUE's languages do not agree.
XGLUE_ARCHIVE = Remote(
    f"{HUB}/datasets/microsoft/xglue/resolve/refs%2Fpr%2F7/xglue_full_dataset.tar.gz",
    875_905_871,
    "e11016c02d8565d00119833a16679bbbe0fec437f5ad53c2d3f9eef6fa03f65b",
    tuple(f"{ARCHIVE}/{files[0]}" for task in XGLUE.values() for files in task.files.values()),
    tuple(f"{ARCHIVE}/{file}" for task in XGLUE.values() for files in task.files.values() for file in files),
)
PAWSX = Remote(
    "https://storage.googleapis.com/paws/pawsx/x-final.tar.gz",
    30_282_057,
    "4146db499101d66e68ae4c8ed3cf9dadecd625f44b7d8cf3d4a0fe93afc4fd9f",
    tuple(file.replace("PAWSX", "x-final") for files in XGLUE["pawsx"].files.values() for file in files),
)
DATASETS = {"xnli": XNLI, "xglue": (XGLUE_ARCHIVE,), "pawsx": (PAWSX,)}
for task, archive in _GLUE.items():
    row = GLUE[task]
    members = tuple(f"{row.subfolder.removeprefix('glue/')}/{name}" for name in row.files["train"] + row.files["test"])
    DATASETS[task] = remotes(f"{FACEBOOK}/glue/data", (*archive, members))
_JOINT = "\nfiles:   https://github.com/monologg/JointBERT, https://github.com/MiuLab/SlotGated-SLU (rename its valid to dev)"
BY_HAND = {  # licence, and who publishes the layout that is read here
    "atis": "Linguistic Data Consortium user agreement, for LDC93S4B, LDC93S5, LDC94S19 and LDC95S26" + _JOINT,
    "snips": "CC0 1.0, https://github.com/sonos/nlu-benchmark (2017-06-custom-intent-engines)" + _JOINT,
    "mrpc": "Microsoft's, shown with the download\n"
    "files:   https://www.microsoft.com/en-us/download/details.aspx?id=52398, which becomes GLUE's train.tsv and "
    "dev.tsv by the list https://dl.fbaipublicfiles.com/glue/data/mrpc_dev_ids.tsv",
    "glue": "each task has its own: https://gluebenchmark.com/tasks links them\n"
    "files:   'python data/fetch.py TASK' downloads any of them but mrpc, of which it says where it is",
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
        if attempt < tries - 1:
            time.sleep(pause * 2**attempt)
    else:
        kept = f"{size_of(part):,} bytes are kept: run this again to continue"
        raise UserError(f"cannot download {remote.address}: {cause}, {tries} times; {kept}{instead}")
    if (found := sha256_of(part)) != remote.sha256:
        os.unlink(part)
        raise UserError(f"{remote.name}: SHA-256 is {found}, published is {remote.sha256}; the file was deleted")
    os.replace(part, path)
    return path


def receive(remote: Remote, part: str) -> bool:
    """Append what is missing of a file to `part`. True if nothing more comes, False if the connection was cut."""
    have = size_of(part)
    if remote.size is not None and have >= remote.size:
        return True  # complete (or too long, which the hash will tell)
    headers = {"User-Agent": "sdq-fetch/1", "Accept-Encoding": "identity"}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(remote.address, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # the server has no byte after ours: the hash will tell
            return True
        raise
    with response, open(part, "ab" if response.status == 206 else "wb") as file:  # 200: the whole file again
        have = have if response.status == 206 else 0
        total = remote.size if response.length is None else have + response.length
        progress = Progress(f"{remote.name}, MB:", total and total / 1e6, have / 1e6)
        while chunk := response.read1(CHUNK):
            file.write(chunk)
            have += len(chunk)
            progress.update(have / 1e6)
            if remote.size is not None and have > remote.size:
                break
        progress.clear()
    return total is None or have >= total


def size_of(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def sha256_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: str, members: tuple[str, ...], folder: str, optional: tuple[str, ...] = ()) -> list[str]:
    """Unpack the named members of a .zip or .tar.gz file into `folder`: all of them and the optional ones that are
    there, or none. Returns their paths.
    """
    name, is_zip = os.path.basename(archive), archive.endswith(".zip")
    os.makedirs(folder, exist_ok=True)
    try:
        with (
            zipfile.ZipFile(archive) if is_zip else tarfile.open(archive, "r:gz") as file,
            tempfile.TemporaryDirectory(prefix=".unpacked-", dir=folder) as temporary,
        ):
            present = file.namelist() if is_zip else file.getnames()
            if missing := set(members) - set(present):
                raise UserError(f"{name} has no file {min(missing)}")
            wanted = {*members, *optional}
            targets = {member: os.path.join(folder, *member.split("/")) for member in present if member in wanted}
            how = {"filter": "data"} if hasattr(tarfile, "data_filter") and not is_zip else {}  # from Python 3.11.4 on
            for member in targets:
                file.extract(member, temporary, **how)
            for member, target in targets.items():
                os.makedirs(os.path.dirname(target), exist_ok=True)
                os.replace(os.path.join(temporary, *member.split("/")), target)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"cannot unpack {name} into {folder}: {error}") from None
    return [*targets.values()]


def fetch_dataset(name: str, folder: str) -> None:
    """Download and unpack a data set, or print where it comes from, where its files belong, and which are there."""
    if name in BY_HAND:
        print(f"licence: {BY_HAND[name]}\nNothing is downloaded now. This is where the files belong:")
        tasks = map(find_task, GLUE if name == "glue" else [name])
        for path in dict.fromkeys(p for task in tasks for split in task.files for p in file_paths(task, folder, split)):
            print(f"  {path}: {'there' if os.path.exists(path) else 'missing'}")
    folder = os.path.join(folder, "glue") if name in GLUE else folder
    for remote in DATASETS.get(name, ()):
        targets = [os.path.join(folder, *member.split("/")) for member in remote.members]
        if all(os.path.exists(target) for target in targets):
            print(f"already there: {', '.join(targets)}")
            continue
        archive = download(remote, os.path.join(folder, "downloads"))
        for target in unpack(archive, remote.members, folder, remote.optional):
            print(f"wrote {target}")


def fetch_model(name: str, folder: str) -> None:
    for remote in MODELS[name]:
        download(remote, folder, instead="; if you have the model's folder, give it with --from DIR")


@exit_status("; run the same command again to continue")
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Download the published data sets and check them, or say who publishes them.",
        epilog="example: python data/fetch.py xnli",
    )
    parser.add_argument("dataset", choices=sorted([*DATASETS, *BY_HAND]))
    parser.add_argument("--data-dir", default=RAW_DIR, help="where to put it (default: data/raw)")
    args = parser.parse_args(argv)
    fetch_dataset(args.dataset, args.data_dir)


if __name__ == "__main__":
    sys.exit(main())
