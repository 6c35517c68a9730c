"""Packed modules in a transformers model: put in before its weights are loaded, and taken out again.

Names in an artifact are those of the model that was compressed. When its base model alone is loaded (``AutoModel``),
or a base model's artifact into a model with a head, the first component differs, as transformers allows.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tersor.codecs import parse
from tersor.contracts import Codec, LayerKind, Part, Shape
from tersor.errors import BadInput, CorruptArtifact, ShapeMismatch, UnknownArchitecture
from tersor.runtime.packed import Packed, PackedExperts, PackedLinear, TiedLinear, adopt


@dataclass(frozen=True)
class Slot:
    """A layer of the artifact and its place in a model.

    ``name``: as in the artifact. ``path``: module (or parameter, for experts) in this model. ``shape``: ``(out, in)``
    of one of ``copies`` matrices. ``transposed``: the plain parameter is ``(in, out)``.
    """

    name: str
    path: str
    text: str
    codec: Codec
    kind: LayerKind
    shape: Shape
    copies: int = 1
    transposed: bool = False

    @property
    def parts(self) -> dict[str, Part]:
        """Stored tensors by their full name in this model."""
        rows, columns = self.shape
        return {f"{self.path}.{part.name}": part for part in self.codec.parts((self.copies * rows, columns))}


def local_name(name: str, known: Container[str], prefix: str) -> str | None:
    """What ``name`` is called in a model that knows these names; None when it has no such thing."""
    candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
    return next((candidate for candidate in candidates if candidate in known), None)


def find_slots(model: PreTrainedModel, layers: Mapping[str, str], *, whole: bool) -> list[Slot]:
    """The place of every layer ``{name: codec text}``.

    ``whole``: the model is of the class that was compressed, so that each layer must have a place; otherwise those
    without one are left out. Raises CorruptArtifact for a name without a place, BadInput for a codec text that
    cannot be read, ShapeMismatch for a codec that cannot take the layer.
    """
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = modules.keys() | parameters.keys()
    slots = []
    for name, text in layers.items():
        path = local_name(name, known, model.base_model_prefix)
        if path is not None:
            slots.append(_slot(name, path, text, modules, parameters))
        elif whole:
            raise CorruptArtifact(
                f"config.json names the layer {name!r}, which {type(model).__name__} does not have: the file does "
                f"not belong to this model, or was made for another version of transformers."
            )
    return slots


def _slot(
    name: str, path: str, text: str, modules: Mapping[str, nn.Module], parameters: Mapping[str, nn.Parameter]
) -> Slot:
    try:
        codec = parse(text)
    except BadInput as error:
        raise BadInput(f"Layer {name!r} of config.json cannot be read: {error}") from error
    module = modules.get(path)
    if isinstance(module, (nn.Linear, nn.Embedding)):
        kind: LayerKind = "linear" if isinstance(module, nn.Linear) else "embedding"
        rows, columns = module.weight.shape
        slot = Slot(name, path, text, codec, kind, (rows, columns))
    elif isinstance(module, Conv1D):
        columns, rows = module.weight.shape
        slot = Slot(name, path, text, codec, "conv1d", (rows, columns), transposed=True)
    elif path in parameters and parameters[path].ndim == 3:
        copies, rows, columns = parameters[path].shape
        transposed = bool(getattr(modules[path.rpartition(".")[0]], "is_transposed", False))
        shape = (columns, rows) if transposed else (rows, columns)
        slot = Slot(name, path, text, codec, "experts", shape, copies, transposed)
    else:
        found = type(module).__name__ if module is not None else f"a parameter {tuple(parameters[path].shape)}"
        raise CorruptArtifact(
            f"config.json names the layer {name!r}, which is {found} in this model; expected a linear layer, a "
            f"Conv1D, an embedding or stacked experts."
        )
    try:
        slot.codec.parts((slot.copies * slot.shape[0], slot.shape[1]))
    except ShapeMismatch as error:
        raise ShapeMismatch(f"Layer {name!r} of config.json does not fit this model: {error}") from error
    return slot


def insert(model: PreTrainedModel, slots: Sequence[Slot]) -> None:
    """Put packed modules, still without values, in the slots of a model whose weights are not loaded yet.

    Raises UnknownArchitecture when a layer is used in a way that packed modules cannot serve.
    """
    ties = _cut_ties(model, {slot.path for slot in slots})
    for slot in slots:
        owner, _, last = slot.path.rpartition(".")
        parent = model.get_submodule(owner)
        if slot.kind == "experts":
            plain = parent._parameters.pop(last)
            packed = PackedExperts(
                slot.codec,
                slot.shape,
                copies=slot.copies,
                transposed=slot.transposed,
                dtype=plain.dtype,
                device=plain.device,
            )
            parent.add_module(last, packed)
        elif slot.kind == "conv1d":
            conv = cast(Conv1D, parent.get_submodule(last))
            dtype, device = conv.weight.dtype, conv.weight.device
            setattr(
                parent,
                last,
                PackedLinear(slot.codec, slot.shape, bias=conv.bias, dtype=dtype, device=device, transposed=True),
            )
        else:
            adopt(parent.get_submodule(last), slot.codec)
    for target, source in ties.items():
        _tie(model, target, source)
    if any(slot.kind == "experts" for slot in slots):
        # Other implementations hand all experts to one kernel as a tensor; this one takes them singly.
        model.set_experts_implementation("eager")


def _cut_ties(model: PreTrainedModel, packed: set[str]) -> dict[str, str]:
    """Make the model forget the ties of packed weights, which have no parameter any more.

    Gives ``{module: packed module it takes its weight from}`` for those that are not packed themselves.
    """
    ties = {}
    for prefix, part in list(model.named_modules()):
        if not isinstance(part, PreTrainedModel):
            continue
        names = part.get_expanded_tied_weights_keys(all_submodels=False)
        dot = f"{prefix}." if prefix else ""
        cut = {}
        for target, source in names.items():
            target_path = dot + target.removesuffix(".weight")
            source_path = dot + source.removesuffix(".weight")
            if target_path in packed or source_path in packed:
                cut[target] = source
            if source_path in packed and target_path not in packed:
                ties[target_path] = source_path
        if cut:
            # On the instance: tie_weights() reads it again whenever it is called.
            part._tied_weights_keys = {target: names[target] for target in names if target not in cut}
        for target in cut:
            for holder, key in ((part, target), (model, dot + target)):
                holder.all_tied_weights_keys.pop(key, None)
    return ties


def _tie(model: PreTrainedModel, target: str, source: str) -> None:
    head = model.get_submodule(target)
    if type(head) is not nn.Linear:
        raise UnknownArchitecture(
            f"The {type(head).__name__} {target!r} shares the weight of the packed {source!r}, and only a plain "
            f"linear layer can do that; keep {source!r} as it is."
        )
    owner, _, last = target.rpartition(".")
    tied = TiedLinear(cast(Packed, model.get_submodule(source)), head.bias)
    setattr(model.get_submodule(owner), last, tied)


def remove(model: PreTrainedModel, slots: Sequence[Slot], *, experts: str | None) -> None:
    """The inverse of :func:`insert`, with decoded weights, in the model's dtype. ``experts``: implementation to set."""
    for slot in slots:
        owner, _, last = slot.path.rpartition(".")
        parent = model.get_submodule(owner)
        packed = cast(Packed, parent.get_submodule(last))
        if isinstance(packed, PackedExperts):
            weight = packed.dense().view(slot.copies, *slot.shape)
            weight = weight.transpose(1, 2).contiguous() if slot.transposed else weight
            del parent._modules[last]
            parent.register_parameter(last, nn.Parameter(weight, requires_grad=False))
        elif slot.kind == "conv1d":
            setattr(parent, last, _conv1d(cast(PackedLinear, packed)))
        else:
            packed.release()
    for name, module in list(model.named_modules()):
        if isinstance(module, TiedLinear):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, _linear(module))
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.__dict__.pop("_tied_weights_keys", None)
            part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)
    if any(slot.kind == "experts" for slot in slots):
        model.set_experts_implementation(experts)


def _conv1d(packed: PackedLinear) -> Conv1D:
    plain = Conv1D(0, 0)
    plain.nf, plain.nx = packed.out_features, packed.in_features
    plain.weight = nn.Parameter(packed.dense().T.contiguous(), requires_grad=False)
    plain.bias = packed.bias
    return plain


def _linear(tied: TiedLinear) -> nn.Linear:
    """A plain layer that shares the released source's parameter, as before."""
    plain = nn.Linear(1, 1, bias=False, device="meta")
    plain.in_features, plain.out_features = tied.in_features, tied.out_features
    plain.weight = cast(Any, tied.source).weight  # released by now: a parameter
    plain.bias = cast(Any, tied.bias)
    return plain
