"""Folders in the format of the library compressed-tensors, which vLLM, SGLang and transformers run."""
