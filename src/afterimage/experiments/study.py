"""Execution of a study: its grid is expanded into runs, which are trained; baselines and controls are measured."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from afterimage.analysis.controls.run import run_controls
from afterimage.analysis.inversion.inputs import InversionInputs, from_data
from afterimage.analysis.inversion.run import invert_run
from afterimage.config import (
    LPIPS_NETS,
    RANDOM_WEIGHTS,
    AfterimageError,
    DataConfig,
    DecoderConfig,
    RecipeConfig,
    RunConfig,
    dump_toml,
    from_dict,
    split_source,
    to_dict,
)
from afterimage.config.inversion import search_precision
from afterimage.config.study import RowConfig, StudyConfig
from afterimage.evaluation.baselines import run_baselines
from afterimage.evaluation.metrics import Metrics
from afterimage.experiments import queue
from afterimage.models.decoders import Decoder, decoder_family
from afterimage.models.encoders.providers import at_native_size, open_network, resolve_source
from afterimage.models.encoders.tracing import trace
from afterimage.runs.files import write_atomic
from afterimage.runs.run import Run, is_done
from afterimage.runtime.device import device_name
from afterimage.runtime.distributed import distributed_context
from afterimage.runtime.failures import (
    collect_failures,
    error_scope,
    is_expected,
    protect_callback,
    to_afterimage_error,
    traceback_text,
)
from afterimage.runtime.terminal import Progress, no_progress, printable

FAILURES = "failures.txt"
"""Name of the file in a study's folder that lists the rows that gave no runs, with the errors."""
Train = Callable[..., list[Run]]
"""A function that trains runs, with the arguments of `queue.train_runs` up to `failures`."""
FindBounds = Callable[..., list[Run]]
"""A function that finds the measured bounds of runs, with the arguments of `find_bounds`."""


def expand_study(
    study: StudyConfig, progress: Progress = no_progress, failures: list[AfterimageError] | None = None
) -> list[RunConfig]:
    """Expand a study into its runs: resolve globs, pin the tags of models, search for weights.

    Args:
        study: the study
        progress: callback for warnings
        failures: list to which the errors of sources that cannot be resolved are added (an unknown model, a model that
            cannot be built at this size, a glob that matches no layer); only rows with such a source are left out

    Returns:
        the runs, each once, with matched controls if the study asks for them

    Raises:
        AfterimageError: a source cannot be resolved, and `failures` is None
    """
    progress = protect_callback(progress)
    rows = [RowConfig((source,)) for source in study.sources] + list(study.rows)
    # Unknown settings of a recipe raise before models and weights are searched.
    recipes = [
        from_dict(RecipeConfig, {**to_dict(study.recipe), **row.recipe}, f"rows[{i}].recipe.")
        for i, row in enumerate(rows, -len(study.sources))
    ]
    lpips = study.lpips
    if lpips == "any":
        lpips = next((net for net in LPIPS_NETS if Metrics(net).lpips_status.available), LPIPS_NETS[0])
    for name in dict.fromkeys(decoder.name for row in rows for decoder in row.decoders or study.decoders):
        if study.parameters is not None and not _has_size_option(name):
            text = f"the {name} decoder has one size only, which it keeps beside {study.parameters:,}"
            progress(text, 1, 1)

    def sized(decoder: DecoderConfig) -> DecoderConfig:
        if study.parameters is None or not _has_size_option(decoder.name):
            return decoder
        return replace(decoder, parameters=study.parameters)

    @functools.cache
    def found_weights(models: tuple[str, ...], weights: str) -> str:
        """Return the weights, or the study's random ones if those are missing and the study allows it."""
        if study.missing_weights in RANDOM_WEIGHTS:
            try:
                queue.check_weights(models, weights)
            except AfterimageError as error:
                note = f"going on with {study.missing_weights.upper()} weights ({error})"
                progress(f"WARNING: no pretrained weights for {' + '.join(models)}: {note}", 1, 1)
                return study.missing_weights
        return weights

    configs: list[RunConfig] = []
    for row, recipe in zip(rows, recipes, strict=True):
        # With a fusion all sources form one row; without, each source is a row of its own.
        for sources in [row.sources] if row.fusion else [(source,) for source in row.sources]:
            try:
                data = at_native_size(study.data, sources)
                matches = [match for source in sources for match in _matches(source, data.size, progress)]
                for group in [tuple(matches)] if row.fusion else [(match,) for match in matches]:
                    models = tuple(dict.fromkeys(split_source(source)[0] for source in group))
                    configs += [
                        RunConfig(
                            sources=group,
                            weights=found_weights(models, row.weights or study.weights),
                            fusion=row.fusion,
                            decoder=sized(decoder),
                            data=data,
                            recipe=recipe,
                            seed=seed,
                            lpips=lpips,
                        )
                        for decoder in row.decoders or study.decoders
                        for seed in study.seeds
                    ]
            except Exception as error:
                if failures is None or error_scope(error):
                    raise
                failures.append(to_afterimage_error(error, f"the row {' + '.join(sources)}"))
    if study.controls:
        configs = with_matched_controls(configs, progress)
    return _unique(configs)


