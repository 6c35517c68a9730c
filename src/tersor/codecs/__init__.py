"""How a weight is represented. One file a representation; :func:`parse` reads their text form."""

from tersor.codecs.binary import BinaryPlanes
from tersor.codecs.block import Block
from tersor.codecs.by_weight import WeightSplit
from tersor.codecs.codebook import Codebook
from tersor.codecs.coded import Coded
from tersor.codecs.column_scale import ColumnScaled
from tersor.codecs.columns import ColumnSplit
from tersor.codecs.dense import Dense
from tersor.codecs.ectcq import EntropyCodedTrellis
from tersor.codecs.gguf_scalar import GgufScalar
from tersor.codecs.gguf_vector import GgufVector
from tersor.codecs.integer import Integer
from tersor.codecs.klt import PrincipalBasis
from tersor.codecs.lattice import E8P
from tersor.codecs.lookup import LookupTable
from tersor.codecs.low_rank import CodedLowRank, LowRank
from tersor.codecs.microscaling import MicroFloat
from tersor.codecs.nv_float import NvFloat
from tersor.codecs.pyramid import Pyramid
from tersor.codecs.rotated import Rotated
from tersor.codecs.row_float import RowFloat
from tersor.codecs.rows import RowStretches
from tersor.codecs.semi_structured import SemiStructured
from tersor.codecs.sign_magnitude import BitStack
from tersor.codecs.signed import SignedInteger
from tersor.codecs.small_float import SmallFloat
from tersor.codecs.sparse import Sparse
from tersor.codecs.ternary import Ternary
from tersor.codecs.text import parse, split
from tersor.codecs.total import Total
from tersor.codecs.trellis import Trellis

__all__ = [
    "E8P",
    "BinaryPlanes",
    "BitStack",
    "Block",
    "Codebook",
    "Coded",
    "CodedLowRank",
    "ColumnScaled",
    "ColumnSplit",
    "Dense",
    "EntropyCodedTrellis",
    "GgufScalar",
    "GgufVector",
    "Integer",
    "LookupTable",
    "LowRank",
    "MicroFloat",
    "NvFloat",
    "PrincipalBasis",
    "Pyramid",
    "Rotated",
    "RowFloat",
    "RowStretches",
    "SemiStructured",
    "SignedInteger",
    "SmallFloat",
    "Sparse",
    "Ternary",
    "Total",
    "Trellis",
    "WeightSplit",
    "parse",
    "split",
]
