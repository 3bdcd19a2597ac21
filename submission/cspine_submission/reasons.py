"""An exception as one line for the report."""

import traceback
from pathlib import Path

from cspine.presets import CspineError


def why(error):
    """What went wrong, in one line: our own errors say it themselves, others with their kind and place."""
    text = " ".join(str(error).split())
    if isinstance(error, CspineError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}{': ' + text if text else ''}{place}"
