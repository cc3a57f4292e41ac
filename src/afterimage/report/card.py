"""Model card of a repository of decoders: description, scores, data and limitations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from afterimage.config import RunConfig
from afterimage.report.bounds import bounds_of
from afterimage.report.controls import control_findings
from afterimage.report.format import markdown, markdown_code, markdown_finding, markdown_grid
from afterimage.report.inversion import bound_findings
from afterimage.report.rows import Row, Rows
from afterimage.report.tables import markdown_table
from afterimage.runs.repository import CARD_KEY, DECODER, IMAGE_GRID, LIBRARY, PublishedDecoder
from afterimage.runs.results import METRICS

if TYPE_CHECKING:
    from huggingface_hub.repocard_data import CardData

TASK = "image-to-image"
"""The hub's closest task to rebuilding an image from its features."""
BIBTEX = """```bibtex
@software{afterimage,
  title = {afterimage: how much of an image is left in the features of a frozen vision encoder?},
  author = {{The afterimage authors}},
  version = {VERSION},
  license = {MIT}
}
@inproceedings{mahendran2015understanding,
  title = {Understanding Deep Image Representations by Inverting Them},
  author = {Mahendran, Aravindh and Vedaldi, Andrea},
  booktitle = {IEEE Conference on Computer Vision and Pattern Recognition},
  year = {2015}
}
```"""


def model_card(
    rows: Rows,
    name: str,
    published: Mapping[str, PublishedDecoder],
    shown_images: str,
    *,
    license: str,
    version: str,
) -> str:
    """Write a card that starts with metadata in the form that the hub's client reads.

    Args:
        rows: the published decoders, and the baselines and inversions of the same test images
        name: `USER/NAME`
        published: the decoders by the names of their runs
        shown_images: description of the images in the image grid
        license: the hub's identifier of the decoders' licence
        version: version of afterimage
    """
    bounds = bound_findings(bounds_of(rows))
    controls = control_findings(rows.decoders)
    first = next(iter(published))
    address = name if len(published) == 1 else f"{name}/{first}"
    parts = [
        f"# {markdown(name.rpartition('/')[2])}",
        _lead(rows.decoders),
        f"![Images and what the decoders made of them]({IMAGE_GRID})",
        f"*Top row: {markdown(shown_images)}. Below, a row a decoder: {_listed(published)}.*",
        "## Use",
        f"With afterimage {version} installed:",
        f"```bash\nafterimage reconstruct ME.jpg --from hub:{address}\n```",
        "```python\nfrom afterimage import Reconstructor\n\n"
        f'reconstructor = Reconstructor.from_pretrained("{address}")\n'
        "reconstruction = reconstructor.reconstruct(images)  # (B, 3, H, W) in [0, 1]\n```",
        *_decoders(published),
        "## Scores",
        markdown_table(rows, spread="interval").rstrip(),
        *(["Baselines: not measured beside these decoders."] if not rows.baselines else []),
        "## Measured bound",
        *(
            [block for finding in bounds for block in markdown_finding(finding)]
            or ["Not measured. `afterimage invert RUN` measures what the layer keeps beyond what a decoder shows."]
        ),
        "## Controls",
        *(
            [block for finding in controls for block in markdown_finding(finding, "###")]
            or ["Not measured. `afterimage controls RUN` tells what is preserved in the features from what is guessed."]
        ),
        "## Training data", *_data(rows.decoders),
        "## Encoder", *_encoders(rows.decoders),
        "## Intended use",
        "To look through a layer: research on what representations keep, and audits of what stored or sent features "
        "give away. Where people's images are involved, invert only features that you may invert.",
        "## What it does not show",
        "A score is a lower bound: it says what this decoder could bring back, not what the layer lost. Detail that "
        "the features do not hold is averaged or guessed from the training images. The scores hold for images like the "
        "test images, at their size, and for the encoder's weights named above alone.",
        "## Licence", _licence(license), "## Citation", BIBTEX.replace("VERSION", version),
    ]  # fmt: skip
    return with_metadata(_metadata(rows, name, published, license), parts)


