import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import benchmarks as bench
from afterimage.config import (
    AfterimageError,
    DataConfig,
    DecoderConfig,
    FeatureSpec,
    RecipeConfig,
    RunConfig,
    to_dict,
)
from afterimage.data.dataset import load_data
from afterimage.models.decoders import create_decoder
from afterimage.runtime.terminal import no_progress
from benchmarks import MEASUREMENTS, Settings, gpu, run_bench, scoring, training, work
from benchmarks.__main__ import main
from benchmarks.child import Outcome, in_child, peak_bytes
from benchmarks.growth import exponent
from benchmarks.originals import write_originals
from benchmarks.reference import Originals, ReferenceDecoder
from benchmarks.rows import Goal, Quality, Row, print_rows

COUNTS = {"train": 12, "validation": 4, "test": 2}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return write_originals(tmp_path_factory.mktemp("originals"), COUNTS, 120, 80, no_progress)


def run(data, decoder="attention", **recipe):
    return RunConfig(
        ("test_resnet.r160_in1k:layer1",),
        weights="random",
        decoder=DecoderConfig(decoder),
        data=DataConfig(data, resize=40, crop=32),
        recipe=RecipeConfig(**{"epochs": 2, "batch_size": 4, **recipe}),
    )


@pytest.mark.parametrize(
    ("decoder", "precision"),
    [("attention", "32-true"), ("transposed", "bf16-mixed")],
)
def test_both_ways_come_to_the_same_quality(originals, tmp_path, decoder, precision):
    config = to_dict(run(originals, decoder, precision=precision))
    ours = work.ours([config], str(tmp_path), accelerator="cpu")
    reference = work.reference([config], accelerator="cpu")
    assert ours["epochs"] == reference["epochs"] == 2
    apart = 0.02 if precision == "32-true" else 0.1
    assert ours["validation_db"] == pytest.approx(reference["validation_db"], abs=apart)
    untrained = work.ours([to_dict(run(originals, decoder, epochs=1, learning_rate=1e-9))], str(tmp_path))
    assert abs(untrained["validation_db"][0] - ours["validation_db"][0]) > 0.2


@pytest.mark.parametrize(
    ("exact", "mixed", "precision"),
    [(1e11, 4e11, "bf16-mixed"), (1e11, 1.1e11, "32-true"), (1e11, 2e10, "32-true")],
)
def test_ours_computes_in_what_is_quicker_here(monkeypatch, tmp_path, exact, mixed, precision):
    peaks = {"32-true": exact, "bf16-mixed": mixed}
    monkeypatch.setattr(gpu, "matrix_peak", lambda precision, accelerator: peaks[precision])
    assert gpu.quickest_precision("cpu") == precision
    settings = Settings(tmp_path, precision=precision)
    assert (
        settings.run("test_resnet.r160_in1k:layer1", "linear", "procedural:8").recipe.precision == precision
    )
    if precision == "bf16-mixed":  # which is not what it falls back to
        monkeypatch.setitem(MEASUREMENTS, "gpu", lambda settings: [Row("gpu", "", ours=[1.0])])
        monkeypatch.setattr(bench, "in_child", lambda _, **given: Outcome(work.here(**given), 0.0, 0))
        _, facts = run_bench(["gpu"], settings=settings)
        assert facts["precision"] == precision


def test_the_reference_reads_the_same_crops(originals, tmp_path):
    config = run(originals).data
    sample_images = load_data(config, cache=tmp_path).train
    paths = [f"{originals.removeprefix('folder:')}/{identity}" for identity in sample_images.ids]
    plain = Originals(paths, config.resize, config.crop, seed=3)
    plain.epoch = 5
    expected = sample_images.crops(range(len(sample_images)), seed=3, epoch=5)
    torch.testing.assert_close(torch.stack([plain[i] for i in range(len(plain))]), expected, rtol=0, atol=0)


def test_attention_written_out_is_attention():
    ours = create_decoder("attention", [FeatureSpec("a:b", 16, 8, 8)], 32, seed=0)
    plain = ReferenceDecoder(16, 8, 32)
    plain.load_state_dict(ours.state_dict())
    features = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(plain(features), ours([features]))


def test_the_reference_adds_up_micro_batches(originals):
    config = to_dict(run(originals, "attention", epochs=1))
    whole, parts = (work.reference([config], micro_batch=size, accelerator="cpu") for size in (None, 2))
    assert whole["validation_db"] == pytest.approx(parts["validation_db"], abs=1.0)
    assert whole["validation_db"] != parts["validation_db"]


