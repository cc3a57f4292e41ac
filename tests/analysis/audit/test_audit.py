"""Audits from end to end: a planted leak is found, a planted non-leak is cleared, what is done is not redone."""

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from afterimage.analysis.audit.run import run_audit
from afterimage.cli import main
from afterimage.config import AfterimageError, DataConfig, RecipeConfig, dump_toml, load_toml
from afterimage.config.audit import AttackersConfig, AuditConfig, LimitsConfig
from afterimage.config.inversion import EstimateConfig
from afterimage.report.audit.page import write_audit
from afterimage.report.audit.verdict import attacker_text, judge
from afterimage.runs.files import read_csv

DATA = DataConfig(source="procedural:300", resize=28, crop=24, test_fraction=0.5)
RECIPE = RecipeConfig(batch_size=32, epochs=2)
HERE = str(Path(__file__).parents[2] / "fixtures")
Decoded = partial(AttackersConfig, estimate=EstimateConfig(images=0))
"""Attackers who leave it at the decoder's answers, or at the refined ones."""
DECODED = Decoded()


@pytest.fixture(autouse=True)
def no_lpips(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def settings(factory, layer, *defences, attackers=DECODED, **changes):
    return AuditConfig(
        model=f"python/{HERE}/audit_encoders.py:{factory}", layers=(layer,), defences=defences or ("none",),
        attackers=attackers, data=DATA, recipe=RECIPE, **changes,
    )  # fmt: skip


def audited(config, root, cache):
    results = run_audit(config, root, cache=cache, accelerator="cpu")
    return results, judge(results, config.limits)


LIMITS = LimitsConfig(max_ssim=0.9, max_identification=0.05)


@pytest.mark.parametrize("defence", ["int8", "noise:0.2"])
def test_a_planted_leak_is_found(defence, cache, tmp_path):
    config = settings("Leak", "output[features]", defence, limits=LIMITS)
    results, verdict = audited(config, tmp_path, cache)
    (row,), (option,) = results.rows, verdict.options
    assert row.identification["correlation"].low > 0.9 and row.candidates == 150
    assert verdict.passed is False and verdict.recommended is None
    assert option.status == "leaks" and "a limit of 0.05" in option.reasons[-1]


def test_a_planted_non_leak_is_cleared(cache, tmp_path):
    results, verdict = audited(settings("Constant", "output", "none", limits=LIMITS), tmp_path, cache)
    (row,), (blind,) = results.rows, results.blind
    for share in row.identification.values():
        assert share.estimate == row.chance == 1 / 150
    assert verdict.passed is True and verdict.recommended.layer == "output"
    assert row.scores["psnr"].estimate == pytest.approx(blind.scores["psnr"].estimate, abs=0.6)


def test_the_command_exits_by_its_limits(cache, tmp_path, monkeypatch, capsys):
    shutil.copy(f"{HERE}/audit_encoders.py", tmp_path / "planted_encoders.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "audit.toml").write_text(
        dump_toml(
            AuditConfig(
                model="python/planted_encoders:Leak",
                layers=("output",),
                attackers=Decoded(),
                data=DATA,
                recipe=RECIPE,
            )
        )
    )
    common = ["audit", "--config", "audit.toml", "--device", "cpu", "--cache", str(cache)]
    common += ["--defences", "none", "--max-identification", "0.05"]
    with pytest.raises(SystemExit) as stopped:
        main([*common, "--output-dir", "leak"])
    out, err = capsys.readouterr()
    assert (
        stopped.value.code == 3 and "NOT within the limits" in err and "no stronger attack is excluded" in out
    )
    assert "measured were pixels" in out and "labels, captions or persons" in out
    main([*common, "python/planted_encoders:Constant", "--output-dir", "constant"])
    out, _ = capsys.readouterr()
    assert "recommended: output with none" in out and "measured were pixels" in out
    for root, passed in (("leak", False), ("constant", True)):
        values = json.loads((tmp_path / root / "audit.json").read_text())
        assert values["verdict"]["passed"] is passed and len(values["rows"]) == 1
        assert "no stronger attack exists" in values["limitations"][0]
        assert "not which labels, captions or persons can be read" in values["verdict"]["scope"]
    sys.modules.pop("planted_encoders")


def test_finished_cells_are_not_done_again(cache, tmp_path):
    attackers = Decoded(images=(40, "all"))
    config = settings("Classifier", "stem", "none", "int8", attackers=attackers)
    first, _ = audited(config, tmp_path, cache)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*/summary.json")}
    assert len(written) == 2 * 2 + 2 and {row.attacker.images for row in first.rows} == {40, 150}
    more = settings("Classifier", "stem", "none", "int8", "1bit", attackers=attackers)
    second, _ = audited(more, tmp_path, cache)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert len(second.rows) == 6 and [row for row in second.rows if row.defence != "1bit"] == first.rows
    # One that was interrupted is done again, and alone it comes to the same numbers as beside the others.
    (cell,) = (path.parent for path in written if "stem-int8-linear-40" in str(path))
    scores = (cell / "scores.csv").read_text()
    shutil.rmtree(cell)
    third, _ = audited(more, tmp_path, cache)
    assert third.rows == [
        replace(row, seconds=new.seconds) for row, new in zip(second.rows, third.rows, strict=True)
    ]
    assert (cell / "scores.csv").read_text() == scores


def test_layers_of_one_shape_have_costs_of_their_own(cache, tmp_path):
    config = replace(settings("Classifier", "stem.0", "noise:4"), layers=("stem.0", "stem.2"))
    results, _ = audited(config, tmp_path, cache)
    first, second = (results.costs[layer, "noise:4"]["cosine"]["estimate"] for layer in config.layers)
    assert results.subject["features"]["stem.0"] == results.subject["features"]["stem.2"] and first != second


@pytest.mark.parametrize(
    "strengths",
    [
        ("noise:0.05", "noise:0.5", "noise:2", "noise:8"),
        ("int8", "int4", "int2", "1bit"),
        ("pca:16", "pca:4", "pca:1"),
    ],
)
def test_more_defence_never_leaks_more_within_the_intervals(strengths, cache, tmp_path):
    config = settings("Classifier", "stem", *strengths, prediction="classes")
    results, _ = audited(config, tmp_path, cache)
    scores = [row.scores["psnr"] for row in results.rows]
    kept = [results.costs["stem", strength]["score"] for strength in strengths]
    assert all(after.low <= before.high for before, after in itertools.pairwise(scores))
    assert all(after["low"] <= before["high"] for before, after in itertools.pairwise(kept))
    assert scores[-1].high < scores[0].low and kept[-1]["estimate"] < kept[0]["estimate"]
    assert kept[0]["estimate"] > 0.9 and results.costs["stem", strengths[0]]["kind"] == "classes"


def test_more_images_of_their_own_help_an_attacker(cache, tmp_path):
    config = settings("Classifier", "stem", "noise:0.5", attackers=Decoded(images=(10, 150, 4000)))
    results, _ = audited(config, tmp_path, cache)
    few, many = (row.scores["psnr"] for row in results.rows)
    assert few.estimate < many.estimate
    assert "an attacker with 4000 images was left out: the source has only 150 images" in results.notes


def test_an_attacker_with_other_images(cache, tmp_path):
    config = settings("Classifier", "stem", "none", attackers=Decoded(data="photographs"))
    (row,) = audited(config, tmp_path, cache)[0].rows
    assert row.attacker.data == "photographs" and row.attacker.images < 150
    config = settings("Classifier", "stem", "none", attackers=Decoded(data="procedural:40"))
    with pytest.raises(AfterimageError, match="the attacker's own images hold"):
        audited(config, tmp_path, cache)


def test_decoders_that_train_by_epochs_attack_too(cache, tmp_path):
    config = settings("Classifier", "stem", "pca:3+int8", attackers=Decoded(("transposed",), (20,)))
    results, _ = audited(config, tmp_path, cache)
    (row,) = results.rows
    assert row.attacker.decoder == "transposed" and row.scores["psnr"].estimate > 5
    assert not list(tmp_path.glob("cells/*/checkpoint*"))


def test_the_page_is_self_contained_and_escapes_names(cache, tmp_path):
    config = settings("Classifier", "stem", "none", "int8", limits=LIMITS)
    results, verdict = audited(config, tmp_path, cache)
    results.subject["name"] = results.notes[0] = "<script>alert(1)</script>"
    written = write_audit(results, verdict, config.limits, tmp_path, command='afterimage "<b>"')
    page = written["index.html"].read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;" in page
    assert 'src="http' not in page and "src='http" not in page and "default-src 'none'" in page
    assert "no stronger attack exists" in page and "Not within the limits" in page
    banner, _, after = page.partition('<div class="banner')[2].partition("</div>")
    assert "Not within" in banner and after.lstrip().startswith("<p>Measured were pixels")
    for passed in (True, None):  # whatever the verdict
        write_audit(results, replace(verdict, passed=passed), config.limits, tmp_path / str(passed))
        assert "labels, captions or persons" in (tmp_path / str(passed) / "index.html").read_text()
    assert page.count("data:image/webp") == 3 * 3 and page.count("data:image/svg") == 1
    assert {"privacy-utility.png", "privacy-utility.svg"} <= set(written)


def test_settings_survive_toml(tmp_path):
    config = settings(
        "Leak", "output", "noise:0.5+int8", limits=LIMITS, attackers=Decoded(images=(128, "all"))
    )
    (tmp_path / "audit.toml").write_text(dump_toml(config))
    assert load_toml(AuditConfig, tmp_path / "audit.toml") == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": "x.npz"}, "an audit has one target"),
        ({"model": ""}, "got none"),
        ({"layers": ()}, "name at least one layer"),
        ({"defences": ()}, "name at least one defence"),
        ({"prediction": "labels"}, "unknown prediction"),
    ],
)
def test_impossible_settings_are_errors(changes, message):
    given = {"model": "resnet18", "layers": ("output",)} | changes
    with pytest.raises(AfterimageError, match=message):
        AuditConfig(**given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttackersConfig(images=("some",)), "a number from 5 on, or 'all'"),
        (lambda: AttackersConfig(images=(2,)), "a number from 5 on"),
        (
            lambda: AttackersConfig(threat_models=("root",)),
            "unknown threat model 'root'.*black-box, white-box",
        ),
        (lambda: AttackersConfig(decoders=()), "attackers.decoders"),
        (lambda: LimitsConfig(max_ssim=1.5), "max_ssim must lie between 0 and 1"),
        (
            lambda: AuditConfig(pairs="x.npz", attackers=AttackersConfig(threat_models=("white-box",))),
            "hold no weights",
        ),
        (lambda: AuditConfig(pairs="x.npz", attackers=AttackersConfig(data="div2k")), "needs the encoder"),
    ],
)
def test_impossible_attackers_and_limits_are_errors(make, message):
    with pytest.raises(AfterimageError, match=message):
        make()


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom afterimage.cli import main\n"
        "try:\n    main(['audit', '--help'])\nexcept SystemExit:\n    pass\nprint('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "False", result.stderr


