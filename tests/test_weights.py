import hashlib
import http.server
import os
import pickle
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save, save_file

from afterimage import weights as module
from afterimage.config import AfterimageError
from afterimage.weights import (
    file_digest,
    find_torchvision_weights,
    find_weights,
    random_weights,
    read_weights,
)

MODEL = "resnet18.tv_in1k"
STATE = {"conv1.weight": torch.arange(4.0).view(2, 2)}


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """No weights folder, empty caches, and a hub that refuses connections at once."""
    monkeypatch.delenv("AFTERIMAGE_WEIGHTS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    use_hub(monkeypatch, "http://127.0.0.1:9")


def use_hub(monkeypatch, endpoint):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.mkdir()
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(path))
    return path


@pytest.fixture
def serve():
    """Serves paths and contents on the loopback interface, as the hub does; yields it and its requests."""
    servers, requests = [], []

    def start(files):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self, body=False):
                requests.append((self.command, self.path))
                content = files.get(self.path)
                self.send_response(200 if content is not None else 404)
                if content is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                else:
                    self.send_header("ETag", hashlib.sha256(content).hexdigest())
                    self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                if body and content:
                    self.wfile.write(content)

            def do_GET(self):
                self.do_HEAD(body=True)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start, requests
    for server in servers:
        server.shutdown()
        server.server_close()


def put_in_hub_cache(root, repository, name, content):
    """Lay a file out as huggingface_hub does."""
    commit = "1" * 40
    base = Path(root) / f"models--{repository.replace('/', '--')}"
    (base / "snapshots" / commit).mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(commit)
    (base / "snapshots" / commit / name).write_bytes(content)
    return base / "snapshots" / commit / name


def test_a_path_is_a_file_or_a_folder(tmp_path):
    save_file(STATE, tmp_path / "any.safetensors")
    found = find_weights(MODEL, tmp_path / "any.safetensors")
    digest = hashlib.sha256((tmp_path / "any.safetensors").read_bytes()).hexdigest()
    assert found.as_dict() == {
        "model": MODEL,
        "origin": "path",
        "location": str(tmp_path / "any.safetensors"),
        "sha256": digest,
        "label": "pretrained",
    }
    with pytest.raises(
        AfterimageError, match=r"holds no weights for .*: none of resnet18.tv_in1k.safetensors, "
    ):
        find_weights(MODEL, tmp_path)
    save_file(STATE, tmp_path / "resnet18.safetensors")
    assert find_weights(MODEL, tmp_path).location == str(tmp_path / "resnet18.safetensors")
    with pytest.raises(AfterimageError, match=r"no weights at .*nowhere"):
        find_weights(MODEL, tmp_path / "nowhere")


def test_the_folder_prefers_the_tag_and_safetensors(folder):
    names = [f"{stem}{suffix}" for stem in (MODEL, "resnet18") for suffix in (".safetensors", ".pth")]
    for name in reversed(names):
        (folder / name).write_bytes(name.encode())
        found = find_weights(MODEL)
        assert (found.origin, found.location) == ("folder", str(folder / name))
        assert found.sha256 == hashlib.sha256(name.encode()).hexdigest()
    assert find_weights("resnet18.a1_in1k").location == str(folder / "resnet18.safetensors")


def test_a_weights_folder_that_is_none_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(tmp_path / "gone"))
    with pytest.raises(AfterimageError, match=r"AFTERIMAGE_WEIGHTS names .*gone, which is not a folder"):
        find_weights(MODEL)


def test_a_path_comes_before_the_folder_and_the_folder_before_the_cache(folder, tmp_path):
    cached = put_in_hub_cache(tmp_path / "hub", f"timm/{MODEL}", "model.safetensors", b"cache")
    found = find_weights(MODEL)
    assert (found.origin, found.location, found.file) == ("cache", f"timm/{MODEL}", cached)
    (folder / "resnet18.pth").write_bytes(b"folder")
    assert find_weights(MODEL).origin == "folder"
    (tmp_path / "mine.pth").write_bytes(b"path")
    assert find_weights(MODEL, tmp_path / "mine.pth").origin == "path"


def test_torch_hubs_cache_is_used_too(tmp_path):
    file = tmp_path / "torch" / "hub" / "checkpoints" / "resnet18_a1_0-d63eafa0.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert find_weights("resnet18.a1_in1k").file == file


def test_the_hub_is_asked_last_and_its_answer_cached(monkeypatch, serve, tmp_path):
    start, requests = serve
    content = save(STATE)
    use_hub(monkeypatch, start({f"/timm/{MODEL}/resolve/main/model.safetensors": content}))
    found = find_weights(MODEL)
    assert (found.origin, found.location) == ("hub", f"timm/{MODEL}")
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert torch.equal(read_weights(found.file)["conv1.weight"], STATE["conv1.weight"])
    count = len(requests)
    assert find_weights(MODEL).origin == "cache"
    assert len(requests) == count


