"""Artifact folders in transformers with compiled products, against plain models that hold the decoded weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tersor.kernels import products
from tersor.runtime.packed import Packed
from tersor.runtime.products import decoded_only

pytestmark = pytest.mark.skipif(not products.available, reason="nothing was compiled")
MakeFolder = Callable[..., Any]


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma2", "gemma3", "falcon"])
@pytest.mark.parametrize("codec", ["int8:g16", "int6:row:asym:s8", "trellis4:L8"])
def test_logits_are_those_of_the_plain_model_within_rounding(
    make_folder: MakeFolder, kind: str, codec: str, ids: Tensor
) -> None:
    folder = make_folder(kind, codec)
    model = load(folder.path)
    packed = [module for module in model.modules() if isinstance(module, Packed)]
    assert packed
    assert all(module.product() is not None for module in packed)
    wanted = logits(folder.plain, ids)
    # Inputs of every layer are off by at most half of their greatest magnitude over 32384.
    torch.testing.assert_close(logits(model, ids), wanted, rtol=0, atol=2e-3 * float(wanted.abs().max()))
    with decoded_only():
        torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_models_with_experts_run(make_folder: MakeFolder, kind: str, ids: Tensor) -> None:
    folder = make_folder(kind, "int8:g16")
    assert torch.isfinite(logits(load(folder.path), ids)).all()


def test_what_is_saved_after_running_are_the_same_bytes(make_folder: MakeFolder, tmp_path: Path, ids: Tensor) -> None:
    folder = make_folder("llama", lambda name: "ternary:row" if "mlp" in name else "bin2:row")
    load(folder.path).save_pretrained(tmp_path / "before")
    model = load(folder.path)
    model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path / "after")
    for file in sorted((tmp_path / "before").iterdir()):
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_sixteen_bits(make_folder: MakeFolder, dtype: torch.dtype, ids: Tensor) -> None:
    folder = make_folder("llama", "int8:row", dtype=dtype)
    found, wanted = logits(load(folder.path), ids), logits(folder.plain.to(dtype), ids)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, wanted, rtol=0, atol=8 * eps * float(wanted.abs().max()))
