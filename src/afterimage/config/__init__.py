"""What a run, a study, an inversion and an audit are: frozen dataclasses, strict TOML, content hashes. No torch."""

from afterimage.config.errors import MAX_NAME, AfterimageError, shown, unknown
from afterimage.config.paths import absolute_path, absolute_source, local_path
from afterimage.config.schema import (
    HUB_PREFIX,
    LOSS_NAMES,
    LPIPS_NETS,
    LPIPS_SMALLEST,
    MAX_BATCH,
    MAX_CHANNELS,
    MAX_EPOCHS,
    MAX_PICTURES,
    MAX_PROCESSES,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    PRECISIONS,
    RANDOM_WEIGHTS,
    SSIM_WINDOW,
    WEIGHTS,
    Axis,
    DataConfig,
    DecoderConfig,
    FeatureSpec,
    FusionConfig,
    RecipeConfig,
    ReferenceConfig,
    RunConfig,
    absolute_weights,
    check_positive,
    check_range,
    check_seed,
    folder_name,
    parse_loss,
    settings_digest,
    split_source,
    utf8_path,
)
from afterimage.config.toml import (
    MAX_PARAMETERS,
    MAX_TEXT,
    Count,
    dump_toml,
    from_dict,
    load_toml,
    parse_count,
    read_text,
    to_dict,
)

__all__ = ["HUB_PREFIX", "LOSS_NAMES", "LPIPS_NETS", "LPIPS_SMALLEST", "MAX_BATCH", "MAX_CHANNELS", "MAX_EPOCHS", "MAX_NAME", "MAX_PARAMETERS", "MAX_PICTURES", "MAX_PROCESSES", "MAX_SEED", "MAX_SIDE", "MAX_STEPS", "MAX_TEXT", "PRECISIONS", "RANDOM_WEIGHTS", "SSIM_WINDOW", "WEIGHTS", "AfterimageError", "Axis", "Count", "DataConfig", "DecoderConfig", "FeatureSpec", "FusionConfig", "RecipeConfig", "ReferenceConfig", "RunConfig", "absolute_path", "absolute_source", "absolute_weights", "check_positive", "check_range", "check_seed", "dump_toml", "folder_name", "from_dict", "load_toml", "local_path", "parse_count", "parse_loss", "read_text", "settings_digest", "shown", "split_source", "to_dict", "unknown", "utf8_path"]
