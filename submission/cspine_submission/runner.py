"""The loop over the studies: which rows, what is known already, what stands in, how long it may take."""

import gc
import hashlib
import json
import math
import os
import queue
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

import cspine
from cspine.dicom import study_files
from cspine.presets import TARGETS, CspineError, progress
from cspine.rsna import PRIOR, find_studies, test_rows, write_submission, write_whole
from cspine_submission.reading import ReadFailed, read_ahead
from cspine_submission.reasons import why

PREDICTED, NO_SPINE, STOOD_IN = "predicted", "no cervical spine", "prior"


def submit(
    data,  # folder with test.csv and test_images/, or a folder of study folders
    bundle=None,  # bundle folder; None: the demo bundle, and a line that says so
    out="submission.csv",  # the CSV; beside it come submission_report.json, named like it, and the folder <out>.parts
    device=None,  # 'cpu', 'cuda', ...; None: a GPU where there is one
    workers=None,  # processes that read ahead of the network; None: by the number of cores
    timeout=600,  # s that reading one study may take, and then predicting it
    budget=None,  # s for the whole run: a study that is not reached gets the prior; None: no limit
    resume=True,  # use what <out>.parts holds from an earlier run; False: begin again
    pipeline=None,  # an object with .predict(volume), to use instead of a bundle
):  # the report, a dict: path, report, rows, studies, counts, reused, seconds, study (uid -> status, reason, ...)
    """Answer every row of test.csv, once and in its order, whatever happens to a single study."""
    start, data, out = time.monotonic(), Path(data), Path(out)
    if not timeout > 0 or (budget is not None and not budget > 0):
        raise CspineError("timeout and budget are seconds, and more than 0")
    with _writing(out):
        if out.is_dir():
            raise CspineError(f"{out} is a folder; out takes the CSV file to write")
    rows = test_rows(data)
    if not len(rows):
        raise CspineError(f"{data / 'test.csv'} has no rows to answer")
    uids, folders = list(dict.fromkeys(rows["StudyInstanceUID"])), find_studies(data, "test")
    model = _model_stamp(bundle, pipeline)
    with _writing(out):
        parts = Parts(out, rows, model, resume)
    known = {uid: parts.load(uid, folders.get(uid)) for uid in uids}
    todo = [uid for uid in uids if known[uid] is None]
    if len(todo) < len(uids):
        print(f"reusing {len(uids) - len(todo)} of {len(uids)} studies from {parts.folder}", flush=True)
    if todo and pipeline is None:
        from cspine.inference import Pipeline  # loads torch, so only where there is something to predict

        pipeline = Pipeline(bundle, device=device)
    prior = _prior(pipeline)

    def left():
        return math.inf if budget is None else budget - (time.monotonic() - start)

    if workers is None:
        workers = min(4, (os.cpu_count() or 2) // 2)
    volumes = read_ahead([folders[uid] for uid in todo if uid in folders], max(1, workers), timeout)
    predict, studies = TimeLimit(), dict(known)
    try:
        for uid in progress(todo, "predicting", total=len(todo)):
            seconds = {}
            if uid not in folders:
                study = _stand_in(prior, f"no folder for it in {data / 'test_images'}")
            elif left() <= 0:
                study = _stand_in(prior, f"the {budget:g} s for the whole run were over before its turn")
            else:
                volume, seconds["read"] = next(volumes)
                if isinstance(volume, ReadFailed):
                    study = _stand_in(prior, str(volume))
                else:
                    began = time.monotonic()
                    study = predict(_answer, pipeline, volume, prior, limit=max(1, min(timeout, left())))
                    seconds["predict"] = time.monotonic() - began
                del volume  # not beside the next one
            studies[uid] = study | {"seconds": {step: round(s, 3) for step, s in seconds.items()}, "reused": False}
            parts.save(uid, folders.get(uid), studies[uid])
    finally:
        volumes.close()

    answers = [studies[uid]["probabilities"][t] for uid, t in zip(rows["StudyInstanceUID"], rows["prediction_type"])]
    with _writing(out):
        write_submission(pd.DataFrame({"row_id": rows["row_id"], "fractured": answers}), out)
    report = {
        "path": str(out),
        "report": str(out.with_name(f"{out.stem}_report.json")),
        "data": str(data),
        "rows": len(rows),
        "studies": len(uids),
        "counts": dict(Counter(s["status"] for s in studies.values())),
        "reused": len(uids) - len(todo),
        "seconds": round(time.monotonic() - start, 2),
        "study": studies,
    }
    with _writing(report["report"]):
        write_whole(report["report"], json.dumps(report, indent=1, allow_nan=False))
    print(_summary(report), flush=True)
    return report


@contextmanager
def _writing(path):
    """What the system says against a file becomes an error that says which file, and what to do."""
    try:
        yield
    except OSError as e:
        raise CspineError(f"{path} cannot be written ({e.strerror}): name a CSV in a folder that you can write to") from e


class TimeLimit:
    """Call a function in a thread, but wait only so long for it; a call that hangs is left behind."""

    def __init__(self):
        self._start()

    def _start(self):
        # one thread for all calls, since torch keeps much of what it prepared per thread; a daemon, so that a hanging
        # call does not hold up the end of the process
        self.calls, self.answers = queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(target=self._serve, args=(self.calls, self.answers), daemon=True).start()

    @staticmethod
    def _serve(calls, answers):
        while True:
            function, args = calls.get()
            answers.put(function(*args))
            del function, args  # a volume, which would stay in memory until the next call

    def __call__(self, function, pipeline, volume, prior, limit):
        """What the function returns, or the prior if that takes more than `limit` s."""
        self.calls.put((function, (pipeline, volume, prior)))
        try:
            return self.answers.get(timeout=limit)
        except queue.Empty:
            self._start()
            return _stand_in(prior, f"predicting took more than {limit:g} s", volume)


class Parts:
    """The folder <out>.parts: one file per study that is done, so that a run that was killed goes on."""

    def __init__(self, out, rows, model, resume):
        self.folder = Path(f"{out}.parts")
        self.number = {uid: i for i, uid in enumerate(dict.fromkeys(rows["StudyInstanceUID"]))}
        made_from = {"rows": _sha256("\n".join(rows["row_id"])), "model": model}
        mine = self.folder / "made_from.json"
        before = _read_json(mine)
        if resume and model is not None and before == made_from:
            return
        old = list(self.folder.glob("study_*.json"))
        if old:
            changed = "resume is off" if not resume else "the bundle, the code or test.csv is another"
            print(f"beginning again, not reusing {len(old)} studies in {self.folder}: {changed}", flush=True)
        for path in old:
            path.unlink()
        write_whole(mine, json.dumps(made_from))

    def _path(self, uid):
        return self.folder / f"study_{self.number[uid]:05d}.json"  # not the uid: it need not be a file name

    def load(self, uid, folder):
        """What an earlier run found, None if there is nothing or the study's files have changed."""
        part = _read_json(self._path(uid))
        if part is None or folder is None or part["files"] is None or part["files"] != _files_stamp(folder):
            return None
        return part["study"] | {"reused": True}

    def save(self, uid, folder, study):
        """Keep a study; one that failed is not kept: the next run tries it again."""
        if study["status"] == STOOD_IN:
            return
        try:
            write_whole(self._path(uid), json.dumps({"uid": uid, "files": _files_stamp(folder), "study": study}))
        except OSError as e:  # a full disk costs the resume, not the run
            study["notes"].append(f"not kept for another run: {e.strerror}")


def _answer(pipeline, volume, prior):
    """A study's part of the report. Never raises: it runs in a thread that all other studies need, too."""
    try:
        prediction = _predict(pipeline, volume)
        p = {t: float(prediction.probabilities[t]) for t in TARGETS}
        odd = [f"{t} = {v}" for t, v in p.items() if not 0 <= v <= 1]  # also true of nan
        if odd:
            return _stand_in(prior, f"the pipeline's answer is no probability: {', '.join(odd)}", volume)
        found = bool(prediction.cervical_spine)
        return {
            "status": PREDICTED if found else NO_SPINE,
            # a study that was read with a repair is answered, but the report says so as plainly as of one that was not
            "reason": "; ".join(map(str, volume.notes)) if found else str(prediction.reason),
            "notes": [str(n) for n in prediction.notes],
            "boxes_from": list(prediction.boxes_from) if _has_yolo(pipeline) else [],  # of C1..C7: yolo, mask or nothing
            "slices": int(volume.shape[0]),
            "probabilities": p,
        }
    except BaseException as e:  # noqa: BLE001, a library's SystemExit too
        return _stand_in(prior, why(e), volume)


def _has_yolo(pipeline):
    return bool(getattr(getattr(pipeline, "bundle", None), "detection", None))


def _predict(pipeline, volume):
    try:
        return pipeline.predict(volume)
    except Exception as e:
        if not isinstance(e, MemoryError) and type(e).__name__ != "OutOfMemoryError":  # torch's, without torch
            raise
    # the exception is gone here, and with it the frames that held the memory
    gc.collect()
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()
    return pipeline.predict(volume)


def _stand_in(prior, reason, volume=None):
    """The part of the report for a study that got the prior."""
    notes = [] if volume is None else [str(n) for n in volume.notes]
    slices = None if volume is None else int(volume.shape[0])
    return {"status": STOOD_IN, "reason": reason, "notes": notes, "slices": slices, "probabilities": dict(prior)}


def _prior(pipeline):
    """The bundle's answer without evidence; the competition's best constant where there is no bundle."""
    prior = getattr(getattr(pipeline, "bundle", None), "prior", None)
    return {t: float((PRIOR if prior is None else prior)[t]) for t in TARGETS}


def _model_stamp(bundle, pipeline):
    """A hash of the bundle and of cspine's code: another model or an edited notebook asks for another run."""
    if pipeline is not None:
        bundle = getattr(pipeline, "bundle", None)
        if bundle is None:
            return None
    elif bundle is None:
        from cspine.bundle import default_bundle

        bundle = default_bundle()
    card = Path(getattr(bundle, "path", bundle)) / "bundle.json"  # holds the SHA-256 of each of its files
    if not card.is_file():
        return None
    code = sorted(Path(cspine.__file__).parent.glob("*.py"))
    return _sha256("".join(_sha256(p.read_bytes()) for p in [card, *code]))


def _files_stamp(folder):
    """A hash of the names, sizes and times of a study's files; None if they cannot be listed."""
    try:
        facts = [(os.path.relpath(f, folder), f.stat().st_size, f.stat().st_mtime_ns) for f in study_files(folder)]
    except OSError:  # gone or not ours to read: what is known of it is not used
        return None
    return _sha256(json.dumps(facts))


def _sha256(content):
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or not ours: then it is made again
        return None


def _summary(report):
    counts = ", ".join(f"{n} {status}" for status, n in report["counts"].items())
    reasons = Counter(s["reason"] for s in report["study"].values() if s["status"] == STOOD_IN)
    lines = [f"{report['studies']} studies in {report['seconds']:.0f} s: {counts}"]
    lines += [f"  prior for {n}: {reason}" for reason, n in reasons.most_common(5)]
    if len(reasons) > 5:
        lines.append(f"  and {len(reasons) - 5} more reasons, in {report['report']}")
    boxes = Counter(b for s in report["study"].values() for b in s.get("boxes_from", ()) if b)
    if boxes:
        lines.append(f"  YOLO finds no box of {boxes['mask']} of {boxes.total()} vertebrae: the label map's cut the crops")
    return "\n".join(lines)
