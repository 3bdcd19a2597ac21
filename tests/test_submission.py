"""The runner: every row once, in order, whatever a study does."""

import csv
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from cspine.bundle import random_bundle
from cspine.dicom import write_series
from cspine.phantom import phantom
from cspine.presets import TARGETS, CspineError
from cspine.rsna import PRIOR
from cspine.segmentation import fast_dtype
from cspine_submission import child, dry_run, local, predicting, reading, submit
from cspine_submission.clock import Clock, seconds
from cspine_submission.reasons import alike
from pydicom.data import get_testdata_file

sys.path.insert(0, str(Path(__file__).parent))  # for the reader processes as well
fake_study = importlib.import_module("fake_study")
FakePipeline, make = fake_study.FakePipeline, fake_study.make
REPORT = "s_report.json"   # named like the CSV, so that another submission beside it keeps its own


@pytest.fixture
def fake_reader(monkeypatch):
    monkeypatch.setattr(reading, "READER", "fake_study:read")


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


def make_bundle(folder):
    folder.mkdir()
    (folder / "bundle.json").write_text(json.dumps({"prior": dict.fromkeys(TARGETS, 0.25)}))
    return folder


@pytest.fixture
def processes(monkeypatch, fake_reader, bundle):
    """Predictor processes with the pipeline of fake_study; two of them."""
    monkeypatch.setattr(predicting, "PIPELINE", "fake_study:pipeline")
    monkeypatch.setattr(local, "_cores", lambda: 2)
    return bundle


def write_test_csv(data, uids, kinds=TARGETS, shuffle=False, columns=("row_id", "StudyInstanceUID", "prediction_type"), **kw):
    rows = [{"row_id": f"{u}_{k}", "StudyInstanceUID": u, "prediction_type": k, "note": "x"} for u in uids for k in kinds]
    if shuffle:
        random.Random(0).shuffle(rows)
    data.mkdir(exist_ok=True)
    with open(data / "test.csv", "w", newline="", **kw) as f:
        out = csv.DictWriter(f, columns, extrasaction="ignore")
        out.writeheader()
        out.writerows(rows)
    return [r["row_id"] for r in rows]


def answers(path):
    """The CSV read without any of our code."""
    with open(path, newline="") as f:
        lines = list(csv.reader(f))
    assert lines[0] == ["row_id", "fractured"]
    assert all(0 <= float(p) <= 1 for _, p in lines[1:])
    return [r for r, _ in lines[1:]], {r: float(p) for r, p in lines[1:]}


def test_every_row_once_in_the_files_order(tmp_path, fake_reader):
    data = tmp_path / "data"
    for i in range(1, 6):
        make(data / "test_images" / f"1.2.{i}", hu=100 * i)
    columns = ["note", "prediction_type", "StudyInstanceUID", "row_id"]
    rows = write_test_csv(data, [f"1.2.{i}" for i in (3, 1, 5, 2, 4)], shuffle=True, columns=columns, encoding="utf-8-sig")
    report = submit(data, out=tmp_path / "new" / "s.csv", pipeline=FakePipeline())
    order, p = answers(tmp_path / "new" / "s.csv")
    assert order == rows
    assert all(p[r] == pytest.approx(int(r.split("_")[0][-1]) / 10) for r in rows)
    assert report["rows"] == 40 and report["counts"] == {"predicted": 5}
    assert report == json.loads((tmp_path / "new" / REPORT).read_text())
    assert report["study"]["1.2.1"]["notes"] == ["a note of the reader", "a note of the pipeline"]
    assert report["study"]["1.2.1"]["reason"] == "a note of the reader"


def test_a_few_rows_of_a_study_are_enough(tmp_path, fake_reader):
    data = tmp_path / "data"
    make(data / "test_images/1.2", hu=300)
    make(data / "test_images/9.9", hu=300)  # there, but nobody asks for it
    rows = write_test_csv(data, ["1.2"], kinds=["C5", "C1"])
    pipeline = FakePipeline()
    submit(data, out=tmp_path / "s.csv", pipeline=pipeline)
    assert answers(tmp_path / "s.csv")[0] == rows
    assert pipeline.seen == ["1.2"]


def test_a_folder_of_study_folders(tmp_path, fake_reader):
    for name in ("patient b", "1.2.3"):
        make(tmp_path / "scans" / name, hu=500)
    submit(tmp_path / "scans", out=tmp_path / "s.csv", pipeline=FakePipeline())
    assert answers(tmp_path / "s.csv")[0] == [f"{u}_{t}" for u in ("1.2.3", "patient b") for t in TARGETS]


def test_a_submission_may_lie_beside_its_studies(tmp_path, fake_reader, bundle):
    """What the first run leaves there is no study of the second one, which reuses it."""
    for name in ("1.2", "1.3"):
        make(tmp_path / name, hu=500)
    for reused in (0, 2):
        report = submit(tmp_path, out=tmp_path / "s.csv", pipeline=FakePipeline(bundle_outside(bundle)))
        assert (report["rows"], report["reused"]) == (16, reused)


def bundle_outside(bundle):
    moved = bundle.parent.with_name(bundle.parent.name + "_bundle")
    return moved if moved.exists() else bundle.rename(moved)


FAILURES = {
    "missing": (None, "no folder for it in test_images"),
    "crash": ({"read": "crash"}, "died (killed by SIGSEGV"),
    "exit": ({"read": "exit"}, "died (exit code 3"),
    "error": ({"read": "error"}, "slice 3 is torn"),
    "memory in the reader": ({"read": "memory"}, "MemoryError"),
    "slow reader": ({"seconds": 60}, "reading took more than 5 s"),
    "slow network": ({"predict": "hang"}, "predicting took more than 5 s"),
    "exception": ({"predict": "error"}, "RuntimeError: shapes do not match (fake_study.py:"),
    "SystemExit": ({"predict": "exit"}, "SystemExit: 1"),
    "memory": ({"predict": "memory"}, "MemoryError"),
    "nan": ({"predict": "nan"}, "no probability: C4 = nan"),
    "above 1": ({"predict": "above"}, "no probability: C4 = 1.01"),
    "a target lacks": ({"predict": "incomplete"}, "KeyError: 'C7'"),
}


