"""Decoding with a compiled step: a model's structure found, its program written, proved against the model, and run."""

from tersor.runtime.decoding.decoder import Decoder
from tersor.runtime.decoding.sampling import Chooser, write_on

__all__ = ["Chooser", "Decoder", "write_on"]
