"""Decoders that are trained on stored features: the same as with the encoder, and used like any other."""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import command_line
from afterimage.cli import main
from afterimage.config import (
    AfterimageError,
    DataConfig,
    DecoderConfig,
    FeaturesConfig,
    FusionConfig,
    RecipeConfig,
    RunConfig,
)
from afterimage.data.dataset import load_data
from afterimage.data.feature_store import open_store
from afterimage.data.store_files import index_path
from afterimage.evaluation.metrics import Metrics
from afterimage.experiments.extract import Extraction, extract
from afterimage.experiments.inference import evaluate_run, reconstruct_files
from afterimage.experiments.queue import train_runs
from afterimage.experiments.verify import verify_runs
from afterimage.runs.run import Run
from afterimage.training.checkpoint import load_reconstructor
from children import MODEL, small_images

LAYERS = (f"{MODEL}:layer1", f"{MODEL}:layer2")


@pytest.fixture(scope="module")
def data(sample_images):
    return DataConfig(f"folder:{sample_images}", resize=48, crop=32)


@pytest.fixture(scope="module")
def store(data, cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "f.safetensors"
    extract(Extraction(LAYERS, data, weights="random", shard_images=8), path, cache=cache, accelerator="cpu")
    return path


@pytest.fixture(scope="module")
def configs(data, store):
    """A closed form, gradient descent, and both behind a fusion; each from the encoder."""
    recipe = RecipeConfig(epochs=2, batch_size=4, augment=False)
    base = RunConfig(LAYERS[1:], "random", decoder=DecoderConfig("linear"), data=data, recipe=recipe)
    small = DecoderConfig("residual", options={"blocks": 1})
    return [
        base,
        replace(base, decoder=DecoderConfig("transposed")),
        replace(base, sources=LAYERS, fusion=FusionConfig("aligned"), decoder=small),
    ]


def stored(config, path):
    return replace(config, features=FeaturesConfig(str(path), open_store(path).digest))


@pytest.fixture(scope="module")
def trained(configs, store, cache, tmp_path_factory):
    """Runs with the encoder, and the same ones without."""
    root = tmp_path_factory.mktemp("runs")
    every = [*configs, *(stored(config, store) for config in configs)]
    runs = train_runs(every, root, cache=cache, accelerator="cpu")
    return runs[:3], runs[3:]


def test_a_decoder_is_the_one_that_the_encoder_gives(trained):
    for with_encoder, without in zip(*trained, strict=True):
        first, second = (load_file(run.file("decoder.safetensors")) for run in (with_encoder, without))
        for name in first:
            torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-4, msg=name)
        for before, now in zip(with_encoder.history, without.history, strict=True):
            for column in ("train_loss", "validation_loss"):
                assert now[column] == pytest.approx(before[column], rel=1e-4)
        one, other = with_encoder.result, without.result
        for metric in ("psnr", "ssim"):
            assert other.scores[metric].mean == pytest.approx(one.scores[metric].mean, rel=1e-3)
        assert (other.features, other.weights, other.sources) == (one.features, one.weights, one.sources)
        assert other.is_random and any("features come from" in note for note in other.notes)


def test_no_encoder_is_built(configs, store, cache, tmp_path, monkeypatch):
    def build(*arguments, **options):
        raise AssertionError("an encoder was built")

    monkeypatch.setattr("afterimage.models.encoders.encoder.trace", build)
    monkeypatch.setattr("afterimage.models.encoders.providers.open_network", build)
    (run,) = train_runs(stored(configs[0], store), tmp_path, cache=cache, accelerator="cpu")
    result = evaluate_run(run, Metrics("alex", size=32), cache=cache)
    assert [row["psnr"] for row in result.rows] == pytest.approx(
        [row["psnr"] for row in run.result.per_image], abs=1e-3
    )
    (verdict,) = verify_runs([run], cache=cache, accelerator="cpu")
    assert verdict.holds, verdict


def test_a_run_that_was_killed_goes_on(configs, store, cache, trained, tmp_path):
    config = stored(configs[1], store)

    class Killed(Exception):
        pass

    def killed(what, done, total, **_):
        if what == "training" and done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        train_runs(config, tmp_path, cache=cache, accelerator="cpu", progress=killed)
    (run,) = train_runs(config, tmp_path, cache=cache, accelerator="cpu")
    first, second = (load_file(r.file("decoder.safetensors")) for r in (trained[1][1], run))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_images_of_the_store_are_rebuilt_others_need_the_encoder(trained, sample_images, tmp_path):
    run = trained[1][0]
    metrics = Metrics("alex", size=32)
    (inside,) = reconstruct_files([sample_images / "03.png"], run, metrics)
    (expected,) = reconstruct_files([sample_images / "03.png"], trained[0][0], metrics)
    assert np.abs(inside.image.astype(int) - expected.image).max() <= 1
    other = small_images(tmp_path / "other", 21) / "20.png"
    with pytest.raises(AfterimageError, match=rf"no features of an image.*{MODEL}: --weights random"):
        reconstruct_files([other], run, metrics)
    (outside,) = reconstruct_files([other], run, metrics, weights="random")
    assert outside.scores["psnr"] > 5
    with pytest.raises(AfterimageError, match="was trained on weights"):
        reconstruct_files([other], run, metrics, weights="random-init")


def command(tmp_path, monkeypatch, capsys, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(cache))

    return partial(command_line.command, capsys)


