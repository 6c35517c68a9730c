"""What was found out about a model's step, kept as data: from it and the stored weights alone a decoder is made again.

So a model that was run once is run later without transformers' model code, which takes seconds to import and 80 MB of
memory. The model's own logits of the fixed text (:mod:`tersor.runtime.decoding.proof`) are among the data, and a
decoder made again has to reproduce them too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tersor.contracts import Codec, Shape
from tersor.errors import UnknownArchitecture
from tersor.kernels import step as kernel
from tersor.runtime import large_pages
from tersor.runtime.decoding.build import write_step
from tersor.runtime.decoding.decoder import CHUNK, Decoder
from tersor.runtime.decoding.handed import Handed, find_handed
from tersor.runtime.decoding.proof import LENGTH, bound, compare, expected_logits
from tersor.runtime.decoding.structure import Attention, GatedMlp, Layer, Norm, Structure, find_structure
from tersor.runtime.packed import Packed, PackedEmbedding, PackedLinear, TiedLinear

_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError)
_NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp")


class Stored(Protocol):
    """Weights as they are stored, by the model's names, mapped and not read."""

    @property
    def layers(self) -> Mapping[str, Codec]: ...
    @property
    def shapes(self) -> Mapping[str, Shape]: ...
    def tensors(self, layer: str, /) -> dict[str, Tensor]: ...
    def kept(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True)
