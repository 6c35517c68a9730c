"""Every kind of text that can be given, and every way in which it can be wrong."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_tokenizer
from tersor.errors import BadInput
from tersor.statistics import text as text_module
from tersor.statistics.text import TokenBatch, load_text, marks_of

PLAIN = tiny_tokenizer.build()
CHAT = tiny_tokenizer.build(chat=True)


def ids_of(text: str) -> list[int]:
    return list(PLAIN(text, add_special_tokens=False)["input_ids"])


def words(batch: TokenBatch) -> str:
    return PLAIN.decode(batch.ids.flatten()).replace(" ", "")


def load(spec: Any, tokenizer: Any = PLAIN, **options: Any) -> TokenBatch:
    return load_text(spec, tokenizer, **{"sequences": 1, "length": 1000, "seed": 0, **options})


def lines_file(folder: Path, *records: Any, name: str = "text.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\ntwo\nthree")
    batch = load(path)
    assert batch.ids[0].tolist() == [*ids_of("one\n\ntwo\nthree"), 2]
    assert batch.origin == "a.txt"
    assert load(str(path)).digest() == batch.digest()


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (False, True), (True, True)])
def test_marks_stand_around_every_document(bos: bool, eos: bool) -> None:
    tokenizer = tiny_tokenizer.build(bos=bos, eos=eos)
    first, last = [1] * bos, [2] * eos
    assert marks_of(tokenizer).before == tuple(first)
    found = load(["ab", "", "c"], tokenizer).ids[0].tolist()
    assert found == [*first, *ids_of("ab"), *last, *first, *ids_of("c"), *last]


def test_json_lines_with_text_messages_and_blank_lines(tmp_path: Path) -> None:
    path = lines_file(tmp_path, {"text": "ab"}, "", {"text": "c", "id": 3})
    assert load(path).ids[0].tolist() == [*ids_of("ab"), 2, *ids_of("c"), 2]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "h"}, {"type": "image"}, {"type": "text", "text": "i"}],
                },
                {"role": "assistant", "content": "yes"},
            ]
        },
    ],
)
def test_conversations_are_rendered_by_the_template(tmp_path: Path, record: Any) -> None:
    path = lines_file(tmp_path, record)
    assert load(path, CHAT).ids[0].tolist() == [*ids_of("[u]hi"), 2, *ids_of("[a]yes"), 2]
    assert load(path, CHAT, chat=False).ids[0].tolist() == [*ids_of("hi\n\nyes"), 2]
    assert load(path, PLAIN).ids[0].tolist() == [*ids_of("hi\n\nyes"), 2]


def test_a_named_field_is_used(tmp_path: Path) -> None:
    path = lines_file(tmp_path, {"text": "no", "body": "yes"})
    assert words(load(path, field="body")) == "yes</s>"


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2], "text": ["ab", "c"]}), path)
    assert words(load(path)) == "ab</s>c</s>"
    talks = [[{"role": "user", "content": "x"}], [{"role": "user", "content": "y"}]]
    pq.write_table(pa.table({"messages": talks}), path)
    assert words(load(path, CHAT)) == "[u]x</s>[u]y</s>"


def test_a_folder_is_opened_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    lines_file(folder, {"text": "ab"}, {"text": "c"})
    assert words(load(folder)) == "ab</s>c</s>"
    with pytest.raises(BadInput, match="split 'test', could not be fetched"):
        load(folder, split="test")


def fake_datasets(monkeypatch: pytest.MonkeyPatch, records: Any) -> list[Any]:
    """Puts a module in the place of ``datasets``; returns the list of calls that it gets."""
    calls: list[Any] = []

    class DatasetsError(Exception):
        pass

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return records(DatasetsError) if callable(records) else records

    module = types.SimpleNamespace(
        load_dataset=load_dataset, exceptions=types.SimpleNamespace(DatasetsError=DatasetsError)
    )
    monkeypatch.setitem(sys.modules, "datasets", module)  # type: ignore[arg-type]
    return calls


def test_a_hub_set_is_streamed_and_only_its_beginning_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = 0

    def rows(_: Any) -> Any:
        nonlocal seen
        for _ in range(10_000):
            seen += 1
            yield {"text": "abcdefgh" * 10}

    calls = fake_datasets(monkeypatch, rows)
    batch = load("owner/name:config", sequences=2, length=20, split="validation")
    assert calls == [(("owner/name", "config"), {"split": "validation", "streaming": True})]
    assert batch.ids.shape == (2, 20)
    assert batch.origin == "owner/name:config"
    assert not batch.notes
    assert seen < 20


def test_a_hub_set_that_fails_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(error: type[Exception]) -> Any:
        raise error("Dataset 'owner/name' doesn't exist on the Hub")

    def breaks(_: Any) -> Any:
        yield {"text": "ab"}
        raise ConnectionError("the line is dead")

    fake_datasets(monkeypatch, gone)
    with pytest.raises(
        BadInput, match=r"'owner/name', split 'train', could not be fetched .Dataset 'owner/name' doesn't"
    ):
        load("owner/name")
    fake_datasets(monkeypatch, breaks)
    with pytest.raises(BadInput, match="the line is dead"):
        load("owner/name")
    fake_datasets(monkeypatch, [{"text": "ab"}, {"body": "c"}])
    with pytest.raises(BadInput, match="owner/name, split train, row 2 has no field 'text'"):
        load("owner/name")


@pytest.mark.parametrize(("package", "spec"), [("datasets", "owner/name"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named(package: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=f"{package!r}.*is not installed; run pip install"):
        load(spec)


@pytest.mark.parametrize(
    ("content", "options", "sentence"),
    [
        ('{"text": "a"}\n{"text": ', {}, r"bad.jsonl, line 2 is not valid JSON: .* at column 10"),
        ('{"text": "a"}\n\n{"body": "a"}', {}, r"bad.jsonl, line 3 has no field 'text' or .*; its fields are 'body'"),
        ('{"text": "a"}', {"field": "body"}, r"line 1 has no field 'body'; its fields are 'text'"),
        ('{"text": null}', {}, r"line 1: field 'text' holds null, expected a string"),
        ('{"text": 3}', {}, r"line 1: field 'text' holds a value of type int"),
        ("[1]", {}, r"line 1 holds a value of type list, expected an object"),
        ('{"messages": ["hi"]}', {}, r"line 1, field 'messages', turn 1 is a value of type str"),
        ('{"messages": [{"role": "user"}]}', {}, r"turn 1 has no text in .*found \['role'\]"),
        ('{"messages": [{"role": "owl", "content": "hu"}]}', {}, r"line 1: .* refuses the conversation .no such role"),
        ('{"text": "a"}', {"chat": True}, r"line 1 holds plain text, and conversations were asked for"),
        ("", {}, r"bad.jsonl holds no text"),
        ('{"text": ""}', {}, r"bad.jsonl holds no text"),
    ],
)
def test_bad_json_lines(tmp_path: Path, content: str, options: Any, sentence: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(BadInput, match=sentence):
        load(path, CHAT, **options)


def test_bad_utf8_names_file_line_and_place(tmp_path: Path) -> None:
    for name, content in (("bad.txt", b"one\ntw\xffo"), ("bad.jsonl", b'{"text": "a"}\n\xc3')):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BadInput, match=f"{name}, line 2 is not UTF-8: byte 0x(ff at position 3|c3 at position 1)"):
            load(path)


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(BadInput, match=r"bad.parquet could not be read as Parquet"):
        load(path)
    pq.write_table(pa.table({"n": [1]}), path)
    with pytest.raises(BadInput, match=r"bad.parquet has no field 'text' or .*; its fields are 'n'"):
        load(path)
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(BadInput, match=r"bad.parquet, row 2: field 'text' holds null"):
        load(path)


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="There is no file"):
        load(tmp_path / "none.txt")
    with pytest.raises(BadInput, match=r"There is no file none\.jsonl"):
        load("none.jsonl")
    (tmp_path / "a.pdf").write_text("a")
    with pytest.raises(BadInput, match=r"a.pdf ends in '.pdf', expected .txt, .jsonl, .parquet"):
        load(tmp_path / "a.pdf")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(BadInput, match=r"empty.txt holds no text"):
        load(tmp_path / "empty.txt")
    (tmp_path / "a.txt").write_text("a b c")
    with pytest.raises(BadInput, match=r"a.txt is plain text and has no field 'body'"):
        load(tmp_path / "a.txt", field="body")
    with pytest.raises(BadInput, match="no chat template"):
        load(tmp_path / "a.txt", chat=True)
    with pytest.raises(BadInput, match="0 sequences of 5 tokens"):
        load(["text"], sequences=0, length=5)
    with pytest.raises(BadInput, match="Text 1 of the given texts is a int"):
        load(["text", 3])


def test_too_little_text_gives_less_and_says_so() -> None:
    batch = load(["x" * 24], sequences=4, length=10)
    assert batch.ids.shape == (2, 10)
    assert batch.notes[0].startswith("given texts holds only 25 tokens: 2 sequence(s) of 10 instead of 4 of 10")
    batch = load(["x" * 6], sequences=4, length=10)
    assert batch.ids.shape == (1, 7)
    assert "only 7 tokens" in batch.notes[0]
    assert not load(["x" * 39], sequences=4, length=10).notes


def test_windows_come_from_all_of_the_text_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{n:07d}\n" for n in range(2000)))
    one, same, other = (load(path, sequences=4, length=16, seed=seed) for seed in (3, 3, 4))
    assert one.digest() == same.digest() != other.digest()
    # A window is 16 successive characters of the file, and windows neither overlap nor change order.
    content = path.read_text()
    places = [content.index(PLAIN.decode(row).replace(" ", "")) for row in one.ids]
    assert all(later - before >= 16 for before, later in pairwise(places))
    assert len({place // 4000 for seed in range(8) for place in _places(path, seed)}) == 4


def _places(path: Path, seed: int) -> list[int]:
    content = path.read_text()
    return [
        content.index(PLAIN.decode(row).replace(" ", "")) for row in load(path, sequences=4, length=16, seed=seed).ids
    ]


def test_of_a_large_text_only_what_is_drawn_is_tokenised(tmp_path: Path) -> None:
    seen = 0

    class Counting:
        eos_token_id = 2

        def __call__(self, texts: Any, **options: Any) -> Any:
            nonlocal seen
            seen += sum(map(len, texts))
            return PLAIN(texts, **options)

    path = lines_file(tmp_path, *({"text": f"{n:04d} " * 10} for n in range(5000)))
    batch = load(path, Counting(), sequences=2, length=100)
    assert batch.ids.shape == (2, 100)
    assert seen < 5000
    # ... and yet a line that cannot be read is found, wherever it is.
    lines_file(tmp_path, *({"text": f"{n:04d} " * 10} for n in range(5000)), "{")
    with pytest.raises(BadInput, match="line 5001"):
        load(path, sequences=2, length=100)


def test_dense_text_is_searched_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where few tokens come out of many characters, more documents are taken until there are enough."""

    class Coarse:
        eos_token_id = None

        def __call__(self, texts: Any, **_: Any) -> Any:
            if isinstance(texts, str):
                return {"input_ids": [0]}
            return {"input_ids": [[7] * (len(text) // 50) for text in texts]}

    batch = load(["y" * 500] * 200, Coarse(), sequences=5, length=100)
    assert batch.ids.shape == (5, 100)
    assert not batch.notes


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(alphabet="ab \n", max_size=60), min_size=1, max_size=5),
    unit=st.integers(min_value=4, max_value=40),
)
def test_cutting_long_documents_changes_no_token(texts: list[str], unit: int) -> None:
    expected = [token for text in texts if text for token in [*ids_of(text), 2]]
    if len(expected) < 2:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "UNIT", unit)
        assert load(texts).ids[0].tolist() == expected


