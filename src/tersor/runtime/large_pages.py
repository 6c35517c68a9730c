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
from torch import Tensor, nn

from tersor.runtime.packed import Packed
from tersor.runtime.products import used_as_stored

PAGE = 2 << 20
_ALIGNED = 64
_SWITCH = "/sys/kernel/mm/transparent_hugepage/enabled"
_CONTAINER = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""What a container may take of memory, and has taken: of both versions of control groups."""


def move(modules: Iterable[nn.Module]) -> bool:
    """Copy the stored tensors of the packed ones of ``modules``, on the processor, into large pages, in place; whether
    that was done.

    Only those that products multiply by where they lie. It is not done where the system has no such pages to give,
    where the weights are less than one of them, or where half of the memory that is free would not hold them.
    """
    held: dict[object, list[tuple[Packed, str]]] = {}
    for module in modules:
        if not isinstance(module, Packed) or not used_as_stored(module.codec):
            continue
        for name in module.part_names:
            part = module.part(name)
            if part.device.type == "cpu":
                held.setdefault((part.data_ptr(), part.dtype, part.shape), []).append((module, name))
    memory = room(sum(_padded(who[0][0].part(who[0][1])) for who in held.values()))
    if memory is None:
        return False
    at = 0
    for who in held.values():
        # One after the other, so that what was copied can be let go.
        part = who[0][0].part(who[0][1])
        copied = memory[at : at + part.numel() * part.element_size()].view(part.dtype).view(part.shape)
        copied.copy_(part)
        at += _padded(part)
        for module, name in who:
            module._buffers[name] = copied
    return True


def room(size: int) -> Tensor | None:
    """``size`` bytes (uint8) in large pages, from the beginning of one; None where there are none to have, or ``size``
    is less than one of them or more than half of the memory that is free.
    """
    if size < PAGE or not _offered() or size > _free() // 2:
        return None
    try:
        # Private memory: what is shared between processes has no large pages here.
        memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a limit on the process's memory, or a sandbox
        return None
    found = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory for as long as a tensor is in it
    first = -found.data_ptr() % PAGE
    return found[first : first + size]


def _free() -> int:
    """Bytes that the process may still take: of the machine's, and of what a container leaves it."""
    free: int = psutil.virtual_memory().available
    for most, used in _CONTAINER:
        try:
            with open(most) as limit, open(used) as current:
                free = min(free, int(limit.read()) - int(current.read()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return max(free, 0)


def _padded(part: Tensor) -> int:
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
