"""Anyone's own encoder: odd outputs, odd layers, hostile behaviour."""

import sys
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from afterimage.analysis.audit.task_utility import CostUnavailable, whole_network
from afterimage.config import AfterimageError
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.providers import open_network
from afterimage.models.encoders.providers.python import CustomNetwork
from afterimage.models.encoders.tracing import Trace, list_layers
from afterimage.models.reconstructor import MultiEncoder

SIZE = 32


class Net(nn.Module):
    """A small network whose output is shaped by `wrap`."""

    def __init__(self, wrap=lambda maps: maps):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())
        self.norm = nn.BatchNorm2d(8)
        self.wrap = wrap

    def forward(self, images):
        return self.wrap(self.norm(self.stem(images)))


class Named(NamedTuple):
    maps: torch.Tensor
    pooled: torch.Tensor


def images(count=3):
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def tokens(maps):
    sequence = maps.flatten(2).transpose(1, 2)
    return torch.cat([sequence.mean(1, keepdim=True), sequence], 1)


SHAPES = {
    "a map": (lambda m: m, "output"),
    "NHWC": (lambda m: m.permute(0, 2, 3, 1), "output"),
    "tokens with a class token": (tokens, "output"),
    "channels first tokens": (lambda m: m.flatten(2), "output"),
    "a dict": (lambda m: {"maps": m}, "output"),
    "a dict of several": (lambda m: {"maps": m, "half": m[:, :4]}, "output[maps]"),
    "an ordered dict, nested": (lambda m: OrderedDict(out={"x": m, "y": m[:, :2]}), "output[out][x]"),
    "a tuple with a vector": (lambda m: (m, m.mean((2, 3))), "output[0]"),
    "a tuple, unambiguous": (lambda m: (m, m.mean((2, 3))), "output"),
    "a named tuple": (lambda m: Named(m, m.mean((2, 3))), "output"),
    "a list": (lambda m: [m], "output[0]"),
    "an inner module": (lambda m: m.mean((2, 3)), "norm"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_whatever_a_network_returns_becomes_one_map(case):
    wrap, layer = SHAPES[case]
    network = Net(wrap).eval()
    encoder = Encoder(network, [layer], image_size=SIZE)
    expected = network.norm(network.stem(images()))
    (features,) = encoder(images())
    torch.testing.assert_close(features, expected)
    assert (encoder.specs[0].channels, encoder.specs[0].height) == (8, 8)
    assert encoder.sources == (f"own:{layer}",) and len(encoder.notes) == 1


@pytest.mark.parametrize("case", SHAPES)
def test_a_layers_output_can_be_replaced_whatever_it_is(case):
    wrap, layer = SHAPES[case]

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net(wrap)
            self.head = nn.Linear(8, 5)

        def forward(self, sample_images):
            found = self.body(sample_images)
            while not isinstance(found, torch.Tensor):
                found = next(iter(found.values())) if isinstance(found, dict) else found[0]
            flat = found.flatten(2) if found.ndim > 2 else found[:, :, None]
            return self.head(flat.mean(2 if flat.shape[1] == 8 else 1))

    path = layer.replace("output", "body") if "output" in layer else f"body.{layer}"
    network = whole_network(Encoder(Whole(), [path], image_size=SIZE))
    plain = network(images())
    torch.testing.assert_close(network(images(), lambda maps: maps), plain)
    changed = network(images(), lambda maps: maps * 3)
    assert changed.shape == (3, 5) and not torch.allclose(changed, plain)
    assert not network.has_bypass(images())


def test_a_vector_is_a_map_of_one_place():
    encoder = Encoder(Net(lambda m: m.mean((2, 3))), ["output"], image_size=SIZE)
    assert encoder(images())[0].shape == (3, 8, 1, 1)


def test_the_weights_of_an_attention_that_pools_are_not_listed():
    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
            self.probe = nn.Parameter(torch.zeros(1, 1, 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, sample_images):
            tokens = self.second(self.first(sample_images)).flatten(2).transpose(1, 2)
            return self.attention(self.probe.expand(len(tokens), -1, -1), tokens, tokens)[0][:, 0]

    traced = Trace(CustomNetwork.of(Pooling()), (SIZE, SIZE))
    assert traced.names == ["first", "second"]
    assert traced.layer("attention").layout.channels == 1  # who names it gets it


def test_images_are_normalised_only_when_asked():
    given = Encoder(nn.Identity(), ["output"], image_size=SIZE)
    torch.testing.assert_close(given(images())[0], images())
    network = nn.Identity()
    assert "as they are, in [0, 1]" in given.notes[0]
    for network.mean, network.std in (
        ([0.5] * 3, (0.25,) * 3),
        (0.5, 0.25),
        (np.full(3, 0.5), np.float32(0.25)),
    ):
        normal = Encoder(network, ["output"], image_size=SIZE)
        assert not normal.notes
        torch.testing.assert_close(normal(images())[0], (images() - 0.5) / 0.25)


def test_features_can_be_differentiated_only_where_asked():
    encoder, sample_images = Encoder(Net(), ["stem"], image_size=SIZE), images().requires_grad_()
    assert not encoder(sample_images)[0].requires_grad
    with encoder.gradients():
        encoder(sample_images)[0].sum().backward()
    assert sample_images.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_batch_statistics_stay_asleep():
    encoder = Encoder(Net(), ["norm"], image_size=SIZE)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()
    encoder(images())
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_a_mean_that_is_a_tensor_of_the_network_is_its_own_business():
    network = Net()
    network.register_buffer("mean", torch.full((3,), 0.5))
    assert Encoder(network, ["stem"], image_size=SIZE).mean.sum() == 0


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"mean": (0.5, 0.5)}, r"mean and std of own must be one number or three each.*got \(0.5, 0.5\)"),
        ({"std": (1, 1, 0)}, "std greater than 0"),
        ({"std": 0.0}, "std greater than 0"),
        ({"mean": "imagenet"}, "must be one number or three each"),
        ({"image_size": (1, 2, 3)}, "image_size must be the side of a square"),
        ({"prefix_tokens": -1}, "prefix_tokens of own must be a whole number"),
    ],
)
def test_wrong_attributes_are_named(attributes, message):
    network = Net()
    for name, value in attributes.items():
        setattr(network, name, value)
    with pytest.raises(AfterimageError, match=message):
        Encoder(network, ["stem"], image_size=SIZE)


