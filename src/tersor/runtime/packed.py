"""Modules that hold a weight as its codec's stored tensors, and multiply by it as it is stored or decode it by tiles.

Where the codec has a compiled product (:mod:`tersor.runtime.products`), inputs on the processor that no gradient is
asked for are multiplied by that. All else decodes a tile of rows whenever it is used.

The stored tensors ("parts") are buffers under their own names and keep their dtype whatever the model is cast to.
At most ``TILE_BYTES`` of float32 weight exist at a time, so a packed model needs little more memory than its file.
A weight that is one stream is decoded when it is first used and kept in the module's dtype: it is small on disk only.

An ordinary module is turned into a packed one in place (:func:`adopt`), so that its other attributes, its bias and
what a subclass adds in its own ``forward`` (a scaled embedding, say) stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.codecs.inner import streamed
from tersor.contracts import Codec, Shape
from tersor.errors import BadInput, UnknownArchitecture
from tersor.kernels.products import Product, read_rows
from tersor.runtime import operators
from tersor.runtime.products import HeldProduct, multiplied, takes, used_as_stored

# Decoding needs several times this for a moment. 1 MiB was as fast as 4 MiB or faster on every codec measured.
TILE_BYTES = 1 << 20
_TILE_STEP = 8


class Packed(nn.Module):
    """What packed modules have in common: the parts as buffers, and decoding of rows.

    ``stored_shape``: ``(out, in)`` as the codec sees it. ``dtype``: what the weight counts as for the rest of the
    model, and the dtype of what is looked up; it follows ``module.to(dtype)``, the parts do not.
    """

    codec: Codec
    stored_shape: Shape
    part_names: tuple[str, ...]
    streamed: bool
    dtype: torch.dtype
    plain: ClassVar[type[nn.Module]] = nn.Module
    bias: nn.Parameter | None

    def hold(self, codec: Codec, shape: Shape, dtype: torch.dtype, device: torch.device | str | None) -> None:
        """Make room for the parts of a weight ``shape``. Raises ShapeMismatch when the codec cannot take it."""
        parts = codec.parts(shape)
        self.codec, self.stored_shape, self.dtype = codec, shape, dtype
        self.part_names = tuple(part.name for part in parts)
        self.streamed = streamed(codec, shape)
        self._whole: tuple[object, Tensor] | None = None
        self._product = HeldProduct()
        self.handle = operators.enter(self)
        for part in parts:
            # Not register_buffer: it refuses a part called "weight", which is also a property here.
            self._buffers[part.name] = torch.empty(part.shape, dtype=part.dtype, device=device)

    def part(self, name: str) -> Tensor:
        """One stored tensor, rows first."""
        return cast(Tensor, self._buffers[name])

    def product(self) -> Product | None:
        """The compiled product of the weight as it is stored, or None where there is none."""
        return self._product.find(self.codec, self._buffers, self.part_names, self.stored_shape)

    @property
    def device(self) -> torch.device:
        return self.part(self.part_names[0]).device

    @property
    def tile_rows(self) -> int:
        """Rows decoded at a time: a float32 tile of at most ``TILE_BYTES``, in multiples of 8 (and at least 8)."""
        eights = TILE_BYTES // (4 * self.stored_shape[1]) // _TILE_STEP
        return max(eights, 1) * _TILE_STEP

    def tiles(self, start: int = 0, stop: int | None = None) -> Iterator[slice]:
        """The rows ``start`` to ``stop`` in order, cut into tiles."""
        end = self.stored_shape[0] if stop is None else stop
        return (slice(row, min(row + self.tile_rows, end)) for row in range(start, end, self.tile_rows))

    @torch.no_grad()
    def decode(self, rows: slice | Tensor) -> Tensor:
        """The chosen rows of the weight, ``(n, in)`` float32; of a stream as the module's dtype has them."""
        tensors = {name: self.part(name) for name in self.part_names}
        if self.streamed:
            # Loading fills parts in place, and moving a module replaces them.
            state = [(part.data_ptr(), 0 if part.is_inference() else part._version) for part in tensors.values()]
            if self._whole is None or self._whole[0] != (self.dtype, state):
                whole = self.codec.decode(tensors, self.stored_shape).to(self.dtype)
                self._whole = (self.dtype, state), whole
            return self._whole[1][rows].float()
        return self.codec.decode_rows(tensors, self.stored_shape, rows)

    @torch.no_grad()
    def dense(self, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` as one tensor ``(n, in)`` in ``dtype`` (default: the module's), built by tiles."""
        end = self.stored_shape[0] if stop is None else stop
        result = torch.empty(end - start, self.stored_shape[1], dtype=dtype or self.dtype, device=self.device)
        for rows in self.tiles(start, end):
            result[rows.start - start : rows.stop - start] = self.decode(rows)
        return result

    @torch.no_grad()
    def look_up(self, ids: Tensor) -> Tensor:
        """Rows ``ids (...)`` as ``(..., in)`` in the module's dtype; each distinct row is decoded once.

        Raises IndexError for an id that is not a row (negative ones do not count from the end).
        """
        if torch.compiler.is_compiling():
            return cast(Tensor, operators.packed_rows(ids, self.handle))
        distinct, place = torch.unique(ids, return_inverse=True)
        if len(distinct) and not 0 <= int(distinct[0]) <= int(distinct[-1]) < self.stored_shape[0]:
            raise IndexError(f"ids from {int(distinct[0])} to {int(distinct[-1])} in {self.stored_shape[0]} rows")
        # Ten times as fast for a few rows; but to make a product that is a copy of all takes longer than decoding them.
        product = self.product() if ids.device.type == "cpu" and used_as_stored(self.codec) else None
        read = None if product is None else read_rows(product, distinct)
        if read is not None:
            return read.to(self.dtype)[place]
        rows = torch.empty(len(distinct), self.stored_shape[1], dtype=self.dtype, device=self.device)
        for start in range(0, len(distinct), self.tile_rows):
            here = slice(start, start + self.tile_rows)
            rows[here] = self.decode(distinct[here])
        return rows[place]

    def times(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x (tokens, in)`` times the weight, plus ``bias (out,)`` in the dtype of ``x``: ``(tokens, out)`` in it too.

        By the compiled product where there is one for such inputs. No gradients.
        """
        found = self.product() if takes(self.codec, x) else None
        return self.times_decoded(x, bias) if found is None else multiplied(found, x, bias)

    @torch.no_grad()
    def times_decoded(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same by tiles of decoded rows."""
        result = x.new_empty(x.shape[0], self.stored_shape[0])
        for rows in self.tiles():
            result[:, rows] = functional.linear(x, self.decode(rows).to(x.dtype), None if bias is None else bias[rows])
        return result

    @torch.no_grad()
    def times_transposed(self, grad: Tensor) -> Tensor:
        """``grad (tokens, out)`` times the weight itself: ``(tokens, in)``."""
        result = grad.new_zeros(grad.shape[0], self.stored_shape[1])
        for rows in self.tiles():
            result += grad[:, rows] @ self.decode(rows).to(grad.dtype)
        return result

    def release(self) -> None:
        """Turn back, in place, into the plain module that this stands for, with the decoded weight."""
        weight = self.dense()
        for name in self.part_names:
            del self._buffers[name]
        for name in ("codec", "stored_shape", "part_names", "streamed", "_whole", "_product", "handle", "dtype"):
            delattr(self, name)
        self.__class__ = self.plain  # type: ignore[assignment]
        self.weight = nn.Parameter(weight, requires_grad=False)

    @property
    def weight(self) -> WeightStandIn:
        return WeightStandIn(self)

    @weight.setter
    def weight(self, _: object) -> None:
        raise AttributeError("The weight of a packed module cannot be set; dequantize the model first.")

    def __getstate__(self) -> dict[str, Any]:
        """A copy finds its own product, and has a number of its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_product", "handle")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._product = HeldProduct()
        self.handle = operators.enter(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Every ``.to``, ``.cuda``, ``.half`` comes through here: parts move, but are never cast."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        before = {name: self.part(name) for name in self.part_names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in before.items():
            if self.part(name).dtype != part.dtype:
                self._buffers[name] = part.to(self.part(name).device)
        return self

    def extra_repr(self) -> str:
        return f"{self.stored_shape[1]} -> {self.stored_shape[0]}, codec={self.codec}, dtype={self.dtype}"


class PackedLinear(Packed, nn.Linear):  # type: ignore[misc]
    """``y = x Wᵀ + b`` with a packed ``W (out, in)``; computed in the dtype of ``x``.

    ``transposed``: the module that this stands for keeps its weight ``(in, out)`` (GPT-2's Conv1D).
    """

    plain = nn.Linear
    transposed: bool = False

    def __init__(
        self,
        codec: Codec,
        shape: Shape,
        *,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.transposed = transposed
        self.register_parameter("bias", bias)
        self.hold(codec, shape, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        return product(x, self, self.bias)

    extra_repr = Packed.extra_repr


class PackedEmbedding(Packed, nn.Embedding):  # type: ignore[misc]
    """A table ``(entries, width)`` of which only the rows asked for are decoded; gives them in its own dtype."""

    plain = nn.Embedding

    def __init__(
        self,
        codec: Codec,
        shape: Shape,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.hold(codec, shape, dtype, device)

    def forward(self, input: Tensor) -> Tensor:
        """Ids ``(...)`` to ``(..., width)``. An id outside the table raises IndexError."""
        return self.look_up(input)

    extra_repr = Packed.extra_repr


class PackedExperts(Packed):
    """Stands where a parameter ``(copies, out, in)`` of stacked matrices stood; ``self[i]`` decodes one of them.

    The stored weight has the copies stacked, ``(copies * out, in)``. ``transposed``: the parameter was
    ``(copies, in, out)``, and so is what indexing gives.
    """

    _is_hf_initialized = True  # transformers fills what lacks this mark with random values

    def __init__(
        self,
        codec: Codec,
        shape: Shape,
        *,
        copies: int,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.copies, self.transposed, self._one = copies, transposed, shape
        self.hold(codec, (copies * shape[0], shape[1]), dtype, device)

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter that this stands for."""
        out, columns = self._one
        return torch.Size((self.copies, columns, out) if self.transposed else (self.copies, out, columns))

    def __getitem__(self, index: int | Tensor) -> Tensor:
        """Matrix ``index`` in the module's dtype: ``(out, in)``, or ``(in, out)`` when transposed."""
        if isinstance(index, (slice, tuple)) or (isinstance(index, Tensor) and index.numel() != 1):
            raise BadInput(f"Packed experts give one matrix at a time and were asked for several; {_EAGER}.")
        place = int(index)
        if not -self.copies <= place < self.copies:
            raise IndexError(f"expert {place} of {self.copies}")
        first = place % self.copies * self._one[0]
        matrix = self.dense(first, first + self._one[0])
        return matrix.T if self.transposed else matrix

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(f"Packed experts have no {name!r}; {_EAGER}.") from error

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise BadInput(f"Packed experts were used whole, in {getattr(func, '__name__', func)}; {_EAGER}.")


_EAGER = "this model can only run with experts_implementation='eager', or after model.dequantize()"


class TiedLinear(nn.Module):
    """A linear layer that reads another packed module's weight, without a copy of its own or a name in the file."""

    bias: nn.Parameter | None

    def __init__(self, source: Packed, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        # In a tuple, lest it become a child: then the parts would have two names in the state dict.
        self._source = (source,)
        self.out_features, self.in_features = source.stored_shape
        self.register_parameter("bias", bias)

    @property
    def source(self) -> Packed:
        return self._source[0]

    @property
    def weight(self) -> WeightStandIn:
        return self.source.weight

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``, wherever the source lies."""
        return product(x.to(self.source.device), self.source, self.bias).to(x.device)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, shared"


class WeightStandIn:
    """What ``module.weight`` gives for a packed module: its dtype, device and shape, and its products, but no values.

    Model code asks for ``weight.dtype``, and some writes ``x @ weight.T`` itself; both work. All else raises.
    """

    _is_hf_initialized = True  # transformers fills what lacks this mark with random values
    requires_grad = False

    def __init__(self, packed: Packed, turned: bool = False) -> None:
        self._packed, self._turned = packed, turned
        self.dtype, self.device = packed.dtype, packed.device
        self.shape = torch.Size(reversed(packed.stored_shape) if turned else packed.stored_shape)
        self.ndim = 2

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def T(self) -> WeightStandIn:  # noqa: N802 (torch's name)
        return WeightStandIn(self._packed, not self._turned)

    def t(self) -> WeightStandIn:
        return self.T

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"A packed weight has no {name!r}: it is not a tensor; dequantize the model first.")

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        weight = args[1] if len(args) > 1 else None
        if isinstance(weight, cls):
            if func is functional.linear and not weight._turned:
                return product(args[0], weight._packed, *args[2:], **(kwargs or {}))
            if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and weight._turned:
                return product(args[0], weight._packed)
            if func is functional.embedding and not weight._turned:
                return weight._packed.look_up(args[0])
        raise BadInput(
            f"A packed weight was used in {getattr(func, '__name__', func)}, which needs its values; "
            f"this model can only run after model.dequantize()."
        )


class _Product(torch.autograd.Function):
    """``x Wᵀ + b`` by tiles of rows; the gradient of ``x`` decodes them anew rather than keep them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Packed) -> Tensor:
        ctx.packed = packed
        return packed.times_decoded(x, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        for_x = ctx.packed.times_transposed(grad) if ctx.needs_input_grad[0] else None
        return for_x, grad.sum(0) if ctx.needs_input_grad[1] else None, None


def product(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """``x (..., in)`` times the packed weight, plus ``bias (out,)``: ``(..., out)`` in the dtype of ``x``.

    Under autocast, in autocast's dtype, as other linear layers do. Differentiable in ``x`` and ``bias``. Raises
    BadInput when ``x`` is not of floating point.
    """
    if not x.is_floating_point():
        raise BadInput(f"A packed layer takes floating-point inputs and was given {x.dtype}.")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = bias if bias is None else bias.to(x.dtype)
    if torch.compiler.is_compiling():
        return cast(Tensor, operators.packed_linear(x, bias, packed.handle))
    flat = x.reshape(-1, x.shape[-1])
    result: Tensor
    if torch.is_grad_enabled() and (flat.requires_grad or (bias is not None and bias.requires_grad)):
        result = _Product.apply(flat, bias, packed)  # type: ignore[no-untyped-call]
    else:
        result = packed.times(flat, bias)
    return result.view(*x.shape[:-1], packed.stored_shape[0])


@functools.cache
def _packed_class(plain: type[nn.Module]) -> type[Packed]:
    """``plain`` with its weight packed; a subclass's own ``forward`` runs, and meets ours in its ``super()``."""
    base: type[Packed] = PackedLinear if issubclass(plain, nn.Linear) else PackedEmbedding
    if plain is base.plain:
        return base
    return type(f"Packed{plain.__name__}", (plain, base), {"plain": plain, "__module__": plain.__module__})


def adopt(module: nn.Linear | nn.Embedding, codec: Codec) -> None:
    """Turn ``module`` into a packed one, in place; its weight is dropped, and the parts are left to be filled.

    The result is a :class:`PackedLinear` or :class:`PackedEmbedding` and still an instance of the module's own
    class. Raises ShapeMismatch when the codec cannot take its weight, UnknownArchitecture for an embedding that
    renormalises its rows in place.
    """
    if getattr(module, "max_norm", None) is not None:
        raise UnknownArchitecture(
            f"An embedding with max_norm={module.max_norm} rewrites its own weight and cannot be packed; "
            f"keep it as it is."
        )
    weight = module.weight
    shape = (weight.shape[0], weight.shape[1])
    codec.parts(shape)
    del module._parameters["weight"]
    module.__class__ = _packed_class(type(module))  # type: ignore[assignment, arg-type]
    cast(Packed, module).hold(codec, shape, weight.dtype, weight.device)
