"""Weights in an encoder: parts of a network, other shapes and sizes, and real ones."""

import argparse
import hashlib
import json
import re

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_tensor

from afterimage.config import AfterimageError
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.providers import open_network
from afterimage.models.encoders.tracing import trace

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
    assert f"and {len(absent) - 8} more" in str(error.value)
    assert sum(key in str(error.value) for key in absent) >= 8
    assert "part.safetensors" in str(error.value)


def test_every_tensor_on_the_used_path_is_insisted_on(whole, tmp_path):
    used = {
        names[0]
        for names in trace(open_network(TINY), (64, 64)).tensors_read_by(
            [trace(open_network(TINY), (64, 64)).layer("layer1")]
        )
    }
    assert {"conv1.0.weight", "bn1.running_mean", "layer1.0.bn2.bias"} <= used
    for key in used:
        with pytest.raises(AfterimageError, match=rf"lacks {key}, which"):
            encode({k: v for k, v in whole.items() if k != key}, tmp_path, "layer1")


def test_parameters_that_no_module_owns_the_running_of_are_insisted_on():
    used = {
        n
        for names in trace(open_network("vit_tiny_patch16_224"), (64, 64)).tensors_read_by(
            [trace(open_network("vit_tiny_patch16_224"), (64, 64)).layer("block1")]
        )
        for n in names
    }
    assert {"pos_embed", "cls_token", "blocks.1.mlp.fc2.bias"} <= used
    assert not any(name.startswith(("blocks.2", "norm", "head")) for name in used)
    for model, layer, parts in (
        ("convnext_tiny", "stages.0", {"stages.0.blocks.0.gamma"}),
        ("swin_tiny_patch4_window7_224", "layers.0", {"layers.0.blocks.0.attn.relative_position_bias_table"}),
    ):
        traced = trace(open_network(model), (64, 64))
        assert parts <= {n for names in traced.tensors_read_by([traced.layer(layer)]) for n in names}


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
    sample_images = [Image.open(p).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for p in paths]
    images = torch.stack([to_tensor(sample_image) for sample_image in sample_images])
    for features in Encoder("vgg19", layers=["features.1", "features.6"], weights=weights_folder)(images):
        assert features.mean() == pytest.approx(1, abs=0.1)


def begin(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def other(state):
    """Other values of the same names and shapes."""
    return {key: value + 1 for key, value in state.items()}


def load(content, tmp_path, layer="layer2"):
    torch.save(content, tmp_path / "x.pth")
    return Encoder(f"{TINY}:{layer}", weights=tmp_path / "x.pth", image_size=64)


def holds(encoder, state):
    found = {key.removeprefix("model."): value for key, value in encoder.state_dict().items()}
    return all(torch.equal(value, state[key]) for key, value in found.items())


PREFIXES = ["model.", "backbone.", "encoder.", "timm_model.", "module.module.", "teacher.backbone.", "a.b.c."]
NESTS = ["model", "module", "teacher", "student", "net", "network", "ema", "state_dict_ema", "model_state_dict",
         "encoder", "backbone", "params", "my_own_word"]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_beginning_of_names_is_taken_off_and_said(whole, tmp_path, prefix):
    encoder = load(begin(prefix, whole), tmp_path)
    assert holds(encoder, whole)
    assert encoder.weights.note == f"the tensors without the beginning {prefix!r} of their names"
    assert encoder.notes == (f"weights of {TINY}: {encoder.weights.note}",)
    assert encoder.weights.record.note == encoder.weights.note
    file = tmp_path / "x.safetensors"
    save_file({key: value.contiguous() for key, value in begin(prefix, whole).items()}, file)
    assert holds(Encoder(f"{TINY}:layer2", weights=file, image_size=64), whole)


@pytest.mark.parametrize("nest", NESTS)
def test_the_container_that_fits_is_found_and_said(whole, tmp_path, nest):
    beside = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "head": {"weight": torch.zeros(3)}}
    encoder = load({**beside, nest: whole}, tmp_path)
    assert holds(encoder, whole)
    assert encoder.weights.note == f"the tensors in {nest!r}; not read: argparse.Namespace"
    encoder = load({nest: begin("module.backbone.", {**whole, "head.0.weight": torch.zeros(2)})}, tmp_path)
    assert holds(encoder, whole) and "'module.backbone.'" in encoder.weights.note
    assert holds(load({"deep": {"er": {nest: whole}}}, tmp_path), whole)


def test_plain_names_need_no_word(whole, tmp_path):
    encoder = load(whole, tmp_path)
    assert encoder.weights.note == "" and encoder.notes == () and encoder.weights.record.note == ""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model_ema", "model"),
        ("state_dict_ema", "state_dict"),
        ("params_ema", "params"),
        ("state_dict", "model"),
        ("state_dict", "teacher"),
        ("teacher", "student"),
        ("net", "momentum"),
        ("model", "grads"),
    ],
)
def test_of_two_that_fit_the_rule_names_one(whole, tmp_path, first, second):
    for content in ({first: whole, second: other(whole)}, {second: other(whole), first: whole}):
        encoder = load(content, tmp_path)
        assert holds(encoder, whole)
        assert encoder.weights.note.startswith(
            f"the tensors in {first!r}; {second!r} would fit as well (of several"
        )


