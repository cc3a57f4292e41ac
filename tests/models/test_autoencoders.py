"""Published autoencoders, tiny and random: the same latents and images as diffusers', measured without training."""

import json
import shutil
import sys

import pytest
import torch

from afterimage import Encoder, create_decoder
from afterimage.cli import main
from afterimage.config import AfterimageError, FeatureSpec
from afterimage.models.encoders.providers import open_network
from afterimage.runs.run import Run
from afterimage.training.checkpoint import load_reconstructor, load_tensors

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SIDE = 56
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def kl(**options):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": SIDE}
    return diffusers.AutoencoderKL(**blocks, **small, **options)


def rae(kind="dinov2", patch=14, **options):
    """From images of SIDE pixels, which the tower sees at `4 * patch`."""
    sizes = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "decoder_hidden_size": 32}
    sizes |= {
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
    }
    sides = {"encoder_patch_size": patch, "encoder_input_size": 4 * patch, "patch_size": SIDE // 4}
    draw = torch.Generator().manual_seed(1)
    statistics = [torch.rand(64, 1, 1, generator=draw).add(0.5) for _ in range(2)]
    given = {"latents_mean": statistics[0], "latents_std": statistics[1], "scaling_factor": 2.0}
    return diffusers.AutoencoderRAE(kind, **sizes, **sides, **(given | options))


MADE = {
    "kl": lambda: kl(scaling_factor=0.5, shift_factor=0.1),
    "kl of channels": lambda: kl(scaling_factor=0.5, latents_mean=[0.1] * 4, latents_std=[0.5, 1, 2, 3]),
    "rae of dinov2": rae,
    "rae of mae": lambda: rae("mae", 16),
    "tiny": lambda: diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        upsampling_scaling_factor=2,
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Make and save one of them; return the model and what it is called here."""
    root, found = tmp_path_factory.mktemp("autoencoders"), {}

    def make(name):
        if name not in found:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = MADE[name]().eval()
            model.save_pretrained(root / name)
            found[name] = model, f"diffusers/{root / name}"
        return found[name]

    return make


@pytest.fixture(autouse=True)
def forget_networks():
    yield
    open_network.cache_clear()


@torch.no_grad()
def by_diffusers(model, images):
    """Latents as a pipeline gives them to a diffusion model, and the images that it makes of them."""
    config = model.config
    if isinstance(model, diffusers.AutoencoderRAE):
        latents = model.encode(images).latent
        return latents, model.decode(latents).sample
    encoded = model.encode(2 * images - 1)
    found = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    mean, std = config.get("shift_factor") or 0.0, 1 / config.scaling_factor
    if config.get("latents_std"):
        mean, std = (torch.tensor(config[f"latents_{part}"])[:, None, None] for part in ("mean", "std"))
        std = std / config.scaling_factor
    latents = (found - mean) / std
    return latents, model.decode(latents * std + mean).sample / 2 + 0.5


@pytest.mark.parametrize("name", MADE)
def test_latents_and_images_are_those_of_diffusers(saved, name):
    model, called = saved(name)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    latents, expected = by_diffusers(model, images)
    encoder = Encoder(f"{called}:latents", image_size=SIDE)
    decoder = create_decoder(called, encoder.specs, SIDE)
    (found,) = encoder(images)
    torch.testing.assert_close(found, latents)
    torch.testing.assert_close(decoder([found]), expected.clamp(0, 1), atol=2e-5, rtol=1e-5)
    assert not decoder.trainable and not any(p.requires_grad for p in decoder.parameters())
    assert (encoder.weights.sha256 and encoder.network.native_size == (SIDE, SIDE)) or name == "tiny"
    random = Encoder(f"{called}:latents", image_size=SIDE, weights="random", seed=1)
    assert random.weights.is_random and not torch.allclose(random(images)[0], latents, atol=0.05)


def test_a_tower_of_transformers_is_decoded_as_its_representation_autoencoder_does(saved, tmp_path):
    """Its features are not normalised yet; RAE normalises them by its statistics first."""
    model, called = saved("rae of dinov2")
    tower = transformers.Dinov2WithRegistersModel(model.encoder.config)
    tower.load_state_dict(
        model.encoder.state_dict(), strict=False
    )  # RAE's final norm has no weights: here 1 and 0
    tower.save_pretrained(tmp_path)
    prepared = {"image_mean": MEAN, "image_std": STD, "size": {"height": SIDE, "width": SIDE}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(prepared))
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    encoder = Encoder(f"transformers/{tmp_path}:layernorm", image_size=SIDE)
    decoder = create_decoder(called, encoder.specs, SIDE)
    expected = by_diffusers(model, images)[1].clamp(0, 1)
    torch.testing.assert_close(decoder(encoder(images)), expected, atol=2e-5, rtol=1e-5)
    taken_for_latents = create_decoder(called, encoder.specs, SIDE, raw=False)
    assert not torch.allclose(taken_for_latents(encoder(images)), expected, atol=0.01)


def test_blocks_of_its_tower_are_layers_too(saved):
    _, called = saved("rae of dinov2")
    assert Encoder(f"{called}:block0", image_size=SIDE).specs[0].shape == (64, 4, 4)


def test_what_is_wrong_is_one_message(saved, tmp_path, monkeypatch):
    _, called = saved("rae of dinov2")
    spec = FeatureSpec("test:layer", 64, 4, 4)
    with pytest.raises(
        AfterimageError, match=r"must return images \(2, 3, 64, 64\) .* got \(2, 3, 56, 56\).*--size 56x56"
    ):
        create_decoder(called, [spec], 64)
    with pytest.raises(AfterimageError, match=r"fails on features \(2, 8, 4, 4\) of test:layer"):
        create_decoder(called, [FeatureSpec("test:layer", 8, 4, 4)], SIDE)
    with pytest.raises(AfterimageError, match=r"unknown option .* 'rwa'; did you mean 'raw'"):
        create_decoder(called, [spec], SIDE, rwa=True)
    with pytest.raises(AfterimageError, match=r"raw of .* must be true or false"):
        create_decoder(called, [spec], SIDE, raw=1)
    folder = tmp_path / "broken"
    shutil.copytree(called.partition("/")[2], folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(AfterimageError, match=r"holds no weights for .*: none of diffusion_pytorch_model"):
        create_decoder(f"diffusers/{folder}", [spec], SIDE)
    (folder / "config.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(
        AfterimageError, match=r"is no autoencoder of diffusers .*'StableDiffusionPipeline'.*vae"
    ):
        create_decoder(f"diffusers/{folder}", [spec], SIDE)
    (folder / "config.json").unlink()
    with pytest.raises(AfterimageError, match="cannot read the config"):
        create_decoder(f"diffusers/{folder}", [spec], SIDE)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(AfterimageError, match=r"not installed|pip install 'afterimage\[diffusers\]'"):
        create_decoder(called, [spec], SIDE)


def test_it_is_measured_from_one_command(saved, tmp_path, capsys):
    _, called = saved("kl")
    images = ["--data", "procedural:8", "--test", "procedural:3", "--resize", str(SIDE), "--crop", str(SIDE)]
    options = ["--lpips", "squeeze", "--device", "cpu", "--output-dir", str(tmp_path / "runs")]
    for weights in ("pretrained", "random"):
        main(["train", f"{called}:latents", "--decoder", called, "--weights", weights, *images, *options])
    assert "trained elsewhere" in capsys.readouterr().err
    runs = [Run.open(path.parent) for path in (tmp_path / "runs").glob("*/summary.json")]
    (random,) = (run for run in runs if run.result.is_random)
    (run,) = (run for run in runs if not run.result.is_random)
    assert run.result.is_imported and run.result.scores["psnr"] != random.result.scores["psnr"]
    decoders = [load_tensors(one.file("decoder.safetensors"))[0] for one in (run, random)]
    assert decoders[0] and all(torch.equal(decoders[0][key], decoders[1][key]) for key in decoders[0])
    main(["controls", str(run.path), "--only", "controls", "--device", "cpu"])
    controls = json.loads(run.file("controls.json").read_text())["controls"]
    assert {"own", "another", "mean"} <= controls.keys()
    main(["evaluate", str(run.path), "--device", "cpu"])
    assert f"{run.result.scores['psnr'].mean:.2f}" in capsys.readouterr().out

    model = diffusers.AutoencoderKL.from_pretrained(called.partition("/")[2])
    torch.nn.init.normal_(model.decoder.conv_out.bias)
    model.save_pretrained(called.partition("/")[2])
    with pytest.raises(AfterimageError, match="was made by other code: its decoder's file"):
        load_reconstructor(random)
