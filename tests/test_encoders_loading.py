"""Weights in an encoder: parts of a network, other shapes and sizes, and real ones."""

import hashlib

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_tensor

from afterimage.config import AfterimageError
from afterimage.encoders import Encoder
from afterimage.encoders.tracing import trace

TINY = "test_resnet.r160_in1k"


@pytest.fixture
def whole(tmp_path):
    """A file with all weights of a tiny network, and its state dict."""
    encoder = Encoder(TINY, layers=["layer4"], weights="random", image_size=64, seed=9)
    state = {key.removeprefix("model."): value.clone() for key, value in encoder.state_dict().items()}
    return state


def encode(state, tmp_path, layer="layer2", **options):
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "part.safetensors")
    return Encoder(f"{TINY}:{layer}", weights=tmp_path / "part.safetensors", image_size=64, **options)


def test_a_part_of_the_network_suffices_up_to_its_deepest_layer(whole, tmp_path):
    part = {key: value for key, value in whole.items() if not key.startswith(("layer3", "layer4"))}
    encoder = encode(part, tmp_path)
    assert {k.removeprefix("model.") for k in encoder.state_dict()} == part.keys()
    assert all(torch.equal(encoder.state_dict()[f"model.{key}"], value) for key, value in part.items())
    with pytest.raises(AfterimageError) as error:
        encode(part, tmp_path, "layer4")
    absent = whole.keys() - part.keys()
    assert f"and {len(absent) - 10} more ({len(absent)} in all)" in str(error.value)
    assert sum(key in str(error.value) for key in absent) >= 10
    assert "part.safetensors" in str(error.value)


def test_every_tensor_on_the_used_path_is_insisted_on(whole, tmp_path):
    used = {names[0] for names in trace(TINY, (64, 64)).used([trace(TINY, (64, 64)).tap("layer1")])}
    assert {"conv1.0.weight", "bn1.running_mean", "layer1.0.bn2.bias"} <= used
    for key in used:
        with pytest.raises(AfterimageError, match=rf"lacks {key}, which"):
            encode({k: v for k, v in whole.items() if k != key}, tmp_path, "layer1")


def test_parameters_that_no_module_owns_the_running_of_are_insisted_on():
    used = {
        n
        for names in trace("vit_tiny_patch16_224", (64, 64)).used(
            [trace("vit_tiny_patch16_224", (64, 64)).tap("block1")]
        )
        for n in names
    }
    assert {"pos_embed", "cls_token", "blocks.1.mlp.fc2.bias"} <= used
    assert not any(name.startswith(("blocks.2", "norm", "head")) for name in used)
    for model, layer, parts in (
        ("convnext_tiny", "stages.0", {"stages.0.blocks.0.gamma"}),
        ("swin_tiny_patch4_window7_224", "layers.0", {"layers.0.blocks.0.attn.relative_position_bias_table"}),
    ):
        traced = trace(model, (64, 64))
        assert parts <= {n for names in traced.used([traced.tap(layer)]) for n in names}


def test_weights_of_another_shape_or_that_are_not_finite_are_errors(whole, tmp_path):
    wrong = {**whole, "layer1.0.conv1.weight": torch.zeros(3, 3, 3, 3)}
    with pytest.raises(
        AfterimageError, match=r"layer1.0.conv1.weight is 3x3x3x3 there and \d+x\d+x3x3 in the model"
    ):
        encode(wrong, tmp_path)
    nan = {**whole, "bn1.weight": torch.full_like(whole["bn1.weight"], torch.nan)}
    with pytest.raises(AfterimageError, match=r"not finite, in bn1.weight"):
        encode(nan, tmp_path)
    with pytest.raises(AfterimageError, match=r"lacks|does not fit"):
        Encoder("resnet18:layer1", weights=tmp_path / "part.safetensors")


def test_another_classifier_and_further_keys_do_no_harm(whole, tmp_path):
    encoder = encode({**whole, "fc.weight": torch.zeros(7, 5), "teacher.weight": torch.zeros(1)}, tmp_path)
    assert not any("fc" in key or "teacher" in key for key in encoder.state_dict())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_position_embeddings_are_resampled_as_timm_does(tmp_path):
    for name, layer in (("test_vit.r160_in1k", "block0"), ("swin_tiny_patch4_window7_224", "layers.0")):
        source = Encoder(name, layers=[layer], weights="random", image_size=64)
        state = {k.removeprefix("model."): v.contiguous() for k, v in source.state_dict().items()}
        save_file(state, tmp_path / "x.safetensors")
        encoder = Encoder(name, layers=[layer], weights=tmp_path / "x.safetensors", image_size=96)
        small = timm.create_model(name, img_size=64).state_dict()
        reference = timm.create_model(
            name, pretrained=True, img_size=96, pretrained_cfg_overlay={"state_dict": {**small, **state}}
        ).state_dict()
        for key, value in encoder.state_dict().items():
            torch.testing.assert_close(value, reference[key.removeprefix("model.")])


@pytest.mark.parametrize(
    ("model", "deepest", "beyond"),
    [
        ("resnet18.tv_in1k", "layer3", "layer4"),
        ("vgg19", "block2", "block3"),
        ("vit_tiny_patch16_224", "block11", None),
        ("mobilenetv2_100", "block6", None),
    ],
)
def test_real_weights(weights_folder, monkeypatch, model, deepest, beyond):
    monkeypatch.setenv("AFTERIMAGE_WEIGHTS", str(weights_folder))
    encoder = Encoder(model, layers=[deepest], image_size=96)
    assert (encoder.weights.origin, encoder.weights.label) == ("folder", "pretrained")
    file = load_file(encoder.weights.file)
    assert encoder.weights.sha256 == hashlib.sha256(encoder.weights.file.read_bytes()).hexdigest()
    for key, value in encoder.state_dict().items():
        if key != "model.pos_embed":
            assert torch.equal(value, file[key.removeprefix("model.")])
    if beyond:
        with pytest.raises(AfterimageError, match=f"{encoder.weights.file.name} lacks"):
            Encoder(model, layers=[beyond], image_size=96)


def test_gatys_weights_have_unit_mean_activations_on_photographs(weights_folder, photos_folder):
    """Their activations were scaled to a mean of 1 over ImageNet: any other mean, std or range misses that."""
    paths = sorted((photos_folder / "test").iterdir())[:12]
    pictures = [Image.open(p).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for p in paths]
    images = torch.stack([to_tensor(picture) for picture in pictures])
    for features in Encoder("vgg19", layers=["features.1", "features.6"], weights=weights_folder)(images):
        assert features.mean() == pytest.approx(1, abs=0.1)
