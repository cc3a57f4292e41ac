import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save, save_file

from afterimage.config import RANDOM_WEIGHTS, AfterimageError
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.providers import open_network, resolve_source
from afterimage.models.encoders.providers.timm import resolve_model
from afterimage.models.encoders.tracing import list_layers
from afterimage.models.lpips import find_lpips_weights
from afterimage.models.weight_files import read_named_tensors
from afterimage.models.weights import Weights, best_match, file_digest
from afterimage.runtime.hub import repository_config

MODEL = "resnet18.tv_in1k"
MISSING = 404, {"X-Error-Code": "EntryNotFound"}
STATE = {"conv1.weight": torch.arange(4.0).view(2, 2)}


def find_weights(model, weights="pretrained"):
    return open_network(model).find_weights(weights)


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
    """Serves paths and contents on the loopback interface, as the hub does; yields it and its requests.

    In place of a content there may be a status and headers, and in place of a path a command and a path.
    """
    servers, requests = [], []

    def start(files):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self, body=False):
                requests.append((self.command, self.path))
                answer = files.get((self.command, self.path), files.get(self.path, MISSING))
                content = b"" if isinstance(answer, tuple) else answer
                whole = {"ETag": hashlib.sha256(content).hexdigest(), "X-Repo-Commit": "0" * 40}
                status, headers = answer if isinstance(answer, tuple) else (200, whole)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
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
    assert asdict(found.record) == {
        "model": MODEL,
        "origin": "path",
        "location": str(tmp_path / "any.safetensors"),
        "sha256": digest,
        "label": "pretrained",
        "is_random": False,
        "note": "",
        "code": "",
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
    assert torch.equal(read_named_tensors(found.file).tensors["conv1.weight"], STATE["conv1.weight"])
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
    monkeypatch.setattr("afterimage.runtime.hub.CONNECT_SECONDS", 0.2)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: time.sleep(60))
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
        find_lpips_weights("squeeze")
    start, _ = serve
    content = b"weights"
    name = f"squeezenet1_1-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    url = f"{start({f'/{name}': content, '/other-00000000.pth': content})}/{name}"
    torchvision_weights = type("W", (), {"IMAGENET1K_V1": type("V", (), {"url": url})})
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda _: torchvision_weights)
    found = find_lpips_weights("squeeze")
    assert (found.origin, found.location, found.file.read_bytes()) == ("hub", url, content)
    assert find_lpips_weights("squeeze").origin == "cache"
    torchvision_weights.IMAGENET1K_V1.url = url.replace(name, "other-00000000.pth")
    with pytest.raises(AfterimageError, match="invalid hash value"):
        find_lpips_weights("squeeze")
    assert sorted(os.listdir(found.file.parent)) == [name]
    (folder / "squeezenet1_1.torchvision.safetensors").write_bytes(b"mine")
    assert find_lpips_weights("squeeze").origin == "folder"
    with pytest.raises(AfterimageError, match="unknown LPIPS network 'squeezenet'"):
        find_lpips_weights("squeezenet")


