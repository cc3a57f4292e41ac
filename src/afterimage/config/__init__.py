"""Frozen dataclasses that describe runs, studies, inversions and audits, with strict TOML and content hashes.

No torch.
"""

from afterimage.config.errors import (
    MAX_NAME,
    MAX_SEED,
    AfterimageError,
    check_positive,
    check_range,
    check_seed,
    first_line,
    listed,
    shown,
    unknown,
)
from afterimage.config.paths import absolute_path, absolute_source, local_path, utf8_path
from afterimage.config.schema import (
    HUB_PREFIX,
    LOSS_NAMES,
    LPIPS_NETS,
    LPIPS_SMALLEST,
    MAX_BATCH,
    MAX_CHANNELS,
    MAX_EPOCHS,
    MAX_IMAGES,
    MAX_PROCESSES,
    MAX_SIDE,
    MAX_STEPS,
    PRECISIONS,
    PROVIDERS,
    RANDOM_WEIGHTS,
    SSIM_WINDOW,
    WEIGHTS,
    Axis,
    BaselineConfig,
    DataConfig,
    DecoderConfig,
    FeatureSpec,
    FusionConfig,
    RecipeConfig,
    RunConfig,
    absolute_model,
    absolute_weights,
    folder_name,
    parse_loss,
    settings_digest,
    split_provider,
    split_source,
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
