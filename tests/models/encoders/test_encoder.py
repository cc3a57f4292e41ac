import copy
import math
import pickle

import pytest
import timm
import torch
import torchvision
from jaxtyping import TypeCheckError
from torch import nn

from afterimage.config import AfterimageError
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.providers import open_network, resolve_source
from afterimage.models.encoders.providers.base import seeded
from afterimage.models.encoders.tracing import list_layers, trace
from encoder_checks import assert_same, randomise_statistics

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)

STUDY_SHAPES = {
    "vgg16.tv_in1k": {
        "block1": (64, 112, 112),
        "block2": (128, 56, 56),
        "block3": (256, 28, 28),
        "block4": (512, 14, 14),
        "block5": (512, 7, 7),
    },
    "resnet34.tv_in1k": {
        "layer1": (64, 56, 56),
        "layer2": (128, 28, 28),
        "layer3": (256, 14, 14),
        "layer4": (512, 7, 7),
    },
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": {f"block{i}": (768, 14, 14) for i in range(12)},
    "vit_small_patch16_224.augreg_in21k_ft_in1k": {"block1": (384, 14, 14)},
    "pvt_v2_b2.in1k": {
        "stage1": (64, 56, 56),
        "stage2": (128, 28, 28),
        "stage3": (320, 14, 14),
        "stage4": (512, 7, 7),
    },
}


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model", STUDY_SHAPES)
def test_the_studys_layers_have_the_studys_names_and_shapes(model):
    listed = {layer.layer: layer.shape for layer in list_layers(model)}
    assert STUDY_SHAPES[model].items() <= listed.items()


@pytest.mark.parametrize(("name", "ends"), [("vgg16", (5, 10, 17, 24, 31)), ("vgg11_bn", (4, 8, 15, 22, 29))])
def test_vgg_blocks_equal_torchvisions_pooled_features(name, ends, images, tmp_path):
    reference = randomise_statistics(getattr(torchvision.models, name)(weights=None))
    path = tmp_path / "torchvision.pth"
    torch.save({k: v for k, v in reference.state_dict().items() if k.startswith("features.")}, path)
    encoder = Encoder(name, layers=[f"block{n}" for n in range(1, 6)], weights=path, image_size=64)
    with torch.no_grad():
        for end, features in zip(ends, encoder(images), strict=True):
            assert_same(features, reference.features[:end]((images - MEAN) / STD))


def test_resnet34_layers_equal_torchvisions(images, tmp_path):
    reference = randomise_statistics(torchvision.models.resnet34(weights=None))
    torch.save(reference.state_dict(), tmp_path / "resnet34.pth")
    encoder = Encoder(
        "resnet34.tv_in1k", layers=["layer1", "layer2", "layer3", "layer4"], weights=tmp_path, image_size=64
    )
    with torch.no_grad():
        r = reference
        x = r.maxpool(r.relu(r.bn1(r.conv1((images - MEAN) / STD))))
        for stage, features in zip((r.layer1, r.layer2, r.layer3, r.layer4), encoder(images), strict=True):
            x = stage(x)
            assert_same(features, x)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"]
)
def test_vit_tokens_equal_timms_own_block_outputs(name):
    size = 56 if "patch14" in name else 64
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    encoder = Encoder(name, layers=["block0", "block5", "block11"], weights="random", image_size=size)
    reference = trace(encoder.network, (size, size)).create_random(0)
    with torch.no_grad():
        expected = reference.forward_intermediates(
            (images - encoder.mean) / encoder.std, indices=[0, 5, 11], norm=False, intermediates_only=True
        )
    for features, tokens in zip(encoder(images), expected, strict=True):
        assert_same(features, tokens)


def test_mean_and_std_are_the_models_own():
    for name, mean, std in (("vit_tiny_patch16_224", 0.5, 0.5), ("resnet18", 0.485, 0.229)):
        layer = "patch_embed" if "vit" in name else "layer1"
        encoder = Encoder(name, layers=[layer], weights="random-init", image_size=64)
        assert encoder.mean.flatten()[0] == pytest.approx(mean)
        assert encoder.std.flatten()[0] == pytest.approx(std)


def test_several_layers_come_in_the_order_asked_for_and_equal_each_alone(images):
    # Later in the same pass the activation overwrites bn1, and the addition layer1.0.bn2, in place.
    layers = ["layer2", "layer1.0.bn2", "bn1", "layer1", "layer1"]
    together = Encoder("resnet18", layers=layers, weights="random", image_size=64)
    for layer, features in zip(layers, together(images), strict=True):
        (alone,) = Encoder(f"resnet18:{layer}", weights="random", image_size=64)(images)
        torch.testing.assert_close(features, alone, rtol=0, atol=0)


