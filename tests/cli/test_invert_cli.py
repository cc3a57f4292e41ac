import contextlib
import csv
import functools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import command_line
from afterimage.analysis.inversion.inputs import from_data, from_files
from afterimage.analysis.inversion.invert import Inversion, curve_steps
from afterimage.analysis.inversion.measure import best_step, measure
from afterimage.analysis.inversion.refinement import Refinement
from afterimage.config import DataConfig, DecoderConfig, RunConfig
from afterimage.config.inversion import EstimateConfig, InvertConfig
from afterimage.evaluation.metrics import Metrics, psnr
from afterimage.experiments.queue import train_runs
from afterimage.report.write import write_report
from afterimage.runs.files import read_csv, read_json, write_csv
from afterimage.runs.run import Run, scan
from afterimage.training.checkpoint import load_reconstructor
from some_images import write_images

SOURCE = "test_resnet.r160_in1k:layer1"
WAYS = ["decoder", "inversion", "refined"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("invert")


@pytest.fixture(scope="module")
def run(place):
    """A linear decoder on a small network whose layer is nearly linear, so that a few steps refine it."""
    data = DataConfig("procedural:160", resize=36, crop=32)
    config = RunConfig((SOURCE,), weights="random-init", decoder=DecoderConfig("linear"), data=data)
    (trained,) = train_runs(config, place / "runs", cache=place / "cache", accelerator="cpu")
    return trained


@pytest.fixture
def command(place, monkeypatch, capsys):
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(place / "cache"))
    monkeypatch.delenv("AFTERIMAGE_WEIGHTS", raising=False)

    def call(*arguments):
        names = [name for name in ("--estimate-images", "--held-out") if name not in arguments]
        unless_asked = [part for name in names for part in (name, "0")]
        return command_line.command(capsys, "invert", *arguments, "--device", "cpu", *unless_asked)

    return call


def test_the_limit_of_a_run(command, run, place):
    output = place / "limit"
    code, out, err = command(run.path, "--max-images", 3, "--steps", 30, "--output-dir", output)
    assert code == 0, err
    rows = read_json(output / "bounds.json")
    assert [row["way"] for row in rows] == WAYS
    assert [row["passes"] for row in rows] == [0, 30, 30]
    assert all(row["images"] == 3 and row["seconds_per_image"] > 0 for row in rows)
    decoder, inversion, refined = rows
    assert refined["psnr"] > decoder["psnr"] and refined["psnr"] > inversion["psnr"]
    assert refined["feature_loss"] < inversion["feature_loss"]
    with open(output / "bounds.csv", newline="") as file:
        assert [float(row["psnr"]) for row in csv.DictReader(file)] == [row["psnr"] for row in rows]
    assert "linear + refined" in out and "lower bounds" in out
    assert Image.open(output / "saturation.png").width > 500

    folder = Run(output / refined["run"])
    result, scores = folder.result, folder.result.per_image
    assert (result.kind, result.inversion.start, folder.state) == ("inversion", run.name, "done")
    assert [p[0] for p in folder.images] == [row["id"] for row in scores]
    assert np.mean([row["psnr"] for row in scores]) == pytest.approx(refined["psnr"])
    curve = read_csv(folder.file("curve.csv"))
    assert {row["step"] for row in curve} == {0, *curve_steps(30)}
    begin = [row["psnr"] for row in curve if row["step"] == 0]
    assert np.mean(begin) == pytest.approx(decoder["psnr"], abs=1e-3)
    assert folder.file("progress.png").exists()
    assert any("validation images" in note for note in result.notes)

    before = folder.file("summary.json").stat().st_mtime_ns
    assert command(run.path, "--max-images", 3, "--steps", 30, "--output-dir", output)[0] == 0
    assert folder.file("summary.json").stat().st_mtime_ns == before  # done is not done again