def test_a_wrong_defence_is_told_before_anything_is_trained(cache, tmp_path):
    with pytest.raises(AfterimageError, match="pca:99"):
        audited(settings("Classifier", "stem", "none", "pca:99"), tmp_path, cache)
    assert not (tmp_path / "cells").exists()


def test_audits_repeat(cache, tmp_path):
    config = settings("Classifier", "stem", "noise:0.5", "shuffle")
    rows = [audited(config, tmp_path / str(i), cache)[0].rows for i in range(2)]
    for first, second in zip(*rows, strict=True):
        assert first.scores == second.scores and first.identification == second.identification
        assert np.isfinite(first.scores["psnr"].estimate)


@pytest.mark.parametrize("defence", ["none", "noise:0.3+int8"])
def test_an_attacker_with_the_weights_gets_at_least_as_much(defence, cache, tmp_path):
    attackers = Decoded(threat_models=("black-box", "white-box"), refine_steps=60, refine_images=6)
    results, _ = audited(settings("Classifier", "stem", defence, attackers=attackers), tmp_path, cache)
    decoded, refined = results.rows
    assert refined.attacker.threat_model == "white-box" and refined.scores["psnr"].count == 6
    assert "refined for 60 steps" in refined.notes[0]
    by_id = {row["id"]: row["psnr"] for row in read_csv(tmp_path / decoded.folder / "scores.csv")}
    gains = [row["psnr"] - by_id[row["id"]] for row in read_csv(tmp_path / refined.folder / "scores.csv")]
    if defence == "none":
        assert np.mean(gains) > 1
    assert attacker_text(refined.attacker).endswith("white-box, refined")
    again, _ = audited(settings("Classifier", "stem", defence, attackers=attackers), tmp_path, cache)
    assert again.rows == results.rows


