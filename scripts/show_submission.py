"""The submission put to the test: 200 phantoms, 20 of them broken in 20 ways, killed, short of time, and beside a plain loop.

    python scripts/show_submission.py broken DATA          # break 20 studies of DATA, made by `cspine phantom DATA --train 0 --test 200`
    python scripts/show_submission.py killed DATA OUT      # one run, and one that is killed ten times: the same bytes?
    python scripts/show_submission.py times DATA OUT       # limits too short by a factor of 2, 5 and 20
    python scripts/show_submission.py speed DATA OUT [N]   # studies per hour: this, and a plain loop
"""
import csv
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.uid import JPEG2000Lossless, ExplicitVRLittleEndian, MPEG2MPML


def slices(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def edit(folder, change, keep=None):
    """Write each slice anew, changed."""
    for path in slices(folder)[:keep]:
        ds = dcmread(path, force=True)
        change(ds)
        ds.save_as(path)
    for path in slices(folder)[keep:] if keep else ():
        path.unlink()


def only(folder, name, content):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / name).write_bytes(content)


def cut(folder):
    for p in slices(folder):
        p.write_bytes(p.read_bytes()[: p.stat().st_size // 3])


def noise(folder):
    rng = np.random.default_rng(0)
    for p in slices(folder):
        p.write_bytes(rng.bytes(2000))


def syntax(folder, uid):
    """Say that the pixels are stored otherwise than they are: the file's own bytes, with another UID of the same length."""
    for path in slices(folder):
        ds = dcmread(path)
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.save_as(path)
        new, head = str(uid).encode(), path.read_bytes()
        i = head.index(b"\x02\x00\x10\x00UI") + 8   # tag, kind, two bytes of length
        length = struct.unpack("<H", head[i - 2 : i])[0]
        body = head[i + length :]
        new += b"\0" * (len(new) % 2)
        size = struct.unpack("<I", head[140:144])[0] + len(new) - length
        path.write_bytes(head[:140] + struct.pack("<I", size) + head[144 : i - 2] + struct.pack("<H", len(new)) + new + body)


def tags(**kw):
    def change(ds):
        for k, v in kw.items():
            if v is None and k in ds:
                del ds[k]
            elif v is not None:
                setattr(ds, k, v)
    return change


def dangling(folder):
    for p in slices(folder):
        p.unlink()
        p.symlink_to("/nowhere")


def frozen(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    os.mkfifo(folder / "1.dcm")  # whoever opens it waits for ever


BROKEN = {
    "no folder": shutil.rmtree,
    "an empty folder": lambda f: (shutil.rmtree(f), f.mkdir()),
    "a text named .dcm": lambda f: only(f, "1.dcm", b"This is not a slice.\n" * 99),
    "cut off": cut,
    "noise": noise,
    "empty files": lambda f: [p.write_bytes(b"") for p in slices(f)],
    "links to nowhere": dangling,
    "a pipe that never ends": frozen,
    "MR": lambda f: edit(f, tags(Modality="MR", SOPClassUID="1.2.840.10008.5.1.4.1.1.4")),
    "a scout": lambda f: edit(f, tags(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), keep=1),
    "no pixels": lambda f: edit(f, lambda ds: ds.pop("PixelData", None)),
    "a film as transfer syntax": lambda f: syntax(f, MPEG2MPML),
    "raw pixels called JPEG 2000": lambda f: syntax(f, JPEG2000Lossless),
    "no rows": lambda f: edit(f, tags(Rows=0)),
    "more rows than pixels": lambda f: edit(f, tags(Rows=60000, Columns=60000)),
    "colour": lambda f: edit(f, tags(SamplesPerPixel=3, PhotometricInterpretation="RGB", BitsAllocated=8, BitsStored=8, HighBit=7)),
    "a dose report": lambda f: edit(f, lambda ds: (ds.pop("PixelData", None), tags(Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67", Rows=None, Columns=None)(ds)), keep=1),
    "a damaged NIfTI": lambda f: only(f, "scan.nii.gz", b"\x1f\x8b" + b"x" * 500),
    "a NIfTI header alone": lambda f: only(f, "scan.nii", struct.pack("<i", 348) + bytes(344)),
    "a zip": lambda f: only(f, "study.zip", b"PK\x03\x04" + bytes(200)),
}


def plainly_stored(folder):
    """Are its slices uncompressed files, so that they can be changed without a codec?"""
    first = slices(folder)[0] if folder.is_dir() else None
    return first is not None and not dcmread(first, force=True, stop_before_pixels=True).file_meta.TransferSyntaxUID.is_compressed


def broken(data):
    """Break a study in each way, spread over the data set; notes which in broken.json."""
    images = data / "test_images"
    uids = sorted(p.name for p in images.iterdir())
    step, done = len(uids) // len(BROKEN), {}
    for i, (name, break_it) in enumerate(BROKEN.items()):
        uid = next(u for u in uids[i * step :] if plainly_stored(images / u))
        break_it(images / uid)
        done[uid] = name
    (data / "broken.json").write_text(json.dumps(done, indent=1))
    print(f"{len(done)} of {len(uids)} studies broken")


def command(data, out, *more):
    return [sys.executable, "-m", "cspine.cli", "submit", "--data", str(data), "--out", str(out), *map(str, more)]


def check(data, out):
    """Is the CSV complete and valid, row for row? Its text."""
    wanted = [r["row_id"] for r in csv.DictReader(open(data / "test.csv", encoding="utf-8-sig"))]
    with open(out, newline="") as f:
        rows = list(csv.reader(f))
    assert rows[0] == ["row_id", "fractured"] and [r for r, _ in rows[1:]] == wanted, "rows"
    assert all(0 <= float(p) <= 1 for _, p in rows[1:]), "numbers"
    return out.read_bytes()


def memory_mb(pid):
    """Of a process and all below it, in MB."""
    total, todo = 0, [pid]
    while todo:
        p = todo.pop()
        try:
            todo += map(int, Path(f"/proc/{p}/task/{p}/children").read_text().split())
            total += sum(int(line.split()[1]) for line in Path(f"/proc/{p}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:")) / 1024
        except (OSError, IndexError, ValueError):
            continue
    return total


def watched(argv, log):
    """Run to the end; [(s, MB)] and the seconds."""
    start, seen = time.monotonic(), []
    with open(log, "w") as f:
        run = subprocess.Popen(argv, stdout=f, stderr=f)
        while run.poll() is None:
            seen.append((time.monotonic() - start, memory_mb(run.pid)))
            time.sleep(2)
    return seen, time.monotonic() - start, run.returncode


def killed(data, out):
    out.mkdir(parents=True, exist_ok=True)
    seen, took, status = watched(command(data, out / "whole.csv", "--max-failed", 1), out / "whole.log")
    whole = check(data, out / "whole.csv")
    report = json.loads((out / "whole_report.json").read_text())
    print(f"one run: {took:.0f} s, exit status {status}, {report['counts']}, {report['predictors']} predictors")
    if (data / "broken.json").exists():
        for uid, name in json.loads((data / "broken.json").read_text()).items():
            s = report["study"][uid]
            print(f"  {name:28} {s['status']:18} {s['reason']}")
    np.savetxt(out / "memory.csv", seen, delimiter=",", header="s,MB", comments="", fmt="%.1f")
    picture(seen, out / "memory.png")
    rng, stops = random.Random(0), 0
    moments = sorted(rng.uniform(3, took * 0.9) for _ in range(10))
    steps = np.diff([0, *moments])
    first = time.monotonic()
    for wait in steps:
        run = subprocess.Popen(command(data, out / "killed.csv", "--max-failed", 1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(max(wait, 6))
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        check(data, out / "killed.csv")
        stops += 1
        kept = len(list((out / "killed.csv.parts").glob("study_*.json")))
        print(f"  killed after {max(wait, 6):.0f} s: the CSV is complete, {kept} studies are kept", flush=True)
    end = subprocess.run(command(data, out / "killed.csv", "--max-failed", 1), capture_output=True, text=True)
    same = check(data, out / "killed.csv") == whole
    print(f"killed {stops} times and continued, {time.monotonic() - first:.0f} s in all, exit status {end.returncode}: {'the same bytes' if same else 'OTHER BYTES'}")


def picture(seen, path):
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8, 3), layout="constrained")
    ax = fig.subplots()
    ax.plot(*zip(*seen))
    ax.set(xlabel="s", ylabel="MB, all processes", ylim=(0, None), title="memory of a submission")
    fig.savefig(path, dpi=80)


def times(data, out):
    truth = data / "test_truth.csv"
    whole = json.loads((out / "whole_report.json").read_text())["seconds"]
    print(f"without a limit: {whole:.0f} s")
    for factor in (2, 5, 20):
        csv_path, start = out / f"limit{factor}.csv", time.monotonic()
        done = subprocess.run(command(data, csv_path, "--truth", truth, "--time-limit", f"{whole / factor:.0f}", "--max-failed", 1), capture_output=True, text=True)
        took = time.monotonic() - start
        check(data, csv_path)
        report = json.loads((out / f"limit{factor}_report.json").read_text())
        score = [line for line in done.stdout.splitlines() if line.startswith("score")]
        print(f"limit {whole / factor:.0f} s (a factor of {factor}): {took:.0f} s, {report['counts']}, {report['efforts']}\n  {score[0] if score else done.stderr[-300:]}")


def plain(data, uids):
    """A plain loop over the same networks: pydicom, one study after the other, a batch of one, float32."""
    import torch

    from cspine import classification, cropping, engine, segmentation
    from cspine.bundle import default_bundle, load_bundle
    from cspine.dicom import Volume
    from cspine.segmentation import predict_labels

    bundle = load_bundle(default_bundle())
    assert not any(hasattr(m, "engine") for m in bundle.networks) and engine
    segmentation.fast_dtype = lambda device: None  # float32 where the CPU has bfloat16, too
    for uid in uids:
        ds = sorted((dcmread(p) for p in slices(data / "test_images" / uid)), key=lambda d: -float(d.ImagePositionPatient[2]))
        hu = np.stack([d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in ds]).astype(np.int16)
        dz = abs(float(ds[0].ImagePositionPatient[2]) - float(ds[1].ImagePositionPatient[2]))
        affine = np.diag([-dz, *map(float, ds[0].PixelSpacing), 1.0])[[2, 1, 0, 3]]
        volume = Volume(hu, affine, uid)
        with torch.inference_mode():
            labels = predict_labels(bundle.segmentation, bundle.preset.segmentation, volume)
            boxes, cls = cropping.boxes_from_labels(labels), bundle.preset.classification
            crops, present = cropping.crop_vertebrae(volume, boxes, cls, labels)
            classification.predict_probabilities(bundle.classification, cls, cropping.crop_planes(crops, None, cls), present, evidence=True)


def speed(data, out, n):
    """On straight, even studies alone: the plain loop can read no others."""
    from cspine.dicom import read_series

    uids = []
    for p in sorted((data / "test_images").iterdir()):
        if len(uids) < n and p.is_dir() and len(slices(p)) > 1 and plainly_stored(p) and not read_series(p).notes:
            uids.append(p.name)
    some = out / "some"
    shutil.rmtree(some, ignore_errors=True)
    (some / "test_images").mkdir(parents=True)
    for u in uids:
        (some / "test_images" / u).symlink_to((data / "test_images" / u).absolute())
    for f in out.glob("speed*"):
        shutil.rmtree(f) if f.is_dir() else f.unlink()
    start = time.monotonic()
    subprocess.run(command(some / "test_images", out / "speed.csv"), check=True, capture_output=True)
    ours = time.monotonic() - start
    start = time.monotonic()
    subprocess.run([sys.executable, __file__, "plain", str(some), *uids], check=True)
    loop = time.monotonic() - start
    report = json.loads((out / "speed_report.json").read_text())
    print(f"{len(uids)} studies: {3600 * len(uids) / ours:.0f} an hour ({ours:.0f} s), a plain loop {3600 * len(uids) / loop:.0f} ({loop:.0f} s): {loop / ours:.2f} times")
    print("seconds by step, of all predictors:", report["seconds_by_step"])


if __name__ == "__main__":
    what, data, *more = sys.argv[1:]
    if what == "broken":
        broken(Path(data))
    elif what == "plain":
        plain(Path(data), more)
    elif what == "speed":
        speed(Path(data), Path(more[0]), int((more + [12])[1]))
    else:
        {"killed": killed, "times": times}[what](Path(data), Path(more[0]))