def _metadata(rows: Rows, name: str, published: Mapping[str, PublishedDecoder], license: str) -> CardData:
    """Return the card's metadata, with the results as the hub's `model-index`."""
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    for row in rows.decoders:
        source = row.data.test or row.data.source
        kind, _, rest = source.partition(":")
        where = {
            "task_type": TASK, "task_name": "Image reconstruction from features",
            "dataset_type": rest.partition("@")[0].partition(":")[0] if kind == "hf" else kind,
            "dataset_name": f"{source}, {row.data.test_images} test images",
            "dataset_args": {"resize": row.data.resize, "crop": row.data.crop, "test_digest": row.data.test_digest},
        }  # fmt: skip
        if len(rows.decoders) > 1:
            where["dataset_config"] = row.run.name
        for metric, known in METRICS.items():
            if (score := row.scores[metric]) is not None:
                title = f"{known.title} ({row.lpips.net})" if metric == "lpips" else known.title
                results.append(
                    EvalResult(
                        **where, metric_type=metric, metric_name=title + known.unit.replace(" dB", " (dB)"),
                        metric_value=round(score.mean, known.digits + 1),
                    )
                )  # fmt: skip
    datasets = {r.data.source.removeprefix("hf:").partition("@")[0].partition(":")[0]
                for r in rows.decoders if r.data.source.startswith("hf:")}  # fmt: skip
    return ModelCardData(
        license=license, library_name=LIBRARY, pipeline_tag=TASK, model_name=name.rpartition("/")[2],
        tags=[LIBRARY, "feature-inversion", "image-reconstruction", "interpretability",
              *dict.fromkeys(m.replace("/", "_") for row in rows.decoders for m in row.models)],
        datasets=sorted(datasets) or None, eval_results=results,
        **{CARD_KEY: [decoder.sha256[DECODER] for decoder in published.values()]},
    )  # fmt: skip


def _lead(rows: Sequence[Row]) -> str:
    sources = _listed(dict.fromkeys(source for row in rows for source in row.sources))
    what = "A decoder that rebuilds" if len(rows) == 1 else f"{len(rows)} decoders that rebuild"
    one = len({model for row in rows for model in row.models}) == 1
    encoder = "a frozen vision encoder" if one else "frozen vision encoders"
    return (
        f"{what} images from the features of {sources}, and from nothing else. What comes back shows what a layer "
        f"keeps of an image. The features are of {encoder} whose weights are not in here. Trained and measured with "
        "afterimage."
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(markdown_code, names))


def _decoders(published: Mapping[str, PublishedDecoder]) -> Iterable[str]:
    if len(published) > 1:
        lines = [
            (markdown_code(name), _listed(one.sources), markdown(one.decoder))
            for name, one in published.items()
        ]
        yield markdown_grid(("decoder", "layers", "family"), lines)


def _data(rows: Sequence[Row]) -> Iterable[str]:
    """Describe each distinct set of images, and the training of each decoder."""
    lines = []
    for data in (row.data for row in rows):
        images = markdown_code(data.source) + (f", test {markdown_code(data.test)}" if data.test else "")
        counts = (f"{count:,}" for count in (data.train, data.validation, data.test_images))
        digests = map(markdown_code, (data.digest, data.test_digest))
        lines.append((images, *counts, f"{data.resize}, cropped to {data.crop}", *digests))
    header = ("images", "training", "validation", "test", "side", "digest", "test digest")
    yield markdown_grid(header, dict.fromkeys(lines))
    yield "The digests are SHA-256 over all images; none of the images is in this repository but those shown above."
    learned = []
    for row in rows:
        if isinstance(row.config, RunConfig) and row.training:
            recipe, facts = row.config.recipe, row.training
            how = "trained elsewhere" if row.is_imported else "closed form"
            if facts.epochs:
                how = f"{facts.epochs} epochs, batches of {recipe.batch_size}, loss {recipe.loss}"
            learned.append(
                f"- {_listed(row.sources)}, {markdown(row.decoder_label)}: {facts.parameters:,} parameters, {how}, "
                f"seed {row.seed}"
            )
    yield "\n".join(learned)


def _encoders(rows: Sequence[Row]) -> Iterable[str]:
    lines = []
    for weights in (weights for row in rows for weights in row.weights):
        digest = f"SHA-256 {markdown_code(weights.sha256)}"
        where = digest if weights.sha256 else markdown(weights.location)
        lines.append(f"- {markdown_code(weights.model)}: {markdown(weights.label)}, {where}")
    yield "\n".join(dict.fromkeys(lines))
    yield "A decoder is refused where its encoder has other weights."


def _licence(license: str) -> str:
    own = f"The decoders: {markdown_code(license)}."
    if license == "unknown":
        own = "Who published these decoders named no licence for them."
    return f"{own} The encoder's weights and the training images keep their own licences; neither is in here."


def with_metadata(metadata: CardData, parts: Iterable[str]) -> str:
    """Write a card: its metadata as YAML, then its parts, each a block of Markdown."""
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
