"""data/fetch.py against a local HTTP server that misbehaves in every way a download can."""

import hashlib
import http.server
import io
import os
import re
import shutil
import tarfile
import threading
import zipfile

import pytest
from conftest import FLIGHTS

from data import fetch
from data.fetch import Remote, download, unpack
from data.glue import GLUE
from data.tasks import find_task, load
from kit.common import UserError
from model import PRESETS

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT by the name of the path: /good, /cut (drops the line), /norange, /short, /long, /missing."""

    protocol_version = "HTTP/1.1"
    requests: list = []
    cuts = 0  # how often /cut still drops the connection

    def do_GET(self):
        asked = self.headers.get("Range")
        type(self).requests.append((self.path, asked))
        kind = self.path.strip("/").split("/")[0]
        body = {"short": CONTENT[:1000], "long": CONTENT + b"more", "zip": ZIP}.get(kind, CONTENT)
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and kind != "norange" else 0
        if kind == "missing" or start >= len(body):
            return self.send_error(404 if kind == "missing" else 416)
        self.send_response(206 if start else 200)
        if kind != "nolength":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = kind == "cut" and type(self).cuts > 0
        type(self).cuts -= cut
        self.close_connection = cut or kind == "nolength"
        self.wfile.write(body[start : start + 300_000] if cut else body[start:])

    def log_message(self, *args):
        pass


def zipped(members: dict) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in members.items():
            file.writestr(name, text)
    return buffer.getvalue()


ROWS = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n"
ZIP = zipped({"RTE/dev.tsv": ROWS, "RTE/README": "not wanted"})


@pytest.fixture(scope="module")
def server():
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    instance.handle_error = lambda *args: None  # a client that closes the connection of too long a file
    threading.Thread(target=instance.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{instance.server_port}"
    instance.shutdown()


SIZE = len(CONTENT)


def remote(server, path, size=SIZE, content=CONTENT):
    return Remote(f"{server}/{path}", size, hashlib.sha256(content).hexdigest())


def get(file, folder):
    return download(file, str(folder), tries=3, pause=0.01)


@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize("path", ["good/f.bin", "nolength/f.bin"])
def test_good_download_and_no_second_one(server, tmp_path, path, size):
    file = remote(server, path, size)
    found = get(file, tmp_path)
    assert (tmp_path / "f.bin").read_bytes() == CONTENT and os.listdir(tmp_path) == ["f.bin"]
    before = len(Handler.requests)
    assert get(file, tmp_path) == found and len(Handler.requests) == before


@pytest.mark.parametrize("size", [SIZE, None])
def test_cut_connection_is_resumed(server, tmp_path, size):
    Handler.cuts, Handler.requests[:] = 2, []
    get(remote(server, "cut/f.bin", size), tmp_path)
    assert [asked for _, asked in Handler.requests] == [None, "bytes=300000-", "bytes=600000-"]
    assert (tmp_path / "f.bin").read_bytes() == CONTENT and os.listdir(tmp_path) == ["f.bin"]


def test_connection_cut_too_often_keeps_only_the_part(server, tmp_path):
    Handler.cuts = 3
    with pytest.raises(UserError, match="the server hung up, 3 times; 900,000 bytes are kept: run this again"):
        get(remote(server, "cut/f.bin"), tmp_path)
    assert os.listdir(tmp_path) == ["f.bin.part"]
    Handler.cuts = 0
    get(remote(server, "cut/f.bin"), tmp_path)  # the next call continues it
    assert Handler.requests[-1][1] == "bytes=900000-" and os.listdir(tmp_path) == ["f.bin"]


def test_old_parts_and_files(server, tmp_path):
    (tmp_path / "f.bin.part").write_bytes(CONTENT[:5000])
    get(remote(server, "norange/f.bin"), tmp_path)
    assert (tmp_path / "f.bin").read_bytes() == CONTENT
    (tmp_path / "f.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match="delete it and run this again"):
        get(remote(server, "good/f.bin"), tmp_path)
    assert (tmp_path / "f.bin").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("path", "part", "size", "content"),
    [
        ("good", b"x" * 5000, SIZE, CONTENT),  # a damaged part
        ("good", b"", SIZE, b"another file"),
        ("short", b"", SIZE, CONTENT),
        ("short", CONTENT[:2000], SIZE, CONTENT),  # shorter than the part
        ("short", b"", None, CONTENT),
        ("long", b"", SIZE, CONTENT),
    ],
)
def test_wrong_files_are_deleted(server, tmp_path, path, part, size, content):
    if part:
        (tmp_path / "f.bin.part").write_bytes(part)
    with pytest.raises(UserError, match="SHA-256 is .* the file was deleted"):
        get(remote(server, f"{path}/f.bin", size, content), tmp_path)
    assert os.listdir(tmp_path) == []


def test_no_server_and_no_file(server, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="missing/f.bin answered 404"):
        get(remote(server, "missing/f.bin"), tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="cannot download http://127.0.0.1:9/intfloat/.* --from DIR"):
        fetch.fetch_model("multilingual-e5-small", str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_mirror(server, tmp_path, monkeypatch):
    file = remote(fetch.HUB, "good/f.bin")
    monkeypatch.setenv("HF_ENDPOINT", server + "/")
    assert file.address == f"{server}/good/f.bin" and get(file, tmp_path) and (tmp_path / "f.bin").exists()
    monkeypatch.setenv("HF_ENDPOINT", "mirror.org")
    assert file.address == "https://mirror.org/good/f.bin"
    assert Remote("https://elsewhere.org/f.bin", 1, "0" * 64).address == "https://elsewhere.org/f.bin"


# --------------------------------------------------------------------------------------- archives
def tarred(members: dict) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(params=[("a.zip", zipped), ("a.tar.gz", tarred)])
def archive(request, tmp_path):
    """A function that writes an archive of {name: bytes} and returns its path."""
    path, pack = tmp_path / request.param[0], request.param[1]
    return lambda members: path.write_bytes(pack(members)) and str(path)


def test_unpack_writes_only_the_named_members(archive, tmp_path):
    path = archive({"a/wanted.tsv": b"1", "a/other.tsv": b"2", "../evil": b"2", "/evil": b"2", "a/more.tsv": b"3"})
    assert unpack(path, ("a/wanted.tsv",), str(tmp_path / "out"), ("a/more.tsv", "a/absent.tsv"))
    found = {file.name: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert found == {"wanted.tsv": b"1", "more.tsv": b"3"}
    assert sorted(os.listdir(tmp_path)) == [os.path.basename(path), "out"]


def test_missing_member_and_damaged_archives(archive, tmp_path):
    path = archive({"a/first.tsv": b"1" * 10_000, "a/second.tsv": os.urandom(10_000)})
    with pytest.raises(UserError, match="has no file a/third.tsv"):
        unpack(path, ("a/first.tsv", "a/third.tsv"), str(tmp_path / "out"))
    with open(path, "r+b") as file:  # the second member: half of it is missing
        file.truncate(5000)
    with pytest.raises(UserError, match="cannot unpack a[.]"):
        unpack(path, ("a/first.tsv", "a/second.tsv"), str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == []


# ------------------------------------------------------------------------------------ the command
def test_command(server, tmp_path, capsys, monkeypatch):
    """A task of GLUE is unpacked where it is read."""
    digest, command = hashlib.sha256(ZIP).hexdigest(), ["rte", "--data-dir", str(tmp_path)]
    monkeypatch.setitem(fetch.DATASETS, "rte", (Remote(f"{server}/zip/RTE.zip", len(ZIP), digest, ("RTE/dev.tsv",)),))
    assert fetch.main(command) == 0 and os.listdir(tmp_path / "glue" / "RTE") == ["dev.tsv"]
    assert len(load(find_task("rte"), "test", "en", str(tmp_path))) == 1
    assert fetch.main(command) == 0 and "already there" in capsys.readouterr().out
    monkeypatch.setitem(fetch.DATASETS, "rte", (Remote(f"{server}/missing/RTE.zip", 10, digest, ("RTE/other.tsv",)),))
    assert fetch.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_data_sets_that_are_not_downloaded(tmp_path, capsys):
    """The command says where they come from and which files are there; its exit status is always 0."""
    shutil.copytree(FLIGHTS, tmp_path / "atis")
    os.unlink(tmp_path / "atis" / "dev" / "label")
    facts = {"atis": ("Linguistic Data Consortium", 1), "snips": ("CC0", 9), "mrpc": ("Microsoft's", 2)}
    for name, (licence, missing) in (facts | {"glue": ("gluebenchmark.com", 8 * 2 + 1)}).items():  # two tests of MNLI
        assert fetch.main([name, "--data-dir", str(tmp_path)]) == 0
        text = capsys.readouterr().out
        assert licence in text and "https://" in text and "Nothing is downloaded" in text
        assert text.count(": missing\n") == missing and text.count(": there\n") == (8 if name == "atis" else 0)
    assert os.listdir(tmp_path) == ["atis"]


def test_pins_are_complete():
    assert {*GLUE} - {*fetch.DATASETS} == {"mrpc"} and fetch.DATASETS["rte"][0].members == (
        "RTE/train.tsv",
        "RTE/dev.tsv",
    )
    (xglue,), (pawsx,) = fetch.DATASETS["xglue"], fetch.DATASETS["pawsx"]
    assert len(xglue.members) == 18 and len(pawsx.members) == 9 and set(xglue.members) < set(xglue.optional)
    for remotes in (*fetch.DATASETS.values(), *fetch.MODELS.values()):
        for file in remotes:
            assert file.url.startswith("https://") and re.fullmatch("[0-9a-f]{64}", file.sha256)
    assert set(fetch.MODELS) < set(PRESETS)  # which give the shape where no config.json is downloaded
    names = {file.name for file in fetch.MODELS["minilm"]}  # what convert.py reads
    assert names == {"model.safetensors", "config.json", "vocab.txt", "tokenizer_config.json"}