def test_what_fails_gets_the_prior_and_a_reason(tmp_path, fake_reader, bundle):
    data, uids = tmp_path / "data", [f"1.2.{i}" for i in range(1, len(FAILURES) + 1)]
    for uid, (what, _) in zip(uids, FAILURES.values()):
        if what is not None:
            make(data / "test_images" / uid, hu=900, **what)
    sound = ["1.3.1", "1.3.2"]
    for uid, what in zip(sound, [{}, {"predict": "memory once"}]):
        make(data / "test_images" / uid, hu=900, **what)
    make(data / "test_images/1.4", hu=640, predict="no spine")
    rows = write_test_csv(data, [*uids, *sound, "1.4"], shuffle=True)
    report = submit(data, out=tmp_path / "s.csv", pipeline=FakePipeline(bundle), timeout=5, workers=2)
    order, p = answers(tmp_path / "s.csv")
    assert order == rows
    for uid, (name, (_, reason)) in zip(uids, FAILURES.items()):
        study = report["study"][uid]
        assert study["status"] == "prior" and reason in study["reason"], (name, study)
        assert all(p[f"{uid}_{t}"] == 0.25 for t in TARGETS), name  # the prior of the bundle
    for uid in sound:
        assert report["study"][uid]["status"] == "predicted" and p[f"{uid}_C1"] == pytest.approx(0.9)
    assert report["study"]["1.4"]["status"] == "no cervical spine"
    assert report["study"]["1.4"]["reason"] == "no bone of the neck's shape"
    assert report["counts"] == {"prior": len(FAILURES), "predicted": 2, "no cervical spine": 1}
    assert report["seconds"] < 55  # nobody waited for the 60 s of the two that hang


def test_nothing_can_be_read_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "READER", "no_such_module:read")
    make(tmp_path / "scans/1.2")
    report = submit(tmp_path / "scans", out=tmp_path / "s.csv", pipeline=FakePipeline())
    assert "ModuleNotFoundError" in report["study"]["1.2"]["reason"] and report["alarm"]
    assert len(answers(tmp_path / "s.csv")[0]) == 8


def test_volumes_are_read_ahead_but_not_all_at_once(tmp_path, fake_reader):
    folders = [tmp_path / f"1.{i}" for i in range(6)]
    for f in folders:
        make(f)
    asked = []

    def ask():
        for f in folders:
            asked.append(f)
            yield f.name, f

    volumes = reading.read_ahead(ask(), reading.readers(2), 60)
    got = [next(volumes)]
    assert len(asked) == 2
    got += volumes
    assert sorted(key for key, _, _ in got) == [f.name for f in folders] and all(v.uid == key for key, v, _ in got)


def test_a_study_that_hangs_holds_up_no_other(tmp_path, fake_reader):
    for i in range(4):
        make(tmp_path / f"1.{i}", seconds=3 if i == 0 else 0)
    order = [key for key, _, _ in reading.read_ahead([(f"1.{i}", tmp_path / f"1.{i}") for i in range(4)], reading.readers(2), 60)]
    assert order[-1] == "1.0"


def test_reading_overlaps_with_predicting(tmp_path, fake_reader):
    for i in range(4):
        make(tmp_path / "scans" / f"1.{i}", seconds=0.5)

    class Slow(FakePipeline):
        def predict(self, volume, **options):
            time.sleep(0.5)
            return super().predict(volume, **options)

    report = submit(tmp_path / "scans", out=tmp_path / "s.csv", pipeline=Slow(), workers=1)
    waited = sum(s["seconds"]["read"] for s in report["study"].values())
    assert report["seconds"] < waited + 4 * 0.5  # less than one after the other


def test_a_reader_that_dies_idle_is_replaced(tmp_path, fake_reader):
    make(tmp_path / "1.2")
    r = child.Child("cspine_submission.reading:reader", reading.READER, doing="reading")
    r.ask(tmp_path / "1.2", 60)
    r.process.kill()
    r.process.wait()
    assert r.ask(tmp_path / "1.2", 60).uid == "1.2"
    r.close()
    r.close()


