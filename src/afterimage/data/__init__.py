"""Load images: find, split, check and decode them, and return crops in [0, 1]."""

from afterimage.data.dataset import load_data
from afterimage.data.decode import load_image
from afterimage.data.images import Data, ImageSet
