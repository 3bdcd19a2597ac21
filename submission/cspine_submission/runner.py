"""A submission: all rows, whatever happens to a study, to the machine or to the run itself."""

import json
import math
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd

from cspine.presets import TARGETS, CspineError, progress
from cspine.rsna import PRIOR, exam_loss, find_studies, read_train, test_rows, write_submission, write_whole
from cspine_submission import clock as times
from cspine_submission.child import Failed
from cspine_submission.local import Local
from cspine_submission.parts import Parts, model_stamp
from cspine_submission.predicting import PREDICTED, STOOD_IN, stand_in
from cspine_submission.reasons import why
from cspine_submission.report import report_of, said

WRITE_EVERY = 2.0  # s between two submissions on disk, at least
EFFORTS = ("full", "no mirror images", "one fold", "coarse stage 1")  # cspine.inference's, which loads torch


def submit(
    data,  # folder with test.csv and test_images/, or a folder of study folders
    bundle=None,  # bundle folder; None: the demo bundle, and a line that says so
    out="submission.csv",  # the CSV; beside it come submission_report.json, named like it, and the folder <out>.parts
    device=None,  # 'cpu', 'cuda', ...; None: every GPU that computes, else the CPU
    workers=None,  # processes that read ahead of the networks; None: by the number of cores
    timeout=600,  # s that reading one study may take, and then predicting it
    time_limit=None,  # for the whole run: s, or '9h', '8h30m', '45m'; None: none
    max_failed=0.5,  # share of the studies that may get the prior for a reason of ours before the report sounds an alarm
    resume=True,  # use what <out>.parts holds from an earlier run; False: begin again
    evidence=False,  # where stage 2 looked, for each study of the report
    pictures=0,  # studies whose views are kept for a page: the likeliest fractures and, if the truth is known, the worst answers
    truth=None,  # CSV like train.csv, for that
    labels=None,  # folder for the label map of each study
    pipeline=None,  # an object with .predict(volume), to use instead of a bundle
    engine="local",  # 'local', or 'ray': on the workers of a Ray cluster
):  # the report, a dict: path, report, rows, studies, counts, alarm, reused, seconds, study (uid -> status, reason, ...)
    """Answer every row of test.csv, once and in its order, whatever happens to a single study."""
    clock = times.Clock(None if time_limit is None else times.seconds(time_limit))
    data, out = Path(data), Path(out)
    if not timeout > 0:
        raise CspineError(f"timeout is a number of seconds, and more than 0, not {timeout}")
    if not 0 <= max_failed <= 1:
        raise CspineError(f"max_failed is a share of the studies, 0 to 1, not {max_failed}")
    if engine not in ("local", "ray"):
        raise CspineError(f"there is no engine {engine!r}: local or ray")
    with _writing(out):
        if out.is_dir():
            raise CspineError(f"{out} is a folder; out takes the CSV file to write")
    if device is not None and not re.fullmatch(r"cpu|mps|xpu|cuda(:\d+)?", str(device)):
        raise CspineError(f"there is no device {device!r}: cpu, cuda, cuda:1 or mps; or leave it out")
    if pipeline is None:
        bundle = _named(bundle)
    bad, twice = {}, {}
    rows = test_rows(data, bad)
    if not len(rows):
        raise CspineError(f"{data / 'test.csv'} has no rows to answer")
    answers = None if truth is None else read_train(truth)
    folders = find_studies(data, "test", twice)
    with _writing(out):
        parts = Parts(out, rows, model_stamp(bundle if pipeline is None else getattr(getattr(pipeline, "bundle", None), "path", None)), resume)
    run = Run(rows, bad, twice, folders, out, parts, clock, answers, pictures, _prior(bundle, pipeline), evidence, labels)
    with _writing(out):
        run.write(now=True)  # complete and valid from here on
    if run.todo or run.blank():
        with _stoppable() as stopped, _engine(engine, bundle, device, pipeline, workers, timeout, clock, parts.folder / "engine") as work:
            run.work(work, evidence, labels)
            run.repicture(work)
        run.stopped = stopped[0] if stopped else None
    run.leave()
    with _writing(out):
        run.write(now=True)
    report = report_of(run, data, bundle if pipeline is None else None, max_failed, time_limit)
    try:
        write_whole(report["report"], json.dumps(report, indent=1, allow_nan=False))
    except (OSError, ValueError, TypeError) as e:  # the submission is there
        tell(f"{report['report']} cannot be written ({getattr(e, 'strerror', None) or e}): {out} is complete without it", sys.stderr)
    tell(said(report))
    if run.stopped:
        raise run.stopped
    return report


