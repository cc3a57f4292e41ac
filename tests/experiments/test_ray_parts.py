"""What the Ray executor is made of, without a cluster: shares of machines, files from workers, progress, refusals."""

import hashlib
import io
import sys
from dataclasses import replace

import pytest

import afterimage.runtime.progress
from afterimage.cli import main
from afterimage.config import AfterimageError, DataConfig, DecoderConfig, RunConfig
from afterimage.experiments.ray.files import LIMITS, PIECE, Inbox, check_result, own_files, pieces
from afterimage.experiments.ray.needs import BASE_BYTES, describe, group_bytes, share
from afterimage.experiments.ray.post import CAPACITY, Order, Piece, Post
from afterimage.runs.files import write_json
from afterimage.runs.run import Run
from afterimage.runtime.progress import Display, silent
from afterimage.training.checkpoint import CHECKPOINT, PREVIOUS

MODEL = "test_resnet.r160_in1k"
GIB = 2**30


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
    needs = share([3 * GIB] * count, nodes, accelerator=accelerator, cpus=cpus, say=silent)
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
        share([GIB], nodes, accelerator=accelerator, cpus=cpus, say=silent)


def test_a_group_larger_than_any_machine_is_said():
    said = []
    (need,) = share([20 * GIB], [node(4)], accelerator="auto", cpus=None, say=said.append)
    assert need["memory"] == 8 * GIB and "20.0 GiB" in said[0] and "may run out" in said[0]
    assert describe(need) == "4 CPUs, 8.0 GiB"
    assert describe({"num_cpus": 1, "num_gpus": 1, "memory": GIB}) == "1 CPU, 1 GPU, 1.0 GiB"


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


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "here", RunConfig((f"{MODEL}:layer2",)))


@pytest.fixture
def there(tmp_path, run):
    return Run.create(tmp_path / "there", RunConfig((f"{MODEL}:layer2",)))


def order(keep=8):
    return Order(1, 1, (), (), "", "", "", True, "", (), {}, None, "cpu", keep, 1, 0.0, 0.0)


def inbox(run):
    return Inbox({run.name: run}, keep=8, guard=lambda run: None)


def piece(run, name="scores.csv", content=b"abc", **changes):
    facts = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "offset": 0,
        "run": run.name,
    }
    return Piece(1, 1, name=name, content=content, **(facts | changes))


def test_files_come_back_whole_and_the_status_last(run, there):
    large = bytes(range(256)) * (PIECE // 256) + b"end"
    contents = {
        "scores.csv": b"id\n",
        CHECKPOINT: large,
        "reconstructions/003.png": b"\x89PNG",
        "status.json": b"{}",
    }
    contents |= {"environment.json": b""}
    for name, content in contents.items():
        there.file(name).parent.mkdir(exist_ok=True)
        there.file(name).write_bytes(content)
    for name in ("lock.1", ".summary.json.x.part", "reconstructions/008.png", "notes.txt"):
        there.file(name).write_text("stays")
    run.file(CHECKPOINT).write_bytes(b"before")
    sent = own_files(there, keep=8)
    assert sorted(sent) == sorted(contents) and sent[-1] == "status.json"
    box = inbox(run)
    for name in sent:
        parts = [box.add(part) for part in pieces(order(), there, name)]
        assert parts[-1] == run.file(name) and parts[:-1] == [None] * (len(parts) - 1)
    assert all(run.file(name).read_bytes() == content for name, content in contents.items())
    assert run.file(PREVIOUS).read_bytes() == b"before"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("../escaped.csv", {}, "no run has such a file"),
        ("/etc/passwd", {}, "no run has such a file"),
        ("reconstructions/../../000.png", {}, "no run has such a file"),
        ("reconstructions/000.png\n", {}, "no run has such a file"),
        ("reconstructions/٠٠٠.png", {}, "no run has such a file"),
        ("reconstructions/008.png", {}, "no run has such a file"),
        ("config.toml", {}, "no run has such a file"),
        ("lock.7", {}, "no run has such a file"),
        ("scores.csv", {"run": "../other"}, "no such run"),
        ("scores.csv", {"size": LIMITS[".csv"] + 1}, "over the limit"),
        ("scores.csv", {"size": -1}, "over the limit"),
        ("scores.csv", {"size": 2}, "do not fit together"),
        ("scores.csv", {"offset": 3, "size": 6}, "do not fit together"),
        ("scores.csv", {"sha256": "0" * 64}, "digest"),
    ],
)
def test_files_that_no_worker_may_send_are_refused(run, tmp_path, name, changes, message):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AfterimageError, match=message):
        inbox(run).add(replace(piece(run, name), **changes))
    assert sorted(tmp_path.rglob("*")) == before


def test_pieces_of_different_files_are_not_mixed(run):
    box = inbox(run)
    assert box.add(piece(run, content=b"abc", size=6)) is None
    with pytest.raises(AfterimageError, match="do not fit together"):
        box.add(piece(run, "history.csv", content=b"def", size=6, offset=3))


def test_a_link_out_of_the_run_folder_is_not_followed(run, tmp_path):
    (tmp_path / "outside").mkdir()
    run.file("reconstructions").symlink_to(tmp_path / "outside")
    with pytest.raises(AfterimageError, match="leads out"):
        inbox(run).add(piece(run, "reconstructions/000.png"))
    assert not list((tmp_path / "outside").iterdir())


def test_a_lost_lock_stops_what_comes_in(run):
    def guard(run):
        raise AfterimageError("lost")

    with pytest.raises(AfterimageError, match="lost"):
        Inbox({run.name: run}, keep=8, guard=guard).add(piece(run))
    assert not run.file("scores.csv").exists()


def test_a_result_of_another_run_is_refused(run):
    run.file("decoder.safetensors").write_bytes(b"weights")
    summary = {"settings_sha256": run.config.digest, "decoder_sha256": hashlib.sha256(b"weights").hexdigest()}
    write_json(run.file("summary.json"), summary)
    check_result(run, run.config.digest)
    for key in summary:
        write_json(run.file("summary.json"), summary | {key: "0" * 64})
        with pytest.raises(AfterimageError, match="not this run's result"):
            check_result(run, run.config.digest)


def test_the_post_is_bounded_and_passes_a_stop_on():
    post = Post()
    assert post.put(["one"], CAPACITY + 1) == (True, False)  # alone anything fits
    assert post.put(["two"], 1) == (False, False) and post.put(["three"]) == (True, False)
    post.stop()
    assert post.take() == ["one", "three"] and post.put(["two"], 1) == (True, True)


def test_without_ray_the_command_to_install_it_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["study", "quickstart", "--executor", "ray"])
    assert "pip install 'afterimage[cluster]'" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags", [["--address", "auto"], ["--copy-back"], ["--cpus", "2"], ["--retries", "1"]]
)
def test_flags_of_the_ray_executor_need_it(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["study", "quickstart", *flags])
    assert f"{flags[0]} goes with --executor ray" in capsys.readouterr().err


def display(monkeypatch, *, terminal):
    import rich.console

    text = io.StringIO()
    own = rich.console.Console(file=text, force_terminal=terminal, width=60, highlight=False, markup=False)
    monkeypatch.setattr(afterimage.runtime.progress, "console", lambda **_: own)
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
