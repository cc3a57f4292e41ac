"""A finished run that is asked for again: what has changed since is said, and a missing LPIPS is measured."""

import logging
from dataclasses import replace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import squeezenet1_1

from afterimage import Metrics, train_runs
from afterimage.evaluation.baselines import run_baselines
from afterimage.experiments import inference
from afterimage.experiments.inference import evaluate_run
from afterimage.runs.run import Run
from children import MODEL, small_configs, small_images


@pytest.fixture
def place(tmp_path):
    """Images, and weights of an encoder and of LPIPS that nobody has looked for yet."""
    small_images(tmp_path / "images")
    save_encoder(tmp_path, seed=0)
    (tmp_path / "weights").mkdir()
    return tmp_path


def save_encoder(place, seed):
    torch.manual_seed(seed)
    save_file(timm.create_model(MODEL).state_dict(), place / "encoder.safetensors")


def save_squeezenet(place, monkeypatch):
    torch.manual_seed(0)
    save_file(squeezenet1_1().state_dict(), place / "weights" / "squeezenet1_1.torchvision.safetensors")
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(place / "weights"))


def trained(place, caplog, lpips="alex") -> tuple[Run, list[str]]:
    """Ask for a linear decoder; return its run, and the warnings about it."""
    config = replace(small_configs(place / "images", str(place / "encoder.safetensors"))[1], lpips=lpips)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "afterimage"):
        (run,) = train_runs(config, place / "runs", cache=place / "cache", accelerator="cpu")
    return run, [record.getMessage() for record in caplog.records if run.name in record.getMessage()]


def test_a_finished_run_of_the_same_images_and_weights_is_left_alone(place, caplog):
    first, told = trained(place, caplog)
    before = first.result
    assert told == []
    again, told = trained(place, caplog)
    assert told == [] and again.result == before


def test_other_images_in_the_same_folder_are_told(place, caplog):
    run, _ = trained(place, caplog)
    before = run.result
    Image.new("RGB", (60, 48), "red").save(place / "images" / "more.png")
    _, (told,) = trained(place, caplog)
    assert f"was made from other images (digest {before.data.digest[:12]} then" in told
    assert "remove its folder" in told and run.result == before


def test_other_weights_in_the_same_file_are_told(place, caplog):
    run, _ = trained(place, caplog)
    before = run.result
    save_encoder(place, seed=1)
    _, (told,) = trained(place, caplog)
    assert f"was made from other weights of {MODEL} (digest {before.weights[0].sha256[:12]} then" in told
    assert run.result == before


def test_images_that_are_gone_are_told_and_the_result_stays(place, caplog):
    run, _ = trained(place, caplog)
    before = run.result
    (place / "images").rename(place / "away")
    _, (told,) = trained(place, caplog)
    assert "is not known: cannot read the folder" in told and run.result == before


def test_an_lpips_that_was_unavailable_is_measured_once_it_is_there(place, caplog, monkeypatch):
    run, _ = trained(place, caplog)
    before = run.result
    assert before.scores["lpips"] is None
    save_squeezenet(place, monkeypatch)
    _, told = trained(place, caplog, "squeeze")
    after = run.result
    assert told == [] and (after.lpips.net, after.lpips.available) == ("squeeze", True)
    assert run.config.lpips == "squeeze"
    fresh = evaluate_run(run, Metrics("squeeze", size=32), cache=place / "cache").rows
    assert [row["lpips"] for row in after.per_image] == pytest.approx(
        [row["lpips"] for row in fresh], rel=1e-4
    )
    for old, new in zip(before.per_image, after.per_image, strict=True):
        assert old == {**new, "lpips": None}
    assert after.scores["psnr"] == before.scores["psnr"] and after.training == before.training


def test_baselines_of_other_images_are_measured_again(place):
    data = small_configs(place / "images")[0].data
    options = {"names": ["mean"], "cache": place / "cache"}
    (run,) = run_baselines(data, place / "runs", **options)
    before, written = run.result, run.file("summary.json").stat().st_mtime_ns
    run_baselines(data, place / "runs", **options)
    assert run.file("summary.json").stat().st_mtime_ns == written
    for i in range(9):
        Image.new("RGB", (60, 48), (20 * i, 9, 99)).save(place / "images" / f"more{i}.png")
    run_baselines(data, place / "runs", **options)
    assert run.result.data.test_digest != before.data.test_digest
    assert run.result.data.test_images == len(run.result.per_image) > before.data.test_images


def test_images_that_runs_share_are_looked_up_once(place, monkeypatch):
    configs = small_configs(place / "images", str(place / "encoder.safetensors"), epochs=1)[1:]
    options = {"cache": place / "cache", "accelerator": "cpu"}
    train_runs(configs, place / "runs", **options)
    asked, current = [], inference.current_digests

    def counted(data, **given):
        asked.append(data)
        return current(data, **given)

    monkeypatch.setattr(inference, "current_digests", counted)
    train_runs(configs, place / "runs", **options)
    assert len(configs) == 2 and asked == [configs[0].data]