def test_a_digest_is_computed_once_for_a_file_that_stays_the_same(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    assert file_digest(path) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        assert file_digest(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two!")
    assert file_digest(path) == hashlib.sha256(b"two!").hexdigest()


@pytest.mark.parametrize("kind", RANDOM_WEIGHTS)
def test_random_weights_say_so(kind):
    assert asdict(Weights(MODEL, kind, "seed 7").record) == {
        "model": MODEL,
        "origin": kind,
        "location": "seed 7",
        "sha256": "",
        "label": kind,
        "is_random": True,
        "note": "",
        "code": "",
    }
    assert (
        len({Weights(MODEL, k, f"seed {seed}").record.identity for k in RANDOM_WEIGHTS for seed in (1, 2)})
        == 4
    )


def test_an_unknown_kind_of_weights_is_told_what_there_is():
    with pytest.raises(
        AfterimageError, match=r"weights at randm; write pretrained, random, random-init or a path"
    ):
        find_weights(MODEL, "randm")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "nest", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}]
)
def test_checkpoints_of_any_shape_are_read(tmp_path, nest, legacy):
    state = {f"module.{key}": value for key, value in STATE.items()}
    torch.save(nest(state), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    match, _ = best_match(read_named_tensors(tmp_path / "x.pth"), STATE, [("conv1.weight",)], dict)
    assert match.state.keys() == STATE.keys()


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
        read_named_tensors(tmp_path / name)
    assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert not (tmp_path / "hostile-was-here").exists()


REFUSALS = [
    (429, {"Retry-After": "37"}, "is busy, with too many requests from here (429): try again in 37 s, as it asks"),
    (429, {"RateLimit": '"resolvers";r=0;t=120'}, "try again in 120 s, as it asks"),
    (429, {}, "is busy, with too many requests from here (429): try again later"),
    (503, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, "is not available for now (503): try again after Wed, 21"),
    (503, {}, "is not available for now (503): try again later"),
    (500, {}, "is not available for now (500): try again later"),
    (504, {}, "is not available for now (504): try again later"),
    (403, {"X-Error-Code": "GatedRepo"}, "is gated, and access was refused (403): accept its licence on "),
    (401, {"X-Error-Code": "GatedRepo"}, "is gated, and access was refused (401): accept its licence on "),
    (403, {}, "was refused (403) without the hub's own reason, as a proxy or firewall does"),
    (401, {"X-Error-Code": "RepoNotFound"}, "does not exist, or it is private or gated (401): check its name on "),
    (401, {}, "does not exist, or it is private or gated (401): check its name on "),
    (404, {"X-Error-Code": "RepoNotFound"}, "does not exist at "),
    (404, {}, "does not exist at "),
    (404, {"X-Error-Code": "RevisionNotFound"}, "has no revision main (404)"),
    (404, {"X-Error-Code": "EntryNotFound"}, "(it holds no model.safetensors or pytorch_model.bin)"),
    (418, {}, "refuses timm/resnet18.tv_in1k (418: "),
]  # fmt: skip


@pytest.mark.parametrize(("status", "headers", "words"), REFUSALS)
def test_the_hubs_refusals_are_told_by_what_they_are(monkeypatch, serve, status, headers, words):
    start, requests = serve
    answer = status, headers
    paths = [f"/timm/{MODEL}/resolve/main/{name}" for name in ("model.safetensors", "pytorch_model.bin")]
    address = start(dict.fromkeys(paths, answer))
    use_hub(monkeypatch, address)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(AfterimageError) as error:
        find_weights(MODEL)
    told = str(error.value)
    assert words in told and "\n" not in told and address in told
    assert ("it holds no" in told) == (headers.get("X-Error-Code") == "EntryNotFound")
    if status in (401, 403):
        assert f"{address}/timm/{MODEL}" in told and "`hf auth login`, or set HF_TOKEN" in told
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        with pytest.raises(AfterimageError, match=r"accept its licence .* with the account of your token"):
            find_weights(MODEL)
    assert len(requests) < 5, "a hub that is busy is not asked again and again"


def test_a_hub_that_fails_during_the_download_and_one_that_is_none_are_told_too(monkeypatch, serve):
    start, _ = serve
    path = f"/timm/{MODEL}/resolve/main/model.safetensors"
    use_hub(monkeypatch, start({path: b"weights", ("GET", path): (503, {"Retry-After": "4"})}))
    with pytest.raises(
        AfterimageError, match=r"is not available for now \(503\): try again in 4 s, as it asks"
    ):
        find_weights(MODEL)
    address = start({path: (200, {"Content-Type": "text/html"})})
    use_hub(monkeypatch, address)
    with pytest.raises(AfterimageError, match=rf"the hub at {address} \(.*does not seem to be served by"):
        find_weights(MODEL)


def test_other_servers_that_are_busy_are_told_too(monkeypatch, serve):
    start, _ = serve
    url = f"{start({'/w-00000000.pth': (503, {'Retry-After': '9'})})}/w-00000000.pth"
    torchvision_weights = type("W", (), {"IMAGENET1K_V1": type("V", (), {"url": url})})
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda _: torchvision_weights)
    with pytest.raises(
        AfterimageError, match=rf"{url} is not available for now \(503\): try again in 9 s, as it asks"
    ):
        find_lpips_weights("squeeze")


@pytest.mark.parametrize("form", ["hf-hub:timm/{}", "hf_hub:timm/{}", "HF-hub:timm/{}", "timm/{}", "{}"])
def test_a_timm_model_may_be_named_as_on_the_hub(form):
    for name, resolved in (
        ("resnet18.a1_in1k", "resnet18.a1_in1k"),
        ("resnet18.tv_in1k", "resnet18.tv_in1k"),
    ):
        assert resolve_model(form.format(name)) == resolved
        assert resolve_source(f"{form.format(name)}:layer1") == f"{resolved}:layer1"
    assert resolve_model(form.format("resnet18")) == resolve_model("resnet18")


