"""Images that are not square, through every command, and encoders at their own size."""

import json

import pytest
import torch

from afterimage.cli import main
from afterimage.config import AfterimageError, DataConfig
from afterimage.config.study import StudyConfig
from afterimage.experiments.study import expand_study
from afterimage.models.encoders.encoder import Encoder
from afterimage.runs.files import read_csv
from afterimage.runs.run import scan

SIZE = ("--size", "64x96", "--resize", "64")


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A small vision transformer of transformers, for images of 32 pixels, in a folder."""
    transformers = pytest.importorskip("transformers", reason="pip install 'afterimage[transformers]'")
    folder = tmp_path_factory.mktemp("tower")
    transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8
    ).save_pretrained(folder)
    prepared = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return f"transformers/{folder}"


@pytest.mark.parametrize(
    ("model", "layer", "decoder"),
    [
        ("test_resnet.r160_in1k", "layer1", "linear"),
        pytest.param("test_vit.r160_in1k", "block0", "residual", marks=pytest.mark.long),
        ("tower", "block0", "attention"),
    ],
)
def test_images_that_are_not_square_go_through_every_command(
    tmp_path, monkeypatch, capsys, request, model, layer, decoder
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(tmp_path / "cache"))
    if decoder != "residual":
        request.getfixturevalue("no_figures")
    source = f"{request.getfixturevalue('tower') if model == 'tower' else model}:{layer}"
    shared = ("--weights", "random", "--device", "cpu")
    data = ("--data", "procedural:20", "--limit-train", "8", *SIZE)
    main(["train", source, "--decoders", decoder, *data, *shared, "--epochs", "1"])
    (run,) = scan("runs")
    height, width = run.result.features[0].height, run.result.features[0].width
    assert width * 2 == height * 3 and (run.result.data.crop, run.config.data.crop) == ("64x96", "64x96")
    assert run.images[0][1].exists()
    main(["evaluate", str(run.path), "--output", "scores.csv", "--device", "cpu"])
    stored, again = run.result.per_image, read_csv("scores.csv")
    assert [row["psnr"] for row in again] == pytest.approx([row["psnr"] for row in stored], abs=1e-3)
    main(["invert", str(run.path), "--steps", "2", "--held-out", "0", "--estimate-images", "0", "--max-images", "1",
          "--device", "cpu", "--output-dir", "runs/bound"])  # fmt: skip
    main(["reconstruct", str(run.images[0][1]), str(run.path), "--device", "cpu"])
    main(["controls", str(run.path), "--device", "cpu"])
    main(["report", "runs", "--output-dir", "report"])
    assert (tmp_path / "report" / "index.html").exists()


def test_fourier_inversion_from_grey_at_a_size_that_is_not_square(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(tmp_path / "cache"))
    for method in ("fourier", "pixels"):
        main(["invert", "test_resnet.r160_in1k:conv1", "--data", "procedural:4", "--max-images", "1", "--size", "48x64",
              "--steps", "2", "--weights", "random", "--method", method, "--device", "cpu"])  # fmt: skip
    done = [run for run in scan("runs/inversion") if run.state == "done"]
    assert [run.result.data.crop for run in done] == ["48x64"] * 2
    with pytest.raises(SystemExit):
        main(["invert", str(done[0].path), "--size", "64"])
    assert "leave out --size" in capsys.readouterr().err


def test_a_study_at_each_encoders_own_size():
    study = StudyConfig(
        sources=("test_resnet.r160_in1k:layer1", "resnet18.tv_in1k:layer*"), data=DataConfig(crop="native")
    )
    sizes = {config.sources[0]: (config.data.crop, config.data.resize) for config in expand_study(study)}
    assert sizes == {
        "test_resnet.r160_in1k:layer1": (160, 256),
        **{f"resnet18.tv_in1k:layer{n}": (224, 256) for n in (1, 2, 3, 4)},
    }


def test_a_size_that_a_network_cannot_run_on_is_one_message(tower):
    with pytest.raises(AfterimageError, match=r"cannot run on 4x4 images .*; it can on 32x32"):
        Encoder(f"{tower}:block0", weights="random", image_size=4)
    with pytest.raises(AfterimageError, match=r"square images only.*; it can on 224x224"):
        Encoder("torchvision/vit_b_32:block0", weights="random", image_size=(224, 256))


def test_fixed_windows_take_images_that_are_not_square():
    encoder = Encoder("swin_tiny_patch4_window7_224:layers.0", weights="random", image_size=(64, 96))
    assert encoder(torch.rand(1, 3, 64, 96))[0].shape == (1, 96, 16, 24)
