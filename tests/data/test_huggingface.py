"""Hugging Face datasets: shards on this machine, the hub by a stand-in, and what neither gives."""

import bz2
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from urllib.parse import urlsplit

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afterimage.config import AfterimageError, DataConfig
from afterimage.data.sources import read_source, shards
from afterimage.experiments.cost import training_images
from some_images import write_images
from some_shards import image_bytes, write_parquet, write_shards, write_tar
from source_contract import SourceContract, load, parts, streaming  # noqa: F401

IMAGES = {f"{number:03d}.png": image_bytes(number) for number in range(12)}
COMMIT = "1" * 40


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """A hub that cannot be reached, and nothing of it but what a test prepares."""
    import datasets

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


class TestWebDataset(SourceContract):
    @pytest.fixture
    def source(self, tmp_path):
        return write_shards(tmp_path / "shards", 2, 10)


class TestParquet(SourceContract):
    @pytest.fixture
    def source(self, tmp_path):
        return write_parquet(tmp_path / "parquet", 2, 10, group=4)


class TestParquetOfBytes(SourceContract):
    @pytest.fixture
    def source(self, tmp_path):
        return write_parquet(tmp_path / "parquet", 2, 10, group=4, plain=True)


def test_shards_and_folder_hold_the_same_images(tmp_path):
    write_images(tmp_path / "images", 12)
    sources = [
        f"folder:{tmp_path / 'images'}",
        write_shards(tmp_path / "shards", 3, 4),
        write_parquet(tmp_path / "parquet", 3, 4, group=3),
    ]
    found = []
    for source in sources:
        data = load(source, tmp_path / "cache")
        found.append(
            {i: c for part in parts(data) for i, c in zip(part.ids, part.content_digests, strict=True)}
        )
    names = [
        [f"{n:04d}.png" for n in range(12)],
        [f"shard-{n // 4:03d}.tar/{n:06d}.png" for n in range(12)],
        [f"train-{n // 4:05d}-of-00003.parquet/{n % 4:07d}" for n in range(12)],
    ]
    contents = [[own[name] for name in called] for own, called in zip(found, names, strict=True)]
    assert contents[0] == contents[1] == contents[2]


def test_rows_are_mapped_and_not_held(tmp_path):
    from datasets.table import MemoryMappedTable

    source = read_source(write_shards(tmp_path / "shards", 2, 5), {"train"}, tmp_path)
    table = source.train[0].images.table
    assert isinstance(table.data, MemoryMappedTable) and table.cache_files
    assert all(str(tmp_path) in file["filename"] for file in table.cache_files)


# Tar files


def refused(path, tmp_path, message: str) -> None:
    with pytest.raises(AfterimageError, match=message) as error:
        load(f"webdataset:{path}", tmp_path / "cache")
    assert str(path) in str(error.value)


def test_members_are_known_as_in_a_folder(tmp_path):
    good = ["a/1.png", "a/2.PNG", "a/é.png", "n" * 150 + "/3.png", "b/x.seg.png"]
    names = [f"./{good[0]}", *good[1:], "a/4.json", ".h/5.png", "__MACOSX/6.png"]
    path = write_tar(tmp_path / "x.tar", {name: image_bytes(n) for n, name in enumerate(names)})
    source = read_source(f"webdataset:{path}", {"train"}, tmp_path / "cache")
    assert [original.id for original in source.train] == [f"x.tar/{name}" for name in good]
    assert [original.read() for original in source.train] == [image_bytes(n) for n in range(5)]
    assert source.notes == ("left out: 1 file not read: 1 .json",)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress])
def test_compressed_tar_files_are_read_too(tmp_path, compress):
    path = write_tar(tmp_path / "x.tar", IMAGES)
    whole = load(f"webdataset:{path}", tmp_path / "cache").digest
    path.write_bytes(compress(path.read_bytes()))
    assert load(f"webdataset:{path}", tmp_path / "cache").digest == whole


def test_what_was_cut_short_or_damaged_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "x.tar", IMAGES)
    whole = path.read_bytes()
    ends = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut, message in (
        (ends, "end-of-archive marker is missing"),
        (ends - 512, "damaged"),
        (700, "damaged"),
    ):
        path.write_bytes(whole[:cut])
        refused(path, tmp_path, message)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        third = archive.getmembers()[3].offset
    flipped = bytearray(whole)
    flipped[third + 5] ^= 4
    path.write_bytes(flipped)
    refused(path, tmp_path, f"the data at byte {third:,} is neither a member nor the end")
    path.write_bytes(whole + whole)
    refused(path, tmp_path, "neither a member nor the end")
    for content in (b"", b"no tar file at all" * 100):
        path.write_bytes(content)
        refused(path, tmp_path, "damaged or no tar file")


