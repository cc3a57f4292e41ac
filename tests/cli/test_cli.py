import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

import command_line
from afterimage import cli
from afterimage.cli import COMMANDS, option_texts
from afterimage.cli.shared import find_runs
from afterimage.config import AfterimageError
from afterimage.report import figures
from afterimage.report.page.images import read_bytes
from afterimage.runs.files import read_csv
from afterimage.runs.lock import Lock
from afterimage.runs.run import scan

MODEL = "test_resnet.r160_in1k"
SMALL = ["--weights", "random", "--resize", "64", "--crop", "64", "--device", "cpu"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs a command line in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AFTERIMAGE_WEIGHTS", raising=False)

    return partial(command_line.command, capsys)


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        pixels = np.kron(random.integers(0, 256, (8, 10, 3)), np.ones((10, 10, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def test_from_images_to_a_report(command, photographs, tmp_path, monkeypatch):
    code, out, err = command(
        "train", f"{MODEL}:layer1", f"{MODEL}:layer2", "--decoders", "linear", "transposed",
        "--data", f"folder:{photographs}", "--epochs", 2, *SMALL,
    )  # fmt: skip
    assert code == 0, err
    assert "RANDOM weights" in err and "epoch 2/2" in err
    assert "layer1" in out and "transposed" in out and "unavailable" in out
    runs = list(scan(tmp_path / "runs"))
    assert [run.state for run in runs] == ["done"] * 4
    code, _, err = command(
        "train",
        f"{MODEL}:layer1",
        "--decoders",
        "linear",
        "--data",
        f"folder:{photographs}",
        "--epochs",
        2,
        *SMALL,
    )
    assert code == 0 and "is done already" in err
    run = runs[0].path
    code, out, _ = command("evaluate", run, "--output", "scores.csv")
    stored, again = runs[0].result.per_image, read_csv(tmp_path / "scores.csv")
    assert code == 0 and "PSNR" in out and [row["id"] for row in stored] == [row["id"] for row in again]
    assert [row["psnr"] for row in again] == pytest.approx([row["psnr"] for row in stored], abs=1e-4)
    code, out, _ = command("reconstruct", photographs / "00.png", run)
    assert code == 0 and "PSNR" in out and "dB" in out
    assert Image.open(tmp_path / "00.reconstruction.png").size == (64 + 8 + 64, 64)
    alone = next(line for line in out.splitlines() if line.startswith("PSNR")).strip()
    sample_images = photographs / "00.png", photographs / "01.png"
    code, out, _ = command("reconstruct", *sample_images, "runs", "--output", "both.png")
    lines = [line for line in out.splitlines() if "PSNR" in line]
    assert (
        code == 0
        and len(lines) == 8
        and {line.split(", ")[1].split(":")[0] for line in lines} == {"00", "01"}
    )
    assert sum(alone in line and ", 00: " in line for line in lines) == 1
    width, height = Image.open(tmp_path / "both.png").size
    assert width > 5 * 64 and height > 4 * 64, "the originals and four runs, two images and their details"
    drawn = figures.own_images
    with monkeypatch.context() as patch:  # as of many runs
        patch.setattr(
            figures,
            "own_images",
            lambda *given: [replace(drawn(*given)[0], title=name) for name in ("ResNet", "ViT")],
        )
        code, out, _ = command("reconstruct", *sample_images, "runs", "--output", "both.png")
    assert code == 0 and "both-1.png (ResNet; mean" in out and "both-2.png (ViT; mean" in out
    code, _, err = command("reconstruct", *sample_images, "runs", "--output", "both.svg")
    assert code == 1 and "PNG" in err and not (tmp_path / "both.svg").exists()
    code, _, err = command("reconstruct", sample_images[0], sample_images[0], "runs")
    assert code == 1 and "named twice" in err
    code, _, err = command("reconstruct", sample_images[0], "report")
    assert code == 1 and "report is no image file, no run folder and no MODEL:LAYER" in err
    code, out, _ = command("report", "runs")
    assert code == 0 and (tmp_path / "runs/report/report.md").exists() and "report.md" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "resnt18:layer1"], "did you mean 'resnet18'"),
        (["train", "resnet18"], "write [provider/]model:layer"),
        (["train"], "name at least one MODEL:LAYER"),
        (["train", f"{MODEL}:layr1", "--data", "procedural:8", *SMALL], "did you mean 'layer1'"),
        (
            ["train", f"{MODEL}:layer1", "--decoders", "liner", "--data", "procedural:8", *SMALL],
            "did you mean 'linear'",
        ),
        (["train", f"{MODEL}:layer1", "--epochs", "0"], "epochs must be greater than 0"),
        (["train", f"{MODEL}:layer1", "--loss", "mes", "--data", "procedural:8", *SMALL], "mse"),
        (["train", f"{MODEL}:layer1", "--data", "folder:/nowhere", *SMALL], "/nowhere"),
        (["train", f"{MODEL}:layer1", "--data", "imagenet", *SMALL], "unknown source 'imagenet'"),
        (["layers", "vgg61"], "did you mean"),
        (["report", "nowhere"], "no folder nowhere"),
        (["report", "."], "no "),
        (["evaluate", "nowhere"], "not a run folder"),
        (["study", "publish"], "did you mean 'published'"),
        (
            ["train", f"{MODEL}:layer1", "--data", "procedural:8", *SMALL, "--device", "foo"],
            "cannot be used here",
        ),
        (["train", f"{MODEL}:layer1", "--devices", "999", "--device", "cpu"], "--devices 999 on a CPU"),
        (["invert", f"{MODEL}:layer1", "--refine-only"], "--refine-only needs a RUN"),
        (
            ["reconstruct", __file__, "--from", "hub:a/b", "--data", "photographs"],
            "--data goes with MODEL:LAYER",
        ),
        (["study", "quickstart", "--layers", "layer1"], "--layers goes with --models"),
        (
            ["study", "quickstart", "--executor", "ray", "--devices", "2"],
            "--devices goes with --executor local",
        ),
        (["study", "published", "--estimate-images", "8"], "--estimate-images goes with --invert"),
        (["study", "quickstart", "--dry-run", "--list-groups"], "--dry-run or --list-groups, not both"),
        (
            ["train", f"{MODEL}:layer1", "--scheduler", "cosine", "--plateau-factor", "0.1"],
            "--plateau-factor goes with --scheduler plateau",
        ),
        (
            ["audit", MODEL, "--layers", "layer1", "--refine-steps", "9"],
            "--refine-steps goes with --threat-model",
        ),
        (["audit", "--feature-store", "f.npz", "--limit-test", "9"], "--limit-test goes with a MODEL"),
        (["audit", "--feature-store", "f.npz", "--data", "photographs"], "--data goes with a MODEL"),
        (
            ["push", ".", "--to", "a/b", "--output-dir", "x", "--private"],
            "--private does not go with --output-dir",
        ),
        (["push", ".", "--to", "a/b", "--dataset", "--weights", "x"], "--weights does not go with --dataset"),
        (["study", "missing.toml"], r"missing.toml"),
        (["study", "published", "--models", "resnet18"], "not both"),
    ],
)
def test_bad_input_is_one_message(command, arguments, message):
    code, _, err = command(*arguments)
    assert code == 1
    assert message in err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("afterimage: ") or err.count("afterimage: ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", f"{MODEL}:layer1", "--crop", "10"], "crop must lie between 11"),
        (["train", f"{MODEL}:layer1", "--seed", "9" * 20], "seed must lie between 0 and 9,223,372,036,854,775,807"),
        (["train", f"{MODEL}:layer1", "--learning-rate", "inf"], "learning_rate must be greater than 0 and finite"),
        (["train", f"{MODEL}:layer1", "--batch-size", "9" * 12], "batch_size must be at most 1,048,576"),
        (["train", f"{MODEL}:layer1", "--limit-test", "0"], "limit_test must be greater than 0"),
        (["train", f"{MODEL}:layer1", "--loss", "lpips", "--crop", "20"], "crop of 31 pixels or more"),
        (["train", f"{MODEL}:layer1", "--profile", "-1"], "--profile must lie between 0"),
        (["train", f"{MODEL}:layer1", "--devices", "9" * 20], "--devices must lie between 1"),
        (["train", f"{MODEL}:layer1", "--devices", "0"], "--devices must lie between 1"),
        (["train", f"{MODEL}:layer1", "--output-dir", "/dev/null/x"], "--output-dir /dev/null/x: /dev/null is a file"),
        (["train", f"{MODEL}:layer1", "--cache", "/dev/null"], "--cache /dev/null: /dev/null is a file"),
        (["study", "quickstart", "--seeds", "-1", "--dry-run"], "seeds[0] must lie between 0"),
        (["study", "quickstart", "--output-dir", "/dev/null", "--dry-run"], "--output-dir /dev/null: "),
        (["study", "quickstart", "--executor", "ray", "--retries", "-1"], "--retries must lie between 0"),
        (["layers", MODEL, "--image-size", "0"], "--size must be the side of a square in pixels"),
        (["audit", MODEL, "--layers", "layer1", "--max-ssim", "nan"], "max_ssim must lie between 0 and 1"),
        (["audit", MODEL, "--layers", "layer1", "--attacker-images", "²"], "a number from 5 on"),
        (
            ["audit", MODEL, "--layers", "layer1", "--threat-model", "white-box", "--refine-images", "1"],
            "refine_images must lie between 2",
        ),
        (["audit", MODEL, "--layers", "layer1", "--output-dir", "/dev/null"], "--output-dir /dev/null: "),
        (["invert", "a.png", f"{MODEL}:layer1", "--seed", "-1"], "seed must lie between 0"),
        (["invert", "a.png", f"{MODEL}:layer1", "--steps", "0"], "steps must be greater than 0"),
        (["invert", "a.png", f"{MODEL}:layer1", "--output-dir", "/dev/null"], "--output-dir /dev/null: "),
    ],
)  # fmt: skip
def test_limits_are_checked_before_anything_is_done(command, tmp_path, arguments, message):
    code, out, err = command(*arguments)
    assert code == 1 and message in err and err.startswith("afterimage: ") and not out
    assert not list(tmp_path.iterdir())