@pytest.mark.usefixtures("no_figures")
def test_the_commands_take_a_store(store, data, cache, tmp_path, monkeypatch, capsys):
    run = command(tmp_path, monkeypatch, capsys, cache)
    images = ["--data", data.source, "--resize", 48, "--crop", 32, "--device", "cpu"]
    code, out, err = run("train", "--features", store, "layer2", "--decoders", "linear", *images)
    assert code == 0, err
    assert "linear" in out and "features come from" in out
    (path,) = (tmp_path / "runs").iterdir()
    code, _, err = run("controls", path, "--device", "cpu")
    assert code == 1 and "Other images need the encoder" in err
    assert Run(path).file("rate_distortion.json").exists() and not Run(path).file("controls.json").exists()
    code, _, err = run("controls", path, "--device", "cpu", "--weights", "random")
    assert code == 0 and Run(path).file("controls.json").exists(), err
    code, out, err = run("invert", path, "--max-images", 1, "--steps", 2, "--held-out", 0, "--refine-only",
                         "--estimate-images", 0, "--device", "cpu", "--output-dir", "inv")  # fmt: skip
    assert code == 0 and "refined" in out, err
    code, out, err = run("report", "runs", "--output-dir", "report")
    assert code == 0 and "features come from" in (tmp_path / "report" / "report.md").read_text(), err
    for wrong, message in (
        (["layer9"], "unknown layer of .*'layer9'; did you mean 'layer"),
        (["--weights", "random"], "leave out --weights"),
        (["layer1", "--fusion", "sum"], "name two or more"),
    ):
        code, _, err = run("train", "--features", store, *wrong, *images)
        assert code == 1
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(" ".join(err.split()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"crop": 24},
            "of 32 pixels, resized to 48 before, but those of this run have 24, .* --size 32 --resize 48",
        ),
        ({"resize": 40}, "resized to 48 before, but those of this run have 32, resized to 40"),
    ],
)
def test_images_that_were_prepared_otherwise(change, message, configs, store, cache, tmp_path):
    config = stored(configs[0], store)
    with pytest.raises(AfterimageError, match=message):
        train_runs(replace(config, data=replace(config.data, **change)), tmp_path, cache=cache)


def test_images_and_ids_that_do_not_match(configs, data, cache, sample_images, store, tmp_path):
    folder = shutil.copytree(sample_images, tmp_path / "images")
    config = stored(configs[0], store)
    moved = replace(config, data=replace(data, source=f"folder:{folder}"))
    (folder / "03.png").unlink()
    (run,) = train_runs(moved, tmp_path, cache=cache, accelerator="cpu")
    assert any("1 ids that are no images of this run, for example 03.png" in n for n in run.result.notes)
    shutil.copy(sample_images / "03.png", folder / "new.png")
    moved = replace(moved, seed=1)
    with pytest.raises(AfterimageError, match=r"no features of 1 of the .* images, for example new\.png"):
        train_runs(moved, tmp_path, cache=cache, accelerator="cpu")
    (folder / "new.png").rename(folder / "03.png")
    small = small_images(tmp_path / "other", 21)
    shutil.copy(small / "20.png", folder / "03.png")
    with pytest.raises(AfterimageError, match=r"features of 03\.png are of other pixels than the \w+ image"):
        train_runs(moved, tmp_path, cache=cache, accelerator="cpu")


def test_another_store_in_its_place(configs, data, store, cache, tmp_path):
    copy = shutil.copytree(store.parent, tmp_path / "store") / store.name
    (run,) = train_runs(stored(configs[0], copy), tmp_path, cache=cache, accelerator="cpu")
    for file in copy.parent.iterdir():
        file.unlink()
    with pytest.raises(AfterimageError, match=r"cannot read .*f\.safetensors"):
        load_reconstructor(run)
    (verdict,) = verify_runs([run], cache=cache, accelerator="cpu")
    assert "cannot read" in verdict.missing[0]
    extract(Extraction(LAYERS, data, weights="random", shard_images=9), copy, cache=cache, accelerator="cpu")
    with pytest.raises(AfterimageError, match="not the store that the run was made for: digest"):
        load_reconstructor(run)
    assert index_path(copy).exists()


@pytest.mark.parametrize("named", [True, False])
def test_anybodys_file(named, configs, data, cache, tmp_path, capsys):
    """Maps and vectors of whatever made them, with ids or found by the images' pixels alone."""
    found = load_data(data, cache=cache)
    parts = [found.train, found.validation, found.test]
    images = torch.cat([part.crops(torch.arange(len(part))) for part in parts])
    ids = [one for part in parts for one in part.ids]
    order = np.random.default_rng(0).permutation(len(ids))
    images, ids = images[order], [ids[i] for i in order]
    arrays = {
        "images": (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy(),
        "features.small": torch.nn.functional.avg_pool2d(images, 4).numpy(),
        "features.vector": images.mean((2, 3)).numpy(),
    }
    np.savez(tmp_path / "own.npz", **arrays, **({"ids": np.array(ids)} if named else {}))
    store = open_store(tmp_path / "own.npz")
    config = replace(
        configs[0],
        sources=("own.npz:small",),
        weights="",
        features=FeaturesConfig(str(store.path), store.digest),
    )
    maps, vectors = train_runs(
        [config, replace(config, sources=("own.npz:vector",), decoder=DecoderConfig("transposed"))],
        tmp_path, cache=cache, accelerator="cpu",
    )  # fmt: skip
    assert maps.result.scores["psnr"].mean > 30
    assert vectors.result.features[0].shape == (3, 1, 1)
    assert evaluate_run(maps, Metrics("alex", size=32), cache=cache).rows
    with pytest.raises(SystemExit):
        main(["invert", str(maps.path), "--max-images", "1", "--output-dir", str(tmp_path / "inv")])
    assert "stored features whose encoder is not recorded" in " ".join(capsys.readouterr().err.split())