def _unique(configs: Sequence[RunConfig]) -> list[RunConfig]:
    return list({config.digest: config for config in configs}.values())


def _has_size_option(name: str) -> bool:
    """Return whether a decoder comes in sizes; True if it does not exist, which its run reports later."""
    family = _family(name)
    return family is None or family.size_option is not None


def _family(name: str) -> type[Decoder] | None:
    """Return the class of a decoder; None if it does not exist, which its run reports later."""
    try:
        return decoder_family(name)
    except AfterimageError:
        return None


def _matches(source: str, size: tuple[int, int], progress: Progress) -> list[str]:
    model, layer = split_source(source)
    if not any(sign in layer for sign in "*?["):
        return [resolve_source(source)]
    traced = trace(open_network(model), size)
    names = [found.layer for found in traced.list_layers()]
    if ended := traced.early_stop_note:
        progress(f"WARNING: {ended}", 1, 1)
    matches = [resolve_source(f"{model}:{name}") for name in names if fnmatch.fnmatchcase(name, layer)]
    if not matches and not any(sign in layer for sign in "*?"):
        traced.layer(layer)  # brackets may select one of several tensors: output[features]
        return [resolve_source(source)]
    if not matches:
        raise AfterimageError(f"{source!r} matches no layer of {model}. Layers: {', '.join(names)}")
    return matches