def test_outputs_are_looked_at_before_anything_is_computed(command, tmp_path, monkeypatch):
    # Where it is used: a module that was first imported now would keep the stand-in for the tests after this one.
    from afterimage.experiments import inference

    def computed(*_, **__):
        raise AssertionError("it should have ended before")

    arguments = ["train", f"{MODEL}:layer1", "--decoders", "linear", "--data", "procedural:8", *SMALL]
    assert command(*arguments)[0] == 0
    (run,) = scan(tmp_path / "runs")
    Image.new("RGB", (70, 70)).save(tmp_path / "a.png")
    monkeypatch.setattr(inference, "load_reconstructor", computed)
    for arguments, message in (
        (["evaluate", run.path, "--output", tmp_path], f"--output {tmp_path} is a folder"),
        (["evaluate", run.path, "--output", tmp_path / "a.png" / "x"], "a.png is a file, not a folder"),
        (["reconstruct", "a.png", run.path, "--output", "a.png/b.png"], "a.png is a file"),
        (["report", "runs", "--output-dir", "a.png"], "a.png is a file, not a folder"),
    ):
        code, _, err = command(*arguments)
        assert code == 1 and message in err, err
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    code, _, err = command("report", "runs", "--output-dir", "gone")
    assert code == 1 and "is a broken link" in err