def test_one_that_went_on_past_its_peak_says_where_it_was(command, run, place):
    output = place / "past"
    options = (run.path, "--max-images", 2, "--refine-only", "--output-dir", output, "--steps", 4)
    code, out, _ = command(*options)
    row = read_json(output / "bounds.json")[1]
    assert code == 0 and "highest after" not in out and row["peak_passes"] == 4
    folder = Run(output / row["run"])
    curve = read_csv(folder.file("curve.csv"))
    for point in curve:
        point["psnr"] = row["psnr"] + (2.5 if point["step"] == 2 else 0)
    curve[0]["psnr"] += 4  # of one image: their mean counts
    write_csv(folder.file("curve.csv"), curve)
    code, out, _ = command(*options)
    assert (
        code == 0 and f"highest after 2 passes, {row['psnr'] + 2.5:.2f} dB" in out and "--steps 2 ends" in out
    )
    (_, row) = read_json(output / "bounds.json")
    assert (row["peak_passes"], row["peak_psnr"]) == (2, pytest.approx(row["psnr"] + 2.5))


def test_reports_show_inversions_beside_their_decoder(command, run, place, request):
    output = place / "reported"
    assert command(run.path, "--max-images", 3, "--steps", 4, "--output-dir", output)[0] == 0
    folders = [Run(output / row["run"]) for row in read_json(output / "bounds.json")[1:]]
    written = write_report([run, *folders], place / "report")
    table = written["table.md"].read_text()
    assert "| linear |" in table and "refined" not in table and "inversion" not in table
    text = written["report.md"].read_text()
    section = text[: text.index("## Results")]
    assert "| decoder linear |" in section and "| most consistent |" in section and "from grey |" in section
    assert "index.html" in written and "figures/saturation.png" in written
    request.getfixturevalue("no_figures")
    only = write_report(folders, place / "only")
    assert "linear + refined" in only["table.md"].read_text()


@pytest.mark.parametrize("changed", ["", "file", "lpips"])
def test_one_that_was_cut_short_goes_on_after_its_last_batch(command, run, place, monkeypatch, changed):
    options = [run.path, "--data", "photographs", "--max-images", 6, "--refine-only", "--steps", 3]
    whole, cut = place / f"whole-{changed}", place / f"cut-{changed}"
    assert command(*options, "--output-dir", whole)[0] == 0
    asked, refine_features = [], Refinement.refine_features

    def stopping(self, targets, **more):
        asked.append(len(targets[0]))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return refine_features(self, targets, **more)

    monkeypatch.setattr(Refinement, "refine_features", stopping)
    code, _, err = command(*options, "--output-dir", cut)
    assert code == 130 and "goes on from there" in err and asked == [4, 2]
    (folder,) = [path for path in cut.iterdir() if path.is_dir()]
    (kept,) = folder.glob("batch-*")
    if changed == "file":
        kept.write_bytes(kept.read_bytes()[:-4])
    options += ["--lpips", "squeeze"] if changed == "lpips" else []  # the curve holds scores of the network
    assert command(*options, "--output-dir", cut)[0] == 0
    # The last one is the prior alone.
    assert asked == [4, 2, *([4] if changed else []), 2, 1]
    assert not list(folder.glob("batch-*"))
    (expected,) = [path for path in whole.iterdir() if path.is_dir()]
    assert (folder / "scores.csv").read_bytes() == (expected / "scores.csv").read_bytes()
    curves = [[{**r, "seconds": 0} for r in read_csv(path / "curve.csv")] for path in (folder, expected)]
    assert curves[0] == curves[1]