def test_a_process_whose_run_is_gone_ends_by_itself(tmp_path):
    """Also in the middle of a study: nobody is left who would kill it."""
    make(tmp_path / "1.2", seconds=60)
    script = f"""
import os, threading, time
from cspine_submission import child
r = child.Child("cspine_submission.reading:reader", "fake_study:read")
r.start()
threading.Thread(target=r.ask, args=({str(tmp_path / "1.2")!r}, 60), daemon=True).start()
time.sleep(1)
print(r.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    env = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *filter(None, sys.path)])}
    pid = int(subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True).stdout)
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it went on")


def test_a_second_run_reuses_what_still_fits(tmp_path, fake_reader, bundle, capsys, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "s.csv"
    for i in range(3):
        make(data / "test_images" / f"1.{i}", hu=100 * i)
    write_test_csv(data, ["1.0", "1.1", "1.2", "1.3"])  # 1.3 is missing

    def run(**kw):
        pipeline = FakePipeline(bundle)
        report = submit(data, out=out, pipeline=pipeline, **kw)
        return pipeline.seen, report, capsys.readouterr().out

    seen, _, said = run()
    assert seen == ["1.0", "1.1", "1.2"] and "reusing" not in said
    first = out.read_text()
    out.unlink()
    seen, report, said = run()
    assert seen == [] and report["reused"] == 3 and "reusing 3 of 4 studies" in said
    assert out.read_text() == first and report["study"]["1.1"]["reused"]

    shutil.move(data, data.with_name("moved"))  # the same files under another path are the same study
    pipeline = FakePipeline(bundle)
    submit(data.with_name("moved"), out=out, pipeline=pipeline)
    assert pipeline.seen == []
    shutil.move(data.with_name("moved"), data)
    make(data / "test_images/1.3", hu=300)  # the study that failed is tried again
    assert run()[0] == ["1.3"]
    shutil.rmtree(data / "test_images/1.1")
    make(data / "test_images/1.1", hu=777)  # a study whose files changed too
    seen, report, _ = run()
    assert seen == ["1.1"] and answers(out)[1]["1.1_C1"] == pytest.approx(0.777)
    (tmp_path / "s.csv.parts/study_00002.json").write_text('{"uid": "1.')  # torn
    assert run()[0] == ["1.2"]
    (data / "test_images/1.0/series").mkdir()
    (data / "test_images/1.0/1.dcm").rename(data / "test_images/1.0/series/1.dcm")
    monkeypatch.setattr(reading, "READER", "fake_study:read_below")
    assert run()[0] == ["1.0"] and run()[0] == []
    (data / "test_images/1.0/series/1.dcm").write_text('{"hu": 12}')  # as well where the slices lie in a subfolder
    assert run()[0] == ["1.0"]
    monkeypatch.setattr(reading, "READER", "fake_study:read")
    (data / "test_images/1.0/series/1.dcm").rename(data / "test_images/1.0/1.dcm")
    run()
    assert len(run(resume=False)[0]) == 4
    (bundle / "bundle.json").write_text('{"other": 1}')
    seen, _, said = run()
    assert len(seen) == 4 and "not reusing 4 studies" in said
    write_test_csv(data, ["1.2", "1.0", "1.1", "1.3"])
    assert len(run()[0]) == 4
    assert run()[0] == []


def test_a_killed_run_goes_on(tmp_path, bundle):
    data, out = tmp_path / "data", tmp_path / "s.csv"
    for i in range(4):
        make(data / "test_images" / f"1.{i}", hu=100 * i, **({"predict": "kill the run", "work": 1} if i == 2 else {}))
    write_test_csv(data, [f"1.{i}" for i in range(4)])
    script = textwrap.dedent(f"""
        from cspine_submission import reading, submit
        from fake_study import FakePipeline
        from pathlib import Path
        reading.READER = "fake_study:read"
        submit({str(data)!r}, out={str(out)!r}, pipeline=FakePipeline(Path({str(bundle)!r})), workers=1)
    """)  # no main guard: the reader processes must not need one
    path = tmp_path / "run.py"
    path.write_text(script)
    env = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *filter(None, sys.path)])}
    first = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert len(answers(out)[0]) == 32 and not list(tmp_path.glob(".s.csv*"))  # complete, whenever the run is killed
    shutil.rmtree(data / "test_images/1.2")
    make(data / "test_images/1.2", hu=200)
    assert answers(out)[1]["1.1_C1"] in (pytest.approx(0.1), 0.25)
    second = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True)
    assert second.returncode == 0 and "reusing 2 of 4 studies" in second.stdout, second
    assert answers(out)[1]["1.2_C7"] == pytest.approx(0.2)


def test_no_reader_is_left_behind(tmp_path, fake_reader, monkeypatch):
    for i, wait in enumerate([0, 30, 30]):
        make(tmp_path / f"1.{i}", seconds=wait)
    started, start = [], subprocess.Popen

    def spy(*args, **kw):
        started.append(start(*args, **kw))
        return started[-1]

    monkeypatch.setattr(child.subprocess, "Popen", spy)
    volumes = reading.read_ahead([(i, tmp_path / f"1.{i}") for i in range(3)], reading.readers(2), 60)
    next(volumes)
    while len(started) < 2:
        time.sleep(0.05)
    began = time.monotonic()
    volumes.close()  # as at Ctrl-C
    assert time.monotonic() - began < 5 and all(p.poll() is not None for p in started)


def test_empty_text_and_cut_off(tmp_path):
    """The real reader: all rows are there, and three reasons."""
    data, images = tmp_path / "data", tmp_path / "data" / "test_images"
    hu = np.random.default_rng(0).normal(0, 300, (6, 64, 64)).astype(np.int16)
    affine = np.array([[0, 0, 0.5, 0], [0, 0.5, 0, 0], [-1.0, 0, 0, 0], [0, 0, 0, 1]])
    for uid in ("1.2.1", "1.2.4"):
        write_series(hu, affine, images / uid, uid=uid)
    (images / "1.2.2").mkdir()
    (images / "1.2.3").mkdir()
    (images / "1.2.3" / "1.dcm").write_text("This is not a slice.\n" * 50)
    for path in (images / "1.2.4").iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    rows = write_test_csv(data, ["1.2.4", "1.2.3", "1.2.2", "1.2.1"])

    class Half:
        def predict(self, volume):
            assert np.array_equal(volume.hu, hu)  # only the sound study comes this far
            return SimpleNamespace(
                probabilities=pd.Series(0.5, index=TARGETS), notes=volume.notes, cervical_spine=True, reason=""
            )

    report = submit(data, out=tmp_path / "s.csv", pipeline=Half())
    order, p = answers(tmp_path / "s.csv")
    assert order == rows and p["1.2.1_C3"] == 0.5
    reasons = [s["reason"] for u, s in report["study"].items() if u != "1.2.1"]
    assert report["counts"] == {"prior": 3, "predicted": 1} and len(set(reasons)) == 3 and all(reasons), report["study"]
    assert all(p[f"{u}_C7"] == pytest.approx(PRIOR["C7"]) for u in ("1.2.2", "1.2.3", "1.2.4"))


@pytest.fixture
def one_predictor(monkeypatch):
    """As on one core: a second process would load torch and compile the networks as well."""
    monkeypatch.setattr(local, "_cores", lambda: 1)


def test_the_real_reader_and_pipeline(tmp_path, capsys, one_predictor):
    """Phantoms, and a one-slice study of something else; weights at random."""
    bundle = random_bundle(tmp_path / "bundle")
    scans = phantom(tmp_path / "data", train=0, test=2, size=64, seed=31, workers=1) / "test_images"
    (scans / "1.2.3").mkdir()
    shutil.copy(get_testdata_file("CT_small.dcm"), scans / "1.2.3")
    report = submit(scans, bundle=bundle, out=tmp_path / "s.csv", device="cpu", workers=1)
    order, p = answers(tmp_path / "s.csv")
    assert order == [f"{u}_{t}" for u in sorted(path.name for path in scans.iterdir()) for t in TARGETS]
    assert report["counts"].get("prior", 0) == 0 and report["study"]["1.2.3"]["status"] == "no cervical spine"
    assert report["study"]["1.2.3"]["slices"] == 1
    capsys.readouterr()
    again = submit(scans, bundle=bundle, out=tmp_path / "s.csv", device="cpu")
    assert again["reused"] == 3 and answers(tmp_path / "s.csv")[1] == p
    assert "reusing 3 of 3 studies" in capsys.readouterr().out
    with pytest.raises(CspineError):
        submit(scans, bundle=tmp_path / "nowhere", out=tmp_path / "s2.csv")
    assert not (tmp_path / "s2.csv").exists()


@pytest.mark.parametrize("wrong, says", [
    ({"timeout": 0}, "timeout is a number of seconds"),
    ({"time_limit": "soon"}, "'soon' is no time: write 9h"),
    ({"max_failed": 2}, "max_failed is a share"),
    ({"engine": "abacus"}, "no engine 'abacus'"),
    ({"device": "abacus"}, "no device 'abacus': cpu, cuda"),
    ({"out": "."}, "is a folder"),
    ({"data": "nowhere"}, "is not a folder"),
])
def test_usage_errors_come_before_any_work(tmp_path, wrong, says):
    make(tmp_path / "scans/1.2")
    pipeline = FakePipeline()
    with pytest.raises(CspineError, match=says):
        submit(**{"data": tmp_path / "scans", "out": tmp_path / "s.csv", "pipeline": pipeline} | wrong)
    assert pipeline.seen == []


@pytest.mark.parametrize("out, why", [("scans/1.2/1.dcm/s.csv", "(Not a directory|File exists)"), ("x" * 300 + ".csv", "File name too long")])
def test_a_place_where_nothing_can_be_written(tmp_path, out, why):
    make(tmp_path / "scans/1.2")
    pipeline = FakePipeline()
    with pytest.raises(CspineError, match=f"{tmp_path / out} cannot be written .{why}.: name a CSV in a folder that you can write to"):
        submit(tmp_path / "scans", out=tmp_path / out, pipeline=pipeline)
    assert pipeline.seen == []


def test_a_disk_that_is_full_at_the_end_is_said_and_the_next_run_goes_on(tmp_path, fake_reader, bundle, monkeypatch):
    make(tmp_path / "scans/1.2", hu=500)
    out, fsync = tmp_path / "s.csv", os.fsync

    def broken(fd):
        if Path(f"{out}.parts/study_00000.json").exists():
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CspineError, match="s.csv cannot be written .Input/output error."):
        submit(tmp_path / "scans", out=out, pipeline=FakePipeline(bundle))
    assert len(answers(out)[0]) == 8  # the one of constants still stands
    monkeypatch.undo()
    monkeypatch.setattr(reading, "READER", "fake_study:read")
    assert submit(tmp_path / "scans", out=out, pipeline=FakePipeline(bundle))["reused"] == 1


def test_a_disk_that_is_full_from_the_second_file_on(tmp_path, fake_reader, bundle, monkeypatch, capsys):
    """Nothing can be kept, no report can be written, and the submission is complete all the same."""
    for i in (2, 3):
        make(tmp_path / "scans" / f"1.{i}", hu=100 * i)
    made, start = [], tempfile.mkstemp

    def mkstemp(*args, **kw):
        made.append(args)
        if len(made) > 2:  # made_from.json, and the submission of constants
            raise OSError(28, "No space left on device")
        return start(*args, **kw)

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    report = submit(tmp_path / "scans", out=tmp_path / "s.csv", pipeline=FakePipeline(bundle))
    assert answers(tmp_path / "s.csv")[1]["1.2_C1"] == pytest.approx(0.2) and answers(tmp_path / "s.csv")[1]["1.3_C7"] == pytest.approx(0.3)
    assert "not kept for another run: No space left on device" in report["study"]["1.2"]["notes"]
    assert "s_report.json cannot be written (No space left on device)" in capsys.readouterr().err


def test_a_name_that_fits_into_no_csv(tmp_path):
    make(tmp_path / "scans" / os.fsdecode(b"st\xff1"))
    with pytest.raises(CspineError, match="rename the folder"):
        submit(tmp_path / "scans", out=tmp_path / "s.csv", pipeline=FakePipeline())


def test_rows_that_are_no_study_get_the_prior_and_a_reason(tmp_path, fake_reader):
    """Each of them stood in the way of the whole submission once."""
    data, out = tmp_path / "data", tmp_path / "s.csv"
    make(data / "test_images/1.2", hu=300)
    make(tmp_path / "etc", hu=900)  # what ../../etc would lead to
    rows = write_test_csv(data, ["1.2", "../../etc", "a b", "1..2"])
    with open(data / "test.csv", "a") as f:
        f.write("1.2_C9,1.2,C9\nother,1.2,C2\n1.2_C1,1.2,C1\n,1.2,C3\nshort\n")
    pipeline = FakePipeline()
    report = submit(data, out=out, pipeline=pipeline)
    order, p = answers(out)
    assert order == [*rows, "1.2_C9", "other", "", "short"] and pipeline.seen == ["1.2"]
    assert p["1.2_C1"] == p["other"] == pytest.approx(0.3) and p["../../etc_C7"] == pytest.approx(PRIOR["C7"]) and p["1.2_C9"] == 0.5
    assert "is not a StudyInstanceUID" in report["study"]["../../etc"]["reason"] and "is already on line 2" in report["rows_odd"]["1.2_C1"]
    assert len(report["rows_odd"]) == 3 * 8 + 5 and not report["alarm"]


def test_a_study_that_is_there_twice_is_answered(tmp_path, fake_reader):
    make(tmp_path / "data/test_images/1.2", hu=300)
    (tmp_path / "data/test_images/1.2.nii.gz").touch()
    write_test_csv(tmp_path / "data", ["1.2"])
    report = submit(tmp_path / "data", out=tmp_path / "s.csv", pipeline=FakePipeline())
    assert report["study"]["1.2"]["status"] == "predicted" and "it is there twice" in report["study"]["1.2"]["notes"][-1]


def test_importing_the_runner_does_not_load_torch():
    code = "import cspine_submission.dry, cspine_submission.runner, cspine_submission.page, cspine.report, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


def test_the_total_of_what_yolo_did_not_find(tmp_path, fake_reader, capsys):
    data = tmp_path / "data"
    for i in (1, 2, 3):
        make(data / "test_images" / f"1.2.{i}", hu=100 * i)
    write_test_csv(data, ["1.2.1", "1.2.2", "1.2.3"])

    class Sees(FakePipeline):
        def predict(self, volume, **options):
            p = super().predict(volume, **options)
            p.boxes_from = ("yolo", "mask", "mask", "yolo", "yolo", "yolo", "") if volume.uid != "1.2.3" else ("",) * 7
            return p

    sees = Sees()
    sees.bundle = SimpleNamespace(path=tmp_path, prior=None, detection=["a network"])
    report = submit(data, out=tmp_path / "s.csv", pipeline=sees)
    assert report["study"]["1.2.1"]["boxes_from"] == ["yolo", "mask", "mask", "yolo", "yolo", "yolo", ""]
    assert "YOLO finds no box of 4 of 12 vertebrae" in capsys.readouterr().out
    submit(data, out=tmp_path / "t.csv", pipeline=FakePipeline())
    assert "YOLO" not in capsys.readouterr().out


def submit_here(tmp_path, bundle, **kw):
    return submit(tmp_path / "scans", out=tmp_path / "s.csv", bundle=bundle, **kw)


def scans(tmp_path, **studies):
    for name, what in studies.items():
        make(tmp_path / "scans" / name[1:].replace("_", "."), hu=500, **what)


def test_predictors_may_crash_hang_and_break(tmp_path, processes):
    """Each costs its own study, or none where a second try succeeds."""
    once = {k: str(tmp_path / k) for k in ("crash", "killed", "gpu")}
    scans(tmp_path, _1_1=dict(predict="crash"), _1_2=dict(predict="crash", marker=once["crash"]), _1_3=dict(predict="hang"),
          _1_4=dict(predict="out of memory killer", marker=once["killed"]), _1_5=dict(predict="gpu"), _1_6=dict(predict="gpu", marker=once["gpu"]), _1_7={}, _1_8={})
    report = submit_here(tmp_path, processes, timeout=4)
    said = {u[-1]: (s["status"], s["reason"]) for u, s in report["study"].items()}
    assert said["1"][0] == "prior" and "died (killed by SIGSEGV" in said["1"][1]
    assert said["3"] == ("prior", "predicting took more than 4 s and was stopped")
    assert said["5"][0] == "prior" and "CUDA error: an illegal memory access" in said["5"][1]
    assert all(said[k][0] == "predicted" for k in "24678"), said
    assert len(answers(tmp_path / "s.csv")[0]) == 64 and report["counts"] == {"prior": 3, "predicted": 5}


def test_where_memory_is_short_fewer_are_predicted_at_once(tmp_path, processes, monkeypatch):
    monkeypatch.setattr(local, "_memory_gb", lambda: 100)
    scans(tmp_path, **{f"_1_{i}": dict(work=0.3) for i in range(1, 7)} | {"_1_0": dict(predict="out of memory killer", marker=str(tmp_path / "once"))})
    report = submit_here(tmp_path, processes)
    assert report["counts"] == {"predicted": 7} and report["predictors"] == 1
    scans(tmp_path, _1_9=dict(predict="out of memory killer"))
    report = submit_here(tmp_path, processes)
    assert report["counts"] == {"predicted": 7, "prior": 1} and "SIGKILL" in report["study"]["1.9"]["reason"]


def test_one_predictor_per_gpu_and_the_cpu_where_a_gpu_stays_broken(tmp_path, monkeypatch, processes):
    gpus = make_bundle(tmp_path / "gpus")
    scans(tmp_path, **{f"_1_{i}": dict(work=0.4) for i in range(6)})
    report = submit_here(tmp_path, gpus)
    assert {s["device"] for s in report["study"].values()} == {"cuda:0", "cuda:1"} and report["predictors"] == 2
    assert len({s["pid"] for s in report["study"].values()}) == 2


def test_a_bundle_that_cannot_be_loaded_is_an_alarm(tmp_path, processes, capsys):
    scans(tmp_path, _1_1={}, _1_2={})
    report = submit_here(tmp_path, make_bundle(tmp_path / "broken"))
    assert report["alarm"] and report["counts"] == {"prior": 2} and report["reasons"] == {"the weights are not the file that was bundled": 2}
    assert len(answers(tmp_path / "s.csv")[0]) == 16 and "ALARM: 2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("failed, share, alarm", [(1, 0.5, False), (2, 0.5, False), (3, 0.5, True), (1, 0.2, True), (3, 1, False), (4, 1, True)])
def test_the_alarm_counts_what_is_ours(tmp_path, fake_reader, failed, share, alarm):
    for i in range(4):
        make(tmp_path / "data/test_images" / f"1.{i}", hu=500, **({"predict": "error"} if i < failed else {}))
    report = submit(tmp_path / "data" / "test_images", out=tmp_path / "s.csv", pipeline=FakePipeline(), max_failed=share)
    assert report["alarm"] == alarm and report["failed"] == failed


def test_unreadable_studies_are_no_alarm(tmp_path, fake_reader):
    for i in range(3):
        make(tmp_path / "scans" / f"1.{i}", read="error")
    assert not submit(tmp_path / "scans", out=tmp_path / "s.csv", pipeline=FakePipeline())["alarm"]


def test_the_clock_steps_down_in_order_and_then_gives_the_prior(tmp_path, fake_reader):
    for i in range(40):
        make(tmp_path / "scans" / f"1.{i:02d}", hu=500, work=0.2)
    report = submit(tmp_path / "scans", out=tmp_path / "s.csv", pipeline=FakePipeline(), time_limit=9)
    assert report["seconds"] < 9
    efforts = [s.get("effort", "full") for s in report["study"].values() if s["status"] == "predicted"]
    assert efforts[0] == "full" and set(efforts) > {"full"} and report["efforts"] == {e: efforts.count(e) for e in efforts}
    assert len(answers(tmp_path / "s.csv")[0]) == 320
    report = submit(tmp_path / "scans", out=tmp_path / "t.csv", pipeline=FakePipeline(), time_limit=1.5)
    late = [s for s in report["study"].values() if s["status"] == "prior"]
    assert late and late[-1]["reason"] == "the time limit was reached before its turn" and not report["alarm"]


@pytest.mark.parametrize("text, s", [("9h", 32400), ("8h30m", 30600), ("45m", 2700), ("90s", 90), ("3600", 3600), (12.5, 12.5), ("1H 2M 3S", 3723)])
def test_times(text, s):
    assert seconds(text) == s


@pytest.mark.parametrize("text", ["", "h", "9 hours", "-3", "0", "30m8h", "nan", "inf", None, "1d"])
def test_what_is_no_time(text):
    with pytest.raises(CspineError, match="is no time"):
        seconds(text)


def test_the_clock_by_hand():
    at = [0.0]
    c = Clock(1000, now=lambda: at[0])
    c.folds, c.at_once = (2, 4), 2
    assert c.effort(100) == 0 and c.end(100, 0) is None  # nothing is known yet
    c.add(0, 20, {"labels": 8, "probabilities": 8})
    assert [c.each(e) for e in range(4)] == [20, 16, 4 + 4 + 1, 4 + 2 + 1]
    assert c.reserve == 50 and [c.effort(n) for n in (94, 96, 118, 120, 210, 212, 270, 1000)] == [0, 1, 1, 2, 2, 3, 3, 3]
    c.add(1, 10, {"labels": 5, "probabilities": 2})
    assert c.each(1) == 10 and c.each(0) == 20  # measured from here on
    at[0] = 900
    assert c.effort(2) == 0 and c.effort(8) == 1 and c.end(8, 1) == 40 and c.end(1000, 1) == 100


def test_stopped_by_sigterm_it_writes_what_it_knows(tmp_path, processes):
    scans(tmp_path, _1_1={}, _1_2=dict(predict="hang"))
    script = f"""
