"""AutoRound: rounding and ranges tuned block by block.

Settings: bits, group, symmetric, iterations, sequences, length.
"""

from __future__ import annotations

import torch
from auto_round import AutoRound
from common import Job, main
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 4
"""Windows tuned on together."""


def quantize(job: Job) -> None:
    """Before packing, the weights in memory are those that the packed file stands for."""
    settings = job.settings
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    windows = torch.cat(job.windows())
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        bits=settings["bits"],
        group_size=settings["group"],
        sym=settings["symmetric"],
        iters=settings["iterations"],
        nsamples=len(windows),
        seqlen=settings["length"],
        batch_size=BATCH,
        dataset=[windows[at : at + BATCH] for at in range(0, len(windows), BATCH)],
        device_map="cpu",
        enable_torch_compile=False,
    )
    with job.timed():
        tuned, _ = tuner.quantize()
    tensors = {f"{name}.weight": tuned.get_submodule(name).weight.detach().clone() for name in job.linears()}
    tuner.save_quantized(str(job.files), format="auto_round", inplace=True)
    job.finish("auto-round", tensors, job.stored_bits())


if __name__ == "__main__":
    main(quantize)