def test_other_tar_files_that_are_refused(tmp_path):
    refused(
        write_tar(tmp_path / "z.tar", {"a.txt": b"x", ".b.png": b"y"}), tmp_path, "no images among 1 files"
    )
    path = write_tar(tmp_path / "w.tar", IMAGES)
    with tarfile.open(path, "a") as archive:
        archive.add(write_images(tmp_path / "images", 1)[0], "001.png")
    refused(path, tmp_path, r"two images have one name: .*001.png")
    path = write_tar(tmp_path / "l.tar", IMAGES)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    refused(path, tmp_path, r"l.tar/link.png: is a link or a device")


def test_images_that_cannot_be_read_are_named_by_shard_and_key(tmp_path, streaming):  # noqa: F811
    broken = IMAGES | {"x.png": b"no image", "y.jpg": b"\xff\xd8 nor this", "z.png": b""}
    path = write_tar(tmp_path / "x.tar", broken)
    with pytest.raises(AfterimageError, match=r"3 images cannot be read") as error:
        load(f"webdataset:{path}", tmp_path / "cache")
    for line in ("x.png: is not an image", "y.jpg: is ", "z.png: has no bytes"):
        assert f"{path}/{line}" in str(error.value)


def test_an_image_that_cannot_be_decoded_is_named_when_it_is_used(tmp_path, streaming):  # noqa: F811
    path = write_tar(tmp_path / "x.tar", IMAGES | {"012.png": IMAGES["000.png"][:1500]})
    train = load(f"webdataset:{path}", tmp_path / "cache", split_seed=1).train
    damaged = train.ids.index("x.tar/012.png")
    train.crops([index for index in range(len(train)) if index != damaged])
    with pytest.raises(AfterimageError, match=rf"{path}/012.png: is damaged"):
        train.crops([damaged])


def test_a_shard_that_was_replaced_is_read_anew(tmp_path):
    source = write_shards(tmp_path / "shards", 2, 5)
    first = load(source, tmp_path / "cache")
    write_shards(tmp_path / "shards", 1, 5, first=50)
    second = load(source, tmp_path / "cache")
    assert second.digest != first.digest
    assert second.digest == load(source, tmp_path / "other").digest


# Parquet


def parquet_refused(tmp_path, table, message):
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(AfterimageError, match=message) as error:
        load(f"parquet:{tmp_path}/x.parquet", tmp_path / "cache")
    assert "x.parquet" in str(error.value)


def test_parquet_that_cannot_be_read(tmp_path):
    image = IMAGES["000.png"]
    parquet_refused(tmp_path, {"label": [1, 2]}, "has no column of images; .* its columns: label")
    parquet_refused(tmp_path, {"a": [b"x"], "b": [b"y"]}, r"several columns of files \(a, b\)")
    parquet_refused(
        tmp_path, {"image": [image, None, image]}, r"x.parquet/0000001: has no bytes in the column image"
    )
    parquet_refused(tmp_path, {"image": [image, b"x", image]}, r"x.parquet/0000001: is not an image")
    parquet_refused(tmp_path, {"image": pa.array([], pa.binary())}, "no rows")
    # A path is no image's bytes: what it names lies on another machine, or is none of the file's business.
    elsewhere = [{"bytes": image, "path": None}, {"bytes": None, "path": "x.png"}] * 2
    parquet_refused(tmp_path, {"image": elsewhere}, "has no bytes")
    for kind in (
        "'_type': 'Hologram'",
        "'_type': 'Value', 'dtype': 'qubit'",
    ):  # of a library of another version
        features = f"{{'info': {{'features': {{'image': {{{kind}}}}}}}}}".replace("'", '"')
        table = pa.table({"image": [image]}).replace_schema_metadata({"huggingface": features})
        parquet_refused(tmp_path, table, "cannot read .*x.parquet: .*(Hologram|qubit)")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(AfterimageError, match=r"cannot read .*x.parquet: .*[Pp]arquet"):
        load(f"parquet:{tmp_path}/x.parquet", tmp_path / "cache")


