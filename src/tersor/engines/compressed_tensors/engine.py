"""compressed-tensors as an engine: planning sizes, writing a folder, reading it back, running it by transformers."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tersor.anatomy import Source, WeightLoader, skeleton
from tersor.anatomy.headers import fixed_bytes, least_fixed_bytes, most_shards
from tersor.anatomy.shards import list_tensors, map_tensor
from tersor.codecs import parse
from tersor.contracts import Anatomy, Codec, Layer, Rounding
from tersor.engines.compressed_tensors import rules
from tersor.engines.compressed_tensors.experts import Piece, patterns_of, pieces_of
from tersor.engines.compressed_tensors.files import SHARD, Entry, file_bytes, stored_bytes, write_files
from tersor.engines.compressed_tensors.forms import DENSE, FORMS, form_of, text_of
from tersor.engines.compressed_tensors.inputs import dynamic, rounding
from tersor.engines.compressed_tensors.process import run
from tersor.engines.contract import Engine, Read, written_alike
from tersor.errors import BadInput, CorruptArtifact

NAME = "compressed-tensors"
METHOD = "compressed-tensors"
_MIXED = "mixed-precision"
_PATTERN = "re:"
"""What targets begin with that are patterns and not names."""
_OTHER_SCALES = (torch.float16, torch.float32)
"""Types of scales that other programs write, where ours are bfloat16."""


def library() -> Any:
    """The library's quantization schema. Raises BadInput when it is not installed."""
    try:
        return importlib.import_module("compressed_tensors.quantization")
    except ImportError as error:
        raise BadInput(
            "Writing for compressed-tensors needs its library: pip install 'tersor[compressed-tensors]'."
        ) from error


