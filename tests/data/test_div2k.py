"""DIV2K from a server that fails in every way, and from archives of one's own."""

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from afterimage.config import AfterimageError, DataConfig
from afterimage.data.dataset import load_data
from afterimage.data.sources import div2k
from afterimage.data.sources import div2k as download
from afterimage.data.sources.div2k import Archive, read_div2k
from some_images import some_image
from source_contract import SourceContract


def make_zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def sample_images(name: str, first: int, count: int) -> dict[str, bytes]:
    members = {f"{name}/": b"", f"{name}/readme.txt": b"x"}
    for number in range(first, first + count):
        file = io.BytesIO()
        some_image(number).save(file, "PNG")
        members[f"{name}/{number:04d}.png"] = file.getvalue()
    return members


OFFICIAL = div2k.ARCHIVES
FILES = {
    "DIV2K_train_HR.zip": make_zip(sample_images("DIV2K_train_HR", 1, 10)),
    "DIV2K_valid_HR.zip": make_zip(sample_images("DIV2K_valid_HR", 11, 3)),
}


class Server(ThreadingHTTPServer):
    """A file server. `faults` are used up one a request; `requests` holds what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[str] = []
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append((self.path[1:], asked))
        fault = self.server.faults.pop(0) if self.server.faults else None
        content = FILES[self.path[1:]]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and fault != "no range" else 0
        if fault in ("404", "500"):
            return self.send_error(int(fault))
        if fault == "login":
            content = b"<html>please log in</html>"
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if fault == "cut":
            content = content[: start + len(content) // 3]
        if fault == "flip":
            content = content[:100] + bytes([content[100] ^ 1]) + content[101:]
        self.wfile.write(content[start:])

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(div2k, "BASE_URL", server.url)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def small_archives(monkeypatch):
    def archive(name: str, count: int) -> Archive:
        content = FILES[f"{name}.zip"]
        return Archive(name, len(content), hashlib.sha256(content).hexdigest(), count)

    archives = {"train": archive("DIV2K_train_HR", 10), "test": archive("DIV2K_valid_HR", 3)}
    monkeypatch.setattr(div2k, "ARCHIVES", archives)


class TestDiv2k(SourceContract):
    @pytest.fixture
    def source(self, tmp_path):
        (tmp_path / "given").mkdir()
        for name, content in FILES.items():
            (tmp_path / "given" / name).write_bytes(content)
        return f"div2k:{tmp_path / 'given'}"


def ids(originals) -> list[str]:
    return [original.id for original in originals]


def test_the_official_archives():
    """Sizes of the official files, as published; not those that the tests put in their place."""
    assert [(a.name, a.bytes, a.images) for a in OFFICIAL.values()] == [
        ("DIV2K_train_HR", 3530603713, 800),
        ("DIV2K_valid_HR", 448993893, 100),
    ]
    assert div2k.BASE_URL == "https://data.vision.ee.ethz.ch/cvl/DIV2K/"


def test_downloaded_once_and_split_as_in_the_study(server, tmp_path):
    config = DataConfig("div2k", resize=24, crop=16)
    seen = {}
    data = load_data(config, cache=tmp_path, progress=lambda what, *counts: seen.update({what: counts}))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [8, 2, 3]
    assert sorted(data.test.ids) == ["0011", "0012", "0013"]
    assert {f"{work} DIV2K_train_HR" for work in ("downloading", "verifying", "unpacking")} <= seen.keys()
    assert all(done == total for done, total in seen.values())
    assert len(server.requests) == 2
    assert sorted(p.name for p in (tmp_path / "div2k").iterdir() if p.suffix != ".lock") == [
        "DIV2K_train_HR",
        "DIV2K_valid_HR",
    ]
    assert load_data(config, cache=tmp_path).digest == data.digest
    assert len(server.requests) == 2


def test_only_what_is_used_is_downloaded(server, tmp_path):
    source = read_div2k("", {"test"}, tmp_path)
    assert ids(source.test) == ["0011", "0012", "0013"] and not source.train
    assert [name for name, _ in server.requests] == ["DIV2K_valid_HR.zip"]


def test_a_lost_connection_is_taken_up_where_it_broke(server, tmp_path):
    server.faults = ["cut", "500", "cut"]
    assert len(read_div2k("", {"train"}, tmp_path).train) == 10
    third = len(FILES["DIV2K_train_HR.zip"]) // 3
    starts = [None, f"bytes={third}-", f"bytes={third}-", f"bytes={2 * third}-"]
    assert [asked for _, asked in server.requests] == starts


def test_a_later_run_goes_on_with_what_an_earlier_one_has(server, tmp_path):
    server.faults = ["cut"] + ["500"] * 9
    with pytest.raises(AfterimageError, match=r"says 500 .* bytes are kept in .*zip\.part .*div2k:PATH"):
        read_div2k("", {"train"}, tmp_path)
    server.faults.clear()
    server.requests.clear()
    assert len(read_div2k("", {"train"}, tmp_path).train) == 10
    assert server.requests == [("DIV2K_train_HR.zip", f"bytes={len(FILES['DIV2K_train_HR.zip']) // 3}-")]


def test_a_server_that_cannot_resume_begins_again(server, tmp_path):
    server.faults = ["cut", "no range"]
    assert len(read_div2k("", {"train"}, tmp_path).train) == 10


def test_what_is_wrong_for_good_is_not_tried_again(server, tmp_path):
    server.faults = ["404"]
    with pytest.raises(AfterimageError, match="says 404"):
        read_div2k("", {"train"}, tmp_path)
    server.faults = ["login"]
    with pytest.raises(AfterimageError, match="login page"):
        read_div2k("", {"train"}, tmp_path)
    assert len(server.requests) == 2


def test_a_flipped_bit_is_seen_and_not_kept(server, tmp_path):
    server.faults = ["flip"]
    with pytest.raises(AfterimageError, match=r"SHA-256 .* It was removed"):
        read_div2k("", {"train"}, tmp_path)
    assert len(read_div2k("", {"train"}, tmp_path).train) == 10


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(div2k, "BASE_URL", "http://127.0.0.1:9/")
    with pytest.raises(AfterimageError, match=r"cannot download http://127\.0\.0\.1:9/DIV2K_train_HR\.zip"):
        read_div2k("", {"train"}, tmp_path)


def test_no_room_is_said_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(AfterimageError, match="not enough room"):
        read_div2k("", {"train"}, tmp_path)
    assert server.requests == []


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AfterimageError, match="cannot get DIV2K_train_HR"):
        read_div2k("", {"train"}, tmp_path / "file")


def test_a_folder_with_the_archives_or_what_is_in_them(tmp_path):
    given, cache = tmp_path / "given", tmp_path / "cache"
    given.mkdir()
    for name, content in FILES.items():
        (given / name).write_bytes(content)
    packed = read_div2k(str(given), {"train", "test"}, cache)
    assert sorted(p.name for p in given.iterdir()) == sorted(FILES)
    for name in FILES:
        (cache / "div2k" / name.removesuffix(".zip")).rename(given / name.removesuffix(".zip"))
        (given / name).unlink()
    unpacked = read_div2k(str(given), {"train", "test"}, cache)
    assert ids(unpacked.train) == ids(packed.train) and ids(unpacked.test) == ids(packed.test)
    (given / "DIV2K_train_HR" / "0004.png").unlink()
    with pytest.raises(AfterimageError, match="holds 9 images, DIV2K_train_HR has 10"):
        read_div2k(str(given), {"train"}, cache)
    with pytest.raises(AfterimageError, match="neither the folder DIV2K_train_HR nor"):
        read_div2k(str(tmp_path), {"train"}, cache)


def test_an_archive_of_ones_own_is_verified_too(tmp_path):
    (tmp_path / "DIV2K_train_HR.zip").write_bytes(FILES["DIV2K_valid_HR.zip"])
    with pytest.raises(AfterimageError, match="not the published DIV2K_train_HR"):
        read_div2k(str(tmp_path), {"train"}, tmp_path / "cache")
    assert (tmp_path / "DIV2K_train_HR.zip").exists()


def test_an_unpacking_that_was_cut_leaves_nothing_and_is_done_again(server, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(AfterimageError, match=r"cannot get DIV2K_train_HR: .*disk full"):
            read_div2k("", {"train"}, tmp_path)
    left = sorted(p.name for p in (tmp_path / "div2k").iterdir())
    assert left == ["DIV2K_train_HR.lock", "DIV2K_train_HR.zip"]
    assert len(read_div2k("", {"train"}, tmp_path).train) == 10 and len(server.requests) == 1