from pathlib import Path
from cspine_submission import predicting, reading, submit
predicting.PIPELINE, reading.READER = "fake_study:pipeline", "fake_study:read"
submit({str(tmp_path / "scans")!r}, out={str(tmp_path / "s.csv")!r}, bundle={str(processes)!r})
"""
    env = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *filter(None, sys.path)])}
    run = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "s.csv.parts/study_00000.json").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.terminate()
    out, err = run.communicate()
    assert run.returncode == 143, (out, err)
    p = answers(tmp_path / "s.csv")[1]
    assert p["1.1_C1"] == pytest.approx(0.5) and p["1.2_C1"] == 0.25
    report = json.loads((tmp_path / REPORT).read_text())
    assert report["stopped"] and report["study"]["1.2"]["reason"] == "the run was stopped before its turn"


def test_reasons_that_are_alike():
    assert alike("no file in /data/test_images/1.2.3 could be read") == alike("no file in /other/4.5.6 could be read")
    assert alike("17.dcm is torn at byte 512") == alike("3.dcm is torn at byte 9")
    assert alike("study 1.2.826.0.1 has 3 slices") == "study UID has N slices"
    assert alike("C4 = nan") != alike("C5 = nan")


def test_a_dry_run_writes_nothing_and_says_how_long_it_will_take(tmp_path, processes, capsys):
    scans(tmp_path, **{f"_1_{i}": dict(work=0.2) for i in range(5)})
    before = sorted(tmp_path.rglob("*"))
    found = dry_run(tmp_path / "scans", bundle=processes, out=tmp_path / "s.csv", time_limit="9h")
    said = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before and found["problems"] == [] and 0.2 < found["seconds_each"] < 5
    assert "5 studies, 40 rows; 0 of them have no folder" in said and "in time" in said and "dry run: ready" in said
    dry_run(tmp_path / "scans", bundle=processes, out=tmp_path / "s.csv", time_limit="0.5s")
    assert "get the prior" in capsys.readouterr().out


def test_a_dry_run_names_what_is_wrong(tmp_path, processes, capsys):
    scans(tmp_path, _1_1=dict(predict="error"))
    assert "shapes do not match" in dry_run(tmp_path / "scans", bundle=processes)["problems"][0]
    assert "the weights are not the file" in dry_run(tmp_path / "scans", bundle=make_bundle(tmp_path / "broken"))["problems"][0]
    assert dry_run(tmp_path / "scans", bundle=processes, out="/proc/s.csv")["problems"]
    write_test_csv(tmp_path / "data", ["1.2"])
    (tmp_path / "data/test_images").mkdir()
    assert "has a folder in test_images" in dry_run(tmp_path / "data", bundle=processes)["problems"][0]
    assert "PROBLEM" in capsys.readouterr().out


def test_a_gpu_that_cannot_compute_is_said_first(tmp_path, fake_reader, capsys):
    make(tmp_path / "scans/1.2", hu=500)
    pipeline = FakePipeline()
    pipeline.device_note = "Tesla P100 cannot compute here: choose the accelerator GPU T4 x2"
    report = submit(tmp_path / "scans", out=tmp_path / "s.csv", pipeline=pipeline)
    assert report["device_note"] == pipeline.device_note and pipeline.device_note in capsys.readouterr().out


def test_who_is_pictured(tmp_path, fake_reader):
    """The likeliest fractures; where the truth is known half of them, and those answered worst."""
    uids = [f"1.{i}" for i in range(5)]
    for uid, hu in zip(uids, (900, 800, 700, 600, 100)):
        make(tmp_path / "data/test_images" / uid, hu=hu)
    write_test_csv(tmp_path / "data", uids)
    truth = pd.DataFrame(1, pd.Index(uids, name="StudyInstanceUID"), TARGETS)
    truth.loc["1.3"] = 0
    truth.to_csv(tmp_path / "truth.csv")
    def pictured(**kw): return submit(tmp_path / "data", out=tmp_path / "s.csv", pipeline=FakePipeline(), **kw)["pictured"]
    assert pictured(pictures=3) == uids[:3] and pictured() == []
    assert pictured(pictures=3, truth=tmp_path / "truth.csv") == ["1.0", "1.1", "1.4"]
    assert pictured(pictures=1, truth=tmp_path / "truth.csv") == ["1.0"] and sorted(pictured(pictures=9, truth=tmp_path / "truth.csv")) == uids


def test_answers_unlike_those_out_of_fold_are_said():
    from cspine_submission.report import _histograms
    rng = np.random.default_rng(0)
    expected = {t: list(rng.beta(1, 4, 300)) for t in TARGETS}
    studies = {str(i): {"status": "predicted", "probabilities": {t: p if t != "C7" else 1 - p for t in TARGETS}} for i, p in enumerate(rng.beta(1, 4, 60))}
    found = _histograms(studies, expected)
    assert [t for t in TARGETS if found[t]["shifted"]] == ["C7"] and "higher than out of fold" in found["C7"]["shifted"]
    assert sum(found["C1"]["counts"]) == 60 and sum(found["C1"]["expected"]) == pytest.approx(1, abs=0.01)
    assert _histograms(studies, None)["C1"]["expected"] is None


def test_what_an_earlier_run_left_out_is_asked_for_again(tmp_path, one_predictor):
    """Label maps and evidence of studies that are known without; and the engine's cache lies beside the run."""
    bundle = random_bundle(tmp_path / "bundle")
    scans = phantom(tmp_path / "data", train=0, test=1, size=64, seed=31, workers=1, odd=0) / "test_images"
    def run(**kw): return submit(scans, bundle=bundle, out=tmp_path / "s.csv", device="cpu", **kw)
    assert run()["reused"] == 0
    report = run(labels=tmp_path / "labels")
    [study] = report["study"].values()
    assert report["reused"] == 0 and Path(study["labels"]).parent == tmp_path / "labels" and not [n for n in study["notes"] if "could not be made" in n]
    assert run(labels=tmp_path / "labels")["reused"] == 1
    assert bool(list((tmp_path / "s.csv.parts").glob("engine/*.xml"))) == (fast_dtype("cpu") is None)  # a CPU with bfloat16 is as fast without an engine