def test_what_was_trained_is_shown_though_another_group_failed(command, tmp_path):
    code, out, err = command(
        "train",
        "test_vit.r160_in1k:layer9",
        f"{MODEL}:layer1",
        "--decoders",
        "linear",
        "--data",
        "procedural:8",
        *SMALL,
    )
    assert code == 1 and "layer9" in err.splitlines()[-1]
    (done,) = [run for run in scan(tmp_path / "runs") if run.state == "done"]
    assert "layer1" in out and f"run: {done.path.relative_to(tmp_path)}" in out


def test_version(command):
    code, out, _ = command("--version")
    assert code == 0 and out.startswith("afterimage 0.")


@pytest.mark.parametrize("name", ["truncated.jpg", "empty.png", "text.png"])
def test_a_broken_image_is_named_before_training(command, photographs, tmp_path, name):
    whole = (photographs / "00.png").read_bytes()
    Image.open(photographs / "00.png").save(photographs / "whole.jpg")
    broken = {
        "truncated.jpg": (photographs / "whole.jpg").read_bytes()[:400],
        "empty.png": b"",
        "text.png": b"hello",
    }
    (photographs / name).write_bytes(broken[name])
    code, _, err = command("train", f"{MODEL}:layer1", "--data", f"folder:{photographs}", *SMALL)
    assert code == 1 and name in err and "Traceback" not in err and whole


