"""Decoders on the hub: pushed through the real client to a stand-in, and pulled from there."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from dataclasses import replace
from importlib import metadata

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from packaging.requirements import Requirement
from PIL import Image
from safetensors.torch import save_file

from afterimage import AfterimageError, Reconstructor, load_reconstructor, train_runs
from afterimage.cli import main
from afterimage.cli.shared import find_local_or_hub_runs
from afterimage.models.hub import pull, pull_all, pull_table
from afterimage.runs.repository import CARD, DECODER, FILES, IMAGE_GRID, MANIFEST, SCORES_TABLE, TABLE
from children import MODEL, small_configs
from command_line import command, free_port
from fake_hub import TOKEN, FakeHub

NAME = "me/small.decoder"


def write_weights(folder, seed):
    """Weights of the small network, drawn anew."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(timm.create_model(MODEL).state_dict(), folder / f"{MODEL}.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"), 1)


@pytest.fixture(scope="module")
def runs(sample_images, folder, tmp_path_factory):
    """Two decoders of one network, fitted on images of one's own: nothing that may be passed on."""
    root = tmp_path_factory.mktemp("runs")
    config = small_configs(sample_images, weights=str(folder / f"{MODEL}.safetensors"))[1]
    configs = [config, replace(config, sources=(f"{MODEL}:layer2",))]
    return train_runs(configs, root, cache=root / "cache", accelerator="cpu")


@pytest.fixture
def hub(monkeypatch, tmp_path, folder):
    server, constants = FakeHub(), huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(folder))
    monkeypatch.chdir(tmp_path)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def pushed(runs, folder, tmp_path_factory):
    """The files of a repository with one decoder."""
    path = tmp_path_factory.mktemp("pushed")
    main(["push", str(runs[0].path), "--to", NAME, "--license", "mit", "--output-dir", str(path)])
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_what_is_pushed_comes_back_bit_for_bit(hub, runs, tmp_path, capsys):
    code, out, err = command(capsys, "push", runs[0].path, "--to", NAME, "--license", "mit")
    assert code == 0, err
    (commit,) = (commit for commit, _ in hub.repositories[NAME])
    assert out.splitlines() == [
        f"1 decoder at {hub.endpoint}/{NAME}",
        f"afterimage reconstruct ME.jpg --from hub:{NAME}@{commit}",
    ]
    assert set(hub.files(NAME)) == {*FILES, MANIFEST, CARD, IMAGE_GRID}
    assert hub.files(NAME)[DECODER] == runs[0].file(DECODER).read_bytes()
    theirs = Reconstructor.from_pretrained(NAME)
    assert theirs.origin == f"hub:{NAME}@{commit}"
    assert torch.equal(theirs.reconstruct(images()), load_reconstructor(runs[0]).reconstruct(images()))
    local = Reconstructor.from_pretrained(runs[0].path)
    assert torch.equal(local.reconstruct(images()), theirs.reconstruct(images()))
    # Pushed again there is nothing to commit; the card's repository may be overwritten by another of ours.
    assert command(capsys, "push", runs[1].path, "--to", NAME)[0] == 0
    assert Reconstructor.from_pretrained(f"{NAME}@{commit}").encoders.sources == runs[0].config.sources
    assert Reconstructor.from_pretrained(NAME, revision="main").encoders.sources == runs[1].config.sources


def test_nothing_private_goes_up(pushed, runs, sample_images, folder):
    private = [str(sample_images), str(folder), str(runs[0].path.parent), os.path.expanduser("~")]
    names = [path.name for path in sample_images.iterdir()]
    for name, content in pushed.items():
        for text in (*private, *names):
            assert text.encode() not in content, (name, text)
    assert b"folder:" + sample_images.name.encode() in pushed["config.toml"]
    assert pushed["scores.csv"].splitlines()[1].startswith(b"00000,")


