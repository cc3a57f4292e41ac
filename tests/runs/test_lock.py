import json
import os
import threading
import time
from dataclasses import replace

import pytest

import afterimage.runs.lock
from afterimage.config import AfterimageError, DataConfig, DecoderConfig, RecipeConfig
from afterimage.config.study import StudyConfig
from afterimage.experiments.study import run_study
from afterimage.runs.lock import Lock, hold_lock
from afterimage.runs.run import Run, scan
from afterimage.runtime.process import LockLost
from children import (
    MODEL,
    context,
    hold,
    result,
    small_configs,
    small_images,
    study_child,
    take_turns,
    train_child,
)


def start(function, *arguments, **options):
    process = context().Process(target=function, args=arguments, kwargs=options)
    process.start()
    return process


def wait_for(path, text="", seconds=60):
    until = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < until, f"{path} did not appear, or never said {text!r}"
        time.sleep(0.01)


def someone_elsewhere(folder, number=1, machine="elsewhere boot namespace"):
    path = folder / f"lock.{number}"
    path.write_text(json.dumps([1, "1", machine]))
    return path


def test_one_at_a_time(tmp_path):
    lock, other = Lock(tmp_path), Lock(tmp_path)
    assert lock.acquire() and not other.acquire()
    assert str(other.holder).startswith(f"process {os.getpid()} on ")
    lock.check()
    lock.release()
    assert not list(tmp_path.iterdir()) and other.acquire()
    other.release()


def test_a_live_process_keeps_it_and_a_dead_one_does_not(tmp_path):
    process = start(hold, tmp_path, tmp_path / "ready")
    wait_for(tmp_path / "ready")
    said = []
    lock = Lock(tmp_path, said.append)
    assert not lock.acquire() and lock.holder.pid == process.pid
    process.kill()
    process.join()
    assert lock.acquire()
    assert len(said) == 1 and f"taken over from process {process.pid}" in said[0]
    lock.release()
    assert not list(tmp_path.glob("lock*"))


def test_a_process_id_used_again_is_not_taken_for_the_holder(tmp_path):
    lock = Lock(tmp_path)
    assert lock.acquire()
    (path,) = tmp_path.glob("lock.*")
    pid, _, machine = json.loads(path.read_text())
    path.write_text(json.dumps([pid, "before it was started", machine]))
    assert Lock(tmp_path).acquire()


@pytest.mark.parametrize("hour", [-1e6, 1e6])
def test_another_machines_lock_is_dead_once_it_gave_no_sign_of_life(tmp_path, monkeypatch, hour):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    path = someone_elsewhere(tmp_path)
    lock = Lock(tmp_path)
    for beat in range(5):  # whatever its clock says, it moves
        os.utime(path, (hour + beat, hour + beat))
        assert not lock.acquire() and str(lock.holder) == "process 1 on elsewhere"
        clock[0] += afterimage.runs.lock.STALE_SECONDS - 1
    assert not lock.acquire()
    clock[0] += 2
    assert lock.acquire()
    lock.release()


def test_who_was_taken_for_dead_notices_and_leaves_the_other_alone(tmp_path):
    late, path = Lock(tmp_path), tmp_path / "lock.1"
    assert late.acquire()
    path.unlink()
    someone_elsewhere(tmp_path, 1)
    with pytest.raises(LockLost, match="another process took over this run"):
        late.check()
    late.release()
    assert path.exists() and late.lost


def test_it_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(afterimage.runs.lock, "HEARTBEAT_SECONDS", 0.01)
    before = set(threading.enumerate())
    lock = Lock(tmp_path)
    assert lock.acquire()
    (beating,) = set(threading.enumerate()) - before
    (path,) = tmp_path.glob("lock.*")
    os.utime(path, (0, 0))
    until = time.monotonic() + 20
    while path.stat().st_mtime == 0:
        assert time.monotonic() < until
        time.sleep(0.01)
    lock.release()
    assert not beating.is_alive()