def test_rows_are_counted_in_their_own_file(tmp_path):
    write_parquet(tmp_path / "shards", 2, 8, group=3)
    (second,) = (tmp_path / "shards").glob("train-00001*")
    table = pq.read_table(second).to_pylist()
    table[2]["image"]["bytes"] = b"broken"
    pq.write_table(pa.Table.from_pylist(table), second)
    with pytest.raises(AfterimageError, match=r"train-00001-of-00002.parquet/0000002: is not an image"):
        load(f"parquet:{tmp_path}/shards/*.parquet", tmp_path / "cache")


def test_of_several_columns_the_one_with_a_usual_name_is_taken(tmp_path):
    rows = list(IMAGES.values())
    pq.write_table(pa.table({"thumb": [b"x"] * 12, "image": rows}), tmp_path / "x.parquet")
    source = read_source(f"parquet:{tmp_path}/x.parquet", {"train"}, tmp_path / "cache")
    assert [original.read() for original in source.train] == rows


# Patterns


def test_patterns(tmp_path):
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b/x.tar", "b/y.tar", "c{1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def names(pattern):
        return [str(path.relative_to(tmp_path)) for path in shards.expand(f"{tmp_path}/{pattern}")]

    assert names("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("{b/y,a-10}.tar") == ["b/y.tar", "a-10.tar"]
    assert names("b/*.tar") == ["b/x.tar", "b/y.tar"] and len(names("**/*.tar")) == 6
    assert names("a-{08,08}.tar") == ["a-08.tar"] and names("c{1.tar") == ["c{1.tar"]
    for pattern, message in (
        ("a-{08..11}.tar", "there is no file .*a-11.tar"),
        ("z*.tar", "no file matches"),
        ("b", "there is no file"),
        ("{5..1}.tar", "must go up"),
        ("{0..999999999999}.tar", "at most 100,000"),
        ("{0..999}{0..999}.tar", "names 1,000,000 files"),
    ):
        with pytest.raises(AfterimageError, match=message):
            names(pattern)


def test_files_with_brackets_in_their_names(tmp_path):
    write_parquet(tmp_path / "a[1]*", 1, 8, group=4)
    (file,) = (tmp_path / "a[1]*").iterdir()
    assert len(read_source(f"parquet:{file}", {"train"}, tmp_path / "cache").train) == 8


def test_a_plan_counts_the_images_of_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(tmp_path / "cache"))
    source = write_shards(tmp_path / "shards", 2, 20)
    assert training_images(DataConfig(source)) == 29 == len(load(source, tmp_path / "cache").train)


def test_without_the_library_one_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("hf:me/photos", f"parquet:{tmp_path}/x.parquet", f"webdataset:{tmp_path}/x.tar"):
        with pytest.raises(AfterimageError, match=r"pip install 'afterimage\[datasets\]'"):
            load(source, tmp_path)


# The hub


class Hub(http.server.ThreadingHTTPServer):
    """As much of a hub as the library asks for, with one dataset: `files` by their names."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.gated = files, False
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path, files = urlsplit(self.path).path, self.server.files
        if path.startswith("/datasets/me/photos/resolve/"):
            revision, _, name = path.removeprefix("/datasets/me/photos/resolve/").partition("/")
            if self.server.gated:
                return self.answer(403, {"X-Error-Code": "GatedRepo"})
            if revision not in ("main", COMMIT):
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            if name not in files:
                return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            tag = hashlib.sha256(files[name]).hexdigest()
            return self.answer(200, {"ETag": tag, "X-Repo-Commit": COMMIT}, files[name])
        if re.fullmatch(rf"/api/datasets/me/photos(/revision/({COMMIT}|main))?", path):
            return self.answer(200, {}, {"id": "me/photos", "sha": COMMIT, "siblings": [], "tags": []})
        if path.startswith(f"/api/datasets/me/photos/tree/{COMMIT}"):
            below = path.removeprefix(f"/api/datasets/me/photos/tree/{COMMIT}").strip("/")
            deep = "recursive=true" in self.path.lower()
            own = [n for n in files if os.path.dirname(n) == below or (deep and n.startswith(below))]
            entries = [{"type": "file", "path": n, "size": len(files[n]), "oid": "0" * 40} for n in own]
            folders = {os.path.dirname(name) for name in files} - {""} if not below else set()
            entries += [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in folders]
            return self.answer(200, {}, entries)
        return self.answer(401, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, headers: dict[str, str], content: object = b"") -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


def rows(first: int, count: int) -> bytes:
    file = io.BytesIO()
    image = [{"bytes": image_bytes(n), "path": f"{n}.png"} for n in range(first, first + count)]
    pq.write_table(pa.table({"image": image, "label": list(range(count))}), file)
    return file.getvalue()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import datasets

    server = Hub(
        {f"data/{name}-00000-of-00001.parquet": rows(*own) for name, own in
         {"train": (0, 10), "test": (10, 4), "extra": (14, 2)}.items()}
    )  # fmt: skip
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


class TestHub(SourceContract):
    @pytest.fixture
    def source(self, hub):
        return "hf:me/photos"


def test_splits_are_taken_for_what_their_names_say(hub, tmp_path):
    data = load("hf:me/photos", tmp_path)
    assert [len(part) for part in parts(data)] == [8, 2, 4]
    assert sorted(data.test.ids) == [f"test/{row:07d}" for row in range(4)]
    assert all(i.startswith("train/") for i in [*data.train.ids, *data.validation.ids])
    assert data.notes == ("left out beside the splits that are read: extra",)
    own = load(f"hf:me/photos@{COMMIT}:train", tmp_path, test="hf:me/photos:test")
    assert [len(part) for part in parts(own)] == [8, 2, 4] and own.notes == ()
    assert own.digest == data.digest
    with pytest.raises(AfterimageError, match=r"unknown split of me/photos 'tset'; did you mean 'test'"):
        load("hf:me/photos:tset", tmp_path)


def test_folders_of_images_are_tables_of_files_in_the_hubs_cache(hub, tmp_path):
    own = {"train": range(10), "test": range(10, 14)}
    hub.files.clear()
    hub.files |= {f"{part}/{n}.png": image_bytes(n) for part, numbers in own.items() for n in numbers}
    data = load("hf:me/photos", tmp_path)
    assert [len(part) for part in parts(data)] == [8, 2, 4]
    train = read_source("hf:me/photos:train", {"train"}, tmp_path).train
    assert [original.read() for original in train] == [image_bytes(n) for n in own["train"]]
    elsewhere = replace(train[0].images, file_roots=(tmp_path / "other",))
    with pytest.raises(AfterimageError, match="hf:me/photos/train/0000003: has no bytes"):
        replace(train[3], images=elsewhere).read()


def test_a_row_that_is_no_image_is_named(hub, tmp_path):
    hub.files["data/test-00000-of-00001.parquet"] = rows(10, 4).replace(image_bytes(12)[:8], b"no image")
    with pytest.raises(
        AfterimageError, match=r"4 images cannot be read(.|\n)*hf:me/photos/test/0000002: is not an image"
    ):
        load("hf:me/photos", tmp_path)


def test_what_was_prepared_is_there_offline(hub, tmp_path, monkeypatch):
    import datasets

    first = load("hf:me/photos", tmp_path)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(
        AfterimageError, match=rf"the hub at {hub.endpoint} .*HF_HUB_OFFLINE=1 the cached copy is used"
    ):
        load("hf:me/photos", tmp_path)
    for module in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    assert load("hf:me/photos", tmp_path).digest == first.digest
    for source in ("hf:me/photos@v2", "hf:me/other"):
        with pytest.raises(AfterimageError, match=rf"{tmp_path}.* has nothing of it .*HF_HUB_OFFLINE is set"):
            load(source, tmp_path)


def test_a_folder_here_is_no_dataset_of_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name in ("mine", str(tmp_path / "mine")):
        with pytest.raises(
            AfterimageError, match=r"cannot read hf:.*mine is on this machine: write parquet:FILES"
        ):
            load(f"hf:{name}", tmp_path)


def test_why_the_hub_does_not_give_a_dataset(hub, tmp_path):
    page = f"{hub.endpoint}/datasets/me"
    with pytest.raises(AfterimageError, match=rf"me/none does not exist, or .*check its name on {page}/none"):
        load("hf:me/none", tmp_path)
    with pytest.raises(AfterimageError, match=r"me/photos at .* has no revision v9"):
        load("hf:me/photos@v9", tmp_path)
    hub.gated = True
    with pytest.raises(AfterimageError, match=rf"me/photos is gated.* accept its licence on {page}/photos"):
        load("hf:me/photos", tmp_path)
    with pytest.raises(AfterimageError, match="is not a dataset name"):
        load("hf:@:", tmp_path)


def test_the_command_line_with_the_real_client(hub, tmp_path):
    """HF_ENDPOINT from the environment, as a user sets it, in a process of its own."""
    code = (
        "import sys; from afterimage.config import DataConfig; from afterimage.data import load_data\n"
        "print(load_data(DataConfig('hf:me/photos', resize=24, crop=16), cache=sys.argv[1]).digest)"
    )
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    result = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == load("hf:me/photos", tmp_path / "other").digest
