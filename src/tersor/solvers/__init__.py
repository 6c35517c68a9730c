"""How codes are chosen. A solver asks a codec for nearest values and never learns which codec it holds."""

from tersor.solvers.alternating import Alternating
from tersor.solvers.coordinate import CoordinateDescent
from tersor.solvers.encode import ROW_CHUNK, Encoder, chunk_of
from tersor.solvers.feedback import ErrorFeedback
from tersor.solvers.full_range import FullRange
from tersor.solvers.half_quadratic import HalfQuadratic
from tersor.solvers.learned_rounding import LearnedPerturbation, LearnedRounding
from tersor.solvers.nearest import Nearest

__all__ = [
    "ROW_CHUNK",
    "Alternating",
    "CoordinateDescent",
    "Encoder",
    "ErrorFeedback",
    "FullRange",
    "HalfQuadratic",
    "LearnedPerturbation",
    "LearnedRounding",
    "Nearest",
    "chunk_of",
]
