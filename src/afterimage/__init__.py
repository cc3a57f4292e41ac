"""How much of a picture is left in the features of a frozen vision encoder?

Names are imported when they are first used, so that the command line and reports start without torch.
"""

import os
import sys
import types

import lazy_loader

# OpenMP reads them when torch is loaded. By default a thread that waits for others keeps its core busy, which takes
# time from those others wherever cores are shared: with another program, or as halves of one. Some microseconds of it
# pay: work in many small steps is not slowed by going to sleep after each.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": [
            "AfterimageError",
            "DataConfig",
            "DecoderConfig",
            "FeatureSpec",
            "FusionConfig",
            "RecipeConfig",
            "RunConfig",
        ],
        "data": ["Data", "Pictures", "load_data", "load_picture"],
        "decoders": ["DECODERS", "Decoder", "create_decoder"],
        "encoders": ["Encoder", "list_layers"],
        "evaluate": ["evaluate", "summarise"],
        "jobs": ["train_runs"],
        "losses": ["create_loss"],
        "metrics": ["Metrics", "psnr", "ssim"],
        "reconstructor": ["Encoders", "Reconstructor"],
        "report": ["write_report"],
        "runs": ["Run", "scan"],
        "study": ["StudyConfig", "load_study", "run_study"],
        "train": ["train"],
    },
)


class _Package(types.ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing the module `train` must not hide the function `train`; likewise `evaluate`.
        if name in ("train", "evaluate") and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
