"""The study's answers from run folders whose scores follow a known law."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from afterimage.config import (
    RANDOM_WEIGHTS,
    AfterimageError,
    DataConfig,
    DecoderConfig,
    FusionConfig,
    RecipeConfig,
)
from afterimage.report import rows as report
from afterimage.report.findings import build_findings
from afterimage.report.hypotheses import ahead
from afterimage.report.statistics.hypotheses import (
    architectures_differ,
    falls_with_depth,
    resolution_dominates,
)
from afterimage.report.statistics.paired_tests import compare, holm_correct
from afterimage.report.statistics.rows import PooledRow, Setting, group_rows
from afterimage.runs.files import write_csv
from afterimage.runs.run import scan
from simulated_runs import edit
from simulated_study import (
    SHAPES,
    analyse,
    sample_images,
    scores,
    write_baseline,
    write_published_study,
    write_run,
)

LAYERS = [f"resnet34.tv_in1k:layer{i}" for i in range(1, 5)]


def written(findings):
    """All that findings say, in one text."""
    cells = [cell for f in findings for table in f.tables for line in table.rows for cell in line]
    return "\n".join([*(text for f in findings for text in (f.verdict, *f.paragraphs)), *cells])


def load_rows(runs):
    """Run folders as rows, merged, and what was left out."""
    return group_rows([report.Row.from_run(run) for run in runs])


def row(quality, name="model layer1", *, order=1, side=14, channels=64, parameters=1000, metric="psnr"):
    """A row with the given scores, without a run folder."""
    encoder, _, layer = name.partition(" ")
    values = dict(zip(sample_images(len(quality)), np.asarray(quality, dtype=float).tolist(), strict=True))
    return PooledRow(
        name=name,
        encoder=encoder,
        layer=layer,
        setting=Setting("linear"),
        sources=(name.replace(" ", ":"),),
        baseline="",
        data="d",
        order=order,
        channels=channels,
        height=side,
        width=side,
        values=channels * side * side,
        parameters=parameters,
        seconds=60.0,
        runs=(name,),
        scores={metric: values},
        seed_means={metric: (float(np.mean(quality)),)},
    )


def layered(means, random, *, count=60, noise=1.0, encoder="model", side=14, metric="psnr"):
    """Rows of one encoder: what the image brings is common to its layers, the noise is not."""
    common = random.normal(0, 3, count)
    return [
        row(
            mean + common + random.normal(0, noise, count),
            f"{encoder} layer{i}",
            order=i,
            side=side,
            metric=metric,
        )
        for i, mean in enumerate(means)
    ]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return analyse(write_published_study(tmp_path_factory.mktemp("study")))


def one(results, metric="psnr", setting="attention"):
    (result,) = [r for r in results if r.metric == metric and r.setting == setting]
    return result


def test_published_means_support_falling_with_depth(study):
    result = one(study.depth)
    assert result.verdict == "supported"
    assert [e.encoder for e in result.encoders] == ["resnet34", "vgg16", "vit_base_patch16_224"]
    resnet = result.encoders[0]
    assert resnet.tau == -1 and resnet.tau_p == pytest.approx(2 / 24)
    assert resnet.steps[0].difference.low < 14.04 - 14.32 < resnet.steps[0].difference.high
    assert resnet.tau_within.high < -0.8 and 0 < resnet.monotone < 100


def test_lpips_rises_where_quality_falls(study):
    result = one(study.depth, "lpips")
    assert result.verdict == "supported"
    assert all(
        step.difference.estimate > 0 and step.better == "b" for e in result.encoders for step in e.steps
    )
    assert result.encoders[0].tau == -1


def test_matched_resolution_pairs_of_the_study(study):
    result = one(study.resolution)
    sizes = {(p.height, p.comparison.a, p.comparison.b) for p in result.pairs if not p.same_encoder}
    assert {(56, "resnet34 layer1", "vgg16 block2"), (28, "resnet34 layer2", "vgg16 block3")} < sizes
    assert {(14, "resnet34 layer3", "vgg16 block4"), (7, "resnet34 layer4", "vgg16 block5")} < sizes
    assert sum(p.same_encoder for p in result.pairs) == 3
    assert result.correlation.estimate > 0.8 and result.correlation_p < 0.05
    assert result.partial is not None and 0.5 < result.share.estimate < 0.62


def test_decoder_size_may_explain_every_difference_of_the_study(study):
    result = one(study.architectures)
    assert result.verdict == "undecided" and "0 of them beyond" in result.reason
    assert [p.comparison.matched_capacity for p in result.pairs] == [False] * 5 + [True]
    for pair in result.pairs:
        c = pair.comparison
        assert c.wins_a + c.wins_b == 100 == c.difference.count
        assert not set(c.won_a) & set(c.won_b)


def test_degradation_and_best_layer(study):
    vgg = next(d for d in study.degradation if d.encoder == "vgg16" and d.metric == "psnr")
    assert (vgg.best, vgg.worst) == ("block1", "block5")
    assert vgg.drop.difference.estimate == pytest.approx(12.68 - 14.45, abs=0.1)
    assert vgg.percent.low < -12.2 < vgg.percent.high
    assert vgg.runner_up.b == "vgg16 block2" and vgg.runner_up.better == "a"


def test_efficiency_counts_from_the_mean_colour(study):
    layer1 = next(e for e in study.efficiency if e.name == "resnet34 layer1" and e.metric == "psnr")
    assert layer1.gain == pytest.approx(4.3, abs=0.15)
    assert layer1.per_minute == pytest.approx(layer1.gain / 2)
    assert layer1.per_million_parameters == pytest.approx(layer1.gain / 0.250147)
    assert layer1.per_thousand_values == pytest.approx(layer1.gain / (64 * 56 * 56 / 1000))
    lpips = next(e for e in study.efficiency if e.name == "resnet34 layer1" and e.metric == "lpips")
    assert lpips.gain > 0


def test_a_training_time_that_one_seed_lacks_is_unknown(tmp_path):
    """A decoder that was trained elsewhere took 0 s here, which says nothing of its training."""
    own, elsewhere = (write_run(tmp_path, LAYERS[0], scores(20), seed=seed) for seed in (1, 2))
    known = analyse([own, elsewhere]).efficiency[0]
    edit(elsewhere, training__images_seen=0, training__seconds=0.0)
    unknown = analyse([own, elsewhere]).efficiency[0]
    assert known.per_minute == pytest.approx(known.gain / 2)
    assert unknown.per_minute is None and unknown.per_thousand_values == known.per_thousand_values
    assert (
        report.Row.from_run(own).train_seconds == 120 and report.Row.from_run(elsewhere).train_seconds is None
    )


def test_everything_is_json_and_has_words(study):
    answers = json.loads(json.dumps(study.as_dict(), allow_nan=False))
    assert answers["depth"][0]["encoders"][0]["steps"][0]["better"] == "b"
    found = build_findings(study)
    assert [f.title[:2] for f in found[:3]] == ["H1", "H2", "H3"] and "nan" not in written(found).split()
    assert all(text.endswith(".") for f in found for text in f.paragraphs)


def test_words_hold_the_numbers(study):
    resnet = one(study.depth).encoders[0]
    told = written(build_findings(study))
    low, high = resnet.steps[0].difference.low, resnet.steps[0].difference.high
    assert f"−{-resnet.steps[0].difference.estimate:.2f} dB [−{-low:.2f}, −{-high:.2f}]" in told
    assert f"{resnet.monotone} of 100" in told


def test_same_runs_and_seed_give_the_same_answers(tmp_path):
    runs = [write_run(tmp_path, s, scores(20 - i, seed=i)) for i, s in enumerate(LAYERS)]
    first = analyse(runs).as_dict()
    assert analyse(runs[::-1]).as_dict() == first
    for run in runs:
        write_csv(run.file("scores.csv"), run.result.per_image[::-1])
    assert analyse(runs).as_dict() == first


def test_no_step_is_found_in_95_of_100_studies_without_steps():
    random = np.random.default_rng(23)
    studies, wrong = 200, 0
    for _ in range(studies):
        rows = layered([20] * 5, random, count=30, metric="ssim") + layered(
            [20] * 4, random, count=30, encoder="other", metric="ssim"
        )
        result = falls_with_depth(rows, "ssim")
        wrong += any(step.better for e in result.encoders for step in e.steps)
    assert 0.01 <= wrong / studies <= 0.095


@pytest.mark.parametrize(
    ("means", "verdict"),
    [
        ([24, 23, 22, 21], "supported"),
        ([24, 23, 23.6, 21], "contradicted"),
        ([24, 23, 23.02, 21], "undecided"),
    ],
)
def test_depth_finds_what_is_there(means, verdict):
    rows = layered(means, np.random.default_rng(2), noise=0.2)
    assert falls_with_depth(rows, "psnr").verdict == verdict


@pytest.mark.parametrize(
    ("means", "verdict"), [([0.2, 0.3, 0.4], "supported"), ([0.4, 0.3, 0.2], "contradicted")]
)
def test_rising_lpips_is_falling_quality(means, verdict):
    rows = layered(means, np.random.default_rng(2), noise=0.01, metric="lpips")
    result = falls_with_depth(rows, "lpips")
    assert result.verdict == verdict and result.encoders[0].tau == (-1 if verdict == "supported" else 1)


def test_a_negligible_rise_contradicts_nothing():
    rows = layered([24, 23, 23.05, 21], np.random.default_rng(2), noise=0.02)
    result = falls_with_depth(rows, "psnr")
    rise = result.encoders[0].steps[1]
    assert rise.p_holm < 0.001 and rise.negligible and rise.better is None
    assert result.verdict == "undecided"
    assert ahead(rise) == "negligibly different from"


def resolution_study(random, quality, *, per_size=3):
    """`per_size` encoders at four sizes; quality is a function of (size index, encoder index)."""
    rows = []
    for e in range(per_size):
        for i, side in enumerate((56, 28, 14, 7)):
            scores = quality(i, e) + random.normal(0, 0.1, 60)
            rows.append(
                row(scores, f"model{e} layer{i}", order=i, side=side, channels=64 * (e + 1) * (i + 2))
            )
    return rows


def test_resolution_dominates_where_it_alone_matters():
    rows = resolution_study(np.random.default_rng(1), lambda i, e: 25 - 2 * i)
    result = resolution_dominates(rows, "psnr")
    assert result.verdict == "supported" and result.share.estimate > 0.95
    assert len(result.pairs) == 4 * 3 and not any(p.comparison.better for p in result.pairs)


def test_resolution_does_not_dominate_where_the_encoder_matters():
    rows = resolution_study(np.random.default_rng(1), lambda i, e: 25 - 0.3 * i - 4 * e)
    result = resolution_dominates(rows, "psnr")
    assert result.verdict == "contradicted" and result.share.high < 0.5
    inverse = resolution_study(np.random.default_rng(1), lambda i, e: 20 + 2 * i)
    assert "quality falls" in resolution_dominates(inverse, "psnr").reason


def test_resolution_needs_matched_layers_and_channels_that_vary():
    rows = layered([25, 23, 21, 19, 17], np.random.default_rng(0))
    rows = [replace(r, height=56 >> i, width=56 >> i, channels=64 << i) for i, r in enumerate(rows)]
    result = resolution_dominates(rows, "psnr")
    assert result.verdict == "undecided" and result.partial is None and result.share is None
    assert "cannot be told apart" in result.reason and "no two layers" in result.reason
    four = resolution_dominates([replace(r, channels=64) for r in rows[:4]], "psnr")
    assert four.partial is None and "four layers are too few" in four.reason
    assert "told apart" not in four.reason
    short = resolution_dominates(rows[:3], "psnr")
    assert short.verdict == "not testable" and "four or more" in short.reason


def two_encoders(gap, *, parameters=(1000, 1000), noise=0.1):
    random = np.random.default_rng(9)
    common = random.normal(20, 3, 60)
    return [
        row(common + random.normal(0, noise, 60), "first layer1", parameters=parameters[0]),
        row(common + gap + random.normal(0, noise, 60), "second layer1", parameters=parameters[1]),
    ]


@pytest.mark.parametrize(
    ("gap", "parameters", "verdict"),
    [
        (1.0, (1000, 1040), "supported"),
        (1.0, (1000, 500), "supported"),
        (1.0, (1000, 2000), "undecided"),
        (0.0, (1000, 1000), "contradicted"),
        (0.09, (1000, 1000), "undecided"),
    ],
)
def test_architectures_differ_where_decoder_size_cannot_explain_it(gap, parameters, verdict):
    result = architectures_differ(two_encoders(gap, parameters=parameters), "psnr")
    assert result.verdict == verdict


def test_only_the_first_layer_of_a_size_speaks_for_its_encoder():
    rows = two_encoders(0.0)
    late = replace(
        rows[1],
        name="second layer9",
        layer="layer9",
        order=9,
        scores={"psnr": {k: 99.0 for k in sample_images(60)}},
    )
    result = architectures_differ([late, *rows], "psnr")
    assert [p.comparison.b for p in result.pairs] == ["second layer1"]


def test_untestable_says_what_it_needs(tmp_path):
    analysis = analyse([write_run(tmp_path, LAYERS[0], scores(20))])
    for results in (analysis.depth, analysis.resolution, analysis.architectures):
        assert {r.verdict for r in results} == {"not testable"}
        assert all(r.reason.startswith("needs") for r in results)
    assert "not testable" in written(build_findings(analysis))


def test_comparison_is_antisymmetric():
    a, b = two_encoders(0.7)
    one_way, other = compare(a, b, "psnr"), compare(b, a, "psnr")
    assert one_way.difference.low == pytest.approx(-other.difference.high)
    assert (one_way.wins_a, one_way.won_a) == (other.wins_b, other.won_b)
    assert (one_way.better, other.better) == ("b", "a") and one_way.p == pytest.approx(other.p)


def test_comparison_agrees_with_scipys_paired_t_test():
    a, b = two_encoders(0.02)
    expected = stats.ttest_rel(list(a.scores["psnr"].values()), list(b.scores["psnr"].values()))
    assert compare(a, b, "psnr").p == pytest.approx(expected.pvalue)
    same = compare(a, a, "psnr")
    assert same.p == 1 and same.better is None and not same.explained_by_capacity


def test_comparison_pairs_common_images_only():
    a, b = two_encoders(0.5)
    b = replace(b, scores={"psnr": {k: v for k, v in list(b.scores["psnr"].items())[:40]} | {"other": 99.0}})
    assert compare(a, b, "psnr").difference.count == 40
    with pytest.raises(AfterimageError, match="share 0 images"):
        compare(a, replace(b, scores={"psnr": {"other": 1.0}}), "psnr")


def test_correction_only_ever_weakens():
    family = [compare(*two_encoders(gap), "psnr") for gap in (0.01, 0.02, 0.03, 1.0)]
    assert all(after.p_holm >= before.p for before, after in zip(family, holm_correct(family), strict=True))


def test_seeds_are_averaged_and_their_spread_is_told(tmp_path):
    runs = [write_run(tmp_path, LAYERS[0], scores(20 + seed, noise=0), seed=seed) for seed in (0, 1, 2)]
    analysis = analyse(runs)
    (row,) = analysis.rows
    assert len(row.runs) == 3 and row.mean("psnr") == pytest.approx(21)
    score = analysis.scores[0]
    assert score.seeds == 3 and score.seed_spread == pytest.approx(1.0)


def test_settings_are_told_apart_by_what_differs(tmp_path):
    variants = [
        {},
        {"decoder": DecoderConfig("attention", parameters=4_000_000)},
        {"recipe": RecipeConfig(epochs=5)},
        {"recipe": RecipeConfig(loss="l1")},
        {"weights": "random"},
        {"weights": "random-init"},
    ]
    rows, notes = load_rows([write_run(tmp_path, LAYERS[0], scores(20), **v) for v in variants])
    assert notes == []
    assert sorted(r.setting for r in rows) == [
        "attention (epochs 30)",
        "attention (epochs 5)",
        "attention at 4 M parameters",
        "attention, RANDOM weights",
        "attention, RANDOM-INIT weights",
        "attention, loss l1",
    ]


def test_recipes_that_vary_between_layers_do_not_split_a_setting(tmp_path):
    runs = [
        write_run(tmp_path, s, scores(20 - i), recipe=RecipeConfig(batch_size=2 + i))
        for i, s in enumerate(LAYERS)
    ]
    rows, _ = load_rows(runs)
    assert {r.setting for r in rows} == {"attention"}


def test_decoders_and_fusion_are_ranked(tmp_path):
    for name, mean in (("linear", 20), ("attention", 21), ("residual", 24)):
        write_run(tmp_path, LAYERS[0], scores(mean, seed=mean), decoder=DecoderConfig(name))
    write_run(tmp_path, LAYERS[1], scores(19, seed=7), decoder=DecoderConfig("residual"))
    fusion = FusionConfig("concat", size=56)
    fused = (LAYERS[0], LAYERS[1])
    write_run(tmp_path, fused, scores(25, seed=8), decoder=DecoderConfig("residual"), fusion=fusion)
    analysis = analyse(scan(tmp_path))
    ranking = analysis.decoders[0]
    assert ranking.settings == ("residual", "attention", "linear") and ranking.name == "resnet34 layer1"
    assert len(ranking.pairs) == 3 and all(c.better == "a" for c in ranking.pairs)
    best = next(c for c in analysis.fusions if c.metric == "psnr")
    assert best.a.startswith("concat fusion at 56x56") and best.b == "resnet34 layer1 with residual"
    assert best.better == "a" and best.difference.estimate == pytest.approx(1, abs=0.2)
    assert all("fusion" not in e.encoder for d in analysis.depth for e in d.encoders)


def test_metrics_that_disagree_are_pointed_out(tmp_path):
    sources = ("resnet34.tv_in1k:layer4", "vgg16.tv_in1k:block5")
    tables = [scores(20, seed=1), scores(22, seed=2)]
    for line in tables[0]:
        line["lpips"] -= 0.2
    runs = [write_run(tmp_path, s, t, parameters=1000) for s, t in zip(sources, tables, strict=True)]
    assert "the metrics disagree" in written(build_findings(analyse(runs)))


def test_missing_lpips_leaves_the_other_metrics(tmp_path):
    rows = [line | {"lpips": None} for line in scores(20)]
    analysis = analyse([write_run(tmp_path, s, rows) for s in LAYERS])
    assert {r.metric for r in analysis.depth} == {"psnr", "ssim"}


def test_lpips_of_different_networks_is_not_compared(tmp_path):
    runs = [
        write_run(tmp_path, s, scores(20), lpips_net=n) for s, n in zip(LAYERS, ("alex", "vgg"), strict=False)
    ]
    analysis = analyse(runs)
    assert {r.metric for r in analysis.depth} == {"psnr", "ssim"}
    assert "alex, vgg" in analysis.notes[0]


def test_single_images_are_left_out_by_name(tmp_path):
    single, whole = write_run(tmp_path, LAYERS[0], scores(20)[:1]), write_run(tmp_path, LAYERS[1], scores(20))
    rows, notes = load_rows([single, whole])
    assert [r.layer for r in rows] == ["layer2"]
    assert single.name in notes[0]


def test_no_runs_at_all_is_said(tmp_path):
    (found,) = build_findings(analyse([]))
    assert found.paragraphs == ("No finished decoder with scores of 2 images or more: nothing to compare.",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"psnr": float("inf")}, "not a finite"),
        ({"psnr": "good"}, "not a finite"),
        ({"id": "image-001"}, "twice"),
    ],
)
def test_scores_that_cannot_be_are_errors_that_name_the_file(tmp_path, change, message):
    rows = scores(20)
    run = write_run(tmp_path, LAYERS[0], rows)
    write_csv(run.file("scores.csv"), [rows[0] | change, *rows[1:]])
    with pytest.raises(AfterimageError, match=message) as error:
        analyse([run])
    assert str(run.file("scores.csv")) in str(error.value)


def test_models_of_one_architecture_keep_their_tags(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "resnet34.a1_in1k:layer1", SHAPES[LAYERS[0]])
    runs = [write_run(tmp_path, s, scores(20)) for s in (LAYERS[0], "resnet34.a1_in1k:layer1")]
    assert sorted(r.encoder for r in load_rows(runs)[0]) == ["resnet34.a1_in1k", "resnet34.tv_in1k"]


def test_baseline_rows_have_intervals_but_enter_no_hypothesis(tmp_path):
    runs = [write_run(tmp_path, s, scores(20)) for s in LAYERS[:2]] + [
        write_baseline(tmp_path, "mean", scores(9))
    ]
    analysis = analyse(runs)
    assert "mean" in {s.name for s in analysis.scores}
    assert all("mean" not in r.setting for r in analysis.depth)


def test_untrained_controls_are_in_no_ranking(tmp_path):
    for name, mean in (("linear", 20), ("residual", 22)):
        for layer in LAYERS[:2]:
            write_run(tmp_path, layer, scores(mean, seed=mean), decoder=DecoderConfig(name))
        for weights in RANDOM_WEIGHTS:
            write_run(tmp_path, LAYERS[0], scores(30), decoder=DecoderConfig(name), weights=weights)
    fusion = FusionConfig("concat", size=56)
    write_run(tmp_path, tuple(LAYERS[:2]), scores(25), decoder=DecoderConfig("transposed"), fusion=fusion)
    analysis = analyse(scan(tmp_path))
    assert len(analysis.decoders) == 6 and all(
        d.settings == ("residual", "linear") for d in analysis.decoders
    )
    assert all(c.b == "resnet34 layer1 with residual" for c in analysis.fusions)
    (costs,) = [f for f in build_findings(analysis) if f.title == "What quality costs"]
    assert "Most PSNR" in costs.paragraphs[0] and "RANDOM" not in costs.paragraphs[0]
    for kind in RANDOM_WEIGHTS:
        controls = analyse([run for run in scan(tmp_path) if run.config.weights == kind])
        assert all(f"{kind.upper()} weights" in s for d in controls.decoders for s in d.settings)
        assert controls.decoders


def test_fusions_that_differ_in_channels_have_names_of_their_own(tmp_path):
    write_run(tmp_path, LAYERS[0], scores(20), decoder=DecoderConfig("transposed"))
    for channels, mean in ((64, 21), (256, 23)):
        fusion = FusionConfig("attention", channels=channels)
        write_run(
            tmp_path, tuple(LAYERS[:2]), scores(mean), decoder=DecoderConfig("transposed"), fusion=fusion
        )
    analysis = analyse(scan(tmp_path))
    assert analysis.decoders == ()
    found = {c.a: round(c.difference.estimate) for c in analysis.fusions if c.metric == "psnr"}
    assert {name.partition(" of ")[0]: gain for name, gain in found.items()} == {
        "attention fusion at the finest size, 64 channels,": 1,
        "attention fusion at the finest size, 256 channels,": 3,
    }


def test_a_fusion_is_compared_with_what_is_decoded_alike_also_beside_other_recipes(tmp_path):
    fused = tuple(LAYERS[:2])
    short, long = RecipeConfig(epochs=10), RecipeConfig(epochs=100)
    write_run(tmp_path, LAYERS[0], scores(20), recipe=short)
    write_run(tmp_path, LAYERS[1], scores(19), recipe=short)
    write_run(tmp_path, fused, scores(21), recipe=short, fusion=FusionConfig("concat", size=28))
    write_run(tmp_path, LAYERS[1], scores(23), recipe=long)
    (comparison,) = [c for c in analyse(scan(tmp_path)).fusions if c.metric == "psnr"]
    assert comparison.b == "resnet34 layer1 with attention (epochs 10)" and comparison.better == "a"


def test_a_certain_but_negligible_difference_is_not_called_undecided(tmp_path):
    write_run(tmp_path, LAYERS[0], scores(20, noise=0.01, seed=1))
    write_run(tmp_path, LAYERS[1], scores(19.95, noise=0.01, seed=2))
    (found,) = [d for d in analyse(scan(tmp_path)).degradation if d.metric == "psnr"]
    assert ahead(found.runner_up) == "negligibly different from"


def test_training_sets_of_different_size_compare_on_one_test_set(tmp_path):
    """As images of one test set they are compared; what trained the rows is a setting."""
    for train, mean in ((640, 22), (16, 18)):
        run = write_run(tmp_path, LAYERS[0], scores(mean), data=DataConfig("procedural", limit_train=train))
        edit(run, data__train=train, data__digest=f"{train:064}", data__test_digest="t" * 64)
    edit(write_baseline(tmp_path, "mean", scores(12)), data__test_digest="t" * 64)
    analysis = analyse(scan(tmp_path))
    ranking = analysis.decoders[0]
    assert ranking.settings == ("attention (training images 640)", "attention (training images 16)")
    gains = [e.gain for e in analysis.efficiency if e.metric == "psnr"]
    assert sorted(gains) == pytest.approx([6, 10], abs=0.1)
    # Of another test set there is no mean colour to count from.
    other = write_run(tmp_path, LAYERS[1], scores(20))
    edit(other, data__test_digest="u" * 64)
    gains = {e.name: e.gain for e in analyse(scan(tmp_path)).efficiency if e.metric == "psnr"}
    assert gains["resnet34 layer2"] is None and gains["resnet34 layer1"] is not None


def test_settings_of_data_are_told_where_the_images_are_the_same(tmp_path):
    for crop in (224, 128):
        write_run(tmp_path, LAYERS[0], scores(20), data=DataConfig("procedural", crop=crop))
    rows, _ = load_rows(scan(tmp_path))
    assert {row.setting for row in rows} == {"attention (crop 224)", "attention (crop 128)"}


def test_ties_are_told_as_ties(tmp_path):
    """A residual decoder that never improves on its linear start has the very same scores."""
    for layer, mean in zip(LAYERS[:2], (20, 18), strict=True):
        for name in ("linear", "residual"):
            write_run(tmp_path, layer, scores(mean), decoder=DecoderConfig(name), parameters=1000)
    write_run(tmp_path, LAYERS[0], scores(17, seed=1), decoder=DecoderConfig("transposed"), parameters=1000)
    found = {finding.title: finding for finding in build_findings(analyse(scan(tmp_path)))}
    ranked = found["Decoders on the same features"]
    assert ranked.paragraphs == ("Best mean PSNR on 2 layers or fusions: linear and residual tied on 2.",)
    cells = [line[3] for line in ranked.tables[0].rows]
    assert cells[0] == cells[2] == "0.00 dB [0.00, 0.00] (tie)" and "tie" not in cells[1]
    most = found["What quality costs"].paragraphs[0]
    assert "from resnet34 layer1 (linear) and resnet34 layer1 (residual)" in most
    fall = found["How far decoders fall from the best layer to the worst"].paragraphs[0]
    assert fall == (
        "From the best to the worst layer of an encoder, PSNR changes by 10 %; SSIM changes by 10 %; "
        "LPIPS changes by 10 %."
    )


def test_equal_layers_are_tied(tmp_path):
    for layer in LAYERS[:2]:
        write_run(tmp_path, layer, scores(20))
    (found,) = [d for d in analyse(scan(tmp_path)).degradation if d.metric == "psnr"]
    assert ahead(found.runner_up) == "tied with"
