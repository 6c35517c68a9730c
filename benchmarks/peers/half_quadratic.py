"""HQQ: half-quadratic zero points, no calibration. Settings: bits, group."""

from __future__ import annotations

import torch
from common import Job, main
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def quantize(job: Job) -> None:
    """Every linear layer by itself. The library stores 3 bits as ten codes in 32 bits; that is what is counted."""
    config = BaseQuantizeConfig(nbits=job.settings["bits"], group_size=job.settings["group"], axis=1)
    linears = job.linears()
    tensors = {}
    stored = 0
    for name, weight in job.sources():
        if name.removesuffix(".weight") not in linears:
            continue
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.float()
        with job.timed():
            done = HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")
        tensors[name] = done.dequantize()
        # Scales and zeros are written in half precision by users of the library; here they are kept in float32.
        side = sum(done.meta[part].numel() for part in ("scale", "zero"))
        stored += weight.numel() * job.settings["bits"] / 8 + 2 * side
    job.notes.append("codes counted at their width and scales and zeros at 16 bits; the library's own file is larger")
    job.finish("hqq", tensors, 8 * stored / sum(linears.values()), saved=False)


if __name__ == "__main__":
    main(quantize)
