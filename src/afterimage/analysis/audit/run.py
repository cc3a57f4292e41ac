"""Run an audit: every defence and attacker, layer by layer. Finished conditions are not measured again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from afterimage.analysis.audit.attackers import (
    DefendedFeatures,
    attack_layer,
    attacker_data,
    calibration_features,
    mean_image,
)
from afterimage.analysis.audit.defences.chain import Defence, create_defence
from afterimage.analysis.audit.session import VERSION, AuditCondition, AuditSession
from afterimage.analysis.audit.task_utility import (
    CostUnavailable,
    cost_without_network,
    measure_cost,
    whole_network,
)
from afterimage.config import FeatureSpec, dump_toml, printable_path
from afterimage.config.audit import BLACK_BOX, DECODED, AuditConfig, short_digest
from afterimage.data.images import Data
from afterimage.evaluation.evaluate import evaluate
from afterimage.evaluation.reidentification import downscale
from afterimage.models.encoders.providers import at_native_size
from afterimage.runs.audit import NO_FEATURES_ATTACKER, AuditResults
from afterimage.runs.files import read_json, write_atomic, write_json
from afterimage.runs.run import environment
from afterimage.runtime.failures import is_expected, one_line, run_all_or_each
from afterimage.runtime.terminal import Progress, no_progress


def run_audit(
    config: AuditConfig,
    root: str | Path,
    *,
    cache: Path | None = None,
    accelerator: str = "auto",
    progress: Progress = no_progress,
) -> AuditResults:
    """Measure every condition that is not done yet, each into a folder below `root`.

    If a layer, a defence or an attacker fails with any error, it is listed in `failures` of the results, its
    folders get the traceback, and the others continue.

    Returns:
        the results of all conditions, including those of earlier calls

    Raises:
        AfterimageError: the network, its weights, the images or the text of a defence cannot be used
    """
    if config.model:
        config = replace(config, data=at_native_size(config.data, [f"{config.model}:{config.layers[0]}"]))
    session = AuditSession(config, Path(root), cache=cache, accelerator=accelerator, progress=progress)
    _check_defences(session)
    path, text = session.root / "audit.toml", dump_toml(config)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        session.note(
            f"{printable_path(root)} held another audit: its measured conditions are kept; its page, "
            "audit.json and audit.toml are replaced"
        )
    write_atomic(path, text)
    write_json(session.root / "environment.json", environment() | {"device": str(session.fabric.device)})
    for layer, error in session.target.failures.items():
        session.record_failure(layer, error)
    attackers = dict(_attackers(session))
    for data in attackers.values():
        condition = session.condition("", "", NO_FEATURES_ATTACKER, data, BLACK_BOX, DECODED)
        with session.catch_failure(f"{NO_FEATURES_ATTACKER}, {condition.images:,} images", [condition]):
            _measure_mean_image(session, condition, data)
    for layer in session.target.layers:
        _audit_layer(session, layer, attackers)
    return session.results


def _check_defences(session: AuditSession) -> None:
    """Raise an error for a defence that no layer allows, before anything is trained."""
    for text in session.config.defences:
        errors: list[Exception] = []
        for spec in session.target.specs.values():
            try:
                _defence(session, text, spec)
            except Exception as error:
                errors.append(error)
        if len(errors) == len(session.target.specs) and is_expected(errors[0]):
            raise errors[0]


def _defence(session: AuditSession, text: str, spec: FeatureSpec) -> Defence:
    return create_defence(text, spec, seed=session.config.seed, image_size=session.target.image_size)


def _attackers(session: AuditSession) -> Iterator[tuple[int, Data]]:
    """Yield each attacker's number of images and the images; leave out numbers that exceed the pool."""
    pool = session.target.attacker_pool
    for count in session.config.attackers.images:
        data = attacker_data(session.target.data, pool, count, session.config.seed)
        if data is None:
            have = len(pool.train) + len(pool.validation)
            session.note(f"an attacker with {count} images was left out: the source has only {have} images")
        else:
            yield len(data.train) + len(data.validation), data


