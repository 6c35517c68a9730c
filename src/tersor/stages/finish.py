"""Stage: the rest of the artifact's folder, its verification, and samples of text before and after."""

from __future__ import annotations

import hashlib
import json
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
import transformers
from transformers import AutoModelForCausalLM

from tersor.anatomy import Source, load_whole
from tersor.artifact import (
    Artifact,
    Manifest,
    SourceRecord,
    TextRecord,
    hash_files,
    open_artifact,
    plan_to_json,
    quantization_config,
    read_manifest,
    write_calibration,
    write_manifest,
)
from tersor.contracts import Codec, Plan, Quality
from tersor.errors import VerificationFailed
from tersor.evaluation.generation import continue_prompts
from tersor.runtime.stream import BlockStream
from tersor.stages.context import Context, Record
from tersor.stages.options import Options
from tersor.stages.text import Texts, load_tokenizer
from tersor.stages.verify import Pair, artifact_loader, check_errors, measure_quality
from tersor.version import __version__

PROMPTS = ("Explain in two sentences why the sky is blue.", "Write a short story about a lighthouse keeper.")
SAMPLE_TOKENS = 48

_QUALITY = "quality.json"
_SAMPLES = "samples.json"


def resident_bytes() -> int:
    """What this process holds in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The most this process ever held in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def versions() -> dict[str, str]:
    """Versions that can change the bytes of an artifact."""
    return {"tersor": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def identity(source: Source, options: Options, given: Plan | None) -> dict[str, object]:
    """What makes a run this run, by the names that a user knows: a resumed one must agree in all of it."""
    return {
        "model": source.fingerprint()[:12],
        "weight files": source.stamp()[:12],
        "plan": None if given is None else hashlib.sha256(plan_to_json(given).encode()).hexdigest()[:12],
        "budget": None if options.budget is None else str(options.budget),
        **{f"--{name.replace('_', '-')}": value for name, value in options.identity().items() if name != "budget"},
        **{f"version of {name}": version for name, version in versions().items()},
    }


def write_folder(
    context: Context,
    folder: Path,
    plan: Plan,
    codecs: Mapping[str, Codec],
    units: Mapping[str, Record],
    texts: Texts,
) -> None:
    """Everything beside the weights that makes the folder an artifact: configuration, tokenizer, text, manifest."""
    context.source.copy_side_files(folder)
    config = context.source.plain_config()
    # A head declared tied whose weights differ in the files is a layer of its own; the model class must know.
    config["tie_word_embeddings"] = bool(getattr(context.model.config, "tie_word_embeddings", False))
    config["quantization_config"] = quantization_config({name: str(codec) for name, codec in codecs.items()})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    sha256 = write_calibration(folder, texts.calibration.ids)
    anatomy = context.anatomy
    manifest = Manifest(
        versions=versions(),
        source=SourceRecord(context.source.origin, context.source.fingerprint()),
        plan=plan,
        shapes={layer.name: layer.stored_shape for layer in anatomy.layers},
        kept=dict(anatomy.kept),
        text=TextRecord(texts.calibration.origin, int(texts.calibration.ids.numel()), texts.calibration.seed, sha256),
        errors={name: unit["relative_error"] for name, unit in units.items()},
        notes=anatomy.notes,
        files=hash_files(folder),
        facts={"seed": context.options.seed, "options": context.options.identity()},
    )
    write_manifest(folder, manifest)


def verify(context: Context, folder: Path, plan: Plan, texts: Texts) -> Quality:
    """Open what was written, check sizes and every layer's error, and measure quality against the source.

    Raises VerificationFailed when anything is not as planned. A resumed run does not measure again: the writer has just
    found the very bytes in the file that were verified.
    """
    artifact = open_artifact(folder)
    if artifact.weight_bytes != plan.file_bytes:
        raise VerificationFailed(
            f"The weight files have {artifact.weight_bytes:,} bytes, and the plan said {plan.file_bytes:,}; check the "
            f"disk and run again."
        )
    if artifact.weight_bytes > plan.budget:
        raise VerificationFailed(
            f"The weight files have {artifact.weight_bytes:,} bytes, more than the budget of {plan.budget:,}."
        )
    if context.work.has(_QUALITY):
        quality = Quality(**context.work.load(_QUALITY))
    else:
        check_errors(context, artifact)
        quality = _measured(context, artifact, texts)
        context.work.save(_QUALITY, asdict(quality))
    write_manifest(folder, replace(read_manifest(folder), quality=quality))
    return quality


def _measured(context: Context, artifact: Artifact, texts: Texts) -> Quality:
    """Quality on the evaluation text. Raises VerificationFailed for NaN."""
    reference = context.stream()
    load = artifact_loader(artifact, context.anatomy, context.dtype, context.workers)
    compressed = BlockStream(context.model, context.anatomy, load, dtype=context.dtype)
    try:
        quality = measure_quality(
            Pair(reference, compressed),
            len(context.anatomy.blocks),
            texts.evaluation.ids,
            chunk=context.chunk,
            workers=context.workers,
            origin=texts.evaluation.origin,
            progress=context.progress,
        )
    finally:
        reference.close()
        compressed.close()
    if quality.kl != quality.kl:
        raise VerificationFailed(
            "The compressed model gives NaN on the evaluation text; see the layer errors in the plan."
        )
    return quality


def finished(source: Source, options: Options, folder: Path, given: Plan | None) -> Manifest | None:
    """The manifest of ``folder`` if it is what a run would make of this source with these options, else None."""
    manifest = read_manifest(folder)
    same = (
        manifest.source.fingerprint == source.fingerprint()
        and manifest.facts.get("options") == json.loads(json.dumps(options.identity()))
        and manifest.versions == versions()
        and (given is None or plan_to_json(given) == plan_to_json(manifest.plan))
    )
    return manifest if same else None


def samples(context: Context, folder: Path) -> list[tuple[str, str, str]]:
    """(prompt, text of the original, text of the artifact), greedy; empty when memory or wishes forbid it."""
    options = context.options
    need = 2 * sum(info.nbytes for info in context.source.tensors.values())
    if not options.samples or (options.max_memory is not None and need > options.max_memory):
        return []
    if context.work.has(_SAMPLES):
        return [(prompt, before, after) for prompt, before, after in context.work.load(_SAMPLES)]
    prompts = PROMPTS[: options.samples]
    tokenizer = load_tokenizer(context.source)
    texts = []
    before_threads = torch.get_num_threads()
    torch.set_num_threads(context.workers)
    try:
        for compressed in (False, True):
            if compressed:
                trust = context.source.trust_remote_code
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=context.dtype, trust_remote_code=trust)
                model = model.eval().dequantize()
            else:
                model = load_whole(context.source, context.dtype)
            texts.append(continue_prompts(model, tokenizer, prompts, tokens=SAMPLE_TOKENS))
            del model
    finally:
        torch.set_num_threads(before_threads)
    found = [(prompt, one[1], two[1]) for prompt, one, two in zip(prompts, *texts, strict=True)]
    context.work.save(_SAMPLES, found)
    return found
