"""Answer one study: in a process of its own with a bundle's pipeline, or here with an object that can predict."""

import ctypes
import gc
import inspect
import math
import os
import queue
import sys
import threading
from cspine.presets import TARGETS
from cspine_submission.child import Child, Failed
from cspine_submission.reasons import why

PREDICTED, NO_SPINE, STOOD_IN = "predicted", "no cervical spine", "prior"
PIPELINE = "cspine_submission.predicting:pipeline"  # what a predictor process makes


def pipeline(bundle, device, threads, cache):
    """What a predictor process says of itself, and what it answers with."""
    from cspine.inference import Pipeline
    from cspine.segmentation import find_devices

    made = Pipeline(bundle, device=device, threads=threads, cache=cache)
    b, devices = made.bundle, find_devices(device)[0]
    if made.device.type != "cpu":  # few predictors share the cores then
        import torch
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // len(devices)))
    expected = getattr(b, "expected", None)
    facts = {
        "device": str(made.device), "note": made.device_note, "devices": [str(d) for d in devices],
        "folds": (len(b.segmentation), sum(len(m.models) for m in b.members if m.weight) / sum(m.weight > 0 for m in b.members)),
        "efforts": made.efforts, "card": b.card, "expected": None if expected is None else {t: list(map(float, expected[t])) for t in TARGETS},
    }
    return facts, lambda question: _trimmed(answer(made, **question))


def _trimmed(study):
    # the C library keeps what each study freed in pieces that the next one does not fit into: 20 MB a study, were it not given back
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return study


class Thread:
    """Answers in a thread of this process, for a pipeline that lives here; a call that hangs is left behind."""

    closed = False

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self._begin()

    def _begin(self):
        # one thread for all calls, since torch keeps much of what it prepared per thread; a daemon, so that a hanging
        # call does not hold up the end of the process
        self.calls, self.answers = queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(target=self._serve, args=(self.pipeline, self.calls, self.answers), daemon=True).start()

    @staticmethod
    def _serve(pipeline, calls, answers):
        while True:
            question = calls.get()
            answers.put(answer(pipeline, **question))
            del question  # a volume, which would stay in memory until the next call

    def start(self, timeout=None):
        """What is known of the pipeline, as a process would tell it."""
        bundle = getattr(self.pipeline, "bundle", None)
        return {
            "device": str(getattr(self.pipeline, "device", "here")), "note": getattr(self.pipeline, "device_note", ""), "devices": [],
            "folds": tuple(len(getattr(bundle, stage, None) or [0]) for stage in ("segmentation", "classification")), "efforts": getattr(self.pipeline, "efforts", 4), "card": getattr(bundle, "card", None) or {}, "expected": None,
        }

    def ask(self, question, timeout):
        """The answer, or Failed if that takes more than `timeout` s."""
        self.calls.put(question)
        try:
            return self.answers.get(timeout=min(timeout, threading.TIMEOUT_MAX))
        except queue.Empty:
            self._begin()
            raise Failed(f"predicting took more than {timeout:.3g} s") from None

    def close(self):
        """A thread cannot be ended; it is a daemon."""


def process(bundle, device, threads, cache=None):
    """A predictor in a process of its own; `cache`: where it keeps what its engine has compiled."""
    return Child(PIPELINE, str(bundle), device, threads, None if cache is None else str(cache), doing="predicting")


def answer(pipeline, volume, prior, effort=0, evidence=False, picture=None, labels=None):
    """A study's part of the report. Never raises: it runs in a thread that all other studies need, too.

    `picture`: the least patient_overall, of a study with a truth (under 'truth') the least loss, for which the page
    wants a view; it comes back as bytes under 'view'. `labels`: (folder, uid, study) of a label map to write.
    """
    try:
        prediction, spared = _predict(pipeline, volume, effort, evidence or (picture is not None and _evidence_is_free(pipeline)))
        p = {t: float(prediction.probabilities[t]) for t in TARGETS}
        odd = [f"{t} = {v}" for t, v in p.items() if not 0 <= v <= 1]  # also true of nan
        if odd:
            return stand_in(prior, f"the pipeline's answer is no probability: {', '.join(odd)}", volume)
        found = bool(prediction.cervical_spine)
        study = {
            "status": PREDICTED if found else NO_SPINE,
            # a study that was read with a repair is answered, but the report says so as plainly as of one that was not
            "reason": "; ".join(map(str, volume.notes)) if found else str(prediction.reason),
            "notes": [*map(str, prediction.notes), *spared],
            "boxes_from": list(prediction.boxes_from) if _has_yolo(pipeline) else [],  # of C1..C7: yolo, mask or nothing
            "slices": int(volume.shape[0]),
            "probabilities": p,
            "steps": {str(k): float(v) for k, v in (getattr(prediction, "seconds", None) or {}).items() if math.isfinite(v)},
        }
        if evidence and getattr(prediction, "looked", None) is not None:
            study["looked"] = [[round(float(v), 1) for v in at] if at[0] == at[0] else None for at in prediction.looked]  # (z, y, x); None: nothing seen
    except BaseException as e:  # noqa: BLE001, a library's SystemExit too
        return stand_in(prior, why(e), volume) | {"memory": _out_of_memory(e), "broken": _broken_device(e)}
    for doing, extra in (("its picture", lambda: _view(pipeline, volume, prediction, picture)), ("its label map", lambda: _write_labels(volume, prediction, labels))):
        try:
            study |= extra() or {}
        except Exception as e:  # noqa: BLE001, the answer stands without them
            study["notes"].append(f"{doing} could not be made: {why(e)}")
    return study


