"""A byte-level BPE tokenizer of 100 tokens, made on the spot, for tests with llama.cpp."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def tokenizer(kind: str = "gpt-2") -> PreTrainedTokenizerFast:
    """Byte-level BPE with 97 ordinary tokens and 3 special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:93]
    vocabulary = {name: k for k, name in enumerate(["<unk>", "<s>", "</s>", *letters])}
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("i", "n")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]) if kind == "smollm" else plain
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    return made
