"""The version, on its own so that everything can read it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tersor")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"
