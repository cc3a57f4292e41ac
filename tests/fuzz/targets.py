"""What strangers may hand to the package, one function a kind: it gives a value or an `AfterimageError`, nothing else.

Each takes the bytes of one input, as atheris makes them, and is bounded in time and memory. `CORPUS/TARGET/` keeps
inputs that were of interest: every way in, and whatever once broke something.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from afterimage.config import AfterimageError, FeatureSpec, RunConfig, dump_toml, load_toml
from afterimage.runs.files import write_atomic
from afterimage.runs.results import Result
from afterimage.runs.run import Run
from afterimage.training.checkpoint import load_reconstructor

CORPUS = Path(__file__).with_name("corpus")
MODEL = "test_resnet.r160_in1k"
PARTS = ("controls", "error_breakdown", "rate_distortion")
FILES = {
    **{n: n for n in ("config.toml", "summary.json", "scores.csv", "history.csv", "environment.json", "status.json")},
    **{f"{part}{end}": f"{part}{end}" for part in PARTS for end in (".json", ".csv")},
    **{n: f"reconstructions/{n}" for n in ("index.json", "000.png", "000.original.png")},
    "decoder.safetensors": "decoder.safetensors",
}  # fmt: skip
"""The names under which an input may replace a run's files, and where these lie."""


@functools.cache
def scratch() -> Path:
    """A folder in memory where there is one, for files that one input needs."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="afterimage-fuzz-", dir=memory if memory.is_dir() else None))
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def file(name: str, data: bytes) -> Iterator[Path]:
    path = scratch() / name
    path.write_bytes(data)
    yield path


def refused(work: Callable, *arguments, **options):
    """What `work` returns, or None where it refuses as it should."""
    try:
        return work(*arguments, **options)
    except AfterimageError as error:
        assert str(error)
        return None


def study(data: bytes) -> None:
    """A study, and any other configuration, from TOML: read, written, expanded, and its decoders built of nothing."""
    from afterimage.config import BaselineConfig
    from afterimage.config.audit import AuditConfig
    from afterimage.config.inversion import InvertConfig
    from afterimage.config.study import load_study
    from afterimage.experiments.study import expand_study

    with file("study.toml", data) as path:
        for kind in (RunConfig, BaselineConfig, AuditConfig, InvertConfig):
            if (config := refused(load_toml, kind, path)) is not None:
                _round_trip(config)
        found = refused(load_study, str(path))
    if found is None:
        return
    _round_trip(found)
    # Globs build a network, pretrained weights are looked for on the network.
    far = any(
        "*" in s or "?" in s or "[" in s
        for s in (*found.sources, *(s for r in found.rows for s in r.sources))
    )
    large = len(found.decoders) * len(found.seeds) * (len(found.sources) + len(found.rows)) > 200
    if far or large:
        return
    found = dataclasses.replace(
        found, missing_weights="error", controls=False, lpips="alex" if found.lpips == "any" else found.lpips
    )
    for config in refused(expand_study, found) or ():
        _round_trip(config)
        _build(config)


def _round_trip(config) -> None:
    text = dump_toml(config)
    with file("again.toml", text.encode()) as path:
        again = load_toml(type(config), path)
    assert again == config or "nan" in text, text
    if hasattr(config, "name"):
        assert (Path("/root") / config.name).parent == Path("/root") and len(config.name) < 200, config.name
        assert not set(config.name) & set("\0\n\r/\\") and config.name.strip(".")


def _build(config: RunConfig) -> None:
    import torch

    from afterimage.models.reconstructor import build_feature_decoder

    specs = [FeatureSpec(source, 8, 4, 4) for source in config.sources]
    with torch.device("meta"):
        refused(build_feature_decoder, config, specs)


@functools.cache
def _good() -> dict[str, bytes]:
    """The files of a run that is as it should be."""
    import report_study

    folder = scratch() / "good"
    run = report_study.write_run(
        folder, MODEL, "layer1", originals=[report_study.sample_image(0, 16)], count=3
    )
    found = {name: run.file(place) for name, place in FILES.items()}
    content = {name: path.read_bytes() for name, path in found.items() if path.exists()}
    shutil.rmtree(folder)
    return content


def bundle(files: dict[str, bytes | str]) -> bytes:
    """Files of a run as one input."""
    encoded = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
    return b"".join(b"=== %s\n%s\n" % (name.encode(), content) for name, content in encoded.items())


def unbundle(data: bytes) -> dict[str, bytes]:
    """The files that an input replaces; other names are left out."""
    parts = re.split(rb"(?m)^=== ([a-z0-9.]{1,24})\n", data)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {name.decode(): text.removesuffix(b"\n") for name, text in pairs if name.decode() in FILES}


@contextlib.contextmanager
def run_folder(data: bytes) -> Iterator[tuple[Run, Run]]:
    """A run folder with the input's files in place of its own, and a sound one beside it."""
    root = scratch() / "runs"
    shutil.rmtree(root, ignore_errors=True)
    for name, files in (("good", _good()), ("hostile", _good() | unbundle(data))):
        (root / name / "reconstructions").mkdir(parents=True)
        for key, content in files.items():
            (root / name / FILES[key]).write_bytes(content)
    yield Run(root / "hostile"), Run(root / "good")


