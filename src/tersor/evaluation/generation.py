"""Text that a model writes, for a reader to look at before and after compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from tersor.errors import BadInput


def continue_prompts(model: Any, tokenizer: Any, prompts: Sequence[str], *, tokens: int = 64) -> list[tuple[str, str]]:
    """(prompt, text) for each prompt: at most ``tokens`` tokens that the model has positions for, always the likeliest.

    ``model``: a causal language model of transformers. Where the tokenizer has a chat template, a prompt is the turn
    of a user and the text is the answer; otherwise the text goes on where the prompt stops. Special tokens are left
    out of the text.
    """
    written = []
    for prompt in prompts:
        ids = _encoded(tokenizer, prompt).to(model.device)
        room = min(tokens, _positions(model, ids.shape[1] + tokens) - ids.shape[1])
        if room < 1:
            written.append((prompt, ""))
            continue
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=_greedy(model, tokenizer, room)
            )
        written.append((prompt, tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
    return written


def _encoded(tokenizer: Any, prompt: str) -> torch.Tensor:
    """``(1, n)`` ids of the prompt as the model expects it."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(prompt)["input_ids"]
    if not ids:
        raise BadInput("A prompt is empty, and the tokenizer puts nothing before it; give at least one word.")
    return torch.tensor([ids], dtype=torch.int64)


def _positions(model: Any, default: int) -> int:
    """Tokens that the model has positions for, as its configuration says; ``default`` where it says nothing."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else default


def _greedy(model: Any, tokenizer: Any, tokens: int) -> GenerationConfig:
    """A configuration of our own, so that the sampling settings a model comes with play no part."""
    end = getattr(model.generation_config, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    first = end[0] if isinstance(end, list) else end
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first
    return GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=tokens, use_cache=True, eos_token_id=end, pad_token_id=pad
    )
