"""What hides an image in its features: modules that one can deploy, alone or one after another.

`create_defence("pca:8+int8", encoder.specs)` is two halves. `encode` runs beside the encoder and returns what is
sent or stored; `decode` runs where the network goes on and returns maps of the original shape. `fit` measures, on
images of one's own, the scales and directions that a part needs; they are buffers, so `state_dict` keeps them.
"""

from afterimage.analysis.audit.defences.chain import DEFENCES, Defence, create_defence

__all__ = ["DEFENCES", "Defence", "create_defence"]
