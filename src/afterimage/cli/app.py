"""`afterimage app`: serve a live page of finished decoders."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import Annotated

import tyro

from afterimage.cli import shared
from afterimage.cli.shared import find_local_or_hub_runs, option_name
from afterimage.config import AfterimageError, check_range, format_count
from afterimage.runs.run import Run
from afterimage.runtime.terminal import print_lines

MEGABYTES_A_MEGAPIXEL = 4
"""Largest accepted file size in MB per megapixel: that of a barely compressed 8-bit PNG with transparency."""


@dataclass(frozen=True)
class App:
    """Serve a live page that shows an image, dropped or from the webcam, through every decoder at once.

    Visitors can add noise, send fewer bits or values, swap or zero a part of the features, and watch a reconstruction
    being refined. Needs `pip install 'afterimage[app]'`, but neither a GPU nor a network: images stay on this machine
    and are deleted after an hour.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|hub:USER/NAME [...]")]
    """Run folders, folders that hold run folders, or decoders of the Hugging Face hub: hub:USER/NAME for all of a
    repository, hub:USER/NAME/DECODER for one, each with an optional @REVISION."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 admits other machines."""
    port: int = 7860
    """Port to listen on."""
    max_megapixels: int = 50
    """Size of the largest accepted image, in megapixels."""
    max_waiting: int = 20
    """Number of requests that may wait; further visitors get the message that the queue is full."""
    weights: shared.WeightsOverride = None
    lpips: shared.LpipsOverride = None
    device: shared.Device = "auto"

    def run(self) -> None:
        for name, most in (("port", 65_535), ("max_megapixels", 150), ("max_waiting", 10_000)):
            check_range(option_name(name), getattr(self, name), 1, most)
        runs = self._find()
        try:
            from afterimage.experiments.live_page import LivePage
        except ModuleNotFoundError as error:
            if error.name != "gradio":
                raise
            raise AfterimageError("the live page needs Gradio: pip install 'afterimage[app]'") from None
        from afterimage.experiments.live import LiveDecoder
        from afterimage.runtime.device import device_name

        pixels, device = self.max_megapixels * 10**6, device_name(self.device)
        use = {"weights": self.weights, "lpips": self.lpips, "max_pixels": pixels, "device": device}
        live = LivePage([LiveDecoder(run, **use) for run in runs])
        limits = {
            "max_waiting": self.max_waiting,
            "max_megabytes": self.max_megapixels * MEGABYTES_A_MEGAPIXEL,
        }
        page, address = live.serve(host=self.host, port=self.port, **limits)
        print_lines(f"{format_count(len(runs), 'decoder')} at {address} (Ctrl-C ends it)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt as stopped:
            stopped.reported_by_other_rank = True  # no message: there is nothing to resume
            raise
        finally:
            page.close(verbose=False)

    def _find(self) -> list[Run]:
        found = sorted(find_local_or_hub_runs(self.runs), key=_order)
        runs = [run for run in found if run.file("decoder.safetensors").exists()]
        if not runs:
            raise AfterimageError("none of the runs has a decoder; baselines and inversions rebuild nothing")
        for run in found:
            if run not in runs:
                print_lines(f"left out: {run.name} has no decoder ({run.state})")
        return runs


def _order(run: Run) -> list[str | int]:
    """Return a sort key by name that compares numbers by value: `block5` comes before `block11`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", run.name)]
