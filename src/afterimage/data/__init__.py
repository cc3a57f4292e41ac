"""Where pictures come from: found, split, decoded once into a shared cache, cropped on the device."""

from afterimage.data.dataset import default_cache, file_notes, load_data, load_test, prepare_picture
from afterimage.data.decode import load_picture
from afterimage.data.images import Data, Pictures
from afterimage.data.sampling import order
from afterimage.data.sources import SOURCES

__all__ = [
    "SOURCES",
    "Data",
    "Pictures",
    "default_cache",
    "file_notes",
    "load_data",
    "load_picture",
    "load_test",
    "order",
    "prepare_picture",
]
