"""Where images come from: found, split, decoded once into a shared cache, cropped on the device."""

from afterimage.data.dataset import default_cache, file_notes, load_data, load_test, prepare_image
from afterimage.data.decode import load_image
from afterimage.data.images import Data, ImageSet
from afterimage.data.sampling import order
from afterimage.data.sources import SOURCES
