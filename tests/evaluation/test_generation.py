"""Text before and after: greedy, and as the model is used."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import tiny_models
import tiny_tokenizer
from tersor.errors import BadInput
from tersor.evaluation.generation import continue_prompts


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_models.build("llama").eval()
    # What a model comes with must play no part.
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=3)
    return model


def greedy(model: Any, ids: list[int], tokens: int) -> list[int]:
    """The most likely token, again and again, without a cache; stops before the end token."""
    new: list[int] = []
    with torch.inference_mode():
        while len(new) < tokens:
            token = int(model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token == 2:
                break
            new.append(token)
    return new


@pytest.mark.parametrize("chat", [False, True])
def test_texts_are_the_most_likely_continuations(model: Any, chat: bool) -> None:
    tokenizer = tiny_tokenizer.build(bos=True, chat=chat)
    prompts = ["hello", "The cat"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = continue_prompts(model, tokenizer, prompts, tokens=7)
    assert [prompt for prompt, _ in found] == prompts
    for prompt, text in found:
        if chat:
            ids = tokenizer(f"[u]{prompt}</s>[a]", add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
        assert text == tokenizer.decode(greedy(model, list(ids), 7), skip_special_tokens=True)


def test_an_empty_prompt_is_refused(model: Any) -> None:
    with pytest.raises(BadInput, match="A prompt is empty"):
        continue_prompts(model, tiny_tokenizer.build(), [""])