def test_the_card_is_one_that_the_hub_takes(pushed, runs):
    text = pushed[CARD].decode()
    card, result = ModelCard(text), runs[0].result
    data = card.data
    assert (data.library_name, data.license, data.pipeline_tag) == ("afterimage", "mit", "image-to-image")
    assert {found.metric_type: found.metric_value for found in data.eval_results} == {
        metric: pytest.approx(score.mean, abs=1e-3) for metric, score in result.scores.items() if score
    }
    for told in (
        result.data.digest, result.data.test_digest, result.weights[0].sha256, f"hub:{NAME}", "@software{afterimage",
        "Not measured. `afterimage invert RUN`", "Not measured. `afterimage controls RUN`", f"`{MODEL}:layer1`",
        "Baselines: not measured",
    ):  # fmt: skip
        assert told in text, told
    manifest = json.loads(pushed[MANIFEST])["decoders"][runs[0].name]
    assert manifest["sha256"][DECODER] == hashlib.sha256(pushed[DECODER]).hexdigest() in text
    assert manifest["encoders"] == {MODEL: result.weights[0].sha256}


def test_several_decoders_lie_side_by_side(hub, runs, capsys):
    code, _, err = command(capsys, "push", runs[0].path.parent, "--to", NAME)
    assert code == 0, err
    assert set(hub.files(NAME)) == {
        MANIFEST,
        CARD,
        IMAGE_GRID,
        *(f"{run.name}/{f}" for run in runs for f in FILES),
    }
    for run in runs:
        found = Reconstructor.from_pretrained(f"hub:{NAME}/{run.name}")
        assert torch.equal(found.reconstruct(images()), load_reconstructor(run).reconstruct(images()))
    with pytest.raises(
        AfterimageError,
        match=rf"{NAME} is refused: it holds 2 decoders; append the name of one .*{runs[0].name}",
    ):
        pull(NAME)
    commit = hub.repositories[NAME][-1][0]
    found = pull_all(f"hub:{NAME}@{commit}")
    assert {run.address for run in found} == {f"hub:{NAME}/{run.name}@{commit}" for run in runs}
    assert pull_all(f"{NAME}/{runs[1].name}") == [run for run in found if runs[1].name in run.address]
    assert find_local_or_hub_runs((f"hub:{NAME}", str(runs[0].path))) == [runs[0], *found]
    with pytest.raises(AfterimageError, match=r"unknown decoder 'linear'"):
        pull(f"{NAME}/linear")


def test_images_that_may_be_shown_are_shown(runs, tmp_path, capsys):
    """Own images only with the flag; without it photographs that anybody may pass on."""
    sheets = {}
    for flag in ("--no-own-images", "--own-images"):
        arguments = ["push", runs[0].path, "--to", NAME, flag, "--output-dir", tmp_path / flag]
        assert command(capsys, *arguments)[0] == 0
        sheets[flag] = np.array(Image.open(tmp_path / flag / IMAGE_GRID))
    _, original, reconstruction = runs[0].images[0]
    first = [np.array(Image.open(path).convert("RGB")) for path in (original, reconstruction)]
    own = sheets["--own-images"]
    assert np.array_equal(own[:32, :32], first[0]) and np.array_equal(own[38:70, :32], first[1])
    assert not np.array_equal(sheets["--no-own-images"][:32, :32], first[0])
    code, _, err = command(capsys, *arguments[:4], "--device", "abacus", "--output-dir", tmp_path / "abacus")
    assert code == 1 and "abacus" in err and not (tmp_path / "abacus").exists()
    assert b"test images" in (tmp_path / "--own-images" / CARD).read_bytes()
    assert runs[0].result.per_image[0]["id"] in (tmp_path / "--own-images" / "scores.csv").read_text()


def swapped(pushed):
    tensors = bytearray(pushed[DECODER])
    tensors[-1] ^= 1
    return {DECODER: bytes(tensors)}


def swapped_with_its_digest(pushed):
    files = swapped(pushed)
    old, new = (hashlib.sha256(content[DECODER]).hexdigest() for content in (pushed, files))
    return {**files, MANIFEST: pushed[MANIFEST].replace(old.encode(), new.encode())}


