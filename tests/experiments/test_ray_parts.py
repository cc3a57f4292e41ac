"""What the Ray executor is made of, without a cluster: shares of machines, folders, progress, refusals."""

import contextlib
import io
import sys
from types import SimpleNamespace

import pytest

import afterimage.runtime.terminal
from afterimage.cli import main
from afterimage.config import AfterimageError, DataConfig, DecoderConfig, RunConfig
from afterimage.config.study import StudyConfig
from afterimage.experiments.ray import driver
from afterimage.experiments.ray.cluster import BASE_BYTES, allocate_resources, describe, group_bytes
from afterimage.experiments.ray.driver import find_bounds_on_ray
from afterimage.experiments.ray.worker import folder_identity, pack, unpack
from afterimage.runs.run import Run
from afterimage.runtime.terminal import Display, no_progress

MODEL = "test_resnet.r160_in1k"
GIB = 2**30
STUDY = StudyConfig(sources=(f"{MODEL}:layer1",))


def node(cpus, memory=8 * GIB, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": cpus, "memory": memory} | ({"GPU": gpus} if gpus else {})}


@pytest.mark.parametrize(
    ("count", "nodes", "accelerator", "cpus", "expected"),
    [
        (3, [node(8)], "auto", None, (2, 0)),
        (1, [node(8)], "auto", None, (8, 0)),
        (20, [node(8)], "auto", None, (1, 0)),
        (4, [node(8), node(4), node(0)], "auto", None, (2, 0)),
        (4, [node(8), node(64, alive=False)], "auto", None, (2, 0)),
        (4, [node(8)], "cpu", 3, (3, 0)),
        (4, [node(8, gpus=2)], "auto", None, (4, 1)),
        (4, [node(8, gpus=2), node(2)], "cuda", None, (4, 1)),
        (4, [node(8, gpus=2)], "cpu", None, (2, 0)),
        (1, [node(8, gpus=4)], "auto", None, (8, 1)),
    ],
)
def test_groups_share_the_machines(count, nodes, accelerator, cpus, expected):
    needs = allocate_resources([3 * GIB] * count, nodes, accelerator=accelerator, cpus=cpus, log=no_progress)
    assert {(need["num_cpus"], need["num_gpus"]) for need in needs} == {expected} and len(needs) == count
    assert {need["memory"] for need in needs} == {BASE_BYTES if expected[1] else 3 * GIB}


@pytest.mark.parametrize(
    ("nodes", "accelerator", "cpus", "message"),
    [
        ([node(0)], "auto", None, "no machine with a CPU"),
        ([node(4)], "cuda", None, "no machine of the Ray cluster has a GPU"),
        ([node(4), node(2)], "auto", 5, "between 1 and 4.*got 5"),
        ([node(4)], "auto", 0, "between 1 and 4"),
    ],
)
def test_what_no_machine_has_is_refused(nodes, accelerator, cpus, message):
    with pytest.raises(AfterimageError, match=message):
        allocate_resources([GIB], nodes, accelerator=accelerator, cpus=cpus, log=no_progress)


def test_a_group_larger_than_any_machine_is_said():
    said = []
    (need,) = allocate_resources([20 * GIB], [node(4)], accelerator="auto", cpus=None, log=said.append)
    assert need["memory"] == 8 * GIB and "20.0 GiB" in said[0] and "may run out" in said[0]
    assert describe(need) == "4 CPUs, 8.0 GiB"
    assert describe({"num_cpus": 1, "num_gpus": 1, "memory": GIB}) == "1 CPU, 1 GPU, 1.0 GiB"


def test_no_runs_need_no_cluster(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "connect", None)
    assert find_bounds_on_ray([], STUDY, tmp_path, []) == []


def test_a_bound_whose_worker_sees_no_folder_is_found_here_after_the_others(tmp_path, monkeypatch):
    runs = [Run.create(tmp_path, RunConfig((f"{MODEL}:layer{number}",))) for number in (1, 2)]
    answers, order = [None, ([], [])], []

    class Tasks:
        def __init__(self, *_):
            self.running, self.show, self.close = [], print, list

        def submit(self, number, *_, **__):
            self.running.append(number)

        def ended(self):
            order.append(self.running.pop(0))
            return [(order[-1], answers[order[-1]])]

    ray = SimpleNamespace(nodes=lambda: [node(4)])
    monkeypatch.setattr(driver, "connect", lambda *_: contextlib.nullcontext(ray))
    monkeypatch.setattr(driver, "Tasks", Tasks)
    monkeypatch.setattr(driver, "find_bounds", lambda *_, **__: order.append("here") or runs[:1])
    assert find_bounds_on_ray(runs, STUDY, tmp_path, []) == runs[:1]
    assert order == [0, 1, "here"]


def test_memory_grows_with_the_runs_of_a_group():
    def config(parameters):
        return RunConfig(
            (f"{MODEL}:layer2",),
            decoder=DecoderConfig("transposed", parameters=parameters),
            data=DataConfig("procedural:8", resize=64, crop=64),
        )

    small, large = config(100_000), config(1_000_000)
    one, both = group_bytes([large]), group_bytes([small, large])
    assert group_bytes([small]) + 4 * 4 * 800_000 < one < both < one + group_bytes([small])


def test_a_folder_comes_back_whole_and_its_status_last(tmp_path):
    config = RunConfig((f"{MODEL}:layer2",))
    here, there = Run.create(tmp_path / "here", config), Run.create(tmp_path / "there", config)
    contents = {
        "decoder.safetensors": b"\x00weights",
        "reconstructions/003.png": b"\x89PNG",
        "traceback.txt": b"",
    }
    for name, content in ({"status.json": b"{}"} | contents).items():
        there.file(name).parent.mkdir(exist_ok=True)
        there.file(name).write_bytes(content)
    files = pack(there)
    assert list(files)[-1] == "status.json"
    unpack(here, files)
    assert pack(here) == files and contents.items() <= files.items()


def test_folders_of_one_path_are_told_apart(tmp_path):
    config = RunConfig((f"{MODEL}:layer2",))
    for name in ("one", "other"):
        Run.create(tmp_path / name, config)
    one = folder_identity(str(tmp_path / "one"), config)
    assert (
        one
        == folder_identity(str(tmp_path / "one"), config)
        != folder_identity(str(tmp_path / "other"), config)
    )
    assert folder_identity(str(tmp_path / "none"), config) is None


def test_without_ray_the_command_to_install_it_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["study", "quickstart", "--executor", "ray"])
    assert "pip install 'afterimage[cluster]'" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--address", "auto"], ["--cpus", "2"], ["--retries", "1"]])
