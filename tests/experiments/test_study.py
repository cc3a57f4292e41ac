import json
import re
from dataclasses import replace

import pytest
import torch

from afterimage.analysis.inversion.best_estimate import corrector_training_macs
from afterimage.config import (
    RANDOM_WEIGHTS,
    AfterimageError,
    DataConfig,
    DecoderConfig,
    RecipeConfig,
    RunConfig,
    load_toml,
)
from afterimage.config.inversion import EstimateConfig, InvertConfig
from afterimage.config.study import RowConfig, StudyConfig, load_study, shipped, study_from_models
from afterimage.data.dataset import load_data
from afterimage.experiments import cost
from afterimage.experiments.cost import estimate_cost
from afterimage.experiments.study import expand_study, run_study
from afterimage.models.reconstructor import build_feature_decoder
from afterimage.report.write import write_report
from afterimage.training.checkpoint import load_reconstructor
from test_decoders import PUBLISHED

MODEL = "test_resnet.r160_in1k"
SMALL = StudyConfig(
    "Small",
    sources=(f"{MODEL}:layer1", f"{MODEL}:layer2"),
    decoders=(DecoderConfig("linear"), DecoderConfig("transposed")),
    weights="random",
    data=DataConfig("procedural:8", test="procedural:3", resize=64, crop=64),
    recipe=RecipeConfig(epochs=2, batch_size=4),
)


@pytest.mark.parametrize("name", shipped())
def test_shipped_studies_resolve(name):
    study = load_study(name)
    assert study.title
    elsewhere = name.startswith("modern") or name == "atlas"  # in test_modern_encoders.py
    if study.missing_weights == "error" and not elsewhere:
        assert all(":" in source for config in expand_study(study) for source in config.sources)


def test_the_published_study_is_the_published_one():
    configs = expand_study(load_study("published"))
    assert len(configs) == 15
    rows = {config.sources[0]: config for config in configs if config.decoder.name == "attention"}
    assert len(rows) == 14
    sizes = {one.config.sources[0]: one.parameters for one in map(estimate_cost, configs[:14])}
    for source, _, parameters in PUBLISHED:
        assert sizes[source] == parameters
    fusion = configs[-1]
    assert (fusion.fusion.name, fusion.fusion.channels, fusion.fusion.size) == ("attention", 256, 28)
    assert (fusion.decoder.name, fusion.recipe.loss, fusion.recipe.epochs) == (
        "transposed",
        "0.5*mse + 0.5*lpips",
        30,
    )


def test_globs_lists_and_rows():
    study = StudyConfig(
        sources=(f"{MODEL}:layer[12]",),
        decoders=(DecoderConfig("linear"), DecoderConfig("transposed", parameters=100_000)),
        seeds=(1, 2),
        rows=(RowConfig((f"{MODEL}:layer3",), (DecoderConfig("linear"),), recipe={"epochs": 1}),),
    )
    configs = expand_study(study)
    assert len(configs) == 2 * 2 * 2 + 2
    assert configs[-1].recipe.epochs == 1 and configs[0].recipe.epochs == 30
    assert {config.sources for config in configs} == {(f"{MODEL}:layer{i}",) for i in (1, 2, 3)}


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (StudyConfig(sources=(f"{MODEL}:stage*",)), "matches no layer of test_resnet.*Layers: .*layer1"),
        (StudyConfig(sources=("resnt18:layer*",)), "did you mean 'resnet18'"),
        (
            StudyConfig(rows=(RowConfig((f"{MODEL}:layer1",), recipe={"epoch": 1}),)),
            r"rows\[0\]\.recipe\.epoch",
        ),
    ],
)
def test_what_does_not_resolve_is_named(study, message):
    with pytest.raises(AfterimageError, match=message):
        expand_study(study)


def test_unknown_studies_are_named(tmp_path):
    with pytest.raises(AfterimageError, match="did you mean 'published'"):
        load_study("publish")
    (tmp_path / "mine.toml").write_text("sources = ['a:b']\nseed = 3\n")
    with pytest.raises(AfterimageError, match=r"mine\.toml: unknown setting 'seed'; did you mean 'seeds'"):
        load_study(str(tmp_path / "mine.toml"))
    with pytest.raises(AfterimageError, match="needs sources"):
        StudyConfig()


