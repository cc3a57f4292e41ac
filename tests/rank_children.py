"""Real gloo processes on this machine: ranks as `torchrun` starts them, but forked where torch is loaded already."""

import json
import os
import socket
import time
from pathlib import Path

from children import MODEL, context


def start_ranks(count, function, *arguments, **options):
    """Processes of which each calls the function as one of `count` ranks, the leading one first."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    processes = [
        context().Process(target=_as_rank, args=(rank, count, port, function, arguments, options))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def run_ranks(count, function, *arguments, seconds=400, **options):
    """The exit codes of the ranks; None for one that has not ended in time, and is killed."""
    return ends(start_ranks(count, function, *arguments, **options), seconds)


def ends(processes, seconds):
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _as_rank(rank, count, port, function, arguments, options):
    import torch

    torch.set_num_threads(1)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    os.environ |= dict(zip(names, map(str, (rank, rank, count, count, port)), strict=True))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    function(*arguments, **options)


def train_ranks(configs, root, cache, *, said: Path | None = None, stop=None, pace=0.0, hurt=None, **options):
    """Train the runs; `said` takes what is said, `stop` interrupts before that step, `hurt` patches rank 1 only."""
    from afterimage.config import AfterimageError
    from afterimage.experiments.queue import train_runs
    from afterimage.training.decoder_trainer import DecoderTrainer

    step, steps = DecoderTrainer.step, [0]

    def stepping(self, *arguments):
        if steps[0] == stop:
            raise KeyboardInterrupt
        steps[0] += 1
        time.sleep(pace)
        step(self, *arguments)

    def progress(what, done, total, **figures):
        if said is not None:
            with open(said, "a", encoding="utf-8") as file:
                file.write(what + "\n")

    DecoderTrainer.step = stepping
    if hurt is not None and os.environ["RANK"] == "1":
        hurt()
    try:
        train_runs(configs, root, cache=cache, accelerator="cpu", progress=progress, **options)
    except AfterimageError as error:
        progress(f"rank {os.environ['RANK']} says: {error}", 1, 1)
        raise


def study_ranks(study, root, cache):
    from afterimage.experiments.study import run_study

    run_study(study, root, cache=cache, accelerator="cpu")


def fail_one_decoder():
    """The transposed decoder meets an error in its third step, on this rank alone."""
    from afterimage.config import AfterimageError
    from afterimage.training.decoder_trainer import DecoderTrainer

    gradients, calls = DecoderTrainer._gradients, [0]

    def failing(self, features, images, count, window):
        calls[0] += "transposed" in self.name
        if calls[0] == 3 and "transposed" in self.name:
            raise AfterimageError("a part of a step went wrong")
        return gradients(self, features, images, count, window)

    DecoderTrainer._gradients = failing


def run_out_of_memory():
    """This rank has memory for one image at a time, as far as gradients go."""
    from afterimage.training.decoder_trainer import DecoderTrainer

    gradients = DecoderTrainer._gradients

    def short(self, features, images, count, window):
        if len(images) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return gradients(self, features, images, count, window)

    DecoderTrainer._gradients = short


def train_without_drift(decoder, folder: Path, cache) -> None:
    """The library's `train` on a decoder whose convolutions have no bias; its history is written down.

    Before a batch norm a bias has no effect and its gradient is rounding alone, which Adam makes steps of.
    """
    import torch

    import afterimage

    torch.set_num_threads(1)
    data = afterimage.load_data(
        afterimage.DataConfig("procedural:18", test="procedural:3", resize=48, crop=32), cache=cache
    )
    encoder = afterimage.Encoder(MODEL, layers=["layer2"], weights="random-init", image_size=32)
    head = afterimage.create_decoder(decoder, encoder.specs, 32, seed=0)
    for module in head.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d) and module.bias is not None:
            torch.nn.init.zeros_(module.bias).requires_grad_(False)
    reconstructor = afterimage.Reconstructor(encoder, head)
    recipe = afterimage.RecipeConfig(epochs=3, batch_size=4, scheduler="plateau", plateau_patience=0)
    history = afterimage.training.trainer(reconstructor, data, recipe, accelerator="cpu")
    state = {name: tensor.double().sum().item() for name, tensor in head.state_dict().items()}
    name = os.environ.get("RANK", "one")
    (folder / f"{name}.json").write_text(json.dumps([history, state]))


def stumble():
    """The wavelet decoder meets a bug in its sixth step, in the second epoch, on this rank alone."""
    from afterimage.training.decoder_trainer import DecoderTrainer

    gradients, calls = DecoderTrainer._gradients, [0]

    def stumbling(self, features, images, count, window):
        calls[0] += "wavelet" in self.name
        if calls[0] == 6 and "wavelet" in self.name:
            raise IndexError("one rank's own bug")
        return gradients(self, features, images, count, window)

    DecoderTrainer._gradients = stumbling


def break_an_encoder():
    """Encoders that read layer2 raise on this rank alone."""
    from pytest import MonkeyPatch
    from stand_ins import break_encoders

    break_encoders(MonkeyPatch(), "layer2", IndexError("one rank's network"))
