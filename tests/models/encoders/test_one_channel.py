"""Networks that take one channel: images reach them as their luminance, and decoders rebuild all three channels."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from afterimage.config import AfterimageError
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.providers import open_network
from afterimage.models.encoders.tracing import list_layers
from encoder_checks import assert_same

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def resnet(**attributes):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", in_chans=1).eval()
    for name, value in attributes.items():
        setattr(network, name, value)
    return network


def test_it_computes_what_the_network_does_on_the_luminance():
    network = resnet(mean=0.5, std=0.25)
    encoder = Encoder(network, ["layer1"], image_size=64)
    red, green, blue = IMAGES.unbind(1)
    grey = (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]
    seen = []
    network.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network((grey - 0.5) / 0.25)
    (features,) = encoder(IMAGES)
    assert_same(features, seen[0])
    assert any("takes one channel" in note for note in encoder.notes)
    # As Pillow turns images to grey.
    pixels = IMAGES.mul(255).round().to(torch.uint8)
    pillow = np.asarray(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).convert("L"))
    assert np.abs(pillow - grey[0, 0].numpy() * 255).max() < 2


def test_gradients_reach_all_three_channels():
    encoder = Encoder(resnet(), ["layer2"], image_size=64)
    images = IMAGES.clone().requires_grad_()
    with encoder.gradients():
        encoder(images)[0].square().sum().backward()
    shares = images.grad.abs().sum((0, 2, 3))
    torch.testing.assert_close(shares / shares.sum(), torch.tensor([0.299, 0.587, 0.114]))


def test_a_network_that_takes_three_channels_and_turns_them_to_grey_itself_gets_three():
    class Grey(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 4, 3, 2, 1)

        def forward(self, images):
            return self.conv(images.mean(1, keepdim=True))

    network = Encoder(Grey(), ["conv"], image_size=32).network
    assert network.channels == 3 and not any("one channel" in remark for remark in network.input_notes)


def test_its_mean_and_std_are_one_number():
    with pytest.raises(AfterimageError, match="must be one number each, std"):
        Encoder(resnet(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)), ["layer1"], image_size=64)


def test_a_tower_of_transformers_with_one_channel(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install 'afterimage[transformers]'")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8,
        num_channels=1,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    prepared = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5], "size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(prepared))
    network = open_network(f"transformers/{tmp_path}")
    assert (network.mean, network.std, network.channels) == ((0.5,), (0.5,), 1)
    encoder = Encoder(f"transformers/{tmp_path}:block0", weights="random", image_size=(32, 48))
    assert encoder(torch.rand(2, 3, 32, 48))[0].shape == (2, 32, 4, 6)


FILE = """
import timm

def network():
    return timm.create_model("test_resnet", in_chans=1)
"""


def test_a_decoder_of_its_features_rebuilds_all_channels(tmp_path, monkeypatch, capsys):
    from afterimage.cli import main
    from afterimage.runs.run import scan

    monkeypatch.chdir(tmp_path)
    (tmp_path / "grey.py").write_text(FILE)
    main(["train", "python/grey.py:network:layer1", "--decoders", "linear", "--data", "procedural:8", "--resize", "32",
          "--size", "32", "--device", "cpu", "--cache", str(tmp_path / "cache")])  # fmt: skip
    (run,) = scan("runs")
    assert any("takes one channel" in note for note in run.result.notes)
    assert np.asarray(Image.open(run.images[0][2])).shape == (32, 32, 3)
    layers = list_layers("python/grey.py:network", 32)
    main(["layers", "python/grey.py:network", "--size", "32"])
    out = capsys.readouterr().out
    assert "takes one channel" in out and layers[0].layer in out
