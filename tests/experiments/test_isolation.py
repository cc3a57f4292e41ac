"""What raises ends what depends on it and nothing else: the other runs come out as if it had never been there."""

import traceback
from dataclasses import replace
from functools import partial

import pytest

from afterimage import AfterimageError, train_runs
from afterimage.config import DecoderConfig, FusionConfig
from afterimage.experiments import queue as jobs
from afterimage.models.decoders import DECODERS
from afterimage.models.fusion import FUSIONS
from afterimage.runs.run import TRACEBACK, Run
from afterimage.runtime.failures import UnexpectedError, clear_error_frames, one_line, to_afterimage_error
from afterimage.training.losses import LOSSES
from children import MODEL, result, small_configs
from rank_children import break_an_encoder, fail_in_step, run_ranks, train_ranks
from stand_ins import break_encoders, closed_form, decoder, fusion, loss

BUG = RuntimeError("a bug in\nsomebody's code")


@pytest.fixture
def go(cache, tmp_path):
    def run(*configs, **options):
        failures = []
        options = {"cache": cache, "accelerator": "cpu", "failures": failures} | options
        return train_runs(list(configs), tmp_path / "runs", **options), failures

    return run


def check_failed(run, failures, error):
    """The run is recorded as failed by an exception that nobody foresaw, with its traceback, and told in one line."""
    (told,) = failures
    assert isinstance(told, UnexpectedError) and "\n" not in str(told)
    line = one_line(error)
    if isinstance(error, StopIteration):  # which Python lets no generator raise
        line = "RuntimeError: generator raised StopIteration"
    assert run.name in str(told) and line in str(told) and str(run.file(TRACEBACK)) in str(told)
    assert run.status["state"] == "failed" and line in run.status["error"]
    story = run.file(TRACEBACK).read_text()
    assert story.startswith("Traceback") and str(error) in story and "raise" in story
    assert not list(run.path.glob("lock*"))


def beside(sample_images, **changes):
    """A run that is trained together with the small ones."""
    return replace(small_configs(sample_images)[0], **changes)


DECODER_BUGS = [
    (decoder, "build", BUG),
    (decoder, "build", KeyError("channels")),
    (decoder, "mode", AttributeError("no such thing")),
    (decoder, "step", IndexError("list index out of range")),
    (decoder, "step 6", TypeError("unsupported operand")),  # in the middle of the second epoch
    (decoder, "backward", BUG),
    (decoder, "after_optimizer_step 5", AssertionError()),
    (decoder, "validation", ZeroDivisionError("division by zero")),
    (decoder, "test", StopIteration("no more")),
    (closed_form, "begin_fit", BUG),
    (closed_form, "partial_fit 2", ValueError("a shape")),
    (closed_form, "hold", BUG),
    (closed_form, "finalize_fit", IndexError("list index out of range")),
    (closed_form, "test", BUG),
]


def test_whatever_raises_in_a_run_ends_that_run(go, sample_images, whole, monkeypatch):
    """Decoders, a fusion and a loss, at every moment of a run, all trained together with three that are sound."""
    broken = []
    for number, (make, when, error) in enumerate(DECODER_BUGS):
        monkeypatch.setitem(DECODERS, f"broken{number}", make(when, error))
        broken.append((beside(sample_images, decoder=DecoderConfig(f"broken{number}")), error))
    sources = (f"{MODEL}:layer1", f"{MODEL}:layer2")
    for when in ("step", "validation", "test"):
        monkeypatch.setitem(FUSIONS, f"broken {when}", fusion(when, BUG))
        broken.append(
            (beside(sample_images, sources=sources, fusion=FusionConfig(f"broken {when}", channels=8)), BUG)
        )
    stacked = fusion("finalize_fit", BUG)
    monkeypatch.setitem(FUSIONS, "stacked", stacked)
    monkeypatch.setattr("afterimage.models.fusion.StackedFusion", stacked)
    broken.append((beside(sample_images, sources=sources, fusion=FusionConfig("stacked")), BUG))
    monkeypatch.setitem(LOSSES, "l1", loss(BUG))
    broken.append((small_configs(sample_images, loss="l1")[0], BUG))

    first, *others = small_configs(sample_images)
    runs, failures = go(first, *(config for config, _ in broken), *others)
    assert [result(run) for run in (runs[0], *runs[-2:])] == whole
    assert len(failures) == len(broken)
    for run, (_, error) in zip(runs[1:-2], broken, strict=True):
        check_failed(run, [failure for failure in failures if run.name in str(failure)], error)


