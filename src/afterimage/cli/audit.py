"""`afterimage audit`: measure how much layers leak of their images, what each defence prevents, and its cost."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from afterimage.cli import shared
from afterimage.cli.shared import option_name, specified_options, table
from afterimage.config import AfterimageError, load_toml, printable_path
from afterimage.config.audit import WHITE_BOX, AuditConfig
from afterimage.runs.audit import AuditResults
from afterimage.runs.run import check_folder
from afterimage.runtime.terminal import Display, console, print_lines

if TYPE_CHECKING:
    from afterimage.report.audit.verdict import Verdict


EXIT_OVER_LIMITS = 3
"""Exit code of an audit that is not within its limits; 1 is an error, 2 a wrong command line."""


@dataclass(frozen=True)
class Audit:
    """Audit what leaks from features that are sent or stored: layer x defence x attacker, with a verdict.

    Audits a MODEL, or stored features with their images (--feature-store). If --max-ssim or --max-identification
    sets a limit, the exit code is 3 if the upper end of a 95 % interval exceeds it for any audited layer, defence and
    attacker, so name only what is to be deployed. The same command continues an interrupted audit.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = ""
    """Encoder: [PROVIDER/]MODEL, for example resnet18.tv_in1k, or python/package.module:factory, your own network."""
    layers: tuple[str, ...] = ()
    """Layers to audit; `afterimage layers MODEL` lists them (default with --feature-store: all)."""
    feature_store: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """Stored features and images to audit instead of a network, from `afterimage extract` or any other
    file (.safetensors, .npz or .parquet) that holds `features` and `images`."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE.toml")] = None
    """File of settings, such as the audit.toml that each audit writes; options given here take precedence."""
    data: shared.Images = ""
    test: shared.TestImages = ""
    defences: tuple[str, ...] = ()
    """Defences to try: none, noise:SCALE, int8, int4, 1bit, topk:FRACTION, pca:D, drop:FRACTION, pool:SIZE, shuffle, or
    several joined by +."""
    decoders: tuple[str, ...] = ()
    """Decoders that attackers train, such as linear, residual or attention."""
    attacker_images: tuple[str, ...] = ()
    """Numbers of images that attackers own: 5 or more each, or all."""
    threat_model: tuple[str, ...] = ()
    """Threat models: black-box (the attacker trains a decoder), white-box (the attacker also has the encoder's weights
    and refines each reconstruction), or both."""
    attacker_data: str = ""
    """Source of the attackers' own images (default: that of --data)."""
    max_ssim: float | None = None
    """Fail if the mean SSIM of any attacker's reconstructions may exceed this."""
    max_identification: float | None = None
    """Fail if the share of any attacker's reconstructions that identify their own original may exceed this."""
    weights: shared.Weights = ""
    prediction: str = ""
    """Output of the network: classes, embedding, or auto."""
    size: shared.Size = ""
    """Crop size in pixels: 256, 256x384 (height x width), or native, the encoder's own (default: 224)."""
    resize: shared.Resize = None
    limit_test: shared.LimitTest = None
    epochs: int | None = None
    """Number of epochs, for decoders that are trained in epochs (default: 30)."""
    refine_steps: int | None = None
    """With --threat-model white-box: number of optimisation steps for each image (default: 200)."""
    refine_images: int | None = None
    """With --threat-model white-box: number of test images to refine (default: 20)."""
    estimate_images: int | None = None
    """Number of the attackers' own images that they learn the best estimates from (default: 64); 0 for none."""
    seed: int | None = None
    """Seed of initial weights, order, crops, noise and the choice of the attackers' images (default: 42)."""
    lpips: str = ""
    """LPIPS network: alex, vgg or squeeze."""
    output_dir: Path | None = None
    """Folder for the audit (default: runs/audit-NAME)."""
    cache: shared.Cache = None
    device: shared.Device = "auto"

    def run(self) -> None:
        from afterimage.analysis.audit.run import run_audit
        from afterimage.report.audit.page import write_audit
        from afterimage.report.audit.verdict import judge

        config = self.build_config()
        root = self.output_dir or Path("runs") / f"audit-{Path(config.target_name.replace(':', '-')).name}"
        check_folder(root, "--output-dir")
        with Display() as display:
            results = run_audit(config, root, cache=self.cache, accelerator=self.device, progress=display)
        verdict = judge(results, config.limits)
        command = shlex.join(["afterimage", *sys.argv[1:]])
        written = write_audit(results, verdict, config.limits, root, command=command)
        print_verdict(results, verdict)
        print_lines(*(printable_path(written[name]) for name in ("index.html", "audit.json")))
        if verdict.passed is False:
            print_lines("afterimage: NOT within the limits", error=True)
            raise SystemExit(EXIT_OVER_LIMITS)
        if results.failures:
            raise SystemExit(1)

    def build_config(self) -> AuditConfig:
        """Return the settings of the file, or the defaults, overridden by the options of the command line."""
        # Without a file the class stands for its own defaults.
        base = AuditConfig if self.config is None else load_toml(AuditConfig, self.config)
        attackers = specified_options(
            self,
            *("decoders", "refine_steps", "refine_images"),
            data="attacker_data",
            images="attacker_images",
            threat_models="threat_model",
        )
        if self.estimate_images is not None:
            attackers["estimate"] = replace(base.attackers.estimate, images=self.estimate_images)
        data = replace(base.data, **specified_options(self, "test", "limit_test", source="data"))
        settings = specified_options(self, "layers", "defences", "weights", "prediction", "seed", "lpips") | {
            "data": data.with_overrides(self.size, self.resize),
            "attackers": replace(base.attackers, **attackers),
            "limits": replace(base.limits, **specified_options(self, "max_ssim", "max_identification")),
            "recipe": replace(base.recipe, **specified_options(self, "epochs")),
        }
        if subject := specified_options(self, "model", pairs="feature_store"):
            settings |= {"model": "", "pairs": ""} | subject
        config = AuditConfig(**settings) if base is AuditConfig else replace(base, **settings)
        self._check_used(config)
        return config

    def _check_used(self, config: AuditConfig) -> None:
        """Check that every given option has an effect on this audit."""
        of_network = ("data", "test", "size", "resize", "limit_test", "weights", "prediction")
        for name in specified_options(self, *of_network) if config.pairs else ():
            why = "stored features have their images and no network"
            raise AfterimageError(f"{option_name(name)} goes with a MODEL: {why}")
        for name in specified_options(self, "refine_steps", "refine_images"):
            if WHITE_BOX not in config.attackers.threat_models:
                raise AfterimageError(f"{option_name(name)} goes with --threat-model {WHITE_BOX}")


