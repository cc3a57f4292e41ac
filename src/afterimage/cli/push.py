"""`afterimage push`: share decoders on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from afterimage.cli import shared
from afterimage.cli.shared import find_runs, option_name
from afterimage.config import AfterimageError, format_count, printable_path
from afterimage.runs.files import write_atomic
from afterimage.runs.repository import PREFIX
from afterimage.runs.run import Run
from afterimage.runtime.terminal import print_lines

if TYPE_CHECKING:
    from afterimage.report.publish import ImageGrid
    from afterimage.report.space import Wheel


@dataclass(frozen=True)
class Push:
    """Share decoders on the Hugging Face hub, with a model card made from their runs, or share a study's scores.

    A decoder is uploaded with its configuration, its scores and the identity of its encoder's weights; these weights
    stay here. The card also reports baselines, inversions and controls that lie in the same folders. Log in first with
    the command `hf auth login`, or set HF_TOKEN.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [...]")]
    """Run folders, or folders that hold run folders; all their decoders go into one repository."""
    to: str
    """Repository to push to, USER/NAME; created if it does not exist."""
    dataset: bool = False
    """Share the scores instead of the decoders, as a data set: Parquet files with a row for each run and test image,
    the images that are free to share, and the table of the runs. Needs pyarrow."""
    space: bool = False
    """Also create a Space of the same name: a live page of these decoders, at this commit. It installs a wheel of this
    afterimage, which is uploaded with it, and Gradio in the version installed here."""
    collection: str | None = None
    """Title of a collection of USER to add the repository and the Space to; created if it does not exist."""
    license: str = "unknown"
    """Licence of the decoders or scores, by the hub's name for it, such as mit or cc-by-4.0."""
    own_images: bool = False
    """Also share test images of your own, in the image grid, and their names in the scores. By default the grid shows
    photographs that are free to share, and your own images are numbered."""
    private: bool = False
    """Make a newly created repository private."""
    output_dir: Path | None = None
    """Write the repository's files into this folder, and upload nothing."""
    weights: shared.WeightsOverride = None
    device: shared.Device = "auto"

    def run(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.to):
            raise AfterimageError(f"--to {self.to!r:.200} is not a valid repository name: write USER/NAME")
        for one, other, why in (
            ("collection", "output_dir", "nothing is uploaded"),
            ("private", "output_dir", "nothing is uploaded"),
            ("weights", "dataset", "scores need no encoder"),
            ("space", "dataset", "a data set has no decoders to show"),
            ("space", "output_dir", "a Space shows a commit, and nothing is uploaded"),
            ("space", "private", "a Space reads the decoders and its wheel without a token"),
        ):
            if getattr(self, one) and getattr(self, other):
                raise AfterimageError(f"{option_name(one)} does not go with {option_name(other)}: {why}")
        given = find_runs(self.folders)
        wheel = None
        if self.space:  # before anything is uploaded
            from afterimage.report.space import build_wheel, sdk_version

            sdk_version()
            wheel = build_wheel()
        if self.dataset:
            from afterimage.report.dataset import dataset_files

            kind, decoders = "dataset", []
            files = dataset_files(given, self.to, license=self.license, own_images=self.own_images)
        else:
            kind, (decoders, files) = "model", self._decoders(given)
        for run in given:
            if not run.has_result:
                print_lines(f"left out: {run.name} ({run.state})")
        if self.output_dir is not None:
            for name, content in files.items():
                write_atomic(self.output_dir / name, content)
            print_lines(
                f"{format_count(len(files), 'file')} of {self.to}: {printable_path(self.output_dir)}; "
                "nothing was uploaded"
            )
            return

        from huggingface_hub.constants import ENDPOINT

        from afterimage.models.hub import add_to_collection, upload

        commit = upload(files, self.to, private=self.private, kind=kind)
        if self.dataset:
            print_lines(f"scores at {ENDPOINT}/datasets/{self.to}, commit {commit}")
        else:
            what = self.to if len(decoders) == 1 else f"{self.to}/{decoders[0].name}"
            print_lines(f"{format_count(len(decoders), 'decoder')} at {ENDPOINT}/{self.to}")
            print_lines(f"afterimage reconstruct ME.jpg --from {PREFIX}{what}@{commit}")
        if wheel is not None:
            self._push_space(decoders, commit, wheel)
        if self.collection is not None:
            kinds = [kind, "space"] if wheel is not None else [kind]
            print_lines(
                f"collection at {add_to_collection(self.collection, self.to, kinds, private=self.private)}"
            )

    def _push_space(self, runs: list[Run], commit: str, wheel: Wheel) -> None:
        """Upload the wheel first, then the Space's files: the hub installs requirements before it copies files."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.constants import ENDPOINT

        from afterimage.models.hub import upload
        from afterimage.report.space import space_files

        revision = upload({wheel.name: wheel.content}, self.to, kind="space")
        url = hf_hub_url(self.to, wheel.name, repo_type="space", revision=revision)
        upload(space_files(runs, self.to, commit, wheel, url, license=self.license), self.to, kind="space")
        print_lines(f"live page at {ENDPOINT}/spaces/{self.to}, when the hub has built it")

    def _decoders(self, given: list[Run]) -> tuple[list[Run], dict[str, bytes]]:
        from afterimage.report.publish import is_shareable, kept_images, repository_files, shareable_runs

        runs = shareable_runs(given)
        own = self.own_images or all(is_shareable(run.config.data) for run in runs)
        grid = (kept_images(runs) if own else None) or self._photographs(runs)
        files = repository_files(runs, given, self.to, grid, license=self.license, with_names=self.own_images)
        return runs, files

    def _photographs(self, runs: list[Run]) -> ImageGrid:
        """Reconstruct photographs that are free to share with every decoder."""
        from afterimage.data.sources.sample_images import whole_photographs
        from afterimage.experiments.inference import reconstruct_files
        from afterimage.report.publish import SHAREABLE_SOURCES, SHOWN_IMAGES, ImageGrid
        from afterimage.runtime.device import device_name

        paths, device = whole_photographs()[:SHOWN_IMAGES], device_name(self.device)
        found = {run.name: reconstruct_files(paths, run, weights=self.weights, device=device) for run in runs}
        originals = [one.original for one in found[runs[0].name]]
        learned = any(run.config.data.source == "photographs" for run in runs)
        what = SHAREABLE_SOURCES["photographs"] + (", and some decoders learned from" if learned else "")
        return ImageGrid(what, originals, {name: [one.image for one in own] for name, own in found.items()})
