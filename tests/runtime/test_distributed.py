import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from afterimage.cli import main
from afterimage.config import (
    AfterimageError,
    DataConfig,
    DecoderConfig,
    FeatureSpec,
    FusionConfig,
    RecipeConfig,
)
from afterimage.config.study import StudyConfig
from afterimage.experiments.queue import train_runs
from afterimage.models.decoders import create_decoder
from afterimage.models.layers.blocks import adapt_batch_norms
from afterimage.runs.run import Run, scan
from afterimage.runtime.device import create_fabric
from afterimage.runtime.distributed import SINGLE_PROCESS, RankLost, distributed_context
from afterimage.runtime.failures import (
    ENCODERS,
    UnexpectedError,
    error_scope,
    set_error_scope,
    traceback_text,
)
from afterimage.runtime.process import LockLost, Stopped
from afterimage.training.checkpoint import CHECKPOINT
from children import MODEL, small_configs
from rank_children import (
    fail_in_step,
    run_out_of_memory,
    run_ranks,
    study_ranks,
    train_ranks,
    train_without_drift,
)


def configs(sample_images):
    """Batch norm, closed forms, windows, fusions; 14 images in batches of four: the last has two, for three ranks."""
    # timm's own random network: the values of one whose blocks act are larger, and so is what rounding makes of them.
    recipe = {"scheduler": "plateau", "plateau_patience": 0}
    transposed, linear, residual = small_configs(sample_images, "random-init", **recipe)
    windows = {"blocks": 1, "window": 16, "kernel": 3}
    sources = (f"{MODEL}:layer1", f"{MODEL}:layer2")
    fused = replace(transposed, sources=sources)
    return [
        transposed,
        linear,
        replace(residual, decoder=DecoderConfig("residual", options=windows)),
        replace(fused, fusion=FusionConfig("attention", channels=8), decoder=DecoderConfig("wavelet")),
        replace(fused, fusion=FusionConfig("stacked"), decoder=DecoderConfig("linear")),
        replace(fused, fusion=FusionConfig("stacked")),
    ]


@pytest.fixture(scope="module")
def one(sample_images, cache, tmp_path_factory):
    """The runs of one process."""
    return train_runs(configs(sample_images), tmp_path_factory.mktemp("one"), cache=cache, accelerator="cpu")


