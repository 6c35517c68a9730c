"""Text from an artifact, run packed by transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, TextStreamer

from tersor.errors import BadInput
from tersor.stages.evaluate import open_whole
from tersor.stages.text import tokenizer_in


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands text on as it is decoded, instead of printing it."""

    def __init__(self, tokenizer: object, hand_on: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._hand_on = hand_on

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._hand_on(text + ("\n" if stream_end else ""))


def generate_text(
    path: Path,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    seed: int,
    on_text: Callable[[str], None] | None,
    trust_remote_code: bool,
) -> str:
    """Continue ``prompt`` by ``tokens`` tokens. Sampling forks torch's random state, so the caller's is untouched."""
    if tokens < 1:
        raise BadInput(f"--tokens {tokens} makes no sense; give 1 or more.")
    if not temperature >= 0:
        raise BadInput(f"--temperature {temperature:g} makes no sense; give 0 for the likeliest text, or more.")
    config = open_whole(path).config
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        raise BadInput(
            f"{path} brings code of its own, which its model needs: look at it, and pass --trust-remote-code if you "
            f"trust it."
        )
    tokenizer = tokenizer_in(path, trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code).eval()
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    given = ids["input_ids"].shape[1]
    if not given:
        raise BadInput("The prompt is empty; give some text to continue.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and given + tokens > limit:
        raise BadInput(
            f"The prompt's {given} tokens and --tokens {tokens} are more than the {limit} that the model takes; give a "
            f"shorter prompt or fewer --tokens."
        )
    choice = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = None if on_text is None else _Pieces(tokenizer, on_text)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model.generate(**ids, max_new_tokens=tokens, streamer=streamer, **choice)
    return str(tokenizer.decode(output[0, given:], skip_special_tokens=True))
