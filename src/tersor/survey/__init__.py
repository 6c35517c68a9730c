"""One command that runs all recipes on one model at equal bytes, and says which claims of their papers hold."""

from tersor.survey.records import Database, Outcome
from tersor.survey.run import Request, Survey, run_survey
from tersor.survey.verdicts import Verdict, front, judge, log_error, verdicts

__all__ = [
    "Database",
    "Outcome",
    "Request",
    "Survey",
    "Verdict",
    "front",
    "judge",
    "log_error",
    "run_survey",
    "verdicts",
]
