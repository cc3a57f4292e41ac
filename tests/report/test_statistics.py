"""Intervals, tests and ranks against scipy and against laws whose answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from afterimage.config import AfterimageError
from afterimage.evaluation import intervals
from afterimage.evaluation.intervals import interval, mean_interval
from afterimage.report.rows import Row
from afterimage.report.statistics.paired_tests import (
    epsilon_squared,
    holm,
    kendall_within,
    separable,
    spearman,
    spearman_p,
)
from simulated_study import analyse, write_run

samples = arrays(float, st.integers(3, 40), elements=st.floats(-100, 100, width=32), unique=True)


@pytest.fixture(scope="module")
def skewed():
    return np.random.default_rng(5).gamma(2.0, 1.5, 80)


def scipys(columns, statistic, count):
    """SciPy's interval at the level that ours has for so many images."""
    level = 1 - 2 * intervals._level(count)
    options = {"n_resamples": 40_000, "method": "BCa", "paired": True, "confidence_level": level}
    return stats.bootstrap(columns, statistic, rng=np.random.default_rng(2), **options).confidence_interval


def test_interval_of_a_mean_is_scipys_bca(skewed):
    ours, theirs = mean_interval(skewed), scipys((skewed,), np.mean, 80)
    standard_error = skewed.std(ddof=1) / np.sqrt(len(skewed))
    assert ours.estimate == pytest.approx(skewed.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.1 * standard_error)


def test_interval_of_a_ratio_is_scipys_bca_of_paired_images(skewed):
    table = np.stack([skewed, skewed + np.random.default_rng(1).normal(2, 0.5, 80)], axis=1)
    ours = interval(lambda means: means[..., 1] / means[..., 0], table)
    theirs = scipys(tuple(table.T), lambda a, b, axis=-1: b.mean(axis=axis) / a.mean(axis=axis), 80)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.05 * (ours.high - ours.low))


def test_interval_of_few_normal_values_is_as_long_as_students():
    values = np.random.default_rng(3).normal(0, 1, 12)
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 11, values.mean(), values.std(ddof=1) / np.sqrt(12))
    assert high - low == pytest.approx(found.high - found.low, rel=0.1)


def test_interval_of_two_images_is_students():
    found = mean_interval(np.array([19.0, 21.0]))
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 1, 20, 1))


def test_intervals_of_two_images_stay_in_the_range_of_their_metric(tmp_path):
    """Student's t interval alone would reach from 0.31 to 1.59 for this SSIM, and from -1.69 to 2.00 for this LPIPS."""
    scores = {"psnr": (20.0, 22.0), "ssim": (0.9, 1.0), "lpips": (0.01, 0.3)}
    rows = [{"id": i, **{metric: pair[i == "b"] for metric, pair in scores.items()}} for i in "ab"]
    run = write_run(tmp_path, "resnet34.tv_in1k:layer1", rows)
    of_findings = {score.metric: score.mean for score in analyse([run]).scores}
    assert of_findings == Row.from_run(run).intervals
    ends = {metric: (found.low, found.high) for metric, found in of_findings.items()}
    assert ends["psnr"] == pytest.approx((8.294, 33.706), abs=1e-3)
    assert ends["ssim"] == pytest.approx((0.315, 1.0), abs=1e-3)
    assert ends["lpips"] == pytest.approx((0.0, 1.997), abs=1e-3)


@pytest.mark.parametrize(
    ("count", "skew", "low", "high"),
    [
        *((count, False, 0.93, 0.975) for count in (2, 3, 5, 9)),
        (12, False, 0.92, 0.97),
        (100, False, 0.93, 0.97),
        (100, True, 0.92, 0.97),
    ],
)
def test_intervals_cover_the_truth_about_95_times_in_100(monkeypatch, count, skew, low, high):
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    random = np.random.default_rng(11)
    trials, covered = 1000, 0
    for _ in range(trials):
        values = random.exponential(1.0, count) - 1 if skew else random.normal(0, 1, count)
        found = mean_interval(values)
        covered += found.low <= 0 <= found.high
    assert low <= covered / trials <= high


def test_chunked_resampling_equals_resampling_at_once(monkeypatch):
    values = np.random.default_rng(0).normal(size=40)
    at_once = mean_interval(values)
    monkeypatch.setattr(intervals, "_CHUNK", 1000)
    assert mean_interval(values) == at_once


@settings(max_examples=40, deadline=None)
@given(samples)
def test_interval_of_the_opposite_is_the_mirror_image(values):
    one, other = mean_interval(values), mean_interval(-values)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low), rel=1e-6, abs=1e-6)
    assert one.low <= one.estimate <= one.high


def test_interval_of_equal_scores_is_a_point():
    found = mean_interval(np.full(7, 0.3))
    assert found.low == found.high == found.estimate == pytest.approx(0.3)


