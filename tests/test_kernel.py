"""The submit kernel, top to bottom, where there is no network, over folders laid out like the platform's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from cspine.bundle import random_bundle
from cspine.phantom import phantom
from cspine.presets import TARGETS
from cspine.rsna import read_test

ROOT = Path(__file__).resolve().parents[1]
KERNEL = ROOT / "kaggle" / "submit"
# Jupyter's processes talk over localhost, which a new network namespace has, but switched off
LOCALHOST_UP = """
import fcntl, os, socket, struct, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    fcntl.ioctl(s, 0x8914, struct.pack('16sh14x', b'lo', 1))  # SIOCSIFFLAGS, IFF_UP
os.execv(sys.argv[1], sys.argv[1:])
"""
COMPETITION = "rsna-2022-cervical-spine-fracture-detection"


def sources():
    cells = json.loads((KERNEL / "submit.ipynb").read_text())["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


@pytest.fixture(scope="module")
def offline():
    """The command before a command that takes its network away."""
    for unshare in (["unshare", "-n"], ["unshare", "-rn"]):  # as root, and as anybody where the system allows it
        if subprocess.run([*unshare, "true"], capture_output=True).returncode == 0:
            return [*unshare, sys.executable, "-c", LOCALHOST_UP]
    pytest.fail("this test takes the network away with unshare (util-linux): run it as root, or allow user namespaces")


def execute(offline, folder, **env):
    """Run the notebook as the platform does; returns the process and the executed notebook."""
    done = subprocess.run(
        [*offline, sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", folder / "executed",
         KERNEL / "submit.ipynb"],
        cwd=folder, capture_output=True, text=True,
        env=os.environ | {"KAGGLE_INPUT": str(folder / "input"), "KAGGLE_WORKING": str(folder / "working"),
                          "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "IPYTHONDIR": str(folder / "ipython")} | env,
    )
    path = folder / "executed" / "submit.ipynb"
    return done, json.loads(path.read_text()) if path.exists() else None


def test_there_is_no_network(offline):
    code = "import socket; print(sorted(name for _, name in socket.if_nameindex()))"
    seen = subprocess.run([*offline, sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert seen.strip() == "['lo']"
    code = "import socket; socket.create_connection(('198.51.100.1', 80), timeout=5)"
    done = subprocess.run([*offline, sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "Network is unreachable" in done.stderr


@pytest.mark.parametrize("attached", [False, True], ids=["demo bundle", "attached bundle"])
def test_kernel_runs_offline(offline, tmp_path, attached):
    bundle = tmp_path / "input" / "datasets" / "someone" / "cspine-bundle"
    if attached:
        bundle.parent.mkdir(parents=True)
        random_bundle(bundle)
    data = tmp_path / "input" / "competitions" / COMPETITION
    phantom(data, train=0, test=2, size=128, seed=20221027, workers=1)
    # only what the platform's hidden set is sure to have
    for name in ("train.csv", "train_bounding_boxes.csv", "test_truth.csv"):
        (data / name).unlink(missing_ok=True)
    (tmp_path / "working").mkdir()
    done, notebook = execute(offline, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    csv = pd.read_csv(tmp_path / "working" / "submission.csv")
    assert list(csv.columns) == ["row_id", "fractured"]
    assert csv["row_id"].tolist() == read_test(data / "test.csv")["row_id"].tolist() and len(csv) == 2 * len(TARGETS)
    assert csv["fractured"].between(0, 1).all()
    report = json.loads((tmp_path / "working" / "submission_report.json").read_text())
    assert "prior" not in report["counts"], report["study"]
    ran = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(c["execution_count"] for c in ran) and len(ran) == len(sources())
    printed = "".join("".join(o.get("text", "")) for c in ran for o in c["outputs"])
    assert f"bundle: {bundle if attached else 'the demo bundle'}\n" in printed


def test_kernel_without_inputs_says_what_to_attach(offline, tmp_path):
    (tmp_path / "input").mkdir()
    done, _ = execute(offline, tmp_path)
    assert done.returncode != 0 and "attach the competition" in done.stderr


def test_wheels_are_installed_only_where_cspine_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "input"))
    setup, install = sources()[:2]
    calls, space = [], {}
    exec(setup, space)
    space["subprocess"].run, run = lambda *a, **k: calls.append((a, k)), subprocess.run
    try:
        exec(install, space)
        assert calls == []
        monkeypatch.setattr(space["importlib"].util, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match="holds its wheel"):
            exec(install, space)
        wheels = tmp_path / "input" / "datasets" / "someone" / "cspine-wheels"
        wheels.mkdir(parents=True)
        (wheels / "cspine-0.1.0-py3-none-any.whl").touch()
        exec(install, space)
        (command,), options = calls[0]
        assert "--no-index" in command and wheels in command and options == {"check": True}
    finally:
        subprocess.run = run


def test_the_table_that_has_scans_beside_it_is_taken(tmp_path, monkeypatch):
    """Also where another data set holds a test.csv nearer to the top."""
    data = tmp_path / "competitions" / COMPETITION
    (data / "test_images").mkdir(parents=True)
    for folder in (data, tmp_path / "mine"):
        folder.mkdir(exist_ok=True)
        (folder / "test.csv").write_text("")
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path))
    names = {}
    for source in sources():
        if "attached(" in source and "pip" not in source:
            exec(source, names)  # noqa: S102, our own kernel's cells
    assert names["data"] == data


def test_metadata_fits_the_platform():
    meta = json.loads((KERNEL / "kernel-metadata.json").read_text())
    assert (KERNEL / meta["code_file"]).is_file()
    assert meta["enable_internet"] is False and meta["competition_sources"] == [COMPETITION]
    assert {s.split("/")[1] for s in meta["dataset_sources"]} == {"cspine-wheels", "cspine-bundle"}
    assert meta["kernel_type"] == "notebook" and meta["language"] == "python"


def test_kernel_is_committed_clean():
    cells = json.loads((KERNEL / "submit.ipynb").read_text())["cells"]
    assert not any(c.get("outputs") or c.get("execution_count") for c in cells)
