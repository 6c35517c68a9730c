"""A second run of an artifact starts from what the first found out: less is imported, and the text is the same."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tersor
import tiny_models
import tiny_runs
import tiny_tokenizer
from command_line import SOURCES
from tersor import writing
from tersor.artifact import open_artifact
from tersor.kernels import step
from tersor.runtime.decoding.blueprint import Blueprint
from tersor.stages import known, session

pytestmark = pytest.mark.skipif(not step.available, reason="products were not compiled")

NEEDLESS = (
    "transformers.modeling_utils",
    "torch._dynamo",
    "torch._inductor",
    "scipy",
    "sklearn",
    "pandas",
    "pyarrow",
    "datasets",
    "gguf",
    "plotly",
    "torchvision",
    "tersor.pipeline",
    "tersor.api",
    "tersor.survey",
    "tersor.delivery",
    "tersor.solvers",
    "tersor.statistics",
)
"""What a run that starts from a blueprint has no use for, each of it megabytes or tenths of a second."""

RUN = r"""
import json, sys
import torch
import tersor.show, tersor.stages.generate  # all that a run imports before it opens the artifact

def resident(kind):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

before = resident("RssAnon") if sys.platform == "linux" else 0
after = []
from tersor import cli
from tersor.stages import session
write = session.Session.write

def measured(self, *given, **settings):  # while the weights are held
    written = write(self, *given, **settings)
    after.append(resident("RssAnon") if sys.platform == "linux" else 0)
    return written

session.Session.write = measured
sys.argv = ["tersor", "run", sys.argv[1], "hi there", "--tokens", "12", "--json"]
try:
    cli.main()
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps({"modules": sorted(sys.modules), "anonymous": after[0] - before}))
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    """26 MB of weights in a model that has little else."""
    folder = tmp_path_factory.mktemp("known")
    widths = {"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 2, "max_position_embeddings": 128}
    tiny_models.build("llama", **widths).to(torch.bfloat16).save_pretrained(folder / "source")
    tiny_tokenizer.build(chat=True).save_pretrained(folder / "source")
    plan = tersor.plan(folder / "source", size="99%", candidates=("int8:row",), fast=True)
    made = folder / "made"
    settings = {**tiny_runs.SETTINGS, "dtype": "bfloat16"}
    tersor.compress(
        folder / "source", made, plan=plan.plan, solver="nearest", text=words, cache_dir=folder / "cache", **settings
    )
    return made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tersor" / "steps"


def run(artifact: Path, cache: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run says as JSON, and what its process has become by then."""
    paths = os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(cache.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(artifact)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, became = done.stdout.rsplit("\n", 2)[:2]
    return json.loads(said), json.loads(became)


def test_a_second_run_imports_and_keeps_little(artifact: Path, cache: Path) -> None:
    weights = (artifact / "model.safetensors").stat().st_size
    assert weights > 26e6
    first, _ = run(artifact, cache)
    second, became = run(artifact, cache)
    assert (second["text"], second["tokens"]) == (first["text"], first["tokens"])
    assert first["fallback"] is second["fallback"] is None
    modules = set(became["modules"])
    assert modules.isdisjoint(NEEDLESS)
    assert "transformers.models.llama.modeling_llama" not in modules
    # Weights are there once: in large pages, or in the pages of their file. 12 MB were seen beside, most of it modules.
    assert became["anonymous"] < weights + 20e6


def test_settings_that_were_added_count(artifact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifact, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    before = known.place(open_artifact(folder))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert known.place(open_artifact(folder)) != before


def test_without_a_home_nothing_is_known(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", lost)
    new = opened(artifact)
    new.prepare(64, torch.float32)
    new.keep()
    assert new.decoder is not None


def opened(artifact: Path) -> session.Session:
    return session.open_session(artifact, trust_remote_code=False)


def test_what_is_known_is_what_the_model_says(artifact: Path, cache: Path) -> None:
    new = opened(artifact)
    assert new.blueprint is None
    new.prepare(64, torch.float32)
    ids = new.encode("hello")
    assert new.decoder is not None
    expected = new.decoder.feed(ids).clone()
    new.keep()
    (file,) = cache.iterdir()
    assert file == known.place(open_artifact(artifact))
    again = opened(artifact)
    assert (again.manner, again.limit) == (new.manner, 128)
    assert type(again.tokenizer) is type(new.tokenizer)
    assert again.encode("hello") == ids
    again.prepare(64, torch.float32)
    assert again._model is None
    assert again.decoder is not None
    assert torch.equal(again.decoder.feed(ids), expected)
    again.keep()
    assert list(cache.iterdir()) == [file]
    assert type(again.model).__name__ == "LlamaForCausalLM"  # loaded for whoever asks


def test_a_longer_context_than_what_is_known_is_known_from_then_on(
    artifact: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LONGEST", 50)
    for context, known_already in ((45, False), (50, True), (64, False), (60, True), (64, True)):
        found = opened(artifact)
        found.prepare(context, torch.float32)
        assert found.decoder is not None
        assert (found._model is None) is known_already
        found.keep()


def _spoil_file(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _spoiled(change: Callable[[Blueprint], object]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        found = Blueprint.load(file)
        assert found is not None
        changed = Blueprint(found.data, {name: tensor.clone() for name, tensor in found.tensors.items()})
        change(changed)
        changed.save(file)

    return spoil


SPOILS: dict[str, Callable[[Path], None]] = {
    "file": _spoil_file,
    "logits": _spoiled(lambda found: found.tensors["logits"].mul_(-1)),
    "angles": _spoiled(lambda found: found.tensors.update({found.data["handed"][0]["cosine"]: torch.ones(3)})),
    "manner": _spoiled(lambda found: found.data.pop("manner")),
    "stops": _spoiled(lambda found: found.data["manner"].pop("stops")),
    "no tokenizer": _spoiled(lambda found: found.data.update(tokenizer=None)),
    "another class": _spoiled(lambda found: found.data["tokenizer"].update({"class": "LlamaForCausalLM"})),
    "no class": _spoiled(lambda found: found.data["tokenizer"].pop("class")),
    "other ids": _spoiled(lambda found: found.data["tokenizer"]["does"].reverse()),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS.keys())
def test_what_is_spoiled_is_found_out_anew(spoil: Callable[[Path], None], artifact: Path, cache: Path) -> None:
    expected = writing.write(artifact, "hello", tokens=4)
    (file,) = cache.iterdir()
    spoil(file)
    found = writing.write(artifact, "hello", tokens=4)
    assert (found.text, found.fallback) == (expected.text, None)
    last = opened(artifact)
    last.prepare(64, torch.float32)
    assert last._model is None  # it was kept again


def test_what_cannot_be_kept_is_not(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert writing.write(artifact, "hello", tokens=4).tokens == 4


def test_a_chat_starts_from_it_too(artifact: Path, cache: Path) -> None:
    first = writing.chat(artifact, tokens=6)
    said = first.say("hello")
    (file,) = cache.iterdir()
    second = writing.chat(artifact, tokens=6)
    assert second._session._model is None
    assert second.say("hello").text == said.text
    assert re.fullmatch(r"[0-9a-f]{32}\.safetensors", file.name)


def test_other_versions_and_other_files_have_other_places(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = known.place(open_artifact(artifact))
    monkeypatch.setattr(known.transformers, "__version__", "0")
    assert known.place(open_artifact(artifact)) != there
