"""Run a folder by stock transformers in a process of its own: this file is run by itself and imports nothing of tersor.

Takes lines of JSON (token numbers of one sequence) and answers each with eight bytes (how many float32 follow, little
endian) and the logits, token by token. Everything that libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def load(folder: str) -> Any:
    """The model as ``from_pretrained`` loads it.

    Zero points are the exception: transformers 5.23 makes room for them before the library (0.20) has packed them, so
    that no such folder loads. They are read by the library alone, into a model of the same class.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads((Path(folder) / "config.json").read_text("utf-8"))["quantization_config"]
    if all(group["weights"].get("symmetric", True) for group in settings["config_groups"].values()):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        # The library would do so at the first token, and leaves some formats in bfloat16 among float32.
        model.hf_quantizer.compressor.decompress_model(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        return model
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import load_file

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    schemes = QuantizationConfig.model_validate(settings)
    apply_quantization_config(model, schemes)
    ModelCompressor(quantization_config=schemes).compress_model(model)
    found = {name: value for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()}
    wrong = model.load_state_dict(found, strict=False)
    missing = set(wrong.missing_keys) - set(getattr(model, "all_tied_weights_keys", None) or ())
    if missing or wrong.unexpected_keys:
        raise SystemExit(f"the tensors do not fit the model: {sorted(missing) or wrong.unexpected_keys}")
    return model


def main() -> None:
    """``serve.py FOLDER THREADS``."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(int(sys.argv[2]))
    model = load(sys.argv[1]).eval()
    if any(name.partition(".")[0] == "tersor" for name in sys.modules):
        raise SystemExit("tersor was imported, so this would prove nothing")
    for line in sys.stdin:
        with torch.no_grad():
            logits = model(torch.tensor([json.loads(line)])).logits[0].float().contiguous()
        answers.write(logits.numel().to_bytes(8, "little"))
        answers.write(memoryview(logits.reshape(-1).view(torch.uint8).numpy()))
        answers.flush()


if __name__ == "__main__":
    main()
