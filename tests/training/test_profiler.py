import json

import pytest

from afterimage.cli import main
from afterimage.config import AfterimageError, DataConfig, DecoderConfig, RecipeConfig, RunConfig
from afterimage.training.profiler import PARTS, profile_run

DATA = DataConfig("procedural:12", resize=32, crop=32)


def run(decoder):
    return RunConfig(
        ("test_resnet.r160_in1k:layer1",),
        weights="random",
        decoder=DecoderConfig(decoder),
        data=DATA,
        recipe=RecipeConfig(batch_size=4),
    )


def test_every_part_is_timed_and_in_the_trace(tmp_path):
    result = profile_run(run("transposed"), tmp_path, steps=2, cache=tmp_path / "cache", accelerator="cpu")
    assert tuple(result.parts) == PARTS and min(result.parts.values()) > 0
    assert 1 <= result.images <= 4
    names = [event.get("name") for event in json.loads(result.trace.read_text())["traceEvents"]]
    assert all(names.count(part) >= 3 for part in PARTS)
    written = json.loads(next(tmp_path.glob("profiles/*.profile.json")).read_text())
    assert written["parts"] == result.parts


def test_a_closed_form_has_no_steps(tmp_path):
    with pytest.raises(AfterimageError, match="linear takes no training steps"):
        profile_run(run("linear"), tmp_path, accelerator="cpu")


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [
        "--resize",
        "32",
        "--crop",
        "32",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--cache",
        "cache",
    ]
    sources = ["test_resnet.r160_in1k:layer1", "--weights", "random", "--data", "procedural:12"]
    main(["train", *sources, "--decoders", "transposed", "--profile", "1", *small])
    out = capsys.readouterr().out
    assert "backward" in out and "trace.json" in out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["profiles"]