@pytest.mark.parametrize("options", [{}, {"build": True}, {"above": 1}], ids=["at once", "built", "batches"])
def test_encoders_that_raise_end_the_rows_that_read_that_layer(
    go, sample_images, whole, monkeypatch, options
):
    """Also where the images alone make them raise."""
    error = IndexError("index 5 is out of bounds")
    break_encoders(monkeypatch, "layer2", error, **options)
    said = []
    (broken, *others), failures = go(
        *small_configs(sample_images), progress=lambda what, *_, **__: said.append(what)
    )
    assert [result(run) for run in others] == whole[1:]
    check_failed(broken, failures, error)
    assert sum("half of the rows are tried first" in line for line in said) == 1


def test_encoders_that_raise_at_the_test_images_end_one_row(go, sample_images, whole, monkeypatch):
    """After training, from whose checkpoints the others go on."""
    from afterimage.experiments.joint_run import JointRun

    measure = JointRun._measure

    def measuring(self, members):
        with monkeypatch.context() as patch:
            break_encoders(patch, "layer2", BUG)
            measure(self, members)

    monkeypatch.setattr(JointRun, "_measure", measuring)
    (broken, *others), failures = go(*small_configs(sample_images))
    assert [result(run) for run in others] == whole[1:]
    check_failed(broken, failures, BUG)


def test_an_unknown_layer_ends_its_own_row_with_its_own_message(go, sample_images, whole):
    unknown = beside(sample_images, sources=(f"{MODEL}:nolayer",))
    runs, failures = go(unknown, *small_configs(sample_images))
    assert [result(run) for run in runs[1:]] == whole
    (error,) = failures
    assert not isinstance(error, UnexpectedError) and unknown.name in str(error)
    assert "nolayer" in runs[0].status["error"] and "layer1" in runs[0].status["error"]


def test_weights_that_reach_one_layer_only_end_the_deeper_rows(go, sample_images, tmp_path):
    import timm
    from safetensors.torch import save_file

    state = timm.create_model(MODEL).state_dict()
    reached = ("conv1", "bn1", "layer1")
    file = tmp_path / "part.safetensors"
    save_file({key: value for key, value in state.items() if key.startswith(reached)}, file)
    deep, *shallow = (replace(config, weights=str(file)) for config in small_configs(sample_images))
    runs, failures = go(deep, replace(deep, sources=(f"{MODEL}:layer3",)), *shallow)
    assert [run.state for run in runs] == ["failed", "failed", "done", "done"]
    assert len(failures) == 2 and all("lacks layer2" in str(error) for error in failures)
    assert [run.name in str(error) for run, error in zip(runs, failures, strict=False)] == [True, True]


def test_weights_that_are_missing_are_looked_for_once_more_and_end_all_rows(go, sample_images, monkeypatch):
    """Where there is no network each question takes its time."""
    from afterimage.models.encoders.providers.timm import TimmNetwork

    asked = []

    def nothing(network, weights="pretrained"):
        asked.append(network.name)
        raise AfterimageError(f"no weights for {network.name}")

    monkeypatch.setattr(TimmNetwork, "find_weights", nothing)
    configs = [replace(config, weights="pretrained") for config in small_configs(sample_images)]
    runs, failures = go(*configs)
    assert {run.state for run in runs} == {"failed"} and len(asked) <= 2
    assert all("no weights" in run.status["error"] for run in runs) and len(failures) == 1


def test_images_that_cannot_be_had_end_their_runs_and_no_others(go, sample_images, whole, monkeypatch):
    load = jobs.load_data

    def loading(config, **options):
        if config.resize == 40:
            raise KeyError("a column")
        return load(config, **options)

    monkeypatch.setattr(jobs, "load_data", loading)
    first = small_configs(sample_images)[0]
    config = replace(first, data=replace(first.data, resize=40))
    (broken, *others), failures = go(config, *small_configs(sample_images))
    assert [result(run) for run in others] == whole
    check_failed(broken, failures, KeyError("a column"))


