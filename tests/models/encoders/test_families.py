"""The contract of encoders over the families of timm."""

import pytest

from encoder_contract import EncoderContract

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


class TestFamilies(EncoderContract):
    @pytest.fixture(
        scope="class",
        params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in FAMILIES],
    )
    @classmethod
    def model(cls, request):
        return request.param

    @pytest.fixture(scope="class")
    @classmethod
    def size(cls, model):
        return FAMILIES[model]


def test_enough_families_are_covered():
    from timm.models._registry import _model_to_module

    assert len({_model_to_module[name] for name in FAMILIES}) >= 60