def run(data: bytes) -> None:
    """A run folder as tables, statistics and the page's data read it; a sound run beside it is always shown."""
    from afterimage.report.controls import control_findings
    from afterimage.report.page.images import collect_images, embed
    from afterimage.report.page.page import describe_rows
    from afterimage.report.reading import read_rows
    from afterimage.report.tables import csv_table, latex_table, markdown_table

    with run_folder(data) as (hostile, good):
        for name, kind in (("state", str), ("status", dict), ("result", Result), ("config", RunConfig)):
            value = refused(getattr, hostile, name)
            assert value is None or isinstance(value, kind), (name, value)
        assert all(isinstance(row, dict) for row in refused(getattr, hostile, "history") or ())
        _inside(hostile)
        rows = read_rows([hostile, good])
        assert any(row.run == good for row in rows.all)
        for text in (markdown_table(rows), latex_table(rows)):
            assert "<script" not in text
        for line in csv.reader(io.StringIO(csv_table(rows))):
            for cell in line:
                assert not cell.startswith(("=", "@", "+", "-", "\t", "\r")) or _is_number(cell), cell
        control_findings(rows.decoders)
        sample_images = refused(collect_images, rows.all)
        if sample_images is not None:
            describe_rows(rows, sample_images)
            refused(embed, sample_images, 10**6)


def _inside(hostile: Run) -> None:
    found = refused(getattr, hostile, "images") or ()
    maps = refused(getattr, hostile, "fusion_maps") or {}
    for path in [p for _, *pair in found for p in pair] + [p for own in maps.values() for p in own]:
        assert path.resolve().is_relative_to(hostile.path.resolve()), path


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def report(data: bytes) -> None:
    """The whole report of a run folder: figures, findings and the page too."""
    from afterimage.report.write import write_report

    with run_folder(data) as (hostile, good):
        out = scratch() / "report"
        shutil.rmtree(out, ignore_errors=True)
        written = write_report([hostile, good], out)
        assert {"report.md", "table.csv", "findings.json"} <= written.keys()
        assert "<script" not in (out / "report.md").read_text()


def verify(data: bytes) -> None:
    """A run folder as `study verify` and `evaluate` take it, on images and weights that are none of its business."""
    from afterimage.evaluation.metrics import Metrics
    from afterimage.experiments import verify as room

    def unavailable(*_, **__):
        raise AfterimageError("no weights here")

    with (
        run_folder(data) as (hostile, _),
        mock.patch("afterimage.models.weights.search_weights", unavailable),
        mock.patch.object(room, "load_data", lambda *_, **__: _images()),
        mock.patch.object(room, "Metrics", lambda net, size: Metrics(net, size=24)),
        mock.patch.object(
            room, "environment", lambda: {"python": "3", "commit": None, "versions": {"torch": "2"}}
        ),
    ):
        (verdict,) = room.verify_runs([hostile], accelerator="cpu")
        assert verdict.holds or verdict.problems or verdict.missing or verdict.skipped
        config = refused(getattr, hostile, "config")
        if config is not None and set(config.sources) <= {f"{MODEL}:layer{i}" for i in (1, 2, 3)}:
            refused(load_reconstructor, hostile, weights="random")


@functools.cache
def _images():
    from afterimage.config import DataConfig
    from afterimage.data.dataset import load_data

    return load_data(DataConfig("procedural:6", resize=32, crop=24), cache=scratch() / "cache")


def image(data: bytes) -> None:
    """An image file of any kind: 8-bit sRGB, resized, or an error that names it."""
    from afterimage.data import decode

    # The real limit takes seconds and a gigabyte; what is beyond it is refused by the same line.
    with mock.patch.object(decode, "MAX_PIXELS", 2**22):
        found = refused(decode.decode, data, "image")
        if found is not None:
            small = decode.resize_to_cover(found, 16)
            assert found.mode == "RGB" and min(small.size) == 16 and max(small.size) <= 16 * decode.MAX_ASPECT


def pairs(data: bytes) -> None:
    """Stored features and their images, as each kind of file they may be in."""
    from afterimage.analysis.audit.target import load_stored_pairs

    ends = {b"PK": ".npz", b"PA": ".parquet"}
    with file(f"pairs{ends.get(data[:2], '.safetensors')}", data) as path:
        found = refused(load_stored_pairs, path)
    if found is not None:
        data, store = found
        images = data.test.crops(list(range(len(data.test))))
        assert images.min() >= 0 and images.max() <= 1
        for layer in store.specs:
            assert data.test.features([0], layer).isfinite().all()


def weights(data: bytes) -> None:
    """An encoder's weights, a decoder and a checkpoint from safetensors or from what torch.save wrote."""
    import torch

    from afterimage.models.weight_files import load_decoder, load_tensors, read_named_tensors
    from afterimage.training.checkpoint import CHECKPOINT, load_checkpoint

    with file("weights" + (".pth" if data[:2] in (b"PK", b"\x80\x02") else ".safetensors"), data) as path:
        if found := refused(read_named_tensors, path):
            assert all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in found.tensors.items())
        refused(load_tensors, path)
        refused(load_decoder, path, {"sources": ["a:b"], "weights": {}})
    folder = Run(scratch() / "checkpoint")
    write_atomic(folder.file(CHECKPOINT), data)
    if found := load_checkpoint(folder, lambda text: None):
        assert isinstance(found[1], dict)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (study, run, report, verify, image, pairs, weights)
}


def corpus(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())


os.environ.setdefault("MPLBACKEND", "agg")
