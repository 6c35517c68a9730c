"""The operators that multiply by encoded weights and look rows of them up, in two kinds of file.

``MatMulNBits`` and ``GatherBlockQuantized`` are ONNX Runtime's own (domain ``com.microsoft``) and read our bytes as
they are. ``DequantizeLinear`` is standard ONNX (opset 21 for groups), for whatever runs QDQ graphs; its weights lie
``(in, out)``, the way in which ONNX Runtime recognises a product with a dequantized weight and fuses the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from tersor.contracts import Shape
from tersor.engines.onnx.layout import Grid, Pieces

DOMAIN = "com.microsoft"
ACCURACY = 1
"""``accuracy_level`` of products unless another is asked for: activations stay float32."""
INTEGERS = 4
"""That at which the runtime may round inputs to 8-bit integers; 0 is as it likes, 2 float16 and 3 bfloat16."""
_GROUPS = (16, 32, 64, 128, 256)

Values = Mapping[str, Any]
"""A layer's ``onnx_ir.Value``s by the names of :meth:`Operators.pieces`, scales already float32."""


class Operators(Protocol):
    """How a graph computes with layers on a :class:`~tersor.engines.onnx.layout.Grid`."""

    engine: str
    """Name of the engine that files with these operators are for."""
    opset: int
    """Version of the standard operators that is needed at least."""

    def refuses(self, grid: Grid, *, lookup: bool) -> str | None:
        """Why they cannot compute with this grid, or None.

        ``lookup``: not for products alone, but also for :meth:`look_up` or :meth:`whole`.
        """
        ...

    def pieces(self, grid: Grid, shape: Shape) -> Pieces:
        """Dtypes and shapes of a layer's tensors in the file, by name."""
        ...

    def arrange(self, grid: Grid, pieces: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        """Tensors as the codec has them (``layout.take_apart``) to those of the file."""
        ...

    def restore(self, grid: Grid, tensors: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        """The inverse of :meth:`arrange`."""
        ...

    def multiply(self, grid: Grid, shape: Shape, values: Values, inputs: Any) -> list[Any]:
        """Nodes for ``inputs @ weight.T``; the last one's output is the product."""
        ...

    def look_up(self, grid: Grid, shape: Shape, values: Values, ids: Any) -> list[Any]:
        """Nodes for ``weight[ids]``; the last one's output has the rows."""
        ...

    def whole(self, grid: Grid, shape: Shape, values: Values) -> list[Any]:
        """Nodes for ``weight`` itself, for what takes no other form; the last one's output is it."""
        ...


class NBits:
    """ONNX Runtime's operators for integers of 2, 4 or 8 bits in groups.

    ``accuracy``: in what arithmetic products may be computed at least, 0 to :data:`INTEGERS`.
    """

    engine = "onnx"
    opset = 20

    def __init__(self, accuracy: int = ACCURACY) -> None:
        self.accuracy = accuracy

    def refuses(self, grid: Grid, *, lookup: bool) -> str | None:
        if grid.bits not in (2, 4, 8):
            return f"its operators read 2, 4 or 8 bits, not {grid.bits}"
        if grid.group not in _GROUPS:
            found = "whole rows" if grid.group is None else f"groups of {grid.group}"
            return f"its operators read groups of {', '.join(map(str, _GROUPS))}, not {found}"
        if grid.zero == "half" and grid.bits == 8:
            return "its operators read 8-bit codes with whole zeros only; add :asym"
        if grid.zero == "half" and lookup:
            return "its look-ups read codes with whole zeros only; add :asym"
        return None

    def pieces(self, grid: Grid, shape: Shape) -> Pieces:
        found = grid.pieces(shape)
        groups = grid.groups(shape[1])
        dtype, (rows, width) = found["codes"]
        return {**found, "codes": (dtype, (rows, groups, width // groups))}

    def arrange(self, grid: Grid, pieces: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        return {name: pieces[name].reshape(size) for name, (_, size) in self.pieces(grid, shape).items()}

    def restore(self, grid: Grid, tensors: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        return {name: tensors[name].reshape(size) for name, (_, size) in grid.pieces(shape).items()}

    def multiply(self, grid: Grid, shape: Shape, values: Values, inputs: Any) -> list[Any]:
        import onnx_ir

        nodes = []
        operands = [inputs, values["codes"], values["scale"]]
        if grid.zero == "stored":
            operands.append(values["zero"])
        elif grid.zero == "half":
            # A float zero for each group, which the runtime makes once when it opens the file.
            nodes = _filled((shape[0], grid.groups(shape[1])), (2**grid.bits - 1) / 2, torch.float32)
            operands.append(nodes[-1].outputs[0])
        attributes = {"K": shape[1], "N": shape[0], "bits": grid.bits, "block_size": grid.group}
        attributes["accuracy_level"] = self.accuracy
        return [*nodes, onnx_ir.node("MatMulNBits", operands, attributes, domain=DOMAIN)]

    def look_up(self, grid: Grid, shape: Shape, values: Values, ids: Any) -> list[Any]:
        import onnx_ir

        rows = constant(torch.tensor([shape[0], -1]))
        flat = onnx_ir.node("Reshape", [values["codes"], rows.outputs[0]])
        operands = [flat.outputs[0], ids, values["scale"], *([values["zero"]] if grid.zero == "stored" else [])]
        attributes = {"bits": grid.bits, "block_size": grid.group, "gather_axis": 0, "quantize_axis": 1}
        return [rows, flat, onnx_ir.node("GatherBlockQuantized", operands, attributes, domain=DOMAIN)]

    def whole(self, grid: Grid, shape: Shape, values: Values) -> list[Any]:
        """All rows, looked up."""
        import onnx_ir

        ends = [constant(torch.tensor(number)) for number in (0, shape[0], 1)]
        every = onnx_ir.node("Range", [end.outputs[0] for end in ends])
        return [*ends, every, *self.look_up(grid, shape, values, every.outputs[0])]


class Qdq:
    """Standard ``DequantizeLinear`` before a plain product, for 8 bits."""

    engine = "onnx-qdq"
    opset = 21

    def refuses(self, grid: Grid, *, lookup: bool) -> str | None:
        if grid.bits != 8:
            return f"QDQ files hold 8 bits, not {grid.bits}"
        if grid.zero == "half":
            return "DequantizeLinear reads codes with whole zeros only; add :asym"
        return None

    def pieces(self, grid: Grid, shape: Shape) -> Pieces:
        found: Pieces = {name: (dtype, (size[1], size[0])) for name, (dtype, size) in grid.pieces(shape).items()}
        if grid.group is None:
            found |= {name: (found[name][0], (shape[0],)) for name in ("scale", "zero") if name in found}
        return found

    def arrange(self, grid: Grid, pieces: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        wanted = self.pieces(grid, shape)
        return {name: tensor.T.contiguous().reshape(wanted[name][1]) for name, tensor in pieces.items()}

    def restore(self, grid: Grid, tensors: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
        return {name: tensors[name].reshape(-1, shape[0]).T.contiguous() for name in grid.pieces(shape)}

    def multiply(self, grid: Grid, shape: Shape, values: Values, inputs: Any) -> list[Any]:
        import onnx_ir

        made = self._weight(grid, shape, values)
        return [*made, onnx_ir.node("MatMul", [inputs, made[-1].outputs[0]])]

    def whole(self, grid: Grid, shape: Shape, values: Values) -> list[Any]:
        import onnx_ir

        made = self._weight(grid, shape, values)
        return [*made, onnx_ir.node("Transpose", [made[-1].outputs[0]], {"perm": [1, 0]})]

    def _weight(self, grid: Grid, shape: Shape, values: Values) -> list[Any]:
        """Nodes for the weight as it lies, ``(in, out)``."""
        import onnx_ir

        *made, zero = self._zero(grid, shape, values)
        how = {"axis": 1} if grid.group is None else {"axis": 0, "block_size": grid.group}
        return [*made, onnx_ir.node("DequantizeLinear", [values["codes"], values["scale"], zero], how)]

    def look_up(self, grid: Grid, shape: Shape, values: Values, ids: Any) -> list[Any]:
        """Columns ``(in, …)`` of codes, and of their scales and zeros, dequantized and turned to ``(…, in)``."""
        import onnx_ir

        *made, zero = self._zero(grid, shape, values)
        axis = 0 if grid.group is None else 1
        codes = onnx_ir.node("Gather", [values["codes"], ids], {"axis": 1})
        side = [onnx_ir.node("Gather", [one, ids], {"axis": axis}) for one in (values["scale"], zero)]
        if grid.group is None:
            # One scale for each looked-up column: product and difference, as DequantizeLinear has one axis only.
            cast = onnx_ir.node("Cast", [codes.outputs[0]], {"to": int(onnx_ir.DataType.FLOAT)})
            low = onnx_ir.node("Cast", [side[1].outputs[0]], {"to": int(onnx_ir.DataType.FLOAT)})
            shifted = onnx_ir.node("Sub", [cast.outputs[0], low.outputs[0]])
            found = [cast, low, shifted, onnx_ir.node("Mul", [shifted.outputs[0], side[0].outputs[0]])]
        else:
            operands = [codes.outputs[0], side[0].outputs[0], side[1].outputs[0]]
            found = [onnx_ir.node("DequantizeLinear", operands, {"axis": 0, "block_size": grid.group})]
        turned = onnx_ir.node("Transpose", [found[-1].outputs[0]], {"perm": [1, 2, 0]})
        return [*made, codes, *side, *found, turned]

    def _zero(self, grid: Grid, shape: Shape, values: Values) -> list[Any]:
        """Nodes that make the zeros, and then the value that they are in."""
        if grid.zero == "stored":
            return [values["zero"]]
        nodes = _filled(self.pieces(grid, shape)["scale"][1], 2 ** (grid.bits - 1), torch.uint8)
        return [*nodes, nodes[-1].outputs[0]]


def round_groups(group: int, x: Tensor) -> Tensor:
    """``x (..., in)`` as ONNX Runtime's products with integers have it: 8 bits, a scale for every ``group`` inputs."""
    parts = x.reshape(*x.shape[:-1], -1, group)
    scale = parts.abs().amax(-1, keepdim=True) / 127
    codes = (parts * torch.where(scale == 0, 0.0, 1 / scale)).round()
    return (codes * scale).reshape(x.shape)


def constant(value: Tensor) -> Any:
    import onnx_ir

    return onnx_ir.node("Constant", [], {"value": onnx_ir.tensor(value.numpy())})


def _filled(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> list[Any]:
    """Nodes for a tensor that is ``value`` everywhere."""
    import onnx_ir

    size = constant(torch.tensor(shape))
    fill = onnx_ir.tensor(torch.tensor([value], dtype=dtype).numpy())
    return [size, onnx_ir.node("ConstantOfShape", [size.outputs[0]], {"value": fill})]
