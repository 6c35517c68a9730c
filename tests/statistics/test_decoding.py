"""Stepping through a model gives the logits of running it at once, whichever way of stepping is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

import tiny_models
from tersor.errors import BadInput
from tersor.statistics import decoding
from tersor.statistics.decoding import ATTENTION, Step, cache_bytes, decoder

FAST = {"llama", "llama-tied", "qwen2", "qwen3", "phi3", "mixtral", "olmo2", "deepseek", "neox", "gpt2", "opt"}
"""Families for which the fast way must be taken; it may be for others."""


def is_fast(step: Step) -> bool:
    return step.__qualname__.startswith("_block_cache")


WIDE = {"mistral", "gemma2", "gemma3"}
"""Families with sliding windows, for which it must be taken when the window holds the whole sequence."""


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, {}) for family in sorted(tiny_models.FAMILIES)]
    + [(family, {"sliding_window": 11}) for family in sorted(WIDE)],
)
def test_steps_equal_one_run(family: str, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "BLOCK", 3)
    model = tiny_models.build(family, **options).eval()
    before = model.config._attn_implementation
    ids = torch.randint(0, 100, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids).logits
        with decoder(model, length=11) as new_step:
            step = new_step()
            found = torch.stack([step(ids[:, at : at + 1]) for at in range(11)], 1)
            # A second batch has a memory of its own.
            again = new_step()(ids[:, :1])
    assert is_fast(step) or family not in (FAST | WIDE if options else FAST)
    assert not (is_fast(step) and family in WIDE and not options)
    assert model.config._attn_implementation == before
    torch.testing.assert_close(found, expected, atol=2e-4 * float(expected.std()), rtol=1e-3)
    torch.testing.assert_close(again, expected[:, 0], atol=2e-4 * float(expected.std()), rtol=1e-3)


def test_a_model_without_attention_is_stepped_through_its_own_cache() -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    ids = torch.arange(6)[None]
    with torch.inference_mode(), decoder(model, length=11) as new_step:
        step = new_step()
        found = torch.stack([step(ids[:, at : at + 1]) for at in range(6)], 1)
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-4)
    assert not is_fast(step)


def test_a_model_without_memory_is_refused() -> None:
    class Forgetful(torch.nn.Module):
        def forward(self, **_: Any) -> dict[str, Any]:
            return {"logits": torch.zeros(1, 1, 5)}

    with decoder(Forgetful(), length=11) as new_step, pytest.raises(BadInput, match="Forgetful keeps no cache"):
        new_step()(torch.zeros(1, 1, dtype=torch.int64))


def refuse(*_: Any, **__: Any) -> Any:
    raise decoding._RefusedError("softcap")


def wrong(_module: Any, query: torch.Tensor, *_: Any, **__: Any) -> Any:
    return query.transpose(1, 2) * 3, None


@pytest.mark.parametrize("attend", [refuse, wrong])
def test_where_the_fast_way_differs_it_is_not_taken(
    attend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_attend", attend)
    model = tiny_models.build("llama").eval()
    before = model.config._attn_implementation
    with torch.inference_mode(), decoder(model, length=11) as new_step:
        step = new_step()
        assert not is_fast(step)
        assert model.config._attn_implementation == before != ATTENTION
        torch.testing.assert_close(step(torch.tensor([[5]])), model(torch.tensor([[5]])).logits[:, 0])


def test_the_attention_is_set_back_after_an_error() -> None:
    model = tiny_models.build("llama").eval()
    before = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), decoder(model, length=11):  # noqa: PT012
        assert model.config._attn_implementation == ATTENTION
        raise ZeroDivisionError
    assert model.config._attn_implementation == before


def test_cache_bytes_are_those_of_the_buffers() -> None:
    model = tiny_models.build("llama", dtype=torch.bfloat16).eval()
    with torch.inference_mode(), decoder(model, length=11) as new_step:
        step = new_step()
        for _ in range(3):
            step(torch.zeros(2, 1, dtype=torch.int64))
    cache = next(cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, "layers"))  # type: ignore[attr-defined]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(model, batch=2, length=3) == held
