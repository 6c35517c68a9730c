"""tersor's models in transformers: ``AutoModelForCausalLM.from_pretrained(folder)`` after ``import tersor``.

:func:`register` announces a quantization method named "tersor" through transformers' own registration functions, and
does nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from tersor.errors import BadInput, CorruptArtifact

METHOD = "tersor"
FORMAT = 1


class TersorConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The ``quantization_config`` of an artifact's config.json.

    ``layers``: ``{layer name: codec text}``. ``format``: version of what is on disk. Raises BadInput for a format that
    this version does not know, and for anything else that is not as it must be.
    """

    def __init__(
        self, layers: dict[str, str] | None = None, format: int = FORMAT, quant_method: str = METHOD, **unknown: Any
    ) -> None:
        if format != FORMAT:
            raise BadInput(
                f"This model is in tersor's format {format!r}, and this version of tersor reads format {FORMAT}: "
                f"upgrade tersor."
            )
        if unknown:
            raise BadInput(f"quantization_config of config.json has the unknown entry {next(iter(unknown))!r}.")
        if not isinstance(layers, dict) or not all(isinstance(text, str) for pair in layers.items() for text in pair):
            raise BadInput("quantization_config of config.json needs an entry 'layers' of the form {layer: codec}.")
        self.quant_method = quant_method
        self.format = format
        self.layers = layers


class TersorQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads, saves and dequantizes artifacts for transformers."""

    quantization_config: TersorConfig

    def __init__(self, quantization_config: TersorConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise BadInput("A plain model cannot be loaded with a TersorConfig; compress it with `tersor compress`.")
        self._slots: Sequence[Any] = ()
        self._parts: dict[str, Any] = {}
        self._files_checked = False
        self._experts: str | None = None

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_options: Any
    ) -> Any:
        # Imported when a model is loaded: these need transformers' model code, which takes seconds to import.
        from tersor.engines.replace import find_slots, insert
        from tersor.engines.stored import check_files

        names = model.config.architectures
        whole = not names or type(model).__name__ in names
        self._slots = find_slots(model, self.quantization_config.layers, whole=whole)
        self._parts = {name: part for slot in self._slots for name, part in slot.parts.items()}
        self._experts = model.config._experts_implementation
        insert(model, self._slots)
        if not whole:
            # What this model will be saved with: its own names, and no layers that it does not have.
            self.quantization_config.layers = {slot.path: slot.text for slot in self._slots}
        if checkpoint_files is not None:
            check_files(checkpoint_files, model, self._parts, whole=whole)
            self._files_checked = True
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Parts are loaded as they are stored, whatever dtype the model is asked for in."""
        if any(target in self._parts for target in converter.target_patterns):
            return None
        return cast("torch.dtype | None", super().get_new_dtype(converter, param, dtype))

    def update_weight_conversions(self, _conversions: Any, _model: Any = None) -> list[Any]:
        """None: an artifact's tensors are named and shaped as the model in memory has them."""
        return []

    def _process_model_after_weight_loading(self, model: Any, **_options: Any) -> Any:
        """Parts must be there as declared, also where the weights came as a dictionary and not in files."""
        for name, part in self._parts.items():
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            tensor = module._buffers[last]
            # The mark that transformers leaves on what it has loaded, and not on what it made up.
            if not self._files_checked and not getattr(tensor, "_is_hf_initialized", False):
                raise CorruptArtifact(f"The tensor {name!r} is not among the weights given, or has a wrong shape.")
            # Some versions upcast what a model wants in float32 (`_keep_in_fp32_modules`); going back loses nothing.
            module._buffers[last] = tensor.to(part.dtype)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from tersor.engines.replace import remove

        if dtype is not None and dtype != model.config.dtype:
            model.to(dtype)
            model.config.dtype = dtype
        remove(model, self._slots, experts=self._experts)
        # Names and layout of the original checkpoints are transformers' business again.
        model._weight_conversions = None
        return model

    def is_serializable(self, **_options: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through packed layers, so adapters can be trained; the packed weights themselves cannot."""
        return True


def register() -> None:
    """Make transformers know the method "tersor". Calling it again does nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(TersorConfig)
        register_quantizer(METHOD)(TersorQuantizer)