def test_a_folder_that_cannot_be_read_ends_its_own_run(go, sample_images, whole, tmp_path):
    first = small_configs(sample_images)[0]
    damaged = Run.create(tmp_path / "runs", replace(first, seed=9))
    damaged.file("status.json").write_text("{")
    runs, failures = go(replace(first, seed=9), *small_configs(sample_images))
    assert [result(run) for run in runs[1:]] == whole
    (error,) = failures
    assert "status.json" in str(error) and damaged.file("status.json").read_text() == "{"


def test_a_run_that_failed_is_tried_again_and_leaves_no_traceback(go, sample_images, whole, monkeypatch):
    first = small_configs(sample_images)[0]
    with monkeypatch.context() as patch:
        patch.setitem(DECODERS, "transposed", decoder("step 6", BUG, DECODERS["transposed"]))
        (run,), failures = go(first)
        check_failed(run, failures, BUG)
    (run,), failures = go(first)
    assert not failures and result(run) == whole[0] and not run.file(TRACEBACK).exists()


def test_what_progress_raises_is_the_callers_own(go, sample_images):
    class Enough(Exception):
        pass

    def progress(what, done, total, **figures):
        if what == "training":
            raise Enough

    configs = small_configs(sample_images)
    with pytest.raises(Enough):
        go(*configs, progress=progress)


def test_without_a_list_the_first_failure_is_raised(go, sample_images, monkeypatch):
    monkeypatch.setitem(DECODERS, "broken", decoder("step", BUG))
    with pytest.raises(UnexpectedError, match="RuntimeError: a bug in somebody's code") as caught:
        go(beside(sample_images, decoder=DecoderConfig("broken")), failures=None)
    assert caught.value.__cause__ is BUG


def test_names_that_are_not_utf_8_and_long_words_can_be_told(tmp_path):
    error = OSError(2, "no such file", "caf\udce9.png")
    told = str(to_afterimage_error(error, "a run"))
    assert told.encode() and "caf" in told
    assert len(str(to_afterimage_error(RuntimeError("x" * 5000), "a run"))) < 600


def test_what_frames_hold_is_let_go():
    import gc
    import weakref

    class Large:
        pass

    def work():
        large = Large()
        held.append(weakref.ref(large))
        try:
            raise KeyError("first")
        except KeyError:
            raise RuntimeError("then") from None

    held = []
    try:
        work()
    except RuntimeError as error:
        clear_error_frames(error)
        gc.collect()
        assert held[0]() is None and "then" in "".join(traceback.format_exception(error))


@pytest.mark.long
def test_ranks_agree_on_what_one_of_them_raises(sample_images, cache, tmp_path):
    """A step on one rank only: the run ends on both, and the others are trained as without it."""
    configs = small_configs(sample_images)[:2]
    failing = replace(configs[0], seed=configs[0].seed, decoder=DecoderConfig("wavelet"))
    said = tmp_path / "said"
    hurt = partial(fail_in_step, "wavelet", 6, IndexError("one rank's own bug"))  # in the second epoch
    codes = run_ranks(2, train_ranks, [*configs, failing], tmp_path / "runs", cache, hurt=hurt, said=said)
    assert codes == [1, 1]
    broken = Run(tmp_path / "runs" / failing.name)
    assert broken.status["error"] == "on rank 1: IndexError: one rank's own bug"
    assert "in stumbling" in broken.file(TRACEBACK).read_text()
    assert run_ranks(2, train_ranks, configs, tmp_path / "alone", cache) == [0, 0]
    for config in configs:
        assert result(Run(tmp_path / "runs" / config.name)) == result(Run(tmp_path / "alone" / config.name))


@pytest.mark.long
def test_ranks_agree_on_which_encoders_fail(sample_images, cache, tmp_path):
    configs = small_configs(sample_images)
    codes = run_ranks(2, train_ranks, configs, tmp_path / "runs", cache, hurt=break_an_encoder)
    assert codes == [1, 1]
    runs = [Run(tmp_path / "runs" / config.name) for config in configs]
    assert [run.state for run in runs] == ["failed", "done", "done"]
    assert "on rank 1: IndexError: one rank's network" in runs[0].status["error"]
    assert run_ranks(2, train_ranks, configs[1:], tmp_path / "alone", cache) == [0, 0]
    for config in configs[1:]:
        assert result(Run(tmp_path / "runs" / config.name)) == result(Run(tmp_path / "alone" / config.name))
