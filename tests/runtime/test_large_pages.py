"""Stored tensors in large pages: the same bits, one block of memory, and left alone where there is no room."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from tersor.codecs import parse
from tersor.runtime import large_pages
from tersor.runtime.packed import PackedLinear


def modules(rows: int = 2048) -> list[PackedLinear]:
    made = []
    for text in ("int4:g32", "int3:g64:asym", "bf16"):
        module = PackedLinear(parse(text), (rows, 1024))
        for name in module.part_names:
            part = module.part(name)
            module._buffers[name] = torch.randint(256, (part.numel() * part.element_size(),)).to(torch.uint8)
            module._buffers[name] = module._buffers[name].view(part.dtype).view(part.shape)
        made.append(module)
    return made


@pytest.mark.skipif(not large_pages._offered(), reason="the system has no large pages to give")
def test_weights_stay_what_they_are() -> None:
    found = modules()
    before = [module.part(name).view(torch.uint8).clone() for module in found for name in module.part_names]
    assert large_pages.move(found)
    parts = [module.part(name) for module in found for name in module.part_names]
    for part, was in zip(parts, before, strict=True):
        assert torch.equal(part.view(torch.uint8), was)
        assert part.data_ptr() % 64 == 0
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    ends = [(part.data_ptr(), part.data_ptr() + part.numel() * part.element_size()) for part in parts]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert ends[0][0] % large_pages.PAGE == 0


@pytest.mark.skipif(not large_pages._offered(), reason="the system has no large pages to give")
def test_what_is_shared_stays_shared() -> None:
    first, other, _ = modules(rows=8192)
    tied = PackedLinear(first.codec, first.stored_shape)
    tied._buffers.update({name: first.part(name) for name in first.part_names})
    assert large_pages.move([first, other, tied])
    assert all(tied.part(name).data_ptr() == first.part(name).data_ptr() for name in first.part_names)


def test_small_weights_are_left_where_they_are() -> None:
    found = modules(rows=64)
    where = [module.part(name).data_ptr() for module in found for name in module.part_names]
    assert not large_pages.move(found)
    assert [module.part(name).data_ptr() for module in found for name in module.part_names] == where


def test_what_no_product_reads_is_left_where_it_is() -> None:
    module = PackedLinear(parse("ternary:row"), (8192, 2048))
    module._buffers.update({name: torch.zeros_like(module.part(name)) for name in module.part_names})
    assert not large_pages.move([module])


def test_a_container_leaves_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("max", "9000000\n"), ("current", "4000000\n")):
        (tmp_path / name).write_text(value)
    monkeypatch.setattr(large_pages, "_CONTAINER", ((str(tmp_path / "max"), str(tmp_path / "current")),))
    assert large_pages._free() == 5_000_000
    assert large_pages.room(3_000_000) is None
    (tmp_path / "max").write_text("max\n")
    assert large_pages._free() > 100_000_000


def test_a_refusal_of_the_system_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(large_pages.mmap, "mmap", refuse)
    assert large_pages.room(large_pages.PAGE) is None


@pytest.mark.parametrize("missing", ["memory", "pages", "system"])
def test_nothing_is_moved_where_there_is_no_room(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "memory":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=6 << 20))
    elif missing == "pages":
        monkeypatch.setattr(large_pages, "_SWITCH", "/nowhere")
    else:
        monkeypatch.setattr(large_pages.sys, "platform", "win32")
    found = modules()
    where = [module.part(name).data_ptr() for module in found for name in module.part_names]
    assert not large_pages.move(found)
    assert [module.part(name).data_ptr() for module in found for name in module.part_names] == where
