"""Faults that really happen to a run: signals, a full disk, a folder that cannot be written, no memory left."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric

from afterimage import AfterimageError, FeatureSpec, RecipeConfig, create_decoder, train_runs
from afterimage.models.reconstructor import FeatureDecoder, MultiEncoder
from afterimage.runs.run import Run
from afterimage.runtime.device import retry_with_smaller_batch
from afterimage.runtime.failures import is_out_of_memory
from afterimage.training import trainer
from afterimage.training.checkpoint import CHECKPOINT, load_tensors
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.losses import MSE
from children import context, result, small_configs, small_images, train_child


def run_child(function, *arguments, **options):
    process = context().Process(target=function, args=arguments, kwargs=options)
    process.start()
    process.join(120)
    return process.exitcode


def command_line(arguments, output, ready, steps):
    """The command line in a child; `ready` appears after some steps, each of which then takes a little longer."""
    from afterimage.cli import main

    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    step, taken = trainer.training_step, [0]

    def slowly(self, *arguments):
        step(self, *arguments)
        taken[0] += 1
        if taken[0] >= steps:
            ready.touch()
            time.sleep(0.2)

    trainer.training_step = slowly
    torch.set_num_threads(1)
    main(arguments)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_cleanly_and_says_how_to_go_on(sample_images, cache, whole, tmp_path, number, code):
    config = small_configs(sample_images)[0]
    arguments = [
        "train", *config.sources, "--decoders", "transposed", "--weights", "random", "--resize", "48", "--crop", "32",
        "--data", config.data.source, "--epochs", "2", "--batch-size", "4", "--device", "cpu",
        "--output-dir", str(tmp_path / "runs"), "--cache", str(cache),
    ]  # fmt: skip
    output, ready = tmp_path / "output", tmp_path / "ready"
    process = context().Process(target=command_line, args=(arguments, output, ready, 6))
    process.start()
    while not ready.exists():
        assert process.is_alive(), output.read_text()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    text = output.read_text()
    assert process.exitcode == code and "Traceback" not in text, text
    assert "the same command goes on from there" in text
    run = Run(tmp_path / "runs" / config.name)
    position = json.loads(load_tensors(run.file(CHECKPOINT))[1]["facts"])["position"]
    assert run.state == "stopped" and position in (8, 12) and not list(run.path.glob("lock*"))
    assert run_child(command_line, arguments, output, tmp_path / "never", 1000) == 0
    assert f"goes on after epoch 1, image {position}" in output.read_text()
    assert result(run) == whole[0]


def small_disk(configs, root, cache, limit, said):
    """No file may grow beyond `limit` bytes: the kernel cuts a write short there, as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        train_child(configs, root, cache)
    except AfterimageError as error:
        said.write_text(str(error))


def test_a_full_disk_in_a_write_keeps_the_last_checkpoint(sample_images, cache, whole, tmp_path, monkeypatch):
    only, step, steps = small_configs(sample_images)[:1], trainer.training_step, [0]

    def stopping(self, *arguments):
        steps[0] += 1
        if steps[0] == 6:
            raise KeyboardInterrupt
        step(self, *arguments)

    options = {"cache": cache, "accelerator": "cpu", "checkpoint_seconds": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_runs(only, tmp_path / "runs", **options)
    run, said = Run(tmp_path / "runs" / only[0].name), tmp_path / "said"
    before = run.file(CHECKPOINT).read_bytes()
    assert run_child(small_disk, only, tmp_path / "runs", cache, 100_000, said) == 0
    assert "cannot write" in said.read_text() and CHECKPOINT in said.read_text()
    assert run.file(CHECKPOINT).read_bytes() == before
    assert run.state == "failed" and not [p for p in run.path.iterdir() if p.name.startswith((".", "lock"))]
    train_runs(only, tmp_path / "runs", **options)
    assert result(run) == whole[0]


def nobody(configs, root, cache, said):
    """Without the rights of root, which may write anywhere."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        train_child(configs, root, cache)
    except AfterimageError as error:
        said.write_text(str(error))


@pytest.fixture
def open_folder():
    """A folder that any user can enter, unlike pytest's own."""
    folder = Path("/tmp") / f"afterimage-test-{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become nobody")
def test_a_read_only_run_folder_is_one_message(open_folder):
    sample_images = small_images(open_folder / "images")
    (config,) = small_configs(sample_images)[:1]
    run, said = Run.create(open_folder / "runs", config), open_folder / "said"
    said.touch()
    said.chmod(0o666)
    run.path.chmod(0o555)
    assert run_child(nobody, [config], open_folder / "runs", open_folder / "cache", said) == 0
    assert f"cannot write {run.path}" in said.read_text() and "Permission denied" in said.read_text()
    assert [path.name for path in run.path.iterdir()] == ["config.toml"]


def too_much(limit, original, error):
    """`original`, which runs out of memory on more than `limit` images at a time."""

    def limited(self, first, *others):
        sample_images = first if isinstance(first, torch.Tensor) else first[0]
        if len(sample_images) > limit:
            raise error
        return original(self, first, *others)

    return limited


CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "26214400 bytes. Error code 12 (Cannot allocate memory)"
)


