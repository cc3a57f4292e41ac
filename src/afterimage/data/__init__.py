"""Images in, crops in [0, 1] out: find, split and check them, decode them once, crop them on the device."""

from afterimage.data.dataset import default_cache, file_notes, load_data, load_test, prepare_image
from afterimage.data.decode import load_image
from afterimage.data.images import Data, ImageSet
from afterimage.data.sampling import order
from afterimage.data.sources import SOURCES
