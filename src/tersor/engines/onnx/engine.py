"""ONNX Runtime as an engine: which codecs it runs, by what rules, and a model as a folder of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tersor.anatomy import Source
from tersor.codecs import parse
from tersor.codecs.dense import Dense
from tersor.contracts import Anatomy, Codec, Layer
from tersor.engines.contract import Engine, Opener, Read
from tersor.engines.onnx.build import ALIGNMENT, ENGINE, Built, build
from tersor.engines.onnx.files import MODEL, Folder, open_model, write_folder
from tersor.engines.onnx.graph import open_graph
from tersor.engines.onnx.layout import grid_of
from tersor.engines.onnx.operators import ACCURACY, NBits, Operators, Qdq
from tersor.engines.onnx.runtime import PACKAGE, installed, run
from tersor.errors import BadInput, CorruptArtifact

_DENSE = "bf16"
_NBITS = (
    *("sint2:g32", "int2:g32:asym", "sint2:g16", "int2:g16:asym"),
    *("sint4:g128", "int4:g128:asym", "sint4:g64", "int4:g64:asym", "sint4:g32", "int4:g32:asym", "int4:g16:asym"),
    *("sint8:g128", "sint8:g64", "sint8:g32", _DENSE),
)
_QDQ = ("sint8:row", "int8:row:asym", "sint8:g128", "int8:g128:asym", "sint8:g64", "int8:g64:asym", "sint8:g32", _DENSE)
_NAMED = tuple(f"int4:g{group}" for group in (16, 32, 64, 128, 256))
"""Codecs that are not chosen among unless they are named, of a form that no candidate has."""
_DIGITS = 24
"""Bytes by which what the graph says of a layer may differ from codec to codec of a form: numbers of more digits."""
_HEADER = 50
"""Bytes that a tensor takes at least in an artifact's header, beyond its name."""


@dataclass(frozen=True)
class OnnxTarget:
    """A model as an ONNX folder; see :class:`~tersor.engines.contract.Target`.

    ``graph``: of :func:`~tersor.engines.onnx.graph.open_graph`. ``forms``: codecs by layer, once for each form that a
    graph can give to layers.
    """

    source: Source
    anatomy: Anatomy
    graph: bytes = field(repr=False)
    operators: Operators
    forms: tuple[Mapping[str, str], ...]

    def file_bytes(self, texts: Mapping[str, str]) -> int:
        return self._built(texts).nbytes

    def overhead(self, dense_bytes: int) -> int:
        """All that is no weight, in the largest graph there can be, beyond what is none in the artifact.

        Weights take the same bytes in both, codec by codec; only graph, header and alignment differ.
        """
        dense = self._built({layer.name: _DENSE for layer in self.anatomy.layers})
        floats = sum(entry.nbytes for entry in dense.entries)
        slack = len(self.anatomy.layers) * (_DIGITS + 3 * ALIGNMENT)
        return max(self._graph_bytes(texts) for texts in self.forms) + floats - dense_bytes + slack

    def _graph_bytes(self, texts: Mapping[str, str]) -> int:
        """What is no weight in the file, less what headers of the artifact say at least of more tensors a layer."""
        built = self._built(texts)
        parts = {layer.name: parse(texts[layer.name]).parts(layer.stored_shape) for layer in self.anatomy.layers}
        saved = sum((len(found) - 1) * (len(name) + _HEADER) for name, found in parts.items())
        return built.nbytes - sum(entry.nbytes for entry in built.entries) - saved

    def write(self, codecs: Mapping[str, Codec], path: Path, read: Read) -> None:
        built = self._built({name: str(codec) for name, codec in codecs.items()})
        write_folder(path, built, self.source, self.anatomy, codecs, self.operators, read)

    def stored(self, path: Path) -> Folder:
        return Folder(path, self.anatomy, self.operators)

    def _built(self, texts: Mapping[str, str]) -> Built:
        return build(self.graph, self.anatomy, {name: parse(text) for name, text in texts.items()}, self.operators)


def _refuses(operators: Operators) -> Callable[[Anatomy, Layer, Codec, int], str | None]:
    def why(_anatomy: Anatomy, layer: Layer, codec: Codec, _ranks: int) -> str | None:
        if isinstance(codec, Dense):
            return None
        grid = grid_of(codec)
        if grid is None:
            return "it is no integer on an even grid"
        return operators.refuses(grid, lookup=layer.kind in ("embedding", "experts"))

    return why


def _check(operators: Operators, examples: Sequence[str]) -> Callable[[Sequence[str]], None]:
    def check(texts: Sequence[str]) -> None:
        for text in texts:
            codec = parse(text)
            grid = grid_of(codec)
            if isinstance(codec, Dense) or (grid is not None and operators.refuses(grid, lookup=False) is None):
                continue
            why = "it is no integer on an even grid" if grid is None else operators.refuses(grid, lookup=False)
            raise BadInput(
                f"{operators.engine} cannot run {text}: {why}; for it, choose the like of {', '.join(examples)}."
            )

    return check


def _opener(operators: Operators, texts: Sequence[str]) -> Opener:
    """``texts``: codecs among which every form is that a graph can give to layers."""
    refuses = _refuses(operators)

    def form(text: str) -> tuple[str, bool]:
        grid = grid_of(parse(text))
        return ("dense", False) if grid is None else (grid.zero, grid.group is None)

    def chosen(anatomy: Anatomy, layer: Layer, wanted: tuple[str, bool]) -> str:
        """A codec of that form, or of another where the layer can have none of it."""
        fits = [
            text
            for text in texts
            if parse(text).accepts(layer.stored_shape) and refuses(anatomy, layer, parse(text), 1) is None
        ]
        return min(fits, key=lambda text: (form(text) != wanted, text == _DENSE))

    def open_target(source: Source, anatomy: Anatomy, cache_dir: Path | None = None) -> OnnxTarget:
        forms = tuple(
            {layer.name: chosen(anatomy, layer, wanted) for layer in anatomy.layers}
            for wanted in sorted(set(map(form, texts)))
        )
        target = OnnxTarget(source, anatomy, open_graph(source, cache_dir), operators, forms)
        target.file_bytes(forms[-1])  # finds now what the graph has no place for
        return target

    return open_target


def _recognises(operators: Operators) -> Callable[[Path], bool]:
    def known(path: Path) -> bool:
        if not (path / MODEL).is_file():
            return False
        try:
            props = {prop.key: prop.value for prop in open_model(path).metadata_props}
        except (CorruptArtifact, BadInput):
            return True  # whoever opens it says what is wrong
        return bool(props.get(ENGINE, operators.engine) == operators.engine)

    return known


def _at_level(level: int) -> Engine:
    """ONNX with products at another ``accuracy_level``, 0 to 4."""
    return ONNX if level == ACCURACY else _engine(NBits(level), _NBITS, _NAMED)


def _engine(operators: Operators, texts: tuple[str, ...], named: tuple[str, ...] = ()) -> Engine:
    return Engine(
        name=operators.engine,
        suffix="",
        package=PACKAGE,
        candidates=lambda _effort: texts,
        check=_check(operators, texts),
        open=_opener(operators, (*texts, *named)),
        recognises=_recognises(operators),
        installed=installed,
        run=run,
        refuses=_refuses(operators),
        fallback=_DENSE,
        at_level=_at_level if isinstance(operators, NBits) else None,
    )


ONNX = _engine(NBits(), _NBITS, _NAMED)
ONNX_QDQ = _engine(Qdq(), _QDQ)