def same(run, expected, tolerance=2e-3):
    """Whether a run came to what another did, to a tolerance that Adam's steps along rounding errors need."""
    assert run.state == "done"
    assert [row["id"] for row in run.result.per_image] == [row["id"] for row in expected.result.per_image]
    for row, other in zip(run.result.per_image, expected.result.per_image, strict=True):
        assert row["psnr"] == pytest.approx(other["psnr"], abs=0.02)
    assert len(run.history) == len(expected.history)
    for row, other in zip(run.history, expected.history, strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=tolerance)
        assert row["validation_loss"] == pytest.approx(other["validation_loss"], rel=tolerance)
        assert row["learning_rate"] == other["learning_rate"]
    for key in ("best_epoch", "images_seen", "epochs", "parameters", "macs"):
        assert getattr(run.result.training, key) == getattr(expected.result.training, key)
    losses = [one.result.training.best_validation_loss for one in (run, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert [entry for entry, *_ in run.images] == [entry for entry, *_ in expected.images]
    assert run.fusion_maps.keys() == expected.fusion_maps.keys()


@pytest.mark.parametrize("count", [3, pytest.param(2, marks=pytest.mark.long)])
def test_ranks_come_to_what_one_process_does(sample_images, cache, tmp_path, one, count):
    assert run_ranks(count, train_ranks, configs(sample_images), tmp_path, cache) == [0] * count
    for expected in one:
        run = Run(tmp_path / expected.name)
        same(run, expected)
        assert run.result.training.ranks == count and expected.result.training.ranks == 1
        assert not [path for path in run.path.iterdir() if path.name.startswith(("lock", "checkpoint", "."))]
    weights = [Run(tmp_path / one[3].name).result.fusion_weights, one[3].result.fusion_weights]
    assert weights[0] == pytest.approx(weights[1], abs=1e-4)


def test_the_loss_curve_is_that_of_one_process_to_rounding(cache, tmp_path):
    train_without_drift("transposed", tmp_path, cache)
    assert run_ranks(3, train_without_drift, "transposed", tmp_path, cache) == [0, 0, 0]
    expected, weights = json.loads((tmp_path / "one.json").read_text())
    for rank in range(3):
        history, state = json.loads((tmp_path / f"{rank}.json").read_text())
        for row, other in zip(history, expected, strict=True):
            for name in ("train_loss", "validation_loss", "learning_rate"):
                assert row[name] == pytest.approx(other[name], rel=2e-5)
        assert state == pytest.approx(weights, rel=1e-3, abs=1e-3)


def primitives():
    """What ranks do together, and that each hears of an error on any of them; three ranks."""
    with distributed_context("cpu") as ranks:
        rank = ranks.rank
        total = [list(range(size))[ranks.rank_slice(size)] for size in (7, 2, 1)]
        assert total == [[[0, 1, 2], [0], [0]], [[3, 4], [1], []], [[5, 6], [], []]][rank]
        assert ranks.max_rank_size(7) == 3 and ranks.batch_offset(len(total[0])) == ((0, 3, 5)[rank], 7)
        a, b = torch.full((2, 2), rank + 1.0), torch.tensor([rank], dtype=torch.int64)
        ranks.sum([a, b])
        assert a.tolist() == [[6.0, 6.0]] * 2 and b.item() == 3
        assert ranks.broadcast(f"from {rank}") == "from 0" and ranks.gather(rank) == [0, 1, 2]
        assert ranks.gather_batches([[rank, "first"], [rank, "second"]])[1:4] == [
            [1, "first"],
            [2, "first"],
            [0, "second"],
        ]
        assert ranks.decide(rank == 0) and not ranks.decide(rank == 1)
        told = [
            (AfterimageError("an image"), AfterimageError, "an image"),
            (LockLost("taken"), LockLost, "taken"),
            (MemoryError("no memory"), MemoryError, "no memory"),
            (Stopped(15), Stopped, "SIGTERM"),
            (ZeroDivisionError("a bug"), ZeroDivisionError if rank == 1 else UnexpectedError, "a bug"),
            (SystemExit("over"), SystemExit if rank == 1 else RankLost, "over"),
        ]
        for error, kind, text in told:
            with pytest.raises(kind, match=text), ranks.raise_on_all_ranks(), ranks.raise_on_all_ranks():
                if rank == 1:
                    raise error
                ranks.sum([a])
        with pytest.raises(Exception) as caught, set_error_scope(ENCODERS), ranks.raise_on_all_ranks():
            if rank == 1:
                with set_error_scope(ENCODERS):
                    raise IndexError("of a network")
        assert error_scope(caught.value) == ENCODERS
        assert 'raise IndexError("of a network")' in traceback_text(caught.value)
        check_batch_norm(ranks)
        check_sampling(ranks)


def check_batch_norm(ranks):
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 5, 4, 4, generator=generator) * 3 + 100
    target = torch.randn(2, 5, 4, 4, generator=generator)
    plain, norm = nn.Sequential(nn.BatchNorm2d(5)), nn.Sequential(nn.BatchNorm2d(5))
    assert adapt_batch_norms(norm, ranks) and norm.state_dict().keys() == plain.state_dict().keys()
    part = whole[ranks.rank_slice(2)].clone().requires_grad_()
    whole.requires_grad_()
    expected, result = plain(whole), norm(part)
    (expected * target).sum().backward()
    (result * target[ranks.rank_slice(2)]).sum().backward()
    torch.testing.assert_close(result, expected[ranks.rank_slice(2)], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part.grad, whole.grad[ranks.rank_slice(2)], rtol=1e-3, atol=1e-4)
    gradients = [norm[0].weight.grad, norm[0].bias.grad]
    ranks.sum(gradients)
    torch.testing.assert_close(gradients, [plain[0].weight.grad, plain[0].bias.grad], rtol=1e-3, atol=1e-3)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), buffer)


def check_sampling(ranks):
    """A closed form on a random part of the locations: which they are does not depend on ranks."""
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(n, 4, 6, 6, generator=generator), torch.rand(n, 3, 12, 12, generator=generator))
        for n in (7, 2)
    ]
    solved = []
    for among in (SINGLE_PROCESS, ranks):
        decoder = create_decoder("linear", [FeatureSpec("a:b", 4, 6, 6)], 12, seed=0)
        decoder.begin_fit(9, 3, among)
        decoder._locations_per_view = 10
        for features, images in batches:
            own = among.rank_slice(len(images))
            decoder.partial_fit([features[own]], images[own])
        assert "fitted on 90 locations, a random 28%" in decoder.finalize_fit()[1]
        solved.append(decoder.weight)
    torch.testing.assert_close(*solved, rtol=1e-4, atol=1e-5)