def test_layers_lists_what_can_be_inverted(command):
    code, out, _ = command("layers", "vgg16")
    assert code == 0
    for shape in ("64×112×112", "128×56×56", "256×28×28", "512×14×14", "512×7×7"):
        assert shape in out
    assert "block1" in out and "block5" in out


def test_a_dry_run_starts_nothing(command, tmp_path):
    code, out, _ = command(
        "study", "--models", MODEL, "--layers", "layer*", "--data", "procedural:10", "--dry-run"
    )
    assert code == 0 and "4 runs, none started" in out and "GMAC/s" in out
    assert not (tmp_path / "runs").exists()


def test_a_study_of_any_model_without_a_file(command, tmp_path, no_figures):
    code, out, err = command(
        "study",
        "--models",
        MODEL,
        "--layers",
        "layer1,layer3",
        "--data",
        "procedural:10",
        "--weights",
        "random",
    )
    assert code == 0, err
    assert "report.md" in out and len([r for r in scan(tmp_path / "runs" / MODEL) if "linear" in r.name]) == 2


def test_an_error_names_a_path_in_one_line(tmp_path):
    folder = tmp_path / "a\nb"
    with pytest.raises(AfterimageError, match=r"no folder .*/a\\nb$"):
        list(scan(folder))
    with pytest.raises(AfterimageError, match=r"cannot read the image .*/a\\nb: "):
        read_bytes(folder)
    with pytest.raises(AfterimageError, match=r"cannot write .*/a\\nb/lock.1: "):
        Lock(folder).acquire()
    folder.mkdir()
    with pytest.raises(AfterimageError, match=r"no run in .*/a\\nb$"):
        find_runs((folder,))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_an_option_is_not_broken_in_the_middle(command, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "3000")
    code, out, _ = command(name, "--help")
    assert code == 0 and not [text for text in option_texts(cli.command(name)).values() if text not in out]


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"], ["train", "--help"], ["study"]])
def test_help_needs_no_torch(arguments):
    code = (
        "import sys\nfrom afterimage.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules, 'timm' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}
    )
    assert result.stdout.splitlines()[-1] == "False False", result.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "passive 1000"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "7"}, "passive 7"),
    ],
)
def test_waiting_threads_leave_their_core_to_others_unless_told_otherwise(given, expected):
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    known = {name: value for name, value in os.environ.items() if name not in names}
    code = (
        "import os, sys; from afterimage import let_idle_threads_sleep; let_idle_threads_sleep(); "
        "assert 'torch' not in sys.modules; "
        f"print(*(os.environ.get(name) for name in {names}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=known | given,
    )
    assert result.stdout.strip() == expected, result.stderr


