import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from afterimage import AfterimageError, load_data, train_runs
from afterimage.data import duplicates
from afterimage.data.duplicates import check_split, near_duplicates
from afterimage.data.images import ImageSet
from afterimage.models.reconstructor import MultiEncoder
from afterimage.models.weight_files import load_tensors
from afterimage.training.checkpoint import load_reconstructor
from afterimage.training.feature_loader import NonFiniteCheck, check_frozen, check_images
from children import MODEL, result, small_configs
from some_images import some_image

SOURCES = (f"{MODEL}:layer1", f"{MODEL}:layer2")


@pytest.fixture(scope="module")
def data(sample_images, cache):
    return load_data(small_configs(sample_images)[0].data, cache=cache)


def test_an_encoder_in_training_mode_stops_the_run(sample_images, cache, tmp_path, monkeypatch):
    encoders = MultiEncoder(SOURCES, weights="random", image_size=32)
    check_frozen(encoders)
    check_frozen(encoders.encoders[0])
    encoders.train()  # this is refused by the encoder itself
    check_frozen(encoders)
    norm = next(m for m in encoders.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.train()
    with pytest.raises(AfterimageError, match=r"encoder's encoders\.0\.model.* is in training mode"):
        check_frozen(encoders)
    norm.eval()
    norm.weight.requires_grad_(True)
    with pytest.raises(AfterimageError, match="requires gradients"):
        check_frozen(encoders)

    to = MultiEncoder.to
    monkeypatch.setattr(
        MultiEncoder, "to", lambda self, *a: [m.train() for m in to(self, *a).encoders[0].model.modules()]
    )
    with pytest.raises(AfterimageError, match="is in training mode"):
        train_runs(small_configs(sample_images)[0], tmp_path, cache=cache, accelerator="cpu")


@pytest.mark.parametrize(
    ("value", "message"),
    [(1.2, r"values from .* to 1\.2"), (math.nan, "values that are not finite")],
)
def test_a_image_out_of_range_stops_the_run_and_is_named(
    sample_images, cache, tmp_path, monkeypatch, data, value, message
):
    images = torch.rand(3, 3, 8, 8)
    check_images(images, "abc")
    images[1, 0, 0, 0] = value
    with pytest.raises(AfterimageError, match=f"image b holds {message}"):
        check_images(images, "abc")

    crops = ImageSet.crops

    def wrong(self, indices, **options):
        found = crops(self, indices, **options)
        found[torch.as_tensor(indices) == 3, 0, 0, 0] = value
        return found

    monkeypatch.setattr(ImageSet, "crops", wrong)
    with pytest.raises(AfterimageError, match=message) as error:
        train_runs(small_configs(sample_images)[0], tmp_path, cache=cache, accelerator="cpu")
    assert data.train.ids[3] in str(error.value)


def test_a_test_image_in_training_stops_the_run(sample_images, cache, tmp_path, data, monkeypatch):
    check_split(data)
    test = ImageSet(
        ["new", "same"], [data.test.content_digests[0], data.train.content_digests[5]], data.test.blob, 32
    )
    leaking = replace(data, test=test)
    with pytest.raises(AfterimageError, match=f"test image same is also training image {data.train.ids[5]}"):
        check_split(leaking)
    with pytest.raises(AfterimageError, match="is also validation image"):
        check_split(replace(data, test=data.validation))
    monkeypatch.setattr("afterimage.experiments.queue.load_data", lambda *_, **__: leaking)
    with pytest.raises(AfterimageError, match="would falsify all scores"):
        train_runs(small_configs(sample_images)[0], tmp_path, cache=cache, accelerator="cpu")


def test_the_watch_names_source_and_image():
    watch = NonFiniteCheck(["a:x", "a:y"])
    maps = [torch.rand(3, 4, 2, 2), torch.rand(3, 8, 1, 1)]
    watch.update(maps, ["one", "two", "three"])
    watch.check("run", [0, 1])
    maps[1][2, 5] = math.inf
    watch.update(maps, ["four", "five", "six"])
    watch.check("run", [0])
    with pytest.raises(AfterimageError, match="run: the features of a:y are not finite for image six"):
        watch.check("run", [0, 1])


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_nan_in_a_feature_map_ends_the_runs_on_it_and_no_other(
    sample_images, cache, tmp_path, monkeypatch, data, split
):
    configs = small_configs(sample_images, augment=False)
    good = train_runs(configs, tmp_path / "good", cache=cache, accelerator="cpu")
    forward, victim = MultiEncoder.forward, getattr(data, split)
    colour = victim.crops([0]).mean((2, 3))  # no other image has it

    def broken(self, images):
        features = forward(self, images)
        hit = (images.mean((2, 3)) - colour).abs().amax(1) < 1e-6
        for i, source in enumerate(self.sources):
            if source.endswith("layer1"):
                features[i] = torch.where(hit[:, None, None, None], math.nan, features[i])
        return features

    monkeypatch.setattr(MultiEncoder, "forward", broken)
    failures = []
    runs = train_runs(configs, tmp_path / "bad", cache=cache, accelerator="cpu", failures=failures)
    assert [run.state for run in runs] == ["done", "failed", "failed"] and len(failures) == 2
    for run, error in zip(runs[1:], failures, strict=True):
        assert run.name in str(error) and victim.ids[0] in str(error) and run.status["error"] == str(error)
    assert result(runs[0]) == result(good[0])


def test_near_duplicates_are_reported(tmp_path, cache):
    folder = tmp_path / "images"
    for name in ("train", "test"):
        (folder / name).mkdir(parents=True)
    for i in range(12):
        some_image(i, 80, 60).save(folder / "train" / f"{i:02}.png")
    some_image(40, 80, 60).save(folder / "test" / "new.png")
    some_image(3, 80, 60).save(folder / "test" / "again.jpg", quality=60)
    Image.fromarray(np.full((60, 80, 3), 90, np.uint8)).save(folder / "test" / "flat.png")
    config = small_configs(folder)[1]
    found = load_data(config.data, cache=cache)  # what the ten-line API trains on
    (note,) = near_duplicates(found)
    assert note in found.notes
    assert note.count(" and ") == 1  # one pair
    assert "again" in note and "03" in note and "new" not in note and "flat" not in note
    (run,) = train_runs(config, tmp_path / "runs", cache=cache, accelerator="cpu")
    assert run.state == "done" and note in run.result.notes


def test_the_same_images_are_compared_once(data, tmp_path, monkeypatch):
    leaking = replace(data, test=data.train)
    notes = near_duplicates(leaking, tmp_path)
    assert notes and notes == near_duplicates(leaking)
    monkeypatch.setattr(duplicates, "_hashes", lambda images: pytest.fail("compared again"))
    assert near_duplicates(leaking, tmp_path) == notes
    with pytest.raises(pytest.fail.Exception):
        near_duplicates(replace(data, test=data.validation), tmp_path)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"twins": []}', '{"pairs": 3}', '{"pairs": [[0, 1]]}', '{"pairs": [[2, 0, 0]]}']
    + [f'{{"pairs": [[0, {i}, {j}]]}}' for i, j in ((0, 999), (-1, 0), ('"a"', 0), ("0.0", 0))],
)
def test_a_damaged_file_of_near_duplicates_is_made_again(content, data, tmp_path, caplog):
    leaking = replace(data, test=data.validation)
    notes = near_duplicates(leaking, tmp_path)
    assert "validation image" in notes[0] and "training" not in notes[0]
    (file,) = (tmp_path / "near-duplicates").iterdir()
    whole = file.read_text()
    file.write_text(content)
    assert near_duplicates(leaking, tmp_path) == notes and file.read_text() == whole
    assert "cannot be read" in caplog.text and file.name in caplog.text


def test_smooth_images_of_other_colours_are_no_duplicates(data):
    assert near_duplicates(data) == []


def test_a_decoder_of_another_encoder_is_refused(sample_images, cache, tmp_path):
    """Two layers of the same shape: nothing but the file itself tells their decoders apart."""
    config = small_configs(sample_images)[1]
    runs = [
        train_runs(replace(config, sources=(source,)), tmp_path, cache=cache, accelerator="cpu")[0]
        for source in (f"{MODEL}:conv1", f"{MODEL}:act1")
    ]
    maps = [run.result.features[0] for run in runs]
    shapes = {(features.channels, features.height, features.width) for features in maps}
    assert len(shapes) == 1
    load_reconstructor(runs[0])
    shutil.copy(runs[1].file("decoder.safetensors"), runs[0].file("decoder.safetensors"))
    with pytest.raises(AfterimageError, match=r"was made for other features: its sources are .*act1"):
        load_reconstructor(runs[0])
    path = runs[1].file("decoder.safetensors")
    path.write_bytes(save(load_tensors(path)[0]))
    with pytest.raises(AfterimageError, match="does not say which features it was made for"):
        load_reconstructor(runs[1])
