"""The encoders of the studies `modern` and `atlas`: names, sizes, prefix tokens and normalisation, against timm."""

from dataclasses import replace

import pytest
import timm
import torch

from afterimage.config import split_source
from afterimage.config.study import load_study
from afterimage.experiments.study import expand_study
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.providers import open_network
from afterimage.models.encoders.tracing import trace
from encoder_checks import assert_same

STUDIES = ("modern", "modern_256", "modern_518")
FAMILIES = (
    "dinov2", "dinov3", "siglip", "clip", "mae", "eva02", "swin", "convnext", "efficientnet", "mobilenet", "coatnet",
)  # fmt: skip
pytestmark = pytest.mark.long  # thirty networks at the sizes of their pretraining

# The smallest model of each family with weights, its first layer, and its patch size or reduction there.
SMALLEST = {
    "vit_small_patch14_dinov2.lvd142m": ("block0", 14),
    "vit_small_patch14_reg4_dinov2.lvd142m": ("block0", 14),
    "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m": ("block0", 16),
    "vit_base_patch32_siglip_256.v2_webli": ("block0", 32),
    "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m": ("block0", 16),
    "vit_base_patch16_224.mae": ("block0", 16),
    "eva02_tiny_patch14_224.mim_in22k": ("block0", 14),
    "swin_tiny_patch4_window7_224.ms_in1k": ("layers.1", 8),
    "swinv2_tiny_window8_256.ms_in1k": ("layers.1", 8),
    "convnext_atto.d2_in1k": ("stages.1", 8),
    "efficientnet_b0.ra_in1k": ("block1", 4),
    "mobilenetv3_small_050.lamb_in1k": ("block1", 8),
    "coatnet_nano_rw_224.sw_in1k": ("stages.1", 8),
}
PREFIX = {"reg4_dinov2": 5, "dinov2": 1, "dinov3": 5, "siglip": 0, "clip": 1, "mae": 1, "eva02": 1}


def native_size(model):
    return timm.get_pretrained_cfg(model).input_size[-1]


@pytest.fixture(scope="module", params=STUDIES)
def configs(request):
    return expand_study(load_study(request.param))


def test_every_model_has_weights_and_its_native_size(configs):
    known = set(timm.list_pretrained())
    models = {split_source(source)[0] for config in configs for source in config.sources}
    assert models <= known
    assert {native_size(model) for model in models} == {config.data.crop for config in configs}
    assert all(open_network(model).name == model for model in models)


def test_one_row_fuses_all_layers_of_one_encoder(configs):
    (fused,) = [config for config in configs if config.fusion is not None]
    assert len({split_source(source)[0] for source in fused.sources}) == 1
    assert [split_source(source)[1] for source in fused.sources] == [f"block{i}" for i in range(12)]


def test_the_atlas_has_every_stage_or_block_of_encoders_with_weights_the_small_and_famous_first():
    sources = load_study("atlas").sources
    failures = []
    rows = {
        source: expand_study(replace(load_study("atlas"), sources=(source,)), failures=failures)
        for source in sources
    }
    assert not failures and all(len(found) >= 3 for found in rows.values())
    models = [split_source(source)[0] for source in sources]
    assert len(set(models)) == len(models) and set(models) <= set(timm.list_pretrained())
    assert models[:2] == ["resnet18.tv_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"]


def test_the_studies_cover_the_families():
    sources = {s for name in STUDIES for config in expand_study(load_study(name)) for s in config.sources}
    models = {split_source(source)[0] for source in sources}
    assert not [family for family in FAMILIES if not any(family in model for model in models)]


@pytest.mark.parametrize("model", SMALLEST)
def test_features_are_timms_own(model):
    """At the native size, with the model's own mean and std, without its prefix tokens."""
    layer, reduction = SMALLEST[model]
    size = native_size(model)
    encoder = Encoder(model, [layer], weights="random", image_size=size, seed=3)
    config = timm.get_pretrained_cfg(model)
    assert encoder.mean.flatten().tolist() == pytest.approx(config.mean)
    assert encoder.std.flatten().tolist() == pytest.approx(config.std)
    (spec,) = encoder.specs
    assert (spec.height, spec.width) == (size // reduction,) * 2

    whole = trace(open_network(model), (size, size)).create_random(3)
    prefix = getattr(whole, "num_prefix_tokens", 0)
    expected = [count for family, count in PREFIX.items() if family in model]
    if expected:
        assert prefix == encoder._layers[0].layout.prefix == expected[0]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    (features,) = encoder(images)
    mean, std = (torch.tensor(getattr(config, name)).view(1, 3, 1, 1) for name in ("mean", "std"))
    options = {"indices": [0], "stop_early": True} if layer == "block0" else {}
    with torch.no_grad():
        theirs = whole.forward_intermediates(
            (images - mean) / std, norm=False, output_fmt="NCHW", intermediates_only=True, **options
        )
    (same,) = [maps for maps in theirs if maps.shape == features.shape]
    assert_same(features, same)
