"""Stage: ``report.html``, and the manifest brought up to date with it."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy
import torch

from tersor import kernels
from tersor.artifact import hash_files, ids_sha256, plan_to_json, read_manifest, write_manifest
from tersor.codecs import parse
from tersor.contracts import Plan, Quality, RatePoint
from tersor.report import (
    Check,
    FileDigest,
    LayerReport,
    Note,
    ReportData,
    Sample,
    Stage,
    TextRecord,
    write_report,
)
from tersor.stages.context import Context, Record
from tersor.stages.curves import load_records
from tersor.stages.finish import versions
from tersor.stages.text import Texts


@dataclass(frozen=True)
class Findings:
    """What a run found out, for its report. ``stages``: seconds by stage; ``peak``: resident bytes above baseline."""

    plan: Plan
    units: Mapping[str, Record]
    texts: Texts
    quality: Quality
    samples: list[tuple[str, str, str]]
    notes: tuple[str, ...]
    stages: Mapping[str, float]
    peak: int
    command: str


def write(context: Context, findings: Findings) -> None:
    """Write ``report.html`` into the folder being built, and its hash into the manifest."""
    folder = context.work.folder.parent.parent
    files = hash_files(folder, exclude=("tersor.json", "report.html"))
    data = ReportData(
        model=context.source.origin,
        model_type=context.anatomy.model_type,
        parameters=context.anatomy.parameters,
        source_bytes=context.anatomy.source_bytes,
        budget=findings.plan.budget,
        file_bytes=findings.plan.file_bytes,
        kept_bytes=sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in context.anatomy.kept.values()),
        layers=_layers(context, findings),
        tensors=context.anatomy.tensors,
        head=context.anatomy.head,
        quality=findings.quality,
        predicted=_known(findings.plan.predicted) if context.options.sensitivity == "fisher" else None,
        samples=tuple(Sample(*sample) for sample in findings.samples),
        stages=tuple(Stage(name, round(seconds, 2)) for name, seconds in findings.stages.items()),
        peak_memory=findings.peak,
        memory_cap=context.options.max_memory,
        machine={
            "processor": platform.processor() or platform.machine(),
            "workers": str(context.workers),
            "compiled kernels": "yes" if kernels.compiled else "no",
        },
        checks=(
            Check("size", True, f"{findings.plan.file_bytes:,} of {findings.plan.budget:,} bytes, read back from disk"),
            Check("layers", True, f"{len(findings.units)} layers decoded from the file, errors as recorded"),
        ),
        notes=tuple(Note("warning", note) for note in findings.notes)
        + tuple(Note("info", note) for note in context.anatomy.notes),
        command=findings.command,
        versions={**versions(), "numpy": numpy.__version__, "python": platform.python_version()},
        seeds={"seed": context.options.seed},
        texts=_texts(findings.texts),
        fingerprint=context.source.fingerprint(),
        files=tuple(FileDigest(name, record.bytes, record.sha256) for name, record in files.items()),
        plan=plan_to_json(findings.plan),
        created=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    )
    write_report(folder / "report.html", data)
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, notes=(*manifest.notes, *findings.notes), files=hash_files(folder)))


def _texts(texts: Texts) -> tuple[TextRecord, ...]:
    both = (("calibration", texts.calibration), ("evaluation", texts.evaluation))
    return tuple(TextRecord(role, batch.origin, int(batch.ids.numel()), ids_sha256(batch.ids)) for role, batch in both)


def _known(value: float) -> float | None:
    """None for NaN: what an edited plan's choices cost was not measured."""
    return None if math.isnan(value) else value


def _layers(context: Context, findings: Findings) -> tuple[LayerReport, ...]:
    records = load_records(context) if context.work.has("curves/outside.json") else {}
    reports = []
    for layer in context.anatomy.layers:
        choice = findings.plan.layers[layer.name]
        points = records.get(layer.name, {}).get("points", {})
        curve = tuple(
            RatePoint(parse(text).bits(layer.stored_shape) // 8, float(value), text) for text, value in points.items()
        )
        reports.append(
            LayerReport(
                layer,
                choice.codec,
                choice.nbytes,
                _known(choice.distortion),
                findings.units[layer.name]["output_error"],
                curve,
            )
        )
    return tuple(reports)