def test_waiting_ends_when_the_holder_does(tmp_path, monkeypatch):
    monkeypatch.setattr(afterimage.runs.lock, "POLL_SECONDS", 0.01)
    process = start(hold, tmp_path, tmp_path / "ready")
    wait_for(tmp_path / "ready")
    said = []

    def killing(text):
        said.append(text)
        process.kill()
        process.join()

    with hold_lock(tmp_path, killing) as lock:
        lock.check()
    assert "waiting for process" in said[0] and "taken over" in said[1]


def test_many_processes_take_turns_though_some_die(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    arguments = [(folder, tmp_path / "inside", 30, tmp_path / "failed", seed) for seed in range(4)]
    processes = [start(take_turns, *one) for one in arguments]
    for process in processes:
        process.join(120)
    assert sorted(process.exitcode for process in processes) == [-9, -9, 0, 0]
    assert not (tmp_path / "failed").exists()


def test_a_folder_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(AfterimageError, match=r"cannot write .*lock\.1"):
        Lock(tmp_path / "gone").acquire()


STUDY = StudyConfig(
    "Small",
    sources=(f"{MODEL}:layer1", f"{MODEL}:layer2"),
    decoders=(DecoderConfig("linear"), DecoderConfig("transposed")),
    seeds=(1, 2, 3),
    weights="random",
    data=DataConfig("procedural:10", test="procedural:3", resize=32, crop=32),
    recipe=RecipeConfig(epochs=2, batch_size=4),
)


def table(root):
    return {
        run.name: result(run) if "baseline" not in run.name else run.result.per_image for run in scan(root)
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The table of one process that had the study for itself."""
    folder = tmp_path_factory.mktemp("alone")
    run_study(STUDY, folder / "runs", cache=folder / "cache", accelerator="cpu")
    return table(folder / "runs")


def test_processes_on_one_study_share_the_work_and_end_with_the_same_table(tmp_path, alone):
    count = 3
    logs = [tmp_path / f"log{i}" for i in range(count)]
    arguments = [(STUDY, tmp_path / "shared", tmp_path / "cache", log) for log in logs]
    processes = [start(study_child, *one, pause=0.05) for one in arguments]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * count
    lines = [log.read_text().splitlines() for log in logs]
    begun = [line for own in lines for line in own if line.startswith("begins")]
    assert len(begun) == len(set(begun)) == len(alone)
    assert sum(any(line.startswith("begins test") for line in own) for own in lines) >= 2
    assert any("is left to process" in line for own in lines for line in own)
    assert table(tmp_path / "shared") == alone
    assert not list((tmp_path / "shared").rglob("lock.*"))


def test_what_a_killed_process_had_is_taken_over_by_the_one_that_waits(tmp_path, alone):
    study = replace(STUDY, seeds=(1,), baselines=False)
    first = start(study_child, study, tmp_path / "shared", tmp_path / "cache", tmp_path / "log1", pause=20)
    wait_for(tmp_path / "log1", "begins")
    second = start(study_child, study, tmp_path / "shared", tmp_path / "cache", tmp_path / "log2")
    wait_for(tmp_path / "log2", "is left to process")
    first.kill()
    second.join(120)
    assert second.exitcode == 0 and f"taken over from process {first.pid}" in (tmp_path / "log2").read_text()
    found = table(tmp_path / "shared")
    assert len(found) == 4 and found == {name: alone[name] for name in found}


def test_what_failed_elsewhere_just_now_is_not_tried_again(tmp_path):
    """The lock is held when first asked for; when it comes free, the run has failed."""
    from afterimage import train_runs

    sample_images = small_images(tmp_path / "images")
    config = small_configs(sample_images)[0]
    run = Run.create(tmp_path / "runs", config)
    lock = Lock(run.path)
    assert lock.acquire()

    def failing(what, *_, **__):
        if "is left to" in what:
            run.set_state("failed", error="it cannot be done")
            lock.release()

    with pytest.raises(AfterimageError, match="it cannot be done"):
        train_runs(config, tmp_path / "runs", cache=tmp_path / "cache", progress=failing)
    assert run.status == {"state": "failed", "error": "it cannot be done"}
    train_child([config], tmp_path / "runs", tmp_path / "cache")
    assert run.state == "done"