def test_interrupting_says_how_to_go_on(command, monkeypatch, photographs):
    import afterimage.training.decoder_trainer

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(afterimage.training.trainer, "training_step", interrupted)
    code, _, err = command(
        "train", f"{MODEL}:layer1", "--decoders", "transposed", "--data", f"folder:{photographs}", *SMALL
    )
    assert code == 130 and "the same command goes on from there" in err


def test_a_layer_needs_no_run(command, photographs, tmp_path, monkeypatch):
    """A decoder is fitted on the spot, and kept for the same weights, layer, images and settings."""
    from afterimage.experiments import fit

    image, output = photographs / "00.png", tmp_path / "00.reconstruction.png"
    given = ["--weights", "random", "--lpips", "squeeze", "--device", "cpu"]
    here = [*given, "--data", f"folder:{photographs}"]
    code, out, err = command("reconstruct", image, f"{MODEL}:layer1", *here)
    assert code == 0, err
    told = f"{MODEL}:layer1 · linear, fitted on 9 images of folder:photographs (digest "
    assert f"decoder: {told}" in out and ", 2 more for validation" in out and "PSNR" in out
    with Image.open(output) as made:
        assert made.size == (160 + 8 + 160, 160)
        assert made.text["Decoder"].startswith(told) and str(tmp_path) not in made.text["Decoder"]
        first = np.array(made)
    trained, train_runs = [], fit.train_runs

    def spy(config, *arguments, **options):
        (run,) = train_runs(config, *arguments, **options)
        trained.append(run.path)
        return [run]

    monkeypatch.setattr(fit, "train_runs", spy)
    folder = tmp_path / "cache" / "fitted"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("decoder.safetensors")}
    assert len(before) == 1 and command("reconstruct", image, f"{MODEL}:layer1", *here)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("decoder.safetensors")} == before
    assert np.array_equal(np.array(Image.open(output)), first)
    # Another image among those that it is fitted on, and drawn images: other decoders.
    Image.new("RGB", (70, 70)).save(photographs / "more.png")
    assert command("reconstruct", image, f"{MODEL}:layer1", *here)[0] == 0
    code, out, _ = command(
        "reconstruct", image, f"{MODEL}:layer1", f"{MODEL}:layer2", *given, "--data", "procedural:12"
    )
    assert code == 0 and "layer2 · linear, fitted on 10 images of procedural:12" in out
    assert len(set(trained)) == 4 == len(list(folder.rglob("decoder.safetensors")))


def test_what_is_no_image_and_no_layer_is_told_before_anything_is_fitted(command, tmp_path, monkeypatch):
    from afterimage.experiments import fit

    def fitted(*_, **__):
        raise AssertionError("it should have ended before")

    monkeypatch.setattr(fit, "train_runs", fitted)
    (tmp_path / "text.jpg").write_text("no image, whatever its name says")
    Image.new("RGB", (70, 70)).save(tmp_path / "a.png")
    given = ["--weights", "random", "--device", "cpu"]
    for image, layer, message in (
        ("text.jpg", "layer1", "text.jpg: is not an image"),
        ("a.png", "layer9", f"unknown layer of {MODEL} 'layer9'"),
        ("none.png", "layer1", "none.png is no image file, no run folder and no MODEL:LAYER"),
    ):
        code, out, err = command("reconstruct", image, f"{MODEL}:{layer}", *given)
        assert code == 1 and not out and message in err and "Traceback" not in err, err


@pytest.mark.long
def test_an_image_of_100_megapixels_is_one_like_any(command, tmp_path):
    Image.new("L", (10_000, 10_000), 200).save(tmp_path / "large.png")
    given = ["--weights", "random", "--device", "cpu", "--data", "procedural:12"]
    code, out, err = command("reconstruct", tmp_path / "large.png", f"{MODEL}:layer1", *given)
    assert code == 0 and "saved: " in out, err
