import errno
import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from afterimage.config import AfterimageError, Axis, RunConfig
from afterimage.runs.files import read_csv, remove_temporary_files, write_atomic, write_csv, write_json
from afterimage.runs.results import (
    DataFacts,
    FeatureMap,
    LpipsStatus,
    Result,
    Score,
    TrainingFacts,
    WeightsRecord,
)
from afterimage.runs.run import Run, environment, scan

CONFIG = RunConfig(("resnet34.tv_in1k:layer1",))
cells = st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)


def test_create_open_scan(tmp_path):
    run = Run.create(tmp_path, CONFIG)
    assert run.state == "new" and Run.open(run.path).config == CONFIG
    run.set_state("failed", error="why")
    assert Run.create(tmp_path, CONFIG).state == "failed"
    (tmp_path / "report").mkdir()
    (tmp_path / "stray.txt").touch()
    assert [found.name for found in scan(tmp_path)] == [CONFIG.name]
    with pytest.raises(AfterimageError, match="not a run folder"):
        Run.open(tmp_path / "report")
    with pytest.raises(AfterimageError, match=f"it is a folder of runs, name one of them: {run.name}"):
        Run.open(tmp_path)
    with pytest.raises(AfterimageError, match="no folder"):
        list(scan(tmp_path / "nowhere"))


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "id": st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1),
                "psnr": cells,
                "lpips": cells,
            }
        ),
        min_size=1,
    )
)
def test_csv_keeps_ids_and_every_digit(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "scores.csv"
    write_csv(path, rows)
    assert read_csv(path) == rows


@pytest.mark.parametrize("row", ["a,1,2", "a", '"a'])
def test_a_ragged_row_is_an_error_that_names_file_and_line(tmp_path, row):
    (tmp_path / "scores.csv").write_text(f"id,psnr\nb,20\n{row}\n")
    with pytest.raises(AfterimageError, match=r"scores\.csv, line 3: .* 2 cells"):
        read_csv(tmp_path / "scores.csv")


@pytest.mark.parametrize("content", ["[]", "null", '"done"', "7"])
def test_a_status_that_is_no_object_is_an_error_that_names_the_file(tmp_path, content):
    run = Run.create(tmp_path, CONFIG)
    run.file("status.json").write_text(content)
    with pytest.raises(AfterimageError, match=r"status\.json must hold a JSON object"):
        _ = run.state


def test_an_id_that_looks_like_a_number_stays_text(tmp_path):
    write_csv(tmp_path / "a.csv", [{"id": "007", "psnr": 1.5}])
    assert read_csv(tmp_path / "a.csv") == [{"id": "007", "psnr": 1.5}]


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"old": True})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AfterimageError, match=r"summary\.json: No space left on device"):
        write_json(path, {"new": True})
    assert path.read_text() == '{\n  "old": true\n}\n'
    assert os.listdir(tmp_path) == ["summary.json"]


def test_leftovers_of_a_file_are_removed_and_those_of_others_kept(tmp_path):
    others = (
        ".a.npz.index.json.x.part",
        ".ab.npz.x.part",
        ".[a].npz.x.part",
        "below/.a.npz.x.part",
        "a.npz.x.part",
    )
    left = [tmp_path / name for name in (".a.npz.x.part", ".?.npz.x.part", *others)]
    (tmp_path / "below").mkdir()
    for path in left:
        path.touch()
    remove_temporary_files(tmp_path, ["a.npz", "?.npz"])
    assert [path.exists() for path in left] == [False] * 2 + [True] * len(others)
    remove_temporary_files(tmp_path)
    assert [path for path in left if path.exists()] == [tmp_path / "a.npz.x.part"]


def test_a_really_full_disk(tmp_path):
    try:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    except OSError as error:
        assert error.errno == errno.ENOSPC
    else:
        pytest.skip("this system has no /dev/full")
    (tmp_path / "run").symlink_to("/dev/full")
    with pytest.raises(AfterimageError, match="cannot write"):
        write_atomic(tmp_path / "run" / "file", "x")


def test_written_files_are_readable_by_others(tmp_path):
    write_atomic(tmp_path / "a", "x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_json_without_numbers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"psnr": float("nan")})
    assert not list(tmp_path.iterdir())


def result():
    """A decoder's result with every part that a decoder's may have."""
    layer = FeatureMap(
        CONFIG.sources[0], 64, 56, 56, rows=Axis(0.0, 4.0, 0, 220), module="layer1", order=3, reduction=4.0,
        encoder_parameters=10, encoder_macs=20, unseen="the last 4 rows are not seen",
    )  # fmt: skip
    weights = WeightsRecord("resnet34.tv_in1k", "folder", "/w", "ab", "pretrained", False, "of the EMA")
    scores = {"psnr": Score(20.0, None, 1), "ssim": Score(0.5, None, 1), "lpips": None}
    return Result(
        kind="decoder", label="a name", config=CONFIG, data=DataFacts("s", "t", "d", "e", 1, 256, 224, 8, 2),
        lpips=LpipsStatus("vgg", reason="no weights"), scores=scores, scores_seen=scores,
        per_image=({"id": "a/b", "psnr": 20.0, "ssim": 0.5, "lpips": None},), features=(layer,),
        weights=(weights,), training=TrainingFacts(1, 2, 3, 4.5, 5, 6, 0, 0.25, "x", "y"), notes=("so it is",),
    )  # fmt: skip


def test_result_round_trip(tmp_path):
    run = Run.create(tmp_path, CONFIG)
    original, rebuilt = np.zeros((4, 5, 3), np.uint8), np.full((4, 5, 3), 200, np.uint8)
    run.save_result(result(), [("a/b", original, rebuilt)])
    ((identity, first, second),) = run.images
    assert identity == "a/b"
    assert (np.array(Image.open(first)) == original).all() and (np.array(Image.open(second)) == rebuilt).all()
    assert run.result == result() and run.has_result


def test_environment_says_what_explains_a_number():
    facts = environment()
    assert {"torch", "timm", "numpy"} <= facts["versions"].keys() and facts["python"] and facts["platform"]
    if (Path(__file__).parents[2] / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", facts["commit"])
