"""Every provider: equal weights give equal features, each family keeps the contract, each mistake is one message."""

import json
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision import models

from afterimage.config import PROVIDERS, AfterimageError
from afterimage.models.decoders import DECODERS, create_decoder
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.providers import NETWORKS, open_network, resolve_source
from afterimage.models.encoders.tracing import list_layers, trace
from encoder_checks import assert_same, randomise_statistics
from encoder_contract import assert_locations_in_order, quadrants

NEEDS = "not installed: pip install 'afterimage[{}]'"
PREPARED = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"height": 32, "width": 32}}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [16, 16, 24, 32], "depths": [1, 1, 1, 1]}
WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
FAMILIES = {
    "ViT": VIT,
    "DeiT": VIT,
    "Dinov2": VIT,
    "Dinov2WithRegisters": VIT,
    "DINOv3ViT": VIT,
    "ViTMAE": VIT,
    "ViTMSN": VIT,
    "IJepa": VIT,
    "Beit": VIT,
    "CLIP": {"vision_config": VIT},
    "Siglip": {"vision_config": VIT},
    "ConvNext": STAGES,
    "ConvNextV2": STAGES,
    "Swin": WINDOWS,
    "Swinv2": WINDOWS,
    "ResNet": {"embedding_size": 16, **STAGES},
    "RegNet": {"embedding_size": 16, "groups_width": 8, **STAGES},
    "Segformer": {"num_attention_heads": [1, 1, 2, 2], **STAGES},
    "PoolFormer": STAGES,
}
"""Vision families of transformers, as small as they come."""
TORCHVISION = {
    "squeezenet1_1": 64,
    "resnet18": 64,
    "shufflenet_v2_x0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "googlenet": 64,
    "densenet121": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "vit_b_32": 64,
    "maxvit_t": 224,
}
"""The smallest network of each family of torchvision, and the side of the images that it is tried on."""
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def some(families, *quick):
    """All families, of which `make test` tries the quick ones."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.long) for name in families]


def saved(folder, model, prepared=PREPARED):
    """A local folder with a model of transformers, as its `save_pretrained` writes it; its source's beginning."""
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    return f"transformers/{folder}"


def tower(name, **settings):
    transformers = pytest.importorskip("transformers", reason=NEEDS.format("transformers"))
    config = getattr(transformers, f"{name}Config")(**{**FAMILIES[name], **settings})
    config = getattr(config, "vision_config", config)
    torch.manual_seed(0)
    return transformers.MODEL_MAPPING[type(config)](config).eval()


def assert_encoder_contract(model, size):
    """What an encoder of any provider promises, on the first and the last layer of an untrained network.

    Features have the measured shape, an image's do not depend on the others in its batch, places keep their order,
    gradients reach the images where they are asked for, and nothing changes the network.
    """
    names = [layer.layer for layer in list_layers(model, size)]
    encoder = Encoder(model, [names[0], names[-1]], weights="random", image_size=size)
    images = quadrants(size)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    features = encoder.train()(images)
    assert [(5, s.channels, s.height, s.width) for s in encoder.specs] == [tuple(f.shape) for f in features]
    for together, alone in zip(features, encoder(images[1:2]), strict=True):
        assert_same(together[1:2], alone)
    if encoder.specs[0].height > 1:
        assert_locations_in_order(encoder.specs[0], features[0])
    images.requires_grad_()
    assert not any(feature.requires_grad for feature in encoder(images))
    with encoder.gradients():
        sum(feature.square().sum() for feature in encoder(images)).backward()
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert encoder.weights.is_random and not any(module.training for module in encoder.modules())
    again = Encoder(model, [names[0]], weights="random-init", image_size=size, seed=1)
    assert again.weights.label == "random-init" and not torch.equal(again(images)[0], features[0])
    return encoder


def test_the_names_of_providers_are_those_that_exist():
    assert tuple(NETWORKS) == PROVIDERS
    with pytest.raises(
        AfterimageError, match="providers: timm, torchvision, transformers, open_clip, diffusers, python"
    ):
        resolve_source("torchvision/resnet18")


@pytest.mark.parametrize("name", some(TORCHVISION, "squeezenet1_1"))
def test_families_of_torchvision_keep_the_contract(name):
    assert_encoder_contract(f"torchvision/{name}", TORCHVISION[name])


