"""Defences that remove the image from its features: modules to deploy alone or in a chain.

A defence such as `create_defence("pca:8+int8", encoder.specs[0])` has two halves. `encode` runs beside the
encoder and returns the features that are sent or stored; `decode` runs before the rest of the network and
returns maps of the original shapes. `fit` measures the scales and directions that its parts need on features
of the user's images; they are buffers, so `state_dict` holds them.
"""

from afterimage.analysis.audit.defences.chain import DEFENCES, Defence, create_defence