def test_the_network_itself_is_left_as_it_is():
    network = Net().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    Encoder(network, ["stem"], weights="random", image_size=SIZE)(images())
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not network._forward_hooks and not network.stem._forward_hooks


def test_a_random_control_of_ones_own_network_keeps_no_trained_value():
    network = Net().eval()
    network.token = nn.Parameter(torch.linspace(-1, 1, 8))
    with torch.no_grad():
        network.stem[0].weight.fill_(3.0)
        network.norm.running_mean.fill_(5.0)
    first, same, other = (
        Encoder(network, ["norm"], weights="random", image_size=SIZE, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first(images())[0], same(images())[0]) and first.weights.is_random
    assert not torch.equal(first(images())[0], other(images())[0])
    assert first.model.stem[0].weight.std() > 0.01 and first.model.norm.running_mean.sum() == 0
    assert not torch.equal(first.model.token, network.token)
    assert torch.equal(first.model.token.sort()[0], network.token)


def test_weights_of_a_file_take_the_place_of_its_own(tmp_path):
    network, trained = Net().eval(), Net().eval()
    torch.save({"model": {f"module.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "net.pth")
    encoder = Encoder(network, ["stem"], weights=tmp_path / "net.pth", image_size=SIZE)
    torch.testing.assert_close(encoder(images())[0], trained.stem(images()))
    assert encoder.weights.origin == "path" and "'module.'" in encoder.weights.note


def raising(maps):
    raise ValueError("no such luck")


class Holder:
    """A result of a kind that is not looked into."""

    def __init__(self, maps):
        self.maps = maps


class Growing(nn.Module):
    """Returns something else from its sixth call on."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, sample_images):
        self.calls += 1
        return sample_images if self.calls < 7 else sample_images[:, :1]


class Dishonest(nn.Module):
    def forward(self, sample_images):
        return sample_images.mul_(float("nan")) if len(sample_images) > 2 else sample_images


@pytest.mark.parametrize(
    ("network", "layer", "message"),
    [
        (Net(raising), "output", "own cannot run on 32x32 images .*no such luck"),
        (Net(), "stm", r"unknown layer of own 'stm'; did you mean 'stem'.*Valid: stem.*output"),
        (Net(), "stem[0", "must be a module's path"),
        (
            Net(lambda m: {"a": m, "b": m[:, :4]}),
            "output",
            r"2 feature maps.*it returns \[a\] 1x8x8x8, \[b\].*output\[KEY\]",
        ),
        (Net(lambda m: {"a": m, "b": m[:, :4]}), "output[c]", r"nothing it returns is called \[c\]"),
        (
            Net(lambda m: "text"),
            "output",
            "cannot be inverted: it returns a str, in which torch finds nothing",
        ),
        (Net(lambda m: None), "output", "cannot be inverted: it returns a NoneType"),
        (Net(lambda m: Holder(m)), "output", "it returns a Holder, in which torch finds nothing"),
        (Net(lambda m: torch.from_numpy(m.numpy() + 1)), "output", "finds nothing that depends on the image"),
        (
            Net(lambda m: m.mean()),
            "output",
            "cannot be inverted: a single number: it has no axis of the batch",
        ),
        (Net(lambda m: m * float("inf")), "output", "not finite"),
    ],
)
def test_what_goes_wrong_is_said(network, layer, message):
    with pytest.raises(AfterimageError, match=message):
        Encoder(network, [layer], image_size=SIZE)


def test_a_network_with_a_scripted_part_is_traced_around_it():
    network = Net()
    network.stem = torch.jit.script(network.stem)
    assert Encoder(network, ["output"], image_size=SIZE).specs[0].source.endswith(":output")


def test_a_network_that_changes_its_mind_is_an_error():
    encoder = Encoder(Growing(), ["output"], image_size=SIZE)
    with pytest.raises(AfterimageError, match=r"where .* was measured before"):
        for _ in range(9):
            encoder(images())


def test_a_network_that_writes_into_its_input_cannot_change_the_image():
    encoder, sample_images = Encoder(Dishonest(), ["output"], image_size=SIZE), images()
    with pytest.raises(AfterimageError, match="not finite"):
        encoder(sample_images)
    torch.testing.assert_close(sample_images, images())


def test_chance_in_a_network_and_mixing_in_a_batch_are_noted():
    random = Encoder(Net(lambda m: m + torch.rand_like(m)), ["output"], image_size=SIZE)
    assert "differ from one pass to the next" in random.notes[1]
    mixing = Encoder(Net(lambda m: m - m.mean(0, keepdim=True)), ["output"], image_size=SIZE)
    assert "depend on the others in its batch" in mixing.notes[1]


def test_remarks_on_a_network_reach_the_notes_of_its_runs(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "class Noisy(torch.nn.Module):\n"
        "    def forward(self, images):\n"
        "        return images + torch.rand_like(images)\n"
    )
    encoders = MultiEncoder([f"python/{file}:Noisy:output"], image_size=SIZE)
    as_is, varies = encoders.notes_of(encoders.sources)
    assert "as they are, in [0, 1]" in as_is and "differ from one pass to the next" in varies


def test_what_bypasses_the_layer_is_found():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, 4)

        def forward(self, sample_images):
            return self.stem(sample_images).mean((2, 3)) + sample_images.std((1, 2, 3))[:, None]

    assert whole_network(Encoder(Skipping(), ["stem"], image_size=SIZE)).has_bypass(images())


def test_a_network_without_one_answer_has_no_utility():
    network = whole_network(Encoder(Net(lambda m: {}), ["stem"], image_size=SIZE))
    with pytest.raises(CostUnavailable, match="returns nothing"):
        network(images())


FACTORY = """
from safetensors.torch import save_file
from torch import nn
def good(): return nn.Conv2d(3, 4, 2, 2)
def wrong(): return 7
def broken(): raise RuntimeError("cannot build")
def leaves(): raise SystemExit(4)
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    sys.modules.pop("my_factories", None)


@pytest.fixture(autouse=True)
def forget_factories():
    yield
    open_network.cache_clear()


@pytest.mark.parametrize("where", ["my_factories:good", "my_factories.py:good"])
def test_a_factory_is_found_in_the_working_folder_and_is_built_from_a_seed(factories, where):
    first, second = (
        Encoder(f"python/{where}:output", image_size=SIZE),
        open_network.__wrapped__(f"python/{where}"),
    )
    assert torch.equal(first.model.weight, second.module.weight)
    assert first.weights.sha256 == second.find_weights().sha256 != ""
    (listed,) = list_layers(f"python/{where}", SIZE)
    assert (listed.layer, listed.shape) == ("output", (4, 16, 16))


@pytest.mark.parametrize("where", ["edited:factory", "edited.py:factory"])
def test_code_that_was_edited_makes_another_network(factories, where):
    """Its parameters alone would not tell."""
    code = """
from safetensors.torch import save_file
from torch import nn
class Net(nn.Conv2d):
    def forward(self, images): return super().forward(images)
def factory(): return Net(3, 4, 2, 2)
"""
    found = []
    for text in (code, code, code.replace("(images)", "(1 - images)")):
        (factories / "edited.py").write_text(text)
        sys.modules.pop("edited", None)
        found.append(open_network.__wrapped__(f"python/{where}"))
    sys.modules.pop("edited", None)
    assert found[0].code == found[1].code != found[2].code
    assert len({network.find_weights().sha256 for network in found}) == 1


def test_code_is_part_of_the_weights_identity_whatever_the_weights(factories, tmp_path):
    (factories / "coded.py").write_text("from torch import nn\ndef factory(): return nn.Conv2d(3, 4, 2, 2)\n")
    name = f"python/{factories}/coded.py:factory"
    save_file(open_network(name).module.state_dict(), tmp_path / "w.safetensors")
    for weights in ("pretrained", "random", str(tmp_path / "w.safetensors")):
        used = Encoder(name, ["output"], image_size=SIZE, weights=weights).weights.record
        assert used.code == open_network(name).code and used.identity.endswith(f", code {used.code}")
    assert Encoder(nn.Conv2d(3, 4, 2, 2), ["output"], image_size=SIZE).weights.record.code == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my_factories", "must be written python/package.module:factory"),
        ("my_factories:god", r"unknown factory in my_factories 'god'; did you mean 'good'\?(?!.*torch)"),
        ("my_factories:wrong", "must return a torch.nn.Module, got int"),
        ("my_factories:broken", "failed: RuntimeError: cannot build"),
        ("my_factories:leaves", "failed: SystemExit"),
        ("no_such_module:good", "failed: ModuleNotFoundError"),
        ("missing.py:good", "failed: FileNotFoundError"),
        ("", "names no model; write python/MODEL"),
    ],
)
def test_a_factory_that_fails_is_one_message(factories, text, message):
    with pytest.raises(AfterimageError, match=message):
        open_network(f"python/{text}")
