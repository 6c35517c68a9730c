"""The command line as a user meets it, for tests: what comes out on either stream, and what is left on the disk."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tersor import cli

SOURCES = Path(__file__).parents[1] / "src"


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one sentence on standard error of a command that was refused; fails where there is anything else."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("tersor: "), self.err
        return lines[0].removeprefix("tersor: ")

    @property
    def text(self) -> str:
        """Standard output of a command that went well."""
        assert self.code == 0, self.err
        return self.out


def run(*arguments: object, cache: Path) -> Outcome:
    """The command in this process: what ``tersor ARGUMENTS`` does, with ``cache`` for its cache folder."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tersor", *map(str, arguments)])
        patch.setenv("XDG_CACHE_HOME", str(cache))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def launch(*arguments: object, cache: Path, environment: Mapping[str, str] | None = None) -> Outcome:
    """The command in a process of its own, without a terminal: ``python -m tersor ARGUMENTS``."""
    paths = os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", **(environment or {})}
    done = subprocess.run(
        [sys.executable, "-m", "tersor", *map(str, arguments)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
