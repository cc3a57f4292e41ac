"""Library and tool to measure how much of an image is left in the features of a frozen vision encoder.

Names are imported lazily, on first use, so that the command line and reports start without torch.
"""

import lazy_loader

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
        "data": ["Data", "ImageSet", "load_data", "load_image"],
        "models.decoders": ["DECODERS", "Decoder", "create_decoder"],
        "models.encoders": ["Encoder", "list_layers"],
        "evaluation.evaluate": ["evaluate", "summarise"],
        "experiments.queue": ["train_runs"],
        "training.losses": ["create_loss"],
        "evaluation.metrics": ["Metrics", "psnr", "ssim"],
        "models.reconstructor": ["MultiEncoder", "Reconstructor"],
        "report": ["write_report"],
        "runs.run": ["Run", "scan"],
        "config.study": ["StudyConfig", "load_study"],
        "experiments.study": ["run_study"],
        "runtime.process": ["let_idle_threads_sleep"],
        "training.checkpoint": ["load_reconstructor"],
        "training.trainer": ["train"],
    },
)