@pytest.mark.parametrize("name", some(FAMILIES, "Dinov2", "Swin"))
def test_families_of_transformers_keep_the_contract(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason=NEEDS.format("transformers"))
    getattr(transformers, f"{name}Config")(**FAMILIES[name]).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    encoder = assert_encoder_contract(f"transformers/{tmp_path}", 32)
    assert encoder.mean.flatten().tolist() == pytest.approx(PREPARED["image_mean"])
    assert encoder.network.native_size == (32, 32)


def test_timm_and_torchvision_compute_the_same(tmp_path):
    torch.manual_seed(0)
    whole = randomise_statistics(models.resnet18(weights=None))
    save_file(whole.state_dict(), tmp_path / "resnet18.safetensors")
    layers = ["layer1", "layer4", "fc"]
    ours, theirs = (
        Encoder(model, layers, weights=tmp_path / "resnet18.safetensors", image_size=64)
        for model in ("torchvision/resnet18", "resnet18.tv_in1k")
    )
    assert ours.weights.sha256 == theirs.weights.sha256 and not ours.weights.is_random
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for a, b in zip(ours(images), theirs(images), strict=True):
        torch.testing.assert_close(a, b)


def test_the_default_weights_and_their_normalisation_are_torchvisions():
    assert open_network("torchvision/resnet50").name == "torchvision/resnet50.IMAGENET1K_V2"
    assert open_network("torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1").native_size == (384, 384)
    assert open_network("torchvision/efficientnet_v2_l").mean == (0.5, 0.5, 0.5)


def renamed(state, names, *, cut=()):
    """A state dict under other names; `cut` are names of stacked matrices and those of their parts."""
    found = {}
    for key, value in state.items():
        for old, new in names:
            key = key.replace(old, new)
        found[key] = value
    for whole, parts in cut:
        for key in [key for key in found if whole in key]:
            pieces = found.pop(key).chunk(len(parts))
            found |= {
                key.replace(whole, part): piece.contiguous()
                for part, piece in zip(parts, pieces, strict=True)
            }
    return found


BLOCK = [("norm1.", "layernorm_before."), ("norm2.", "layernorm_after."), ("mlp.fc1.", "intermediate.dense.")]
VIT_NAMES = [
    ("blocks.", "encoder.layer."),
    *BLOCK,
    ("mlp.fc2.", "output.dense."),
    ("attn.proj.", "attention.output.dense."),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
]
QKV = [("attn.qkv.", [f"attention.attention.{part}." for part in ("query", "key", "value")])]
DINO_NAMES = [
    ("blocks.", "encoder.layer."),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
    *VIT_NAMES[-4:],
]
CLIP_NAMES = [
    ("blocks.", "encoder.layers."),
    ("norm1.", "layer_norm1."),
    ("norm2.", "layer_norm2."),
    ("attn.proj.", "self_attn.out_proj."),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding.weight"),
    ("norm_pre.", "pre_layrnorm."),
]
CLIP_QKV = [("attn.qkv.", [f"self_attn.{part}_proj." for part in "qkv"])]
SIZES = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 2,
    "num_classes": 0,
}
SAME = {
    "ViT": (SIZES, VIT_NAMES, QKV, {}),
    "Dinov2": ({**SIZES, "init_values": 0.3}, DINO_NAMES, QKV, {"mlp_ratio": 2}),
    "CLIP": (
        {**SIZES, "pre_norm": True, "act_layer": "quick_gelu"},
        CLIP_NAMES,
        CLIP_QKV,
        {},
    ),
}


