"""A tokenizer of one token a character, made on the spot, for tests."""

from __future__ import annotations

import string

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{% if m['role'] not in ('user', 'assistant', 'system') %}"
    "{{ raise_exception('no such role') }}{% endif %}[{{ m['role'][0] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def build(
    *, bos: bool = False, eos: bool = True, chat: bool = False, letters: str = LETTERS
) -> PreTrainedTokenizerFast:
    """Ids 0, 1, 2 are ``<unk>``, ``<s>``, ``</s>``; one for each character of ``letters`` follows:
    100 in all.

    ``bos``: it puts ``<s>`` before a document. ``eos``: it knows ``</s>`` (and never adds it). ``chat``: it has a
    template, which gives ``[u]hi</s>[a]hello</s>`` and refuses roles other than user, assistant and system.
    """
    names = ["<unk>", "<s>", "</s>", *letters]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.add_special_tokens([AddedToken("<unk>"), AddedToken("<s>"), AddedToken("</s>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>" if bos else None, eos_token="</s>" if eos else None
    )
    if chat:
        tokenizer.chat_template = CHAT
    return tokenizer