def test_adding_a_row_computes_only_that_row(tmp_path):
    options = {"cache": tmp_path / "cache", "accelerator": "cpu"}
    runs, failures = run_study(SMALL, tmp_path / "study", **options)
    assert not failures and len(runs) == 4 + 6 and {run.state for run in runs} == {"done"}
    assert load_toml(StudyConfig, tmp_path / "study" / "study.toml") == SMALL
    stamps = {run.name: run.file("summary.json").stat().st_mtime_ns for run in runs}
    larger = replace(SMALL, sources=(*SMALL.sources, f"{MODEL}:layer3"))
    more, _ = run_study(larger, tmp_path / "study", **options)
    assert {run.name for run in more} > stamps.keys() and len(more) == len(runs) + 2
    assert all(
        run.file("summary.json").stat().st_mtime_ns == stamps[run.name] for run in more if run.name in stamps
    )


def test_a_failing_run_leaves_the_others_alone(tmp_path):
    from dataclasses import replace

    bad = RowConfig((f"{MODEL}:layer1",), (DecoderConfig("transposed"),), recipe={"learning_rate": 1e30})
    study = replace(SMALL, rows=(bad,), baselines=False)
    runs, failures = run_study(study, tmp_path, cache=tmp_path / "cache", accelerator="cpu")
    states = [run.state for run in runs]
    assert states.count("failed") == 1 and states.count("done") == 4 and len(failures) == 1
    (failed,) = [run for run in runs if run.state == "failed"]
    assert "loss is" in json.loads(failed.file("status.json").read_text())["error"]


def test_bounds_are_found_once_on_the_first_test_images_and_reported_beside_the_decoder(tmp_path, no_figures):
    study = replace(SMALL, sources=(f"{MODEL}:layer1", f"{MODEL}:layer2"), baselines=False, invert=2)
    search, learned = InvertConfig(steps=6, held_out=3), EstimateConfig(images=4, steps=3, channels=4)
    study = replace(study, decoders=(DecoderConfig("linear"),), inversion=search, estimate=learned)
    options = {"cache": tmp_path / "cache", "accelerator": "cpu"}
    runs, failures = run_study(study, tmp_path / "study", **options)
    assert not failures
    decoders, bounds = ([run for run in runs if run.result.kind == kind] for kind in ("decoder", "inversion"))
    answers = [bound.result.config.result_kind for bound in bounds]
    assert len(decoders) == 2 and answers == ["refined", "estimate"] * 2
    for decoder, bound in zip([run for run in decoders for _ in range(2)], bounds, strict=True):
        result = bound.result
        assert result.inversion.start == decoder.name
        first = decoder.result.per_image[:2]
        assert [row["id"] for row in result.per_image] == [row["id"] for row in first]
        alone = result.inversion.decoder_alone.scores["psnr"].mean
        assert alone == pytest.approx(sum(row["psnr"] for row in first) / 2, abs=1e-4)
        reconstructor = load_reconstructor(decoder)
        with torch.no_grad():
            images = load_data(decoder.config.data).test.crops([0, 1])
            wanted = reconstructor.encoders(images)[0].clone()
            there = reconstructor.encoders(reconstructor(images))[0]
        distance = (there - wanted).square().flatten(1).sum(1) / wanted.square().flatten(1).sum(1)
        assert result.inversion.decoder_alone.feature_loss == pytest.approx(distance.mean().item(), rel=1e-3)

    stamps = [bound.file("summary.json").stat().st_mtime_ns for bound in bounds]
    again, _ = run_study(study, tmp_path / "study", **options)
    assert [run.file("summary.json").stat().st_mtime_ns for run in again if run in bounds] == stamps

    written = write_report(again, tmp_path / "report", title="Bounds")
    text = written["report.md"].read_text()
    section = text[
        text.index("## What a layer keeps, and what its decoder missed") : text.index("## Results")
    ]
    for bound in bounds:
        result = bound.result
        alone = result.inversion.decoder_alone.scores["psnr"].mean
        assert f"| decoder linear | {alone:.2f} \\[" in section
        name = "best estimate" if result.config.estimate else "most consistent"
        assert f"| {name} | {result.scores['psnr'].mean:.2f} \\[" in section


