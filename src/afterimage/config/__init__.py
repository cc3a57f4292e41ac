"""Frozen dataclasses that describe runs, studies, inversions and audits, with strict TOML and content hashes.

No torch.
"""

from afterimage.config.errors import (
    MAX_BATCH,
    MAX_IMAGES,
    MAX_PROCESSES,
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    AfterimageError,
    check_choice,
    check_positive,
    check_range,
    first_line,
    format_count,
    join_names,
    printable_path,
    unknown_choice_error,
)
from afterimage.config.images import NATIVE, PROTOCOLS, SSIM_WINDOW, DataConfig, size_pair, size_text
from afterimage.config.names import (
    HUB_PREFIX,
    PROVIDERS,
    RANDOM_WEIGHTS,
    WEIGHTS,
    absolute_model,
    absolute_path,
    absolute_source,
    absolute_weights,
    local_path,
    short_names,
    split_provider,
    split_source,
    utf8_path,
)
from afterimage.config.schema import (
    LOSS_NAMES,
    LPIPS_MIN_SIDE,
    LPIPS_NETS,
    Axis,
    BaselineConfig,
    DecoderConfig,
    FeaturesConfig,
    FeatureSpec,
    FusionConfig,
    RecipeConfig,
    RunConfig,
    parse_loss,
)
from afterimage.config.toml import (
    MAX_PARAMETERS,
    Count,
    dump_toml,
    from_dict,
    load_toml,
    parse_count,
    read_text,
    to_dict,
)
