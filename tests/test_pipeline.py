"""The main job on tiny models of every family: to a budget, into a folder that transformers runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny_models
import tiny_runs
from tersor import api
from tersor.anatomy import analyse, open_source, skeleton
from tersor.artifact import Artifact, open_artifact
from tersor.contracts import Anatomy
from tersor.errors import UnknownArchitecture
from tersor.runtime.products import decoded_only

Ready = Callable[..., Path]
Compress = Callable[..., api.Result]


@pytest.fixture(scope="module")
def ready(tiny: Ready, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """Family name to a model folder with a tokenizer."""

    def make(family: str, **options: object) -> Path:
        return tiny_runs.with_tokenizer(tiny(family, **options), tmp_path_factory.mktemp(f"{family}-ready"))

    return make


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_runs.text(tmp_path_factory.mktemp("text") / "words.txt"))


@pytest.fixture
def compress(text: str, tmp_path: Path) -> Compress:
    def run(model: Path | nn.Module, output: str = "out", **settings: object) -> api.Result:
        given = {"size": "40%"} if "plan" not in settings else {}
        return api.compress(
            model,
            tmp_path / output,
            cache_dir=tmp_path / "cache",
            **{"text": text, **given, **tiny_runs.SETTINGS, **settings},
        )

    return run


def anatomy_of(folder: Path) -> Anatomy:
    source = open_source(folder)
    return analyse(source, skeleton(source))


def plain_model(folder: Path, artifact: Artifact, anatomy: Anatomy) -> nn.Module:
    """The source's own model class, its parameters overwritten with what the artifact decodes to."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for layer in anatomy.layers:
            parameter = model.get_parameter(layer.parameter)
            weight = artifact.decode(layer.name).reshape(layer.copies, *layer.shape)
            weight = weight.transpose(-1, -2) if layer.transposed else weight
            parameter.copy_(weight.reshape(parameter.shape))
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name in anatomy.kept:
            tensors[name].copy_(artifact.kept(name))
    return model


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("family", tiny_models.STREAMED)
def test_a_family_end_to_end(family: str, ready: Ready, compress: Compress) -> None:
    folder = ready(family)
    result = compress(folder)
    artifact = open_artifact(result.folder)
    artifact.verify_hashes()
    assert artifact.weight_bytes == result.plan.file_bytes <= result.plan.budget
    assert not any("No calibration token" in note for note in result.notes)

    quality = result.quality
    numbers = (quality.kl, quality.kl_error, quality.perplexity, quality.reference_perplexity, quality.top1)
    assert all(map(math.isfinite, numbers))
    assert quality.kl >= 0

    anatomy = anatomy_of(folder)
    _every_tensor_is_accounted_for(anatomy, artifact, result)
    packed = AutoModelForCausalLM.from_pretrained(result.folder).eval()
    wanted = logits(plain_model(folder, artifact, anatomy))
    with decoded_only():
        torch.testing.assert_close(logits(packed), wanted, rtol=1e-5, atol=1e-5)
    # Compiled products round inputs to 16 bits.
    assert float((logits(packed) - wanted).abs().max()) < 1e-3 * float(wanted.std())


def _every_tensor_is_accounted_for(anatomy: Anatomy, artifact: Artifact, result: api.Result) -> None:
    """Each tensor of the source is in the plan, among the kept, tied to one of those, or dropped for a reason."""
    planned = {layer.parameter: layer.name for layer in anatomy.layers}
    assert set(planned.values()) == set(result.plan.layers) == set(artifact.layers)
    tied = {name: layer.parameter for layer in anatomy.layers for name in layer.tied}
    for fate in anatomy.tensors:
        if fate.fate == "encoded":
            assert fate.target in planned
        elif fate.fate == "kept":
            assert fate.target in artifact.manifest.kept
        elif fate.fate == "tied":
            assert fate.target in planned or tied.get(fate.target or "") in planned
        else:
            assert fate.reason


def test_a_family_that_cannot_be_streamed_gets_one_clear_sentence(
    ready: Ready, compress: Compress, tmp_path: Path
) -> None:
    with pytest.raises(UnknownArchitecture, match=r"blocks of .* cannot be run one by one") as caught:
        compress(ready("gemma3n"), size="90%")
    assert str(caught.value).count("\n") == 0
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_head_that_is_declared_tied_but_differs_becomes_a_layer_of_its_own(
    ready: Ready, compress: Compress, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(ready("llama"))
    model.config.tie_word_embeddings = True
    folder = tmp_path / "declared"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_runs.with_tokenizer(ready("llama"), tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").glob("tokenizer*"):
        file.rename(folder / file.name)
    result = compress(folder)
    assert "lm_head" in result.plan.layers
    packed = AutoModelForCausalLM.from_pretrained(result.folder).eval()
    head, embedding = packed.get_output_embeddings(), packed.get_input_embeddings()
    assert head is not embedding
    plain = AutoModelForCausalLM.from_pretrained(ready("llama")).eval()
    assert (logits(packed) - logits(plain)).abs().mean() < 0.2 * logits(plain).abs().mean()
