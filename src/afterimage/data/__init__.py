"""Images in, crops in [0, 1] out: find, split and check them, decode them once, crop them on the device."""

from afterimage.data.dataset import load_data
from afterimage.data.decode import load_image
from afterimage.data.images import Data, ImageSet