def test_an_inversion_of_another_decoder_or_other_images_is_made_again(command, place, tmp_path):
    """Folders are named by settings: runs of other networks or images in the same files have the same names."""
    small = ["--max-images", 2, "--steps", 2, "--output-dir", tmp_path / "inversions"]
    write_images(tmp_path / "images", 20)
    data = DataConfig(f"folder:{tmp_path}/images", resize=36, crop=32)
    config = RunConfig((SOURCE,), "random-init", decoder=DecoderConfig("linear"), data=data)
    (first,) = train_runs(config, tmp_path / "a", cache=place / "cache", accelerator="cpu")
    assert command(first.path, *small)[0] == 0
    folders = {run.path: run.result for run in scan(tmp_path / "inversions")}
    code, _, err = command(first.path, *small)
    assert code == 0 and "made again" not in err
    assert {run.path: run.result for run in scan(tmp_path / "inversions")} == folders

    Image.new("RGB", (40, 40), "red").save(tmp_path / "images" / "more.png")
    (second,) = train_runs(config, tmp_path / "b", cache=place / "cache", accelerator="cpu")
    assert second.path.name == first.path.name
    code, _, err = command(second.path, *small)
    assert code == 0 and "was made with another decoder and other images: it is made again" in err
    again = {run.path: run.result for run in scan(tmp_path / "inversions")}
    assert again.keys() == folders.keys() and all(again[path] != folders[path] for path in folders)
    code, _, err = command(second.path, *small)
    assert code == 0 and "made again" not in err


def test_all_images_of_a_source_are_inverted(command, run, tmp_path):
    """Inversion from grey needs no other images, and a run's own limit is that of its own images."""
    write_images(tmp_path / "images", 12)
    here = ["--data", f"folder:{tmp_path}/images", "--steps", 1, "--output-dir", tmp_path / "out"]
    assert command(SOURCE, *here, "--weights", "random-init", "--size", 32)[0] == 0
    (made,) = scan(tmp_path / "out")
    assert made.result.data.test_images == len(made.result.per_image) == 12
    limited = replace(run.config, data=replace(run.config.data, limit_test=2))
    (few,) = train_runs(limited, tmp_path / "runs", cache=tmp_path / "cache", accelerator="cpu")
    assert command(few.path, "--refine-only", *here)[0] == 0
    assert {len(made.result.per_image) for made in scan(tmp_path / "out")} == {12}


def test_the_table_of_a_folder_holds_all_its_inversions(command, run, place):
    output = run.path.parent  # a decoder's run folder beside them is none
    options = (run.path, "--max-images", 2, "--refine-only", "--output-dir", output)
    for steps in (2, 4):
        code, out, err = command(*options, "--steps", steps)
        assert code == 0, err
        assert out.count("linear + refined") == 1
    rows = read_json(output / "bounds.json")
    assert [row["way"] for row in rows] == ["decoder", "refined", "refined"]
    assert sorted(row["passes"] for row in rows) == [0, 2, 4]


def test_ones_own_images_through_several_layers(command, place):
    paths = write_images(place / "own", 2)
    output = place / "plain"
    layers = [SOURCE, "test_resnet.r160_in1k:layer2"]
    options = [
        "--weights",
        "random",
        "--steps",
        3,
        "--method",
        "pixels",
        "--optimizer",
        "adam",
        "--jitter",
        1,
    ]
    code, out, err = command(*paths, *layers, *options, "--starts", 2, "--output-dir", output)
    assert code == 0, err
    (row,) = read_json(output / "bounds.json")
    assert row["way"] == "inversion" and row["sources"] == " + ".join(layers) and row["images"] == 2
    assert row["weights"] == "random"
    assert all(f"{path}: PSNR" in out for path in paths)
    assert Run(output / row["run"]).result.data.source == "files"


def few_steps(monkeypatch, **changes):
    few = functools.partialmethod(EstimateConfig.__init__, **{"steps": 40, "channels": 8} | changes)
    monkeypatch.setattr(EstimateConfig, "__init__", few)