def test_without_memory_gradients_are_summed_over_micro_batches(
    sample_images, cache, whole, tmp_path, monkeypatch
):
    said = []
    monkeypatch.setattr(MSE, "forward", too_much(1, MSE.forward, CPU))
    (other,) = train_runs(
        small_configs(sample_images)[2],
        tmp_path,
        cache=cache,
        accelerator="cpu",
        progress=lambda what, *_, **__: said.append(what),
    )
    notes = [note for note in other.result.notes if "micro-batches" in note]
    assert len(notes) == 1 and "micro-batches of 1, the same mathematics; from epoch 1 on" in notes[0]
    assert any("out of memory: gradients are summed" in line for line in said)
    for before, now in zip(whole[2]["history"], other.history, strict=True):
        for key in ("train_loss", "validation_loss"):
            assert now[key] == pytest.approx(before[key], rel=2e-2)


def test_micro_batches_give_the_same_gradients(monkeypatch):
    """Without batch norm they are equal up to the order of sums; parts need not be equally large."""
    spec = FeatureSpec("a:b", 16, 8, 8)
    features, images = torch.randn(7, 16, 8, 8), torch.rand(7, 3, 32, 32)
    fabric = Fabric(accelerator="cpu", devices=1)
    found = []
    for limit in (7, 4, 2):
        head = FeatureDecoder(create_decoder("residual", [spec], 32, seed=0, blocks=1))
        for (
            parameter
        ) in head.parameters():  # zeros at the end of a network would leave its start without gradients
            parameter.data += 0.01
        member = DecoderTrainer(head, [0], RecipeConfig(batch_size=7), fabric)
        gradients = {}

        def note(head=head, gradients=gradients):
            gradients.update({k: p.grad.clone() for k, p in head.named_parameters() if p.grad is not None})

        monkeypatch.setattr(member.optimizer, "step", note)
        with monkeypatch.context() as patch:
            patch.setattr(MSE, "forward", too_much(limit, MSE.forward, MemoryError()))
            member.model.train()
            trainer.training_step(member, [features], images)
        assert member.micro_batch == limit and len(gradients) > 4
        found.append((gradients, member.running_loss))
    for gradients, loss in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, found[0][0][name], rtol=1e-4, atol=1e-7)


def test_micro_batches_with_batch_norm_say_what_differs(sample_images, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(MSE, "forward", too_much(2, MSE.forward, MemoryError()))
    (run,) = train_runs(small_configs(sample_images)[0], tmp_path, cache=cache, accelerator="cpu")
    (note,) = [note for note in run.result.notes if "micro-batches" in note]
    assert "micro-batches of 2" in note and "except that batch norm sees 2 images at a time" in note


def test_an_attempt_that_ran_out_of_memory_leaves_no_trace(sample_images, cache, tmp_path, monkeypatch):
    """The decoder has seen the whole batch when memory runs out: its batch statistics are taken back."""
    counted = []
    forward, step = MSE.forward, trainer.training_step

    def counting(self, *arguments):
        before = {k: v.clone() for k, v in self.model.named_buffers() if "num_batches" in k}
        step(self, *arguments)
        counted.extend(int(v - before[k]) for k, v in self.model.named_buffers() if k in before)

    monkeypatch.setattr(MSE, "forward", too_much(2, forward, MemoryError()))
    monkeypatch.setattr(trainer, "training_step", counting)
    train_runs(small_configs(sample_images, epochs=1)[0], tmp_path, cache=cache, accelerator="cpu")
    # Batches of 4, 4, 4 and 2 images in parts of two.
    assert counted and counted[0] == 2 and set(counted) == {1, 2}


def test_encoders_without_memory_see_fewer_images_at_a_time(
    sample_images, cache, tmp_path, whole, monkeypatch
):
    said = []
    monkeypatch.setattr(MultiEncoder, "forward", too_much(1, MultiEncoder.forward, MemoryError()))
    runs = train_runs(
        small_configs(sample_images),
        tmp_path,
        cache=cache,
        accelerator="cpu",
        progress=lambda what, *_, **__: said.append(what),
    )
    assert any("the encoders see 1 images at a time" in line for line in said)
    for run, before in zip(runs, whole, strict=True):
        for row, other in zip(run.result.per_image, before["scores"], strict=True):
            assert row["psnr"] == pytest.approx(other["psnr"], abs=0.05)


def test_one_image_that_is_too_much_is_an_error(sample_images, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(MSE, "forward", too_much(0, MSE.forward, MemoryError()))
    with pytest.raises(AfterimageError, match="out of memory even with one image at a time"):
        train_runs(small_configs(sample_images)[0], tmp_path, cache=cache, accelerator="cpu")


def test_what_is_taken_for_no_memory():
    for error in (MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory"), CPU):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(ZeroDivisionError):
        retry_with_smaller_batch(lambda size: 1 // 0, 4, "this")


def little_memory(said):
    """Address space for little more than what is in use: the allocator itself refuses."""
    import gc

    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (200 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sizes = []

    def work(size):
        sizes.append(size)
        return float(torch.ones(size, 25 << 20).sum())  # 100 MiB an image

    total, size = retry_with_smaller_batch(work, 8, "this")
    said.write_text(json.dumps([total, size, sizes]))


def test_memory_that_really_runs_out(tmp_path):
    said = tmp_path / "said"
    assert run_child(little_memory, said) == 0
    total, size, sizes = json.loads(said.read_text())
    assert sizes == [8, 4, 2, 1][: len(sizes)] and size == sizes[-1] < 4 and total == size * (25 << 20)
