"""What a repository of decoders holds, from run folders alone; tests/models/test_hub.py pushes and pulls it."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image

from afterimage.config import AfterimageError, DataConfig
from afterimage.report.compare import read_atlas
from afterimage.report.dataset import dataset_files
from afterimage.report.publish import (
    ImageGrid,
    is_shareable,
    kept_images,
    public_source,
    remove_private_facts,
    repository_files,
    shareable_runs,
)
from afterimage.runs.controls import write_part
from afterimage.runs.files import sha256
from afterimage.runs.repository import (
    CARD,
    DECODER,
    FILES,
    IMAGE_GRID,
    MANIFEST,
    SCORES_TABLE,
    TABLE,
    Manifest,
)
from report_study import RESNET, sample_image, write_baseline, write_run
from simulated_runs import edit, search

LAYERS = RESNET[1]
ORIGINALS = [sample_image(seed) for seed in range(5)]


def write_decoder(root, layer, **options):
    run = write_run(root, RESNET[0], layer, features=LAYERS[layer], originals=ORIGINALS, **options)
    run.file(DECODER).write_bytes(layer.encode())
    edit(run, training__decoder_sha256=sha256(run.file(DECODER)))
    return run


def card(runs, beside=()):
    files = repository_files(runs, beside, "me/seen", kept_images(runs), license="mit", with_names=False)
    assert json.loads(files[MANIFEST])["decoders"].keys() == {run.name for run in runs}
    return files[CARD].decode(), files


def section(text, title):
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_a_card_tells_what_was_measured_beside_the_decoder(tmp_path):
    run, other = write_decoder(tmp_path, "layer1"), write_decoder(tmp_path, "layer3")
    write_baseline(tmp_path, "mean")
    text, files = card([run])
    assert files.keys() == {*FILES, MANIFEST, CARD, IMAGE_GRID}
    assert "Mean colour" in section(text, "Scores") and "layer3" not in text
    assert section(text, "Measured bound").strip().startswith("Not measured.")
    assert section(text, "Controls").strip().startswith("Not measured.")
    for source in (run, other):
        search(source, "refined", {"psnr": 0.6, "ssim": 0.1, "lpips": -0.2})
    ids = [row["id"] for row in run.result.per_image]
    names = ("own", "another", "shuffled", "mean", "zero", "colour")
    facts = {"images": len(ids), "decoder": "digest", "lpips": {"net": "alex"}, "controls": {},
             "distances": {"reencoded": 0.3, "random_pair": 0.9}}  # fmt: skip
    write_part(run, "controls", facts, [{"id": i, **{f"{name}_psnr": 12.5 for name in names}} for i in ids])
    text, _ = card([run])
    bound = section(text, "Measured bound")
    assert "most consistent" in bound and "+0.60" in bound and bound.count("bound − decoder") == 1
    assert "Preserved or guessed" in section(text, "Controls") and "12.50" in section(text, "Controls")


def test_several_decoders_share_a_card_that_the_client_reads_back(tmp_path):
    runs = [write_decoder(tmp_path, layer) for layer in ("layer1", "layer2")]
    text, files = card(runs)
    assert files.keys() == {
        MANIFEST,
        CARD,
        IMAGE_GRID,
        *(f"{run.name}/{part}" for run in runs for part in FILES),
    }
    results = ModelCard(text).data.eval_results
    assert {(r.dataset_config, r.metric_type) for r in results} == {
        (run.name, metric) for run in runs for metric in ("psnr", "ssim", "lpips")
    }
    assert {r.dataset_type for r in results} == {"procedural"}
    assert f"hub:me/seen/{runs[0].name}" in text
    found = Manifest.parse(files[MANIFEST])
    assert [found.get_decoder(run.name).sources for run in runs] == [run.result.sources for run in runs]


def test_a_grid_of_images_has_a_row_of_originals_and_one_for_each_decoder():
    solid = [np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30, 40)]
    sheet = ImageGrid("", solid[:2], {"a": solid[2:], "b": [np.full((2, 2, 3), 50, np.uint8), solid[0]]}).png
    pixels = np.array(Image.open(io.BytesIO(sheet)))
    assert pixels.shape == (3 * 10 - 6, 2 * 10 - 6, 3)
    assert [[int(pixels[y, x, 0]) for x in (1, 11)] for y in (1, 11, 21)] == [[10, 20], [30, 40], [50, 10]]


def test_what_nobody_else_could_use_is_not_shared(tmp_path):
    with pytest.raises(
        AfterimageError, match=r"none of these runs has a decoder to share: baseline-mean-\w+ \(baseline\)"
    ):
        shareable_runs([write_baseline(tmp_path, "mean")])
    own = write_run(tmp_path, "python/networks.py:small", "stage1")
    with pytest.raises(
        AfterimageError, match=rf"{own.name} cannot be shared: .*networks.py:small is code that only you have"
    ):
        shareable_runs([own])
    named = write_run(tmp_path, "resnet18.tv_in1k", "layer1", weights="random")
    assert shareable_runs([named]) == [named]


def test_notes_lose_paths_and_names_of_images_that_are_not_free(tmp_path):
    notes = (
        "ridge 0.1",
        "/home/me/my birds/a.png is near train/b.jpg",
        "weights of x: /home/me/w.bin, 3 keys",
    )
    result = write_run(tmp_path, *RESNET[:1], "layer1").result
    mine = replace(result, notes=notes, data=replace(result.data, source="folder:/home/me/mine", test=""))
    told = ("ridge 0.1", "weights of x: w.bin, 3 keys", "left out here: 1 notes that name images")
    (hidden,) = remove_private_facts([mine], with_names=False)
    assert hidden.notes == told and hidden.data.source == "folder:mine"
    assert [image["id"] for image in hidden.per_image] == [f"{i:05d}" for i in range(20)]
    fewer = replace(mine, per_image=mine.per_image[5:7])
    assert [image["id"] for image in remove_private_facts([mine, fewer], with_names=False)[1].per_image] == [
        "00005",
        "00006",
    ]
    assert remove_private_facts([mine], with_names=True)[0].per_image == mine.per_image
    # Test images that are free keep their names, training images of one's own do not get any.
    (tested,) = remove_private_facts(
        [replace(mine, data=replace(mine.data, test="photographs"))], with_names=False
    )
    assert tested.per_image == mine.per_image and tested.notes == told
    assert public_source("folder:/home/me/birds") == "folder:birds"
    assert public_source("webdataset:/data/x-{00..12}.tar") == "webdataset:x-{00..12}.tar"
    assert public_source("hf:me/photos@v1:train") == "hf:me/photos@v1:train"
    assert is_shareable(DataConfig("folder:x", test="photographs")) and not is_shareable(
        DataConfig("procedural", test="div2k")
    )


@pytest.mark.parametrize("own", [False, True])
def test_scores_are_a_data_set_that_the_library_reads(tmp_path, own):
    import datasets

    run, baseline = (
        write_decoder(tmp_path, "layer1", lpips=None),
        write_baseline(tmp_path, "mean", lpips=None),
    )
    edit(run, data__source="folder:/home/me/mine")
    files = dataset_files([run, baseline], "me/scores", license="mit", own_images=own)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert b"/home/me" not in content
    read = {"cache_dir": str(tmp_path / "read"), "split": "train"}
    scores = datasets.load_dataset("parquet", data_files=str(tmp_path / SCORES_TABLE), **read)
    assert len(scores) == 40 and isinstance(scores.features["original"], datasets.Image)
    rows = [row for row in scores if row["run"] == run.name]
    assert [row["psnr"] for row in rows] == [image["psnr"] for image in run.result.per_image]
    assert {row["lpips"] for row in rows} == {None}
    assert [row["image"] for row in rows][:2] == (["image-000", "image-001"] if own else ["00000", "00001"])
    assert [row["original"] is not None for row in rows] == [own and i < len(ORIGINALS) for i in range(20)]
    if own:
        assert np.array_equal(np.array(rows[0]["original"]), np.array(ORIGINALS[0]))
    table = read_atlas(tmp_path / TABLE)
    assert [row["run"] for row in table] == [run.name, baseline.name]
    assert table[0]["psnr_mean"] == run.result.scores["psnr"].mean
    card = DatasetCard(files[CARD].decode())
    assert card.data.license == "mit" and [c["data_files"] for c in card.data.configs] == [
        SCORES_TABLE,
        TABLE,
    ]