def trusted(name):
    """A configuration that would run code or read files, with a digest that fits."""

    def change(pushed):
        text = pushed["config.toml"].replace(*name)
        digests = [hashlib.sha256(content).hexdigest().encode() for content in (pushed["config.toml"], text)]
        return {"config.toml": text, MANIFEST: pushed[MANIFEST].replace(*digests)}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, r"decoder\.safetensors was swapped or changed: its SHA-256 is \w+, not \w+ as in config\.json"),
        (swapped_with_its_digest, r"its card README\.md is about another decoder"),
        (lambda _: {CARD: b"# A card of somebody else\n"}, r"its card README\.md says library_name None"),
        (lambda _: {CARD: b"---\n: {\n---\n"}, r"its card README\.md cannot be read"),
        (lambda _: {CARD: None}, r"it holds no README\.md"),
        (lambda _: {MANIFEST: b'{"model_type": "bert"}'}, r"config\.json: its library_name is None, not 'afterimage'"),
        (lambda _: {MANIFEST: None}, r"it holds no config\.json"),
        (lambda _: {MANIFEST: b"[" * 10**5}, r"config\.json: it is not valid JSON"),
        (trusted((f"{MODEL}:layer1".encode(), b"python/os:getcwd:layer1")), "python/os:getcwd is code that only"),
        (trusted((b'weights = "pretrained"', b'weights = "/etc/passwd"')), "its weights are '/etc/passwd'"),
    ],
)  # fmt: skip
def test_a_repository_that_does_not_fit_is_refused(hub, pushed, change, message, capsys):
    hub.put(NAME, {**pushed, **change(pushed)})
    with pytest.raises(AfterimageError, match=rf"hub:{NAME}\b.*{message}"):
        Reconstructor.from_pretrained(NAME)
    code, out, err = command(capsys, "app", f"hub:{NAME}")
    assert (code, out) == (1, "") and re.search(rf"^afterimage: .*hub:{NAME}\b.*{message}", err)


def test_another_encoder_is_refused(hub, pushed, tmp_path):
    hub.put(NAME, pushed)
    other = write_weights(tmp_path / "other", 2)
    with pytest.raises(AfterimageError, match=f"was trained on weights of {MODEL} with digest"):
        Reconstructor.from_pretrained(NAME, weights=str(other))


def test_a_revision_is_pinned(hub, pushed):
    first = hub.put(NAME, pushed)
    hub.tags[NAME, "v1"] = first
    second = hub.commit(NAME, extra=b"x")
    assert pull(f"{NAME}@v1").address == f"hub:{NAME}@{first}"
    assert pull(NAME).address == f"hub:{NAME}@{second}"
    hub.requests.clear()
    assert pull(f"hub:{NAME}@{first}").file(DECODER).read_bytes() == pushed[DECODER]
    assert not hub.requests  # a commit that the cache has is not asked for
    with pytest.raises(AfterimageError, match=rf"cannot get hub:{NAME}: .*has no revision v9 \(404\)"):
        pull(f"{NAME}@v9")
    for wrong in ("me", "hub:me/", "me/a/b/c", f"{NAME}@", "me/a b", "-/x"):
        with pytest.raises(AfterimageError, match="is no decoder of the hub: write hub:USER/NAME"):
            pull(wrong)


def test_without_a_network_the_cache_answers(hub, pushed, monkeypatch, tmp_path):
    commit = hub.put(NAME, pushed)
    assert pull(NAME).address == f"hub:{NAME}@{commit}"
    hub.stop()
    with pytest.raises(AfterimageError, match=rf"cannot get hub:{NAME}: the hub at {hub.endpoint} "):
        pull(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert pull(NAME).address == f"hub:{NAME}@{commit}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(
        AfterimageError, match=r"empty has no config\.json of it at main, .*HF_HUB_OFFLINE is set"
    ):
        pull(NAME)


def test_who_may_not(hub, pushed, runs, monkeypatch, capsys):
    hub.put(NAME, pushed)
    hub.gated.add(NAME)
    with pytest.raises(
        AfterimageError, match=rf"cannot get hub:{NAME}: .* is gated, and access was refused \(403\)"
    ):
        pull(NAME)
    with pytest.raises(
        AfterimageError, match=r"hub:me/none: .* does not exist, or your token may not read it \(401\)"
    ):
        pull("me/none")
    push = ("push", runs[0].path, "--to", "me/new")
    monkeypatch.setenv("HF_TOKEN", "hf_to_read")
    code, out, err = command(capsys, *push)
    assert (code, out) == (
        1,
        "",
    ) and "your token may not write there (403): log in with `hf auth login`" in err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "none")
    code, out, err = command(capsys, *push)
    assert (code, out) == (1, "") and "you are not logged in (401)" in err
    with pytest.raises(
        AfterimageError, match=r"hub:me/none: .* it is private or gated \(401\).*set HF_TOKEN"
    ):
        pull("me/none")
    assert "me/new" not in hub.repositories


