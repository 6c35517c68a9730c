"""A tokenizer.json as the metadata that llama.cpp rebuilds the same tokenizer from.

llama.cpp has the splitting of text into words built in, under names; which name a tokenizer needs is told here from its
own rules. A tokenizer with other rules is refused: with a wrong name it would run and split some texts wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tersor.errors import BadInput, CorruptArtifact

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, as GGUF numbers them."""
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _CASES + r"\p{N}{1,3}" + _PUNCTUATION: "llama-bpe",
    _CASES + r"\p{N}" + _PUNCTUATION: "qwen2",
}
"""Regular expressions of a Split before byte-level coding, and llama.cpp's names for them."""
_SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """What ``tokenizer.ggml.*`` says. ``scores`` and ``merges``: one of them, by ``model`` (``llama`` or ``gpt2``)."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    add_bos: bool | None
    add_eos: bool | None
    space_prefix: bool | None
    template: str | None


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary of a model folder, filled up to ``size`` tokens, the rows of its embedding.

    Raises BadInput when the folder has no tokenizer.json or one that llama.cpp has no equal for.
    """
    path = folder / "tokenizer.json"
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{folder} has no tokenizer.json, which a GGUF's vocabulary is made from; save one.") from error
    except ValueError as error:
        raise CorruptArtifact(f"{path} is not JSON ({error}); fetch it again.") from error
    model = whole.get("model") or {}
    if model.get("type") != "BPE":
        raise BadInput(f"{path} is a {model.get('type')} tokenizer; GGUFs can be written of BPE tokenizers.")
    config = _json(folder / "tokenizer_config.json")
    pieces: dict[int, tuple[str, int]] = {number: (token, NORMAL) for token, number in model["vocab"].items()}
    fallback = bool(model.get("byte_fallback"))
    if fallback:
        pieces |= {k: (t, BYTE) for k, (t, _) in pieces.items() if len(t) == 6 and t.startswith("<0x")}
    for added in whole.get("added_tokens", []):
        pieces[added["id"]] = (added["content"], CONTROL if added.get("special") else USER_DEFINED)
    unknown = model.get("unk_token")
    if fallback and isinstance(unknown, str) and unknown in model["vocab"]:
        pieces[model["vocab"][unknown]] = (unknown, UNKNOWN)
    if pieces and max(pieces) >= size:
        raise BadInput(f"{path} has a token numbered {max(pieces)}, and the model's embedding has {size} rows.")
    listed = [pieces.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    merges = tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", []))
    ranks = {"".join(merge.split(" ", 1)): -float(rank) for rank, merge in enumerate(merges)}
    last = -float(len(merges))
    scores = tuple(ranks.get(token, 0.0 if kind != NORMAL else last) for token, kind in listed)
    special = _special(folder, config, {token: number for number, (token, _) in enumerate(listed)})
    return Vocabulary(
        model="llama" if fallback else "gpt2",
        pre="default" if fallback else _split_name(whole.get("pre_tokenizer"), path),
        tokens=tuple(token for token, _ in listed),
        kinds=tuple(kind for _, kind in listed),
        scores=scores if fallback else (),
        merges=() if fallback else merges,
        special=special,
        add_bos=_adds(whole, config, "bos", special),
        add_eos=_adds(whole, config, "eos", special),
        space_prefix=_prefixes_space(whole) if fallback else None,
        template=_template(folder, config),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise CorruptArtifact(f"{path} is not JSON ({error}); fetch it again.") from error
    return found if isinstance(found, dict) else {}


def _split_name(rules: Mapping[str, Any] | None, path: Path) -> str:
    """llama.cpp's name for how text is cut into words before merges."""
    steps = [rules] if rules and rules.get("type") != "Sequence" else list((rules or {}).get("pretokenizers", []))
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex", "")
        if pattern in _SPLITS and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return _SPLITS[pattern]
    raise BadInput(
        f"{path} cuts text into words in a way ({', '.join(map(str, kinds)) or 'none'}) that llama.cpp has no name for "
        f"here; known are the ways of GPT-2, SmolLM, Llama 3 and Qwen 2."
    )


def _special(folder: Path, config: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, int]:
    """``{"bos": 1, ...}``, from the tokenizer's settings, else from the generation settings."""
    generation = _json(folder / "generation_config.json")
    found: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        fallback = generation.get(f"{name}_token_id")
        fallback = fallback[0] if isinstance(fallback, list) and fallback else fallback
        if isinstance(token, str) and token in numbers:
            found[name] = numbers[token]
        elif isinstance(fallback, int):
            found[name] = fallback
    return found


def _adds(whole: Mapping[str, Any], config: Mapping[str, Any], name: str, special: Mapping[str, int]) -> bool | None:
    """Whether a text gets this token at its beginning or end; None where nothing says so."""
    said = config.get(f"add_{name}_token")
    if isinstance(said, bool):
        return said
    processor = whole.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            ids = [k for item in step.get("special_tokens", {}).values() for k in item.get("ids", [])]
            places = [next(iter(item)) for item in step.get("single", [])]
            place = 0 if name == "bos" else -1
            return bool(places) and places[place] == "SpecialToken" and special.get(name) in ids
    return False if name in special else None


def _prefixes_space(whole: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text: a Prepend normalizer, or a Metaspace that does."""
    normalizer = whole.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" and step.get("prepend") == _SPACE for step in steps):
        return True
    before = whole.get("pre_tokenizer") or {}
    return before.get("type") == "Metaspace" and before.get("prepend_scheme", "always") != "never"


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
