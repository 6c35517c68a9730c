"""A new method from outside: a toy codec and a toy solver in one short file, which the survey picks up."""

from __future__ import annotations

from pathlib import Path

from tersor import api

TOY = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from tersor.codecs.text import reads
from tersor.contracts import Encoded, LeafCodec, Part, Solver
from tersor.recipes import Claim, Paper, recipe

@dataclass(frozen=True)
class Signs(LeafCodec):  # the sign of each weight, a byte each, times one float16 per row
    def __str__(self): return "toysigns"
    def parts(self, shape):
        return (Part("codes", torch.uint8, shape), Part("size", torch.float16, (shape[0], 1)))
    def prepare(self, weight, importance=None): return {"size": weight.abs().mean(1, keepdim=True).half().float()}
    def round(self, target, side, columns):
        codes = (target > 0).to(torch.int32)
        return codes, (2 * codes - 1) * side["size"]
    def values(self, encoded, in_features): return (2 * encoded.codes - 1) * encoded.side["size"]
    def pack(self, encoded, shape):
        return {"codes": encoded.codes.to(torch.uint8), "size": encoded.side["size"].half()}
    def unpack(self, tensors, shape):
        return Encoded(tensors["codes"].to(torch.int32), {"size": tensors["size"].float()})

@reads("toysigns", form="toysigns", heads=("toysigns",))
def _read(words): return Signs()

@dataclass(frozen=True)
class Twice(Solver):  # rounds, and rounds again what the first error leaves
    needs_gram: ClassVar[bool] = False
    def solve(self, weight, codec, prepared):
        side, columns = codec.prepare(weight), torch.arange(weight.shape[1])
        _, values = codec.round(weight, side, columns)
        return Encoded(codec.round(2 * weight - values, side, columns)[0], side)

recipe(name="toy", paper=Paper("A toy"), summary="Signs, rounded twice.", codec=lambda bits, shape: "toysigns",
       solver=Twice, differs="Nobody wrote it.", claims=(Claim("Signs beat 8 bits.", "rtn", (8,)),))
"""


def test_the_survey_picks_up_a_codec_and_a_solver_from_a_file(small: Path, words: Path, tmp_path: Path):
    assert len([line for line in TOY.splitlines() if line.strip()]) < 40
    file = tmp_path / "toy.py"
    file.write_text(TOY)
    found = api.survey(
        small,
        tmp_path / "out",
        bits=(8,),
        recipes=("rtn", str(file)),
        text=words,
        sequences=4,
        length=32,
        eval_sequences=2,
        cache_dir=tmp_path / "cache",
    )
    by = {one.recipe: one for one in found.outcomes}
    assert by["toy"].status == "measured", by["toy"].error
    assert 8 < by["toy"].rate <= 8.25
    assert by["toy"].kl > by["rtn"].kl
    assert [(one.recipe, one.word) for one in found.verdicts if one.recipe == "toy"] == [("toy", "fails")]
    assert "Nobody wrote it." in found.page.read_text()
