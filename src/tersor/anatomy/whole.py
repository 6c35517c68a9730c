"""A source's model with all its weights in memory, for what needs it whole: sampling text, and texts to read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from tersor.anatomy.source import Source
from tersor.anatomy.structure import BASE, fill_buffers, skeleton
from tersor.anatomy.weights import WeightLoader, aliases


def load_whole(source: Source, dtype: torch.dtype) -> Any:
    """The transformers model of ``source`` in ``dtype``, in evaluation mode.

    transformers loads it, unless weights have to be dequantized: that is done here, one tensor at a time, so that no
    other package is needed. Parameters that the class insists on having in another type keep that.
    """
    if not source.computed:
        return AutoModelForCausalLM.from_pretrained(
            source.path, dtype=dtype, trust_remote_code=source.trust_remote_code
        ).eval()
    model: Any = skeleton(source)
    loader = WeightLoader(source, model)
    same = aliases(model)
    for name, tensor in model.state_dict().items():
        if tensor.is_meta and same.get(name, (name,))[0] == name:
            value = loader.load([name], dtype if tensor.dtype == BASE else tensor.dtype)[name]
            parameter = nn.Parameter(value, requires_grad=False)
            for alias in same.get(name, (name,)):
                _put(model, alias, parameter)
    fill_buffers(model, dtype)
    model.config.dtype = dtype
    if (source.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.path)
    return model


def _put(model: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value.data
