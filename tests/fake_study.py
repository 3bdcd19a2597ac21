"""Stand-ins for test_submission: studies that do what their only file says, and a pipeline that knows what to answer."""

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from cspine.dicom import Volume
from cspine.presets import TARGETS, CspineError


def make(folder, **what):
    """A study folder; `what` is read by `read` and `FakePipeline`."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "1.dcm").write_text(json.dumps(what))


def read(folder):
    """Called in the reader process instead of read_series."""
    what = json.loads((Path(folder) / "1.dcm").read_text())
    print("a library's chatter on stdout")
    if "seconds" in what:
        time.sleep(what["seconds"])
    marker = what.get("kill parent")  # of the reader: the worker that asked it
    if marker and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getppid(), signal.SIGKILL)
    if what.get("read") == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what.get("read") == "exit":
        raise SystemExit(3)
    if what.get("read") == "error":
        raise CspineError("slice 3 is torn")
    if what.get("read") == "memory":
        raise MemoryError
    volume = Volume(np.full((3, 4, 5), what.get("hu", 0), np.int16), np.eye(4), Path(folder).name, ["a note of the reader"])
    volume.what = what
    return volume


def read_below(folder):
    """`read` for a study whose file lies in a subfolder."""
    below = Path(folder) / "series"
    volume = read(below if below.exists() else folder)
    volume.uid = Path(folder).name
    return volume


class FakePipeline:
    """Answers hu / 1000 for every target, or fails as the study says."""

    device = "cpu"

    def __init__(self, bundle=None):
        self.seen, self.asked, self.oom = [], [], 0
        self.bundle = None if bundle is None else SimpleNamespace(path=bundle, prior=dict.fromkeys(TARGETS, 0.25))

    def predict(self, volume, effort=0, evidence=False):
        self.seen.append(volume.uid)
        self.asked.append((effort, evidence))
        time.sleep(volume.what.get("work", 0) / (1 + effort))
        how = volume.what.get("predict")
        once = volume.what.get("marker")  # a file: what is to happen happens until it is there, and then no more
        if once and Path(once).exists():
            how = None
        elif once:
            Path(once).touch()
        if how == "error":
            raise RuntimeError("shapes do not\nmatch")
        if how == "exit":
            raise SystemExit(1)
        if how == "hang":
            time.sleep(60)
        if how == "memory" or (how == "memory once" and self.seen.count(volume.uid) == 1):
            raise MemoryError
        if how == "crash" or (how == "crash on gpu" and self.device != "cpu"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "out of memory killer":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "gpu":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if how == "kill the run":
            os.kill(os.getpid(), signal.SIGKILL)
        p = dict.fromkeys(TARGETS, volume.hu[0, 0, 0] / 1000)  # no pandas, which would be imported in each process
        if how == "nan":
            p["C4"] = np.nan
        if how == "above":
            p["C4"] = 1.01
        if how == "incomplete":
            del p["C7"]
        spine = how != "no spine"
        return SimpleNamespace(
            probabilities=p, notes=[*volume.notes, "a note of the pipeline"], cervical_spine=spine,
            reason="" if spine else "no bone of the neck's shape",
        )


def pipeline(bundle, device, threads, cache):
    """Made in a predictor process instead of cspine_submission.predicting:pipeline; a bundle named broken cannot be loaded."""
    from cspine_submission.predicting import answer

    if bundle and Path(bundle).name == "broken":
        raise CspineError("the weights are not the file that was bundled")
    kind = Path(bundle).name
    if kind == "second_fails":
        first = Path(bundle) / "first"
        if first.exists():
            raise MemoryError("no room for a second one")
        first.touch()
    if kind == "full_gpu" and device != "cpu":
        raise RuntimeError("CUDA out of memory")
    made = FakePipeline(Path(bundle))
    facts = {"device": device or "cpu", "note": "", "devices": ["cpu"], "folds": (1, 1), "efforts": 4, "card": {}, "expected": None}
    if Path(bundle).name == "gpus":
        facts |= {"device": device or "cuda:0", "devices": ["cuda:0", "cuda:1"]}
        made.device = facts["device"]

    def work(question):
        study = answer(made, **question)
        view = {"view": b"seen"} if question.get("picture") else {}  # the real one needs a volume and an answer that are none here
        return study | view | {"pid": os.getpid(), "device": facts["device"]}

    return facts, work