@dataclass(frozen=True)
class StudyShard:
    """One part of a study: every `count`-th group of runs that are trained together. Baselines belong to part 1.

    Attributes:
        number: number of the part, from 1
        count: number of parts
    """

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> StudyShard:
        """Parse `2/5`, the second part of five.

        Raises:
            AfterimageError: the text is not of the form K/N with K from 1 to N
        """
        found = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise AfterimageError(f"a part of a study is K/N with K from 1 to N, such as 2/5, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def of(self, configs: Sequence[RunConfig]) -> list[RunConfig]:
        """Return the runs of this part; every run belongs to exactly one of the parts 1 to `count`."""
        groups = study_groups(configs)[self.number - 1 :: self.count]
        mine = {config.digest for group in groups for config in group}
        return [config for config in configs if config.digest in mine]


def study_groups(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Group the runs that are trained together (see `queue.group_runs`), in the study's order."""
    return [list(group.values()) for group in queue.group_runs((config.digest, config) for config in configs)]


def run_study(
    study: StudyConfig,
    root: str | Path,
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = no_progress,
    train: Train | None = None,
    bounds: FindBounds | None = None,
    part: StudyShard = StudyShard(),
) -> tuple[list[Run], list[AfterimageError]]:
    """Run everything in a study that is not done yet.

    A failure ends only what depends on it: a run, a row that gives no runs (recorded in failures.txt), a baseline, or
    the controls of one run. If `torchrun` started several processes, they train together, and the main process alone
    does everything else and returns the baselines and inversions.

    Args:
        study: the study
        root: folder of the run folders
        cache: folder of decoded images; None for the default
        accelerator: `cpu`, `cuda`, `mps` or `auto`
        progress: callback for progress and messages, see `Progress`
        train: function that trains the runs; None for `queue.train_runs` (`experiments.ray` has another one)
        bounds: function that finds measured bounds; None for `find_bounds` (`experiments.ray` has another one)
        part: the part of the study to run; the other parts are left to other processes

    Returns:
        the runs, and the failures
    """
    failures: list[AfterimageError] = []
    runs: list[Run] = []

    with distributed_context(accelerator) as ranks:
        progress = protect_callback(progress) if ranks.is_main_process else no_progress
        unresolved: list[AfterimageError] = []
        with ranks.raise_on_all_ranks():
            configs = expand_study(study, progress, unresolved) if ranks.is_main_process else []
        configs = ranks.broadcast(configs)
        if part.number == 1:  # part 1 reports the rows that gave no runs, which belong to no part
            failures += unresolved
        with ranks.raise_on_all_ranks():
            if ranks.is_main_process:
                write_atomic(Path(root) / "study.toml", dump_toml(study))
                _write_failures(Path(root) / FAILURES, unresolved)
            if ranks.is_main_process and study.baselines and part.number == 1 and configs:
                options = {"lpips": configs[0].lpips, "cache": cache, "progress": progress}
                with collect_failures(failures, "the baselines"):
                    for data in dict.fromkeys(config.data for config in configs):
                        runs += run_baselines(data, root, keep=study.keep, failures=failures, **options)
        settings = {"cache": cache, "accelerator": accelerator, "progress": progress}
        trained = (train or queue.train_runs)(
            part.of(configs), root, keep=study.keep, failures=failures, **settings
        )
        with ranks.raise_on_all_ranks():
            if ranks.is_main_process:
                done = [run for run in trained if is_done(run)]
                if study.controls:
                    with collect_failures(failures, "the controls"):
                        failures += run_controls(done, **settings)
                if study.invert:
                    runs += (bounds or find_bounds)(done, study, root, failures, **settings)
        failures = ranks.broadcast(failures)
    return trained + runs, failures


def find_bounds(
    runs: Sequence[Run],
    study: StudyConfig,
    root: str | Path,
    failures: list[AfterimageError],
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = no_progress,
) -> list[Run]:
    """Find the measured bound of each run: refine its decoder's reconstructions of its first test images.

    Each run gets the most consistent images and the best estimates, searched in the precision of its training if
    inversions support it. Finished inversions are not repeated, and an interrupted search resumes after its last
    finished batch.

    Args:
        runs: finished runs
        study: number of test images to invert per run, and settings of the inversion
        root: folder of the inversions' run folders
        failures: list to which the error of each run that cannot be refined is added; the others continue
        cache, accelerator, progress: as for `run_study`

    Returns:
        the finished inversions
    """
    device, found = device_name(accelerator), []
    inputs: dict[DataConfig, InversionInputs] = {}
    for run in runs:
        with collect_failures(failures, f"the measured bound of {run.name}"):
            few = run.config.data.limit_test
            data = replace(run.config.data, limit_test=min(study.invert, few or study.invert))
            if data not in inputs:
                inputs[data] = from_data(data, cache=cache, progress=progress)
            precision = search_precision(run.config.recipe.precision)
            found += invert_run(
                run, Path(root), replace(study.inversion, precision=precision), inputs[data], from_grey=False,
                estimate=study.estimate, device=device, progress=progress,
            )  # fmt: skip
    return found


def _write_failures(path: Path, failures: Sequence[AfterimageError]) -> None:
    """Write the errors of rows that gave no runs, with tracebacks of unexpected ones; without any, remove the file."""
    parts = [
        printable(f"{error}\n") + ("" if is_expected(error) else f"\n{traceback_text(error)}")
        for error in failures
    ]
    if parts:
        write_atomic(path, "\n".join(parts))
    else:
        path.unlink(missing_ok=True)


def perceptual_loss(net: str) -> str:
    """Return the published study's second loss, half MSE and half LPIPS, with the given LPIPS network."""
    return "0.5*mse + 0.5*lpips" + ("" if net == "alex" else f":{net}")


def with_matched_controls(configs: Sequence[RunConfig], progress: Progress = no_progress) -> list[RunConfig]:
    """Return the runs, each followed by its matched controls, without duplicates.

    A run on trained weights gets a control with `random` weights, whose residual blocks act. A run that is trained by
    gradient descent with the loss `mse` gets a control with the loss `perceptual_loss`, unless the weights of its LPIPS
    network are not available, which `progress` reports. A closed form minimises the squared error only, so it has no
    control of the second kind.
    """

    @functools.cache
    def has_lpips(net: str) -> bool:
        status = Metrics(net).lpips_status
        if not status.available:
            text = f"no controls with a perceptual loss: LPIPS is unavailable: {status.reason}"
            progress(f"WARNING: {text}", 1, 1)
        return status.available

    found: list[RunConfig] = []
    for config in configs:
        found.append(config)
        if config.weights not in RANDOM_WEIGHTS:
            found.append(replace(config, weights="random"))
        family = _family(config.decoder.name)
        if (
            config.recipe.loss == "mse"
            and family is not None
            and family.trainable
            and has_lpips(config.lpips)
        ):
            found.append(replace(config, recipe=replace(config.recipe, loss=perceptual_loss(config.lpips))))
    return _unique(found)
