"""Features on disk: what is extracted is what the encoder gives, whatever interrupts it, and is audited."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from afterimage.cli import main
from afterimage.config import AfterimageError, DataConfig
from afterimage.data.dataset import load_data
from afterimage.data.feature_store import open_store
from afterimage.data.store_files import index_path, read_index
from afterimage.experiments.extract import Extraction, extract, plan_extraction
from afterimage.models.reconstructor import MultiEncoder
from afterimage.runs.files import read_json, sha256, write_json
from children import MODEL, small_images

LAYERS = (f"{MODEL}:layer1", f"{MODEL}:layer2", f"{MODEL}:pooled")
SUFFIXES = [".safetensors", ".npz", ".parquet"]


@pytest.fixture(scope="module")
def wanted(sample_images):
    data = DataConfig(f"folder:{sample_images}", resize=48, crop=32)
    return Extraction(LAYERS, data, weights="random", shard_images=7, batch_size=4)


@pytest.fixture(scope="module")
def whole(wanted, cache, tmp_path_factory):
    """A store of three shards, which tests copy."""
    path = tmp_path_factory.mktemp("store") / "f.safetensors"
    extract(wanted, path, cache=cache, accelerator="cpu")
    return path


@pytest.fixture
def store(whole, tmp_path):
    return shutil.copytree(whole.parent, tmp_path / "store") / whole.name


def shards(path):
    return [path.with_name(shard.file) for shard in read_index(path).shards]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_store_holds_what_the_encoder_gives(suffix, dtype, wanted, cache, tmp_path):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow")
    path, wanted = tmp_path / f"f{suffix}", replace(wanted, dtype=dtype, weights="random-init")
    if dtype == "bfloat16" and suffix != ".safetensors":
        with pytest.raises(AfterimageError, match=r"bfloat16 goes into \.safetensors"):
            extract(wanted, path, cache=cache, accelerator="cpu")
        return
    facts = extract(wanted, path, cache=cache, accelerator="cpu")
    found, data = open_store(path), load_data(wanted.data, cache=cache)
    parts = (data.train, data.validation, data.test)
    images = torch.cat([part.crops(torch.arange(len(part))) for part in parts])
    encoders = MultiEncoder(LAYERS, weights="random-init", image_size=32, seed=42)
    assert found.ids == [one for part in parts for one in part.ids] and found.facts == facts
    assert np.array_equal(found.images(range(20)), (images * 255).round().to(torch.uint8).numpy())
    assert tuple(found.specs.values()) == encoders.specs
    assert facts.data_digest == data.digest and facts.used == encoders.weights_of(encoders.sources)[0]
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    order = [19, 0, 7, 6, 13, 0]  # shards of seven
    for layer, maps in zip(found.specs, encoders(images[order]), strict=True):
        torch.testing.assert_close(found.features(layer, order), maps, rtol=tolerance, atol=1e-6)


def test_what_is_said_beforehand_is_what_is_written(wanted, cache, whole):
    plan = plan_extraction(wanted, whole, cache=cache)
    written = 0
    for file in shards(whole):
        with safe_open(file, "pt") as tensors:
            written += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    assert (plan.images, plan.shards, plan.pixels + sum(plan.features)) == (20, 3, written)


def test_a_split_alone(wanted, cache, tmp_path):
    extract(replace(wanted, split="test"), tmp_path / "f.npz", cache=cache, accelerator="cpu")
    assert open_store(tmp_path / "f.npz").ids == load_data(wanted.data, cache=cache).test.ids


class Killed(Exception):
    pass


def test_an_extraction_goes_on_with_the_shards_that_are_whole(wanted, cache, whole, store):
    before = {file.name: sha256(file) for file in [*shards(whole), index_path(whole)]}
    first, second, third = shards(store)
    second.write_bytes(second.read_bytes()[:-1])
    third.unlink()
    kept = first.stat().st_mtime_ns

    def killed(what, done, total, **_):
        if what == "extracting" and done > 14:
            raise Killed

    with pytest.raises(Killed):
        extract(wanted, store, cache=cache, accelerator="cpu", progress=killed)
    with pytest.raises(AfterimageError, match=r"not finished: it holds 14 of 20 images; the same extract"):
        open_store(store)
    half_written = store.with_name(".f-00003-of-00003.safetensors.x.part")
    half_written.write_bytes(b"")
    others = [store.with_name(f".{name}.x.part") for name in ("f2.safetensors", "f.safetensors.npz")]
    for other in others:  # another extraction is writing them
        other.touch()
    extract(wanted, store, cache=cache, accelerator="cpu")
    for other in others:
        other.unlink()
    assert {file.name: sha256(file) for file in store.parent.iterdir()} == before
    assert first.stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": "float16"}, "other dtype: choose"),
        ({"sources": LAYERS[:1]}, "other features: choose"),
        ({"weights": "random-init"}, "other weights: choose"),
        ({"split": "test"}, "other split, images, shard_images: choose|other split, images: choose"),
        ({"shard_images": 8}, "other shard_images: choose"),
    ],
)
def test_another_extraction_in_its_place_is_refused(change, named, wanted, cache, store):
    with pytest.raises(AfterimageError, match=named):
        extract(replace(wanted, **change), store, cache=cache, accelerator="cpu")
    open_store(store)


def test_a_file_of_anything_else_is_not_overwritten(wanted, cache, tmp_path):
    (tmp_path / "f.npz").write_bytes(b"mine")
    with pytest.raises(AfterimageError, match=r"f\.npz exists, and no extraction has written it"):
        extract(wanted, tmp_path / "f.npz", cache=cache, accelerator="cpu")
    assert (tmp_path / "f.npz").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ()}, "at least one MODEL:LAYER"),
        ({"sources": (LAYERS[0], "test_vit.r160_in1k:block0")}, "features of one encoder, got test_resnet"),
        ({"split": "training"}, r"unknown split 'training'.*train"),
        ({"dtype": "float8"}, r"unknown dtype 'float8'.*bfloat16"),
        ({"shard_images": 0}, "shard_images must lie"),
    ],
)
def test_settings_that_mean_nothing(settings, message, wanted):
    with pytest.raises(AfterimageError, match=message):
        replace(wanted, **settings)


def test_an_id_of_two_images_is_named(wanted, cache, tmp_path):
    other = small_images(tmp_path / "other", 3)
    for file in other.iterdir():
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    two = replace(wanted, data=replace(wanted.data, test=f"folder:{other}"))
    with pytest.raises(AfterimageError, match=r"ids name two images, for example 0.\.png, once from"):
        extract(two, tmp_path / "f.npz", cache=cache, accelerator="cpu")


LARGE = """
from torch import nn

