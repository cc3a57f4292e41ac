"""Encoder: any timm model, frozen, normalises inside, runs only as deep as asked; list_layers()."""

from afterimage.encoders.encoder import Encoder
from afterimage.encoders.layers import LayerInfo, early_end, layer_info, list_layers
from afterimage.encoders.names import resolve, resolve_model

__all__ = ["Encoder", "LayerInfo", "early_end", "layer_info", "list_layers", "resolve", "resolve_model"]
