"""llm-compressor: its GPTQ with static order of columns. Settings: bits, group, sequences, length."""

from __future__ import annotations

import torch
from common import Job, main
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM


def quantize(job: Job) -> None:
    """Symmetric integers, scales by group; the weights in memory after the run are those that the file stands for."""
    settings = job.settings
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    windows = job.windows()
    data = Dataset.from_dict(
        {
            "input_ids": [window[0].tolist() for window in windows],
            "attention_mask": [[1] * window.shape[1] for window in windows],
        }
    )
    weights = QuantizationArgs(
        num_bits=settings["bits"], type="int", symmetric=True, strategy="group", group_size=settings["group"]
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], actorder="static")
    with job.timed():
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(windows),
            max_seq_length=settings["length"],
        )
    names = job.linears()
    tensors = {f"{name}.weight": model.get_submodule(name).weight.detach().clone() for name in names}
    model.save_pretrained(str(job.files), save_compressed=True)
    job.finish("llmcompressor", tensors, job.stored_bits())


if __name__ == "__main__":
    main(quantize)