def test_the_network_runs_no_deeper_than_the_deepest_layer(images):
    encoder = Encoder("resnet18:layer1", weights="random", image_size=64)

    def fail(*_):
        raise AssertionError("ran too far")

    encoder.model.layer2.register_forward_pre_hook(fail)
    encoder(images)
    assert not any(key.startswith(("model.layer2", "model.fc")) for key in encoder.state_dict())
    assert sum(p.numel() for p in encoder.parameters()) == encoder.describe()[0].encoder_parameters == 157_504


def test_training_leaves_the_state_bit_identical_and_without_gradients(images):
    encoder = Encoder("resnet18:layer2", weights="random", image_size=64)
    decoder = nn.Conv2d(128, 3, 1)
    whole = nn.ModuleList([encoder, decoder]).train()
    before = copy.deepcopy(encoder.state_dict())
    optimiser = torch.optim.Adam([p for p in whole.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        decoder(encoder(images)[0]).square().mean().backward()
        optimiser.step()
    assert not any(module.training for module in encoder.modules())
    assert decoder.training
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    assert before.keys() == encoder.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize("source", ["resnet18:layer1", "vgg11:block2", "vit_tiny_patch16_224:block3"])
def test_inversion_can_differentiate_through_the_encoder(source, images):
    encoder = Encoder(source, weights="random-init", image_size=64)
    images.requires_grad_()
    assert not encoder(images)[0].requires_grad
    with encoder.gradients():
        encoder(images)[0].square().sum().backward()
    assert images.grad.abs().sum() > 0
    assert not encoder(images)[0].requires_grad
    assert all(p.grad is None for p in encoder.parameters())


def test_images_are_left_as_they_are(images):
    before = images.clone()
    Encoder("resnet18:act1", weights="random", image_size=64)(images)
    assert torch.equal(images, before)


def test_every_block_of_a_random_resnet_acts(images):
    """timm starts the last norm of each block at zero: then no weight of any `conv2` is ever heard of."""
    layers = ["layer1", "layer2", "layer3", "layer4"]
    for weights, heard in (("random", True), ("random-init", False)):
        encoder = Encoder("resnet18", layers=layers, weights=weights, image_size=64)
        before = encoder(images)
        for name, parameter in encoder.model.named_parameters():
            if name.endswith("conv2.weight"):
                parameter.zero_()
        for layer, old, new in zip(layers, before, encoder(images), strict=True):
            assert ((new - old).norm() / old.norm() > 0.1) == heard and heard != torch.equal(old, new), layer


def test_random_init_is_timms_own_and_random_the_same_draw_with_open_branches():
    with seeded(3):
        timms = timm.create_model("convnext_atto").state_dict()
    left = trace(open_network("convnext_atto"), (64, 64)).create_random(3, "random-init").state_dict()
    opened = trace(open_network("convnext_atto"), (64, 64)).create_random(3).state_dict()
    assert all(torch.equal(left[key], timms[key]) for key in timms)
    for key, value in timms.items():
        if key.endswith(".gamma"):  # LayerScale
            assert value.unique().item() == pytest.approx(1e-6) and torch.equal(
                opened[key], torch.ones_like(value)
            )
        elif not torch.equal(opened[key], value):  # drawn at 0.02 for few inputs
            scale = (opened[key] / value).nanmedian()
            torch.testing.assert_close(opened[key], value * scale)
            gain = opened[key].square().mean().sqrt() * math.sqrt(opened[key][0].numel())
            assert scale > 5 and gain.item() == pytest.approx(1, abs=1e-5), key
    same = (
        "stages.0.blocks.0.norm.weight",
        "stages.0.blocks.0.norm.bias",
        "stages.3.blocks.0.mlp.fc1.weight",
    )
    assert all(torch.equal(opened[key], timms[key]) for key in same)


def test_random_weights_depend_on_the_seed_alone(images):
    state = torch.get_rng_state()
    first = Encoder("resnet18:layer1", weights="random", image_size=64, seed=3)
    deeper = Encoder("resnet18", layers=["layer1", "layer3"], weights="random", image_size=64, seed=3)
    other = Encoder("resnet18:layer1", weights="random", image_size=64, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(images)[0], deeper(images)[0])
    assert not torch.equal(first(images)[0], other(images)[0])
    assert (first.weights.label, first.weights.location, first.weights.sha256) == ("random", "seed 3", "")


@pytest.mark.parametrize(
    ("source", "size", "shape"),
    [
        ("vit_tiny_patch16_224:block1", (64, 96), (192, 4, 6)),
        ("swin_tiny_patch4_window7_224:layers.1", (64, 128), (192, 8, 16)),
        ("resnet18:layer2", (65, 99), (128, 9, 13)),
        ("pvt_v2_b0:stage2", (64, 96), (64, 8, 12)),
        # As many channels as rows and columns: only a second size can tell which axes are which.
        ("resnet18:layer1", 256, (64, 64, 64)),
        pytest.param("swin_tiny_patch4_window7_224:layers.0", 384, (96, 96, 96), marks=pytest.mark.long),
    ],
)
def test_non_square_and_odd_images(source, size, shape):
    encoder = Encoder(source, weights="random-init", image_size=size)
    assert encoder(torch.rand(1, 3, *encoder.image_size))[0].shape[1:] == shape


def test_copies_and_pickles_work_by_themselves(images):
    for source in ("resnet18:layer1", "hiera_tiny_224:block0"):
        encoder = Encoder(source, weights="random-init", image_size=64)
        for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
            torch.testing.assert_close(other(images)[0], encoder(images)[0])
            assert encoder._features == other._features == [None]


def test_describe_and_list_layers_agree_with_what_is_known():
    layers = {layer.layer: layer for layer in list_layers("resnet34")}
    assert list(layers) == ["act1", "layer1", "layer2", "layer3", "layer4"]
    layer = layers["layer1"]
    assert (layer.reduction, layer.locations) == (4, 3136)
    assert layer.encoder_parameters == 9_408 + 128 + 3 * (2 * 36_864 + 2 * 128)
    assert layer.encoder_macs == 112 * 112 * 9_408 + 3 * 2 * 56 * 56 * 36_864
    assert [layers[name].order for name in layers] == sorted(layer.order for layer in layers.values())
    (described,) = Encoder("resnet34:layer1", weights="random").describe()
    assert described.source == "resnet34.a1_in1k:layer1"
    assert described == layer


def test_whole_networks_cost_what_their_papers_say():
    for model, layer, gmacs in (("resnet50", "layer4", 4.09), ("vit_base_patch16_224", "block11", 17.56)):
        (last,) = (found for found in list_layers(model) if found.layer == layer)
        assert last.encoder_macs / 1e9 == pytest.approx(gmacs, rel=0.01)


def test_every_module_is_listed_on_request():
    few, every = list_layers("vgg16"), list_layers("vgg16", all_modules=True)
    assert [layer.layer for layer in few] == ["block1", "block2", "block3", "block4", "block5"]
    assert [layer.module for layer in every] == [*(f"features.{i}" for i in range(31)), "features"]
    assert set(few) < set(every)


def test_the_tag_is_pinned_and_the_layers_word_kept():
    assert resolve_source("vgg16:block1") == "vgg16.tv_in1k:block1"
    assert resolve_source("resnet34.tv_in1k:layer1") == "resnet34.tv_in1k:layer1"
    assert (
        resolve_source("vit_base_patch16_224:blocks.5")
        == "vit_base_patch16_224.augreg2_in21k_ft_in1k:blocks.5"
    )
    assert Encoder("vgg11:block1", weights="random").sources == ("vgg11.tv_in1k:block1",)


@pytest.mark.parametrize(
    ("source", "size", "message"),
    [
        ("resnet43:layer1", 224, "unknown model 'resnet43'; did you mean 'resnet34'"),
        ("vit_base:block1", 224, "did you mean .*vit_base_"),
        ("resnet34.tv:layer1", 224, "unknown weights' tag 'resnet34.tv'; did you mean 'resnet34.tv_in1k'"),
        ("resnet34", 224, "'resnet34' names no layer"),
        ("resnet18:layer5", 64, "unknown layer of resnet18.* 'layer5'; did you mean 'layer4'.*act1, layer1"),
        ("vgg16:block6", 64, "unknown layer of vgg16.tv_in1k 'block6'; did you mean 'block5'"),
        ("vit_tiny_patch16_224:block12", 64, "did you mean 'block2'"),
        ("swin_tiny_patch4_window7_224:layers.0.blocks.0.attn", 64, "first axis is not the batch"),
        ("vit_tiny_patch16_224:blocks.0.attn.q_norm", 64, "no axes of it grow"),
        ("convit_tiny:blocks.0.attn.attn_drop", 64, "no axes of it grow"),
        ("hrnet_w18_small:stage2.0", 64, "returns 2 feature maps"),
        ("hiera_tiny_224:blocks.0.mlp", 64, "not in raster order"),
        ("resnet18:layer1.0.drop_path", 64, "unknown layer|does not run"),
        ("xcit_nano_12_p8_224:pos_embed", 64, "nothing that depends on the image"),
        ("vit_tiny_patch16_224:block0", 8, "cannot run on 8x8 images .*it can on 224x224"),
        ("crossvit_tiny_240:blocks.0.blocks.0", 224, "cannot run on 224x224 images.*it can on 240x240"),
        ("resnet18:layer1", 0, "image_size must be"),
    ],
)
def test_what_cannot_be_done_says_why(source, size, message):
    with pytest.raises(AfterimageError, match=message):
        Encoder(source, weights="random", image_size=size)


def test_wrong_images_are_errors(images):
    encoder = Encoder("resnet18:layer1", weights="random", image_size=64)
    for wrong in (images[:, :1], images[0], images[..., :63], (images * 255).byte()):
        with pytest.raises((AfterimageError, TypeCheckError), match=r"\(B, 3, 64, 64\) of floats|Type-check"):
            encoder(wrong)
    with pytest.raises(AfterimageError, match="layers must be a list"):
        Encoder("resnet18", layers="layer1", weights="random")