def test_a_bound_that_cannot_be_found_ends_itself_alone(tmp_path, monkeypatch):
    from afterimage.experiments import study as room

    study = replace(SMALL, baselines=False, invert=1, decoders=(DecoderConfig("linear"),))

    def failing(run, *_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(room, "invert_run", failing)
    runs, failures = run_study(study, tmp_path, cache=tmp_path / "cache", accelerator="cpu")
    assert {run.state for run in runs} == {"done"} and len(failures) == len(runs)
    assert all(
        f"the measured bound of {run.name}" in str(error) for run, error in zip(runs, failures, strict=True)
    )


@pytest.mark.parametrize("kind", RANDOM_WEIGHTS)
def test_random_weights_only_where_the_study_says_so(kind, monkeypatch):
    from dataclasses import replace

    from afterimage.models.encoders.providers.timm import TimmNetwork

    def nothing(network, weights="pretrained"):
        raise AfterimageError(f"no weights for {network.name}")

    monkeypatch.setattr(TimmNetwork, "find_weights", nothing)
    study = replace(SMALL, weights="pretrained", missing_weights=kind)
    said = []
    configs = expand_study(study, lambda what, *_: said.append(what))
    assert {config.weights for config in configs} == {kind} and all(kind in config.name for config in configs)
    assert len(said) == 1 and f"{kind.upper()} weights" in said[0] and MODEL in said[0]
    for asked in RANDOM_WEIGHTS:  # a control that was asked for is not missing
        assert {config.weights for config in expand_study(replace(study, weights=asked))} == {asked}
    assert {config.weights for config in expand_study(replace(study, missing_weights="error"))} == {
        "pretrained"
    }


def test_a_study_without_a_file():
    study = study_from_models([MODEL], ["layer*"], ["linear"])
    assert [config.sources[0] for config in expand_study(study)] == [
        f"{MODEL}:layer{i}" for i in (1, 2, 3, 4)
    ]


def test_a_plan_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plans = list(map(estimate_cost, expand_study(SMALL)))
    assert [one.parameters > 0 and one.seconds > 0 and one.bytes > 0 for one in plans] == [True] * 4
    assert [one.epochs for one in plans] == [1, 2, 1, 2]  # `linear` is solved in closed form
    assert not list(tmp_path.iterdir())


def test_a_plan_counts_attention_and_the_sums_of_a_closed_form():
    """By the formulas: n keys for each of n queries, twice; X'X of training and validation in float64."""
    sources = ("test_resnet.r160_in1k:layer1",)
    data = DataConfig("procedural:20", resize=128, crop=128)
    config = RunConfig(sources, "random", decoder=DecoderConfig("attention", options={"depth": 1}), data=data)
    spec = estimate_cost(config).specs[0]
    n = spec.height * spec.width
    assert n >= 512  # where other code than the built-in kernel may attend
    whole, none = (
        estimate_cost(
            replace(config, decoder=DecoderConfig("attention", options={"depth": depth}))
        ).decoder_macs
        for depth in (1, 0)
    )
    assert whole - none > 2 * n * n * spec.channels
    head = build_feature_decoder(config, [spec])
    assert head.macs([spec]) == whole and head.training
    linear = estimate_cost(replace(config, decoder=DecoderConfig("linear")))
    assert linear.bytes > 2 * 8 * (9 * spec.channels + 1) ** 2
    decoder = build_feature_decoder(replace(config, decoder=DecoderConfig("linear")), [spec]).decoder
    rows, inputs = 16 * n, 9 * spec.channels + 1  # every location of 16 images, seen once or twice
    assert rows * inputs**2 // 2 < decoder.fit_macs(16) < 8 * rows * inputs**2 + 3 * inputs**3


def test_the_plan_says_what_measured_bounds_cost(capsys, monkeypatch):
    from afterimage.cli.study import print_plan

    study = replace(SMALL, baselines=False, invert=3, inversion=InvertConfig(steps=50, held_out=5))
    configs = expand_study(study)[:1]
    monkeypatch.setattr(cost, "macs_per_second", lambda: 1e9)
    seconds = []
    for learn, said in (
        (7, "and 7 to learn best estimates from"),
        (0, "and 5 to choose the number of passes on"),
    ):
        print_plan(configs, replace(study, estimate=EstimateConfig(images=learn)))
        out = " ".join(capsys.readouterr().out.split())
        assert f"measured bounds: 3 images of each run {said}, at most 50 passes" in out
        assert "1 run, none started" in out and "1 group of runs" in out
        minutes, rest = re.search(r"backward each: ~(?:(\d+):)?(\d+)", out).groups()
        seconds.append(60 * int(minutes or 0) + int(rest))
    # Two more images are refined, and the estimates' network learns.
    assert seconds[0] - seconds[1] > corrector_training_macs(EstimateConfig(images=7), (64, 64)) / 1e9
    print_plan(configs, replace(study, invert=0))
    assert "measured bounds" not in capsys.readouterr().out
