"""The runner: a folder of scans in, the competition's submission.csv out, and never a row lost."""

import importlib

__all__ = ["dry_run", "submit"]


def __getattr__(name):  # when it is asked for: a child process imports this package too, and needs neither of them
    if name in __all__:
        return getattr(importlib.import_module(f"cspine_submission.{'dry' if name == 'dry_run' else 'runner'}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
