"""Ray's workers on this machine: one is killed in the middle, nothing is lost, and CSV and crops are the same.

All of it happens in a process of its own: Ray leaves threads and signal handlers in the one that it was begun in.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cspine.presets import TARGETS, CspineError

HERE = Path(__file__).parent


def cases(folder):
    """With Ray and without: a submission, one of whose workers is killed, and crops; what came of it goes into done.json.

    One worker makes the crops, since each imports torch.
    """
    import ray
    from cspine.crops import crop_data_set
    from cspine.phantom import phantom
    from cspine_submission import predicting, reading, submit

    predicting.PIPELINE, reading.READER = "fake_study:pipeline", "fake_study:read"
    make, folder, said = importlib.import_module("fake_study").make, Path(folder), {}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    bundle = folder / "bundle"
    bundle.mkdir()
    (bundle / "bundle.json").write_text(json.dumps({"prior": dict.fromkeys(TARGETS, 0.25)}))
    for i in range(6):
        what = {"kill parent": str(folder / "killed")} if i == 3 else {"read": "error"} if i == 4 else {}
        make(folder / "scans" / f"1.{i}", hu=100 * i, **what)
    report = submit(folder / "scans", out=folder / "ray.csv", bundle=bundle, engine="ray", time_limit=300)
    said |= {"killed": (folder / "killed").exists(), "counts": report["counts"], "reason": report["study"]["1.4"]["reason"]}
    submit(folder / "scans", out=folder / "local.csv", bundle=bundle)
    data = phantom(folder / "data", train=2, test=0, size=64, seed=5, workers=1, odd=0)
    for engine in ("local", "ray"):
        made = crop_data_set(data, None, folder / engine, masks=True, engine=engine, workers=1)
        said[engine] = len(made)
    (folder / "done.json").write_text(json.dumps(said))
    ray.shutdown()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    folder = tmp_path_factory.mktemp("cluster")
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", f"from test_cluster import cases; cases({str(folder)!r})"], env=env, capture_output=True, text=True)
    assert (folder / "done.json").exists(), done.stderr[-3000:]
    return folder, json.loads((folder / "done.json").read_text())


def test_a_killed_worker_costs_nothing(cluster):
    folder, said = cluster
    assert said["killed"] and said["counts"] == {"predicted": 5, "prior": 1} and said["reason"] == "slice 3 is torn"
    assert (folder / "ray.csv").read_bytes() == (folder / "local.csv").read_bytes()


def test_a_time_limit_holds_there_too(tmp_path, monkeypatch):
    """Ray's part is played here: a worker that does not answer in time, and goes on when nobody waits any more."""
    from cspine_submission import on_ray, predicting, reading, submit
    monkeypatch.setattr(predicting, "PIPELINE", "fake_study:pipeline")
    monkeypatch.setattr(reading, "READER", "fake_study:read")
    monkeypatch.setattr(on_ray, "cluster_size", lambda: (1, 0))
    answers, ended, over = [], threading.Event(), threading.Event()

    def one_by_one(make, args, items):
        work = make(*args)
        for item in items:
            answers.append(work(item))
            if len(answers) > 1 and not ended.wait(10):
                return
            yield answers[-1]
        over.set()

    monkeypatch.setattr(on_ray, "map_on_ray", one_by_one)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "bundle.json").write_text(json.dumps({"prior": dict.fromkeys(TARGETS, 0.25)}))
    for i in range(4):
        importlib.import_module("fake_study").make(tmp_path / "scans" / f"1.{i}", hu=100 * i, **{"seconds": 60} if i == 1 else {})
    report = submit(tmp_path / "scans", out=tmp_path / "late.csv", bundle=bundle, engine="ray", time_limit=4)
    ended.set()
    assert report["counts"] == {"predicted": 1, "prior": 3} and report["reasons"] == {"the time limit was reached before its turn": 3}
    assert len((tmp_path / "late.csv").read_text().splitlines()) == 1 + 4 * 8
    assert over.wait(10)
    reasons = [study.get("failed") for _, study in answers]
    assert reasons[0] is None and reasons[1].startswith("reading took more than") and reasons[2:] == ["the time limit was reached before its turn"] * 2


def test_crops_are_the_same(cluster):
    folder, said = cluster
    local, ray = ({p.name: p.read_bytes() for p in (folder / engine / "studies").iterdir()} for engine in ("local", "ray"))
    assert said["local"] == said["ray"] == 2 and local == ray


def test_an_engine_that_is_none(tmp_path):
    from cspine.crops import crop_data_set
    with pytest.raises(CspineError, match="no engine 'abacus'"):
        crop_data_set(tmp_path, None, tmp_path / "c", masks=True, engine="abacus")


def test_no_cluster_is_said(monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    from cspine.cluster import connect

    def init(**kw): raise ConnectionError("could not connect to\n127.0.0.1:1")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(CspineError, match="no Ray cluster to work on .could not connect to 127.0.0.1:1.; look at RAY_ADDRESS"):
        connect()