@pytest.fixture
def repository(monkeypatch, serve):
    """A network of one's own on a hub: timm's tiny ResNet, trained by somebody else, with another mean and classes."""
    import timm

    start, requests = serve
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    config = {
        "architecture": "test_resnet",
        "num_classes": 7,
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 96, 96]},
    }
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": save(state)}
    use_hub(
        monkeypatch, start({f"/me/my.net/resolve/main/{name}": content for name, content in files.items()})
    )
    clear()
    yield state, requests
    clear()


def clear():
    from afterimage.models.encoders.providers import timm as build

    for function in (resolve_model, repository_config, build._repository):
        function.cache_clear()


def test_a_repository_of_the_hub_is_an_encoder(monkeypatch, repository, tmp_path):
    state, requests = repository
    encoder = Encoder("hf-hub:me/my.net:layer2", image_size=64)
    assert encoder.sources == ("me/my.net:layer2",) and encoder.model_name == "me/my.net"
    assert (encoder.weights.origin, encoder.weights.location) == ("hub", "me/my.net")
    found = {key.removeprefix("model."): value for key, value in encoder.state_dict().items()}
    assert all(torch.equal(value, state[key]) for key, value in found.items())
    assert encoder.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert encoder.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert {"layer1", "layer2"} <= {layer.layer for layer in list_layers("hf_hub:me/my.net", 64)}
    # From the cache alone, with no network.
    clear()
    count = len(requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Encoder("me/my.net:layer2", image_size=64).weights.origin == "cache"
    assert len(requests) == count
    # And with weights from elsewhere, in the repository's network.
    (tmp_path / "w").mkdir()
    save_file(state, tmp_path / "w" / "my.net.safetensors")
    assert Encoder("me/my.net:layer2", weights=tmp_path / "w", image_size=64).weights.origin == "path"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "names no architecture (it describes a 'vit' of "),
        ({"architecture": "no_such_net"}, "names the architecture 'no_such_net', which timm would have to know"),
        ([], "it is not a table of settings"),
        ({"architecture": "test_resnet", "pretrained_cfg": {"mean": [1]}}, "mean must be three numbers"),
        ({"architecture": "test_resnet", "pretrained_cfg": 3}, "cannot use the config.json of me/net"),
        ((403, {"X-Error-Code": "GatedRepo"}), "a repository of the hub: the hub's me/net is gated"),
        ((503, {}), "config.json of me/net, a repository of the hub: the hub at"),
        ((404, {"X-Error-Code": "EntryNotFound"}), "it holds no config.json"),
    ],
)  # fmt: skip
def test_a_repository_that_is_no_network_is_told(monkeypatch, serve, config, words):
    start, _ = serve
    content = config if isinstance(config, tuple) else json.dumps(config).encode()
    use_hub(monkeypatch, start({"/me/net/resolve/main/config.json": content}))
    clear()
    with pytest.raises(AfterimageError) as error:
        open_network("hf-hub:me/net")
    assert words in str(error.value)
    clear()


def test_names_of_repositories_that_are_none_and_offline(monkeypatch, tmp_path):
    clear()
    with pytest.raises(AfterimageError, match="'a/b/c' is no name of a repository: write OWNER/NAME"):
        resolve_model("a/b/c")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        AfterimageError, match=rf"{tmp_path}/hub has none, and nothing is downloaded, as HF_HUB_OFFLINE"
    ):
        resolve_model("hf-hub:me/net")
    with pytest.raises(AfterimageError, match="unknown model 'resnet18/layer1'; did you mean 'resnet18'"):
        resolve_model("resnet18/layer1")
    with pytest.raises(AfterimageError, match="names no layer"):
        resolve_source("hf-hub:timm/resnet18.a1_in1k")
    clear()


def test_the_command_line_with_the_real_client(repository, tmp_path):
    """HF_ENDPOINT from the environment, as a user sets it, in a process of its own."""
    endpoint = huggingface_hub.constants.ENDPOINT
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "afterimage", "layers", "hf-hub:me/my.net", "--image-size", "64"]
    result = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "layer2" in result.stdout, result.stderr
