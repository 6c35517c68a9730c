"""What encoding measures and stores, against the plain formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leaf_checks import correlated_gram, gaussian
from tersor.artifact import ArtifactWriter
from tersor.codecs import parse
from tersor.codecs.packing import pack, unpack
from tersor.contracts import Layer
from tersor.pipeline import light_context
from tersor.stages import encode, sensitivity
from tersor.stages.allocate import artifact_layout
from tersor.stages.context import Context, block_weights
from tersor.stages.encode_layers import errors_of
from tersor.stages.options import Budget, Options
from tersor.stages.sensitivity import measure_sensitivity
from tersor.stages.work import Work
from tersor.statistics.collect import OutputMoments, collect_guided_grams


@pytest.mark.parametrize("columns", [1, 255, 256, 300, 600])
def test_errors_are_those_of_the_whole_matrix(columns: int) -> None:
    gram, weight = correlated_gram(columns), gaussian(9, columns)
    values = weight + 0.1 * gaussian(9, columns, seed=4)
    error, exact = (weight - values).double(), gram.matrix.double()
    wanted = [m.square().sum() for m in (error, weight.double())]
    wanted += [((m @ exact) * m).sum() for m in (error, weight.double())]
    assert errors_of(weight, values, gram) == pytest.approx([float(value) for value in wanted], rel=1e-5)
    assert errors_of(weight, values, None)[2:] == [0.0, 0.0]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 2, 4, 7, 8, 64, 130])
def test_codes_are_a_little_endian_stream_of_bits(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    before = codes.clone()
    packed = pack(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (3, -(-count * bits // 8)))
    assert packed.is_contiguous()
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        assert int.from_bytes(bytes(stream), "little") == sum(code << at * bits for at, code in enumerate(row))
    assert torch.equal(unpack(packed, bits, count), codes)
    assert torch.equal(codes, before)


@pytest.fixture
def steep(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Energies of 6 x 16 tokens, of which a few are large, in place of those that a backward pass finds."""
    energy = torch.exp(3 * torch.randn(96, generator=torch.Generator().manual_seed(1)))

    def moments(context: Context, block: int | None) -> OutputMoments:
        energies = {layer.name: [energy] for layer in context.anatomy.layers_of(block)}
        return OutputMoments(energies=energies, positions=96)

    monkeypatch.setattr(sensitivity, "load_moments", moments)
    return list(energy.split(32))


def test_codes_are_solved_for_what_each_token_is_worth(
    steep: list[Tensor], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """In the first block the weighted error is less than with all tokens alike; the unweighted one is not."""
    ids = torch.randint(3, 100, (6, 16), generator=torch.Generator().manual_seed(3))
    decoded: dict[str, dict[Layer, Tensor]] = {}
    for way in ("fisher", "flat"):
        options = Options(Budget("bpw", 4.0), dtype="float32", workers=1, sensitivity=way)  # type: ignore[arg-type]
        context = replace(light_context(tiny("llama"), options, cache_dir=tmp_path), chunk=2)
        context = replace(context, work=Work(tmp_path / f"{way}.partial"))
        context.work.begin({})
        if way == "fisher":
            measure_sensitivity(context, ids)
        codecs = {layer.name: parse("bf16" if layer.block is None else "int3:row") for layer in context.anatomy.layers}
        layers = context.anatomy.layers_of(0)
        with ArtifactWriter(tmp_path / way, artifact_layout(context.anatomy, codecs), {}) as writer:
            encode.encode_model(context, codecs, writer, ids)
            decoded[way] = {
                layer: encode._written_weight(context, layer, codecs[layer.name], writer) for layer in layers
            }
            writer.finish()
    stream = context.stream()
    with torch.no_grad(), stream.block(0) as module:
        hidden = [stream.embed(piece) for piece in ids.split(2)]
        weights = block_weights(context, module, 0)

        def total(energies: list[Tensor], way: str) -> float:
            named = [{layer.name: energy for layer in weights} for energy in energies]
            grams = collect_guided_grams(lambda at: stream.run(module, 0, hidden[at]), weights, named, workers=1)
            errors = {layer: weights[layer] - decoded[way][layer] for layer in weights}
            return sum(float(((e @ grams[layer.name].matrix) * e).sum()) for layer, e in errors.items())

        assert total(steep, "fisher") < 0.9 * total(steep, "flat")
        alike = [torch.ones_like(energy) for energy in steep]
        assert total(alike, "fisher") > total(alike, "flat")
