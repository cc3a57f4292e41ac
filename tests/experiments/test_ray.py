"""Studies on a real Ray cluster on this machine, with workers and machines that are lost."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import stand_ins
from afterimage.cli import main
from afterimage.config import DataConfig, DecoderConfig, RecipeConfig, RunConfig
from afterimage.config.inversion import EstimateConfig, InvertConfig
from afterimage.config.study import RowConfig, StudyConfig
from afterimage.experiments.queue import train_runs
from afterimage.experiments.ray import worker
from afterimage.experiments.ray.cluster import SETTINGS
from afterimage.experiments.ray.driver import find_bounds_on_ray, train_on_ray
from afterimage.experiments.study import run_study
from afterimage.runs.run import TRACEBACK, Run, scan
from afterimage.runtime.process import Stopped
from afterimage.training.checkpoint import CHECKPOINT
from children import context, hold, result, small_images, study_child

os.environ |= SETTINGS | {
    "RAY_worker_niceness": "0"
}  # on a busy machine workers would wait behind other tests
ray = pytest.importorskip(
    "ray", reason="Ray is not installed (pip install 'afterimage[cluster]'): not tested"
)


RESNET, VIT = "test_resnet.r160_in1k:layer2", "test_vit.r160_in1k:block1"
STORE = 100 * 2**20


@pytest.fixture(scope="module", autouse=True)
def no_weights():
    """Before the cluster: its processes have the environment of the one that starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AFTERIMAGE_WEIGHTS", raising=False)
        yield


