"""Runs on streamed images: the same decoders as on kept ones, errors that name an image, memory that stays flat."""

import signal
import threading
from dataclasses import replace

import pytest

from afterimage.config import AfterimageError
from afterimage.data import dataset
from afterimage.data.sources.huggingface import RowOriginal
from afterimage.experiments.queue import train_runs
from afterimage.runs.run import scan
from afterimage.runtime.process import Stopped
from afterimage.runtime.terminal import no_progress
from benchmarks.child import in_child
from benchmarks.stream import write_small
from children import result, small_configs
from some_shards import write_shards, write_tar
from test_cli import MODEL, SMALL, command  # noqa: F401


@pytest.fixture(autouse=True)
def streaming(monkeypatch):
    monkeypatch.setattr(dataset, "MAX_DECODED_IMAGES", 0)


@pytest.fixture
def shard(sample_images, tmp_path):
    return write_tar(
        tmp_path / "images.tar", {path.name: path.read_bytes() for path in sample_images.iterdir()}
    )


def configs(source, sample_images):
    return [replace(c, data=replace(c.data, source=source)) for c in small_configs(sample_images)]


def go(configs, tmp_path, name, **options):
    return train_runs(configs, tmp_path / name, cache=tmp_path / "cache", accelerator="cpu", **options)


def learned(runs):
    """All of the runs that must not depend on how their images were read, but for what says how."""
    parts = [result(run) for run in runs]
    return [
        (part["decoder"], part["history"], part["scores"], run.result.data.digest)
        for part, run in zip(parts, runs, strict=True)
    ]


def test_a_decoder_learns_the_same_whichever_way_its_images_come(sample_images, shard, tmp_path, monkeypatch):
    chosen = configs(f"webdataset:{shard}", sample_images)
    ways = [go(chosen, tmp_path, "streamed")]
    monkeypatch.setattr(dataset, "MAX_DECODED_IMAGES", 50_000)
    ways.append(go(chosen, tmp_path, "kept"))
    assert learned(ways[0]) == learned(ways[1])
    for run in ways[0]:
        assert any("20 images were streamed" in note for note in run.result.notes)


def test_a_stopped_run_goes_on_to_the_same_bits(sample_images, shard, tmp_path, monkeypatch):
    from afterimage.training import trainer

    chosen = configs(f"webdataset:{shard}", sample_images)
    whole = go(chosen, tmp_path, "whole")
    step, left = trainer.training_step, [5]

    def stopping(self, *arguments):
        left[0] -= 1
        if left[0] == 0:
            raise Stopped(signal.SIGTERM)
        return step(self, *arguments)

    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", stopping)
        with pytest.raises(Stopped):
            go(chosen, tmp_path, "stopped")
    assert threading.active_count() <= before, "what decoded ahead has ended"
    assert learned(go(chosen, tmp_path, "stopped")) == learned(whole)


def test_a_image_that_cannot_be_decoded_stops_the_runs_with_its_name(sample_images, tmp_path):
    files = {path.name: path.read_bytes() for path in sorted(sample_images.iterdir())}
    broken = {name: content[:150] if name == "03.png" else content for name, content in files.items()}
    shard = write_tar(tmp_path / "broken.tar", broken)
    failures = []
    runs = go(configs(f"webdataset:{shard}", sample_images), tmp_path, "runs", failures=failures)
    assert [run.state for run in runs] == ["failed"] * 3
    assert all("broken.tar/03.png: is damaged" in run.status["error"] for run in runs)
    assert "broken.tar/03.png" in str(failures[0])


def test_what_goes_wrong_in_a_worker_ends_the_run_with_the_images_name(
    sample_images, shard, tmp_path, monkeypatch
):
    data = configs(f"webdataset:{shard}", sample_images)[:1]
    go(data, tmp_path, "whole")
    monkeypatch.setattr(
        RowOriginal, "read", lambda *_: (_ for _ in ()).throw(MemoryError("no room in a worker"))
    )
    with pytest.raises(AfterimageError, match=r"images.tar/\d+.png could not be read: MemoryError: no room"):
        go(data, tmp_path, "again")


def test_a_study_on_shards_from_the_command_line(command, tmp_path, no_figures):  # noqa: F811
    source = write_shards(tmp_path / "shards", 3, 10)
    code, out, err = command(
        "study", "--models", MODEL, "--layers", "layer1,layer2", "--decoders", "linear", "transposed",
        "--data", source, "--epochs", 1, *SMALL,
    )  # fmt: skip
    assert code == 0, err
    runs = list(scan(tmp_path / "runs" / MODEL))
    decoders = [run for run in runs if run.result.kind == "decoder"]
    assert {run.state for run in runs} == {"done"} and len(decoders) == 4
    assert all(run.result.data.source == source for run in runs)
    assert all(row["id"].startswith("shard-00") for run in decoders for row in run.result.per_image)
    report = (tmp_path / "runs" / MODEL / "report" / "report.md").read_text()
    assert "left out: 30 files not read: 30 .cls" in report
    assert f"preparing {tmp_path}/shards/shard-000.tar" in err
    code, out, _ = command("study", "verify", tmp_path / "runs" / MODEL)
    assert code == 0, out


@pytest.mark.long
def test_memory_stays_flat_from_a_thousand_to_twenty_thousand_images(tmp_path):
    peaks = []
    for count in (1_000, 20_000):
        sources = []
        for kind in ("webdataset", "folder"):
            (tmp_path / f"{kind}-{count}").mkdir()
            sources.append(write_small(tmp_path / f"{kind}-{count}", kind, count, no_progress))
        work = {"sources": sources, "cache": str(tmp_path / "cache"), "streamed": True, "most": 3_000}
        outcome = in_child("stream:passes", **work)
        assert [p["images"] for p in outcome.value] == [min(3_000, round(0.72 * count))] * 2
        peaks.append(outcome.peak_bytes / 2**20)
    # Their decoded pixels alone would be 70 MiB more; the pages of the shards are 20 MiB of it.
    assert peaks[1] - peaks[0] < 48