def test_of_two_that_the_rule_does_not_know_the_first_is_taken(whole, tmp_path):
    encoder = load({**begin("encoder_q.", whole), **begin("encoder_k.", other(whole))}, tmp_path)
    assert holds(encoder, whole) and "'encoder_k' would fit as well" in encoder.weights.note


def test_what_fits_better_comes_before_the_rule(whole, tmp_path):
    """An average that lacks the running statistics, and a teacher of other widths."""
    parameters = {key: value for key, value in other(whole).items() if "running" not in key}
    assert holds(load({"model_ema": parameters, "model": whole}, tmp_path), whole)
    wide = {key: value.repeat_interleave(2, 0) for key, value in whole.items() if value.ndim}
    assert holds(load({"state_dict": wide, "student": whole}, tmp_path), whole)


def test_another_containers_tensors_are_no_part(whole, tmp_path):
    first = {key: value for key, value in whole.items() if key != "conv1.0.weight"}
    with pytest.raises(AfterimageError, match=r"lacks conv1.0.weight, which"):
        load({"model": first, "other": {"conv1.0.weight": whole["conv1.0.weight"]}}, tmp_path)


def test_what_does_not_match_is_told_with_what_is_there(whole, tmp_path):
    halves = {f"{'body' if key.startswith('layer') else 'stem'}.{key}": value for key, value in whole.items()}
    with pytest.raises(AfterimageError) as error:
        load(halves, tmp_path)
    for part in (
        "x.pth lacks conv1.0.weight, ",
        f"it holds {len(whole)} tensors: stem.conv1.0.weight, ",
        "most like conv1.0.weight is stem.conv1.0.weight",
    ):
        assert part in str(error.value)


def publishers(state):
    """ConvNeXt's tensors under the names that its authors gave them."""
    names = {}
    for key in state:
        name = re.sub(r"^stages\.(\d+)\.downsample", r"downsample_layers.\1", key)
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d+)\.blocks\.", r"stages.\1.", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        names[key] = re.sub(r"^head\.norm\.", "norm.", name).replace("head.fc.", "head.")
    return {names[key]: value for key, value in state.items()}


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"teacher": begin("backbone.", s), "student": begin("module.backbone.", other(s))},
        lambda s: {"state_dict": {**begin("module.net.", s), "module.head.weight": torch.zeros(2)}},
    ],
)
def test_a_publishers_names_are_found_under_any_beginning(tmp_path, nest):
    model = timm.create_model("convnext_atto", num_classes=10)
    state = {key: torch.rand_like(value) for key, value in model.state_dict().items()}
    torch.save(nest(publishers(state)), tmp_path / "x.pth")
    encoder = Encoder("convnext_atto:stages.2", weights=tmp_path / "x.pth", image_size=64)
    assert holds(encoder, state)


def snapshot(folder, state, config, sharded=False):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if not sharded:
        save_file(state, folder / "model.safetensors")
        return
    keys = list(state)
    parts = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({key: state[key] for key in part}, folder / name)
    table = {key: name for name, part in parts.items() for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


def test_a_snapshot_of_the_hub_is_a_folder_of_weights(whole, tmp_path):
    whole = {key: value.contiguous() for key, value in whole.items()}
    config = {"architecture": "test_resnet", "pretrained_cfg": {}}
    snapshot(tmp_path / "plain", whole, config)
    snapshot(tmp_path / "sharded", whole, config, sharded=True)
    snapshot(tmp_path / "wrong", whole, {"architecture": "resnet18"})
    (tmp_path / "pickled").mkdir()
    torch.save(whole, tmp_path / "pickled" / "pytorch_model.bin")
    for name in ("plain", "sharded", "pickled"):
        encoder = Encoder(f"{TINY}:layer2", weights=tmp_path / name, image_size=64)
        assert holds(encoder, whole) and encoder.weights.origin == "path"
    with pytest.raises(
        AfterimageError, match=r"wrong holds weights of resnet18, by its config.json, and not of test_"
    ):
        open_network(TINY).find_weights(tmp_path / "wrong")
    (tmp_path / "wrong" / "config.json").write_text("{")
    with pytest.raises(AfterimageError, match=r"cannot read .*config.json"):
        open_network(TINY).find_weights(tmp_path / "wrong")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        AfterimageError, match=r"empty holds no weights for .*, nor a snapshot of .* It holds nothing"
    ):
        open_network(TINY).find_weights(tmp_path / "empty")
    (tmp_path / "empty" / "model_best.pth.tar").write_bytes(b"")
    with pytest.raises(AfterimageError, match=r"It holds model_best.pth.tar; name a file to read just that"):
        open_network(TINY).find_weights(tmp_path / "empty")
