"""A decoder made from a blueprint and stored weights is the decoder that was made from the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny_models
from tersor.codecs import parse
from tersor.contracts import Codec, Shape
from tersor.errors import UnknownArchitecture
from tersor.kernels import step
from tersor.runtime.decoding import Decoder
from tersor.runtime.decoding.blueprint import Blueprint, draw, rebuild
from tersor.runtime.packed import Packed, TiedLinear, adopt
from tersor.runtime.products import held
from tersor.solvers import Encoder, Nearest

pytestmark = pytest.mark.skipif(not step.available, reason="products were not compiled")

IDS = [5, 60, 7, 8, 33, 10, 11, 99, 0, 5]
KNOWN = ("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "olmo2", "stablelm")


class Weights:
    """A model's weights as an artifact gives them."""

    def __init__(self, model: nn.Module) -> None:
        packed = {name: module for name, module in model.named_modules() if isinstance(module, Packed)}
        self.layers: Mapping[str, Codec] = {name: module.codec for name, module in packed.items()}
        self.shapes: Mapping[str, Shape] = {name: module.stored_shape for name, module in packed.items()}
        self._parts = {name: {part: m.part(part).clone() for part in m.part_names} for name, m in packed.items()}
        self.plain = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def tensors(self, layer: str) -> dict[str, Tensor]:
        return self._parts[layer]

    def kept(self, name: str) -> Tensor:
        return self.plain[name]


def build(family: str, codec: str | None = None) -> Any:
    """A tiny model, its linear layers packed, and its embedding too where that has a head of its own."""
    model = tiny_models.build(family, max_position_embeddings=256)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    if codec is None:
        return model
    for module in list(model.modules()):
        if (isinstance(module, nn.Linear) and not (tied and module is head)) or module is embedding:
            stored, _ = Encoder(Nearest())(module.weight.detach(), parse(codec), None)
            adopt(module, parse(codec))
            for name, tensor in stored.items():
                module.part(name).copy_(tensor)
    if tied:
        model.lm_head = TiedLinear(embedding)
    return model


def kept(plan: Blueprint, folder: Path) -> Blueprint:
    """The same, written and read."""
    plan.save(folder / "new" / "plan.safetensors")
    assert [path.name for path in (folder / "new").iterdir()] == ["plan.safetensors"]
    found = Blueprint.load(folder / "new" / "plan.safetensors")
    assert found is not None
    return found


@pytest.mark.parametrize("codec", [None, "int4:row", "rot(int8:row)"])
@pytest.mark.parametrize("family", KNOWN)
def test_logits_are_the_same(family: str, codec: str | None, tmp_path: Path) -> None:
    model = build(family, codec)
    weights = Weights(model)
    plan = kept(draw(model, weights.plain, 200), tmp_path)
    expected = Decoder.of(model, context=64).feed(IDS).clone()
    del model
    for dtype in (torch.float32, torch.float16):
        decoder = rebuild(plan, weights, context=64, cache_dtype=dtype)
        assert (decoder.context, decoder.position) == (64, 0)
        difference = (decoder.feed(IDS) - expected).abs().max() / expected.std()
        assert difference == 0 if dtype == torch.float32 else difference < 5e-3


def test_a_context_may_be_shorter_than_the_text_of_the_proof_but_no_longer_than_what_was_drawn() -> None:
    model = build("llama", "int8:row")
    weights = Weights(model)
    plan = draw(model, weights.plain, 200)
    decoder = rebuild(plan, weights, context=len(IDS), cache_dtype=torch.float32)
    decoder.feed(IDS)
    assert decoder.room == 0
    assert rebuild(plan, weights, context=200, cache_dtype=torch.float32).room == 200
    with pytest.raises(UnknownArchitecture, match="for texts of up to 200 tokens"):
        rebuild(plan, weights, context=201, cache_dtype=torch.float32)
    with pytest.raises(UnknownArchitecture, match="less than the 40 tokens"):
        draw(model, weights.plain, 39)


def test_other_weights_are_found_out() -> None:
    model = build("llama", "int8:row")
    plan = draw(model, Weights(model).plain, 100)
    other = Weights(model)
    other.tensors("model.layers.1.mlp.down_proj")["codes"].zero_()
    with pytest.raises(UnknownArchitecture, match="standard deviations from its own"):
        rebuild(plan, other, context=64, cache_dtype=torch.float32)


def test_what_is_used_otherwise_than_stored_is_not_drawn() -> None:
    model = build("llama")
    with pytest.raises(UnknownArchitecture, match="otherwise than it is stored"):
        draw(model, (), 100)
    model.model.embed_tokens.register_forward_hook(lambda _m, _i, output: output + 0.1)
    with pytest.raises(UnknownArchitecture, match="rows of a table times a number"):
        draw(model, Weights(model).plain, 100)


def _without(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


@pytest.mark.parametrize(
    "change",
    [
        _without("context"),
        _without("layers", 0, "attention"),
        _without("layers", 0, "mlp", "output", "layer"),
        _without("head"),
        _without("bounds", "False"),
        lambda data: data.update(layers=3),
        lambda data: data["norm"].update(weight="none of these"),
        lambda data: data["embedding"].update(layer=["?"]),
        lambda data: data["layers"][0]["mlp"].update(more=1),
        lambda data: data.update(norm=None),
    ],
)
def test_damaged_data_is_refused(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    model = build("llama", "int8:row")
    weights = Weights(model)
    plan = kept(draw(model, weights.plain, 100), tmp_path)
    change(plan.data)
    with pytest.raises(UnknownArchitecture):
        rebuild(plan, weights, context=64, cache_dtype=torch.float32)


@pytest.mark.parametrize("logits", ["flat", "wide", "nan", "empty"])
def test_logits_that_are_none_are_refused(logits: str) -> None:
    model = build("llama", "int8:row")
    weights = Weights(model)
    plan = draw(model, weights.plain, 100)
    own = plan.tensors["logits"]
    plan.tensors["logits"] = {
        "flat": own[0], "wide": torch.cat([own, own], 1), "nan": own * torch.nan, "empty": own[:, :0]
    }[logits]  # fmt: skip
    with pytest.raises(UnknownArchitecture, match="no logits"):
        rebuild(plan, weights, context=64, cache_dtype=torch.float32)


def test_a_tied_table_is_one_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama-tied", "ternary:row")
    weights = Weights(model)
    plan = draw(model, weights.plain, 100)
    made = []
    whole = held.product_of
    monkeypatch.setattr(held, "product_of", lambda *given: made.append(given[2]) or whole(*given))
    rebuild(plan, weights, context=64, cache_dtype=torch.float32)
    table = tuple(model.get_input_embeddings().stored_shape)
    assert made.count(table) == 1


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    model = build("llama")
    path = tmp_path / "plan.safetensors"
    assert Blueprint.load(path) is None
    draw(model, Weights(model).plain, 100).save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:50], whole[:-1], b"\xff" * 100):
        path.write_bytes(content)
        assert Blueprint.load(path) is None
    changed = bytearray(whole)
    changed[-5] ^= 1  # of a tensor, which a short text does not see
    path.write_bytes(changed)
    assert Blueprint.load(path) is None
    path.write_bytes(whole)
    assert Blueprint.load(path) is not None
    tensors = load_file(path)
    for metadata in (None, {"blueprint": "{"}, {"else": json.dumps({})}):
        save_file(tensors, path, metadata=metadata)
        assert Blueprint.load(path) is None
