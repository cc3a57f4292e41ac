"""Controls as a report shows them: tables, figures, pairs of runs, and files that do not read."""

import json

import pytest

from afterimage.report.controls import _codec, _size, control_findings
from afterimage.report.figures import FIGURES
from afterimage.report.figures.controls import controls, error_breakdown, rate
from afterimage.report.figures.style import style
from afterimage.report.reading import read_rows
from afterimage.report.write import write_report
from afterimage.runs.controls import CodecPoint, write_part
from report_study import RESNET, write_run

MODEL, LAYERS = RESNET
CONTROLS = ("own", "another", "shuffled", "mean", "zero", "colour")
BANDS = (0.05, 0.2, 0.4)
PERCEPTUAL = "0.5*mse + 0.5*lpips"


def write_controls(run, *, power=0.5, shared=0.4):
    """Made-up controls of five images; `power` and `shared` are the reconstruction's above 1/8 cycles a pixel."""
    ids = [row["id"] for row in run.result.per_image]
    rows = [
        {"id": i, **{f"{name}_psnr": 20.0 - 2 * k + n % 2 for k, name in enumerate(CONTROLS)}}
        for n, i in enumerate(ids)
    ]
    shared_facts = {"images": len(ids), "decoder": "digest"}
    facts = {"lpips": {"net": "alex"}, "controls": {}, "distances": {"reencoded": 0.3, "random_pair": 0.9}}
    write_part(run, "controls", shared_facts | facts, rows)
    spectrum = {
        "image": [4, 1, 1], "reconstruction": [4, power, power], "shared": [3.9, shared, shared],
        "error": [0.2, 1 + power - 2 * shared, 1 + power - 2 * shared],
    }  # fmt: skip
    plane = {"variance": 0.05, "error": 0.01}
    region = {"share": 1 / 3, "mse": 0.01}
    losses = {
        "frequencies": BANDS, "spectra": {"luma": spectrum, "chroma": spectrum},
        "planes": dict.fromkeys(("luma", "cb", "cr"), plane), "place": [[0.1, 0.2], [0.1, 0.1]],
        "regions": {"window": 7, "flat_below": 0.02, "edge_from": 0.5, "flat": region, "edge": region,
                    "texture": {"share": 0.0, "mse": None}},
    }  # fmt: skip
    planes = [{"id": i, "psnr_luma": 20, "psnr_cb": 31, "psnr_cr": 32} for i in ids]
    write_part(run, "error_breakdown", shared_facts | losses, planes)
    points = [{"bits": b, "bits_per_pixel": b / 2, "psnr": 15 + b / 8} for b in (32, 8, 1)]
    points[1]["entropy_bits_per_pixel"] = 3.5
    codecs = [
        {"codec": c, "quality": q, "bits_per_pixel": 0.5 * q, "psnr": 15.0 + q}
        for c in ("JPEG", "WebP")
        for q in (1, 4, 16)
    ]
    codecs.append({"codec": "lossless WebP", "quality": None, "bits_per_pixel": 12.0, "psnr": None})
    rates = {
        "coder": "bzip2",
        "range": [0.001, 0.999],
        "training_images": 64,
        "points": points,
        "codecs": codecs,
    }
    sizes = [{"id": i, "bits": p["bits"], "psnr": p["psnr"]} for p in points for i in ids]
    write_part(run, "rate_distortion", shared_facts | rates, sizes)


@pytest.fixture
def study(tmp_path):
    """Two layers, one of them with random weights and with a perceptual loss too."""
    options = {"count": 5, "lpips": "squeeze"}
    runs = {
        "plain": write_run(tmp_path, MODEL, "layer1", "transposed", **options),
        "random": write_run(tmp_path, MODEL, "layer1", "transposed", weights="random", **options),
        "perceptual": write_run(tmp_path, MODEL, "layer1", "transposed", loss=PERCEPTUAL, **options),
        "deep": write_run(tmp_path, MODEL, "layer2", "linear", features=(128, 28, 0.5), **options),
    }
    for name, run in runs.items():
        write_controls(run, **({"power": 0.9, "shared": 0.3} if name == "perceptual" else {}))
    return runs


def findings(runs):
    return {f.title: f for f in control_findings(read_rows(runs.values()).decoders)}


def test_no_controls_no_section(tmp_path):
    run = write_run(tmp_path, MODEL, "layer1")
    assert control_findings(read_rows([run]).decoders) == []
    assert own_figures({"run": run}) == set()


def test_tables_hold_the_numbers(study):
    found = findings(study)
    table, against = found["Preserved or guessed"].tables
    assert len(table.rows) == 4 and set(map(len, table.rows)) == {len(table.header)}
    own, another = (
        table.rows[0][table.header.index(h)] for h in ("own features", "another image's features")
    )
    assert own == "20.40 [19.72, 21.08]" and another.startswith("18.40")
    ((features, decoder, trained, random, gap),) = against.rows
    assert (features, decoder) == (f"{MODEL}:layer1", "transposed (loss=mse)")
    scores = [study[name].result.scores["psnr"].mean for name in ("plain", "random")]
    assert (trained, random) == tuple(f"{score:.2f}" for score in scores)
    assert gap.startswith(f"+{scores[0] - scores[1]:.2f}")