def test_interval_of_ranks_that_no_single_image_moves():
    """SciPy's acceleration is 0 / 0 here, and its interval NaN."""
    scores = np.random.default_rng(4).normal([20, 19.8, 15], 1, (30, 3))
    found = interval(lambda means: spearman(np.array([3, 2, 1]), means), scores)
    assert found.estimate == 1 and 0.4 < found.low < found.high == 1


@pytest.mark.parametrize("values", [[1.0], [], [1.0, float("nan")], [[1.0, 2.0], [3.0, 4.0]]])
def test_interval_refuses_what_has_none(values):
    with pytest.raises(AfterimageError, match="interval needs"):
        mean_interval(np.array(values))


def test_holm_agrees_with_his_procedure_done_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_lies_between_no_correction_and_bonferroni(p_values):
    adjusted = holm(p_values)
    p = np.array(p_values)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(p * len(p), 1) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


def test_holm_keeps_the_familys_error_at_five_per_cent():
    """20 true nulls and 5 clear effects on 100 images each: some false positive in 5 % of families."""
    random = np.random.default_rng(17)
    families = 600
    shift = np.array([0.0] * 20 + [1.0] * 5)
    false, found = 0, 0
    for _ in range(families):
        differences = random.normal(shift, 1.0, (100, 25))
        rejected = holm(stats.ttest_1samp(differences, 0).pvalue) < 0.05
        false += rejected[:20].any()
        found += rejected[20:].all()
    assert 0.02 <= false / families <= 0.08
    assert found / families > 0.99


def test_kendall_within_agrees_with_scipy():
    quality = np.random.default_rng(1).normal(size=(20, 6))
    expected = [stats.kendalltau(np.arange(6), row).statistic for row in quality]
    np.testing.assert_allclose(kendall_within(quality), expected)


def test_spearman_agrees_with_scipy_ties_included():
    x = np.array([1, 1, 2, 2, 2, 5, 6, 7])
    y = np.random.default_rng(2).normal(size=(10, 8))
    np.testing.assert_allclose(spearman(x, y), [stats.spearmanr(x, row).statistic for row in y])
    assert spearman(x, np.ones(8)) == 0


def test_partial_spearman_agrees_with_the_textbook_formula():
    random = np.random.default_rng(3)
    z = random.normal(size=12)
    x, y = z + random.normal(size=12), z + random.normal(size=12)
    xy, xz, yz = (stats.spearmanr(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
    assert spearman(x, y, z) == pytest.approx(expected)


def test_partial_spearman_removes_what_the_covariate_explains():
    random = np.random.default_rng(4)
    z = random.normal(size=2000)
    x, y = z + 0.5 * random.normal(size=2000), z + 0.5 * random.normal(size=2000)
    assert spearman(x, y) > 0.6
    assert abs(spearman(x, y, z)) < 0.1
    assert separable(x, z) and not separable(z, np.exp(z)) and not separable(z, -z)


def test_exact_permutation_p_agrees_with_enumeration():
    x = np.arange(5)
    assert spearman_p(x, x) == pytest.approx(2 / 120)
    y = np.array([2.0, 1.0, 3.0, 5.0, 4.0])
    expected = stats.permutation_test(
        (y,), lambda v: stats.spearmanr(x, v).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert spearman_p(x, y) == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("partial", [False, True])
def test_permutation_p_is_uniform_under_the_null(partial):
    random = np.random.default_rng(6)
    p = []
    for _ in range(200):
        z = random.normal(size=7)
        x, y = z + random.normal(size=7), (z if partial else 0) + random.normal(size=7)
        p.append(spearman_p(x, y, z if partial else None))
    assert 0.01 <= np.mean(np.array(p) < 0.05) <= 0.09
    assert stats.kstest(p, "uniform").pvalue > 0.001


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(9)), st.permutations(range(9)))
def test_ranks_ignore_the_order_of_layers_and_flip_with_the_sign(y, order):
    x, y, z = np.arange(9), np.array(y), np.array([3, 1, 4, 1, 5, 9, 2, 6, 5])
    assert spearman(x[order], y[order], z[order]) == pytest.approx(spearman(x, y, z))
    assert spearman(x, -y, z) == pytest.approx(-spearman(x, y, z))
    assert spearman(x, np.exp(y)) == pytest.approx(spearman(x, y))


def test_epsilon_squared_is_the_adjusted_r_squared_of_a_one_way_layout():
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    values = np.random.default_rng(7).normal(size=8) + groups
    within = sum(((values[groups == g] - values[groups == g].mean()) ** 2).sum() for g in range(3))
    expected = 1 - (within / (8 - 3)) / values.var(ddof=1)
    assert epsilon_squared(values, groups) == pytest.approx(expected)
    np.testing.assert_allclose(epsilon_squared(np.stack([values, 3 * values - 7]), groups), [expected] * 2)


def test_epsilon_squared_knows_all_and_nothing():
    groups = np.repeat(np.arange(50), 4)
    assert epsilon_squared(groups.astype(float), groups) == pytest.approx(1)
    assert abs(epsilon_squared(np.random.default_rng(8).normal(size=200), groups)) < 0.15
    assert epsilon_squared(np.ones(200), groups) == 0
