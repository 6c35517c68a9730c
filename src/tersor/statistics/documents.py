"""Documents out of files and data sets: plain text, JSON lines, Parquet, and sets of the hub.

Everything here is lazy: a document is a short run of characters, read when asked for and validated as it is read, so
that a text of many gigabytes needs no more memory than a small one. What cannot be read raises BadInput with the name
of the file, the line or row, and the field.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from tersor.errors import BadInput

FIELDS = ("text", "messages", "conversations")
"""Where the text of a record is looked for when the user names no field, in this order."""
SUFFIXES = (".txt", ".jsonl", ".parquet")
PARQUET_ROWS = 256
"""Rows decoded at a time."""
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Names that conversations use for the roles which chat templates know."""

Messages: TypeAlias = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Document:
    """``content``: text, or the turns of a conversation as ``{"role": ..., "content": ...}``.

    ``place``: where it was found, for messages to the user. ``opens``, ``closes``: whether this is the beginning and
    the end of a document; a long plain text arrives in several pieces.
    """

    content: str | Messages
    place: str
    opens: bool = True
    closes: bool = True


def origin_of(spec: str | Path | Sequence[str]) -> str:
    """How a text is named in records: the file's name without its folder, the data set's id, or "given texts"."""
    if isinstance(spec, (str, Path)):
        return Path(spec).name if is_local(spec) else str(spec)
    return "given texts"


def is_local(spec: str | Path) -> bool:
    """Whether ``spec`` means something on this disk rather than a data set of the hub."""
    if isinstance(spec, Path):
        return True
    return spec.startswith((".", "/", "~")) or Path(spec).suffix in SUFFIXES or Path(spec).exists()


def read(spec: str | Path | Sequence[str], *, field: str | None, split: str) -> Iterator[Document]:
    """The documents that ``spec`` names.

    ``spec``: a ``.txt`` file (one document), ``.jsonl`` or ``.parquet`` file (one document a record), a folder that
    the ``datasets`` package can open, a hub data set ``name`` or ``name:config``, or a sequence of texts.
    Raises BadInput.
    """
    if not isinstance(spec, (str, Path)):
        return _given(spec)
    if not is_local(spec):
        name, _, config = spec.partition(":") if isinstance(spec, str) else (str(spec), "", "")
        return _hub(name, config or None, field=field, split=split)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _hub(str(path), None, field=field, split=split)
    if not path.is_file():
        raise BadInput(f"There is no file {path}; give an existing {', '.join(SUFFIXES)} file or the id of a data set.")
    readers = {".txt": _plain, ".jsonl": _json_lines, ".parquet": _parquet}
    if path.suffix not in readers:
        raise BadInput(f"{path.name} ends in {path.suffix!r}, expected {', '.join(SUFFIXES)}; rename or convert it.")
    return readers[path.suffix](path, field)


def _given(texts: Sequence[str]) -> Iterator[Document]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise BadInput(f"Text {number} of the given texts is a {type(text).__name__}, expected a string.")
        yield Document(text, f"text {number}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1, line ends kept; a byte order mark is dropped."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise BadInput(
                        f"{path.name}, line {number} is not UTF-8: byte 0x{raw[error.start]:02x} at position "
                        f"{error.start + 1} of the line; convert the file to UTF-8."
                    ) from error
                yield number, line.removeprefix("\ufeff") if number == 1 else line
    except OSError as error:
        raise BadInput(f"{path} could not be read ({error.strerror}); check the file and its permissions.") from error


def _plain(path: Path, field: str | None) -> Iterator[Document]:
    if field is not None:
        raise BadInput(f"{path.name} is plain text and has no field {field!r}; leave the field away.")
    ahead: Document | None = None
    for number, line in _lines(path):
        if ahead is not None:
            yield ahead
        ahead = Document(line, f"{path.name}, line {number}", opens=number == 1, closes=False)
    if ahead is not None:
        yield Document(ahead.content, ahead.place, opens=ahead.opens)


def _json_lines(path: Path, field: str | None) -> Iterator[Document]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadInput(
                f"{place} is not valid JSON: {error.msg} at column {error.colno}; each line must be one JSON object."
            ) from error
        yield Document(content_of(record, place, field), place)


def _parquet(path: Path, field: str | None) -> Iterator[Document]:
    arrow = _optional("pyarrow", f"reading {path.name}")
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in ([field] if field else FIELDS) if name in names][:1]
            if not wanted:
                raise _no_field(path.name, field, names)
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    place = f"{path.name}, row {row}"
                    yield Document(content_of(record, place, wanted[0]), place)
    except (arrow.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise BadInput(f"{path.name} could not be read as Parquet ({first}); write the file again.") from error


def _hub(name: str, config: str | None, *, field: str | None, split: str) -> Iterator[Document]:
    datasets = _optional("datasets", f"fetching the data set {name!r}")
    called = Path(name).name if Path(name).is_dir() else name + (f":{config}" if config else "")
    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
        for row, record in enumerate(stream, 1):
            place = f"{called}, split {split}, row {row}"
            yield Document(content_of(record, place, field), place)
    except _fetch_errors(datasets) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"The data set {called!r}, split {split!r}, could not be fetched ({first}); check its id, configuration, "
            f"split and the network, or give a local file."
        ) from error


def _fetch_errors(datasets: ModuleType) -> tuple[type[Exception], ...]:
    """What fetching and streaming a data set is known to raise when the id, the network or the data are at fault."""
    hub = importlib.import_module("huggingface_hub.errors")
    # huggingface_hub has used requests (an OSError) and httpx (not one) in turn; its own error derives from either.
    transport = [base for base in hub.HfHubHTTPError.__mro__ if base.__module__.split(".")[0] not in ("builtins",)]
    return (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, KeyError, *transport)


def _optional(package: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise BadInput(
            f'The package {package!r}, needed for {purpose}, is not installed; run pip install "tersor[datasets]".'
        ) from error


def content_of(record: Any, place: str, field: str | None) -> str | Messages:
    """Text or turns of one record, found under ``field`` or else under the first of :data:`FIELDS` that is there.

    Raises BadInput naming ``place`` and the field.
    """
    if not isinstance(record, Mapping):
        raise BadInput(f"{place} holds {_kind(record)}, expected an object with a field {FIELDS[0]!r}.")
    names = [name for name in ([field] if field else FIELDS) if name in record]
    if not names:
        raise _no_field(place, field, record)
    value = record[names[0]]
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_turn(turn, f"{place}, field {names[0]!r}, turn {number}") for number, turn in enumerate(value, 1))
    raise BadInput(f"{place}: field {names[0]!r} holds {_kind(value)}, expected a string or a list of messages.")


def _turn(turn: Any, place: str) -> Mapping[str, str]:
    """One message, whichever of the two common spellings it has."""
    if not isinstance(turn, Mapping):
        raise BadInput(f'{place} is {_kind(turn)}, expected an object such as {{"role": ..., "content": ...}}.')
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if isinstance(content, (list, tuple)):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(role, str) or not isinstance(content, str):
        raise BadInput(f'{place} has no text in "role" and "content" (or "from" and "value"); found {sorted(turn)}.')
    return {"role": ROLES.get(role, role), "content": content}


def _no_field(place: str, field: str | None, found: Iterable[str]) -> BadInput:
    wanted = repr(field) if field else " or ".join(map(repr, FIELDS))
    names = ", ".join(sorted(map(repr, found))) or "none"
    return BadInput(f"{place} has no field {wanted}; its fields are {names}: name the one that holds the text.")


def _kind(value: Any) -> str:
    return "null" if value is None else f"a value of type {type(value).__name__}"