@pytest.mark.parametrize("family", SAME)
def test_timm_and_transformers_compute_the_same(family, tmp_path):
    """The random weights of a network of timm's, in a folder as the publisher's; both read through their provider."""
    sizes, names, cut, settings = SAME[family]
    torch.manual_seed(1)
    eps = tower(family, **settings).config.layer_norm_eps
    layer = lambda *args, **options: torch.nn.LayerNorm(*args, **{**options, "eps": eps})  # noqa: E731
    whole = timm.models.VisionTransformer(**sizes, norm_layer=layer).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model = tower(family, **settings)
    source = saved(tmp_path, model)
    state = renamed(whole.state_dict(), names, cut=cut)
    if family == "CLIP":
        state["embeddings.class_embedding"] = state["embeddings.class_embedding"].flatten()
        state["embeddings.position_embedding.weight"] = state["embeddings.position_embedding.weight"][0]
        state = {f"vision_model.{key}": value for key, value in state.items()}
    elif family == "ViT":
        state = {f"vit.{key}".replace("vit.norm.", "vit.layernorm."): value for key, value in state.items()}
    else:
        state = {("layernorm." + k[5:] if k.startswith("norm.") else k): value for k, value in state.items()}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    encoder = Encoder(source, ["block0", "block1"], image_size=32)
    assert encoder.weights.origin == "path" and len(encoder.weights.sha256) == 64
    whole.mean, whole.std = PREPARED["image_mean"], PREPARED["image_std"]
    for ours, theirs in zip(
        encoder(IMAGES), Encoder(whole, ["blocks.0", "blocks.1"], image_size=32)(IMAGES), strict=True
    ):
        assert_same(ours, theirs)


def test_a_folder_as_transformers_saves_it_gives_what_transformers_computes(tmp_path):
    model = tower("CLIP")
    encoder = Encoder(saved(tmp_path, model), ["block1", "pooled"], image_size=32)
    with torch.no_grad():
        inputs = (IMAGES - encoder.mean) / encoder.std
        expected = model(inputs)
    tokens, pooled = encoder(IMAGES)
    assert_same(tokens.flatten(2).transpose(1, 2), expected.last_hidden_state[:, 1:])
    assert_same(pooled[:, :, 0, 0], expected.pooler_output)


def test_shards_with_an_index_are_read(tmp_path):
    model = tower("ViT")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    assert not (tmp_path / "model.safetensors").exists()
    encoder = Encoder(f"transformers/{tmp_path}:block1", image_size=32)
    with torch.no_grad():
        expected = model((IMAGES - encoder.mean) / encoder.std)
    norm = Encoder(f"transformers/{tmp_path}:norm", image_size=32)(IMAGES)[0]
    assert_same(norm.flatten(2).transpose(1, 2), expected.last_hidden_state[:, 1:])


def test_a_tower_takes_images_of_any_size(tmp_path):
    source = saved(tmp_path, tower("Dinov2"))
    (features,) = Encoder(f"{source}:block1", image_size=(48, 64))(torch.rand(1, 3, 48, 64))
    assert features.shape == (1, 32, 6, 8)


