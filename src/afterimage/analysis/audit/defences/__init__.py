"""Defences that hide an image in its features: modules to deploy alone or in a chain.

`create_defence("pca:8+int8", encoder.specs)` has two halves. `encode` runs beside the encoder and returns the
features that are sent or stored; `decode` runs before the rest of the network and returns maps of the original
shape. `fit` measures the scales and directions that a part needs on images of the user's; they are buffers, so
`state_dict` keeps them.
"""

from afterimage.analysis.audit.defences.chain import DEFENCES, Defence, create_defence
