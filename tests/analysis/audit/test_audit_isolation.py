"""A layer, a defence or an attacker of an audit that raises ends itself alone, and the verdict says so."""

import json
import shutil
from dataclasses import replace

import pytest

from afterimage.analysis.audit import attackers, run
from afterimage.analysis.audit.defences.chain import DEFENCES
from afterimage.analysis.audit.defences.parts import PCA
from afterimage.analysis.audit.run import run_audit
from afterimage.analysis.audit.target import AuditTarget
from afterimage.cli import main
from afterimage.config import AfterimageError, DataConfig, RecipeConfig
from afterimage.config.audit import AuditConfig, LimitsConfig
from afterimage.models.decoders import DECODERS
from afterimage.report.audit.page import write_audit
from afterimage.report.audit.verdict import INCONCLUSIVE, WITHIN, judge
from afterimage.runs.run import TRACEBACK
from stand_ins import decoder
from test_audit import HERE, Decoded, no_lpips  # noqa: F401

BUG = RuntimeError("a bug in\nsomebody's code")
LIMITS = LimitsConfig(max_ssim=1.0)
CONFIG = AuditConfig(
    model=f"python/{HERE}/audit_encoders.py:TwoLayers",
    layers=("first", "second"),
    defences=("none", "pca:4"),
    attackers=Decoded(decoders=("linear", "wavelet")),
    data=DataConfig(source="procedural:60", resize=28, crop=24, test_fraction=0.5),
    recipe=RecipeConfig(batch_size=16, epochs=2),
    limits=LIMITS,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def audited(config, root, cache):
    results = run_audit(config, root, cache=cache, accelerator="cpu")
    return results, judge(results, config.limits)


def rows(results):
    """The measured rows by layer, defence and decoder, without what depends on the clock and the folder."""
    return {
        (row.layer, row.defence, row.attacker.decoder): replace(row, seconds=0.0, folder="")
        for row in results.rows
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of the audit of which nothing fails."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(cache, finished):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AFTERIMAGE_WEIGHTS", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        results, verdict = audited(CONFIG, finished, cache)
    assert not results.failures and not results.unmeasured and verdict.passed
    assert len(results.rows) == 8 and {option.status for option in verdict.options} == {WITHIN}
    return rows(results)


@pytest.fixture
def trained(whole, finished, tmp_path):
    """A copy of that folder, for what fails beside attackers that are trained already: costs and a mean are not."""
    return shutil.copytree(
        finished, tmp_path / "audit", ignore=shutil.ignore_patterns("costs", "no-features-*")
    )


def check(config, root, cache, whole, *, without, names, options=4):
    """All rows but those `without` come out as ever; the verdict names what is missing and does not pass."""
    results, verdict = audited(config, root, cache)
    missing = {key for key in whole if without(*key)}
    assert rows(results) == {key: row for key, row in whole.items() if key not in missing}
    assert verdict.passed is False and results.failures
    for failure in results.failures:
        assert "\n" not in failure and any(failure.startswith(name) for name in names)
        assert f"could not be measured: {failure}" in verdict.remarks
    assert len(results.failures) == len(names) and len(verdict.options) == options
    for option in verdict.options:
        hurt = any(key[:2] == (option.layer, option.defence) for key in missing)
        assert option.status == (INCONCLUSIVE if hurt else WITHIN)
    if verdict.recommended:
        assert verdict.recommended.status == WITHIN
    write_audit(results, verdict, config.limits, root, command="afterimage audit")
    assert "could not be measured" in (root / "index.html").read_text()
    return results, verdict


def test_attackers_that_raise_end_themselves_alone(whole, cache, tmp_path, monkeypatch):
    """At every moment, beside two that are sound; one that was put right is in the next audit."""
    broken = {f"broken{i}": when for i, when in enumerate(("build", "step 3", "validation", "test"))}
    for name, when in broken.items():
        monkeypatch.setitem(DECODERS, name, decoder(when, BUG, DECODERS["transposed"]))
    config = replace(CONFIG, attackers=Decoded(decoders=("linear", *broken, "wavelet")))
    results, verdict = audited(config, tmp_path, cache)
    assert rows(results) == whole and verdict.passed is False
    assert len(results.failures) == 16 and {option.status for option in verdict.options} == {INCONCLUSIVE}
    assert verdict.recommended is None
    for failure in results.failures:
        assert ": RuntimeError: a bug in somebody's code (traceback: cells/" in failure
    for name in broken:
        assert sum(f", {name}: " in failure for failure in results.failures) == 4
        stories = list(tmp_path.glob(f"cells/*{name}*/{TRACEBACK}"))
        assert len(stories) == 4 and all("in _at" in path.read_text() for path in stories)
        states = [
            json.loads(path.read_text())["state"] for path in tmp_path.glob(f"cells/*{name}*/status.json")
        ]
        assert states == ["failed"] * 4
    monkeypatch.setitem(DECODERS, "broken1", DECODERS["transposed"])
    config = replace(CONFIG, attackers=Decoded(decoders=("linear", "broken1", "wavelet")))
    results, verdict = audited(config, tmp_path, cache)
    assert not results.failures and verdict.passed and not list(tmp_path.glob(f"cells/*broken1*/{TRACEBACK}"))


class Broken(PCA):
    """Principal components that raise where their class says."""

    when = "measure_statistics"
    seen = False

    def measure_statistics(self, maps):
        if self.when == "measure_statistics":
            raise BUG
        super().measure_statistics(maps)

    def encode(self, maps):
        if self.when == "encode" and self.seen:
            raise BUG
        self.seen = True
        return super().encode(maps)


class BrokenLater(Broken):
    when = "encode"


def test_defences_that_raise_end_themselves_alone(whole, cache, tmp_path, monkeypatch):
    broken = {"broken": Broken, "later": BrokenLater}
    for name, defence in broken.items():
        monkeypatch.setitem(DEFENCES, name, defence)
    config = replace(CONFIG, defences=("none", *(f"{name}:4" for name in broken), "pca:4"))
    results, verdict = audited(config, tmp_path, cache)
    assert rows(results) == whole and verdict.passed is False
    assert {option.status for option in verdict.options} == {WITHIN}
    assert results.unmeasured == {(layer, f"{name}:4") for layer in CONFIG.layers for name in broken}
    stories = [path.read_text() for path in tmp_path.glob(f"cells/*/{TRACEBACK}")]
    for name, defence in broken.items():
        assert any(f"in {defence.when}" in story for story in stories)
        failures = [failure for failure in results.failures if f", {name}:4" in failure]
        assert {failure.split(",")[0] for failure in failures} == set(CONFIG.layers)
    assert all(", broken:4" in failure or ", later:4" in failure for failure in results.failures)


def test_a_defence_that_one_layer_does_not_allow_ends_there(whole, cache, tmp_path):
    """Twelve directions of eight channels; a text that no layer allows is an error before anything is done."""
    config = replace(CONFIG, defences=("none", "pca:12", "pca:4"))
    results, verdict = audited(config, tmp_path, cache)
    found = rows(results)
    assert {key: row for key, row in found.items() if key[1] != "pca:12"} == whole
    assert {key[0] for key in found if key[1] == "pca:12"} == {"second"}
    (failure,) = results.failures
    assert failure.startswith("first, pca:12: ") and "8 channels" in failure and verdict.passed is False
    with pytest.raises(AfterimageError, match="pca:99"):
        run_audit(replace(CONFIG, defences=("none", "pca:99")), tmp_path, cache=cache, accelerator="cpu")


def test_a_layer_that_is_not_there_ends_itself_alone(whole, cache, trained):
    config = replace(CONFIG, layers=("first", "third", "second"))
    check(config, trained, cache, whole, without=lambda *key: False, names=["third: "])
    with pytest.raises(AfterimageError, match="third"):
        run_audit(replace(CONFIG, layers=("third",)), trained, cache=cache, accelerator="cpu")


def test_a_layer_whose_encoder_raises_ends_itself_alone(whole, cache, tmp_path, monkeypatch):
    encoder = AuditTarget.encoder

    def raising(self, layer):
        if layer == "first":
            raise BUG
        return encoder(self, layer)

    monkeypatch.setattr(AuditTarget, "encoder", raising)
    results, _ = check(
        CONFIG,
        tmp_path,
        cache,
        whole,
        without=lambda layer, *_: layer == "first",
        names=["first: "],
        options=2,
    )
    assert results.unmeasured == {("first", "none"), ("first", "pca:4")}
    assert len(list(tmp_path.glob(f"cells/*/{TRACEBACK}"))) == 4


def test_costs_that_raise_leave_what_leaks(whole, cache, trained, monkeypatch):
    measure = run.measure_cost

    def raising(network, defences, *arguments, **options):
        if any(defence.name == "pca:4" for defence in defences):
            raise BUG
        return measure(network, defences, *arguments, **options)

    monkeypatch.setattr(run, "measure_cost", raising)
    names = [f"{layer}, pca:4, what it costs: " for layer in CONFIG.layers]
    results, verdict = check(CONFIG, trained, cache, whole, without=lambda *key: False, names=names)
    assert {option.utility is None for option in verdict.options if option.defence == "pca:4"} == {True}
    assert {option.utility is None for option in verdict.options if option.defence == "none"} == {False}
    monkeypatch.undo()
    results, verdict = audited(CONFIG, trained, cache)
    assert not results.failures and verdict.passed


def test_test_images_that_one_attacker_cannot_take_end_it_alone(whole, cache, tmp_path, monkeypatch):
    evaluate = attackers.evaluate_batches

    def raising(*arguments, names, **options):
        if any("wavelet on none of" in name for name in names):
            raise BUG
        return evaluate(*arguments, names=names, **options)

    monkeypatch.setattr(attackers, "evaluate_batches", raising)
    check(
        CONFIG, tmp_path, cache, whole,
        without=lambda layer, defence, by: (defence, by) == ("none", "wavelet"),
        names=["first, none, wavelet: ", "second, none, wavelet: "],
    )  # fmt: skip


def test_one_who_sees_nothing_and_raises_ends_themselves_alone(whole, cache, trained, monkeypatch):
    def raising(*arguments):
        raise BUG

    monkeypatch.setattr(run, "mean_image", raising)
    check(CONFIG, trained, cache, whole, without=lambda *key: False, names=["no features, 30 images: "])


def test_a_damaged_cell_is_told_and_not_within_limits(whole, cache, trained):
    (cell,) = trained.glob("cells/first-none-linear*")
    (cell / "summary.json").write_text("{")
    check(
        CONFIG, trained, cache, whole,
        without=lambda *key: key == ("first", "none", "linear"), names=["first, none, linear: "],
    )  # fmt: skip


def test_what_progress_raises_is_the_callers_own(cache, tmp_path):
    def progress(what, *_, **__):
        if what == "training":
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        run_audit(CONFIG, tmp_path, cache=cache, accelerator="cpu", progress=progress)


def test_the_command_ends_with_3_and_names_what_is_missing(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DECODERS, "broken", decoder("step", BUG))
    arguments = ["audit", CONFIG.model, "--layers", "second", "--defences", "none"]
    arguments += [
        "--decoders",
        "linear",
        "broken",
        "--estimate-images",
        "0",
        "--data",
        "procedural:60",
        "--resize",
        "28",
        "--crop",
        "24",
    ]
    arguments += ["--max-ssim", "1.0", "--output-dir", str(tmp_path), "--cache", str(cache), "--epochs", "1"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--device", "cpu"])
    out = capsys.readouterr().out
    assert ended.value.code == 3 and "Traceback" not in out
    assert "could not be measured: second, none, broken: RuntimeError: a bug in somebody's code" in out
    assert f"an attacker could not be measured: {INCONCLUSIVE}" in out and "recommended: none" in out
