"""AutoRound checkpoints (arXiv:2309.05516): the layouts of GPTQ and AWQ under a configuration of their own.

``packing_format`` says which: ``auto_round:auto_awq`` is AWQ's for gemm; ``auto_round:auto_gptq`` is GPTQ's first
format without ``g_idx``; ``auto_round`` and what else begins so (``auto_round:gptqmodel``, ``auto_round:exllamav2``)
holds zero points as they are. ``extra_config`` gives single modules other bits or groups. Described after
``export/export_to_autoround`` of AutoRound 0.16 (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tersor.anatomy.packed import awq, gptq
from tersor.anatomy.packed.module import Packed
from tersor.anatomy.shards import TensorInfo
from tersor.errors import BadInput

_INTEGERS = ("int", "int_sym", "int_asym")
_ROTATIONS = ("rotation_config", "spinquant_config")
_FLOATING = ("fp8", "nvfp", "mxfp", "nv_fp", "mx_fp", "fake", "llm_compressor")


def read(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Packed]:
    """Every packed linear by the name of its weight; raises what the readers of GPTQ and AWQ do.

    Raises BadInput for what is packed neither way, and for activations that are rotated while the model runs.
    """
    form, kind = str(settings.get("packing_format") or "auto_round:auto_gptq"), settings.get("data_type") or "int"
    if kind not in _INTEGERS or any(part in form for part in _FLOATING):
        raise BadInput(
            f"The model is packed by AutoRound as {form!r} with numbers {kind!r}, which is not read (read are integers "
            "in the layouts of GPTQ and AWQ); give the original model."
        )
    for name in _ROTATIONS:
        if settings.get(name):
            raise BadInput(
                f"The model rotates activations while it runs ({name}), which its weights alone do not show; give the "
                "original model."
            )
    if "awq" in form:
        return awq.read({**settings, "version": "gemm"}, tensors)
    first = "auto_gptq" in form
    return gptq.read(
        {**settings, "checkpoint_format": "gptq" if first else "gptq_v2", "dynamic": settings.get("extra_config")},
        tensors,
    )
