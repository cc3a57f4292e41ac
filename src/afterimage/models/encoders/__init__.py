"""Frozen encoders that normalise images themselves and run only as deep as needed, and the list of their layers."""

from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.layers import early_end, layer_info, list_layers
from afterimage.models.encoders.providers import open_network, resolve
