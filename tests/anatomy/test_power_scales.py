"""FP8 checkpoints whose scales are powers of two (E8M0), as the newer DeepSeek models store them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tersor.anatomy.packed import unpack
from tersor.anatomy.shards import list_tensors, map_tensor
from tersor.errors import CorruptArtifact

E8M0 = getattr(torch, "float8_e8m0fnu", None)
pytestmark = pytest.mark.skipif(E8M0 is None, reason="this torch has no float8_e8m0fnu")


def unpacked(folder: Path, tensors: dict[str, Tensor], **raw: object) -> Tensor:
    save_file({f"m.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [12, 20]}
    made, _ = unpack({"quantization_config": settings, **raw}, list_tensors(folder), folder)
    return map_tensor(made["m.weight"])


@pytest.mark.parametrize(("dtype", "said"), [(torch.bfloat16, None), (torch.float16, "float16")])
@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale"])
def test_they_are_read(leaf: str, dtype: torch.dtype, said: str | None, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randn(30, 41, generator=draw).to(torch.float8_e4m3fn)
    exponents = torch.randint(118, 134, (3, 3), generator=draw)
    assert E8M0 is not None
    scales = exponents.to(torch.uint8).view(E8M0)
    found = unpacked(tmp_path, {"weight": codes, leaf: scales}, dtype=said)
    spread = torch.exp2(exponents.double() - 127).repeat_interleave(12, 0).repeat_interleave(20, 1)[:30, :41]
    assert found.dtype == dtype
    assert torch.equal(found, (codes.double() * spread).to(dtype))


def test_scales_of_other_types_are_still_refused(tmp_path: Path) -> None:
    codes = torch.zeros(24, 40).to(torch.float8_e4m3fn)
    with pytest.raises(CorruptArtifact, match="has the type int32, expected float16 or bfloat16 or float32"):
        unpacked(tmp_path, {"weight": codes, "weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)})
