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
from cspine_submission import reading, submit
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
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "bundle.json").write_text("{}")
    return folder


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
    "missing": (None, "no folder for it in"),
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
    assert "ModuleNotFoundError" in report["study"]["1.2"]["reason"]
    assert len(answers(tmp_path / "s.csv")[0]) == 8


def test_the_time_for_the_whole_run(tmp_path, fake_reader):
    for i in range(4):
        make(tmp_path / "scans" / f"1.{i}", hu=500, seconds=1)
    report = submit(tmp_path / "scans", out=tmp_path / "s.csv", pipeline=FakePipeline(), workers=1, budget=2.5)
    done = [s["status"] for s in report["study"].values()]
    assert done[0] == "predicted" and done[-1] == "prior"
    assert "were over" in report["study"]["1.3"]["reason"]


def test_volumes_are_read_ahead_but_not_all_at_once(tmp_path, fake_reader):
    folders = [tmp_path / f"1.{i}" for i in range(6)]
    for f in folders:
        make(f)
    asked = []

    def ask():
        for f in folders:
            asked.append(f)
            yield f

    volumes = reading.read_ahead(ask(), 2, 60)
    got = [next(volumes)]
    assert len(asked) == 3  # the one that we have and two more
    got += volumes
    assert [v.uid for v, _ in got] == [f.name for f in folders]


def test_reading_overlaps_with_predicting(tmp_path, fake_reader):
    for i in range(4):
        make(tmp_path / "scans" / f"1.{i}", seconds=0.5)

    class Slow(FakePipeline):
        def predict(self, volume):
            time.sleep(0.5)
            return super().predict(volume)

    report = submit(tmp_path / "scans", out=tmp_path / "s.csv", pipeline=Slow(), workers=1)
    waited = sum(s["seconds"]["read"] for s in report["study"].values())
    assert report["seconds"] < waited + 4 * 0.5  # less than one after the other


def test_a_reader_that_dies_idle_is_replaced(tmp_path, fake_reader):
    make(tmp_path / "1.2")
    r = reading.Reader()
    r.read(tmp_path / "1.2", 60)
    r.process.kill()
    r.process.wait()
    assert r.read(tmp_path / "1.2", 60).uid == "1.2"
    r.close()
    r.close()


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
        make(data / "test_images" / f"1.{i}", hu=100 * i, **({"predict": "kill the run"} if i == 2 else {}))
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
    assert not out.exists() and not list(tmp_path.glob(".s.csv*"))
    shutil.rmtree(data / "test_images/1.2")
    make(data / "test_images/1.2", hu=200)
    second = subprocess.run([sys.executable, path], env=env, capture_output=True, text=True)
    assert second.returncode == 0 and "reusing 2 of 4 studies" in second.stdout, second
    assert answers(out)[1]["1.2_C7"] == pytest.approx(0.2)


def test_no_reader_is_left_behind(tmp_path, fake_reader, monkeypatch):
    for i, seconds in enumerate([0, 30, 30]):
        make(tmp_path / f"1.{i}", seconds=seconds)
    started, start = [], reading.Reader._start

    def spy(self):
        start(self)
        started.append(self.process)

    monkeypatch.setattr(reading.Reader, "_start", spy)
    volumes = reading.read_ahead([tmp_path / f"1.{i}" for i in range(3)], 2, 60)
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


def test_the_real_reader_and_pipeline(tmp_path, capsys):
    """Phantoms, and a one-slice study of something else; weights at random."""
    bundle = random_bundle(tmp_path / "bundle")
    scans = phantom(tmp_path / "data", train=0, test=2, size=96, seed=31, workers=1) / "test_images"
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
    random_bundle(bundle, seed=1)
    assert submit(scans, bundle=bundle, out=tmp_path / "s.csv", device="cpu")["reused"] == 0
    with pytest.raises(CspineError):
        submit(scans, bundle=tmp_path / "nowhere", out=tmp_path / "s2.csv")
    assert not (tmp_path / "s2.csv").exists()


