"""The published study, all of it, on small images: the shipped file, the command line, the whole report."""

import csv

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from afterimage.report.published import PUBLISHED
from afterimage.runs.run import scan
from test_cli import command  # noqa: F401

MODELS = (
    "resnet34.tv_in1k",
    "vgg16.tv_in1k",
    "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "pvt_v2_b2.in1k",
)


@pytest.fixture
def random_weights(tmp_path):
    """A folder of weight files for every network of the study, LPIPS's too, drawn at random.

    Given as files they pass for pretrained ones, so that the study runs as it would on the real ones.
    """
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.manual_seed(0)
    for name in MODELS:
        model = timm.create_model(name, pretrained=False)
        used = {k: v for k, v in model.state_dict().items() if not k.startswith(("pre_logits.", "head."))}
        save_file(used, folder / f"{name}.safetensors")
    alexnet = torchvision.models.alexnet().features
    save_file(
        {f"features.{k}": v for k, v in alexnet.state_dict().items()},
        folder / "alexnet.torchvision.safetensors",
    )
    return folder


@pytest.mark.long
def test_the_whole_published_study(command, random_weights, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(random_weights))
    code, _, err = command(
        "study", "published", "--data", "procedural:30", "--resize", 64, "--crop", 64, "--epochs", 1,
        "--limit-train", 8, "--limit-validation", 2, "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    root = tmp_path / "runs" / "published"
    runs = list(scan(root))
    assert {run.state for run in runs} == {"done"}, [run.status for run in runs]

    with open(root / "report/table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ours = {row["sources"]: row for row in rows if row["kind"] == "decoder"}
    theirs = {" + ".join(row.sources): row for row in PUBLISHED}
    assert ours.keys() == theirs.keys() and len(ours) == 15
    for source, row in theirs.items():
        assert row.parameters in (None, int(ours[source]["parameters"]))
    for row in rows:
        assert row["state"] == "done" and row["weights"] in ("pretrained", "")
        assert float(row["psnr_mean"]) > 0 and float(row["lpips_mean"]) >= 0 and row["lpips_net"] == "alex"
    baselines = [row["label"] for row in rows if row["kind"] == "baseline"]
    assert len(baselines) == 6 and "Mean colour" in baselines and "JPEG quality 50" in baselines
    (fused,) = (run for run in runs if run.result.fusion)
    assert sum(fused.result.fusion_weights) == pytest.approx(1)
    assert [len(maps) for maps in fused.fusion_maps.values()] == [4] * 3

    report = (root / "report/report.md").read_text(encoding="utf-8")
    page = (root / "report/index.html").read_text(encoding="utf-8")
    table = (root / "report/table.tex").read_text(encoding="utf-8")
    assert r"\toprule" in table and table.count("attention") >= 14
    for text in (report, page):
        assert "could not be computed" not in text and "Beside the published figures" in text
        for name in ("H1", "H2", "H3"):
            assert name in text
        for row in PUBLISHED:
            mean, spread = row.psnr
            assert (f"{mean:.2f} ± {spread:.2f} → " if spread else f"{mean:.2f} → ") in text
    figures = {path.stem for path in (root / "report/figures").glob("*.png")}
    assert figures == {path.stem for path in (root / "report/figures").glob("*.svg")}
    assert figures >= {"quality-by-depth", "quality-by-locations", "fusion-weights", "distributions"}
    assert sum(name.startswith("reconstructions") for name in figures) >= 4