def test_a_target_ends_both_ways(originals, tmp_path):
    linear, plain = to_dict(run(originals, "linear")), to_dict(run(originals, "transposed", epochs=3))
    ours = work.ours([linear], str(tmp_path), accelerator="cpu", target=5.0)
    assert ours["test_db"] > 5 and ours["epochs"] == 0
    assert work.reference([plain], accelerator="cpu", target=-100.0)["epochs"] == 1
    stopped = work.reference([plain], accelerator="cpu", target=99.0, limit=0.0)
    assert stopped["epochs"] == 1 and stopped["test_db"] < 99


def test_the_batch_is_halved_until_the_matrices_fit(originals, monkeypatch):
    config = run(originals, batch_size=8)
    assert training.attention_bytes(config, 64, 100, 2) == 6 * 2 * 8 * 100 * 100 * 4
    monkeypatch.setattr(training, "available_bytes", lambda: 2 * training.attention_bytes(config, 64, 100, 2))
    size, (note,) = training.micro_batch(config, 64, 100)
    assert size == 2 and "2 images at a time" in note
    monkeypatch.setattr(training, "available_bytes", lambda: 1 << 60)
    assert training.micro_batch(config, 64, 100) == (8, [])


def test_ratios_say_how_many_times_better_ours_is():
    faster = Row(
        "a", "", ours=[8.0, 10.0], reference=[2.0, 2.0], higher_is_better=True, goal=Goal("ratio", 4.0)
    )
    smaller = Row("b", "", ours=[2.0], reference=[8.0], goal=Goal("ratio", 5.0))
    assert faster.ratios == [4, 5] and faster.ratio == 4.5 and faster.met
    assert smaller.ratio == 4 and smaller.met is False


def test_a_lower_bound_below_the_goal_decides_nothing():
    below, above = (
        Row("a", "", ours=[1.0], reference=[times], goal=Goal("ratio", 10.0), bound="at least")
        for times in (3.0, 12.0)
    )
    assert below.met is None and above.met is True


def test_other_quality_meets_no_goal():
    apart = Quality("dB", 20.0, 21.0, 0.5)
    row = Row("a", "", ours=[1.0], reference=[100.0], goal=Goal("ratio", 5.0), quality=apart)
    assert row.met is False and "NOT EQUAL" in str(apart)


def test_one_figure_of_our_own():
    assert Row("a", "", ours=[0.4, 0.3, 9.0], goal=Goal("at most", 0.5)).met
    assert not Row("a", "", ours=[0.6], goal=Goal("at most", 0.5)).met
    assert Row("a", "", goal=Goal("at most", 0.5), unavailable="because").met is None


def test_the_table_says_what_is_missing_and_what_is_computed(capsys):
    print_rows(
        [
            Row(
                "here",
                "",
                "GiB",
                [1.0],
                [9.0],
                goal=Goal("ratio", 20.0),
                bound="computed",
                notes=["COMPUTED"],
            ),
            Row("gone", "", goal=Goal("ratio", 5.0), unavailable="needs photographs"),
        ]
    )
    out = capsys.readouterr().out
    assert "computed 9.00x" in out and "NO" in out
    assert "gone: unavailable: needs photographs" in out and "here: COMPUTED" in out


def test_exponents_of_power_laws():
    sizes = [10.0, 20.0, 40.0, 80.0]
    assert exponent(sizes, [3 * size**2 for size in sizes]) == pytest.approx(2)
    assert exponent(sizes, [5 * size for size in sizes]) == pytest.approx(1)


@pytest.mark.long
def test_a_child_tells_its_result_and_its_peak():
    outcome = in_child("child:peak_bytes")
    assert 0 < outcome.value <= outcome.peak_bytes < 1 << 30 and outcome.seconds > 0


