"""Ray's workers on this machine: one is killed in the middle, nothing is lost, and the CSV is the same."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
from cspine.presets import TARGETS, CspineError
from cspine_submission import predicting, reading, submit

sys.path.insert(0, str(Path(__file__).parent))
make = importlib.import_module("fake_study").make


@pytest.fixture(scope="module")
def cluster():
    """Two workers, begun once: that takes longer than what they do here."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    pytest.importorskip("ray.data", reason="the extra ray is not installed")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # for Ray's workers
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.shutdown()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
    monkeypatch.undo()


def test_a_killed_worker_costs_nothing(tmp_path, cluster, monkeypatch):
    monkeypatch.setattr(predicting, "PIPELINE", "fake_study:pipeline")
    monkeypatch.setattr(reading, "READER", "fake_study:read")
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "bundle.json").write_text(json.dumps({"prior": dict.fromkeys(TARGETS, 0.25)}))
    for i in range(6):
        what = {"kill parent": str(tmp_path / "killed")} if i == 3 else {"read": "error"} if i == 4 else {}
        make(tmp_path / "scans" / f"1.{i}", hu=100 * i, **what)
    report = submit(tmp_path / "scans", out=tmp_path / "ray.csv", bundle=bundle, engine="ray")
    assert (tmp_path / "killed").exists() and report["counts"] == {"predicted": 5, "prior": 1}
    assert report["study"]["1.4"]["reason"] == "slice 3 is torn"
    submit(tmp_path / "scans", out=tmp_path / "local.csv", bundle=bundle)
    assert (tmp_path / "ray.csv").read_bytes() == (tmp_path / "local.csv").read_bytes()


def test_no_cluster_is_said(monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    from cspine.cluster import connect

    def init(**kw): raise ConnectionError("could not connect to\n127.0.0.1:1")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(CspineError, match="no Ray cluster to work on .could not connect to 127.0.0.1:1.; look at RAY_ADDRESS"):
        connect()


def test_crops_are_the_same(tmp_path, cluster):
    from cspine.crops import crop_data_set
    from cspine.phantom import phantom
    data = phantom(tmp_path / "data", train=2, test=0, size=64, seed=5, workers=1, odd=0)
    made = [crop_data_set(data, None, tmp_path / engine, masks=True, engine=engine, workers=2) for engine in ("local", "ray")]
    files = [{p.name: p.read_bytes() for p in (c.folder / "studies").iterdir()} for c in made]
    assert len(made[1]) == 2 and files[0] == files[1]
    with pytest.raises(CspineError, match="no engine 'abacus'"):
        crop_data_set(data, None, tmp_path / "c", masks=True, engine="abacus")
