"""Frozen encoders, which normalise images themselves and run no deeper than needed, and their layers."""

from afterimage.models.encoders.encoder import Encoder
from afterimage.models.encoders.providers import open_network, resolve_source
from afterimage.models.encoders.tracing import layer_info, list_layers
