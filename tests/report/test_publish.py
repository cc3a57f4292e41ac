"""What a repository of decoders holds, from run folders alone; tests/models/test_hub.py pushes and pulls it."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from afterimage.config import AfterimageError, DataConfig
from afterimage.report.publish import (
    Picture,
    _public,
    are_free,
    decoders_of,
    kept_picture,
    public_source,
    repository_files,
)
from afterimage.runs.controls import write_part
from afterimage.runs.files import sha256
from afterimage.runs.repository import CARD, DECODER, FILES, MANIFEST, PICTURE, Manifest
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
    files = repository_files(runs, beside, "me/seen", kept_picture(runs), license="mit", with_names=False)
    assert json.loads(files[MANIFEST])["decoders"].keys() == {run.name for run in runs}
    return files[CARD].decode(), files


def section(text, title):
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_a_card_tells_what_was_measured_beside_the_decoder(tmp_path):
    run, other = write_decoder(tmp_path, "layer1"), write_decoder(tmp_path, "layer3")
    write_baseline(tmp_path, "mean")
    text, files = card([run])
    assert files.keys() == {*FILES, MANIFEST, CARD, PICTURE}
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
    assert "most consistent" in bound and "+0.60" in bound and bound.count("the decoder missed") == 1
    assert "Preserved or guessed" in section(text, "Controls") and "12.50" in section(text, "Controls")


def test_several_decoders_share_a_card_that_the_client_reads_back(tmp_path):
    runs = [write_decoder(tmp_path, layer) for layer in ("layer1", "layer2")]
    text, files = card(runs)
    assert files.keys() == {
        MANIFEST,
        CARD,
        PICTURE,
        *(f"{run.name}/{part}" for run in runs for part in FILES),
    }
    results = ModelCard(text).data.eval_results
    assert {(r.dataset_config, r.metric_type) for r in results} == {
        (run.name, metric) for run in runs for metric in ("psnr", "ssim", "lpips")
    }
    assert {r.dataset_type for r in results} == {"procedural"}
    assert f"hub:me/seen/{runs[0].name}" in text
    found = Manifest.parse(files[MANIFEST])
    assert [found.choose(run.name).sources for run in runs] == [run.result.sources for run in runs]


def test_a_picture_has_a_row_of_originals_and_one_for_each_decoder():
    solid = [np.full((4, 4, 3), value, np.uint8) for value in (10, 20, 30, 40)]
    sheet = Picture("", solid[:2], {"a": solid[2:], "b": [np.full((2, 2, 3), 50, np.uint8), solid[0]]}).png
    pixels = np.array(Image.open(io.BytesIO(sheet)))
    assert pixels.shape == (3 * 10 - 6, 2 * 10 - 6, 3)
    assert [[int(pixels[y, x, 0]) for x in (1, 11)] for y in (1, 11, 21)] == [[10, 20], [30, 40], [50, 10]]


def test_what_nobody_else_could_use_is_not_shared(tmp_path):
    with pytest.raises(
        AfterimageError, match=r"none of these runs has a decoder to share: baseline-mean-\w+ \(baseline\)"
    ):
        decoders_of([write_baseline(tmp_path, "mean")])
    own = write_run(tmp_path, "python/networks.py:small", "stage1")
    with pytest.raises(
        AfterimageError, match=rf"{own.name} cannot be shared: .*networks.py:small is code of one's own"
    ):
        decoders_of([own])
    named = write_run(tmp_path, "resnet18.tv_in1k", "layer1", weights="random")
    assert decoders_of([named]) == [named]


def test_notes_lose_paths_and_names_of_images_that_are_not_free(tmp_path):
    notes = (
        "ridge 0.1",
        "/home/me/my birds/a.png is near train/b.jpg",
        "weights of x: /home/me/w.bin, 3 keys",
    )
    result = replace(write_run(tmp_path, *RESNET[:1], "layer1").result, notes=notes)
    told = ("ridge 0.1", "weights of x: w.bin, 3 keys", "left out here: 1 notes that name images")
    assert _public(result, keep_ids=True, keep_notes=False).notes == told
    assert public_source("folder:/home/me/birds") == "folder:birds"
    assert public_source("webdataset:/data/x-{00..12}.tar") == "webdataset:x-{00..12}.tar"
    assert public_source("hf:me/photos@v1:train") == "hf:me/photos@v1:train"
    assert are_free(DataConfig("folder:x", test="photographs")) and not are_free(
        DataConfig("procedural", test="div2k")
    )
