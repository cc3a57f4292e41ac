import pytest
import torch

from afterimage.config import (
    AfterimageError,
    DataConfig,
    DecoderConfig,
    FeatureSpec,
    FusionConfig,
    RecipeConfig,
    RunConfig,
)
from afterimage.fusion import FUSIONS, create_fusion
from afterimage.jobs import train_runs
from afterimage.reconstructor import Reconstructor, build_head

SPECS = [FeatureSpec("a:x", 8, 14, 14), FeatureSpec("b:y", 5, 28, 28), FeatureSpec("c:z", 16, 7, 9)]
PUBLISHED = [
    FeatureSpec("resnet34.tv_in1k:layer1", 64, 56, 56),
    FeatureSpec("vgg16.tv_in1k:block1", 64, 112, 112),
    FeatureSpec("vit_small_patch16_224.augreg_in21k_ft_in1k:block1", 384, 14, 14),
    FeatureSpec("pvt_v2_b2.in1k:stage1", 64, 56, 56),
]


def maps(specs, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, s.channels, s.height, s.width, generator=generator) for s in specs]


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("size", [None, 10])
def test_several_maps_become_one(name, size):
    fusion = create_fusion(FusionConfig(name, 6, size), SPECS)
    fused = fusion(maps(SPECS))
    assert fused.shape == (2, fusion.spec.channels, *((28, 28) if size is None else (10, 10)))
    assert fusion.spec.source == "a:x + b:y + c:z"


@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_of_one_source_is_that_source(name):
    assert create_fusion(FusionConfig(name), SPECS[:1]) is None


@pytest.mark.parametrize("name", ["attention", "weighted"])
def test_weights_are_a_distribution_over_sources(name):
    fusion = create_fusion(FusionConfig(name, 6), SPECS).eval()
    weights = fusion.weights(maps(SPECS))
    assert weights.shape == (2, 3, 28, 28) and weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 28, 28))


@pytest.mark.parametrize("name", ["attention", "weighted"])
def test_a_fusion_is_the_weighted_sum_of_projected_maps(name):
    fusion = create_fusion(FusionConfig(name, 6), SPECS).eval()
    features = maps(SPECS)
    projected = torch.stack(fusion.project(features), dim=1)
    expected = (fusion.weights(features)[:, :, None] * projected).sum(1)
    torch.testing.assert_close(fusion(features), expected)


def test_aligned_maps_keep_their_values():
    fusion = create_fusion(FusionConfig("aligned"), SPECS)
    features = maps(SPECS)
    fused = fusion(features)
    assert torch.equal(fused[:, 8:13], features[1]) and not list(fusion.parameters())


def test_the_published_fusion():
    config = RunConfig(
        tuple(s.source for s in PUBLISHED),
        fusion=FusionConfig("attention", 256, 28),
        decoder=DecoderConfig("transposed"),
    )
    with torch.device("meta"):
        head = build_head(config, PUBLISHED)
        assert head.fusion.spec == FeatureSpec(" + ".join(config.sources), 256, 28, 28)
        features = [torch.empty(1, s.channels, s.height, s.width) for s in PUBLISHED]
        assert head.eval()(features).shape == (1, 3, 224, 224)


def test_bad_fusions_are_named():
    with pytest.raises(AfterimageError, match="did you mean 'weighted'"):
        create_fusion(FusionConfig("weight"), SPECS)
    with pytest.raises(AfterimageError, match="takes 3 feature maps, got 2"):
        create_fusion(FusionConfig("concat", 4), SPECS)(maps(SPECS)[:2])
    config = RunConfig(("a:x", "b:y"), fusion=FusionConfig("attention"), decoder=DecoderConfig("linear"))
    with pytest.raises(AfterimageError, match="'aligned', which has nothing to learn"):
        build_head(config, SPECS[:2])


@pytest.mark.parametrize(
    ("name", "decoder"), [("attention", "transposed"), ("aligned", "linear"), ("aligned", "residual")]
)
def test_a_fused_run_end_to_end(tmp_path, name, decoder):
    config = RunConfig(
        ("test_resnet.r160_in1k:layer1", "test_resnet.r160_in1k:layer2", "test_vit.r160_in1k:block0"),
        weights="random",
        fusion=FusionConfig(name, 8),
        decoder=DecoderConfig(decoder),
        data=DataConfig("procedural:8", test="procedural:3", resize=64, crop=64),
        recipe=RecipeConfig(epochs=1, batch_size=4),
    )
    (run,) = train_runs(config, tmp_path / "runs", cache=tmp_path / "cache", accelerator="cpu")
    summary = run.summary
    assert summary["fusion"]["name"] == name and len(summary["features"]) == 3
    assert [w["model"] for w in summary["weights"]] == ["test_resnet.r160_in1k", "test_vit.r160_in1k"]
    assert Reconstructor.open(run)(torch.rand(1, 3, 64, 64)).shape == (1, 3, 64, 64)
