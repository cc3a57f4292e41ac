import random
import signal

import pytest

from afterimage import AfterimageError, train_runs
from afterimage.experiments import joint_run as group
from afterimage.models.decoders import DECODERS
from afterimage.models.reconstructor import build_feature_decoder
from afterimage.runs.run import Run
from afterimage.training import trainer
from afterimage.training.checkpoint import CHECKPOINT
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.trainer import Trainer
from children import context, result, small_configs, small_images, train_child


@pytest.fixture
def go(sample_images, cache, tmp_path):
    def run(configs=None, **options):
        configs = configs or small_configs(sample_images)
        options = {"accelerator": "cpu", "cache": cache, "checkpoint_seconds": 0.0} | options
        return train_runs(configs, tmp_path / "runs", **options)

    return run


def child(function, *arguments, **options):
    process = context().Process(target=function, args=arguments, kwargs=options)
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("wanted", [4, pytest.param(20, marks=pytest.mark.long)])
def test_killed_at_any_moment_it_ends_with_the_same_bits(sample_images, cache, whole, tmp_path, wanted):
    configs = small_configs(sample_images)
    counted = tmp_path / "calls"
    assert child(train_child, configs, tmp_path / "counted", cache, counted=counted) == 0
    calls, draw = int(counted.read_text()), random.Random(5)
    kills, chains = 0, 0
    while kills < wanted:
        chains += 1
        root = tmp_path / f"chain{chains}"
        # Four kills in a row at most: each next process goes on from what the one before has left.
        for _ in range(4):
            code = child(train_child, configs, root, cache, calls=draw.randrange(calls))
            assert code in (0, -signal.SIGKILL)
            if code == 0:
                break
            kills += 1
        assert child(train_child, configs, root, cache) == 0
        runs = [Run(root / config.name) for config in configs]
        assert [result(run) for run in runs] == whole
        left = {path.name for run in runs for path in run.path.rglob("*")}
        assert not [name for name in left if name.startswith((".", "lock", "checkpoint"))]


def stop_at(monkeypatch, step):
    """Interrupt before the so-many-th optimizer step of this process, whichever member takes it."""
    steps, original = [0], trainer.training_step

    def stopping(self, *arguments):
        if steps[0] == step:
            raise KeyboardInterrupt
        steps[0] += 1
        original(self, *arguments)

    monkeypatch.setattr(trainer, "training_step", stopping)


@pytest.mark.parametrize("step", [3, 10])
def test_members_at_different_steps_go_on_each_from_its_own(go, whole, monkeypatch, step):
    save, saved = Trainer.save, []

    def only_the_first(self, members):
        saved.append(members[0].name)
        save(self, members[:1])

    with monkeypatch.context() as patch:
        stop_at(patch, step)
        patch.setattr(Trainer, "save", only_the_first)
        with pytest.raises(KeyboardInterrupt):
            go()
    said = []
    runs = go(progress=lambda what, *_, **__: said.append(what))
    assert saved and any("goes on after epoch" in line and "image" in line for line in said)
    assert [result(run) for run in runs] == whole


def test_a_finished_closed_form_is_not_solved_again(go, whole, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            go()
    solved = []
    linear = DECODERS["linear"]
    original = linear.finalize_fit
    monkeypatch.setattr(linear, "finalize_fit", lambda self: solved.append(self) or original(self))
    assert [result(run) for run in go()] == whole and not solved


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    else:
        place = {"first": 40, "last": len(content) - 9, "middle": len(content) // 2}[how]
        content[place] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "first", "middle", "last"])
def test_a_damaged_checkpoint_is_said_and_not_used(go, whole, monkeypatch, sample_images, tmp_path, how):
    only = small_configs(sample_images)[:1]
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            go(only)
    said = []
    run = Run.create(tmp_path / "runs", only[0])
    damage(run.file(CHECKPOINT), how)
    go(only, progress=lambda what, *_, **__: said.append(what))
    assert sum(CHECKPOINT in line and "not used" in line for line in said) == 1
    assert not any("goes on after" in line for line in said)
    assert result(run) == whole[0]


def test_a_image_replaced_before_going_on_starts_over_and_says_so(cache, tmp_path, monkeypatch):
    sample_images = small_images(tmp_path / "images")
    only = small_configs(sample_images)[:1]
    options = {"cache": cache, "accelerator": "cpu", "checkpoint_seconds": 0.0}
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            train_runs(only, tmp_path / "runs", **options)
    small_images(tmp_path / "others", 21)
    (sample_images / "03.png").write_bytes((tmp_path / "others" / "20.png").read_bytes())
    said = []
    (run,) = train_runs(only, tmp_path / "runs", progress=lambda what, *_, **__: said.append(what), **options)
    assert any("starts over, since a checkpoint was made on other images" in line for line in said)
    (fresh,) = train_runs(only, tmp_path / "fresh", **options)
    assert result(run) == result(fresh)


def test_a_image_replaced_while_it_trains_changes_nothing(cache, tmp_path, whole, monkeypatch):
    sample_images = small_images(tmp_path / "images")
    step, replaced = trainer.training_step, []

    def replacing(self, *arguments):
        if not replaced:
            for path in sample_images.iterdir():
                path.write_bytes(b"no image at all")
            replaced.append(True)
        step(self, *arguments)

    monkeypatch.setattr(trainer, "training_step", replacing)
    (run,) = train_runs(small_configs(sample_images)[:1], tmp_path / "runs", cache=cache, accelerator="cpu")
    assert replaced and result(run)["scores"] == whole[0]["scores"]
    assert run.result.data.digest in whole[0]["summary"]


def test_the_interval_is_kept_inside_an_epoch(go, monkeypatch, sample_images):
    """Steps of 20 seconds each, of the only clock that decides: a checkpoint after 45, and at the epochs' ends."""
    clock, saves = [0.0], []
    step, save = trainer.training_step, DecoderTrainer.save

    def ticking(self, *arguments):
        step(self, *arguments)
        clock[0] += 20.0

    def noting(self):
        saves.append((self.epoch, self.position))
        save(self)

    monkeypatch.setattr(trainer, "training_step", ticking)
    monkeypatch.setattr(DecoderTrainer, "save", noting)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    go(small_configs(sample_images, epochs=2)[:1], checkpoint_seconds=45.0)
    # Fourteen training images in batches of four: the third step passes 45 seconds.
    assert saves == [(0, 12), (1, 0), (1, 12), (2, 0)]


def test_a_clock_going_backwards_changes_nothing(go, whole, monkeypatch):
    import time

    hour = [1e9]

    def backwards():
        hour[0] -= 3600
        return hour[0]

    monkeypatch.setattr(time, "time", backwards)
    assert [result(run) for run in go()] == whole


def test_a_checkpoint_that_does_not_fit_is_an_error(go, sample_images, monkeypatch):
    only = small_configs(sample_images)[:1]
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            go(only)
    monkeypatch.setattr(
        group,
        "build_feature_decoder",
        lambda config, specs: build_feature_decoder(small_configs(sample_images)[2], specs),
    )
    with pytest.raises(AfterimageError, match=r"its checkpoint does not fit (?s:.*)delete the folder"):
        go(only)