def test_what_push_refuses(hub, runs, tmp_path, capsys):
    def refused(*arguments):
        code, out, err = command(capsys, "push", *arguments)
        assert code == 1 and not out and err.startswith("afterimage: ") and "Traceback" not in err
        return err

    run = runs[0].path
    assert "--to 'me' is not a valid repository name: write USER/NAME" in refused(run, "--to", "me")
    hub.commit("me/bert", **{"config.json": b'{"model_type": "bert"}'})
    assert "me/bert holds files other than those that afterimage pushes (its library_name" in refused(
        run, "--to", "me/bert"
    )
    hub.commit("me/other", **{"model.bin": b"x"})
    assert "(it has model.bin, and no config.json)" in refused(run, "--to", "me/other")
    assert '"license" must be one of' in refused(run, "--to", NAME, "--license", "mine")
    broken = shutil.copytree(run, tmp_path / "broken")
    (broken / DECODER).write_bytes(runs[1].file(DECODER).read_bytes())
    assert "is not the decoder that broken was measured with" in refused(broken, "--to", NAME, "--own-images")
    (broken / "summary.json").unlink()
    assert "none of these runs has a decoder to share: broken (done)" in refused(broken, "--to", NAME)
    hub.stop()
    assert f"cannot push to {NAME} at {hub.endpoint}: " in refused(run, "--to", NAME)


def test_scores_are_a_data_set(hub, runs, tmp_path, capsys, sample_images):
    push = ["push", runs[0].path.parent, "--to", "me/scores", "--dataset", "--license", "cc-by-4.0"]
    for _ in range(2):  # the second replaces the first
        code, out, err = command(capsys, *push)
        assert code == 0, err
    commit, files = hub.repositories["datasets/me/scores"][-1]
    assert out == f"scores at {hub.endpoint}/datasets/me/scores, commit {commit}\n"
    assert files.keys() == {CARD, SCORES_TABLE, TABLE}
    # Somebody else stands among these runs; the table is pinned, and there without a network.
    code, out, err = command(capsys, "compare", runs[0].path, "--with", "hub:me/scores")
    assert code == 0 and f"atlas: hub:me/scores@{commit}" in out and "saved: compare.png" in out, err
    assert command(capsys, "push", runs[0].path, "--to", NAME)[0] == 0
    assert command(capsys, "compare", f"hub:{NAME}", "--with", "hub:me/scores")[:2] == (0, out)
    hub.requests.clear()
    assert pull_table(f"hub:me/scores@{commit}")[0].read_bytes() == files[TABLE] and not hub.requests
    with pytest.raises(AfterimageError, match=r"data set hub:me/scores: .* has no revision v9"):
        pull_table("hub:me/scores@v9")
    with pytest.raises(AfterimageError, match=r"hub:me/none: .* does not exist, or .*/datasets/me/none"):
        pull_table("hub:me/none")
    with pytest.raises(AfterimageError, match=r"is no data set of the hub: write hub:USER/NAME"):
        pull_table("hub:me/scores/linear")
    hub.put("datasets/me/photos", {"a.png": b"x"})
    code, _, err = command(capsys, *push[:3], "me/photos", "--dataset")
    assert (
        code == 1
        and "me/photos holds files other than those that afterimage pushes (it has a.png, and no table" in err
    )