def test_a_gpu_that_fails_one_study_is_tried_again_with_the_next(tmp_path, processes, monkeypatch):
    """The first answers on the CPU what kills the GPU twice; a GPU that fails two studies in a row is left alone."""
    gpus = make_bundle(tmp_path / "gpus")
    scans(tmp_path, _1_0=dict(predict="crash on gpu"), **{f"_1_{i}": dict(work=0.6) for i in range(1, 8)})
    report = submit_here(tmp_path, gpus)
    assert report["counts"] == {"predicted": 8}
    assert report["study"]["1.0"]["device"] == "cpu" and "cuda:" in report["study"]["1.0"]["notes"][-1] and "predicted on the CPU" in report["study"]["1.0"]["notes"][-1]
    assert {s["device"] for u, s in report["study"].items() if u != "1.0"} == {"cuda:0", "cuda:1"}
    shutil.rmtree(tmp_path / "scans")
    scans(tmp_path, **{f"_2_{i}": dict(predict="crash on gpu") for i in range(6)})
    report = submit_here(tmp_path, gpus)
    assert report["counts"] == {"predicted": 6} and {s["device"] for s in report["study"].values()} == {"cpu"}
    assert sum("predicted on the CPU" in "".join(s["notes"]) for s in report["study"].values()) <= 4  # two for each GPU


