"""Checkpoints in packed layouts, for the tests of this folder."""

import pytest
import torch

import tiny_packed


@pytest.fixture
def gptq(complete, tmp_path):
    """Makes a GPTQ checkpoint of a tiny model with a tokenizer."""

    def make(bits=4, group=16, *, order=False, v2=False, index=True, family="llama", dtype=torch.float16, **settings):
        given = {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group,
            "desc_act": order,
            "sym": False,
            **({"checkpoint_format": "gptq_v2"} if v2 else {}),
            **settings,
        }
        return tiny_packed.write(
            complete(family, dtype=torch.float16),
            tmp_path / "packed",
            given,
            lambda weight: tiny_packed.round_off(weight, bits, group, order=order, dtype=dtype),
            lambda rounded: tiny_packed.gptq(rounded, bits, minus_one=not v2, index=index),
        )

    return make


@pytest.fixture
def awq(complete, tmp_path):
    """Makes an AWQ checkpoint; ``width``: words of zero points a row, for gemv."""

    def make(group=16, *, width=None, **settings):
        return tiny_packed.write(
            complete("llama", dtype=torch.float16),
            tmp_path / "packed",
            {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, **settings},
            lambda weight: tiny_packed.round_off(weight, 4, group, order=False, dtype=torch.float16),
            lambda r: tiny_packed.awq(r) if width is None else tiny_packed.awq_gemv(r, width),
        )

    return make


@pytest.fixture
def compressed(complete, tmp_path):
    """Makes a pack-quantized checkpoint."""

    def make(bits=4, group=16, *, order=False, index=False, **settings):
        scheme = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
        return tiny_packed.write(
            complete("llama", dtype=torch.bfloat16),
            tmp_path / "packed",
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
                **settings,
            },
            lambda weight: tiny_packed.round_off(weight, bits, group, order=order, dtype=torch.bfloat16),
            lambda rounded: tiny_packed.packed_quantized(rounded, bits, index=index),
        )

    return make