def test_flags_of_the_ray_executor_need_it(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["study", "quickstart", *flags])
    assert f"{flags[0]} goes with --executor ray" in capsys.readouterr().err


def display(monkeypatch, *, terminal):
    import rich.console

    text = io.StringIO()
    own = rich.console.Console(file=text, force_terminal=terminal, width=60, highlight=False, markup=False)
    monkeypatch.setattr(afterimage.runtime.terminal, "console", lambda **_: own)
    return Display(interval=0.0), text


def test_groups_side_by_side_have_a_line_each(monkeypatch):
    show, text = display(monkeypatch, terminal=True)
    with show:
        show("training", 3, 10, group="[1/2]", loss=0.5)
        show("training", 4, 10, group="[2/2]")
        status = str(show._status.renderable.text)
        assert status.splitlines() == ["[1/2]  training  3/10 (30%)  loss 0.5", "[2/2]  training  4/10 (40%)"]
        show("training", 10, 10, group="[1/2]")
        assert str(show._status.renderable.text) == "[2/2]  training  4/10 (40%)"
    assert show._status is None and "[1/2]  training  10/10 (100%)" in text.getvalue()


def test_groups_are_plain_lines_where_there_is_no_terminal(monkeypatch):
    show, text = display(monkeypatch, terminal=False)
    show("training", 3, 10, group="[1/2]")
    show("done", 1, 1, group="[2/2]")
    show("training", 6, 10, group="[1/2]")
    assert text.getvalue().splitlines() == [
        "[1/2]  training  3/10 (30%)",
        "[2/2]  done",
        "[1/2]  training  6/10 (60%)",
    ]
