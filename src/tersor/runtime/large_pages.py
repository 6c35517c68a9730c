"""Packed weights in large pages of memory, where the system has them.

A product reads each weight once, in order, and what limits it is how fast memory is read. Mapped files come in pages of
4 KB, at each of which the processor looks up an address and stops fetching ahead: with pages of 2 MB a token of a model
of 4 bits took a tenth less time. The weights are then the process's own memory, as many bytes as they were of the
file's.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterable

import psutil
import torch
from torch import Tensor

from tersor.runtime.packed import Packed

PAGE = 2 << 20
_ALIGNED = 64
_SWITCH = "/sys/kernel/mm/transparent_hugepage/enabled"


def move(modules: Iterable[Packed]) -> bool:
    """Copy the stored tensors of packed modules on the processor into large pages, in place; whether that was done.

    It is not where the system has no such pages to give, where the weights are less than one of them, or where half of
    the memory that is free would not hold them.
    """
    parts = [(module, name) for module in modules for name in module.part_names]
    parts = [(module, name) for module, name in parts if module.part(name).device.type == "cpu"]
    distinct = {_place(module.part(name)): module.part(name) for module, name in parts}
    total = sum(_room(part) for part in distinct.values())
    if not PAGE <= total <= psutil.virtual_memory().available // 2 or not _offered():
        return False
    # Private memory: what is shared between processes has no large pages here.
    memory = mmap.mmap(-1, total + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory for as long as a tensor is in it
    at = -room.data_ptr() % PAGE
    copies = {}
    for place, part in distinct.items():
        copies[place] = room[at : at + part.numel() * part.element_size()].view(part.dtype).view(part.shape)
        copies[place].copy_(part)
        at += _room(part)
    del distinct
    for module, name in parts:
        module._buffers[name] = copies[_place(module.part(name))]
    return True


def _place(part: Tensor) -> tuple[int, torch.dtype, torch.Size]:
    return part.data_ptr(), part.dtype, part.shape


def _room(part: Tensor) -> int:
    return -(-part.numel() * part.element_size() // _ALIGNED) * _ALIGNED


def _offered() -> bool:
    """Whether the system gives large pages to whom asks for them."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        with open(_SWITCH) as file:
            return "[never]" not in file.read()
    except OSError:
        return False
