"""The HTML report of an artifact: plain values in, one self-contained page out."""

from tersor.report.data import (
    Check,
    FileDigest,
    LayerReport,
    Note,
    ReportData,
    Sample,
    Stage,
    TextRecord,
)
from tersor.report.page import render, write_report

__all__ = [
    "Check",
    "FileDigest",
    "LayerReport",
    "Note",
    "ReportData",
    "Sample",
    "Stage",
    "TextRecord",
    "render",
    "write_report",
]