def test_a_study_that_always_crashes_costs_no_gpu(tmp_path, processes):
    scans(tmp_path, _1_0=dict(predict="crash"), **{f"_1_{i}": dict(work=0.6) for i in range(1, 8)})
    report = submit_here(tmp_path, make_bundle(tmp_path / "gpus"))
    assert report["study"]["1.0"]["status"] == "prior" and {s["device"] for u, s in report["study"].items() if u != "1.0"} == {"cuda:0", "cuda:1"}


def test_a_predictor_that_cannot_start_leaves_its_study_to_the_others(tmp_path, processes):
    scans(tmp_path, **{f"_1_{i}": dict(work=0.2) for i in range(5)})
    report = submit_here(tmp_path, make_bundle(tmp_path / "second_fails"))
    assert report["counts"] == {"predicted": 5} and not report["alarm"]


def test_where_the_gpu_has_no_room_for_the_bundle_the_cpu_computes(tmp_path, processes, capsys):
    scans(tmp_path, _1_0={}, _1_1={})
    report = submit_here(tmp_path, make_bundle(tmp_path / "full_gpu"))
    assert report["counts"] == {"predicted": 2} and report["device"] == "cpu" and "the CPU computes instead" in report["device_note"]
    scans(tmp_path, _1_2={})
    report = submit_here(tmp_path, tmp_path / "full_gpu", device="cuda:0")  # who names a device gets that one or a sentence
    assert report["study"]["1.2"]["status"] == "prior" and "out of memory" in report["study"]["1.2"]["reason"]