def _measure_mean_image(session: AuditSession, condition: AuditCondition, data: Data) -> None:
    """Measure the attacker without features, whose reconstruction is the mean of their own training images."""
    if not session.is_done(condition):
        session.create_folder(condition)
        started = time.monotonic()
        mean = mean_image(data.train, 16)
        result = evaluate(
            lambda images: mean.to(images.device).expand(len(images), -1, -1, -1).contiguous(),
            data.test,
            session.metrics,
            device=session.fabric.device,
            progress=session.progress,
        )
        small = {"": downscale(mean).expand(len(data.test), -1, -1, -1)}
        session.save(condition, result.rows, [], small, seconds=time.monotonic() - started, notes=[])
    session.collect(condition, session.results.blind)


def _audit_layer(session: AuditSession, layer: str, attackers: Mapping[int, Data]) -> None:
    """Measure the cost of every defence of one layer and the attack of every attacker, and collect both."""
    config = session.config
    wanted = {
        count: [
            session.condition(layer, defence, decoder, data, threat_model, answer)
            for defence in config.defences
            for decoder in config.attackers.decoders
            for threat_model in config.attackers.threat_models
            for answer in config.attackers.result_kinds(threat_model)
        ]
        for count, data in attackers.items()
    }
    every = [condition for conditions in wanted.values() for condition in conditions]
    costs = {text: _cost_file(session, layer, text) for text in config.defences}
    with session.catch_failure(layer, every):
        unknown = [text for text, path in costs.items() if not path.exists()]
        if unknown or not all(map(session.is_done, every)):
            encoder = None
            if not session.target.is_stored:
                encoder = session.target.encoder(layer).to(session.fabric.device)
            defences = _fit_defences(session, layer, encoder, every)
            _measure_costs(session, layer, encoder, {t: defences[t] for t in unknown if t in defences}, costs)
            for count, conditions in wanted.items():
                attacked = [condition for condition in conditions if condition.defence in defences]
                attack_layer(session, layer, encoder, defences, attackers[count], attacked)
    for text, path in costs.items():
        with session.catch_failure(f"{layer}, {text}"):
            if path.exists():
                session.results.costs[layer, text] = read_json(path)
    for condition in every:
        try:
            session.collect(condition, session.results.rows)
        except Exception as error:
            session.results.unmeasured.add((layer, condition.defence))
            session.record_failure(condition.label, error)


def _fit_defences(
    session: AuditSession, layer: str, encoder: nn.Module | None, conditions: Sequence[AuditCondition]
) -> dict[str, Defence]:
    """Fit every defence on the first training images of the audited data; leave out those that fail."""
    spec, device = session.target.specs[layer], session.fabric.device
    images, batch_size = session.target.data.train, session.config.recipe.batch_size
    maps = calibration_features(DefendedFeatures(spec.source, [], encoder), images, device, batch_size)
    fitted: dict[str, Defence] = {}
    for text in session.config.defences:
        affected = [condition for condition in conditions if condition.defence == text]
        with session.catch_failure(f"{layer}, {text}", affected):
            fitted[text] = _defence(session, text, spec).to(device).fit(maps)
    return fitted


def _cost_file(session: AuditSession, layer: str, defence: str) -> Path:
    settings = session.condition(layer, defence, "", session.target.data, BLACK_BOX, DECODED).settings
    asked = {"layer": layer, "defence": defence, "kind": session.config.prediction, "version": VERSION}
    return session.root / "costs" / f"{short_digest({**settings, **asked})}.json"


def _measure_costs(
    session: AuditSession,
    layer: str,
    encoder: nn.Module | None,
    defences: Mapping[str, Defence],
    files: Mapping[str, Path],
) -> None:
    """Measure the costs of defences, and write each into its file."""

    config = session.config

    def measure(texts: list[str]) -> None:
        chosen = [defences[text] for text in texts]
        try:
            if encoder is None:
                raise CostUnavailable("a feature store holds no network whose output could be compared")
            costs = measure_cost(
                whole_network(encoder, config.prediction),
                chosen,
                session.target.data.test,
                batch_size=config.recipe.batch_size,
                seed=config.seed,
                device=session.fabric.device,
                progress=session.progress,
            )
        except CostUnavailable as error:
            costs = [cost_without_network(defence, str(error)) for defence in chosen]
        for text, cost in zip(texts, costs, strict=True):
            write_json(files[text], cost)

    def failed(text: str, error: Exception) -> None:
        reason = f"measuring it failed: {one_line(error)}"
        session.results.costs[layer, text] = cost_without_network(defences[text], reason)
        session.record_failure(f"{layer}, {text}, what it costs", error)

    run_all_or_each(measure, list(defences), failed)
