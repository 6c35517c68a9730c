"""What is done after rounding: encoded weights are tuned against what the original computes.

Nothing here knows codecs by name, or models; both are handed in.
"""

from tersor.recovery.blockwise import BlockTuning, Decode, Run, Tuned, tune_block
from tersor.recovery.tunable import FloatParts, RoundedGrid, RowGains, Tunable, as_tunable

__all__ = [
    "BlockTuning",
    "Decode",
    "FloatParts",
    "RoundedGrid",
    "RowGains",
    "Run",
    "Tunable",
    "Tuned",
    "as_tunable",
    "tune_block",
]