class Run:
    """What is known of each row and study so far, and the file that says it."""

    def __init__(self, rows, bad, twice, folders, out, parts, clock, truth, pictures, prior, evidence, labels):
        self.rows, self.folders, self.out, self.parts, self.clock = rows, folders, out, parts, clock
        self.truth, self.pictures, self.facts, self.stopped, self.lost, self.late = truth, pictures, {}, None, "", False
        self.prior, self.written, self.took = prior, -math.inf, 0.0
        wrong = {uid: bad[row] for row, uid in zip(rows["row_id"], rows["StudyInstanceUID"]) if row in bad}
        self.bad, self.twice, self.studies, self.todo = bad, twice, {}, []
        self.losses, self.likely, self.worst = {}, [], []  # of studies with a truth; the highest patient_overall and losses so far
        for uid in dict.fromkeys(rows["StudyInstanceUID"]):
            if uid in folders:
                known = parts.load(uid, folders[uid])
                if known is None or self._less(uid, known, evidence, labels):
                    self.todo.append(uid)
                else:
                    self.studies[uid] = known
                    self._rank(uid)
            else:
                self.answer(uid, {"failed": wrong.get(uid, "no folder for it in test_images")})
        if self.reused:
            tell(f"reusing {self.reused} of {len(self.studies) + len(self.todo)} studies from {parts.folder}")

    def _less(self, uid, known, evidence, labels):
        """Is what an earlier run found less than what is asked for now?"""
        from cspine.labelmaps import labels_file
        return (
            (known.get("effort") and self.clock.limit == math.inf)
            or (labels is not None and not labels_file(labels, uid).is_file())
            or (evidence and known["status"] == PREDICTED and "looked" not in known)
        )

    @property
    def reused(self):
        """How many studies an earlier run has answered."""
        return sum(s.get("reused", False) for s in self.studies.values())

    def answer(self, uid, study):
        """Take in what is known of a study: the prior and the reason, if it `failed`."""
        if "failed" in study:
            study = stand_in(self.prior, study["failed"]) | {k: v for k, v in study.items() if k != "failed"}
        study.pop("steps", None)
        view = study.pop("view", None)
        if uid in self.twice:
            study["notes"] = [*study["notes"], self.twice[uid]]
        study["seconds"] = {step: round(s, 3) for step, s in study.get("seconds", {}).items()}
        if study.get("effort"):
            study["effort"] = EFFORTS[study["effort"]]
        self.studies[uid] = study | {"reused": False}
        self._rank(uid)
        if uid in self.folders:
            self.parts.save(uid, self.folders[uid], self.studies[uid], view)

    def _rank(self, uid):
        study = self.studies[uid]
        if not self.pictures or study["status"] == STOOD_IN:
            return
        self.likely = sorted([*self.likely, study["probabilities"]["patient_overall"]], reverse=True)[: self.pictures]
        if self.truth is not None and uid in self.truth.index:
            self.losses[uid] = exam_loss(self.truth.loc[uid], study["probabilities"])
            self.worst = sorted([*self.worst, self.losses[uid]], reverse=True)[: self.pictures]

    def work(self, engine, evidence, labels):
        """Let the engine answer all that is to do."""
        try:
            self.facts = engine.start()
        except Failed as e:
            self.lost, self.late = str(e), self.clock.time_to_work() <= 1
            tell(f"nothing can be predicted: {self.lost}", sys.stderr)
            return
        self.clock.folds, self.clock.efforts = self.facts["folds"], self.facts["efforts"]
        if not self.todo:
            return
        tell(f"predicting {len(self.todo)} studies on {self.facts['device']}")
        waiting = set(self.todo)
        results = engine.results(self.todo, self.folders, self.question(evidence, labels), self.prior)
        try:
            for uid, study in progress(results, "predicting", total=len(self.todo), more=lambda: self._when(waiting)):
                waiting.discard(uid)
                self.answer(uid, study)
                try:
                    self.write()
                except OSError as e:  # what stands there is complete; it is tried again, and at the end it is an error
                    self.written = time.monotonic()
                    tell(f"{self.out} cannot be renewed for now ({e.strerror})", sys.stderr)
        except Exception as e:  # noqa: BLE001, what is known is written all the same
            self.lost = why(e)
            return
        self.lost = engine.lost

    def leave(self):
        """The prior, and the reason, for what was not answered."""
        late = self.late or self.clock.work_left() <= 0.5
        for uid in self.todo:
            if uid not in self.studies:
                stopped = "the run was stopped before its turn" if self.stopped else ""
                reason = "the time limit was reached before its turn" if late else stopped or self.lost or "no predictor was left"
                self.answer(uid, {"failed": reason, "ours": not late and not stopped})

    def question(self, evidence, labels):
        """What each study is asked, beside its volume: a function of its uid."""
        def asked(uid):
            return {"evidence": evidence, "picture": self._picture(uid), "labels": None if labels is None else (str(labels), uid, self.folders[uid])}
        return asked

    def _picture(self, uid):
        if not self.pictures:
            return None
        known = None if self.truth is None or uid not in self.truth.index else {t: int(self.truth.loc[uid, t]) for t in TARGETS}
        likely, worst = (top[-1] if len(top) == self.pictures else 0.0 for top in (self.likely, self.worst))
        return {"likely": likely, "truth": known, "worst": worst}

    def pictured(self):
        """The uids that a page shows: the likeliest fractures and, where the truth is known, half of them and those answered worst."""
        if not self.pictures:
            return []
        p = {u: s["probabilities"] for u, s in self.studies.items() if s["status"] != STOOD_IN}
        likely = sorted(p, key=lambda u: -p[u]["patient_overall"])
        known = [u for u in likely if self.truth is not None and u in self.truth.index]
        worst = sorted(known, key=lambda u: -self.losses[u])
        first = likely[: self.pictures - self.pictures // 2] if known else likely
        return list(dict.fromkeys([*first, *worst, *likely]))[: self.pictures]

    def blank(self):
        """Pictured studies whose view an earlier run, which made no page, did not keep."""
        return [u for u in self.pictured() if self.studies[u].get("reused") and not self.parts.view(u).is_file()]

    def repicture(self, engine):
        """Predict such studies once more, for their view."""
        blank = self.blank() if self.facts else []
        def asked(uid):
            return {"evidence": False, "picture": {"likely": 0.0, "truth": None, "worst": 0.0}, "labels": None}
        for uid, study in engine.results(blank, self.folders, asked, self.prior) if blank else ():
            if study.get("view") is not None:
                self.parts.save(uid, self.folders[uid], self.studies[uid], study["view"])

    def write(self, now=False):
        """The submission as a whole; not too often, unless `now`."""
        start = time.monotonic()
        if not now and start - self.written < max(WRITE_EVERY, 20 * self.took):
            return
        def row(uid, kind):
            known = self.studies[uid]["probabilities"] if uid in self.studies else self.prior
            return known.get(kind, 0.5)  # 0.5: a row of no kind that we know
        p = [row(u, k) for u, k in zip(self.rows["StudyInstanceUID"], self.rows["prediction_type"])]
        write_submission(pd.DataFrame({"row_id": self.rows["row_id"], "fractured": p}), self.out)
        self.written = time.monotonic()
        self.took = self.written - start

    def _when(self, waiting):
        effort = self.clock.effort(len(waiting))
        left = self.clock.end(len(waiting), effort)
        step = "" if self.clock.limit == math.inf else f", step: {EFFORTS[effort]}"
        return "" if left is None else f"done at {time.strftime('%H:%M', time.localtime(time.time() + left))} (in {times.clock(left)}){step}"


def _named(bundle):
    """The folder of a bundle; what is none is said before anything is written."""
    from cspine.bundle import default_bundle
    folder = Path(default_bundle() if bundle is None else bundle)
    if not (folder / "bundle.json").is_file():
        if bundle is None:
            raise CspineError("this installation has no demo bundle; name one with --bundle, or train one (cspine train, cspine bundle)")
        what = "is not a bundle but a run: make one of both stages with `cspine bundle RUN RUN --out BUNDLE`" if (folder / "run.json").exists() else "is not a bundle: it has no bundle.json"
        raise CspineError(f"{folder} {what}" if folder.is_dir() else f"there is no bundle folder {folder}; check --bundle")
    if bundle is None:
        print("using the demo bundle that comes with cspine, trained on the phantoms of `cspine phantom`: a demonstration, never a diagnosis", file=sys.stderr, flush=True)
    return folder


def _prior(bundle, pipeline):
    """The bundle's answer without evidence, read without loading its networks; the competition's best constant where there is none."""
    if pipeline is not None:
        prior = getattr(getattr(pipeline, "bundle", None), "prior", None)
    else:
        try:
            prior = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["prior"]
        except (OSError, ValueError, KeyError, TypeError):  # who loads the bundle says what is wrong with it
            prior = None
    good = isinstance(prior, (dict, pd.Series)) and all(isinstance(prior.get(t), (int, float)) and 0 < prior[t] < 1 for t in TARGETS)
    return {t: float((prior if good else PRIOR)[t]) for t in TARGETS}


@contextmanager
def _engine(name, bundle, device, pipeline, workers, timeout, clock, cache):
    if name == "ray":
        from cspine_submission.on_ray import OnRay
        work = OnRay(bundle, device, timeout, clock)
    else:
        work = Local(bundle, device, pipeline, workers, timeout, clock, cache)
    try:
        yield work
    finally:
        work.close()


def tell(text, stream=None):
    """Print a line; a terminal that is gone, or a log on a full disk, ends no submission."""
    with suppress(OSError, ValueError):
        print(text, file=stream or sys.stdout, flush=True)


class Stopped(SystemExit):
    """The run was told to end; what was known by then is written."""


@contextmanager
def _stoppable():
    """SIGTERM ends the work as Ctrl-C does, and then all is written; yields a list that gets the exception."""
    stopped = []
    def stop(number, frame):
        raise Stopped(128 + number)
    before = signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None
    try:
        yield stopped
    except (Stopped, KeyboardInterrupt) as e:
        stopped.append(e)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _writing(path):
    """What the system says against a file becomes an error that says which file, and what to do."""
    try:
        yield
    except OSError as e:
        raise CspineError(f"{path} cannot be written ({e.strerror}): name a CSV in a folder that you can write to") from e


