"""Colour photographs of the installed scikit-image; nothing is downloaded.

They are by NASA (astronaut, Hubble deep field), S. van der Walt (cat), R. Michetti (coffee), Middlebury College
(motorcycle) and SpaceX (rocket); two more show a retina and a tissue section. scikit-image documents their origins.
Only the left image of the motorcycle's stereo pair is used: the right one is nearly the same.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from afterimage.config import AfterimageError, printable_path
from afterimage.data.originals import FileOriginal, PartOriginal
from afterimage.data.sampling import Source

# Id, file, and the columns and rows of the grid of parts; 1 x 1 means no parts.
_PHOTOGRAPHS = (
    ("astronaut", "astronaut.png", 2, 2),
    ("cat", "chelsea.png", 1, 1),
    ("coffee", "coffee.png", 2, 1),
    ("deep-field", "hubble_deep_field.jpg", 1, 1),
    ("motorcycle", "motorcycle_left.png", 2, 1),
    ("retina", "retina.jpg", 1, 1),
    ("rocket", "rocket.jpg", 2, 1),
    ("tissue", "ihc.png", 1, 1),
)


def read_photographs() -> Source:
    """List eight whole photographs and ten parts of four of them: 18 images.

    A part is a half or a quarter of a photograph at a larger scale. All images of one photograph stay in one split.

    Raises:
        AfterimageError: scikit-image is missing, or does not carry a photograph
    """
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise AfterimageError("the source 'photographs' needs scikit-image: pip install scikit-image")
    folder = Path(spec.origin).parent / "data"
    found: list[FileOriginal | PartOriginal] = []
    for name, file, columns, rows in _PHOTOGRAPHS:
        if not (folder / file).is_file():
            raise AfterimageError(
                f"the installed scikit-image does not carry {printable_path(folder / file)}; install 0.22 or newer"
            )
        found.append(whole := FileOriginal(name, folder, file))
        for part in range(columns * rows if columns * rows > 1 else 0):
            cell = (part % columns, part // columns, columns, rows)
            found.append(PartOriginal(f"{name}-part-{part + 1}", whole, cell))
    return Source(found, root=folder)


def whole_photographs() -> list[Path]:
    """Return the files of the eight photographs, those of everyday scenes first.

    Raises:
        AfterimageError: as `read_photographs`
    """
    everyday = ("astronaut", "cat", "coffee", "rocket", "motorcycle")
    whole = [one for one in read_photographs().train if isinstance(one, FileOriginal)]
    return [one.path for one in sorted(whole, key=lambda one: one.id not in everyday)]