def test_best_estimates_of_a_run(command, run, place, monkeypatch):
    few_steps(monkeypatch, steps=40)
    output = place / "estimates"
    arguments = run.path, "--max-images", 3, "--steps", 5, "--refine-only", "--output-dir", output
    code, out, err = command(*arguments, "--estimate-images", 14)
    assert code == 0, err
    answers = {made.result.config.result_kind: made.result for made in scan(output)}
    assert answers.keys() == {"refined", "estimate"}
    refined, estimate = answers["refined"], answers["estimate"]
    assert estimate.label.endswith("linear + best estimate") and estimate.inversion.steps == 5
    assert "learned from 14 other validation images, refined alike, in 40 steps" in estimate.notes
    alone = estimate.inversion.decoder_alone
    assert alone.scores == refined.inversion.decoder_alone.scores
    assert estimate.scores["psnr"].mean > max(alone.scores["psnr"].mean, refined.scores["psnr"].mean)
    assert refined.inversion.feature_loss < alone.feature_loss
    assert [row["id"] for row in estimate.per_image] == [row["id"] for row in refined.per_image]
    for found in answers.values():
        controls = found.inversion.controls
        assert controls.candidates == 3 and 0 <= controls.identified <= 1
        assert controls.other_image["psnr"].mean < found.scores["psnr"].mean
        assert controls.prior_alone["psnr"].mean < found.scores["psnr"].mean
    assert not list(output.glob("*/learning")) and not list(output.glob("*/batch-*"))
    assert "best estimate" in out


def test_a_best_estimate_that_was_cut_short_goes_on_and_comes_to_the_same(command, run, place, monkeypatch):
    few_steps(monkeypatch, steps=3)
    arguments = run.path, "--max-images", 3, "--steps", 4, "--refine-only", "--estimate-images", 6
    code, _, err = command(*arguments, "--output-dir", place / "whole")
    assert code == 0, err
    refine_features, calls = Refinement.refine_features, []

    def stopping(*given, **options):
        calls.append(given)
        if len(calls) == 3:  # of the test images one batch, of those that are learned from one of two
            raise KeyboardInterrupt
        return refine_features(*given, **options)

    monkeypatch.setattr(Refinement, "refine_features", stopping)
    with contextlib.suppress(KeyboardInterrupt):
        command(*arguments, "--output-dir", place / "cut")
    assert len(calls) == 3
    code, _, err = command(*arguments, "--output-dir", place / "cut")
    assert code == 0, err
    scores = [
        {made.name: made.file("scores.csv").read_bytes() for made in scan(place / name)}
        for name in ("whole", "cut")
    ]
    assert len(scores[0]) == 2 and scores[0] == scores[1]


def test_the_number_of_passes_is_chosen_on_held_out_images(command, run, place, monkeypatch):
    few_steps(monkeypatch, steps=3)
    arguments = run.path, "--max-images", 2, "--steps", 12, "--refine-only", "--held-out", 6
    code, _, err = command(*arguments, "--estimate-images", 4, "--output-dir", place / "chosen")
    assert code == 0, err
    refined, estimate = sorted(
        scan(place / "chosen"), key=lambda made: made.result.config.result_kind, reverse=True
    )
    steps = refined.result.inversion.steps
    (note,) = [note for note in refined.result.notes if "of at most 12" in note]
    assert f"the number of passes, {steps} of" in note and "for 6 other validation images" in note
    assert estimate.result.inversion.steps == steps
    assert max(int(row["step"]) for row in read_csv(refined.file("curve.csv"))) == steps

    # Asked for later, the best estimates are those of the same number of passes, and their notes say so too.
    before = estimate.result
    shutil.rmtree(estimate.path)
    code, _, err = command(*arguments, "--estimate-images", 4, "--output-dir", place / "chosen")
    assert code == 0, err
    assert estimate.result.notes[1:] == before.notes[1:]  # the first note holds seconds
    assert estimate.result.per_image == before.per_image

    # Searched for so many steps, whatever is best, the same images have the same curve up to there.
    code, _, err = command(*arguments[:-2], "--output-dir", place / "all")
    assert code == 0, err
    (whole,) = scan(place / "all")
    curves = [
        {(row["id"], row["step"]): row["psnr"] for row in read_csv(made.file("curve.csv"))}
        for made in (refined, whole)
    ]
    shared = curves[0].keys() & curves[1].keys()
    assert len(shared) > 4 and all(curves[0][key] == curves[1][key] for key in shared)