def test_what_ranks_do_together():
    assert run_ranks(3, primitives) == [0, 0, 0]


def test_an_error_on_one_rank_ends_that_run_on_all_and_no_other(sample_images, cache, tmp_path, one):
    hurt = partial(fail_in_step, "transposed", 3, AfterimageError("a part of a step went wrong"))
    codes = run_ranks(2, train_ranks, configs(sample_images)[:2], tmp_path, cache, hurt=hurt)
    assert codes == [1, 1]
    failed, done = (Run(tmp_path / run.name) for run in one[:2])
    assert failed.status == {"state": "failed", "error": "a part of a step went wrong"}
    same(done, one[1])


@pytest.mark.long
def test_out_of_memory_on_one_rank_halves_on_all(sample_images, cache, tmp_path, one):
    (config,) = configs(sample_images)[2:3]
    assert run_ranks(2, train_ranks, [config], tmp_path, cache, hurt=run_out_of_memory) == [0, 0]
    run = Run(tmp_path / config.name)
    same(run, one[2])
    assert any("micro-batches of 1" in note for note in run.result.notes)


@pytest.mark.parametrize(("first", "then"), [(1, 2), (3, 2), pytest.param(2, 1, marks=pytest.mark.long)])
def test_a_run_goes_on_with_another_number_of_ranks(sample_images, cache, tmp_path, one, first, then):
    some = [configs(sample_images)[0], configs(sample_images)[2]]
    options = {"checkpoint_seconds": 0.0}
    codes = run_ranks(first, train_ranks, some, tmp_path, cache, stop=5, **options)
    assert codes in ([1] * first, [130] * first)
    assert all(Run(tmp_path / config.name).file(CHECKPOINT).exists() for config in some)
    assert (
        run_ranks(then, train_ranks, some, tmp_path, cache, said=tmp_path / "said", **options) == [0] * then
    )
    assert "goes on after epoch 0, image" in (tmp_path / "said").read_text()
    for config, expected in zip(some, (one[0], one[2]), strict=True):
        run = Run(tmp_path / config.name)
        same(run, expected)
        assert any(f"resumed with {then} instead of {first} processes" in note for note in run.result.notes)


@pytest.mark.long
def test_a_study_gives_one_table(tmp_path):
    study = StudyConfig(
        "Small",
        sources=(f"{MODEL}:layer1", f"{MODEL}:layer2"),
        decoders=(DecoderConfig("linear"),),
        seeds=(1, 2),
        weights="random",
        data=DataConfig("procedural:10", test="procedural:4", resize=32, crop=32),
        recipe=RecipeConfig(epochs=1, batch_size=3),
    )
    tables = []
    for count in (1, 2):
        root = tmp_path / str(count)
        assert run_ranks(count, study_ranks, study, root, tmp_path / "cache") == [0] * count
        tables.append({run.name: run.result.per_image for run in scan(root)})
    assert tables[0].keys() == tables[1].keys() and len(tables[0]) > 4
    for name, rows in tables[0].items():
        for row, other in zip(tables[1][name], rows, strict=True):
            assert row["id"] == other["id"] and row["psnr"] == pytest.approx(other["psnr"], abs=0.02)


def test_alone_nothing_is_asked_of_anybody():
    with distributed_context() as ranks:
        assert ranks is SINGLE_PROCESS and ranks.is_main_process and ranks.world_size == 1
        assert ranks.rank_slice(5) == slice(0, 5) and ranks.batch_offset(5) == (0, 5)


def test_more_devices_than_there_are_is_an_error(capsys):
    count = torch.cuda.device_count() + 5
    with pytest.raises(AfterimageError, match=f"{count} devices were asked for on .* does not have"):
        create_fabric("cuda", count)
    with pytest.raises(SystemExit) as ended:
        main(["train", f"{MODEL}:layer1", "--devices", str(count), "--device", "cuda"])
    assert ended.value.code == 1 and "which the accelerator 'cuda' does not have" in capsys.readouterr().err


def test_devices_beside_torchrun_must_agree(monkeypatch, capsys):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(SystemExit):
        main(["train", f"{MODEL}:layer1", "--devices", "3", "--device", "cpu"])
    assert "--devices 3, but 2 ranks were started" in capsys.readouterr().err
