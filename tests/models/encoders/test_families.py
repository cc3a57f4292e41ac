"""What every encoder promises, over the families of timm."""

import functools
import re
from collections import defaultdict

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.layers import list_layers
from afterimage.models.encoders.providers.timm import create_random, resolve_model
from afterimage.models.encoders.tensor_layout import reorder
from encoder_checks import assert_same, randomise_statistics

# The smallest model of each family that is quick to build, and the side of the images that it is tried on.
FAMILIES = {
    "test_byobnet": 64,
    "cait_xxs24_224": 64,
    "coat_tiny": 64,
    "convit_tiny": 64,
    "test_convnext": 64,
    "cpubone_nano": 64,
    "cs3darknet_focus_s": 64,
    "cspnext_tiny": 64,
    "deit_tiny_patch16_224": 64,
    "dla46x_c": 64,
    "dpn48b": 64,
    "edgenext_xx_small": 64,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 64,
    "test_efficientnet": 64,
    "efficientvim_m1": 224,
    "efficientvit_b0": 64,
    "efficientvit_m0": 64,
    "vit_tiny_patch16_dinov3_qkvb": 64,
    "fasternet_t0": 64,
    "fastvit_t8": 64,
    "gcvit_xxtiny": 64,
    "ghostnet_050": 64,
    "hardcorenas_b": 64,
    "hgnetv2_b0": 64,
    "hiera_tiny_224": 64,
    "lambda_resnet26t": 128,
    "iformer_t": 64,
    "inception_next_atto": 64,
    "lcnetv2_small": 64,
    "levit_128s": 64,
    "test_mambaout": 64,
    "test_coatnet": 64,
    "poolformerv2_s12": 64,
    "gmlp_ti16_224": 64,
    "mobilenetv3_small_050": 64,
    "mobilevit_xxs": 64,
    "mvitv2_tiny": 64,
    "nest_tiny": 64,
    "test_nfnet": 64,
    "pit_ti_224": 64,
    "pvt_v2_b0": 64,
    "regnetx_002": 64,
    "repghostnet_050": 64,
    "repvit_m1": 64,
    "resnest14d": 64,
    "test_resnet": 64,
    "resnetv2_18": 64,
    "rexnet_100": 64,
    "legacy_seresnet18": 64,
    "sequencer2d_s": 64,
    "shvit_s1": 64,
    "skresnet18": 64,
    "starnet_s050": 64,
    "swiftformer_xs": 64,
    "swin_tiny_patch4_window7_224": 64,
    "swinv2_tiny_window8_256": 64,
    "tiny_vit_5m_224": 112,
    "twins_svt_small": 64,
    "visformer_tiny": 64,
    "test_vit": 64,
    "vit_tiny_r_s16_p8_224": 64,
    "test_vit_relpos": 64,
    "ese_vovnet19b_slim_dw": 64,
    "xcit_nano_12_p8_224": 64,
}


QUICK = {
    *(
        "test_convnext",
        "deit_tiny_patch16_224",
        "test_efficientnet",
        "fastvit_t8",
        "hiera_tiny_224",
        "test_mambaout",
    ),
    *("mobilevit_xxs", "pit_ti_224", "pvt_v2_b0", "test_resnet", "swin_tiny_patch4_window7_224", "test_vit"),
    *("vit_tiny_patch16_dinov3_qkvb", "levit_128s"),
}
"""Of every kind of layout one; `make test-long` tries all families."""
OVER_FAMILIES = pytest.mark.parametrize(
    "model", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in FAMILIES]
)