def test_memory_short_in_all_predictors_at_once_waits_for_nobody(tmp_path, processes, monkeypatch):
    monkeypatch.setattr(local, "_cores", lambda: 3)
    monkeypatch.setattr(local, "_memory_gb", lambda: 100)
    scans(tmp_path, **{f"_1_{i}": dict(predict="out of memory killer", marker=str(tmp_path / str(i)), work=0.5) for i in range(3)} | {f"_1_{i}": {} for i in range(3, 6)})
    start = time.monotonic()
    report = submit_here(tmp_path, processes, timeout=90)
    assert report["counts"] == {"predicted": 6} and report["predictors"] == 1 and time.monotonic() - start < 80


def test_a_pipeline_that_knows_no_efforts(tmp_path):
    """An object of the user's own, with predict(volume) and no more."""
    make(tmp_path / "1.2", hu=500)

    class Own(FakePipeline):
        def predict(self, volume):
            return super().predict(volume)

    study = predicting.answer(Own(), fake_study.read(tmp_path / "1.2"), dict(PRIOR), effort=2, evidence=True)
    assert study["status"] == "predicted" and study["probabilities"]["C1"] == pytest.approx(0.5)


@pytest.mark.parametrize("error, memory", [(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True), (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), True),
                                           (MemoryError(), True), (RuntimeError("shapes do not match"), False)])
