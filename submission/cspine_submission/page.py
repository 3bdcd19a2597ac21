"""The page of a submission, drawn from what the run kept: nothing is predicted again."""

import json
from pathlib import Path

import pandas as pd

from cspine.presets import TARGETS
from cspine_submission import clock as times
from cspine_submission.parts import view_file
from cspine_submission.predicting import NO_SPINE


def submission_page(
    report,  # of `submit`
    path,  # the .html file to write
    truth=None,  # CSV like train.csv: the score is then shown
):  # the path
    """What the run's report says of each study, pictures of some, the score, and what the run did."""
    from dataclasses import replace

    from cspine.report import Entry, entry_of, report_page
    from cspine.rsna import read_train, score
    from cspine.view import View

    answers, entries, shown = None if truth is None else read_train(truth), [], 0
    pictured = set(report["pictured"])
    card = {} if report["bundle"] is None else json.loads((Path(report["bundle"]) / "bundle.json").read_text(encoding="utf-8")).get("card", {})
    for i, (uid, study) in enumerate(report["study"].items()):
        kept = view_file(report["path"], i)
        known = answers.loc[uid] if answers is not None and uid in answers.index else None
        view = kept.read_bytes() if uid in pictured and kept.is_file() else None
        shown += view is not None
        if view is not None:  # named as the submission names it, whatever its headers say
            entries.append(replace(entry_of(View.from_bytes(view), known), uid=uid, notes=_notes(study)))
        else:
            p = pd.Series({t: study["probabilities"][t] for t in TARGETS})
            entries.append(Entry(uid, p, truth=known, notes=_notes(study), cervical_spine=study["status"] != NO_SPINE))
    worst = "" if answers is None or shown < 2 else " and those answered worst"
    return report_page(
        entries, Path(path), title="Submission", card=card, score=None if truth is None else score(truth, report["path"]), run=run_facts(report),
        lead=f"Pictured: {shown} of {len(report['study'])} studies, those most likely fractured{worst}." if shown else "",
    )


def run_facts(report):
    """What the run did, for the page: lines, reasons, and the histograms of its answers."""
    answered = report["studies"] - report["reused"]
    n = max(answered, 1)
    lines = [
        f"{report['studies']} studies and {report['rows']} rows in {times.clock(report['seconds'])}"
        + (f" (limit {times.clock(report['time_limit'])})" if report["time_limit"] else "") + (f", {report['reused']} of them reused" if report["reused"] else ""),
        ", ".join(f"{k} {status}" for status, k in report["counts"].items()),
    ]
    if report["device"]:
        lines.append(f"{report['predictors']} at once on {report['device']}")
    if report["seconds_by_step"] and answered:
        lines.append("seconds per study: " + ", ".join(f"{step} {s / n:.2f}" for step, s in report["seconds_by_step"].items()))
    if set(report["efforts"]) - {"full"}:
        lines.append("to be in time, answered with: " + ", ".join(f"{effort} {k}" for effort, k in report["efforts"].items()))
    lines += [h["shifted"] for h in report["probabilities"].values() if h["shifted"]]
    lines += [f"odd row {row}: {what}" for row, what in list(report["rows_odd"].items())[:10]]
    warnings = [report["device_note"]] if report["device_note"] else []
    if report["alarm"]:
        warnings.append(f"{report['failed']} of {report['studies']} studies got the prior for a reason that is not theirs: mend it before you submit this")
    return {"lines": lines, "reasons": report["reasons"], "warnings": warnings, "probabilities": report["probabilities"]}


def _notes(study):
    """The reason, unless the notes say it, as those of a study that was read do."""
    told = ("; ".join(study["notes"][: k + 1]) for k in range(len(study["notes"])))
    effort = (f"answered with less, to be in time: {study['effort']}",) if study.get("effort") else ()
    return tuple(filter(None, [*(() if study["reason"] in told else (study["reason"],)), *study["notes"], *effort]))