@dataclass(frozen=True)
class FolderTarget:
    """A model as a folder for these engines; see :class:`~tersor.engines.contract.Target`.

    ``origins``: names of the source's tensors that each parameter is made of. ``experts``: by layer the matrices that
    it is stored as. ``shard``: bytes of tensors in one file.
    """

    source: Source
    anatomy: Anatomy
    origins: Mapping[str, tuple[str, ...]]
    experts: Mapping[str, tuple[Piece, ...]]
    shard: int = SHARD

    def entries(self, texts: Mapping[str, str]) -> list[tuple[Entry, str]]:
        """All tensors of the folder, each with the layer or parameter that it is of, in the order of the model."""
        found = []
        for layer in self.anatomy.layers:
            found += [(entry, layer.name) for entry in self._layer_entries(layer, texts[layer.name])]
        for name, (dtype, _) in self.anatomy.kept.items():
            found += [(entry, name) for entry in self._plain(name, dtype)]
        return found

    def _layer_entries(self, layer: Layer, text: str) -> list[Entry]:
        form = form_of(text)
        if form is None:
            return self._plain(layer.parameter, torch.bfloat16)
        return [
            Entry(f"{piece.module}.{name}", *what)
            for piece in self.pieces(layer)
            for name, what in form.spec(piece.shape).items()
        ]

    def _plain(self, parameter: str, dtype: torch.dtype) -> list[Entry]:
        """A parameter as the source has it, under the source's names, in ``dtype`` if it is a float."""
        infos = [self.source.tensors[name] for name in self.origins[parameter]]
        return [Entry(info.name, dtype if info.dtype.is_floating_point else info.dtype, info.shape) for info in infos]

    def pieces(self, layer: Layer) -> tuple[Piece, ...]:
        """The matrices that a layer is stored as: one, unless it holds experts."""
        found = self.experts.get(layer.name)
        if found is not None:
            return found
        module = self.origins[layer.parameter][0].removesuffix(".weight")
        return (Piece(module, slice(0, layer.shape[0]), layer.shape),)

    def file_bytes(self, texts: Mapping[str, str]) -> int:
        return file_bytes([entry for entry, _ in self.entries(texts)], self.shard)

    def overhead(self, dense_bytes: int) -> int:
        """The most that all the folder's tensors can take here, less the least that they can take in an artifact.

        Layer by layer the difference is that of the form for which it is largest, so it holds for any mix of forms.
        What a tensor costs apart from its data is bounded by its name, dtype and shape and by the largest offset that
        there can be, so it holds wherever the tensor lies, in however many files.
        """
        forms = {layer.name: self._forms(layer) for layer in self.anatomy.layers}
        kept = {name: self._plain(name, dtype) for name, (dtype, _) in self.anatomy.kept.items()}
        most = sum(max(_data(here) for here, _ in found) for found in forms.values()) + sum(map(_data, kept.values()))
        largest, sharded = min(self.shard, most), most > self.shard
        count = sum(max(len(here) for here, _ in found) for found in forms.values()) + sum(map(len, kept.values()))
        shards = min(most_shards(most, self.shard), max(count, 1))  # no file but a single one is empty

        def more(here: Sequence[Entry], there: Sequence[Entry]) -> int:
            upper = sum(entry.nbytes + entry.most_bytes(largest, sharded=sharded) for entry in here)
            return upper - sum(entry.nbytes + entry.least_bytes() for entry in there)

        layers = sum(max(more(here, there) for here, there in found) for found in forms.values())
        rest = sum(more(here, [Entry(name, *self.anatomy.kept[name])]) for name, here in kept.items())
        return layers + rest + fixed_bytes(shards) - least_fixed_bytes()

    def _forms(self, layer: Layer) -> list[tuple[list[Entry], list[Entry]]]:
        """A layer's tensors here and in an artifact, in each codec that it can have."""
        found = []
        for codec in (parse(DENSE), *(form.codec for form in FORMS.values())):
            if codec.accepts(layer.stored_shape) and rules.refuses(self.anatomy, layer, codec, 1) is None:
                parts = codec.parts(layer.stored_shape)
                there = [Entry(f"{layer.name}.{part.name}", part.dtype, part.shape) for part in parts]
                found.append((self._layer_entries(layer, str(codec)), there))
        return found

    def write(self, codecs: Mapping[str, Codec], path: Path, read: Read) -> None:
        texts = {name: str(codec) for name, codec in codecs.items()}
        rules.check(sorted(set(texts.values())))
        layers = {layer.name: layer for layer in self.anatomy.layers}
        places = {piece.module: piece for layer in self.anatomy.layers for piece in self.pieces(layer)}
        held: tuple[str, Mapping[str, Tensor]] = ("", {})

        def value(entry: Entry) -> Tensor:
            nonlocal held
            of = owners[entry]
            found = read(of)
            if isinstance(found, Tensor):
                return found.to(entry.dtype)
            form, (module, _, part) = form_of(texts[of]), entry.name.rpartition(".")
            if form is None:
                if of in self.experts:
                    return found["weight"][places[module].rows]
                return found["weight"].T if layers[of].transposed else found["weight"]
            if held[0] != module:
                piece = places[module]
                if of in self.experts:
                    found = {name: tensor[piece.rows] for name, tensor in found.items()}
                held = (module, form.put(found, piece.shape))
            return held[1][part]

        owners = dict(self.entries(texts))
        path.mkdir()
        try:
            write_files(path, list(owners), value, self.shard)
            self.source.copy_side_files(path)
            (path / "config.json").write_text(json.dumps(self._config(texts), indent=2) + "\n", encoding="utf-8")
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise

    def _config(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """The model's configuration, with the library's own in it."""
        raw = self.source.plain_config()
        raw["dtype"] = "bfloat16"
        if "torch_dtype" in raw:
            raw["torch_dtype"] = "bfloat16"
        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(raw.get("model_type", ""))
        if not raw.get("architectures") and kind:
            raw["architectures"] = [kind if isinstance(kind, str) else kind[0]]
        if self.anatomy.head != self.anatomy.embedding:
            raw["tie_word_embeddings"] = False  # also where it says nothing: some classes tie them unless told not to
        raw["quantization_config"] = quantization_config(self.anatomy, texts, self.experts)
        return raw

    def stored(self, path: Path) -> StoredFolder:
        return StoredFolder(path, self)


def _data(entries: Sequence[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)


def quantization_config(
    anatomy: Anatomy, texts: Mapping[str, str], experts: Mapping[str, tuple[Piece, ...]]
) -> dict[str, Any]:
    """``quantization_config`` of config.json: one group a codec, its layers by exact name, all else left alone.

    Experts have a group of their own, by patterns, from which transformers knows them.

    Made and checked by the library's own schema; only what is set is written, since older versions of it refuse fields
    that they do not know.
    """
    schema = library()
    names: dict[tuple[str, bool], list[str]] = {}
    plain: list[str] = []
    for layer in anatomy.layers:
        targets = patterns_of(experts[layer.name]) if layer.name in experts else [layer.name]
        if form_of(texts[layer.name]) is not None:
            names.setdefault((texts[layer.name], layer.name in experts), []).extend(targets)
        elif layer.kind in ("linear", "experts"):
            plain += targets
    groups = {
        f"group_{number}": schema.QuantizationScheme(
            targets=list(dict.fromkeys(targets)), format=FORMS[text].format, **FORMS[text].scheme()
        )
        for number, ((text, _), targets) in enumerate(names.items())
    }
    formats = {FORMS[text].format for text, _ in names}
    tied = [name.removesuffix(".weight") for layer in anatomy.layers for name in layer.tied]
    matrices = [name.removesuffix(".weight") for name, (_, shape) in anatomy.kept.items() if len(shape) == 2]
    config = schema.QuantizationConfig(
        config_groups=groups,
        quant_method=METHOD,
        format=formats.pop() if len(formats) == 1 else _MIXED if formats else "dense",
        quantization_status="compressed",
        ignore=list(dict.fromkeys([*plain, *tied, *matrices])),
    )
    found: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    return found


class StoredFolder:
    """A folder read back; see :class:`~tersor.engines.contract.Stored`."""

    def __init__(self, path: Path, target: FolderTarget) -> None:
        self._target, self.nbytes = target, stored_bytes(path)
        self._tensors = list_tensors(path)
        schemes, ignored = _settings(path)
        self.texts = {
            layer.name: _text_in(layer, target.pieces(layer)[0].module, schemes, ignored)
            for layer in target.anatomy.layers
        }
        self._check(path)

    def _check(self, path: Path) -> None:
        """Every tensor must be there as the codecs say, and no other."""
        wanted = {entry.name: entry for entry, _ in self._target.entries(self.texts)}
        for name, entry in wanted.items():
            info = self._tensors.get(name)
            other = info is not None and entry.dtype == torch.bfloat16 and info.dtype in _OTHER_SCALES
            if info is not None and other and name.endswith(".weight_scale"):
                kind = str(info.dtype).removeprefix("torch.")
                raise BadInput(
                    f"{path} stores scales as {kind} ({name}), which tersor does not read here; it reads scales in "
                    f"bfloat16, as it writes them."
                )
            if info is None or (info.dtype, info.shape) != (entry.dtype, entry.shape):
                found = "is not there" if info is None else f"is {info.dtype} {info.shape}"
                raise CorruptArtifact(f"{path}: the tensor {name!r} must be {entry.dtype} {entry.shape} and {found}.")
        extra = sorted(self._tensors.keys() - wanted.keys())
        if extra:
            raise CorruptArtifact(f"{path} holds {extra[0]!r}, which the model has no place for.")

    @cached_property
    def _loader(self) -> WeightLoader:
        """Reads what is stored plainly as the model has it, whatever the source calls it."""
        source = replace(self._target.source, tensors=self._tensors)
        return WeightLoader(source, skeleton(self._target.source))

    def tensors(self, layer: Layer, codec: Codec) -> dict[str, Tensor]:
        """A layer's stored tensors, as ``codec`` declares them."""
        form = form_of(str(codec))
        if form is not None:
            made = []
            for piece in self._target.pieces(layer):
                names = form.spec(piece.shape)
                found = {name: map_tensor(self._tensors[f"{piece.module}.{name}"]) for name in names}
                made.append(form.get(found, piece.shape))
            return made[0] if len(made) == 1 else {part: torch.cat([one[part] for one in made]) for part in made[0]}
        weight = self._loader.load([layer.parameter])[layer.parameter]
        weight = weight.transpose(-1, -2) if layer.transposed else weight
        return {"weight": weight.reshape(layer.stored_shape)}

    said = ""

    def inputs(self, layer: Layer, codec: Codec) -> Rounding | None:
        """How inputs are rounded where the scheme asks for it."""
        return rounding(codec, lambda: self.tensors(layer, codec))

    def kept(self, name: str) -> Tensor:
        """A kept parameter's value."""
        return self._loader.load([name])[name]

    def holds(self, name: str, value: Tensor) -> bool:
        """Whether a kept parameter is ``value``."""
        return written_alike(self.kept(name), value)


def _settings(path: Path) -> tuple[dict[str, str], list[str]]:
    """Codec by target, and targets to ignore. Raises BadInput for schemes that are not read here."""
    try:
        raw = json.loads((path / "config.json").read_text("utf-8"))["quantization_config"]
        config = library().QuantizationConfig.model_validate(raw)
    except (OSError, ValueError, KeyError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        why = " ".join(lines[1:3] or lines)  # the schema's errors name the place and the reason in these
        raise CorruptArtifact(f"{path / 'config.json'} is no configuration of compressed-tensors: {why}") from error
    found = {}
    for scheme in config.config_groups.values():
        text = text_of(scheme.model_dump(mode="json"))
        if text is None:
            raise BadInput(f"{path} has a scheme that tersor does not read; it reads {', '.join(FORMS)}.")
        found.update(dict.fromkeys(scheme.targets, text))
    ignored = list(config.ignore or ())
    for target in (*found, *ignored):
        if target.startswith(_PATTERN):
            try:
                re.compile(target.removeprefix(_PATTERN))
            except re.error as error:
                raise CorruptArtifact(
                    f"{path / 'config.json'}: the target {target!r} is no pattern: {error}."
                ) from None
    return found, ignored


def _text_in(layer: Layer, module: str, schemes: Mapping[str, str], ignored: Sequence[str]) -> str:
    """The codec of a layer by the library's rule: a target is a name, a pattern after ``re:``, or a class.

    Of experts, which all have the same, ``module`` is the first.
    """
    experts = layer.kind == "experts"
    name = module if experts else layer.name

    def match(targets: Iterable[str]) -> str | None:
        if name in targets:
            return name
        patterns = (one for one in targets if one.startswith(_PATTERN) and re.match(one.removeprefix(_PATTERN), name))
        return next(patterns, "Linear" if "Linear" in targets and (experts or layer.kind == "linear") else None)

    found = None if match(ignored) is not None else match(schemes)
    return DENSE if found is None else schemes[found]


def _parameters(anatomy: Anatomy) -> list[str]:
    return [*(layer.parameter for layer in anatomy.layers), *anatomy.kept]


def _open(source: Source, anatomy: Anatomy, _cache_dir: Path | None = None) -> FolderTarget:
    library()
    loader = WeightLoader(source, skeleton(source))
    targets = {name: loader.targets[loader.provider(name) or name] for name in _parameters(anatomy)}
    experts: dict[str, tuple[Piece, ...]] = {}
    for layer in anatomy.layers:
        if layer.kind == "experts":
            pieces = pieces_of(layer, targets[layer.parameter].sources)
            if pieces is None:
                raise BadInput(
                    f"{layer.name} holds experts that {source.origin} does not store one by one, as compressed-tensors "
                    f"needs them; write this model for llama.cpp or transformers."
                )
            experts[layer.name] = pieces
    stacked = {layer.parameter for layer in anatomy.layers if layer.kind == "experts"}
    linear = {layer.parameter for layer in anatomy.layers if layer.kind == "linear"}
    for name, found in targets.items():
        if name in stacked:
            continue
        if not found.plain or (name in linear and not found.sources[0].endswith("weight")):
            raise BadInput(
                f"{name} is made of {', '.join(found.sources[:2])} in {source.origin}, and compressed-tensors names "
                f"its tensors after one weight; save the model anew with transformers first."
            )
    origins = {name: found.sources for name, found in targets.items()}
    return FolderTarget(source, anatomy, origins, experts)


def _recognises(path: Path) -> bool:
    config = path / "config.json"
    if not config.is_file():
        return False
    try:
        found = json.loads(config.read_text("utf-8")).get("quantization_config")
    except (ValueError, AttributeError):
        return False
    return isinstance(found, dict) and found.get("quant_method") == METHOD


ENGINE = Engine(
    name=NAME,
    suffix="",
    package="compressed-tensors",
    candidates=rules.candidates,
    check=rules.check,
    open=_open,
    recognises=_recognises,
    installed=lambda: importlib.util.find_spec("compressed_tensors") is not None,
    run=run,
    refuses=rules.refuses,
    warns=rules.warns,
    shuns=rules.shuns,
    together=rules.together,
    fallback=DENSE,
    splits=True,
    rounds=dynamic,
)
