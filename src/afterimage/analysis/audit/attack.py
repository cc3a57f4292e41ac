"""Attack one layer: train all attackers who own the same images on one pass through the encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from afterimage.analysis.audit.attackers import (
    DefendedFeatureLoader,
    DefendedFeatures,
    attacker_decoder,
    evaluate_attackers,
)
from afterimage.analysis.audit.condition import AuditCondition
from afterimage.analysis.audit.defences.chain import Defence
from afterimage.analysis.audit.session import KEEP, AuditSession, together
from afterimage.config import counted
from afterimage.config.audit import BLACK_BOX, DECODED, ESTIMATE, WHITE_BOX
from afterimage.data.images import Data
from afterimage.runs.run import Run, is_done
from afterimage.training.checkpoint import load_tensors, remove_checkpoints
from afterimage.training.context import RunContext
from afterimage.training.decoder_trainer import DecoderTrainer
from afterimage.training.trainer import Trainer


@dataclass(kw_only=True)
class AttackContext(RunContext):
    """Run context of attackers trained together: a failed one is recorded, and the others go on."""

    session: AuditSession
    conditions: dict[Run, AuditCondition] = field(default_factory=dict)
    """Condition that each attacker's run folder is for."""

    def record_failure(self, run: Run, error: Exception) -> None:
        condition = self.conditions[run]
        self.session.failed(condition.label, error, [condition])


def attack_layer(
    session: AuditSession,
    layer: str,
    encoder: nn.Module | None,
    defences: Mapping[str, Defence],
    data: Data,
    conditions: Sequence[AuditCondition],
) -> None:
    """Measure all conditions of one layer whose attackers own the same images.

    Args:
        session: the audit
        layer: the layer
        encoder: the network up to the layer; None for a store
        defences: the fitted defences by their text
        data: the attackers' own images and the test images
        conditions: the conditions; finished ones are left alone
    """

    def own(texts: Sequence[str]) -> list[AuditCondition]:
        return [condition for condition in conditions if condition.defence in texts]

    def attack(texts: list[str]) -> None:
        _attack(session, layer, encoder, {text: defences[text] for text in texts}, data, own(texts))

    together(
        attack, list(defences), lambda text, error: session.failed(f"{layer}, {text}", error, own([text]))
    )


def _attack(
    session: AuditSession,
    layer: str,
    encoder: nn.Module | None,
    defences: Mapping[str, Defence],
    data: Data,
    conditions: Sequence[AuditCondition],
) -> None:
    missing = [condition for condition in conditions if not session.is_done(condition)]
    context = AttackContext(progress=session.progress, session=session)
    config, decoders = session.config, {}
    for defence, decoder in dict.fromkeys((condition.defence, condition.decoder) for condition in missing):
        # All attackers start from the decoder of the black-box attacker.
        condition = session.condition(layer, defence, decoder, data, BLACK_BOX, DECODED)
        with session.ending(condition.label, [condition]):
            run = session.begin(condition)
            context.conditions[run] = condition
            decoders[defence, decoder] = attacker_decoder(
                decoder,
                list(defences).index(defence),
                defences[defence],
                session.target.image_size,
                config.recipe,
                session.fabric,
                seed=config.seed,
                run=run,
                context=context,
            )
    if not decoders:
        return
    sent = DefendedFeatures(session.target.specs[layer].source, list(defences.values()), encoder)
    loader = DefendedFeatureLoader(
        sent, data, config.recipe, session.fabric, seed=config.seed, context=context
    )
    _train(loader, list(decoders.values()))
    for (defence, name), decoder in decoders.items():
        for model in session.config.attackers.threat_models if decoder.best and not decoder.failed else ():
            asked = (defence, name, model)
            own = [
                c for c in missing if (c.defence, c.decoder, c.threat_model) == asked and c.answer != DECODED
            ]
            if own:
                _improve(loader, decoder, own)


def _train(loader: DefendedFeatureLoader, decoders: Sequence[DecoderTrainer]) -> None:
    """Train and measure the decoders of black-box attackers, or load finished ones."""
    context, fresh = loader.context, []
    for decoder in decoders:
        path = decoder.run.file("decoder.safetensors")
        with context.isolate(decoder.run):
            if is_done(decoder.run) and path.exists():
                decoder.best, _ = load_tensors(path)
                decoder.model.load_state_dict(decoder.best)
            else:
                decoder.restore()
                fresh.append(decoder)
    if fresh:
        Trainer(loader, fresh).train()
    for decoder in [d for d in fresh if d.best and not d.failed]:
        with context.isolate(decoder.run):
            decoder.model.load_state_dict(decoder.best)
            decoder.save_best()

    def failed(decoder: DecoderTrainer, error: Exception) -> None:
        with context.isolate(decoder.run):
            raise error

    together(lambda sound: _measure(loader, sound), [d for d in fresh if d.best and not d.failed], failed)


def _measure(loader: DefendedFeatureLoader, decoders: Sequence[DecoderTrainer]) -> None:
    """Measure trained attackers on one pass over the test images."""
    context, session = loader.context, loader.context.session
    box = session.target.box(context.conditions[decoders[0].run].layer)
    results, small = evaluate_attackers(loader, decoders, session.metrics, keep=KEEP, box=box)
    for decoder, result, reconstructions in zip(decoders, results, small, strict=True):
        with context.isolate(decoder.run):
            session.save(
                context.conditions[decoder.run], result.rows, result.images, reconstructions,
                seconds=decoder.seconds, notes=decoder.notes,
            )  # fmt: skip
            remove_checkpoints(decoder.run)


def _improve(
    loader: DefendedFeatureLoader, decoder: DecoderTrainer, conditions: Sequence[AuditCondition]
) -> None:
    """Improve a decoder's reconstructions and measure the result; `conditions` differ only in the answer."""
    session, first = loader.context.session, conditions[0]
    white_box, attackers = first.threat_model == WHITE_BOX, session.config.attackers
    if white_box and not loader.encoders.defences[decoder.feature_indices[0]].preserves_positions:
        session.note(
            f"{first.layer}, {first.defence}: not refined, since a shuffled order leaves nothing to compare "
            "features with place by place; an attacker may find a way"
        )
        return
    from afterimage.analysis.audit.improve import estimate_images, improve

    with session.ending(first.label, conditions):
        for condition in conditions:
            session.begin(condition)
        wanted = [condition.answer for condition in conditions]
        answers, seconds = improve(
            loader, decoder, session.metrics,
            refine_steps=attackers.refine_steps if white_box else 0,
            estimate=attackers.estimate if ESTIMATE in wanted else None,
            count=attackers.refine_images if white_box else len(loader.data.test),
            keep=KEEP, box=session.target.box(first.layer), progress=session.progress,
        )  # fmt: skip
        steps = f", then refined for {attackers.refine_steps} steps" if white_box else ""
        for condition in conditions:
            learned = ""
            if condition.answer == ESTIMATE:
                own = len(loader.data.validation)
                count = len(estimate_images(own, attackers.estimate, refined=white_box))
                learned = f", then corrected by what {counted(count, 'image')} of the attacker's own taught"
            notes = [f"decoded by {condition.decoder}{steps}{learned}"]
            session.save(condition, *answers[condition.answer].measured, seconds=seconds, notes=notes)
