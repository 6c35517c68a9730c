"""The page as text: escaped, complete, deterministic, and alone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tersor.contracts import Quality, TensorFate
from tersor.errors import BadInput
from tersor.report import Check, FileDigest, Note, ReportData, Sample, Stage, TextRecord, render, write_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} <!-- \" ' & \u2028"


class Elements(HTMLParser):
    """Names of elements and attributes, links, and the texts of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: dict[str, str] = {}
        self.ids: list[str] = []
        self._inside: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id" and value]
        self._inside = dict(attrs).get("id") or "" if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data


def hostile(full: ReportData) -> ReportData:
    """Every text is an attack."""
    layers = tuple(replace(r, codec=HOSTILE, layer=replace(r.layer, name=HOSTILE + r.layer.name)) for r in full.layers)
    return replace(
        full,
        model=HOSTILE, model_type=HOSTILE, layers=layers, created=HOSTILE, command=HOSTILE, fingerprint=HOSTILE,
        plan=HOSTILE, machine={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE, "tersor": HOSTILE}, seeds={HOSTILE: 1},
        tensors=(TensorFate(HOSTILE, HOSTILE, (1,), "kept", HOSTILE, HOSTILE),),
        quality=Quality(0.1, 0.01, 2.0, 1.0, 0.9, 10, HOSTILE),
        samples=(Sample(HOSTILE, HOSTILE, HOSTILE + "x"), Sample(HOSTILE, "", HOSTILE)),
        stages=(Stage(HOSTILE, 1.0),), checks=(Check(HOSTILE, False, HOSTILE),),
        notes=(Note("warning", HOSTILE, HOSTILE),),
        texts=(TextRecord(HOSTILE, HOSTILE, 1, HOSTILE),), files=(FileDigest(HOSTILE, 1, HOSTILE),),
    )  # fmt: skip


def test_hostile_texts_stay_texts(full: ReportData) -> None:
    calm, attacked = Elements(render(full)), Elements(render(hostile(full)))
    assert attacked.tags.count("script") == calm.tags.count("script")
    assert "img" not in attacked.tags
    assert not [name for name, _ in attacked.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in render(hostile(full)).replace("&#34;", '"')
    assert json.loads(attacked.scripts["report"])["data"]["model"] == HOSTILE


def test_the_page_asks_for_nothing(full: ReportData) -> None:
    page = render(full)
    found = Elements(page)
    for name, value in found.attributes:
        if name in ("src", "href", "action", "poster", "srcset", "data"):
            assert value is not None
            assert value.startswith(("#", "data:")), (name, value)
    assert not set(found.tags) & {"iframe", "object", "embed", "form", "base"}
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(", page.split("<style>")[1].split("</style>")[0])


def test_links_and_labels_point_somewhere(full: ReportData) -> None:
    found = Elements(render(full))
    assert len(found.ids) == len(set(found.ids))
    for name, value in found.attributes:
        if name == "href" and value and value.startswith("#"):
            assert value[1:] in found.ids
        if name in ("for", "aria-labelledby", "aria-describedby", "data-copy") and value:
            assert set(value.split()) <= set(found.ids), (name, value)


def test_the_same_data_give_the_same_page(full: ReportData) -> None:
    assert render(full) == render(ReportData.from_json(full.to_json()))


def test_the_page_holds_its_own_data(full: ReportData) -> None:
    payload = json.loads(Elements(render(full)).scripts["report"])
    assert ReportData.from_json(json.dumps(payload["data"])) == full


@pytest.mark.parametrize(
    "change",
    [
        {"quality": None},
        {"predicted": None},
        {"quality": None, "predicted": None},
        {"samples": ()},
        {"stages": ()},
        {"stages": (), "peak_memory": None},
        {"memory_cap": None},
        {"checks": (), "notes": ()},
        {"tensors": ()},
        {"plan": "", "command": "", "fingerprint": "", "files": (), "texts": (), "seeds": {}, "versions": {}},
        {"budget": None},
        {"parameters": 0},
        {"source_bytes": 0},
        {"predicted": math.inf},
        {"quality": Quality(math.inf, math.nan, math.nan, 20.0, 0.0, 1, "x")},
        {"quality": Quality(0.0, 0.0, 20.0, 20.0, 1.0, 1, "x"), "predicted": 0.0},
    ],
)
def test_any_part_may_be_missing(full: ReportData, change: dict) -> None:
    page = render(replace(full, **change))
    assert "</html>" in page
    assert ">None<" not in page
    assert ">nan<" not in page
    assert "Undefined" not in page


def test_the_least_report_leaves_sections_out(least: ReportData) -> None:
    found = Elements(render(least))
    assert {"summary", "size", "reproduce"} <= set(found.ids)
    assert not {"layers", "loss", "samples", "cost", "notes", "tensors", "plotly"} & set(found.ids)


def test_what_the_reader_must_see_is_there(full: ReportData) -> None:
    page = render(replace(full, checks=(*full.checks, Check("Reload", False, "one tensor differs"))))
    for text in (
        "67.3 MB", "22.5 → 27.3", "81.3%", "of the budget", "2 warnings", "1 check failed", "one tensor differs",
        "raised to 0.04", full.command, full.fingerprint, full.files[0].sha256, full.texts[0].sha256,
        "1.38 GB of at most",
    ):  # fmt: skip
        assert text in page, text


def test_texts_are_marked_from_where_they_differ(least: ReportData) -> None:
    page = render(replace(least, samples=(Sample("p", "one two three", "one two thirty"), Sample("p", "same", "same"))))
    assert "one two <mark>three</mark>" in page
    assert "one two <mark>thirty</mark>" in page
    assert "The two texts are the same." in page


def test_writing(tmp_path: Path, least: ReportData) -> None:
    path = tmp_path / "report.html"
    write_report(path, replace(least, model="naïve 模型 \ud800"))
    assert "naïve 模型 &#55296;" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(BadInput, match=r"cannot be written to .*No such file or directory"):
        write_report(tmp_path / "missing" / "report.html", least)


def test_size_of_the_page(full: ReportData) -> None:
    assert len(render(full)) < 3_000_000
