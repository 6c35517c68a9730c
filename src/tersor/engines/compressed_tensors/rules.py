"""What engines that read compressed-tensors can and cannot do with a layer, as checks before any work."""

from __future__ import annotations

from collections.abc import Sequence

from tersor.codecs import Integer, SignedInteger
from tersor.codecs.grouped import GroupedScalar
from tersor.contracts import Anatomy, Codec, Layer
from tersor.engines.compressed_tensors.forms import DENSE, TEXTS, form_of
from tersor.errors import BadInput

_INWARD = (
    *("o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "out_lin", "lin2"),
    *("wo", "w2"),
)
"""Last part of the name of layers that engines split along their inputs, where the model's structure does not show it:
those that write into the residual stream. All others are split along their outputs."""
_PACKED = "pack-quantized"
"""The layout whose codes lie in words of 32 bits, which splitting must not tear apart."""
_STACKED = "gate_up_proj"
"""Last part of the name of layers with two matrices of experts, one below the other."""
_WORD = 32


def candidates(effort: str) -> tuple[str, ...]:
    """Codecs to choose from: symmetric ones, which all three engines run with their fastest kernels."""
    quick = tuple(f"sint4:g{group}:bf16" for group in (128, 64, 32))
    return (
        (*quick, "sint8:row:bf16", DENSE) if effort == "fast" else (*quick, "sint8:g128:bf16", "sint8:row:bf16", DENSE)
    )


def check(texts: Sequence[str]) -> None:
    """Raise BadInput for a codec that has no form in compressed-tensors."""
    for text in texts:
        if text not in TEXTS:
            raise BadInput(f"compressed-tensors cannot run {text}; for it, choose among {', '.join(TEXTS)}.")


def together(layer: Layer) -> str | None:
    """q, k and v are one product in these engines, gate and up another; transformers reads experts by one scheme."""
    return "experts" if layer.kind == "experts" else layer.fused if layer.kind == "linear" else None


def shuns(layer: Layer, codec: Codec) -> bool:
    """Experts in bf16: transformers (5.23) unpacks all experts of such a folder, and fails where they are plain."""
    return layer.kind == "experts" and str(codec) == DENSE


def warns(layer: Layer, codec: Codec) -> str | None:
    """What is to be said of a layer in a codec that transformers (5.23, with the library 0.20) does not load."""
    if shuns(layer, codec):
        return (
            "transformers 5.23 loads packed experts only; vLLM's reader takes these from the files as they are, which "
            "is not proven here"
        )
    if isinstance(codec, Integer):
        return (
            "transformers 5.23 with compressed-tensors 0.20 loads no folder with zero points, so that its proof is by "
            "the library alone; vLLM's schema has them, which is not proven here"
        )
    return None


def refuses(anatomy: Anatomy, layer: Layer, codec: Codec, ranks: int) -> str | None:
    """Why a layer cannot have a codec when it is split over ``ranks`` processors; None where it can."""
    if str(codec) == DENSE:
        return None
    if layer.kind == "experts" and not (isinstance(codec, SignedInteger) and codec.activations == 16):
        return "transformers unpacks experts from sint4 and sint8 without rounded inputs alone"
    return _not_a_layer(anatomy, layer) or _badly_split(layer, codec, ranks)


def _not_a_layer(anatomy: Anatomy, layer: Layer) -> str | None:
    if layer.kind == "embedding":
        return "its engines look up the rows of an embedding as they are, in bf16"
    if layer.name == anatomy.head or layer.block is None:
        return "its engines compute the head in bf16"
    if layer.kind == "conv1d":
        return "it has no form for weights that a model stores transposed"
    return None


def _badly_split(layer: Layer, codec: Codec, ranks: int) -> str | None:
    rows, columns = layer.shape
    if layer.name.endswith(_STACKED):
        rows //= 2
    inward = layer.name.rpartition(".")[2] in _INWARD if layer.writes is None else layer.writes
    size, what = (columns, "inputs") if inward else (rows, "outputs")
    if size % ranks:
        return f"its {size} {what} cannot be split over {ranks} processors"
    share = size // ranks
    split = f"{what} split over {ranks} processors leave {share} each, which"
    wide, high = (share, rows) if inward else (columns, share)
    group = codec.group if isinstance(codec, GroupedScalar) else None
    if group is not None and wide % group:
        alone = f"groups of {group} do not divide its {columns} inputs"
        return f"its {columns} {split} groups of {group} do not divide" if inward and ranks > 1 else alone
    form = form_of(str(codec))
    if not isinstance(codec, Integer | SignedInteger) or form is None or form.format != _PACKED:
        return None
    word = _WORD // codec.bits_per_code
    if wide % word:
        alone = f"words of {word} codes do not divide its {columns} inputs"
        return f"its {columns} {split} words of {word} codes do not divide" if inward and ranks > 1 else alone
    if isinstance(codec, Integer) and high % word:
        alone = f"words of {word} zero points do not divide its {rows} outputs"
        return f"its {rows} {split} words of {word} zero points do not divide" if not inward and ranks > 1 else alone
    return None