def print_verdict(results: AuditResults, verdict: Verdict) -> None:
    """Print the table of attacks, all notes and the verdict."""
    from rich.text import Text

    from afterimage.report.audit.verdict import SSIM, highest_identification, ssim_intervals

    numbers = ("identified (95 %)", "by", "SSIM (95 %)", "PSNR", "LPIPS", "network keeps", "bytes")
    found = table(f"audit of {results.subject['name']}", ("layer", "defence", "attacker"), numbers)
    for row in [*results.rows, *results.blind]:
        by, share = highest_identification(row)
        lpips = row.scores["lpips"]
        who = row.attacker
        cost = results.costs.get((row.layer, row.defence))
        keeps = (
            "" if cost is None else "unknown" if cost["score"] is None else f"{cost['score']['estimate']:.3f}"
        )
        found.add_row(
            Text(row.layer or "–"),
            Text(row.defence or "–"),
            Text(f"{who.decoder} {who.images}, {who.threat_model}, {who.answer}"),
            f"{share.estimate:.1%} ({share.low:.1%}–{share.high:.1%})",
            by,
            "\n".join(
                f"{value.estimate:.3f} ({value.low:.3f}–{value.high:.3f})"
                + ("" if by == SSIM else ", seen part")
                for by, value in ssim_intervals(row).items()
            ),
            f"{row.scores['psnr'].estimate:.2f}",
            "–" if lpips is None else f"{lpips.estimate:.3f}",
            keeps,
            "0" if cost is None else f"{cost['bytes']:,}",
        )
    screen = console(160)
    screen.print(found)
    of_costs = dict.fromkeys(note for cost in results.costs.values() for note in cost["notes"])
    for text in (*of_costs, *results.notes, *verdict.remarks):
        screen.print(text, soft_wrap=True)
    for option in verdict.options:
        for reason in option.reasons:
            screen.print(f"{option.layer}, {option.defence}: {reason}", soft_wrap=True)
    recommended = verdict.recommended
    name = f"{recommended.layer} with {recommended.defence}" if recommended else "none"
    screen.print(f"recommended: {name} ({verdict.reason})", soft_wrap=True)
    screen.print(verdict.scope, soft_wrap=True)
    screen.print("a lower bound on what leaks: no stronger attack is excluded", soft_wrap=True)