@pytest.fixture(scope="module")
def nodes(no_weights):
    """A head that trains nothing and one machine with two CPUs; this process is connected to it."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    try:
        cluster = Cluster(initialize_head=True, head_node_args=head)
    except (Exception, SystemExit):  # Ray waits 30 seconds for its processes, too few on a very busy machine
        cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, object_store_memory=STORE)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def sample_images(tmp_path_factory):
    return small_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def check_same(tmp_path_factory, cache):
    """Checks that a finished run is what the local executor makes of it."""
    root = tmp_path_factory.mktemp("local")

    def check(there: Run) -> None:
        (here,) = train_runs(there.config, root, cache=cache, accelerator="cpu")
        assert there.state == "done" and result(there) == result(here)
        assert names(there) == names(here)

    return check


@pytest.fixture
def study(sample_images):
    return StudyConfig(
        "On Ray",
        sources=(RESNET, VIT),
        decoders=(DecoderConfig("linear"), DecoderConfig("transposed")),
        weights="random",
        data=DataConfig(f"folder:{sample_images}", resize=48, crop=32),
        recipe=RecipeConfig(epochs=2, batch_size=4),
    )


@pytest.fixture
def config(sample_images):
    """One run of ten epochs."""
    return RunConfig(
        (RESNET,),
        weights="random",
        decoder=DecoderConfig("transposed"),
        data=DataConfig(f"folder:{sample_images}", resize=48, crop=32),
        recipe=RecipeConfig(epochs=10, batch_size=4),
    )


@pytest.fixture
def train(nodes, cache, config, tmp_path):
    """Trains the run on Ray, with one CPU; what is said goes to a `Watcher`."""

    def train(watcher=None, **options):
        watcher = watcher or Watcher()
        train_on_ray(
            config, tmp_path / "ray", cache=cache, accelerator="cpu", progress=watcher, cpus=1, **options
        )
        return watcher

    return train


@pytest.fixture
def run(config, tmp_path):
    return Run(tmp_path / "ray" / config.name)


@pytest.fixture
def pace(monkeypatch, tmp_path):
    """Slows training down, and kills the first worker or its machine in its third epoch."""
    ray.cloudpickle.register_pickle_by_value(stand_ins)  # workers do not see the tests

    def pace(victim=""):
        paced = stand_ins.train_paced_group(str(tmp_path / "mark"), victim)
        monkeypatch.setattr("afterimage.experiments.ray.worker.train_group", paced)

    return pace


@pytest.fixture
def unseen(monkeypatch):
    """Workers look for another folder than this machine has."""
    monkeypatch.setattr("afterimage.experiments.ray.driver.folder_identity", lambda *_: (0, 0))


class Watcher:
    """Keeps what progress says, and calls `act` once, when training is past its second epoch."""

    def __init__(self, act=lambda: None):
        self.act, self.said, self.acted = act, [], False

    def __call__(self, what, done, total, group="", **figures):
        if total == 1:
            self.said.append(f"{group} {what}".strip())
        elif what == "training" and int(figures["epoch"].split("/")[0]) > 2 and not self.acted:
            self.acted = True
            self.act()

    def has(self, text):
        return any(text in line for line in self.said)


def names(run: Run) -> set[str]:
    return {path.relative_to(run.path).as_posix() for path in run.path.rglob("*")}


@pytest.mark.long
def test_whatever_raises_on_a_worker_ends_what_depends_on_it(
    nodes, cache, check_same, study, tmp_path, monkeypatch, unseen
):
    """A decoder's bug its run, a worker's bug its group; tracebacks come back like results, and nothing is retried.

    What else is in the table is what the local executor puts there, also the error of a loss that is no number.
    """
    ray.cloudpickle.register_pickle_by_value(stand_ins)  # workers do not see the tests
    monkeypatch.setattr("afterimage.experiments.ray.worker.train_group", stand_ins.train_broken_group)
    rows = (
        RowConfig((RESNET,), (DecoderConfig("broken"),)),
        RowConfig((RESNET.replace("layer2", "nolayer"),)),
        RowConfig((RESNET,), (DecoderConfig("transposed"),), recipe={"learning_rate": 1e30}),
    )
    study = replace(study, rows=rows, baselines=False)
    train = partial(train_on_ray, cpus=torch.get_num_threads())
    watcher, options = Watcher(), {"cache": cache, "accelerator": "cpu"}
    runs, errors = run_study(study, tmp_path / "ray", train=train, progress=watcher, **options)
    linear, transposed, *vits, broken, unknown, also, diverged = runs
    check_same(linear)
    check_same(transposed)
    assert {run.state for run in (*vits, broken, unknown, also, diverged)} == {"failed"}
    assert broken.status["error"] == "IndexError: a decoder's own bug"
    assert "in decode" in broken.file(TRACEBACK).read_text()
    assert all("in train_broken_group" in run.file(TRACEBACK).read_text() for run in vits)
    assert all(run.status["error"] == 'KeyError: "a worker\'s own bug"' for run in vits)
    assert "nolayer" in unknown.status["error"]
    told = sorted(map(str, errors))
    assert len(told) == 5 and not any("\n" in line for line in told)
    assert (
        sum(f"(traceback: {run.file(TRACEBACK)})" in line for line in told for run in (broken, vits[0])) == 2
    )
    expected = []
    train_runs([diverged.config], tmp_path / "local", failures=expected, **options)
    assert str(expected[0]) in told
    assert watcher.has("/2] is trained on") and not watcher.has("retry")
    watcher = Watcher()
    train([linear.config, transposed.config], tmp_path / "ray", progress=watcher)
    assert len(watcher.said) == 2 and all("done already" in line for line in watcher.said)


def test_a_killed_worker_is_replaced_and_goes_on_from_the_checkpoint(train, run, pace, check_same):
    pace("worker")
    watcher = train()
    assert watcher.has("in the shared folder") and watcher.has("retry 1 of 3, from the last checkpoint")
    assert watcher.has("goes on after epoch")
    check_same(run)


@pytest.mark.long
def test_a_run_whose_folder_is_lost_with_its_worker_begins_anew(train, run, pace, unseen, check_same):
    pace("worker")
    watcher = train()
    assert watcher.has("does not see") and watcher.has("in a folder of its own")
    assert watcher.has("retry 1 of 3, anew") and not watcher.has("goes on after epoch")
    assert not list(run.path.glob("lock.*"))
    check_same(run)


@pytest.mark.long
def test_retries_end(train, run, pace):
    pace("worker")
    failures = []
    train(retries=0, failures=failures)
    assert run.state == "failed" and "the worker was lost 1 times" in run.status["error"]
    assert [str(error) for error in failures] == [run.status["error"]] and not list(run.path.glob("lock.*"))


@pytest.mark.long
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unseen"])
def test_a_stop_leaves_a_checkpoint_to_go_on_from(train, run, pace, check_same, shared, request):
    if not shared:
        request.getfixturevalue("unseen")
    pace()
    watcher = Watcher(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped) as stopped:
        train(watcher)
    assert stopped.value.code == 128 + signal.SIGTERM and watcher.has("stopped after the step under way")
    assert run.state == "stopped" and run.file(CHECKPOINT).exists() and not list(run.path.glob("lock.*"))
    assert train().has("goes on after epoch")
    check_same(run)


@pytest.mark.long
def test_what_another_process_is_at_is_left_to_it(train, config, run, tmp_path):
    Run.create(tmp_path / "ray", config)
    process = context().Process(target=hold, args=(run.path, tmp_path / "ready"))
    process.start()
    while not (tmp_path / "ready").exists():
        assert process.is_alive()

    class Killer(Watcher):
        def __call__(self, what, done, total, **figures):
            super().__call__(what, done, total, **figures)
            if "is left to process" in what:
                assert run.state == "new"
                process.kill()
                process.join()

    watcher = train(Killer())
    assert process.exitcode == -signal.SIGKILL and run.state == "done"
    assert watcher.has("is left to process") and watcher.has("taken over")


@pytest.mark.long
def test_a_local_process_and_ray_share_a_study(nodes, cache, study, tmp_path):
    root, log = tmp_path / "study", tmp_path / "log"
    process = context().Process(target=study_child, args=(study, root, cache, log), kwargs={"pause": 0.5})
    process.start()
    watcher = Watcher()
    runs, failures = run_study(
        study, root, cache=cache, accelerator="cpu", progress=watcher, train=partial(train_on_ray, cpus=1)
    )
    process.join(120)
    assert process.exitcode == 0 and not failures and {run.state for run in runs} == {"done"}
    here = {
        line.removeprefix("begins ") for line in log.read_text().splitlines() if line.startswith("begins")
    }
    # A worker that comes late says so, and the driver then reports the run as done too.
    words = ("is done, by another process", "is done already")
    late = {run.name for run in runs if any(watcher.has(f"{run.name} {said}") for said in words)}
    there = {run.name for run in runs if watcher.has(f"{run.name} done")} - late
    trained = {run.name for run in runs if run.result.kind == "decoder"}
    assert here & trained | there == trained and not here & there, "\n".join([*here, *watcher.said])


@pytest.mark.long
def test_a_lost_machine_is_replaced(nodes, train, run, pace, check_same):
    nodes.add_node(num_cpus=2, object_store_memory=STORE)
    pace("machine")
    watcher = train()
    assert watcher.has("retry 1 of 3, from the last checkpoint") and watcher.has("goes on after epoch")
    check_same(run)


@pytest.mark.long
def test_controls_and_report_from_the_command_line(nodes, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AFTERIMAGE_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    small_images(tmp_path / "images")
    (tmp_path / "mine.toml").write_text(
        f'sources = ["{RESNET}"]\ndecoders = ["linear"]\nweights = "random"\nbaselines = false\n'
        '[data]\nsource = "folder:images"\nresize = 48\ncrop = 32\n'
    )
    main(["study", "mine.toml", "--executor", "ray", "--controls", "--device", "cpu", "--cpus", "1"])
    err = capsys.readouterr().err
    runs = list(scan(tmp_path / "runs/mine"))
    assert runs and all(run.state == "done" and run.file("controls.json").exists() for run in runs)
    assert "is trained on" in err and (tmp_path / "runs/mine/report/index.html").exists()


@pytest.mark.long
def test_without_an_address_ray_is_started_here_and_quietly(tmp_path):
    code = (
        "from afterimage.experiments.ray.cluster import connect\n"
        "with connect('', print) as ray:\n"
        "    print(ray.cluster_resources()['object_store_memory'], ray.get(ray.remote(lambda: 7).remote()))\n"
        "assert not ray.is_initialized()\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["starting Ray on this machine (no --address)", f"{float(2**28)} 7"]
    assert not done.stderr


@pytest.mark.long
def test_bounds_are_the_local_ones_and_a_killed_worker_goes_on_from_its_batches(
    nodes, cache, study, tmp_path, monkeypatch
):
    search = InvertConfig(steps=4, held_out=2)
    study = replace(
        study,
        baselines=False,
        invert=6,
        inversion=search,
        estimate=EstimateConfig(images=4, steps=3, channels=4),
    )
    options, threads = {"cache": cache, "accelerator": "cpu"}, torch.get_num_threads()
    mark = tmp_path / "mark"
    ray.cloudpickle.register_pickle_by_value(stand_ins)  # workers do not see the tests
    monkeypatch.setattr(worker, "find_bound", stand_ins.find_bound_killed_once(str(mark)))
    watcher = Watcher()
    there, errors = run_study(
        study, tmp_path / "ray", progress=watcher,
        train=partial(train_on_ray, cpus=threads), bounds=partial(find_bounds_on_ray, cpus=threads), **options,
    )  # fmt: skip
    here, expected = run_study(study, tmp_path / "local", **options)
    assert errors == expected == [] and mark.exists() and watcher.has("retry 1 of 3, from the last batch")
    assert [run.name for run in there] == [run.name for run in here]
    trained, bounds = [
        [run for run in there if (run.result.kind == "inversion") is kind] for kind in (False, True)
    ]
    assert len(bounds) == 2 * len(trained)
    for one, other in zip(there, here, strict=True):
        assert one.result.scores == other.result.scores

    monkeypatch.setattr("afterimage.experiments.ray.driver.folder_identity", lambda *_: (0, 0))
    shutil.rmtree(bounds[0].path)
    watcher = Watcher()
    again = find_bounds_on_ray(trained, study, tmp_path / "ray", [], progress=watcher, **options)
    assert watcher.has("does not see") and [run.name for run in again] == [run.name for run in bounds]
