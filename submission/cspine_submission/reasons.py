"""Why something failed, as one line for the report; and when two reasons are the same."""

import re
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


def alike(reason):
    """A reason without what is one study's own (paths, UIDs, names of files, numbers), so that equal ones count as one."""
    text = re.sub(r"(?:[A-Za-z]:)?(?:[\w.~+-]*[/\\])+[\w.~+-]*", "PATH", reason)
    text = re.sub(r"\b[0-9]+(?:\.[0-9]+){3,}\b", "UID", text)
    text = re.sub(r"(?<![\w.])[\w+-]+\.(?:dcm|nii(?:\.gz)?)\b", "FILE", text)
    return re.sub(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])", "N", text)