@pytest.mark.parametrize("wrong, says", [
    ({"timeout": 0}, "timeout and budget are seconds"),
    ({"out": "."}, "is a folder"),
    ({"data": "nowhere"}, "is not a folder"),
])
def test_usage_errors_come_before_any_work(tmp_path, wrong, says):
    make(tmp_path / "scans/1.2")
    pipeline = FakePipeline()
    with pytest.raises(CspineError, match=says):
        submit(**{"data": tmp_path / "scans", "out": tmp_path / "s.csv", "pipeline": pipeline} | wrong)
    assert pipeline.seen == []


@pytest.mark.parametrize("out, why", [("scans/1.2/1.dcm/s.csv", "Not a directory"), ("x" * 300 + ".csv", "File name too long")])
def test_a_place_where_nothing_can_be_written(tmp_path, out, why):
    make(tmp_path / "scans/1.2")
    pipeline = FakePipeline()
    with pytest.raises(CspineError, match=f"{tmp_path / out} cannot be written .{why}.: name a CSV in a folder that you can write to"):
        submit(tmp_path / "scans", out=tmp_path / out, pipeline=pipeline)
    assert pipeline.seen == []


def test_a_disk_that_is_full_at_the_end_is_said_and_the_next_run_goes_on(tmp_path, fake_reader, bundle, monkeypatch):
    make(tmp_path / "scans/1.2", hu=500)
    out, fsync = tmp_path / "s.csv", os.fsync

    def full(fd):
        if Path(f"{out}.parts/study_00000.json").exists():
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CspineError, match="s.csv cannot be written .No space left on device."):
        submit(tmp_path / "scans", out=out, pipeline=FakePipeline(bundle))
    monkeypatch.undo()
    assert submit(tmp_path / "scans", out=out, pipeline=FakePipeline(bundle))["reused"] == 1


def test_a_name_that_fits_into_no_csv(tmp_path):
    make(tmp_path / "scans" / os.fsdecode(b"st\xff1"))
    with pytest.raises(CspineError, match="rename the folder"):
        submit(tmp_path / "scans", out=tmp_path / "s.csv", pipeline=FakePipeline())


def test_a_bad_row_is_named_and_leaves_the_old_csv(tmp_path, fake_reader):
    data, out = tmp_path / "data", tmp_path / "s.csv"
    write_test_csv(data, ["1.2", "../../etc"])
    out.write_text("old")
    with pytest.raises(CspineError, match="line 10: StudyInstanceUID: '../../etc' is not"):
        submit(data, out=out, pipeline=FakePipeline())
    assert out.read_text() == "old"


def test_importing_the_runner_does_not_load_torch():
    code = "import cspine_submission, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


def test_the_total_of_what_yolo_did_not_find(tmp_path, fake_reader, capsys):
    data = tmp_path / "data"
    for i in (1, 2, 3):
        make(data / "test_images" / f"1.2.{i}", hu=100 * i)
    write_test_csv(data, ["1.2.1", "1.2.2", "1.2.3"])

    class Sees(FakePipeline):
        def predict(self, volume):
            p = super().predict(volume)
            p.boxes_from = ("yolo", "mask", "mask", "yolo", "yolo", "yolo", "") if volume.uid != "1.2.3" else ("",) * 7
            return p

    sees = Sees()
    sees.bundle = SimpleNamespace(path=tmp_path, prior=None, detection=["a network"])
    report = submit(data, out=tmp_path / "s.csv", pipeline=sees)
    assert report["study"]["1.2.1"]["boxes_from"] == ["yolo", "mask", "mask", "yolo", "yolo", "yolo", ""]
    assert "YOLO finds no box of 4 of 12 vertebrae" in capsys.readouterr().out
    submit(data, out=tmp_path / "t.csv", pipeline=FakePipeline())
    assert "YOLO" not in capsys.readouterr().out
