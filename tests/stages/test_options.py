"""Sizes, budgets and options as a user writes them."""

from __future__ import annotations

import math
import re
import string
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tersor.anatomy import analyse, open_source, skeleton
from tersor.codecs import parse
from tersor.contracts import Anatomy, Layer
from tersor.errors import BadInput
from tersor.stages.allocate import budget_bytes, dense_layout
from tersor.stages.options import (
    RUNTIME_TILE,
    Budget,
    Options,
    default_candidates,
    parse_budget,
    parse_bytes,
    usable,
)

UNITS = {"": 1, "B": 1, "kB": 1000, "KB": 1000, "MB": 10**6, "gb": 10**9, "KiB": 1024, "MiB": 2**20, "GiB": 2**30}


@pytest.fixture(scope="module")
def anatomy(small: Path) -> Anatomy:
    source = open_source(small)
    return analyse(source, skeleton(source))


@given(st.integers(0, 10**15), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_whole_sizes_are_exact(count: int, unit: str, space: str) -> None:
    assert parse_bytes(f"{count}{space}{unit}", "--size") == count * UNITS[unit]


@given(st.integers(0, 9999), st.integers(0, 999), st.sampled_from(["MB", "GiB"]))
def test_fractions_are_rounded_down_to_a_byte(whole: int, thousandths: int, unit: str) -> None:
    exact = (whole * 1000 + thousandths) * UNITS[unit] // 1000
    assert parse_bytes(f"{whole}.{thousandths:03}{unit}", "--size") == exact


@given(st.text(string.printable, max_size=12))
def test_any_other_text_is_refused_in_a_sentence(text: str) -> None:
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*([kmg]i?)?b?\s*", text, re.IGNORECASE):
        assume(False)
    with pytest.raises(BadInput) as caught:
        parse_bytes(text, "--size")
    assert str(caught.value).startswith(f"--size {text!r} is not a size")


@given(
    st.none() | st.integers(0, 10**12), st.none() | st.integers(0, 10**12), st.none() | st.floats(0.01, 64)
)  # fmt: skip
def test_exactly_one_budget(size: int | None, memory: int | None, bpw: float | None) -> None:
    given_ = [value for value in (size, memory, bpw) if value is not None]
    texts = [None if value is None else str(value) for value in (size, memory)]
    if len(given_) != 1:
        with pytest.raises(BadInput, match="exactly one budget"):
            parse_budget(*texts, bpw)
        return
    budget = parse_budget(*texts, bpw)
    assert budget.amount == given_[0]
    assert budget.kind == ("size" if size is not None else "memory" if memory is not None else "bpw")


@given(st.floats(0.001, 1000, allow_nan=False))
def test_shares_of_the_source(percent: float) -> None:
    budget = parse_budget(f"{percent:.6f}%", None, None)
    assert budget.relative
    assert math.isclose(budget.amount, percent / 100, abs_tol=1e-8)
    assert str(budget).endswith("% of the source")


def test_budgets_in_bytes_of_the_file(anatomy: Anatomy) -> None:
    assert anatomy.source_bytes == 298_240
    assert budget_bytes(anatomy, Budget("size", 12345)) == 12345
    assert budget_bytes(anatomy, Budget("size", 0.25, relative=True)) == 74_560
    assert budget_bytes(anatomy, Budget("bpw", 4.0)) == 74_560 * 4 // 8
    # In memory there is no header, but a decoded tile.
    layout = dense_layout(anatomy)
    header = layout.total_bytes - sum(entry.nbytes for entry in layout.entries.values())
    assert budget_bytes(anatomy, Budget("memory", 5_000_000)) == 5_000_000 - RUNTIME_TILE + header


@pytest.mark.parametrize("kind", ["size", "memory", "bpw"])
def test_what_a_budget_is_told_to_become_is_enough_and_hardly_more(anatomy: Anatomy, kind: str) -> None:
    """``asking_for`` undoes ``file_bytes``."""
    for wanted in range(20_000, 21_000, 37):
        name, value = Budget(kind, 1).asking_for(wanted, anatomy, 1234).split()  # type: ignore[arg-type]
        assert name == f"--{kind}"
        sizes = {"size": None, "memory": None, **({kind: value} if kind != "bpw" else {})}
        budget = parse_budget(sizes["size"], sizes["memory"], float(value) if kind == "bpw" else None)
        assert 0 <= budget.file_bytes(anatomy, 1234) - wanted <= (2 if kind == "bpw" else 0)


@given(st.integers(1, 5000))
def test_default_candidates_are_codecs_that_fit(in_features: int) -> None:
    codecs = {text: parse(text) for text in default_candidates(in_features)}
    layer = Layer("layer", "layer.weight", "linear", (8, in_features), 0, "inputs")
    fitting = usable(codecs, layer)
    assert fitting == list(codecs)  # there is one for every width, and none that cannot be used
    assert {"bf16"} < set(fitting)
    widths = [codec.bits((8, in_features)) for text, codec in codecs.items() if text.startswith("int")]
    assert min(widths) < 0.5 * 16 * 8 * in_features or in_features < 8
    assert len(set(codecs.values())) == len(codecs)


def test_what_may_change_when_a_run_is_continued() -> None:
    base = Options(Budget("size", 1))
    free = {"workers": 3, "max_memory": 10**9, "trust_remote_code": True, "revision": "main"}
    assert Options(Budget("size", 1), **free).identity() == base.identity()
    assert set(base.identity()) == set(asdict(base)) - set(free)
    assert Options(Budget("size", 2)).identity() != base.identity()


@pytest.mark.parametrize("name", ["solver", "sensitivity", "allocator", "dtype"])
def test_choices_name_what_there_is(name: str) -> None:
    with pytest.raises(BadInput, match=f"--{name} 'none' is unknown; use "):
        Options(None, **{name: "none"})