def test_the_best_step_is_that_of_least_lpips_or_else_highest_psnr():
    rows = [(0, 30.0, 0.1), (1, 20.0, 0.4), (2, 24.0, 0.2), (3, 22.0, 0.1), (3, 22.0, 0.2)]
    curve = [
        {"step": step, "psnr": psnr, "lpips": lpips}
        for step, psnr, lpips in (*rows, (1, 20, 0.4), (2, 24, 0.2))
    ]
    assert best_step(curve) == 3
    assert best_step([row | {"lpips": None} for row in curve]) == 2


def test_ones_own_image_from_a_decoder(command, run, place):
    (path,) = write_images(place / "one", 1)
    code, _, err = command(path, run.path, "--steps", 3, "--refine-only", "--output-dir", place / "one-out")
    assert code == 0, err
    rows = read_json(place / "one-out" / "bounds.json")
    assert [row["way"] for row in rows] == ["decoder", "refined"]
    notes = Run(place / "one-out" / rows[1]["run"]).result.notes
    assert any("errors are not known" in note for note in notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give images and layers"),
        (("nothing.png", SOURCE), "nothing.png"),
        ((SOURCE,), "give images and layers"),
        ((SOURCE, "."), "a run already defines its layers; leave out"),
        ((__file__, SOURCE, "--data", "photographs"), "image files or --data, not both"),
        ((SOURCE, "--data", "photographs", "--method", "waves"), "unknown inversion method"),
        ((SOURCE, "--data", "photographs", "--held-out", 4), "--held-out needs a RUN"),
        ((SOURCE, __file__, "--estimate-images", 4), "--estimate-images needs a RUN"),
        ((".", __file__, "--held-out", 4), "--held-out needs a RUN without image files"),
        ((".", "--held-out", 4, "--optimizer", "adam"), "--held-out goes with --optimizer lbfgs"),
        ((SOURCE, __file__, "--max-images", 4), "--max-images limits"),
        (("nowhere",), "nowhere is no image file, no run folder and no MODEL:LAYER"),
    ],
)
def test_mistakes_are_one_message(command, arguments, message):
    code, _, err = command("--weights", "random", *arguments)
    assert code == 1 and message in err and "Traceback" not in err


def test_refining_starts_at_the_decoders_answer(run, place):
    reconstructor = load_reconstructor(run)
    images = from_data(run.config.data, cache=place / "cache").images.crops([0, 1])
    looks = list(Refinement(reconstructor, InvertConfig(steps=8), None, seed=0)(images))
    torch.testing.assert_close(looks[0].images, reconstructor.reconstruct(images))
    assert (looks[-1].loss < looks[0].loss).all()
    features = reconstructor.encoders(images)[0]
    assert not features.requires_grad  # the encoder is back as it was
    prior = Refinement(reconstructor, InvertConfig("prior", steps=1), None, seed=0)
    assert list(prior(images))[-1].images.shape == images.shape


def test_measuring_counts_the_search_alone(place):
    given = from_files(write_images(place / "measured", 5), resize=36, crop=32)

    def search(images, *, progress):
        worse = (images * 0.5).clamp(0, 1)
        loss = torch.arange(float(len(images)))
        yield Inversion(worse, loss + 1, 0.0, 0)
        yield Inversion(images, loss, 4.0, 6)

    measured = measure(search, given.images, Metrics(size=32))
    assert measured.seconds == pytest.approx(8 / 5)  # two batches of 4 seconds
    assert [row["psnr"] for row in measured.rows] == [100.0] * 5
    assert [row["feature_loss"] for row in measured.rows] == [0, 1, 2, 3, 0]
    first = [row for row in measured.curve if row["step"] == 0]
    assert [row["id"] for row in first] == given.images.ids
    images = given.images.crops(range(5))
    np.testing.assert_allclose([row["psnr"] for row in first], psnr(images * 0.5, images), rtol=1e-5)


def test_curves_are_measured_up_to_the_last_pass():
    assert curve_steps(1) == [1] and curve_steps(5) == [1, 2, 3, 4, 5]
    assert curve_steps(200)[-1] == 200 and len(curve_steps(200)) < 30
