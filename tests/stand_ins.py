"""Decoders, fusions, losses and encoders that raise at a chosen moment; each inherits from a real one."""

from pathlib import Path

import torch

from afterimage.models.decoders.linear import LinearDecoder
from afterimage.models.decoders.wavelet import WaveletDecoder
from afterimage.models.encoders.encoder import Encoder
from afterimage.models.fusion import ConcatFusion, StackedFusion
from afterimage.training.losses import MSE

TESTS = str(Path(__file__).parent)


class Raises(torch.autograd.Function):
    """The identity, whose backward pass raises."""

    @staticmethod
    def forward(ctx, maps, error):
        ctx.error = error
        return maps.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error


def moment(module):
    """Which of the moments in a run's life a forward pass belongs to."""
    if module.training:
        return "step"
    return "test" if torch.is_inference_mode_enabled() else "validation"


def decoder(when, error, base=WaveletDecoder):
    """A decoder that raises `error` when it is built, stepped (`step 6`), validated, tested and so on."""
    name, _, number = when.partition(" ")

    class Broken(base):
        seen = 0

        def __init__(self, specs, image_size):
            super().__init__(specs, image_size)
            self._at("build")

        def _at(self, what):
            if what == name:
                self.seen += 1
                if self.seen >= int(number or 1):
                    raise error

        def decode(self, features, *window):
            self._at(moment(self))
            pixels = super().decode(features, *window)
            return Raises.apply(pixels, error) if self.training and name == "backward" else pixels

        def train(self, mode=True):
            self._at("mode")
            return super().train(mode)

        def stepped(self):
            self._at("stepped")

        def prepare(self, *arguments):
            self._at("prepare")
            return super().prepare(*arguments)

        def accumulate(self, features, images, *, validation=False):
            self._at("hold" if validation else "accumulate")
            super().accumulate(features, images, validation=validation)

        def solve(self):
            self._at("solve")
            return super().solve()

    return Broken


def closed_form(when, error):
    return decoder(when, error, LinearDecoder)


def fusion(when, error):
    """A fusion that raises `error` in its forward pass (`step`), or where it is solved."""
    base = StackedFusion if when == "solve" else ConcatFusion

    class Broken(base):
        def forward(self, features):
            if when == moment(self):
                raise error
            return super().forward(features)

        def solve(self):
            raise error

    return Broken


def loss(error):
    class Broken(MSE):
        def per_image(self, prediction, target):
            raise error

    return Broken


def break_encoders(patch, layer, error, *, above=0, build=False):
    """Encoders that read a layer raise `error` on more than so many images, or where they are built."""
    forward, start = Encoder.forward, Encoder.__init__

    def reads(encoder):
        return any(source.endswith(layer) for source in encoder.sources)

    def failing(self, images):
        if not build and reads(self) and len(images) > above:
            raise error
        return forward(self, images)

    def starting(self, *arguments, **options):
        start(self, *arguments, **options)
        if build and reads(self):
            raise error

    patch.setattr(Encoder, "forward", failing)
    patch.setattr(Encoder, "__init__", starting)


def train_broken_group(order, post, checkpoints):
    """What runs on a Ray worker, with a decoder there that raises, and with groups that raise themselves.

    It travels by value, so it finds everything itself.
    """
    import sys

    sys.path.insert(0, TESTS)
    from stand_ins import decoder

    from afterimage.experiments.ray.worker import train_group
    from afterimage.models.decoders import DECODERS

    if any("vit" in config.name for config in order.configs):
        raise KeyError("a worker's own bug")
    DECODERS["broken"] = decoder("step 6", IndexError("a decoder's own bug"))
    return train_group(order, post, checkpoints)
