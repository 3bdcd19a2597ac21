"""Before an upload: is everything there, and will it be done in time?"""

import os
import shutil
import time
from pathlib import Path

from cspine.dicom import study_files
from cspine.presets import TARGETS
from cspine.rsna import find_studies, test_rows
from cspine_submission import clock as times
from cspine_submission.child import Failed
from cspine_submission.local import Local
from cspine_submission.predicting import STOOD_IN
from cspine_submission.runner import EFFORTS, _named

KEPT_MB = 0.3  # that a study leaves on the disk, with a picture


def dry_run(
    data,  # as of `submit`
    bundle=None,
    out="submission.csv",
    device=None,
    workers=None,
    time_limit=None,
    timeout=600,
    pipeline=None,
):  # dict: problems (list of sentences), seconds for one study and for all, and what was found
    """Check data, disk, device and bundle, predict one study from end to end, and say how long all of them will take."""
    start, data, out, problems = time.monotonic(), Path(data), Path(out), []
    limit = None if time_limit is None else times.seconds(time_limit)
    bundle = _named(bundle) if pipeline is None else bundle
    bad, twice = {}, {}
    rows, folders = test_rows(data, bad), find_studies(data, "test", twice)
    uids = list(dict.fromkeys(rows["StudyInstanceUID"]))
    there = [u for u in uids if u in folders]
    print(f"data: {data}: {len(uids)} studies, {len(rows)} rows; {len(uids) - len(there)} of them have no folder", flush=True)
    for what in [*(f"{row}: {w}" for row, w in bad.items()), *(f"{u}: {w}" for u, w in twice.items())][:5]:
        print(f"  odd: {what}")
    if not there:
        problems.append(f"no study of {data} has a folder in test_images")
    need = KEPT_MB * len(uids) / 1e3
    near = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(near).free / 1e9
    writable = os.access(near, os.W_OK)
    print(f"disk: {out.absolute().parent} has {free:.1f} GB free, about {need:.2f} GB are needed", flush=True)
    if free < need or not writable:
        problems.append(f"{near} {'cannot be written to' if not writable else f'has {free:.2f} GB free, and {need:.2f} GB are needed'}: name another --out")
    found = {"problems": problems, "studies": len(uids), "seconds_each": None, "seconds_all": None}
    if there:
        found |= _one(data, folders, there, bundle, device, pipeline, workers, timeout, problems)
    if found["seconds_all"]:
        within = "" if limit is None else f", of {times.clock(limit)}: " + _step(found, limit)
        print(f"time: {found['seconds_each']:.1f} s a study, {found['predictors']} at once: about {times.clock(found['seconds_all'])} for all{within}", flush=True)
    for p in problems:
        print(f"PROBLEM: {p}")
    print(f"dry run: {'ready' if not problems else f'{len(problems)} problems'}, in {time.monotonic() - start:.0f} s; nothing was written", flush=True)
    return found


def _one(data, folders, there, bundle, device, pipeline, workers, timeout, problems):
    """Predict the study of the median number of files, from a sample, and scale what it took."""
    sample = there[:: max(1, len(there) // 15)]
    sizes = {u: _size(folders[u]) for u in sample}
    uid = sorted(sizes, key=sizes.get)[len(sizes) // 2]
    work, clock = Local(bundle, device, pipeline, workers, timeout, times.Clock()), times.Clock()
    out = {"seconds_all": None, "seconds_each": None}
    try:
        began = time.monotonic()
        facts = work.start()
        ready = time.monotonic() - began
        print(f"device: {facts['device']}{'; ' + facts['note'] if facts['note'] else ''}\nbundle: {bundle or 'an object'}, folds {' + '.join(f'{n:g}' for n in facts['folds'])}, ready in {ready:.1f} s", flush=True)
        ask = {"evidence": False, "picture": None, "labels": None}
        results = list(work.results([uid], folders, lambda u: ask, dict.fromkeys(TARGETS, 0.5)))
    except Failed as e:
        problems.append(f"the bundle cannot be used: {e}")
        return out
    finally:
        work.close()
    [(_, study)] = results or [(uid, {"failed": "no answer", "seconds": {}})]
    if "failed" in study or study["status"] == STOOD_IN:
        problems.append(f"study {uid} could not be predicted: {study.get('failed', study.get('reason'))}")
        return out
    seconds = study["seconds"]
    p = study["probabilities"]["patient_overall"]
    print(f"study {uid}: {study['status']}, patient_overall {p:.3f}; " + ", ".join(f"{k} {s:.2f} s" for k, s in seconds.items()), flush=True)
    devices = facts["devices"] if facts["device"] != "cpu" else ["cpu"] * work.many
    at_once = max(1, len(devices))
    clock.at_once, clock.folds = at_once, facts["folds"]
    steps = {k: s for k, s in seconds.items() if k not in ("read", "predict")}
    clock.add(0, seconds["predict"], steps)
    return {"seconds_each": seconds["predict"], "seconds_all": ready + clock.each(0) * len(there) / at_once, "predictors": at_once, "each": [clock.each(e) for e in range(facts["efforts"])], "ready": ready}


def _step(found, limit):
    reserve = times.Clock(limit).reserve
    for effort, each in enumerate(found["each"]):
        if found["ready"] + each * found["studies"] / found["predictors"] <= limit - reserve:
            return "in time" if not effort else f"in time with a step down to {EFFORTS[effort]}"
    share = (limit - reserve - found["ready"]) / max(found["each"][-1] * found["studies"] / found["predictors"], 1e-9)
    return f"too short: about {max(share, 0):.0%} of the studies will be answered, the others get the prior"


def _size(folder):
    try:
        return len(study_files(folder))
    except OSError:
        return 0


