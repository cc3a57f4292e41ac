"""Batch norm in training where a batch holds a single value a channel, and where it does not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from afterimage import train_runs
from afterimage.config import DataConfig, DecoderConfig, RecipeConfig, RunConfig
from afterimage.models.layers.blocks import BatchNorm, adapt_batch_norms
from afterimage.runs.run import Run
from afterimage.runtime.distributed import distributed_context
from afterimage.training.decoder_trainer import SINGLE_VALUE_NOTE
from afterimage.training.losses import MSE
from children import result
from rank_children import run_ranks, train_ranks
from test_faults import too_much
from test_resume import stop_at

MODEL = "test_resnet.r160_in1k"


def single(**recipe):
    """A decoder with batch norm on 1x1 maps, and one of larger maps; five images in batches of four and one."""
    base = RunConfig(
        (f"{MODEL}:layer4",),
        weights="random",
        decoder=DecoderConfig("wavelet"),
        data=DataConfig("procedural:10", resize=32, crop=32, limit_train=5),
        recipe=RecipeConfig(**{"epochs": 2, "batch_size": 4} | recipe),
    )
    return [base, replace(base, sources=(f"{MODEL}:layer2",))]


@pytest.fixture(scope="module")
def one(cache, tmp_path_factory):
    """The runs of one process."""
    return train_runs(single(), tmp_path_factory.mktemp("one"), cache=cache, accelerator="cpu")


def notes(run):
    return [note for note in run.result.notes if SINGLE_VALUE_NOTE in note]


def norms():
    plain = nn.BatchNorm2d(3)
    with torch.no_grad():
        plain.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
        plain.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
        plain.weight.copy_(torch.tensor([2.0, 1.0, -1.0]))
        plain.bias.copy_(torch.tensor([0.0, 3.0, 1.0]))
    return plain


def test_a_single_value_is_normalised_by_the_running_statistics_which_stay():
    module = nn.Sequential(norms())
    (norm,) = adapt_batch_norms(module)
    maps = torch.tensor([3.0, -1.0, 0.5]).view(1, 3, 1, 1).requires_grad_()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    result = module(maps)
    # (3 - 1) / 2 * 2, (-1 + 2) / 0.5 + 3, 0 * -1 + 1
    torch.testing.assert_close(result.flatten(), torch.tensor([2.0, 5.0, 1.0]), rtol=1e-4, atol=1e-5)
    result.sum().backward()
    torch.testing.assert_close(maps.grad.flatten(), torch.tensor([1.0, 2.0, -1.0]), rtol=1e-4, atol=1e-5)
    assert norm.weight.grad is not None and norm.met_single == 1
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (1, 3, 2, 1), (2, 3, 5, 4)])
def test_any_other_batch_is_that_of_pytorch_bit_for_bit(shape):
    plain, module = nn.Sequential(norms()), nn.Sequential(norms())
    (norm,) = adapt_batch_norms(module)
    assert module.state_dict().keys() == plain.state_dict().keys()
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(maps), plain(maps)) and norm.met_single == 0
    assert all(torch.equal(b, plain.get_buffer(name)) for name, b in module.named_buffers())
    assert torch.equal(module.eval()(maps), plain.eval()(maps))


def test_what_does_more_than_normalise_is_left_alone():
    class Activated(nn.BatchNorm2d):
        def forward(self, maps):
            return super().forward(maps).relu()

    module = nn.Sequential(Activated(3))
    assert adapt_batch_norms(module) == [] and type(module[0]) is Activated
    (again,) = adapt_batch_norms(nn.Sequential(BatchNorm(norms())))
    assert type(again) is BatchNorm


def test_a_last_batch_of_one_on_one_location_is_trained_and_noted(one):
    met, other = one
    assert met.state == other.state == "done" and len(met.history) == 2
    (note,) = notes(met)
    assert note.endswith("first in epoch 1") and not notes(other)


@pytest.mark.long
def test_ranks_come_to_the_same(cache, tmp_path):
    configs = [single(batch_size=1)[0], single()[0]]
    assert run_ranks(2, train_ranks, configs, tmp_path / "two", cache) == [0, 0]
    for expected in train_runs(configs, tmp_path / "one", cache=cache, accelerator="cpu"):
        run = Run(tmp_path / "two" / expected.name)
        assert notes(run) == notes(expected) != []
        for row, other in zip(run.history, expected.history, strict=True):
            assert row["train_loss"] == pytest.approx(other["train_loss"], rel=2e-3)
            assert row["validation_loss"] == pytest.approx(other["validation_loss"], rel=2e-3)


def compare_single_values():
    """On three ranks, of which one has the only image: as on one process, forward, backward and buffers."""
    with distributed_context("cpu") as ranks:
        plain, module = nn.Sequential(norms()), nn.Sequential(norms())
        adapt_batch_norms(plain)
        (norm,) = adapt_batch_norms(module, ranks)
        maps = torch.tensor([3.0, -1.0, 0.5]).view(1, 3, 1, 1)
        own = maps[ranks.rank_slice(1)].clone().requires_grad_()
        plain(maps).square().sum().backward()
        module(own).square().sum().backward()
        gradients = [norm.weight.grad, norm.bias.grad]
        ranks.sum(gradients)
        torch.testing.assert_close(gradients, [plain[0].weight.grad, plain[0].bias.grad])
        assert norm.met_single == 1
        assert all(torch.equal(b, plain.get_buffer(name)) for name, b in module.named_buffers())


def test_a_single_value_on_one_of_three_ranks():
    assert run_ranks(3, compare_single_values) == [0, 0, 0]


def test_micro_batches_of_one_meet_it_too(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(MSE, "forward", too_much(1, MSE.forward, MemoryError()))
    (run,) = train_runs(single()[:1], tmp_path, cache=cache, accelerator="cpu")
    assert notes(run) and any("micro-batches of 1" in note for note in run.result.notes)


def test_a_stopped_run_that_met_it_goes_on_to_the_same_bits(cache, tmp_path, one, monkeypatch):
    options = {"cache": cache, "accelerator": "cpu", "checkpoint_seconds": 0.0}
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train_runs(single(), tmp_path, **options)
    assert [result(run) for run in train_runs(single(), tmp_path, **options)] == list(map(result, one))
