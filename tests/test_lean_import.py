"""``import tersor`` defines names and registers one quantization method; nothing else in the process changes.

Each check runs in a fresh interpreter, where nothing has imported tersor yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

PROBE = r"""
import json, locale, logging, os, random, signal, sys, threading, time, types, warnings

import numpy
import torch
import safetensors.torch
import transformers
import transformers.quantizers.auto as auto
from transformers.modeling_utils import PreTrainedModel

SNAPSHOT_OF = ("torch", "transformers", "numpy", "safetensors")
DEVICE_QUERIES = [
    (torch.cuda, "is_available"), (torch.cuda, "device_count"), (torch.cuda, "init"), (torch.cuda, "current_device"),
    (torch.mps, "device_count"), (torch.accelerator, "current_accelerator"), (torch.accelerator, "is_available"),
]


def state():
    return {
        "random": repr(random.getstate()),
        "numpy.random": repr(numpy.random.get_state()),
        "torch.random": torch.random.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "cuda initialised": torch.cuda.is_initialized(),
        "warnings": [str(entry) for entry in warnings.filters],
        "showwarning": repr(warnings.showwarning),
        "environment": dict(os.environ),
        "sys.path": list(sys.path),
        "hooks": [repr(sys.excepthook), repr(sys.displayhook), repr(threading.excepthook)],
        "streams": [id(sys.stdin), id(sys.stdout), id(sys.stderr)],
        "signals": [repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "locale": locale.setlocale(locale.LC_ALL),
        "live threads": threading.active_count(),
        "numpy errors": numpy.geterr(),
        "print options": repr(numpy.get_printoptions()),
        "recursion limit": sys.getrecursionlimit(),
    }


def loggers():
    named = {"": logging.getLogger()}
    named.update(logging.Logger.manager.loggerDict)
    return {
        name: (logger.level, [repr(handler) for handler in logger.handlers], logger.propagate)
        for name, logger in named.items() if isinstance(logger, logging.Logger)
    }


def attributes():
    # Values are kept, not their ids, so that no id is used twice.
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in SNAPSHOT_OF and isinstance(module, types.ModuleType):
            found[name] = dict(vars(module))
            for key, value in list(vars(module).items()):
                if isinstance(value, type) and value.__module__ == name:
                    found[f"{name}.{key}"] = dict(vars(value))
    return found


own_reads = []
queries = []


def watch_environment():
    plain = os._Environ.__getitem__

    def reading(self, key):
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename.startswith(("<frozen", os.__file__)):
            frame = frame.f_back
        if frame and (os.sep + "tersor" + os.sep) in frame.f_code.co_filename:
            own_reads.append(key)
        return plain(self, key)

    os._Environ.__getitem__ = reading


def watch_devices():
    for owner, name in DEVICE_QUERIES:
        plain = getattr(owner, name, None)
        if plain is not None:
            setattr(owner, name, lambda *a, _plain=plain, _name=name, **k: (queries.append(_name), _plain(*a, **k))[1])


watch_environment()
watch_devices()
before, before_loggers, before_attributes = state(), loggers(), attributes()
registries = (dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), dict(auto.AUTO_QUANTIZER_MAPPING))
modules = set(sys.modules)
started = time.process_time()

import tersor

seconds = time.process_time() - started
loaded = set(sys.modules) - modules
after, after_loggers, after_attributes = state(), loggers(), attributes()

replaced, added = [], []
for name, values in before_attributes.items():
    for key, value in after_attributes[name].items():
        if key not in values:
            # A package gains its submodules as they are imported, and transformers fills in names when first asked.
            home = getattr(value, "__module__", None) or getattr(value, "__name__", "")
            if not str(home).split(".")[0] in SNAPSHOT_OF:
                added.append(f"{name}.{key}")
        elif values[key] is not value:
            replaced.append(f"{name}.{key}")

print(json.dumps({
    "changed": {key: [before[key], after[key]] for key in before if before[key] != after[key]},
    "loggers changed": [name for name, value in before_loggers.items() if after_loggers[name] != value],
    "own loggers": [
        name for name, value in after_loggers.items() if name.split(".")[0] == "tersor" and (value[0] or value[1])
    ],
    "environment reads": own_reads,
    "device queries": queries,
    "replaced": replaced,
    "added": added,
    "registered": [
        sorted(set(auto.AUTO_QUANTIZATION_CONFIG_MAPPING) - set(registries[0])),
        sorted(set(auto.AUTO_QUANTIZER_MAPPING) - set(registries[1])),
    ],
    "registrations changed": [
        name for old, new in zip(registries, (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING))
        for name in old if new[name] is not old[name]
    ],
    "loaded": sorted(loaded),
    "seconds": seconds,
}))
"""

HEAVY = ("scipy", "plotly", "datasets", "gguf", "pyarrow", "pandas", "tersor.pipeline", "tersor.report")
"""What a user of the packed model, or of ``tersor --help``, should not wait for."""


def run(code: str) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return json.loads(run(PROBE).splitlines()[-1])


def test_no_global_state_changes(found: dict[str, Any]) -> None:
    """Random states, threads, dtype, precision, warnings, environment, hooks, signals, streams, locale."""
    assert found["changed"] == {}


def test_logging_is_left_to_the_program(found: dict[str, Any]) -> None:
    assert found["loggers changed"] == []
    assert found["own loggers"] == []


def test_no_environment_is_read(found: dict[str, Any]) -> None:
    assert found["environment reads"] == []


def test_no_device_is_asked_for(found: dict[str, Any]) -> None:
    assert found["device queries"] == []


def test_no_other_library_is_patched(found: dict[str, Any]) -> None:
    assert found["replaced"] == []
    assert found["added"] == []


def test_only_the_quantization_method_is_registered(found: dict[str, Any]) -> None:
    assert found["registered"] == [["tersor"], ["tersor"]]
    assert found["registrations changed"] == []


def test_it_is_quick(found: dict[str, Any]) -> None:
    """Beyond torch and transformers, which anybody who uses a model has imported anyway."""
    assert [name for name in found["loaded"] if name.startswith(HEAVY)] == []
    assert found["seconds"] < 1.0


def test_the_command_line_answers_without_loading_the_pipeline() -> None:
    loaded = run("import sys, tersor.cli; print(*sys.modules)").split()
    assert "tersor.cli" in loaded
    assert [name for name in loaded if name in HEAVY] == []


def test_verbs_are_there() -> None:
    names = run("import tersor; print(*dir(tersor), *tersor.__all__)").split()
    assert {"plan", "compress", "evaluate", "inspect", "generate", "TersorError", "__version__"} <= set(names)


def test_an_unknown_name_is_an_attribute_error() -> None:
    message = run("import tersor\ntry:\n    tersor.compres\nexcept AttributeError as error:\n    print(error)")
    assert "compres" in message