def test_shuffled_features_are_not_refined_and_that_is_said(cache, tmp_path):
    attackers = Decoded(threat_models=("white-box",), refine_steps=2, refine_images=2)
    results, verdict = audited(
        settings("Classifier", "stem", "shuffle", attackers=attackers), tmp_path, cache
    )
    assert results.rows == [] and any("not refined" in note for note in results.notes)
    assert results.unmeasured == {("stem", "shuffle")}
    assert verdict.options == () and "nothing" in verdict.reason


def test_the_best_of_an_attackers_answers_counts_and_is_named(cache, tmp_path):
    """A last step learned on own images beside the decoder's answer, and with the weights beside the refined one."""
    limits = LimitsConfig(max_ssim=0.01)
    estimate = EstimateConfig(images=30, steps=60, channels=4)
    attackers = AttackersConfig(
        threat_models=("black-box", "white-box"), refine_steps=8, refine_images=4, estimate=estimate
    )
    config = settings("Classifier", "stem", "none", attackers=attackers, limits=limits)
    results, verdict = audited(config, tmp_path, cache)
    who = [(row.attacker.threat_model, row.attacker.answer) for row in results.rows]
    assert who == [
        (model, answer)
        for model, first in (("black-box", "decoded"), ("white-box", "refined"))
        for answer in (first, "best estimate")
    ]
    assert [row.scores["psnr"].count for row in results.rows] == [150, 150, 4, 4]
    decoded, learned, refined, both = (row.scores["psnr"].estimate for row in results.rows)
    assert both > refined and abs(learned - decoded) < 0.5
    most = max(results.rows, key=lambda row: row.scores["ssim"].low)
    (option,) = verdict.options
    assert option.ssim.attacker == attacker_text(most.attacker)
    assert any(attacker_text(most.attacker) in reason for reason in option.reasons)
    assert "30 images of the attacker's own" in results.rows[1].notes[0]
    # The search knows the errors on the first half.
    assert "15 images of the attacker's own" in results.rows[3].notes[0]
    again, _ = audited(config, tmp_path, cache)
    assert again.rows == results.rows
    fewer, _ = audited(
        settings(
            "Classifier", "stem", "none", attackers=replace(attackers, estimate=EstimateConfig(images=0))
        ),
        tmp_path,
        cache,
    )
    assert fewer.rows == results.rows[::2]
