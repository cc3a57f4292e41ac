from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from afterimage.config import (
    AfterimageError,
    DataConfig,
    DecoderConfig,
    FeatureSpec,
    FusionConfig,
    RecipeConfig,
    RunConfig,
)
from afterimage.experiments.queue import train_runs
from afterimage.models.decoders import create_decoder
from afterimage.models.fusion import FUSIONS, create_fusion
from afterimage.models.reconstructor import FeatureDecoder, build_feature_decoder
from afterimage.training.checkpoint import load_reconstructor
from afterimage.training.decoder_trainer import create_optimizer
from fusion_contract import EVEN, PLACED, FusionContract, maps

PUBLISHED = [
    FeatureSpec("resnet34.tv_in1k:layer1", 64, 56, 56),
    FeatureSpec("vgg16.tv_in1k:block1", 64, 112, 112),
    FeatureSpec("vit_small_patch16_224.augreg_in21k_ft_in1k:block1", 384, 14, 14),
    FeatureSpec("pvt_v2_b2.in1k:stage1", 64, 56, 56),
]


class TestAttention(FusionContract):
    name = "attention"


class TestConcat(FusionContract):
    name = "concat"


class TestWeighted(FusionContract):
    name = "weighted"


class TestAligned(FusionContract):
    name = "aligned"


class TestStacked(FusionContract):
    name = "stacked"


class TestSum(FusionContract):
    name = "sum"
    even, placed = ([replace(spec, channels=7) for spec in specs] for specs in (EVEN, PLACED))

    def test_it_is_the_sum_and_has_nothing_to_learn(self):
        specs = [replace(spec, height=9, width=12) for spec in self.even]
        fusion, features = self.build(specs), maps(specs)
        assert torch.equal(fusion(features), features[0] + features[1] + features[2])
        assert not fusion.state_dict() and not fusion.trainable

    def test_a_vector_counts_everywhere(self):
        specs = [FeatureSpec("a:x", 7, 4, 6), FeatureSpec("a:cls", 7, 1, 1)]
        features = maps(specs)
        torch.testing.assert_close(self.build(specs)(features), features[0] + features[1])

    def test_different_channels_are_named(self):
        with pytest.raises(AfterimageError, match=r"a:x is 8x14x14, b:y is 5x28x28, c:z is 16x7x9; .*concat"):
            self.build(EVEN)


def test_every_fusion_has_its_contract():
    assert {cls.name for cls in FusionContract.__subclasses__()} == set(FUSIONS)


def test_aligned_maps_keep_their_values():
    fusion = create_fusion(FusionConfig("aligned"), EVEN)
    features = maps(EVEN)
    fused = fusion(features)
    assert torch.equal(fused[:, 8:13], features[1]) and not list(fusion.parameters())


