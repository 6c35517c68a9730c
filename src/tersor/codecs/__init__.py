"""How a weight is represented. One file a representation; :func:`parse` reads their text form."""

from tersor.codecs.dense import Dense
from tersor.codecs.integer import Integer
from tersor.codecs.lookup import LookupTable
from tersor.codecs.rows import RowStretches
from tersor.codecs.small_float import SmallFloat
from tersor.codecs.text import parse, split

__all__ = ["Dense", "Integer", "LookupTable", "RowStretches", "SmallFloat", "parse", "split"]