def test_what_is_published_as_a_pickle_only_is_found_too(monkeypatch, serve):
    start, _ = serve
    use_hub(monkeypatch, start({f"/timm/{MODEL}/resolve/main/pytorch_model.bin": b"bin"}))
    assert find_weights(MODEL).file.read_bytes() == b"bin"


def test_without_a_network_it_fails_soon_and_says_how_to_go_on(folder):
    start = time.perf_counter()
    with pytest.raises(AfterimageError) as error:
        find_weights("resnet18.a1_in1k")
    assert time.perf_counter() - start < 5
    for part in (
        f"the folder {folder} that AFTERIMAGE_WEIGHTS names (no resnet18.a1_in1k.safetensors",
        "the hub's cache",
        "torch.hub's cache",
        "the hub at http://127.0.0.1:9",
        "--weights PATH",
        "--weights random",
    ):
        assert part in str(error.value)


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: time.sleep(60))
    start = time.perf_counter()
    with pytest.raises(AfterimageError, match="no answer within"):
        find_weights(MODEL)
    assert time.perf_counter() - start < 10


def test_offline_asks_nobody(monkeypatch, serve):
    start, requests = serve
    use_hub(monkeypatch, start({f"/timm/{MODEL}/resolve/main/model.safetensors": b"there"}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AfterimageError, match="no download, as HF_HUB_OFFLINE is set"):
        find_weights(MODEL)
    assert not requests


def test_torchvisions_weights(folder, serve, monkeypatch, tmp_path):
    with pytest.raises(AfterimageError, match=r"no squeezenet1_1.torchvision.safetensors"):
        find_torchvision_weights("squeezenet1_1")
    start, _ = serve
    content = b"weights"
    name = f"squeezenet1_1-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    url = f"{start({f'/{name}': content, '/other-00000000.pth': content})}/{name}"
    torchvision_weights = type("W", (), {"IMAGENET1K_V1": type("V", (), {"url": url})})
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda _: torchvision_weights)
    found = find_torchvision_weights("squeezenet1_1")
    assert (found.origin, found.location, found.file.read_bytes()) == ("hub", url, content)
    assert find_torchvision_weights("squeezenet1_1").origin == "cache"
    torchvision_weights.IMAGENET1K_V1.url = url.replace(name, "other-00000000.pth")
    with pytest.raises(AfterimageError, match="invalid hash value"):
        find_torchvision_weights("squeezenet1_1")
    assert sorted(os.listdir(found.file.parent)) == [name]
    (folder / "squeezenet1_1.torchvision.safetensors").write_bytes(b"mine")
    assert find_torchvision_weights("squeezenet1_1").origin == "folder"
    with pytest.raises(AfterimageError, match="unknown torchvision model 'squeezenet'"):
        find_torchvision_weights("squeezenet")


def test_a_digest_is_computed_once_for_a_file_that_stays_the_same(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert file_digest(path) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        assert file_digest(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two!")
    assert file_digest(path) == hashlib.sha256(b"two!").hexdigest()


def test_random_weights_say_so():
    assert random_weights(MODEL, 7).as_dict() == {
        "model": MODEL,
        "origin": "random",
        "location": "seed 7",
        "sha256": "",
        "label": "random",
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "nest", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}]
)
def test_checkpoints_of_any_shape_are_read(tmp_path, nest, legacy):
    state = {f"module.{key}": value for key, value in STATE.items()}
    torch.save(nest(state), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    assert read_weights(tmp_path / "x.pth").keys() == STATE.keys()


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


def write_hostile(path):
    path.write_bytes(pickle.dumps({"conv1.weight": Hostile()}))


def write_hostile_zip(path):
    torch.save({"conv1.weight": Hostile()}, path)


def write_truncated(path):
    save_file({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def write_truncated_zip(path):
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("hostile.pth", write_hostile),
        ("hostile_zip.pth", write_hostile_zip),
        ("truncated.safetensors", write_truncated),
        ("truncated.pth", write_truncated_zip),
        ("empty.safetensors", lambda path: path.write_bytes(b"")),
        ("empty.pth", lambda path: path.write_bytes(b"")),
        ("text.safetensors", lambda path: path.write_text("no weights at all")),
        ("text.pth", lambda path: path.write_text("no weights at all")),
        ("nothing.pth", lambda path: torch.save({"epoch": 3}, path)),
        ("list.pth", lambda path: torch.save([torch.zeros(1)], path)),
        ("gone.pth", lambda path: None),
    ],
)
def test_a_bad_file_is_one_clear_error_and_runs_no_code(tmp_path, monkeypatch, name, write):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(AfterimageError, match=name.replace(".", r"\.")) as error:
        read_weights(tmp_path / name)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert not (tmp_path / "hostile-was-here").exists()