def test_towers_of_open_clip(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip", reason=NEEDS.format("open_clip"))
    settings = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-clip.json").write_text(json.dumps(settings))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(0)
    whole = open_clip.create_model("tiny-clip", load_weights=False).eval()
    save_file(whole.state_dict(), tmp_path / "tiny-clip.safetensors")
    encoder = Encoder("open_clip/tiny-clip", ["block1", "cls", "head"], weights=tmp_path, image_size=32)
    with torch.no_grad():
        expected = whole.encode_image((IMAGES - encoder.mean) / encoder.std)
    blocks, cls, head = encoder(IMAGES)
    assert_same(head[:, :, 0, 0], expected)
    assert (blocks.shape, cls.shape) == ((2, 32, 4, 4), (2, 32, 1, 1))
    assert_encoder_contract("open_clip/tiny-clip", 32)
    larger = Encoder("open_clip/tiny-clip:block0", weights=tmp_path, image_size=48)
    assert larger.specs[0].height == 6 and larger.weights.sha256 == encoder.weights.sha256
    with pytest.raises(AfterimageError, match="names no weights; write open_clip/tiny-clip::TAG"):
        Encoder("open_clip/tiny-clip:block0", image_size=32)


def test_a_tower_for_any_shape_gets_patches(tmp_path):
    """SigLIP 2 NaFlex takes patches, a mask and the grid's shape; cut as its own processor does."""
    transformers = pytest.importorskip("transformers", reason=NEEDS.format("transformers"))
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    settings = {**VIT, "num_patches": 16}
    del settings["image_size"]
    torch.manual_seed(0)
    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**settings)).eval()
    source = saved(tmp_path, model, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert open_network(source).native_size == (32, 32)
    encoder = Encoder(source, ["block1", "norm", "pooled"], image_size=(32, 48))
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    block, norm, pooled = encoder(images)
    assert block.shape == norm.shape == (2, 32, 4, 6)
    patches = torch.cat([convert_image_to_patches((image - 0.5) / 0.5, 8) for image in images])
    with torch.no_grad():
        expected = model(
            pixel_values=patches.reshape(2, 24, -1),
            pixel_attention_mask=torch.ones(2, 24, dtype=torch.long),
            spatial_shapes=torch.tensor([[4, 6]] * 2),
        )
    assert_same(norm.flatten(2).transpose(1, 2), expected.last_hidden_state)
    assert_same(pooled[:, :, 0, 0], expected.pooler_output)
    with pytest.raises(AfterimageError, match=r"sides must be multiples of 8.*it can on 32x32"):
        Encoder(f"{source}:block1", image_size=36)


def test_the_resnets_of_open_clip_take_square_images(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip", reason=NEEDS.format("open_clip"))
    settings = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-resnet.json").write_text(json.dumps(settings))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "tiny-resnet.json")
    assert_encoder_contract("open_clip/tiny-resnet", 64)
    with pytest.raises(AfterimageError, match=r"cannot run on 32x64 images.*it can on 32x32"):
        Encoder("open_clip/tiny-resnet:layer1", weights="random", image_size=(32, 64))


def test_a_tower_of_open_clip_from_a_repository_of_the_hub(tmp_path, monkeypatch):
    open_clip = pytest.importorskip("open_clip", reason=NEEDS.format("open_clip"))
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    settings = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    base = tmp_path / "models--someone--tiny-clip"
    folder = base / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text("a" * 40)
    prepared = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": settings, "preprocess_cfg": prepared})
    )
    torch.manual_seed(0)
    whole = open_clip.CLIP(**settings).eval()
    save_file(whole.state_dict(), folder / "open_clip_model.safetensors")
    encoder = Encoder("open_clip/hf-hub:someone/tiny-clip:head", image_size=32)
    assert encoder.model_name == "open_clip/someone/tiny-clip" and len(encoder.weights.sha256) == 64
    with torch.no_grad():
        assert_same(encoder(IMAGES)[0][:, :, 0, 0], whole.encode_image((IMAGES - 0.5) / 0.25))
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(
        AfterimageError, match=r"cannot use the open_clip_config.json of someone/tiny-clip@main: KeyError"
    ):
        open_network("open_clip/someone/tiny-clip@main")


def test_a_published_tower_of_open_clip_is_normalised_and_named_by_its_tag():
    pytest.importorskip("open_clip", reason=NEEDS.format("open_clip"))
    network = open_network("open_clip/ViT-B-32::laion2b_s34b_b79k")
    assert network.name == "open_clip/ViT-B-32::laion2b_s34b_b79k" and network.native_size == (224, 224)
    assert network.mean[0] == pytest.approx(0.48145466)
    assert resolve_source("open_clip/ViT-B-32::openai:block3") == "open_clip/ViT-B-32::openai:block3"


ROLES = {
    "resnet18": {"pooled": 512, "head": 1000},
    "vit_tiny_patch16_224": {"cls": 192, "pooled": 192},  # its head and its norm are modules of these names
    "torchvision/vit_b_32": {"norm": 768, "cls": 768, "head": 1000},
    "torchvision/resnet18": {"pooled": 512, "head": 1000},
}


@pytest.mark.parametrize("model", ROLES)
def test_layers_by_role(model):
    listed = {layer.layer: layer for layer in trace(open_network(model), (64, 64)).list_named()}
    assert {name: layer.channels for name, layer in listed.items()} == ROLES[model]
    assert all(layer.height == (2 if name == "norm" else 1) for name, layer in listed.items())


def test_the_class_token_is_the_first_of_the_final_norm():
    encoder = Encoder("vit_tiny_patch16_224", ["cls", "norm", "head"], weights="random", image_size=64)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = trace(encoder.network, encoder.image_size).create_random(0)
    with torch.no_grad():
        inputs = (images - encoder.mean) / encoder.std
        tokens, classes = whole.forward_features(inputs), whole(inputs)
    cls, norm, head = encoder(images)
    assert_same(cls[:, :, 0, 0], tokens[:, 0])
    assert_same(norm.flatten(2).transpose(1, 2), tokens[:, 1:])
    assert_same(head[:, :, 0, 0], classes)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_vector_is_decoded_or_the_decoder_says_why_not(decoder):
    encoder = Encoder("vit_tiny_patch16_224:cls", weights="random", image_size=64)
    images = torch.rand(2, 3, 64, 64)
    try:
        built = create_decoder(decoder, encoder.specs, 64)
    except AfterimageError as error:
        assert "location" in str(error)
        return
    if not built.closed_form:
        assert built(encoder(images)).shape == images.shape


def test_what_a_model_lacks_is_said():
    with pytest.raises(
        AfterimageError, match=r"resnet18.* has no layer 'cls' \(the class token .* By role it has pooled"
    ):
        Encoder("resnet18:cls", weights="random", image_size=64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nosuch"}, "is no network of transformers .* names the model_type 'nosuch'"),
        (
            {"model_type": "mine", "auto_map": {"AutoModel": "mine.Model"}},
            r"needs code of its own \(mine.Model\), which is not run",
        ),
        (
            {"model_type": "bert"},
            "has no vision tower: its config.json describes a 'bert', which takes input_ids",
        ),
        ({"architecture": "resnet18"}, "networks of timm's are taken as"),
        ({"model_type": "vit", "hidden_size": "wide"}, "cannot use the config.json of"),
        (None, "the folder has no config.json"),
    ],
)
def test_a_folder_that_describes_no_tower_is_one_message(config, message, tmp_path):
    pytest.importorskip("transformers", reason=NEEDS.format("transformers"))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(AfterimageError, match=message):
        open_network(f"transformers/{tmp_path}")