def test_a_long_line_is_cut_before_spaces() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "UNIT", 10)
        pieces = list(text_module._cut("alpha beta gamma\ndelta epsilonzetaeta"))
    assert "".join(pieces) == "alpha beta gamma\ndelta epsilonzetaeta"
    assert pieces == ["alpha beta", " gamma\n", "delta", " epsilonze", "taeta"]


def test_digest_is_of_shape_and_little_endian_ids() -> None:
    batch = TokenBatch(torch.tensor([[1, 2], [3, 4]]), "here", 0)
    data = b"2,2\n" + struct.pack("<4q", 1, 2, 3, 4)
    assert batch.digest() == hashlib.sha256(data).hexdigest()
    assert batch.tokens == 4
    assert TokenBatch(torch.tensor([[1, 2, 3, 4]]), "here", 0).digest() != batch.digest()
    assert TokenBatch(torch.tensor([[1, 3], [2, 4]]).T, "here", 0).digest() == batch.digest()


def test_token_batch_refuses_other_shapes_and_types() -> None:
    for ids in (torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3)):
        with pytest.raises(BadInput, match=r"expected .sequences, length."):
            TokenBatch(ids, "here", 0)


@given(total=st.integers(2, 40), data=st.data())
def test_split_held_out(total: int, data: st.DataObject) -> None:
    batch = TokenBatch(torch.arange(total * 3).reshape(total, 3), "here", 5, ("note",))
    count = data.draw(st.integers(1, total - 1))
    for part in (count, count / total):
        kept, held = batch.split_held_out(part)
        assert torch.equal(torch.cat([kept.ids, held.ids]), batch.ids)
        assert held.ids.shape[0] == count
        assert (kept.origin, kept.seed, held.notes) == ("here", 5, ("note",))


@pytest.mark.parametrize("part", [0, 3, 4, 1.0])
def test_split_refuses_an_empty_side(part: float) -> None:
    with pytest.raises(BadInput, match="here has 3 sequences"):
        TokenBatch(torch.zeros(3, 2, dtype=torch.int64), "here", 0).split_held_out(part)