def test_what_is_short_of_memory(error, memory):
    assert predicting._out_of_memory(error) == memory


def test_a_terminal_that_is_gone_ends_no_submission(tmp_path, processes):
    scans(tmp_path, **{f"_1_{i}": dict(work=0.6) for i in range(4)})
    code = f"""
from cspine_submission import predicting, reading, submit
predicting.PIPELINE, reading.READER = "fake_study:pipeline", "fake_study:read"
submit({str(tmp_path / "scans")!r}, out={str(tmp_path / "s.csv")!r}, bundle={str(processes)!r})
"""
    env = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *filter(None, sys.path)])}
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, "-c", code], env=env, stdout=full, stderr=full)
    report = json.loads((tmp_path / REPORT).read_text())
    assert report["counts"] == {"predicted": 4} and answers(tmp_path / "s.csv")[1]["1.3_C1"] == pytest.approx(0.5)


def test_no_process_to_be_had_is_ours(tmp_path, processes, monkeypatch):
    scans(tmp_path, _1_0={})
    def none(*args, **kw): raise OSError(28, "No space left on device")
    monkeypatch.setattr(child.tempfile, "TemporaryFile", none)
    report = submit_here(tmp_path, processes)
    assert report["alarm"] and "no process can be started" in report["study"]["1.0"]["reason"] and len(answers(tmp_path / "s.csv")[0]) == 8


def test_a_folder_for_parts_that_cannot_be_made_costs_the_resume(tmp_path, processes):
    scans(tmp_path, _1_0={})
    (tmp_path / "s.csv.parts").write_text("a file where the folder should be")
    report = submit_here(tmp_path, processes)
    assert report["counts"] == {"predicted": 1} and "not kept for another run" in report["study"]["1.0"]["notes"][-1]


def test_stopped_while_a_study_is_read_it_ends_at_once(tmp_path, processes):
    """And leaves nobody behind."""
    scans(tmp_path, _1_0={}, _1_1=dict(seconds=60))
    code = f"""
from cspine_submission import predicting, reading, submit
predicting.PIPELINE, reading.READER = "fake_study:pipeline", "fake_study:read"
submit({str(tmp_path / "scans")!r}, out={str(tmp_path / "s.csv")!r}, bundle={str(processes)!r})
"""
    env = {"PYTHONPATH": ":".join([str(Path(__file__).parent), *filter(None, sys.path)])}
    run = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "s.csv.parts/study_00000.json").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    below = [int(p) for t in Path(f"/proc/{run.pid}/task").iterdir() for p in (t / "children").read_text().split()]
    run.terminate()
    start = time.monotonic()
    run.communicate(timeout=50)
    assert run.returncode == 143 and time.monotonic() - start < 30 and below
    assert not [p for p in below if Path(f"/proc/{p}").exists() and " Z " not in Path(f"/proc/{p}/stat").read_text()]


@pytest.mark.parametrize("content", ['{"prior": [0.5]}', '{"prior": {"C1": "x"}}', "[]", "{"])
def test_a_bundle_with_a_damaged_prior_gives_the_constants(tmp_path, processes, content):
    (processes / "bundle.json").write_text(content)
    scans(tmp_path, _1_0=dict(read="error"))
    submit_here(tmp_path, processes)
    assert answers(tmp_path / "s.csv")[1]["1.0_C7"] == pytest.approx(PRIOR["C7"])


def test_parts_that_are_damaged_are_made_again(tmp_path, processes):
    scans(tmp_path, _1_0={}, _1_1={})
    submit_here(tmp_path, processes)
    good = (tmp_path / "s.csv.parts/study_00001.json").read_text()
    for content in ("{}", "[]", good.replace('"1.1"', '"1.9"'), good.replace('"status"', '"x"')):
        (tmp_path / "s.csv.parts/study_00001.json").write_text(content)
        assert submit_here(tmp_path, processes)["reused"] == 1
    assert submit_here(tmp_path, processes)["reused"] == 2


def test_a_complete_csv_stands_before_the_first_study(tmp_path, fake_reader):
    make(tmp_path / "scans/1.2", hu=500)
    seen = []

    class Looks(FakePipeline):
        def predict(self, volume):
            seen.append(answers(tmp_path / "s.csv")[1]["1.2_C7"])
            return super().predict(volume)

    submit(tmp_path / "scans", out=tmp_path / "s.csv", pipeline=Looks())
    assert seen == [pytest.approx(PRIOR["C7"])] and answers(tmp_path / "s.csv")[1]["1.2_C7"] == pytest.approx(0.5)


def test_new_studies_and_old_ones_that_lack_a_picture(tmp_path, processes):
    """Both in one run: the predictors are asked twice."""
    parts = tmp_path / "s.csv.parts"
    def views():
        return sum(p.read_bytes() == b"seen" for p in parts.glob("*.npz"))
    scans(tmp_path, _1_0={}, _1_1={}, _1_2={})
    submit_here(tmp_path, processes)
    assert not views()
    (parts / "study_00000.json").unlink()  # as if it had not been answered
    report = submit_here(tmp_path, processes, pictures=3, time_limit=60)
    assert report["counts"] == {"predicted": 3} and report["reused"] == 2 and len(report["pictured"]) == views() == 3
    for p in parts.glob("*.npz"):
        p.unlink()
    report = submit_here(tmp_path, processes, pictures=2, time_limit=60)  # nothing is new
    assert report["reused"] == 3 and len(report["pictured"]) == views() == 2