def quadrants(size):
    """A smooth image, and four with a patch of one quadrant brightened: (5, 3, size, size)."""
    coarse = torch.rand(1, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(0))
    images = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear").repeat(5, 1, 1, 1) / 2
    half, margin = size // 2, size // 8
    for quadrant in range(4):
        top, left = (quadrant // 2) * half + margin, (quadrant % 2) * half + margin
        images[quadrant + 1, :, top : top + half - 2 * margin, left : left + half - 2 * margin] += 0.5
    return images


def run_whole(model, taps, inputs):
    """Feature maps of a model that is neither cut short nor lacks anything."""
    found = {}

    def keep(tap, module, args, output):
        roll = reorder(model, tap.module)
        found[tap.module] = tap.layout(roll(output) if roll else output).clone()

    for tap in taps:
        model.get_submodule(tap.module).register_forward_hook(functools.partial(keep, tap))
    with torch.no_grad():
        model(inputs)
    return [found[tap.module] for tap in taps]


@OVER_FAMILIES
def test_contract_over_families(model, tmp_path):
    """Shapes are as measured, loading and dropping what is unused change nothing, places keep their order."""
    size = FAMILIES[model]
    names = [layer.name for layer in list_layers(model, size)]
    whole = randomise_statistics(create_random(resolve_model(model), (size, size), 5, "random-init"))
    save_model(whole, str(tmp_path / "whole.safetensors"))
    encoder = Encoder(
        model, layers=[*names[:2], names[-1]], weights=tmp_path / "whole.safetensors", image_size=size
    )
    images = quadrants(size)
    features = encoder(images)
    assert [(5, s.channels, s.height, s.width) for s in encoder.specs] == [tuple(f.shape) for f in features]
    expected = run_whole(whole, encoder._layers, (images - encoder.mean) / encoder.std)
    for feature, reference in zip(features, expected, strict=True):
        assert_same(feature, reference)

    for spec, feature in list(zip(encoder.specs, features, strict=True))[:2]:
        changes = (feature[1:] - feature[:1]).square().sum(1)
        top, left = spec.height // 2, spec.width // 2
        for quadrant, change in enumerate(changes):
            halves = change[:top], change[-top:]
            parts = [part.mean() for half in halves for part in (half[:, :left], half[:, -left:])]
            assert torch.stack(parts).argmax() == quadrant, f"{spec.source} does not keep its places in order"


SHARE = 0.01
"""What a block of a random control adds to its input at least, by norm. Over the families the least is 0.017
(CSPNeXt), and 0.05 or more for 98 of 100 blocks."""


def matrices(module):
    kinds = nn.Conv2d | nn.Linear
    return {
        name: m.weight for name, m in module.named_modules() if isinstance(m, kinds) and m.weight is not None
    }


def changes(model, run):
    """How much each composite module that returns a map of its input's shape changes it, by path, in one `run()`."""
    inputs, found = {}, {}

    def before(path, module, args):
        if args and isinstance(args[0], torch.Tensor):
            inputs[path] = args[0].clone()

    def after(path, module, args, output):
        given = inputs.pop(path, None)
        if given is not None and isinstance(output, torch.Tensor) and output.shape == given.shape:
            found[path] = ((output - given).norm() / given.norm()).item()

    for path, module in model.named_modules():
        if path and len(matrices(module)) > 1:
            module.register_forward_pre_hook(functools.partial(before, path))
            module.register_forward_hook(functools.partial(after, path), prepend=True)
    return run(), found


@OVER_FAMILIES
def test_every_block_of_a_random_control_acts(model):
    """Blocks change their input, features stay finite to the last layer, and no kind of matrix is without effect."""
    size = FAMILIES[model]
    deepest = list_layers(model, size)[-1].name
    encoder = Encoder(model, [deepest], weights="random", image_size=size)
    images = quadrants(size)[:2]
    (features,), found = changes(encoder.model, lambda: encoder(images))
    assert features.isfinite().all() and features.std() > 0
    weak = {path: share for path, share in found.items() if share < SHARE}
    assert not weak, f"{weak} of {len(found)} blocks"

    kinds = defaultdict(list)
    for path, weight in matrices(encoder.model).items():
        if "cls_attn" not in path:  # blocks on the class token alone, which is no place of the map
            kinds[re.sub(r"\d+", "N", path)].append(weight)
    for kind, weights in kinds.items():
        kept = [weight.clone() for weight in weights]
        for weight in weights:
            weight.zero_()
        assert not torch.equal(encoder(images)[0], features), (
            f"{kind}: all {len(weights)} at zero change nothing"
        )
        for weight, values in zip(weights, kept, strict=True):
            weight.copy_(values)


def test_enough_families_are_covered():
    from timm.models._registry import _model_to_module

    assert len({_model_to_module[name] for name in FAMILIES}) >= 60
