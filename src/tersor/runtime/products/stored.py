"""Which codecs' products work on the stored tensors themselves, and keep no copy of codes in another form."""

from __future__ import annotations

from tersor.codecs import (
    E8P,
    Codebook,
    ColumnScaled,
    Dense,
    GgufVector,
    Integer,
    LookupTable,
    MicroFloat,
    NvFloat,
    PrincipalBasis,
    Rotated,
    RowFloat,
    RowStretches,
    SignedInteger,
    SmallFloat,
    Trellis,
)
from tersor.contracts import Codec

_LEAVES = (
    Codebook,
    Dense,
    E8P,
    GgufVector,
    Integer,
    LookupTable,
    MicroFloat,
    NvFloat,
    RowFloat,
    SignedInteger,
    SmallFloat,
    Trellis,
)


def used_as_stored(codec: Codec) -> bool:
    """Whether the codec's product multiplies by the stored tensors where they lie, so that making it takes no time."""
    if isinstance(codec, RowStretches):
        return all(used_as_stored(inner) for inner in codec.codecs)
    if isinstance(codec, (Rotated, PrincipalBasis, ColumnScaled)):
        return used_as_stored(codec.inner)
    if isinstance(codec, LookupTable) and codec.group is not None:
        return False
    return isinstance(codec, _LEAVES)
