"""The published figures and what their pipeline could reach."""

import numpy as np
import pytest
from PIL import Image

from afterimage.config import DecoderConfig, FusionConfig
from afterimage.report.published import (
    FUSION,
    MEAN,
    PUBLISHED,
    STD,
    find_published,
    pair_with_published,
    published_ceiling,
    why_they_differ,
)
from afterimage.report.rows import Row
from afterimage.runs.files import write_json
from simulated_runs import shift
from simulated_study import LAYERS_OF_FUSION, scores, write_run

SOURCE = "vgg16.tv_in1k:block1"


def sample_image(seed=0, size=16):
    return np.random.default_rng(seed).random((3, size, size))


def test_table_is_the_studys():
    assert len(PUBLISHED) == 15
    assert find_published(["resnet34.tv_in1k:layer1"], "attention").psnr == (14.32, 0.94)
    assert max(PUBLISHED[:-1], key=lambda row: row.psnr[0]).sources == (SOURCE,)
    assert [row.parameters for row in PUBLISHED[:9]] == [
        *(250_147, 974_563, 3_865_187, 15_413_603),
        *(233_667, 958_083, 3_848_707, 15_397_123, 15_413_603),
    ]


def test_other_decoders_models_and_layers_have_no_counterpart():
    assert find_published([SOURCE], "linear") is None
    assert find_published(["vgg16.tv_in1k:features.5"], "attention") is None
    assert find_published(["vgg16.other:block1"], "attention") is None
    assert find_published(FUSION.sources[::-1], "transposed") is FUSION
    assert find_published(FUSION.sources[:3], "transposed") is None


def test_ceiling_is_what_the_nearest_reachable_image_scores():
    x = sample_image()
    mean, std = MEAN[:, None, None], STD[:, None, None]
    target = (x - mean) / std
    answer = target.clip(0, 1) * std + mean
    expected = 10 * np.log10(1 / ((answer - x) ** 2).mean())
    ceiling = published_ceiling([x])
    assert ceiling.psnr == pytest.approx(expected) and ceiling.count == 1
    assert ceiling.unreachable == pytest.approx(((target < 0) | (target > 1)).mean())


def test_no_answer_of_a_sigmoid_scores_above_the_ceiling():
    x, random = sample_image(), np.random.default_rng(1)
    ceiling = published_ceiling([x]).psnr
    for spread in (0.1, 1.0, 10.0):
        logits = spread * ((x - MEAN[:, None, None]) / STD[:, None, None] - 0.5) + random.normal(
            0, 0.1, x.shape
        )
        answer = 1 / (1 + np.exp(-logits)) * STD[:, None, None] + MEAN[:, None, None]
        assert -10 * np.log10(((answer - x) ** 2).mean()) < ceiling


def test_ceiling_by_hand():
    """Black: nearest reachable is the mean colour. White: mean + std."""
    black, white = np.zeros((3, 4, 4)), np.ones((3, 4, 4))
    assert published_ceiling([black]).psnr == pytest.approx(-10 * np.log10((MEAN**2).mean()))
    assert published_ceiling([white]).psnr == pytest.approx(-10 * np.log10(((1 - MEAN - STD) ** 2).mean()))
    assert published_ceiling([black, white]).unreachable == 1
    within = np.broadcast_to((MEAN + STD / 2)[:, None, None], (3, 4, 4))
    assert published_ceiling([within]).unreachable == 0 and published_ceiling([within]).psnr == 100


def test_ceiling_on_photographs_is_about_what_the_published_table_shows(photos_folder):
    def crop(path):
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
        left, top = (image.width - 224) // 2, (image.height - 224) // 2
        return np.asarray(image.crop((left, top, left + 224, top + 224))).transpose(2, 0, 1) / 255

    ceiling = published_ceiling(crop(path) for path in sorted((photos_folder / "test").iterdir()))
    assert 13.9 < ceiling.psnr < 15.0
    assert 0.7 < ceiling.unreachable < 0.85


def keep(run, *seeds):
    """Keep images in a run folder, as training does."""
    index = []
    for seed in seeds:
        name = f"image-{seed:03d}"
        path = run.file(f"reconstructions/{name}.original.png")
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((sample_image(seed) * 255).astype(np.uint8).transpose(1, 2, 0)).save(path)
        index.append({"id": name, "original": path.name, "reconstruction": path.name})
    write_json(run.file("reconstructions/index.json"), index)
    return run


def with_mean(run, psnr):
    return shift(run, psnr=psnr)


def beside(runs):
    return pair_with_published([Row.from_run(run) for run in runs])


def test_rows_stand_beside_their_published_counterparts(tmp_path):
    ours = keep(with_mean(write_run(tmp_path, SOURCE, scores(29)), 29.0), 3, 1)
    random = with_mean(write_run(tmp_path, SOURCE, scores(20), weights="random-init"), 20.0)
    resized = with_mean(write_run(tmp_path, SOURCE, scores(20), parameters=4_000_000, seed=1), 20.0)
    linear = with_mean(write_run(tmp_path, SOURCE, scores(20), decoder=DecoderConfig("linear")), 20.0)
    ((theirs, own, ceiling, why),) = beside([ours, random, resized, linear])
    assert theirs.psnr == (14.45, 2.27) and own["psnr"] == pytest.approx(29) and ceiling.count == 2
    assert f"would have scored {ceiling.psnr:.2f} dB" in why and "Ours scores more on them" in why


def test_explanation_without_images_or_below_the_ceiling():
    row = find_published([SOURCE], "attention")
    ceiling = published_ceiling([sample_image()])
    assert "not known" in why_they_differ(row, None, None)
    assert "alone does not explain" in why_they_differ(row, 5.0, ceiling)
    assert "Ours" not in why_they_differ(row, None, ceiling)


def test_the_ceiling_is_compared_with_our_scores_of_the_same_images(tmp_path):
    rows = [
        score | {"psnr": 5.0 if score["id"] in ("image-001", "image-003") else 30.0} for score in scores(29)
    ]
    ((*_, ceiling, why),) = beside([keep(with_mean(write_run(tmp_path, SOURCE, rows), 29.5), 3, 1)])
    assert 5 < ceiling.psnr < 29.5 and "does not score more on them" in why


@pytest.mark.parametrize(("size", "found"), [(28, 1), (None, 0)])
def test_only_the_published_fusion_is_the_published_fusion(tmp_path, size, found):
    run = write_run(
        tmp_path,
        LAYERS_OF_FUSION,
        scores(20),
        decoder=DecoderConfig("transposed"),
        fusion=FusionConfig(size=size),
    )
    repeated = beside([with_mean(run, 20.0)])
    assert len(repeated) == found
    assert all(theirs is FUSION and "not known" in why for theirs, _, _, why in repeated)


def test_what_is_inferred_of_the_published_fusion_is_called_an_inference():
    random, within = published_ceiling([sample_image()]), published_ceiling([np.full((3, 4, 4), 0.5)])
    assert random.psnr < FUSION.psnr[0] < within.psnr
    assert "are above that: an inference is" in why_they_differ(FUSION, 20.0, random)
    assert "inference" not in why_they_differ(FUSION, 20.0, within)
