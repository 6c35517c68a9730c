"""Opening an artifact: everything is checked before anything is used, and nothing is read before it is needed.

``config.json`` says which codec each layer has; the codec and the layer's shape (from ``tersor.json``) say exactly
which tensors the weight files must hold. Headers are compared with that; tensors stay memory-mapped until asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tersor import codecs
from tersor.anatomy.shards import TensorInfo, map_tensor
from tersor.artifact.header import DTYPE_NAMES, Header, parse_object, read_header
from tersor.artifact.layout import INDEX_FILE, SINGLE_FILE
from tersor.artifact.manifest import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    check_format,
    hash_file,
    read_json_bytes,
    read_manifest,
)
from tersor.contracts import Codec, Shape
from tersor.errors import BadInput, CorruptArtifact, TersorError

CONFIG_FILE = "config.json"

_Spec = tuple[torch.dtype, tuple[int, ...]]


class Artifact:
    """A checked artifact; made by :func:`open_artifact`. Safe to use from several threads.

    ``folder``; ``manifest``; ``config``: content of ``config.json``; ``layers``: codec by layer name, in the order of
    ``config.json``; ``shapes``: ``(rows, in)`` by layer name, copies stacked.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any],
        manifest: Manifest,
        layers: Mapping[str, Codec],
        headers: Mapping[str, Header],
    ) -> None:
        self.folder = folder
        self.config = config
        self.manifest = manifest
        self.layers = layers
        self.shapes: Mapping[str, Shape] = {name: manifest.shapes[name] for name in layers}
        self.files = tuple(headers)
        self._stored = {
            name: TensorInfo(name, one.dtype, one.shape, folder / file, header.data_start + one.start)
            for file, header in headers.items()
            for name, one in header.tensors.items()
        }

    @property
    def weight_bytes(self) -> int:
        """Size of all weight files, the index included: what the budget counts."""
        total = sum((self.folder / file).stat().st_size for file in self.files)
        index = self.folder / INDEX_FILE
        return total + (index.stat().st_size if SINGLE_FILE not in self.files else 0)

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """The stored tensors of a layer by part name, memory-mapped. Raises ``BadInput`` for an unknown layer."""
        codec = self._codec(layer)
        return {part.name: self._tensor(f"{layer}.{part.name}") for part in codec.parts(self.shapes[layer])}

    def decode(self, layer: str, rows: slice | None = None) -> Tensor:
        """The float32 weight ``(rows, in)`` of a layer, or of a slice of its rows; only those rows are read."""
        codec = self._codec(layer)
        tensors = self.tensors(layer)
        if rows is None:
            return codec.decode(tensors, self.shapes[layer])
        return codec.decode_rows(tensors, self.shapes[layer], rows)

    def kept(self, name: str) -> Tensor:
        """A tensor that was stored as it is, memory-mapped. Raises ``BadInput`` for an unknown name."""
        if name not in self.manifest.kept:
            raise BadInput(f"{self.folder}: no kept tensor is called '{name}'; see `manifest.kept` for the names")
        return self._tensor(name)

    def verify_hashes(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every file of the manifest and compare size and SHA-256.

        ``progress(done, total)``: called with bytes hashed so far. Raises
        :class:`~tersor.errors.CorruptArtifact` naming the first file that differs or is missing.
        """
        total = sum(record.bytes for record in self.manifest.files.values())
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        for name, expected in self.manifest.files.items():
            _check_size(self.folder, name, expected)
            found = hash_file(self.folder / name, report)
            if found.sha256 != expected.sha256:
                raise CorruptArtifact(
                    f"{name}: expected SHA-256 {expected.sha256} as in {MANIFEST_FILE}, found {found.sha256}; "
                    "the file was changed or damaged, fetch or write it again"
                )

    def _codec(self, layer: str) -> Codec:
        if layer not in self.layers:
            raise BadInput(f"{self.folder}: no encoded layer is called '{layer}'; see `layers` for the names")
        return self.layers[layer]

    def _tensor(self, name: str) -> Tensor:
        # Each tensor has a mapping of its own, so that the pages of those no longer used do not count as memory.
        return map_tensor(self._stored[name])


def open_artifact(folder: str | Path, *, parse: Callable[[str], Codec] = codecs.parse) -> Artifact:
    """Open and check an artifact folder. File contents beyond headers are not read; see ``verify_hashes`` for that.

    ``parse``: codec text to codec. Raises :class:`~tersor.errors.CorruptArtifact`, naming file, tensor, expected and
    found, when anything is not as ``config.json`` and ``tersor.json`` say; :class:`~tersor.errors.BadInput` when the
    folder is no tersor artifact or needs a newer version.
    """
    folder = Path(folder)
    config = parse_object(CONFIG_FILE, read_json_bytes(folder / CONFIG_FILE))
    texts = _layer_texts(folder, config)
    manifest = read_manifest(folder)
    layers = {name: _parse_codec(name, text, parse) for name, text in texts.items()}
    if set(layers) != set(manifest.shapes):
        name = min(set(layers) ^ set(manifest.shapes))
        have, lack = (CONFIG_FILE, MANIFEST_FILE) if name in layers else (MANIFEST_FILE, CONFIG_FILE)
        raise CorruptArtifact(
            f"{lack}: expected layer '{name}', which {have} has, found none; the two do not belong together"
        )
    expected = _expected_tensors(layers, manifest)
    files = _weight_files(folder)
    for file in files:
        record = manifest.files.get(file)
        if record is None:
            raise CorruptArtifact(f"{file}: expected in the list of files in {MANIFEST_FILE}, found no entry there")
        _check_size(folder, file, record)
    headers = {file: read_header(folder / file) for file in files}
    for file in files:
        _check_readable(folder / file)
    _check_tensors(expected, headers)
    _check_index(folder, headers)
    return Artifact(folder, config=config, manifest=manifest, layers=layers, headers=headers)


def _check_readable(path: Path) -> None:
    """The header was checked already; what the safetensors library refuses on top is refused too."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise CorruptArtifact(f"{path.name}: the safetensors library refuses it ({error}); fetch it again") from error


def _layer_texts(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Codec text by layer name, from ``quantization_config``."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "tersor":
        raise BadInput(f"{folder / CONFIG_FILE} has no quantization_config of tersor, so this is not a tersor artifact")
    check_format(f"{CONFIG_FILE}: quantization_config", quantization.get("format"))
    layers = quantization.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(text, str) for text in layers.values()):
        raise CorruptArtifact(
            f"{CONFIG_FILE}: expected quantization_config.layers to map names to codecs, found {layers!r:.80}"
        )
    return layers


def _parse_codec(name: str, text: str, parse: Callable[[str], Codec]) -> Codec:
    try:
        return parse(text)
    except TersorError as error:
        raise CorruptArtifact(f"{CONFIG_FILE}: layer '{name}': {error}") from error


def _expected_tensors(layers: Mapping[str, Codec], manifest: Manifest) -> dict[str, _Spec]:
    """Every tensor that the weight files must hold."""
    expected: dict[str, _Spec] = dict(manifest.kept)
    for layer, codec in layers.items():
        try:
            parts = codec.parts(manifest.shapes[layer])
        except TersorError as error:
            raise CorruptArtifact(f"{MANIFEST_FILE}: layer '{layer}': {error}") from error
        for part in parts:
            name = f"{layer}.{part.name}"
            if name in expected:
                raise CorruptArtifact(
                    f"{MANIFEST_FILE}: tensor '{name}' is listed as kept, expected as a part of '{layer}'"
                )
            expected[name] = (part.dtype, part.shape)
    return expected


def _weight_files(folder: Path) -> tuple[str, ...]:
    """Names of the safetensors files, in order."""
    if (folder / SINGLE_FILE).is_file():
        return (SINGLE_FILE,)
    if not (folder / INDEX_FILE).is_file():
        raise CorruptArtifact(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither; fetch it again")
    files = sorted(set(_weight_map(folder).values()))
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise CorruptArtifact(
                f"{file}: expected this weight file, which {INDEX_FILE} names, found none; fetch it again"
            )
    return tuple(files)


def _weight_map(folder: Path) -> dict[str, str]:
    mapping = parse_object(INDEX_FILE, read_json_bytes(folder / INDEX_FILE)).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
        raise CorruptArtifact(f"{INDEX_FILE}: expected weight_map to map tensor names to files, found {mapping!r:.80}")
    return mapping


def _check_size(folder: Path, name: str, expected: FileRecord) -> None:
    path = folder / name
    if not path.is_file():
        raise CorruptArtifact(f"{name}: expected this file, which {MANIFEST_FILE} lists, found none; fetch it again")
    size = path.stat().st_size
    if size != expected.bytes:
        raise CorruptArtifact(
            f"{name}: expected {expected.bytes} bytes as in {MANIFEST_FILE}, found {size}; "
            "the file is truncated or was changed, fetch or write it again"
        )


def _check_tensors(expected: Mapping[str, _Spec], headers: Mapping[str, Header]) -> None:
    """The files hold exactly the expected tensors, with the expected dtypes and shapes, each once."""
    seen: dict[str, str] = {}
    for file, header in headers.items():
        for name, stored in header.tensors.items():
            if name in seen:
                raise CorruptArtifact(f"{file}: tensor '{name}' is in {seen[name]} already, expected it once")
            if name not in expected:
                raise CorruptArtifact(
                    f"{file}: found tensor '{name}', expected no such tensor: it is neither a part of a layer's codec "
                    f"nor listed as kept in {MANIFEST_FILE}"
                )
            dtype, shape = expected[name]
            if (stored.dtype, stored.shape) != (dtype, shape):
                raise CorruptArtifact(
                    f"{file}: tensor '{name}': expected {DTYPE_NAMES[dtype]} {list(shape)}, "
                    f"found {DTYPE_NAMES[stored.dtype]} {list(stored.shape)}"
                )
            seen[name] = file
    for name, (dtype, shape) in expected.items():
        if name not in seen:
            raise CorruptArtifact(
                f"{', '.join(headers)}: tensor '{name}': expected {DTYPE_NAMES[dtype]} {list(shape)}, found none"
            )


def _check_index(folder: Path, headers: Mapping[str, Header]) -> None:
    """In a sharded artifact the index must say of each tensor the file it is in: transformers goes by it."""
    if SINGLE_FILE in headers:
        return
    mapping = _weight_map(folder)
    actual = {name: file for file, header in headers.items() for name in header.tensors}
    for name in sorted({*mapping, *actual}):
        if mapping.get(name) != actual.get(name):
            raise CorruptArtifact(
                f"{INDEX_FILE}: tensor '{name}': expected file {actual.get(name)}, found {mapping.get(name)}"
            )
