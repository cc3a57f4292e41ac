"""What a decoder's scores are held against: reference lines, features that are not the picture's, rates, and twins."""

from afterimage.controls.measure import PARTS, run_controls
from afterimage.controls.references import REFERENCES, information, label, reference, run_references
from afterimage.controls.twins import with_twins

__all__ = [
    "PARTS",
    "REFERENCES",
    "information",
    "label",
    "reference",
    "run_controls",
    "run_references",
    "with_twins",
]
