"""Plain torch version of :mod:`tersor.kernels.step`: what its operations compute, without regard to speed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Run = Callable[[int, int], None]
"""One operation for so many tokens from a position on."""


class Program:
    """As :class:`tersor.kernels.step.Program`, but for products, which are given as the weight ``(out, in)``."""

    def __init__(self, tokens: int, context: int) -> None:
        self._runs: list[tuple[Run, bool]] = []
        self._alone = False

    def _push(self, run: Run) -> None:
        self._runs.append((run, self._alone))

    def products(self, x: Tensor, *targets: tuple[Tensor, Tensor, Tensor | None]) -> None:
        """``(y, weight, bias or None)`` for each."""

        def run(n: int, _: int) -> None:
            for y, weight, bias in targets:
                y[:n] = functional.linear(x[:n], weight, bias)

        self._push(run)

    def norm(
        self, x: Tensor, y: Tensor, weight: Tensor, *, eps: float, bias: Tensor | None = None, centred: bool = False
    ) -> None:
        def run(n: int, _: int) -> None:
            rows = x[:n].reshape(n, -1, len(weight))
            if centred:
                done = functional.layer_norm(rows, weight.shape, weight, bias, eps)
            else:
                done = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight
            y[:n] = done.flatten(1)

        self._push(run)

    def rope(self, x: Tensor, cosine: Tensor, sine: Tensor, *, dim: int, neighbours: bool = False) -> None:
        rotary = cosine.shape[1]

        def run(n: int, position: int) -> None:
            heads = torch.stack(x[:n].chunk(x.shape[1] // dim, 1), 1)[..., :rotary]
            if neighbours:
                turned = torch.stack((-heads[..., 1::2], heads[..., 0::2]), -1).flatten(-2)
            else:
                turned = torch.cat((-heads[..., rotary // 2 :], heads[..., : rotary // 2]), -1)
            at = slice(position, position + n)
            done = heads * cosine[at, None] + turned * sine[at, None]
            for head in range(done.shape[1]):
                x[:n, head * dim : head * dim + rotary] = done[:, head]

        self._push(run)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        *,
        keys: Tensor,
        values: Tensor,
        scale: float,
        window: int = 0,
        cap: float = 0.0,
    ) -> None:
        heads, dim = keys.shape[0], keys.shape[2]

        def run(n: int, position: int) -> None:
            for token in range(position, position + n):
                keys[:, token // 16, :, token % 16] = k[token - position].view(heads, dim)
                values[:, token // 16, token % 16, :dim] = v[token - position].view(heads, dim)
            length = position + n
            every_key = keys.float().transpose(2, 3).flatten(1, 2)[:, :length]
            every_value = values.float().flatten(1, 2)[:, :length, :dim]
            queries = q[:n].view(n, heads, -1, dim).permute(1, 2, 0, 3)
            scores = queries @ every_key[:, None].transpose(-1, -2) * scale
            if cap:
                scores = cap * torch.tanh(scores / cap)
            distance = torch.arange(position, length)[:, None] - torch.arange(length)
            seen = (distance >= 0) & (distance < (window or length))
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            y[:n] = (weights @ every_value[:, None]).permute(2, 0, 1, 3).flatten(1)

        self._push(run)

    def gate(self, x: Tensor, up: Tensor, y: Tensor, activation: str) -> None:
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "silu": functional.silu,
            "gelu": functional.gelu,
            "gelu_tanh": lambda values: functional.gelu(values, approximate="tanh"),
            "relu": functional.relu,
        }

        def run(n: int, _: int) -> None:
            y[:n] = functions[activation](x[:n]) * up[:n]

        self._push(run)

    def add(self, x: Tensor, y: Tensor) -> None:
        def run(n: int, _: int) -> None:
            y[:n] += x[:n]

        self._push(run)

    def scale(self, x: Tensor, factor: float) -> None:
        def run(n: int, _: int) -> None:
            x[:n] *= factor

        self._push(run)

    def soft_cap(self, x: Tensor, cap: float) -> None:
        def run(n: int, _: int) -> None:
            x[:n] = cap * torch.tanh(x[:n] / cap)

        self._push(run)

    def take_last(self, x: Tensor, y: Tensor) -> None:
        def run(n: int, _: int) -> None:
            y[0] = x[n - 1]

        self._push(run)
        self._alone = True

    @property
    def size(self) -> int:
        return len(self._runs)

    def run(self, first: int, stop: int, *, tokens: int, position: int) -> None:
        for run, alone in self._runs[first:stop]:
            if alone:
                run(1, position + tokens - 1)
            else:
                run(tokens, position)
