"""From a codec and the tensors it stored to a compiled product, where there is one.

Codecs have their makers in the modules ``leaves``, ``vectors``, ``gguf``, ``others`` and ``composed`` beside this. A
codec without one, or a shape that its product does not take, is decoded tile by tile as ever
(:mod:`tersor.runtime.packed`).
"""

from tersor.runtime.products import composed, gguf, leaves, others, vectors
from tersor.runtime.products.held import HeldProduct, decoded_only, input_bits, multiplied, takes
from tersor.runtime.products.stored import used_as_stored
from tersor.runtime.products.table import product_of

__all__ = [
    "HeldProduct",
    "composed",
    "decoded_only",
    "gguf",
    "input_bits",
    "leaves",
    "multiplied",
    "others",
    "product_of",
    "takes",
    "used_as_stored",
    "vectors",
]
