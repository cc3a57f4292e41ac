"""Inversion by optimising the picture itself, from scratch or from a decoder's answer."""

from afterimage.invert.config import METHODS, OPTIMIZERS, InvertConfig
from afterimage.invert.objective import alpha_norm, feature_distance, total_variation
from afterimage.invert.optimise import Inversion, Look, invert
from afterimage.invert.refine import differentiable, refine

__all__ = [
    "METHODS",
    "OPTIMIZERS",
    "Inversion",
    "InvertConfig",
    "Look",
    "alpha_norm",
    "differentiable",
    "feature_distance",
    "invert",
    "refine",
    "total_variation",
]
