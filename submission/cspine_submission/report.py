"""What a run did, as a dict for submission_report.json and in a few lines."""

from collections import Counter

from cspine.presets import TARGETS
from cspine_submission import clock as times
from cspine_submission.predicting import STOOD_IN
from cspine_submission.reasons import alike

SHIFTED = 0.01, 0.15  # of a Kolmogorov-Smirnov test: p below the first and distance above the second is said


def report_of(run, data, bundle, max_failed, time_limit):
    """The report of a run: its totals, its alarm, and each study."""
    studies = {uid: run.studies[uid] for uid in dict.fromkeys(run.rows["StudyInstanceUID"])}
    failed = [s for s in studies.values() if s["status"] == STOOD_IN and s.get("ours")]
    stood_in = [s for s in studies.values() if s["status"] == STOOD_IN]
    seconds = Counter()
    for s in studies.values():
        if not s.get("reused"):
            seconds.update(s.get("seconds", {}))
    return {
        "path": str(run.out),
        "report": str(run.out.with_name(f"{run.out.stem}_report.json")),
        "data": str(data),
        "bundle": None if bundle is None else str(bundle),
        "rows": len(run.rows),
        "rows_odd": run.bad,
        "studies": len(studies),
        "counts": dict(Counter(s["status"] for s in studies.values())),
        "reasons": dict(Counter(alike(s["reason"]) for s in stood_in).most_common()),
        "alarm": bool(failed) and (len(failed) == len(studies) or len(failed) > max_failed * len(studies)),
        "failed": len(failed),
        "stopped": run.stopped is not None,
        "device": run.facts.get("device"),
        "device_note": run.facts.get("note", ""),
        "predictors": run.clock.at_once if run.facts else 0,
        "time_limit": None if time_limit is None else times.seconds(time_limit),
        "efforts": dict(Counter(s.get("effort", "full") for s in studies.values() if s["status"] != STOOD_IN)),
        "reused": run.reused,
        "seconds": round(run.clock.now() - run.clock.start, 2),
        "seconds_by_step": {k: round(v, 1) for k, v in seconds.items()},
        "probabilities": _histograms(studies, run.facts.get("expected")),
        "pictured": run.pictured(),
        "study": studies,
    }


def _histograms(studies, expected):
    """Per target: how many answers lie in each tenth, and the share that was expected there; what is shifted, in words."""
    from scipy.stats import ks_2samp

    out = {}
    for t in TARGETS:
        p = [s["probabilities"][t] for s in studies.values() if s["status"] != STOOD_IN]
        out[t] = {"counts": _tenths(p), "expected": None, "shifted": ""}
        if not expected or not expected[t]:
            continue
        out[t]["expected"] = [round(n / len(expected[t]), 4) for n in _tenths(expected[t])]
        if len(p) >= 8:
            test = ks_2samp(p, expected[t])
            if test.pvalue < SHIFTED[0] and test.statistic > SHIFTED[1]:
                mean, usual = sum(p) / len(p), sum(expected[t]) / len(expected[t])
                out[t]["shifted"] = f"{t}: the answers are {'higher' if mean > usual else 'lower'} than out of fold (mean {mean:.2f}, there {usual:.2f}): are these scans like those it was trained on?"
    return out


def _tenths(p):
    counts = [0] * 10
    for x in p:
        counts[min(int(x * 10), 9)] += 1
    return counts


def said(report):
    """The report in a few lines."""
    counts = ", ".join(f"{n} {status}" for status, n in report["counts"].items())
    per_hour = (report["studies"] - report["reused"]) / max(report["seconds"], 1e-9) * 3600
    lines = [f"{report['studies']} studies in {report['seconds']:.0f} s ({per_hour:.0f} an hour): {counts}"]
    if report["device_note"]:
        lines.insert(0, report["device_note"])
    reasons = list(report["reasons"].items())
    lines += [f"  prior for {n}: {reason}" for reason, n in reasons[:5]]
    if len(reasons) > 5:
        lines.append(f"  and {len(reasons) - 5} more reasons, in {report['report']}")
    if set(report["efforts"]) - {"full"}:
        lines.append("  to be in time, some were answered with less: " + ", ".join(f"{n} {e}" for e, n in report["efforts"].items()))
    if report["rows_odd"]:
        row, what = next(iter(report["rows_odd"].items()))
        lines.append(f"  {len(report['rows_odd'])} rows of test.csv are odd, and answered all the same: {row}: {what}")
    boxes = Counter(b for s in report["study"].values() for b in s.get("boxes_from", ()) if b)
    if boxes:
        lines.append(f"  YOLO finds no box of {boxes['mask']} of {boxes.total()} vertebrae: the label map's cut the crops")
    lines += [f"  {h['shifted']}" for h in report["probabilities"].values() if h["shifted"]]
    if report["alarm"]:
        lines.append(f"ALARM: {report['failed']} of {report['studies']} studies got the prior for a reason that is not theirs; mend it before you submit this")
    return "\n".join(lines)