def stand_in(prior, reason, volume=None):
    """The part of the report for a study that got the prior."""
    notes = [] if volume is None else [str(n) for n in volume.notes]
    slices = None if volume is None else int(volume.shape[0])
    return {"status": STOOD_IN, "reason": reason, "notes": notes, "slices": slices, "probabilities": dict(prior), "steps": {}}


def _evidence_is_free(pipeline):
    # cells are looked at in any case; Grad-CAM asks for a second pass, of those studies alone that get a picture
    members = getattr(getattr(pipeline, "bundle", None), "members", [])
    return bool(members) and all(m.preset.head == "cells" for m in members if m.weight)


def _has_yolo(pipeline):
    return bool(getattr(getattr(pipeline, "bundle", None), "detection", None))


def _out_of_memory(error):
    # torch's own kind is known by its name, without torch; a CPU's, cuDNN's and OpenVINO's by what they say
    words = "can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc"
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def _broken_device(error):
    # after an error of the driver nothing that this process asks of the GPU is answered any more
    return type(error).__name__ == "AcceleratorError" or (isinstance(error, RuntimeError) and "CUDA error" in str(error) and "out of memory" not in str(error))


def _predict(pipeline, volume, effort, evidence):
    # only what differs from the usual is said: an object of the user's own need not know it
    options = _taken(pipeline.predict, ({"effort": effort} if effort else {}) | ({"evidence": True} if evidence else {}))
    for attempt in ("as always", "in small pieces", "on the CPU"):
        try:
            if attempt == "in small pieces":
                pipeline.batch = 1
            if attempt != "on the CPU":
                return pipeline.predict(volume, **options), [] if attempt == "as always" else ["the memory did not suffice at first: predicted in small pieces"]
            return _on_cpu(pipeline).predict(volume, **options), ["the GPU's memory did not suffice: predicted on the CPU"]
        except Exception as e:
            if not _out_of_memory(e) or attempt == "on the CPU" or (attempt == "in small pieces" and getattr(getattr(pipeline, "device", None), "type", "cpu") == "cpu"):
                raise
        finally:
            if attempt == "in small pieces":
                pipeline.batch = None
        # the exception is gone here, and with it the frames that held the memory
        gc.collect()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def _taken(function, options):
    try:
        known = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of native code: who knows
        return options
    if any(p.kind == p.VAR_KEYWORD for p in known):
        return options
    return {k: v for k, v in options.items() if k in {p.name for p in known}}


def _on_cpu(pipeline):
    if getattr(pipeline, "cpu", None) is None:
        pipeline.cpu = type(pipeline)(pipeline.bundle.path, device="cpu")
    return pipeline.cpu


def _view(pipeline, volume, prediction, picture):
    """What the page draws of a study, if it may be one of those that it shows."""
    if picture is None:
        return None
    from cspine.rsna import exam_loss
    from cspine.view import view_of

    p, truth = prediction.probabilities, picture["truth"]
    if p["patient_overall"] < picture["likely"] and (truth is None or exam_loss(truth, p) < picture["worst"]):
        return None
    if prediction.heat is None and prediction.cervical_spine:
        prediction = pipeline.explain(volume, prediction)
    return {"view": view_of(volume, prediction).to_bytes()}


def _write_labels(volume, prediction, labels):
    if labels is None:
        return None
    from cspine.labelmaps import write_study_labels

    folder, uid, study = labels
    path, notes = write_study_labels(folder, uid, prediction.labels, volume, study)
    return {"labels": str(path), "label_notes": notes}
