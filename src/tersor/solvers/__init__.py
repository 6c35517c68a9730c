"""How codes are chosen. A solver asks a codec for nearest values and never learns which codec it holds."""

from tersor.solvers.coordinate import CoordinateDescent
from tersor.solvers.encode import ROW_CHUNK, Encoder, chunk_of
from tersor.solvers.feedback import ErrorFeedback
from tersor.solvers.nearest import Nearest

__all__ = ["ROW_CHUNK", "CoordinateDescent", "Encoder", "ErrorFeedback", "Nearest", "chunk_of"]
