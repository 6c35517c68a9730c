"""A damaged weight is found, wherever it is and whatever its type."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersor.errors import NotFinite
from tersor.pipeline import light_context
from tersor.stages.fast import fast_curves
from tersor.stages.options import Budget, Options
from tersor.stages.weights import check_finite, is_finite
from tersor.stages.work import Work

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@given(
    st.sampled_from(TYPES),
    st.lists(st.integers(1, 5), max_size=3),
    st.none() | st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(0, 10**6),
)
def test_one_bad_value_is_found(dtype: torch.dtype, shape: list[int], bad: float | None, where: int) -> None:
    values = torch.full(shape, -2.0)
    if bad is not None:
        values.view(-1)[where % values.numel()] = bad
    tensor = values.to(dtype)
    # Small floats may have no infinity; what they have instead counts.
    assert is_finite(tensor) == bool(torch.isfinite(tensor.float()).all())


def test_what_has_no_such_values_is_finite() -> None:
    assert is_finite(torch.tensor([2**62]))
    assert is_finite(torch.tensor([True, False]))
    assert is_finite(torch.empty(0, 3))


def test_every_tensor_is_read_once_and_the_first_bad_one_named(complete: Callable[..., Path], tmp_path: Path) -> None:
    """Experts too, which several tensors of the file make up; damage in what is not used is no damage."""
    model = Path(shutil.copytree(complete("mixtral"), tmp_path / "model"))
    path = model / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["mtp.unused.weight"] = torch.tensor([math.nan])
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    seen: list[tuple[str, int, int]] = []

    def context(name: str) -> object:
        made = light_context(model, Options(Budget("bpw", 4.0), workers=2), cache_dir=tmp_path)
        return replace(made, work=Work(tmp_path / name), progress=lambda *step: seen.append(step))

    check_finite(context("good"))  # type: ignore[arg-type]
    assert seen[-1] == ("weights", len(tensors) - 1, len(tensors) - 1)
    seen.clear()
    check_finite(context("good"))  # type: ignore[arg-type]
    assert seen == []
    name = next(name for name in tensors if "experts" in name)
    tensors[name][1, 2] = math.nan
    tensors[name][0, 0] = math.inf
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NotFinite, match=f"Tensor {name} in .* has NaN or Inf in 2 of {tensors[name].numel():,} places"):
        check_finite(context("bad"))  # type: ignore[arg-type]


def test_a_fast_plan_looks_at_the_rows_it_samples(small: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(small, tmp_path / "model"))
    path = model / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["lm_head.weight"][3, 4] = math.inf
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(NotFinite, match="weights of lm_head"):
        fast_curves(light_context(model, Options(Budget("bpw", 4.0), workers=1), cache_dir=tmp_path))
