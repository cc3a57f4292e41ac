"""Modules of one's own as decoders: the contract, what is recorded of them, and one message for each thing wrong."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from afterimage import Encoder, RecipeConfig, Reconstructor, train
from afterimage.cli import main
from afterimage.config import AfterimageError, DataConfig, DecoderConfig, RunConfig
from afterimage.data.dataset import load_data
from afterimage.evaluation.metrics import Metrics
from afterimage.experiments.inference import evaluate_run
from afterimage.experiments.queue import train_runs
from afterimage.models.decoders import create_decoder
from afterimage.models.reconstructor import FeatureDecoder
from afterimage.runs.run import Run
from afterimage.training import trainer
from afterimage.training.checkpoint import load_reconstructor
from decoder_contract import DecoderContract, batch, spec

SOURCE = "test_vit.r160_in1k:block1"
DATA = DataConfig("procedural:10", test="procedural:3", resize=96, crop=96)
RECIPE = RecipeConfig(epochs=2, batch_size=4)


class Own(nn.Module):
    def __init__(self, specs, image_size, width=8):
        super().__init__()
        self.size = image_size
        self.layers = nn.Sequential(
            nn.Conv2d(specs[0].channels, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 1)
        )

    def forward(self, features):
        return F.interpolate(self.layers(features), self.size, mode="bilinear")


class TestOwn(DecoderContract):
    name = f"python/{__file__}:Own"


def frozen(specs, image_size):
    return Own(specs, image_size).requires_grad_(False)


class Signed(nn.Module):
    image_range = (-1, 1)

    def __init__(self, specs, image_size):
        super().__init__()
        self.size = image_size

    def forward(self, features):
        return 0 * features[:, :1, :1, :1] - torch.ones(len(features), 3, *self.size) / 2


class Unstated(Signed):
    image_range = (0, 1)


class Dropping(Own):
    def forward(self, features):
        return F.dropout(super().forward(features), 0.5, self.training)


class Wrong(nn.Module):
    def __init__(self, specs, image_size, kind=""):
        super().__init__()
        self.kind, self.size = kind, image_size
        if kind == "range":
            self.image_range = (1, 0)

    def forward(self, features):
        images = torch.zeros(len(features), 3, *self.size)
        match self.kind:
            case "nan":
                return images / 0
            case "shape":
                return images[:, :1]
            case "dict":
                return {"sample": images}
            case "fails":
                return nn.Linear(5, 4)(features)
        return images


def no_module(specs, image_size):
    return lambda features: features


def other_arguments(channels):
    return nn.Identity()


def build(factory, **options):
    return create_decoder(f"python/{__file__}:{factory}", [spec(4, 3, 3)], 12, seed=0, **options)


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("Wrong", {"kind": "nan"}, r"Wrong returns values that are not finite for features \(2, 4, 3, 3\)"),
        (
            "Wrong",
            {"kind": "shape"},
            r"must return images \(2, 3, 12, 12\) of floats .* got \(2, 1, 12, 12\)",
        ),
        ("Wrong", {"kind": "dict"}, r"must return images \(2, 3, 12, 12\) of floats .* got dict"),
        ("Wrong", {"kind": "fails"}, r"fails on features \(2, 4, 3, 3\) of test:layer: RuntimeError"),
        ("Wrong", {"kind": "range"}, r"image_range of .* must be two numbers.* got \(1, 0\)"),
        ("Wrong", {"depth": 3}, r"Wrong failed: TypeError: .* unexpected keyword argument 'depth'"),
        ("no_module", {}, "must return a torch.nn.Module, got function"),
        (
            "other_arguments",
            {},
            r"TypeError: other_arguments\(\) takes 1 positional argument but 2 were given",
        ),
        ("ownn", {}, "unknown factory .* 'ownn'"),
        ("Own", {"parameters": 1000}, "one size only"),
    ],
)
def test_what_is_wrong_is_one_message(factory, options, message):
    with pytest.raises(AfterimageError, match=message):
        build(factory, **options)


def test_an_unknown_decoder_names_the_ways_to_write_one_of_ones_own():
    with pytest.raises(AfterimageError, match=r"python/FILE.py:factory"):
        create_decoder("pyton/x.py:f", [spec(4, 3, 3)], 12)
    with pytest.raises(AfterimageError, match="must be written"):
        create_decoder("python/x", [spec(4, 3, 3)], 12)


def test_a_stated_range_is_mapped_to_images():
    assert torch.allclose(build("Signed")([batch(2, 4, 3, 3)]), torch.tensor(0.25))


def test_what_a_module_draws_depends_on_the_step_alone():
    decoder, features = build("Dropping").train(), [batch(2, 4, 3, 3)]
    before = torch.get_rng_state()

    def step(number):
        decoder.feature_crops(torch.Generator().manual_seed(number))
        return decoder(features)

    first, other, again = step(1), step(2), step(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


class Constant(Own):
    """Holds a tensor that torch does not know of."""

    def __init__(self, specs, image_size):
        super().__init__(specs, image_size)
        self.offset = torch.full((1, 3, 1, 1), 0.5)

    def forward(self, features):
        return super().forward(features) + self.offset


def test_its_multiply_adds_are_counted_whatever_it_holds():
    counted = [FeatureDecoder(build(name)).macs([spec(4, 3, 3)]) for name in ("Constant", "Own")]
    assert counted[0] == counted[1] == 9 * (9 * 4 * 8 + 8 * 3)


def test_a_frozen_module_stays_as_it_is_and_in_evaluation_mode():
    decoder = build("frozen")
    assert not decoder.trainable and not decoder.train().training and not decoder.module.training
    assert build("Own").train().module.training


def test_values_that_were_clamped_are_told_if_they_are_many():
    """A module whose images are in [-1, 1], or in [0, 255], and which does not say so."""
    features = [torch.randn(2, 4, 3, 3)]
    for name, told in (("Signed", 0), ("Unstated", 1)):
        decoder = build(name).eval()
        decoder(features)
        assert len(decoder.notes) == told
    assert decoder.notes[0].startswith("100% of the values that ") and "now (0, 1)" not in decoder.notes[0]
    assert "image_range, which is (0, 1) now" in decoder.notes[0]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n\n"
        "@dataclass\nclass Settings:\n    width: int = 4\n\n"
        "def mine(specs, image_size):\n    c = specs[0].channels\n"
        "    return nn.Sequential(nn.Conv2d(c, 3, Settings().width - 3), nn.Upsample(image_size))\n\n"
        "def fixed(specs, image_size):\n    return mine(specs, image_size).requires_grad_(False)\n"
    )
    return path


@pytest.fixture(scope="module")
def runs(file, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    configs = [
        RunConfig(
            (SOURCE,),
            "random",
            decoder=DecoderConfig(f"python/{file}:{name}"),
            data=DATA,
            recipe=RECIPE,
            lpips="squeeze",
        )
        for name in ("mine", "fixed")
    ]
    return train_runs(configs, root, accelerator="cpu")


def test_it_is_resumed_with_the_same_bits(tmp_path, monkeypatch):
    config = RunConfig(
        (SOURCE,), "random", decoder=DecoderConfig(f"python/{__file__}:Dropping"), data=DATA, recipe=RECIPE
    )
    options = {"accelerator": "cpu", "checkpoint_seconds": 0.0}
    (whole,) = train_runs([config], tmp_path / "whole", **options)
    step, steps = trainer.training_step, []

    def stopping(*arguments):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(step(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_runs([config], tmp_path / "stopped", **options)
    (again,) = train_runs([config], tmp_path / "stopped", **options)
    decoders = [run.file("decoder.safetensors").read_bytes() for run in (whole, again)]
    assert decoders[0] == decoders[1] and len(steps) == 3


def test_it_is_trained_and_its_code_is_recorded(runs):
    trained, fixed = (run.result for run in runs)
    assert trained.training.epochs == 2 and len(runs[0].history) == 2
    assert any("has the SHA-256" in note for note in trained.notes)
    assert fixed.training.epochs == 0 and fixed.training.seconds == 0
    assert any("trained elsewhere" in note for note in fixed.notes)


def test_a_trained_run_is_the_same_through_the_api(runs, file):
    encoder = Encoder(SOURCE, weights="random", image_size=96, seed=42)
    decoder = create_decoder(f"python/{file}:mine", encoder.specs, 96, seed=42)
    reconstructor = Reconstructor(encoder, decoder)
    history = train(reconstructor, load_data(DATA), RECIPE, accelerator="cpu")
    assert [row["train_loss"] for row in history] == [row["train_loss"] for row in runs[0].history]


def test_code_that_changed_is_not_taken_for_what_was_trained(runs, file):
    scores = evaluate_run(runs[0], Metrics("squeeze", size=96)).rows
    assert [row["psnr"] for row in scores] == pytest.approx(
        list(runs[0].result.values("psnr").values()), abs=1e-4
    )
    before = file.read_text()
    try:
        file.write_text(before + "\n# changed\n")
        with pytest.raises(AfterimageError, match=r"made by other code: .* had the SHA-256"):
            load_reconstructor(Run.open(runs[0].path))
    finally:
        file.write_text(before)


def test_commands_take_it(runs, file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(file.parent)
    images = ["--data", "procedural:10", "--test", "procedural:3", "--resize", "96", "--crop", "96"]
    options = ["--weights", "random", "--lpips", "squeeze", "--device", "cpu", "--output-dir", str(tmp_path)]
    main(["train", SOURCE, "--decoder", "python/mine.py:fixed", *images, *options])
    (run,) = (Run.open(path) for path in tmp_path.iterdir() if (path / "summary.json").exists())
    printed = capsys.readouterr()
    assert run.result.scores == runs[1].result.scores
    assert "trained elsewhere" in printed.err and "elsewhere" in printed.out
    main(["controls", str(run.path), "--device", "cpu", "--only", "controls"])
    assert run.file("controls.json").exists()
    plan = tmp_path / "study.toml"
    plan.write_text(
        f'sources = ["{SOURCE}"]\nweights = "random"\n'
        '[[decoders]]\nname = "python/mine.py:mine"\noptions = { width = 5 }\n'
        '[data]\nsource = "procedural:10"\nresize = 96\ncrop = 96\n'
    )
    with pytest.raises(SystemExit):
        main(["study", str(plan), "--output-dir", str(tmp_path / "study"), "--device", "cpu"])
    assert "mine() got an unexpected keyword argument 'width'" in capsys.readouterr().err
