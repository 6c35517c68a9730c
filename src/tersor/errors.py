"""Everything tersor raises on purpose: one clear sentence each, and a way out.

The command line prints ``str(error)`` and exits with 2; a program can catch :class:`TersorError`.
"""

from __future__ import annotations


class TersorError(Exception):
    """Base of all deliberate errors. The message is one sentence a user can act on."""


class BadInput(TersorError):
    """An option, file or text that the user gave cannot be used."""


class UnknownArchitecture(TersorError):
    """The model's structure or configuration could not be understood."""


class ShapeMismatch(TersorError):
    """A codec cannot take a layer of this shape, or a tensor does not have the shape it must have."""


class Infeasible(TersorError):
    """The budget is below the least possible size.

    ``smallest`` is that size in bytes.
    """

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


class NotFinite(TersorError):
    """NaN or Inf in weights or activations; the message names the tensor."""


class NotPositiveDefinite(TersorError):
    """A Gram matrix could not be factored even at the largest damping allowed."""


class CorruptArtifact(TersorError):
    """A file is truncated, tampered with or not what its manifest says."""


class CannotResume(TersorError):
    """A run was interrupted and the model, plan, text or version has changed since."""


class VerificationFailed(TersorError):
    """The written artifact was reopened and is not what the plan promised."""


class EngineFailed(TersorError):
    """An engine is not usable here, refuses a file, or fails while running it."""