def test_a_stacked_fusion_gives_each_location_its_own_part_of_a_coarse_map():
    """Red in a fine map, green and blue block by block in a coarse one: together they are the whole image."""
    images = torch.rand(24, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    fine = torch.nn.functional.pixel_unshuffle(images[:, :1], 2)
    coarse = torch.nn.functional.pixel_unshuffle(images[:, 1:], 8)
    specs = [FeatureSpec("fine:x", 4, 8, 8), FeatureSpec("coarse:x", 128, 2, 2)]
    fusion = create_fusion(FusionConfig("stacked"), specs, 16)
    head = FeatureDecoder(create_decoder("linear", [fusion.spec], 16, kernel=1), fusion)
    assert fusion.spec == FeatureSpec("fine:x + coarse:x", 4 + 3 * 2 * 2, 8, 8)
    assert head.closed_forms == [fusion, head.decoder]
    for part in head.closed_forms:
        part.begin_fit(24, seed=0)
        head.partial_fit(part, [fine, coarse], images)
        notes = part.finalize_fit()
        assert ("coarse:x: ridge" in notes[0]) == (part is fusion)
    rebuilt = head([fine, coarse])
    # The coarse map's own decoder has 1,152 inputs and 96 rows, so it is close on the images it was fitted on only.
    torch.testing.assert_close(rebuilt, images, atol=0.02, rtol=0)


def test_the_published_fusion():
    config = RunConfig(
        tuple(s.source for s in PUBLISHED),
        fusion=FusionConfig("attention", 256, 28),
        decoder=DecoderConfig("transposed"),
    )
    with torch.device("meta"):
        head = build_feature_decoder(config, PUBLISHED)
        assert head.fusion.spec == FeatureSpec(" + ".join(config.sources), 256, 28, 28)
        features = [torch.empty(1, s.channels, s.height, s.width) for s in PUBLISHED]
        assert head.eval()(features).shape == (1, 3, 224, 224)


def test_bad_fusions_are_named():
    with pytest.raises(AfterimageError, match="did you mean 'weighted'"):
        create_fusion(FusionConfig("weight"), EVEN)
    with pytest.raises(AfterimageError, match="takes 3 feature maps, got 2"):
        create_fusion(FusionConfig("concat", 4), EVEN)(maps(EVEN)[:2])
    config = RunConfig(("a:x", "b:y"), fusion=FusionConfig("attention"), decoder=DecoderConfig("linear"))
    with pytest.raises(
        AfterimageError, match="'aligned', 'stacked' or 'sum', which have no parameters to train"
    ):
        build_feature_decoder(config, EVEN[:2])


@pytest.mark.parametrize(
    ("name", "decoder"),
    [
        ("attention", "transposed"),
        ("aligned", "linear"),
        ("aligned", "residual"),
        ("sum", "linear"),
        ("sum", "attention"),
        ("stacked", "linear"),
        ("stacked", "transposed"),
    ],
)
def test_a_fused_run_end_to_end(tmp_path, name, decoder):
    third = "test_resnet.r160_in1k:act1" if name == "sum" else "test_vit.r160_in1k:block0"
    second = "conv1" if name == "sum" else "layer2"  # with as many channels as layer1
    config = RunConfig(
        ("test_resnet.r160_in1k:layer1", f"test_resnet.r160_in1k:{second}", third),
        weights="random",
        fusion=FusionConfig(name, 8),
        decoder=DecoderConfig(decoder),
        data=DataConfig("procedural:8", test="procedural:3", resize=64, crop=64),
        recipe=RecipeConfig(epochs=1, batch_size=4),
    )
    (run,) = train_runs(config, tmp_path / "runs", cache=tmp_path / "cache", accelerator="cpu")
    result = run.result
    assert result.fusion.name == name and len(result.features) == 3
    models = ["test_resnet.r160_in1k", *(["test_vit.r160_in1k"] if "vit" in third else [])]
    assert [weights.model for weights in result.weights] == models
    reconstructor = load_reconstructor(run)
    assert reconstructor(torch.rand(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    if name != "attention":
        assert result.fusion_weights == () and not any(run.fusion_maps.values())
        return
    sample_images = [np.asarray(Image.open(original)) for _, original, _ in run.images]
    images = torch.from_numpy(np.stack(sample_images)).permute(0, 3, 1, 2).float() / 255
    weights = reconstructor.feature_decoder.fusion.weights(reconstructor.encoders(images)).detach().numpy()
    stored = [[np.asarray(Image.open(path)) for path in paths] for paths in run.fusion_maps.values()]
    # The originals are stored in 8 bits, so that their features are not quite those that were measured.
    np.testing.assert_allclose(np.array(stored) / 255, weights, atol=0.02)
    np.testing.assert_allclose(result.fusion_weights, weights.mean((0, 2, 3)), atol=0.005)


def test_weight_decay_spares_a_decoder_that_takes_none_and_nothing_else():
    def weight_decays(decoder):
        fusion = create_fusion(FusionConfig("concat", 6), EVEN)
        head = FeatureDecoder(create_decoder(decoder, [fusion.spec], 56, seed=0), fusion)
        groups = create_optimizer(head, RecipeConfig(weight_decay=0.01)).param_groups
        held = {p: group["weight_decay"] for group in groups for p in group["params"]}
        assert set(held) == {p for p in head.parameters() if p.requires_grad}
        own = {held[p] for p in head.decoder.parameters() if p in held}
        return own, {held[p] for p in fusion.parameters()}

    assert weight_decays("residual") == ({0.0}, {0.01})
    assert weight_decays("transposed") == ({0.01}, {0.01})
