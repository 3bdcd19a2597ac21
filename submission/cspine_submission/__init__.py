"""The runner: a folder of scans in, the competition's submission.csv out, and never a row lost."""

from cspine_submission.dry import dry_run
from cspine_submission.runner import submit

__all__ = ["dry_run", "submit"]
