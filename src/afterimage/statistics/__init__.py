"""Confidence intervals, paired comparisons and the study's hypotheses, from per-picture scores. No torch.

`analyse(runs)` answers everything; `in_words(result)` says it, or any part of it, in paragraphs.
"""

from afterimage.statistics.analysis import Analysis, analyse, as_json
from afterimage.statistics.architectures import Architectures, architectures_differ
from afterimage.statistics.bootstrap import Interval, mean_interval
from afterimage.statistics.compare import Comparison, compare, corrected
from afterimage.statistics.depth import Depth, DepthOfEncoder, falls_with_depth
from afterimage.statistics.ranking import (
    DecoderRanking,
    Degradation,
    Efficiency,
    Score,
    decoders,
    degradation,
    efficiency,
    fusions,
    scores,
)
from afterimage.statistics.ranks import holm, spearman, spearman_p
from afterimage.statistics.resolution import MatchedPair, Resolution, resolution_dominates
from afterimage.statistics.rows import HIGHER_IS_BETTER, METRICS, NEGLIGIBLE, Row, load_rows
from afterimage.statistics.words import in_words

__all__ = [
    "HIGHER_IS_BETTER",
    "METRICS",
    "NEGLIGIBLE",
    "Analysis",
    "Architectures",
    "Comparison",
    "DecoderRanking",
    "Degradation",
    "Depth",
    "DepthOfEncoder",
    "Efficiency",
    "Interval",
    "MatchedPair",
    "Resolution",
    "Row",
    "Score",
    "analyse",
    "architectures_differ",
    "as_json",
    "compare",
    "corrected",
    "decoders",
    "degradation",
    "efficiency",
    "falls_with_depth",
    "fusions",
    "holm",
    "in_words",
    "load_rows",
    "mean_interval",
    "resolution_dominates",
    "scores",
    "spearman",
    "spearman_p",
]