class Large(nn.Module):
    mean, std = (0, 0, 0), (1, 1, 1)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)

    def forward(self, images):
        return self.stem(images) * 1e7
"""


def test_values_beyond_float16_are_named(wanted, cache, tmp_path):
    (tmp_path / "large.py").write_text(LARGE)
    own = replace(wanted, sources=(f"python/{tmp_path}/large.py:Large:output",), dtype="float16")
    with pytest.raises(AfterimageError, match=r"beyond float16's largest number for image \d\d\.png"):
        extract(own, tmp_path / "f.npz", cache=cache, accelerator="cpu")
    extract(replace(own, dtype="bfloat16"), tmp_path / "f.safetensors", cache=cache, accelerator="cpu")


def rewritten(path, change):
    """Change the arrays of a shard, and what the index says of it."""
    file = shards(path)[1]
    with safe_open(file, "pt") as found:
        metadata = json.loads(found.metadata()["afterimage"])
        arrays = {name: found.get_tensor(name).clone() for name in found.keys()}  # noqa: SIM118
    change(arrays, metadata)
    save_file(arrays, file, {"afterimage": json.dumps(metadata)})
    index = read_json(index_path(path))
    index["shards"][1] |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(index_path(path), index)


def flipped(path):
    content = bytearray(shards(path)[1].read_bytes())
    content[-1] ^= 1
    shards(path)[1].write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: shards(p)[1].unlink(), "cannot read .*f-00002-of-00003.safetensors: No such file"),
        (lambda p: shards(p)[1].write_bytes(b"x"), "cannot read .*f-00002-of-00003.safetensors"),
        (flipped, "f-00002.* is damaged: its digest is not"),
        (
            lambda p: index_path(p).write_text("{}"),
            "f.safetensors.index.json has version None; this version reads 1",
        ),
        (
            lambda p: rewritten(p, lambda a, m: m.update(ids=open_store(p).ids[:7])),
            r"each differently: \d\d.png is there 2 times",
        ),
        (
            lambda p: rewritten(p, lambda a, m: a["features.layer1"][3, 0, 0].fill_(torch.nan)),
            r"features.layer1 holds values that are not finite \(image \d\d\.png\)",
        ),
        (
            lambda p: rewritten(p, lambda a, m: a.update({"features.layer2": torch.zeros(7, 64)})),
            r"the shards differ: features.layer2 is \(64,\) an image in f-00002.*in f-00001",
        ),
        (lambda p: rewritten(p, lambda a, m: a.pop("features.layer2")), "the shards differ: .* is missing"),
        (
            lambda p: rewritten(p, lambda a, m: a.update(images=torch.zeros(7, 3, 16, 16))),
            r"the shards differ: images is \(3, 16, 16\)",
        ),
        (
            lambda p: rewritten(p, lambda a, m: a.update({"features.odd": torch.zeros(7, 1)})),
            "features.odd is none of the layers",
        ),
    ],
)
def test_a_damaged_store_is_named(damage, message, store):
    damage(store)
    with pytest.raises(AfterimageError, match=message):
        open_store(store)


def test_extract_then_audit_then_the_report(sample_images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(tmp_path / "cache"))
    images = ["--data", f"folder:{sample_images}", "--resize", "48", "--crop", "32", "--device", "cpu"]
    command = ["extract", LAYERS[1], *images, "--weights", "random", "--out", "f.safetensors"]
    main([*command, "--dry-run"])
    assert "20 images" in capsys.readouterr().out and not (tmp_path / "f.safetensors").exists()
    main([*command, "--shard-images", "9"])
    assert f"features of 20 images in {MODEL} (layer2)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["audit", "--feature-store", "f.safetensors", "--defences", "none", "--max-ssim", "0.001",
              "--estimate-images", "0"])  # fmt: skip
    out = capsys.readouterr().out
    assert "layer2" in out and "recommended: none" in out
    page = (tmp_path / "runs" / "audit-f.safetensors" / "index.html").read_text()
    assert f"maps (N, C, h, w) of {LAYERS[1]}" in page
