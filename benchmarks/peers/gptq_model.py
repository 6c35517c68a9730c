"""GPTQModel: error feedback on integers, its own defaults otherwise. Settings: bits, group, sequences, length."""

from __future__ import annotations

import os
from typing import Any

# On two processors its own default is one worker, and then it refuses to start.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 1)))

import torch
from common import Job, main
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ


def quantize(job: Job) -> None:
    """Quantize, save, load what was saved with the plain torch kernel and let that dequantize."""
    config = QuantizeConfig(bits=job.settings["bits"], group_size=job.settings["group"], device="cpu")
    model = GPTQModel.load(str(job.model), config)
    examples = [{"input_ids": window[0].tolist(), "attention_mask": [1] * window.shape[1]} for window in job.windows()]
    solve = GPTQ.quantize

    def counted(*args: Any, **kwargs: Any) -> Any:
        with job.solving:
            return solve(*args, **kwargs)

    GPTQ.quantize = counted
    with job.timed():
        model.quantize(examples, batch_size=1)
    model.save(str(job.files))
    del model
    loaded = GPTQModel.load(str(job.files), backend=BACKEND.TORCH, device="cpu")
    tensors = {}
    for name, module in loaded.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            with torch.no_grad():
                # The kernel multiplies from the right: (in, out).
                tensors[f"{name}.weight"] = module.dequantize_weight().T
    job.finish("gptqmodel", tensors, job.stored_bits())


if __name__ == "__main__":
    main(quantize)