@pytest.mark.long
def test_peak_memory_is_the_operating_systems():
    before = peak_bytes()
    held = np.ones(before // 8 + (50 << 20) // 8)
    assert peak_bytes() - before > held.nbytes // 2


@pytest.mark.long
def test_a_child_that_fails_says_why():
    with pytest.raises(AfterimageError, match=r"child:nothing failed with exit code 1: .*nothing"):
        in_child("child:nothing")


def test_scores_agree_with_the_packages(tmp_path):
    weights = str(tmp_path / "alex.safetensors")
    scoring.write_weights("alex", weights)
    ours, reference = (
        side(count=3, size=64, net="alex", weights=weights, runs=2)
        for side in (scoring.ours, scoring.reference)
    )
    for name, tolerance in (("psnr", 1e-4), ("ssim", 1e-5), ("lpips", 1e-5)):
        assert ours[name] == pytest.approx(reference[name], abs=tolerance)
    assert len(set(ours["lpips"])) == 6


def test_a_row_of_the_study_is_measured(tmp_path):
    config = run("procedural:20", "transposed")
    result = gpu.epoch([to_dict(config)], str(tmp_path), "cpu")
    assert result["seconds"] > 0 and result["flops"] > 0 and result["train"] == 14
    assert len(gpu.published(100)) == 15


@pytest.mark.long
def test_one_failing_measurement_leaves_the_others(tmp_path, monkeypatch):
    def fails(settings):
        raise AfterimageError("the disk is full")

    monkeypatch.setitem(MEASUREMENTS, "startup", fails)
    monkeypatch.setitem(MEASUREMENTS, "gpu", lambda settings: [Row("gpu", "", ours=[1.0])])
    path = tmp_path / "bench.json"
    rows, facts = run_bench(["startup", "gpu"], settings=Settings(tmp_path), json_path=path)
    assert rows[0].unavailable == "the disk is full" and rows[1].ours == [1.0]
    assert "load average" in rows[1].notes[-1]
    written = json.loads(path.read_text())
    assert written["machine"]["cores"] == facts["cores"] and len(written["rows"]) == 2


def test_quick_begins_nothing_after_its_time_and_says_what_is_left(tmp_path, monkeypatch, capsys):
    def here(*_, **__):
        return Outcome({"precision": "32-true", "narrow_attention": "compiled"}, 0.0, 0)

    def slow(settings):
        yield Row("together-linear", "first", "s", ours=[1.0], goal=Goal("at most", 2.0))
        monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + bench.QUICK_SECONDS)
        yield Row(
            "together-wavelet", "what was begun is measured", "s", ours=[3.0], goal=Goal("at most", 2.0)
        )
        raise AssertionError("it should not have been begun")

    monkeypatch.setattr(bench, "in_child", here)
    for name in bench.QUICK_ORDER[: bench.QUICK_ORDER.index("together")]:
        monkeypatch.setitem(
            MEASUREMENTS, name, lambda settings, name=name: [Row(name, "", unavailable="skipped")]
        )
    monkeypatch.setitem(MEASUREMENTS, "together", slow)
    monkeypatch.chdir(tmp_path)
    main(["--quick", "--json", "bench.json"])
    out = capsys.readouterr().out
    told = [line for line in out.splitlines() if line.startswith("together-") and ": ours" in line]
    assert told == [
        "together-linear: ours 1 s, goal at most 2: yes", "together-wavelet: ours 3 s, goal at most 2: NO"
    ]  # fmt: skip
    assert out.index(told[0]) < out.index("ours against"), "printed as it ended"
    left = list(bench.QUICK_ORDER[bench.QUICK_ORDER.index("together") :])
    assert json.loads((tmp_path / "bench.json").read_text())["machine"]["left_out"] == left
    assert f"were over: {', '.join(left)};" in out
    assert set(bench.QUICK_ORDER) == set(MEASUREMENTS) - set(bench.ON_REQUEST)


@pytest.mark.long
def test_a_measurement_that_is_stopped_keeps_what_it_had(tmp_path, monkeypatch):
    def stopped(settings):
        yield Row("gpu", "first", ours=[1.0])
        raise KeyboardInterrupt

    monkeypatch.setitem(MEASUREMENTS, "gpu", stopped)
    path = tmp_path / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        run_bench(["gpu"], settings=Settings(tmp_path), json_path=path)
    assert [row["what"] for row in json.loads(path.read_text())["rows"]] == ["first"]


def test_unknown_measurements_are_named(tmp_path, capsys):
    with pytest.raises(AfterimageError, match="did you mean 'memory'"):
        run_bench(["memry"], settings=Settings(tmp_path))
    main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(MEASUREMENTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "nan"], "seconds must be greater than 0"),
        (["--json", "/dev/null/x.json"], "--json /dev/null: /dev/null is a file"),
    ],
)
def test_settings_outside_their_limits_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["time-to-quality", "search", "decoders"])
def test_what_needs_photographs_says_so(name, tmp_path):
    with pytest.raises(AfterimageError, match="needs photographs: --data"):
        list(MEASUREMENTS[name](Settings(tmp_path)))


def test_the_search_is_timed_until_it_is_as_near_as_the_plain_one(originals, tmp_path, monkeypatch):
    from benchmarks import search

    monkeypatch.setattr(search, "PASSES", 8)
    config = replace(run(originals, "linear"), lpips="squeeze")
    try:
        row = search._row(Settings(tmp_path, quick=True), "search", Goal("ratio", 2.0), config)
    except AfterimageError as error:
        pytest.skip(f"LPIPS is not there: {error}")
    assert "the plain search comes to" in row.notes[0]
    if row.unavailable:
        assert "ours does not get there" in row.unavailable
    else:
        assert row.ours[0] > 0 and row.reference[0] > 0 and "ends at" in row.notes[1]
