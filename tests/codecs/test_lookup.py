"""Lookup tables of rows and of groups of columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from leaf_checks import correlated_gram, gaussian, leaf, squared_error
from tersor.artifact.decoder_numpy import DecodeError, decode_weight, parse_codec, parts_of
from tersor.codecs import LookupTable, parse
from tersor.codecs.lookup import weighted_kmeans
from tersor.codecs.refit import least_squares
from tersor.contracts import Encoded, Gram
from tersor.errors import BadInput, ShapeMismatch
from tersor.runtime.packed import PackedLinear, adopt
from tersor.runtime.products import used_as_stored
from tersor.solvers import CoordinateDescent, Encoder, ErrorFeedback, LearnedPerturbation, Nearest

ROWS, COLUMNS = 13, 192


def solved(text: str, *, refit: bool, order: str = "activation") -> tuple[torch.Tensor, Gram, Encoded]:
    weight, gram = gaussian(ROWS, COLUMNS) * 0.05, correlated_gram(COLUMNS)
    solver = ErrorFeedback(refit=refit, order=order)  # type: ignore[arg-type]
    return weight, gram, solver.solve(weight, leaf(text), solver.prepare(gram))


def distortion(weight: torch.Tensor, text: str, encoded: Encoded, gram: Gram) -> float:
    error = (weight - leaf(text).values(encoded, COLUMNS)).double()
    return float(((error @ gram.matrix.double()) * error).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("solver", [Nearest(), ErrorFeedback(), CoordinateDescent(), LearnedPerturbation(iterations=9)])
def test_one_group_is_a_row(bits: int, solver: ErrorFeedback) -> None:
    weight, gram = gaussian(ROWS, COLUMNS), correlated_gram(COLUMNS)
    found = [Encoder(solver)(weight, leaf(f"lut{bits}:{group}"), gram) for group in ("row", f"g{COLUMNS}")]
    assert torch.equal(found[0][1], found[1][1])
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())


def test_a_group_has_the_table_of_its_columns() -> None:
    weight, importance = gaussian(ROWS, COLUMNS), gaussian(1, COLUMNS, seed=4)[0].square()
    for given in (None, importance, gaussian(ROWS, COLUMNS, seed=5).square()):
        table = leaf("lut3:g48").prepare(weight, given)["table"]
        for group, found in enumerate(torch.split(table, 8, dim=1)):
            here = slice(48 * group, 48 * group + 48)
            alone = weighted_kmeans(weight[:, here], None if given is None else given[..., here], 8)
            assert torch.allclose(found, alone.to(torch.float16).float(), rtol=2e-3)
    assert squared_error("lut3:g32", weight) < squared_error("lut3:g96", weight) < squared_error("lut3:row", weight)


def test_a_segment_is_chosen_anew_and_no_other() -> None:
    codec, weight = leaf("lut2:g64"), gaussian(ROWS, COLUMNS)
    side = codec.prepare(weight)
    before = side["table"].clone()
    moved = codec.prepare_segment(side, 3.0 * weight[:, 64:128].contiguous(), 64)["table"]
    assert torch.equal(side["table"], before)
    assert torch.equal(moved[:, :4], before[:, :4])
    assert torch.equal(moved[:, 8:], before[:, 8:])
    assert torch.allclose(moved[:, 4:8], 3.0 * before[:, 4:8], rtol=2e-3)


@pytest.mark.parametrize("text", ["lut2:g16", "lut3:g64", "lut4:g96"])
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_refitting_comes_near_what_all_tables_together_could_do(text: str, order: str) -> None:
    weight, gram, encoded = solved(text, refit=False, order=order)
    codec = leaf(text)
    refitted = Encoded(encoded.codes, codec.refit(weight, encoded, gram.matrix))
    columns, levels = torch.arange(COLUMNS), 2 ** int(text[3])
    entries = encoded.codes.long() + columns // int(text.rpartition("g")[2]) * levels
    used = torch.zeros(ROWS, encoded.side["table"].shape[1], COLUMNS).scatter_(1, entries[:, None], 1.0)
    normal, right = used @ gram.matrix @ used.transpose(1, 2), (used @ (weight @ gram.matrix)[:, :, None])[:, :, 0]
    together = torch.where(used.any(2), least_squares(normal, right), encoded.side["table"])
    before, after, least = (
        distortion(weight, text, Encoded(encoded.codes, {"table": table}), gram)
        for table in (encoded.side["table"], refitted.side["table"], together)
    )
    assert least <= after < before
    assert before - after > 0.85 * (before - least)  # the rest is float16, and tables that must ascend
    assert bool((refitted.side["table"].reshape(ROWS, -1, levels).diff(dim=2) >= 0).all())
    assert torch.equal(refitted.side["table"].half().float(), refitted.side["table"])


def test_importance_of_single_weights_counts() -> None:
    weight, gradients = gaussian(ROWS, COLUMNS), gaussian(ROWS, COLUMNS, seed=9).square()
    gram = Gram(torch.eye(COLUMNS), 10, gradients=gradients)
    codec = leaf("lut2:g48")
    costs = []
    for fisher in (True, False):
        encoded = Nearest(fisher=fisher).solve(weight, codec, gram)
        costs.append(float((gradients * (weight - codec.values(encoded, COLUMNS)).square()).sum()))
    assert costs[0] < costs[1]


@pytest.mark.parametrize(
    "text",
    ["lut2:g1", "lut3:g24", "lut4:row", "rot(lut3:g24)", "sparse2of4(lut2:g24)", "sum(lut2:g48,lowrank2)",
     "weights(lut3:g64,lut2:row):64", "weights(lut3:g32,lut2:g16):0.5", "rows(4:lut3:g24,9:lut2:row,13:lut4:g96)",
     "cols(lut3:g48,lut2:g24):0.25"],
)  # fmt: skip
def test_numpy_and_torch_decode_alike(text: str) -> None:
    if text.endswith(":64"):
        text = text.replace(":64", f":{64 / COLUMNS:.6f}")
    codec, weight, gram = parse(text), gaussian(ROWS, COLUMNS), correlated_gram(COLUMNS)
    tensors, values = {}, []
    for stretch in codec.stretches(ROWS):
        found, value = Encoder(ErrorFeedback())(weight[stretch.start : stretch.stop], stretch.codec, gram)
        tensors.update({stretch.prefix + name: tensor for name, tensor in found.items()})
        values.append(value)
    assert codec.bits((ROWS, COLUMNS)) == 8 * sum(tensor.nbytes for tensor in tensors.values())
    names = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16"}
    arrays = {name: (names[tensor.dtype], tensor.numpy()) for name, tensor in tensors.items()}
    declared = parts_of(parse_codec(text), ROWS, COLUMNS)
    assert declared == {name: (dtype, array.shape) for name, (dtype, array) in arrays.items()}
    decoded = decode_weight(
        parse_codec(text), ROWS, COLUMNS, lambda part, a, b: (arrays[part][0], arrays[part][1][a:b])
    )
    assert decoded.dtype == np.float32
    assert torch.equal(torch.from_numpy(decoded), codec.decode(tensors, (ROWS, COLUMNS)))
    assert torch.allclose(torch.from_numpy(decoded), torch.cat(values), atol=1e-5)
    some = torch.tensor([ROWS - 1, 0])
    assert torch.equal(codec.decode_rows(tensors, (ROWS, COLUMNS), some), torch.from_numpy(decoded)[some])


def test_packed_layers_multiply_by_the_decoded_weight() -> None:
    assert used_as_stored(parse("rot(lut3:row)"))
    assert not used_as_stored(parse("rot(lut3:g24)"))
    module = nn.Linear(COLUMNS, ROWS).requires_grad_(False)
    tensors, values = Encoder(Nearest())(module.weight.detach().clone(), leaf("lut3:g24"), None)
    adopt(module, parse("lut3:g24"))
    module.load_state_dict(tensors, strict=False)
    assert isinstance(module, PackedLinear)
    x = gaussian(5, COLUMNS)
    assert torch.allclose(module(x), x @ values.T + module.bias, atol=1e-5)


def test_exact_bits() -> None:
    assert LookupTable(3, 64).bits((5, 192)) == 8 * 5 * (72 + 3 * 8 * 2)
    assert LookupTable(3).bits((5, 192)) == 8 * 5 * (72 + 8 * 2)


def test_bad_texts_and_shapes() -> None:
    for text, says in (("lut3", "group once"), ("lut3:g64:row", "group once"), ("lut5:g64", "2 to 4"),
                       ("lut3:g64:bf16", "float16"), ("lut3:g64:fast", "no other options")):  # fmt: skip
        with pytest.raises(BadInput, match=says):
            parse(text)
    with pytest.raises(ShapeMismatch, match=r"lut3:g64 cannot take .* 64 does not divide 100; use row"):
        leaf("lut3:g64").parts((3, 100))
    with pytest.raises(ShapeMismatch, match=r"64 does not divide 96; use g16, g24"):
        leaf("lut3:g64").prepare(gaussian(3, 96))
    with pytest.raises(DecodeError, match="group of 64 does not divide 100"):
        parts_of(parse_codec("lut3:g64"), 3, 100)
