"""How a weight is represented. One file a representation; :func:`parse` reads their text form."""

from tersor.codecs.dense import Dense
from tersor.codecs.integer import Integer
from tersor.codecs.lookup import LookupTable
from tersor.codecs.low_rank import LowRank
from tersor.codecs.rotated import Rotated
from tersor.codecs.rows import RowStretches
from tersor.codecs.small_float import SmallFloat
from tersor.codecs.sparse import Sparse
from tersor.codecs.text import parse, split
from tersor.codecs.total import Total

__all__ = [
    "Dense",
    "Integer",
    "LookupTable",
    "LowRank",
    "Rotated",
    "RowStretches",
    "SmallFloat",
    "Sparse",
    "Total",
    "parse",
    "split",
]