def test_the_gap_of_a_perceptual_loss_is_told_in_numbers(study):
    _, gap = findings(study)["What is lost"].tables
    (row,) = gap.rows
    assert row[2] == PERCEPTUAL
    assert row[-2] == "50% → 90%"
    assert row[-1] == f"{0.4 / 0.5**0.5:.2f} → {0.3 / 0.9**0.5:.2f}"


def test_half_of_luma_is_lost_where_the_error_has_half_the_power(study):
    table, _ = findings(study)["What is lost"].tables
    assert {row[-1] for row in table.rows} == {"0.200"}
    assert {row[table.header.index("texture (dB)")] for row in table.rows} == {"–"}
    assert {row[table.header.index("luma variance lost")] for row in table.rows} == {"20.0%"}


def test_codecs_at_the_same_size_and_beyond(study):
    (table,) = findings(study)["What the features cost to store or send"].tables
    by_bits = {row[2]: row for row in table.rows[:3]}
    jpeg, same = (
        table.header.index("JPEG at that size (dB)"),
        table.header.index("JPEG of that PSNR (bits a pixel)"),
    )
    assert by_bits["32"][jpeg] == "above 31.00"
    assert by_bits["8"][jpeg] == "25.00"
    assert by_bits["1"][jpeg] == "16.00"
    assert by_bits["1"][same] == "below 0.50" and float(by_bits["8"][same]) == pytest.approx(0.5, abs=0.01)


def test_interpolation_runs_along_the_logarithm():
    curve = [CodecPoint("JPEG", 50, 1.0, 20.0), CodecPoint("JPEG", 90, 4.0, 30.0)]
    told = [_codec(curve, size) for size in (0.5, 2.0, 5.0)]
    assert told == ["none so small (from 1.00)", "25.00", "above 30.00"]
    assert [_size(curve, psnr) for psnr in (19.0, 25.0, 31.0)] == [
        "below 1.00",
        "2.00",
        "more than quality 100",
    ]


def own_figures(study):
    rows = read_rows(study.values())
    with style():
        return {drawing.name for make in (controls, error_breakdown, rate) for drawing in make(rows)}


def test_each_part_has_its_figures(study):
    assert own_figures(study) == {"controls", "lost-by-frequency", "lost-by-kind", "lost-by-place", "rate"}
    assert {controls, error_breakdown, rate} <= set(FIGURES[1])


def test_the_report_shows_them(study, tmp_path):
    written = write_report(study.values(), tmp_path / "report")
    report = written["report.md"].read_text()
    page = written["index.html"].read_text()
    for text in ("Preserved or guessed", "What is lost", "What the features cost to store or send"):
        assert text in report and text in page
    assert "figures/lost-by-place.png" in report and written["figures/rate.svg"].stat().st_size > 1000


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("controls", lambda facts: {**facts, "format": 2}, "has format 2; this version reads 1"),
        (
            "error_breakdown",
            lambda facts: {k: v for k, v in facts.items() if k != "place"},
            "missing setting: place",
        ),
        ("rate_distortion", lambda facts: [1], "must hold a JSON object, got [1]"),
        ("rate_distortion", lambda facts: {**facts, "codecs": []}, "codecs must hold JPEG"),
    ],
)
def test_a_file_that_does_not_read_is_named_and_the_others_are_shown(study, part, change, message):
    path = study["deep"].file(f"{part}.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    (problem,) = [p for f in findings(study).values() for p in f.paragraphs if str(path) in p]
    assert message in problem
    assert all(finding.tables for finding in findings(study).values())
    assert len(own_figures(study)) == 5


def test_the_command_prints_what_is_there(study, tmp_path, capsys):
    from afterimage.cli.controls import print_controls

    print_controls(list(study.values()))
    printed = capsys.readouterr().out
    assert "Preserved or guessed" in printed and "20.40" in printed


def test_what_differs_between_rows_is_told_as_a_range(study, tmp_path):
    other = write_run(tmp_path / "more", MODEL, "layer3", "linear", count=7, features=(256, 14, 0.3))
    write_controls(other)
    path = other.file("rate_distortion.json")
    values = json.loads(path.read_text())
    values["codecs"][-1]["bits_per_pixel"] = 13.5
    path.write_text(json.dumps(values | {"training_images": 29}))
    path = other.file("error_breakdown.json")
    values = json.loads(path.read_text())
    values["regions"]["flat"]["share"] = 0.25
    path.write_text(json.dumps(values))
    runs = {**study, "other": other}
    told = {title: " ".join(finding.paragraphs) for title, finding in findings(runs).items()}
    assert "mean over 5 to 7 test images" in told["Preserved or guessed"]
    assert "(flat 25% to 33%, edge 33%, texture 0% of the pixels)" in told["What is lost"]
    size = told["What the features cost to store or send"]
    assert "over 29 to 64 training images" in size and "takes 12.00 to 13.50 bits a pixel" in size
    rows = read_rows(runs.values())
    with style():
        captions = [d.caption for make in (controls, error_breakdown, rate) for d in make(rows)]
    assert sum("5 to 7 test images" in caption for caption in captions) == 3