@pytest.mark.parametrize(
    ("prepared", "message"),
    [
        (None, "has no preprocessor_config.json and no processor_config.json"),
        ({"image_mean": [0.5] * 3}, "cannot use the preprocessor_config.json of .*image_std"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "must be three numbers"),
    ],
)
def test_nothing_guesses_how_images_are_normalised(prepared, message, tmp_path):
    tower("ViT").config.save_pretrained(tmp_path)
    if prepared is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(prepared))
    with pytest.raises(AfterimageError, match=message):
        open_network(f"transformers/{tmp_path}")


def test_weights_of_another_architecture_are_refused(tmp_path):
    source = saved(tmp_path, tower("ViT"))
    save_file(models.squeezenet1_1(weights=None).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(
        AfterimageError, match=r"model.safetensors lacks .*which the layers in use of transformers/.* read"
    ):
        Encoder(f"{source}:block0", image_size=32)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("torchvision/resnet81", "unknown torchvision model 'resnet81'; did you mean 'resnet18'"),
        (
            "torchvision/resnet18.IMAGENET",
            "unknown weights' tag of torchvision/resnet18 'IMAGENET'.*IMAGENET1K_V1",
        ),
        ("torchvision/", "names no model; write torchvision/MODEL"),
        (
            "transformers/no/such",
            "cannot read the config.json of no/such, a repository of the hub: .*HF_HUB_OFFLINE",
        ),
        ("transformers/no/such/name", "is no name of a repository"),
        ("open_clip/ViT-B-23", "unknown open_clip model 'ViT-B-23'; did you mean"),
        ("open_clip/ViT-B-32::laion", "unknown weights' tag of open_clip/ViT-B-32 'laion'"),
        ("open_clip/ViT-B-32:", "write ARCHITECTURE::TAG:LAYER"),
    ],
)
def test_an_unknown_name_is_one_message(model, message, monkeypatch):
    if not model.startswith("torchvision"):
        pytest.importorskip(model.partition("/")[0])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AfterimageError, match=message):
        open_network(model)


@pytest.mark.parametrize("extra", ["transformers", "open_clip"])
def test_a_library_that_is_not_installed_is_named_with_its_extra(extra, monkeypatch):
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(
        AfterimageError, match=rf"needs the library {extra}.*pip install 'afterimage\[{extra}\]'"
    ):
        open_network(f"{extra}/owner/name")


def test_a_fixed_size_is_named_where_weights_do_not_fit(tmp_path):
    with pytest.raises(
        AfterimageError, match=r"vit_b_32.* cannot run on 64x96 images \(ValueError: it takes square"
    ):
        list_layers("torchvision/vit_b_32", (64, 96))