class Blueprint:
    """``data``: JSON, the structure and anything that whoever keeps it adds; ``tensors``: small ones, by name."""

    data: dict[str, Any]
    tensors: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Write one safetensors file. Raises OSError where that cannot be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            # Copies: the format takes no two tensors of one storage.
            tensors = {
                name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors.items()
            }
            save_file(tensors, partial, metadata={"blueprint": json.dumps(self.data), "sha256": _digest(tensors)})
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        except SafetensorError as error:
            raise OSError(f"{partial}: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Blueprint | None:
        """What :meth:`save` wrote, mapped; None where there is nothing that can be read."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                data = json.loads(about["blueprint"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            whole = isinstance(data, dict) and _digest(tensors) == about["sha256"]
            return cls(data, tensors) if whole else None
        except (OSError, SafetensorError, *_MALFORMED):
            return None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Of all bytes: the proof is on a short text, and angles of later positions are not in it."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def draw(model: Any, kept: Collection[str], context: int) -> Blueprint:
    """The blueprint of a model's step for texts of up to ``context`` tokens.

    ``model``: as for :meth:`Decoder.of`, in float32. ``kept``: names of tensors that are stored as they are. Raises
    UnknownArchitecture for a model without a step, and for what a blueprint has no words for.
    """
    if context < LENGTH:
        raise UnknownArchitecture(f"it takes less than the {LENGTH} tokens of the text that decoders are compared on")
    structure = find_structure(model)
    handed = find_handed(structure, model.config.get_text_config(), context)
    draft = _Draft(model, kept)
    data = {
        "context": context,
        "layers": [draft.layer(layer) for layer in structure.layers],
        "norm": draft.norm(structure.norm),
        "head": draft.linear(structure.head),
        "embedding": draft.embedding(structure.embedding),
        "handed": [draft.handed(given) for given in handed],
        "width": structure.width,
        "vocabulary": structure.vocabulary,
        "logit_cap": structure.logit_cap,
        "bounds": {str(halves): bound(model, halves) for halves in (False, True)},
    }
    draft.tensors["logits"] = expected_logits(model, LENGTH)
    return Blueprint(data, draft.tensors)


class _Draft:
    """Parts of a structure as JSON; tensors that are not stored as they are, are put aside."""

    def __init__(self, model: nn.Module, kept: Collection[str]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._paths = {module: name for name, module in model.named_modules()}
        named = model.named_parameters(remove_duplicate=False)
        self._names = {parameter.data_ptr(): name for name, parameter in named if name in kept}

    def layer(self, layer: Layer) -> dict[str, Any]:
        attention, mlp = layer.attention, layer.mlp
        return {
            "attention": {
                **_plain(attention),
                "query_norm": self.norm(attention.query_norm),
                "key_norm": self.norm(attention.key_norm),
                **self._linears(attention),
            },
            "mlp": {**_plain(mlp), **self._linears(mlp)},
            **{name: self.norm(getattr(layer, name)) for name in _NORMS},
        }

    def norm(self, norm: Norm | None) -> dict[str, Any] | None:
        if norm is None:
            return None
        bias = None if norm.bias is None else self._aside(norm.bias)
        return {"weight": self._aside(norm.weight), "bias": bias, "eps": norm.eps, "centred": norm.centred}

    def linear(self, linear: Any) -> dict[str, Any]:
        packed = linear.source if isinstance(linear, TiedLinear) else linear
        bias = None if linear.bias is None else self._name(linear.bias)
        if isinstance(packed, Packed):
            return {"layer": self._paths[packed], "bias": bias}
        return {"weight": self._name(linear.weight), "bias": bias}

    def embedding(self, module: Any) -> dict[str, Any]:
        """Rows of the table, and what all of them are multiplied by."""
        ids = torch.arange(0, module.num_embeddings, max(module.num_embeddings // 64, 1))
        with torch.no_grad():
            rows = module.look_up(ids) if isinstance(module, Packed) else module.weight[ids]
            given = module(ids)
        # Rounding cancels in sums, so that this is the float32 that rows were multiplied by, if they were by one.
        scale = float((given.double().abs().sum() / rows.double().abs().sum()).float())
        if not torch.equal(rows * scale, given):
            raise UnknownArchitecture("its embeddings are not rows of a table times a number")
        if isinstance(module, Packed):
            return {"layer": self._paths[module], "scale": scale}
        return {"weight": self._name(module.weight), "scale": scale}

    def handed(self, given: Handed) -> dict[str, Any]:
        tables = [self._aside(table) for table in (given.cosine, given.sine)]
        return {"cosine": tables[0], "sine": tables[1], "window": given.window, "neighbours": given.neighbours}

    def _linears(self, part: Attention | GatedMlp) -> dict[str, Any]:
        return {"inputs": [self.linear(linear) for linear in part.inputs], "output": self.linear(part.output)}

    def _name(self, parameter: Tensor) -> str:
        name = self._names.get(parameter.data_ptr())
        if name is None or parameter.dtype != torch.float32:
            raise UnknownArchitecture("it uses a weight otherwise than it is stored")
        return name

    def _aside(self, tensor: Tensor) -> str:
        """The name of a tensor among those of the blueprint; equal objects have one."""
        for name, other in self.tensors.items():
            if other is tensor:
                return name
        name = f"aside.{len(self.tensors)}"
        self.tensors[name] = tensor
        return name


def _plain(part: Attention | GatedMlp) -> dict[str, Any]:
    """The numbers and words among the fields."""
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    return {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}


def rebuild(plan: Blueprint, stored: Stored, *, context: int, cache_dtype: torch.dtype) -> Decoder:
    """A decoder of texts of up to ``context`` tokens on stored weights, which stay where they are mapped.

    Other arguments are those of :meth:`Decoder.of`. Raises UnknownArchitecture where the decoder does not give the
    logits that the model gave, or the blueprint is for shorter texts or not as it must be.
    """
    if not kernel.available:
        raise UnknownArchitecture("tersor was installed without a compiler")
    room = max(context, LENGTH)
    try:
        if room > plan.data["context"]:
            raise UnknownArchitecture(f"what is known of it is for texts of up to {plan.data['context']} tokens")
        found = _Rebuilt(plan, stored)
        structure, handed = found.structure(), found.handed(room)
        found.settle()
        expected = plan.tensors["logits"]
        most = float(plan.data["bounds"][str(cache_dtype == torch.float16)])
        if expected.ndim != 2 or expected.shape[1] != structure.vocabulary or not bool(expected.isfinite().all()):
            raise UnknownArchitecture("what was kept of it are no logits")
        decoder = Decoder(
            found, write_step(structure, handed, tokens=CHUNK, context=room, cache_dtype=cache_dtype), room
        )
    except (*_MALFORMED, RuntimeError, AssertionError) as error:
        raise UnknownArchitecture(f"what was kept of it is not as it must be ({error})") from error
    decoder.difference = compare(decoder, expected, LENGTH, most)
    decoder.context = context
    return decoder


class _Rebuilt:
    """Parts of a structure from JSON, with stored weights. Stands where a decoder is given a model."""

    def __init__(self, plan: Blueprint, stored: Stored) -> None:
        self._data, self._tensors, self._stored = plan.data, plan.tensors, stored
        self._kept: dict[str, Tensor] = {}
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._packed: list[Packed] = []
        self._embedding = self._embed(plan.data["embedding"])

    def get_input_embeddings(self) -> nn.Module:
        return self._embedding

    def settle(self) -> None:
        """When all has been made: weights go to large pages, and what was mapped of the file is let go."""
        self._parts.clear()
        large_pages.move(self._packed)
        self._packed.clear()

    def structure(self) -> Structure:
        data, nothing = self._data, nn.Module()
        norm = self._norm(data["norm"])
        assert norm is not None
        return Structure(
            nothing,
            self._embedding,
            (),
            tuple(self._layer(layer) for layer in data["layers"]),
            norm,
            self._linear(data["head"]),
            data["width"],
            data["vocabulary"],
            data["logit_cap"],
        )

    def handed(self, context: int) -> Sequence[Handed]:
        return [
            Handed(
                self._tensors[given["cosine"]][:context],
                self._tensors[given["sine"]][:context],
                given["window"],
                given["neighbours"],
            )
            for given in self._data["handed"]
        ]

    def _layer(self, data: Mapping[str, Any]) -> Layer:
        attention = {**data["attention"], **self._linears(data["attention"])}
        attention |= {name: self._norm(attention[name]) for name in ("query_norm", "key_norm")}
        mlp = {**data["mlp"], **self._linears(data["mlp"])}
        return Layer(Attention(**attention), GatedMlp(**mlp), **{name: self._norm(data[name]) for name in _NORMS})

    def _linears(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return {"inputs": tuple(map(self._linear, data["inputs"])), "output": self._linear(data["output"])}

    def _norm(self, data: Mapping[str, Any] | None) -> Norm | None:
        if data is None:
            return None
        bias = None if data["bias"] is None else self._tensors[data["bias"]]
        return Norm(self._tensors[data["weight"]], bias, data["eps"], data["centred"])

    def _linear(self, data: Mapping[str, Any]) -> nn.Module:
        bias = None if data["bias"] is None else nn.Parameter(self._float(data["bias"]), requires_grad=False)
        if "layer" in data:
            name = data["layer"]
            if isinstance(self._embedding, Packed) and name == self._data["embedding"].get("layer"):
                return TiedLinear(self._embedding, bias)
            packed = PackedLinear(self._stored.layers[name], self._stored.shapes[name], bias=bias, device="meta")
            return self._filled(packed, name)
        weight = self._float(data["weight"])
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.out_features, linear.in_features = weight.shape
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = bias  # type: ignore[assignment]
        return linear

    def _embed(self, data: Mapping[str, Any]) -> nn.Module:
        if "layer" in data:
            name = data["layer"]
            packed = _ScaledPacked(self._stored.layers[name], self._stored.shapes[name], device="meta")
            packed.times_rows = data["scale"]
            return self._filled(packed, name)
        table = _Scaled(1, 1, device="meta")
        table.times_rows = data["scale"]
        table.weight = nn.Parameter(self._float(data["weight"]), requires_grad=False)
        return table

    def _filled(self, packed: Packed, name: str) -> nn.Module:
        if name not in self._parts:  # once for all that share it
            self._parts[name] = self._stored.tensors(name)
        packed._buffers.update(self._parts[name])
        self._packed.append(packed)
        return packed

    def _float(self, name: str) -> Tensor:
        """A kept tensor in float32, as the model had it, once for all that share it."""
        if name not in self._kept:
            self._kept[name] = self._stored.kept(name).float()
        return self._kept[name]


class _ScaledPacked(PackedEmbedding):
    times_rows: float = 1.0  # not "scale", which a stored tensor may be called

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.times_rows


class _Scaled(nn.Embedding):
    times_rows: float = 1.0  # not "scale", which a stored tensor may be called

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.times_rows