def test_in_another_home_with_the_real_client(hub, pushed, runs, tmp_path, folder):
    """HF_ENDPOINT and HF_HOME from the environment, as a user sets them, in a process of its own."""
    commit = hub.put(NAME, pushed)
    Image.fromarray((images()[0].permute(1, 2, 0) * 255).byte().numpy()).save(tmp_path / "me.png")
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    line = [
        sys.executable,
        "-m",
        "afterimage",
        "reconstruct",
        "me.png",
        "--from",
        f"hub:{NAME}",
        "--device",
        "cpu",
    ]
    result = subprocess.run(
        line, env={**os.environ, **own}, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert f"decoder: hub:{NAME}@{commit}" in result.stdout
    theirs = np.array(Image.open(tmp_path / "me.reconstruction.png"))
    main(["reconstruct", "me.png", str(runs[0].path), "--device", "cpu"])
    assert np.array_equal(theirs, np.array(Image.open(tmp_path / "me.reconstruction.png")))


def test_a_space_shows_what_was_pushed(hub, runs, tmp_path, folder, capsys):
    """What the hub would do with it: install the requirement, run the file, forward visitors to its port."""
    pytest.importorskip("gradio", reason="the live page is drawn by Gradio")
    push = ["push", runs[0].path.parent, "--to", NAME, "--license", "mit", "--space"]
    for _ in range(2):  # the second replaces the first
        code, out, err = command(capsys, *push)
        assert code == 0, err
    assert out.splitlines()[-1] == f"live page at {hub.endpoint}/spaces/{NAME}, when the hub has built it"
    files, commit = hub.files(f"spaces/{NAME}"), hub.repositories[NAME][-1][0]
    (wheel,) = (name for name in files if name.endswith(".whl"))
    assert files.keys() == {CARD, "app.py", "requirements.txt", wheel}
    card = ModelCard(files[CARD].decode()).data.to_dict()
    assert (card["sdk"], card["app_file"], card["models"]) == ("gradio", "app.py", [NAME])
    assert card["sdk_version"] == metadata.version("gradio")
    assert sys.version.startswith(card["python_version"])

    requirement = Requirement(files["requirements.txt"].decode().strip())
    url, _, digest = requirement.url.partition("#sha256=")
    assert (requirement.name, requirement.extras) == ("afterimage", {"app"})
    assert re.search(rf"/spaces/{NAME}/resolve/[0-9a-f]{{40}}/{wheel}$", url)
    with urllib.request.urlopen(url) as answer:
        content = answer.read()
    assert hashlib.sha256(content).hexdigest() == digest and content == files[wheel]
    zipfile.ZipFile(io.BytesIO(content)).extractall(tmp_path / "installed")
    (tmp_path / "app.py").write_bytes(files["app.py"])
    environment = {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(tmp_path / "installed"), "GRADIO_SERVER_PORT": str(free_port()),
    }  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "app.py"], env={**os.environ, **environment}, cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        told = child.stdout.readline()
        assert told.startswith("2 decoders at "), child.communicate()[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{environment['GRADIO_SERVER_PORT']}/config") as answer:
            page = answer.read().decode()
        assert "layer1 · " in page and "layer2 · " in page
        assert ("HEAD", f"/{NAME}/resolve/{commit}/{MANIFEST}") in hub.requests
    finally:
        child.terminate()
        child.communicate()


def test_a_collection_holds_what_was_pushed(hub, runs, capsys):
    push = ("push", runs[0].path, "--collection", "What layers keep", "--to")
    for arguments in (("me/small", "--space"), ("me/scores", "--dataset"), ("me/small",)):
        code, out, err = command(capsys, *push, *arguments)
        assert code == 0, err
        assert out.splitlines()[-1].startswith(f"collection at {hub.endpoint}/collections/me/What")
    items = [("model", "me/small"), ("space", "me/small"), ("dataset", "me/scores")]
    assert hub.collections == {("me", "What layers keep"): items}
    code, out, err = command(capsys, *push, "me/small", "--output-dir", "look")
    assert (code, out) == (1, "") and "--collection does not go with --output-dir" in err


def test_what_no_space_is_made_of(hub, runs, capsys, monkeypatch):
    push = ("push", runs[0].path, "--to", NAME, "--space")
    for flag in ("--dataset", "--private"):
        code, out, err = command(capsys, *push, flag)
        assert (code, out) == (1, "") and f"--space does not go with {flag}: " in err
    code, out, err = command(capsys, *push, "--output-dir", "look")
    assert (code, out) == (1, "") and "--space does not go with --output-dir: " in err
    found = metadata.distribution
    for missing, told in (("gradio", "pip install 'afterimage[app]'"), ("afterimage", "`pip install -e .`")):
        without = {missing: "none"}
        monkeypatch.setattr(metadata, "distribution", lambda name, w=without: found(w.get(name, name)))
        code, out, err = command(capsys, *push)
        assert (code, out) == (1, "") and told in err
    monkeypatch.setattr(metadata, "distribution", found)
    assert not hub.repositories  # nothing was uploaded before it was clear
    hub.commit(f"spaces/{NAME}", **{"app.py": b"print()", CARD: b""})
    code, out, err = command(capsys, *push)
    assert (
        code == 1
        and "holds files other than those that afterimage pushes (it has app.py, and no wheel" in err
    )
