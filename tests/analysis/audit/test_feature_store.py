"""Stored pairs: safetensors, npz and Parquet, read without unpickling, attacked without an encoder."""

import io

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from afterimage.analysis.audit.run import run_audit
from afterimage.analysis.audit.target import load_stored_pairs
from afterimage.config import AfterimageError, DataConfig, RecipeConfig
from afterimage.config.audit import AuditConfig, LimitsConfig
from afterimage.report.audit.verdict import judge
from test_audit import Decoded

COUNT, SIZE = 60, 32


@pytest.fixture
def arrays():
    """Images of smooth colours, and features that are their 2x2 means."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (COUNT, 4, 4, 3), np.uint8)
    pixels = np.stack(
        [np.asarray(Image.fromarray(c).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for c in coarse]
    )
    small = pixels.reshape(COUNT, 16, 2, 16, 2, 3).mean((2, 4)) / 255
    return {"images": pixels, "features": np.ascontiguousarray(small.transpose(0, 3, 1, 2), np.float32)}


def write(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path)
    else:
        pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
        import pyarrow.parquet as parquet

        columns = {}
        for name, values in arrays.items():
            if name == "images":
                files = [io.BytesIO() for _ in values]
                for file, value in zip(files, values, strict=True):
                    Image.fromarray(value).save(file, "PNG")
                columns[name] = pa.array([file.getvalue() for file in files])
            else:
                columns[name] = pa.array(values.tolist())
        parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_every_kind_of_file_holds_the_same(suffix, arrays, tmp_path):
    data, _ = load_stored_pairs(write(tmp_path / f"store{suffix}", arrays))
    parts = (data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [39, 9, 12]
    assert len({i for part in parts for i in part.ids}) == COUNT
    for part in parts:
        for i, identity in enumerate(part.ids):
            expected = arrays["images"][int(identity)]
            assert np.array_equal((part.crops([i])[0] * 255).round().numpy().transpose(1, 2, 0), expected)
            np.testing.assert_allclose(
                part.features([i], "features")[0], arrays["features"][int(identity)], rtol=1e-6
            )


def test_pixels_of_0_and_1_are_said(arrays, tmp_path):
    arrays["images"] = (arrays["images"] > 99).astype(np.uint8)
    notes = load_stored_pairs(write(tmp_path / "store.npz", arrays))[0].notes
    assert f"narrow range of values: {COUNT} of {COUNT} images use only values from 0 to 1" in notes[-1]


def test_a_store_is_audited_without_an_encoder(arrays, tmp_path):
    path = write(tmp_path / "store.npz", arrays)
    config = AuditConfig(
        pairs=str(path), defences=("none", "noise:3+int8"), attackers=Decoded(), recipe=RecipeConfig(batch_size=16),
        limits=LimitsConfig(max_identification=0.05), test_fraction=0.4,
    )  # fmt: skip
    results = run_audit(config, tmp_path / "audit", accelerator="cpu")
    plain, noisy = results.rows
    assert plain.identification["pixels"].estimate == 1 and plain.scores["psnr"].estimate > 30
    assert noisy.scores["psnr"].high < plain.scores["psnr"].low
    cost = results.costs["features", "none"]
    assert cost["score"] is None and "no network" in cost["notes"][0] and cost["bytes"] == 3 * 16 * 16 * 4
    assert any("without random crops" in note for note in results.notes)
    assert judge(results, config.limits).passed is False


def test_another_split_of_a_store_is_another_measurement(arrays, tmp_path):
    path = write(tmp_path / "store.npz", arrays)
    found = []
    for fraction, seed in ((0.2, 42), (0.4, 42), (0.2, 7)):
        config = AuditConfig(
            pairs=str(path), defences=("none",), attackers=Decoded(images=("20",)),
            recipe=RecipeConfig(batch_size=16), test_fraction=fraction, data=DataConfig(split_seed=seed),
        )  # fmt: skip
        (row,) = run_audit(config, tmp_path / "audit", accelerator="cpu").rows
        assert row.scores["psnr"].count == round(fraction * COUNT)
        found.append(row.folder)
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("change", "shape", "said"),
    [
        (lambda f: f, (3, 16, 16), "maps (N, C, h, w)"),
        (lambda f: f.reshape(COUNT, 12, 8, 8).transpose(0, 2, 3, 1), (12, 8, 8), "maps (N, h, w, C)"),
        (lambda f: f.reshape(COUNT, -1), (768, 1, 1), "vectors (N, C)"),
        (
            lambda f: f.reshape(COUNT, 3, 256).transpose(0, 2, 1),
            (3, 16, 16),
            "tokens (N, L, C) of a 16x16 grid",
        ),
        (lambda f: f.reshape(COUNT, 256, 3)[:, :17], (3, 4, 4), "a 4x4 grid, the first 1 left out"),
    ],
)
def test_how_features_are_understood_is_said(change, shape, said, arrays, tmp_path):
    arrays["features"] = change(arrays["features"])
    data, store = load_stored_pairs(write(tmp_path / "store.npz", arrays))
    spec = store.specs["features"]
    assert (spec.channels, spec.height, spec.width) == shape
    assert said in data.notes[0]


def test_vectors_are_attacked_too(arrays, tmp_path):
    arrays["features"] = arrays["features"].reshape(COUNT, -1)[:, ::8]
    config = AuditConfig(
        pairs=str(write(tmp_path / "store.npz", arrays)), defences=("none",), attackers=Decoded()
    )
    (row,) = run_audit(config, tmp_path / "audit", accelerator="cpu").rows
    assert row.identification["correlation"].estimate > 0.5


def test_several_layers_and_names(arrays, tmp_path):
    arrays |= {
        "features.deep": arrays["features"][:, :1],
        "ids": np.array([f"person {i}" for i in range(COUNT)]),
    }
    arrays["images"] = arrays.pop("images").transpose(0, 3, 1, 2).astype(np.float32) / 255
    data, store = load_stored_pairs(write(tmp_path / "store.npz", arrays))
    assert list(store.specs) == ["features", "deep"] and data.test.ids[0].startswith("person ")
    config = AuditConfig(pairs=str(tmp_path / "store.npz"), layers=("depe",))
    with pytest.raises(AfterimageError, match=r"unknown layer of .*'depe'; did you mean 'deep'"):
        run_audit(config, tmp_path / "audit", accelerator="cpu")


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_nothing_is_unpickled(arrays, tmp_path, capsys):
    np.savez(
        tmp_path / "evil.npz", images=arrays["images"], features=np.array([Evil()] * COUNT, dtype=object)
    )
    with pytest.raises(AfterimageError, match=r"cannot read .*evil.npz"):
        load_stored_pairs(tmp_path / "evil.npz")
    assert "unpickled" not in capsys.readouterr().out


def nan(values):
    values["features"][3, 0, 0, 0] = np.nan


def twice(values):
    values["images"][1] = values["images"][0]
    values["ids"] = np.array(["same"] * COUNT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("features"), "must hold `images`.*it holds images"),
        (lambda a: a.pop("images"), "it holds features"),
        (lambda a: a.update(features=a["features"][:-1]), "for each of 60 images"),
        (nan, "not finite"),
        (lambda a: a.update(images=a["images"][..., :2]), "must be"),
        (lambda a: a.update(images=a["images"].astype(np.float32)), r"must lie in \[0, 1\]"),
        (lambda a: a.update(images=a["images"].astype(np.int64)), "uint8 or floats"),
        (lambda a: a.update(features=a["features"].reshape(COUNT, 48, 16)[:, :46]), "no square grid"),
        (lambda a: a.update(features=a["features"][:, 0, 0, 0]), "2, 3 or 4 axes"),
        (twice, "ids must name"),
        (lambda a: a.update({k: v[:6] for k, v in a.items()}), "too few"),
    ],
)
def test_a_store_that_cannot_be_used_is_named(change, message, arrays, tmp_path):
    change(arrays)
    with pytest.raises(AfterimageError, match=message):
        load_stored_pairs(write(tmp_path / "store.npz", arrays))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("store.npz", b"not an archive", "cannot read"),
        ("store.safetensors", b"\xff" * 40, "cannot read"),
        ("store.parquet", b"PAR1 but not really", "cannot read|needs pyarrow"),
        ("store.pkl", b"", "unknown kind of store '.pkl'.*safetensors, .npz, .parquet"),
    ],
)
def test_a_damaged_file_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AfterimageError, match=message):
        load_stored_pairs(tmp_path / name)


@pytest.mark.parametrize("name", ["gone.npz", "gone.safetensors"])
def test_a_missing_file_is_named(name, tmp_path):
    with pytest.raises(AfterimageError, match=rf"cannot read .*{name}"):
        load_stored_pairs(tmp_path / name)
