"""Runs in bfloat16 from the first step to their last score, beside the same runs in float32."""

import math

import pytest

from afterimage import (
    DataConfig,
    DecoderConfig,
    RecipeConfig,
    RunConfig,
    load_data,
    train_runs,
)
from afterimage.analysis.controls.run import run_controls
from afterimage.config import AfterimageError, FusionConfig
from afterimage.evaluation.evaluate import evaluate
from afterimage.evaluation.metrics import Metrics
from afterimage.experiments.verify import verify_runs
from afterimage.training.checkpoint import load_reconstructor
from children import small_images

MODEL = "test_resnet.r160_in1k"
RUNS = [
    ((f"{MODEL}:layer1",), None, "linear"),
    ((f"{MODEL}:layer1",), None, "transposed"),
    ((f"{MODEL}:layer1",), None, "attention"),
    ((f"{MODEL}:layer2",), None, "wavelet"),
    ((f"{MODEL}:layer2",), None, "frequency"),
    ((f"{MODEL}:layer2",), None, "residual", {"kernel": 3}),
    ((f"{MODEL}:layer1", f"{MODEL}:layer2"), FusionConfig("attention"), "transposed"),
    ((f"{MODEL}:layer1", f"{MODEL}:layer2"), FusionConfig("concat", size=3), "transposed"),
    ((f"{MODEL}:layer1", f"{MODEL}:layer2"), FusionConfig("aligned"), "linear"),
    ((f"{MODEL}:layer1", f"{MODEL}:layer2"), FusionConfig("stacked"), "linear"),
]


def configs(folder, precision):
    return [
        RunConfig(
            sources,
            weights="random-init",  # harder features part by more
            fusion=fusion,
            decoder=DecoderConfig(decoder, options=dict(*options)),
            data=DataConfig(f"folder:{folder}", resize=48, crop=32),
            recipe=RecipeConfig(epochs=2, batch_size=4, precision=precision),
        )
        for sources, fusion, decoder, *options in RUNS
    ]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    sample_images = small_images(folder / "images")
    both = [
        train_runs(
            configs(sample_images, precision), folder / precision, cache=folder / "cache", accelerator="cpu"
        )
        for precision in ("32-true", "bf16-mixed")
    ]
    return folder, list(zip(*both, strict=True))


def test_bfloat16_moves_no_score_by_much(done):
    _, pairs = done
    assert len(pairs) == len(RUNS)
    for exact, mixed in pairs:
        assert exact.state == mixed.state == "done"
        assert mixed.config.recipe.precision == "bf16-mixed"
        assert exact.result.training.macs == mixed.result.training.macs
        one, other = (run.result.scores["psnr"].mean for run in (exact, mixed))
        assert math.isclose(one, other, abs_tol=0.15), (exact.name, one, other)
        assert one != other, "it did compute in another format"


def test_half_precision_is_refused_on_a_cpu(done):
    """Where Fabric would take bfloat16 instead."""
    folder, _ = done
    with pytest.raises(AfterimageError, match="16-mixed needs a GPU"):
        train_runs(
            configs(folder / "images", "16-mixed")[:1],
            folder / "half",
            cache=folder / "cache",
            accelerator="cpu",
        )


def test_its_scores_hold_when_taken_again(done):
    folder, pairs = done
    for one in verify_runs([mixed for _, mixed in pairs], cache=folder / "cache", accelerator="cpu"):
        assert one.holds and not one.changes


def test_what_is_measured_afterwards_finds_the_same_decoder(done):
    """Controls, and a reconstructor opened from a folder, compute in float32: what that changes is rounding."""
    folder, pairs = done
    for _, mixed in pairs:
        opened = load_reconstructor(mixed)
        data = load_data(mixed.config.data, cache=folder / "cache")
        rows = evaluate(opened, data.test, Metrics()).rows
        expected = [float(row["psnr"]) for row in mixed.result.per_image]
        assert [row["psnr"] for row in rows] == pytest.approx(expected, abs=0.1), mixed.name
    chosen = [mixed for _, mixed in pairs if len(mixed.config.sources) == 1]
    assert run_controls(chosen, cache=folder / "cache", accelerator="cpu") == []
