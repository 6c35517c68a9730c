"""Stage: the token ids that statistics come from, and those that quality is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tersor.anatomy import Source, load_whole, skeleton
from tersor.errors import BadInput
from tersor.stages.context import Progress
from tersor.stages.options import Options
from tersor.statistics.decoding import cache_bytes
from tersor.statistics.sampling import cached_sample, sample_text
from tersor.statistics.text import TokenBatch, load_text

STAGE = "text"
_CACHE = 2**30
"""Bytes of keys and values that one worker may hold while sampling. Decides the batch, hence the text; so it depends on
the model and the length alone, never on the machine."""


@dataclass(frozen=True)
class Texts:
    """``calibration`` and ``evaluation``: token ids with where they came from; they share no sequence."""

    calibration: TokenBatch
    evaluation: TokenBatch


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The source's tokenizer. Raises BadInput when there is none."""
    return tokenizer_in(source.path, trust_remote_code=source.trust_remote_code)


def tokenizer_in(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder. Raises BadInput when there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"No tokenizer could be loaded from {folder}; add its files (tokenizer.json, tokenizer_config.json)."
        ) from error


def prepare_texts(
    source: Source, options: Options, *, cache: Path, workers: int, progress: Progress, whole: bool = False
) -> Texts:
    """Calibration and evaluation text as asked: the user's, or sampled from the model itself.

    ``whole``: all of it as calibration text, none held out.
    """
    limit = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and options.length > limit:
        raise BadInput(
            f"--length {options.length} is more than the {limit} tokens that {source.origin} takes; give {limit} "
            "or less."
        )
    wanted = options.sequences + (0 if options.eval_text or whole else options.eval_sequences)
    if options.text is None:
        batch = _sampled(source, options, wanted, cache, workers, progress)
    else:
        batch = load_text(
            options.text,
            load_tokenizer(source),
            sequences=wanted,
            length=options.length,
            seed=options.seed,
            field=options.text_field,
            split=options.text_split,
        )
    if options.eval_text:
        evaluation = load_text(
            options.eval_text,
            load_tokenizer(source),
            sequences=options.eval_sequences,
            length=options.length,
            seed=options.seed + 1,
            field=options.text_field,
            split=options.text_split,
        )
        return Texts(batch, evaluation)
    if whole:
        return Texts(batch, batch)
    # Too little text: keep the proportion.
    held = max(1, round(batch.ids.shape[0] * options.eval_sequences / wanted))
    if batch.ids.shape[0] < 2:
        raise BadInput(
            f"{batch.origin} gives {batch.tokens} tokens, less than two sequences of {options.length}; give more text "
            f"or a smaller --length."
        )
    calibration, evaluation = batch.split_held_out(held)
    return Texts(calibration, evaluation)


def _sampled(
    source: Source, options: Options, sequences: int, cache: Path, workers: int, progress: Progress
) -> TokenBatch:
    weights = sum(info.nbytes for info in source.tensors.values())
    one = cache_bytes(skeleton(source), batch=1, length=options.length)
    batch = max(4, min(64, _CACHE // max(one, 1)))
    need = weights + workers * batch * one
    if options.max_memory is not None and need > options.max_memory:
        raise BadInput(
            f"No --text was given, and sampling text from the model itself needs it in memory ({need:,} bytes, more "
            f"than --max-memory {options.max_memory:,}); give --text FILE, or raise the cap."
        )
    key = {
        "model": source.fingerprint(),
        "sequences": sequences,
        "length": options.length,
        "seed": options.seed,
        "batch": batch,
    }

    def make() -> TokenBatch:
        return sample_text(
            load_whole(source, torch.bfloat16),
            load_tokenizer(source),
            sequences=sequences,
            length=options.length,
            seed=options.seed,
            workers=workers,
            batch=batch,
            progress=lambda done, total: progress(STAGE, done, total),
        )

    return cached_sample(cache / "text", key, make)
