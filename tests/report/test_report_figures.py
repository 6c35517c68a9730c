"""The numbers behind the charts."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tersor.contracts import Layer, RatePoint
from tersor.report import ReportData
from tersor.report.figures import (
    HEADERS,
    KEPT,
    chosen_index,
    group_of,
    kind_of,
    kind_shares,
    lower_hull,
    size_bars,
    size_parts,
    view,
)

points = st.lists(
    st.builds(RatePoint, st.integers(1, 50), st.floats(0, 100) | st.just(math.inf), st.just("x")), max_size=12
)


@given(points, st.floats(0, 50))
def test_hull_holds_the_best_point_at_every_price(curve: list[RatePoint], price: float) -> None:
    hull = lower_hull(curve)
    finite = [p for p in curve if math.isfinite(p.distortion)]
    assert bool(hull) == bool(finite)
    if finite:
        best = min(p.distortion + price * p.nbytes for p in finite)
        found = min(curve[i].distortion + price * curve[i].nbytes for i in hull)
        assert math.isclose(found, best, rel_tol=1e-9, abs_tol=1e-9)
    sizes = [curve[i].nbytes for i in hull]
    losses = [curve[i].distortion for i in hull]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(set(losses), reverse=True)


def test_bytes_add_up_to_the_file(full: ReportData) -> None:
    parts = size_parts(full)
    assert [part.name for part in parts] == ["Embedding and tied head", "Attention", "MLP", KEPT, HEADERS]
    assert sum(part.stored for part in parts) == full.file_bytes
    # Every weight of the source is bfloat16, and counted once.
    assert sum(part.source or 0 for part in parts) == 2 * full.parameters
    assert sum(part.weights or 0 for part in parts) == full.parameters


def test_bars_leave_the_source_out_when_it_is_not_known(full: ReportData) -> None:
    assert [label for label, _, _ in size_bars(full, size_parts(full))] == ["Original", "Compressed"]
    unknown = replace(full, tensors=())
    assert [label for label, _, _ in size_bars(unknown, size_parts(unknown))] == ["Compressed"]


def layer(name: str, kind: str = "linear", block: int | None = 7) -> Layer:
    return Layer(name, name + ".weight", kind, (8, 8), block, "x")  # type: ignore[arg-type]


def test_groups_and_kinds_of_many_architectures() -> None:
    expected = {
        "model.layers.7.self_attn.q_proj": ("Attention", "self_attn.q_proj"),
        "transformer.h.7.attn.c_attn": ("Attention", "attn.c_attn"),
        "transformer.h.7.self_attention.dense": ("Attention", "self_attention.dense"),
        "transformer.h.7.mlp.c_fc": ("MLP", "mlp.c_fc"),
        "model.decoder.layers.7.fc1": ("MLP", "fc1"),
        "model.layers.7.feed_forward.w1": ("MLP", "feed_forward.w1"),
        "model.layers.7.block_sparse_moe.gate": ("Experts", "block_sparse_moe.gate"),
        "backbone.layers.7.mixer.in_proj": ("mixer", "mixer.in_proj"),
    }
    for name, (group, kind) in expected.items():
        assert (group_of(layer(name), None), kind_of(layer(name))) == (group, kind)
    assert group_of(layer("model.layers.7.mlp.experts.down_proj", "experts"), None) == "Experts"
    assert group_of(layer("lm_head", block=None), "lm_head") == "Output head"
    assert group_of(layer("model.embed_tokens", "embedding", None), None) == "Embedding"
    assert group_of(layer("projection", block=None), "lm_head") == "Other layers"


def test_view_places_every_layer(full: ReportData) -> None:
    shown = view(full)
    assert shown["labels"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert shown["blocks"] == list(range(30))
    assert math.isclose(sum(entry["share"] for entry in shown["layers"]), 1.0)
    for report, entry in zip(full.layers, shown["layers"], strict=True):
        assert (entry["kind"] is None) == (report.layer.block is None)
        assert report.curve[entry["chosen"]].choice == report.codec
        assert chosen_index(report) in entry["hull"]
    json.dumps(shown, allow_nan=False)


def test_shares_by_kind(full: ReportData) -> None:
    rows = kind_shares(full)
    assert [row[1] for row in sorted(rows)] == [30, 30, 30, 1, 30, 30, 30, 30]
    assert math.isclose(sum(row[2] for row in rows), 1.0)
    assert math.isclose(sum(row[3] for row in rows), 1.0)
    assert [row[2] for row in rows] == sorted((row[2] for row in rows), reverse=True)
    assert kind_shares(replace(full, layers=tuple(replace(r, predicted=None) for r in full.layers))) == []
