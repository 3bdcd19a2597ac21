"""The kernels as files: clean, complete metadata, one way to find what is attached; and what publishes them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(p.parent for p in (ROOT / "kaggle").glob("*/*/kernel-metadata.json"))
SUBMIT = ROOT / "kaggle/kernels/submit"
COMPETITION = "rsna-2022-cervical-spine-fracture-detection"


def metadata(folder):
    return json.loads((folder / "kernel-metadata.json").read_text(encoding="utf-8"))


def cells(folder):
    return json.loads((folder / metadata(folder)["code_file"]).read_text(encoding="utf-8"))["cells"]


def sources(folder):
    return ["".join(c["source"]) for c in cells(folder) if c["cell_type"] == "code"]


def test_all_kernels_are_there():
    assert {k.name for k in KERNELS} == {"train-segmentation", "crop", "train-classification", "submit", "windowing", "read-series"}


@pytest.mark.parametrize("folder", KERNELS, ids=lambda p: p.name)
def test_kernel_fits_the_platform(folder):
    meta = metadata(folder)
    assert meta["kernel_type"] == "notebook" and meta["language"] == "python" and meta["enable_internet"] is False
    assert meta["id"] == f"YOUR_NAME/{meta['title'].replace(' ', '-')}"  # the platform makes the one from the other
    assert all(s.startswith("YOUR_NAME/") for s in meta["dataset_sources"] + meta["kernel_sources"])
    if folder.parent.name == "kernels":  # without a machine_shape it may be a GPU that the platform's torch cannot use
        assert meta["enable_gpu"] and meta["machine_shape"] == "NvidiaTeslaT4" and meta["competition_sources"] == [COMPETITION]
        known = {metadata(k)["id"] for k in KERNELS}
        assert set(meta["kernel_sources"]) <= known
    assert not any(c.get("outputs") or c.get("execution_count") for c in cells(folder))


@pytest.mark.parametrize("folder", [k for k in KERNELS if k.parent.name == "kernels"], ids=lambda p: p.name)
def test_kernel_says_what_it_needs_and_installs_in_one_way(folder):
    first = "".join(cells(folder)[0]["source"])
    assert cells(folder)[0]["cell_type"] == "markdown" and "ttached must be" in first and "GPU T4 x2" in first and "competition" in first
    assert sources(folder)[0] == sources(SUBMIT)[0]  # the cell that installs is the same everywhere


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Run the cell that installs over an input, where cspine seems to be missing: the commands that it would run."""
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "input"))
    calls = []

    def run(*places):
        for place in places:
            folder = tmp_path / "input" / place
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "cspine-0.1.0+1a2b3c4d-py3-none-any.whl").touch()
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        monkeypatch.setattr("subprocess.run", lambda command, **options: calls.append((command, options)))
        exec(sources(SUBMIT)[0], {})  # our own kernel's cell
        return calls

    return run


@pytest.mark.parametrize("place", ["cspine-wheels", "datasets/me/cspine-wheels", "notebooks/me/wheels", "models/me/wheels/other/default/1"])
def test_wheels_are_found_however_they_are_mounted(install, tmp_path, place):
    ((command, options),) = install(place)
    assert "--no-index" in command and "--require-hashes" in command and options == {"check": True}
    assert command[-1] == tmp_path / "input" / place / "requirements.lock"


def test_two_sets_of_wheels_are_named_and_none_is_taken(install):
    with pytest.raises(RuntimeError, match="(?s)lie 2: .*datasets/me/.*datasets/you/"):
        install("datasets/me/cspine-wheels", "datasets/you/cspine-wheels")


def test_no_wheels_are_said(install):
    with pytest.raises(RuntimeError, match="attach the one data set of wheels"):
        install()


def test_wheels_are_left_alone_where_cspine_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_INPUT", str(tmp_path / "input"))
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("something is installed"))
    exec(sources(SUBMIT)[0], {})


@pytest.mark.parametrize("folder", [k for k in KERNELS if k.parent.name == "kernels"], ids=lambda p: p.name)
def test_kernel_without_inputs_says_what_to_attach(tmp_path, folder):
    (tmp_path / "input").mkdir()
    code = "\n".join(s for s in sources(folder) if "find_device" not in s)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"KAGGLE_INPUT": str(tmp_path / "input")})
    assert done.returncode and "attach the competition" in done.stderr and "nothing is attached" in done.stderr


def test_nothing_walks_through_the_scans(tmp_path, monkeypatch):
    """Neither by name nor where a folder holds many; and a model is found six folders down."""
    from cspine.kernels import attached_bundle, attached_data

    data = tmp_path / "competitions" / COMPETITION
    for i in range(150):
        (data / "test_images" / f"1.{i}").mkdir(parents=True)
        (tmp_path / "datasets/me/windows" / f"1.{i}").mkdir(parents=True)
    (data / "segmentations").mkdir()
    (data / "test.csv").touch()
    model = tmp_path / "models/me/spine/pytorch/default/1"
    model.mkdir(parents=True)
    (model / "bundle.json").touch()
    seen, scandir = [], os.scandir
    monkeypatch.setattr("os.scandir", lambda path: seen.append(Path(path)) or scandir(path))
    assert attached_bundle(tmp_path) == model and attached_data("test", tmp_path) == data
    assert data in seen and len(seen) < 40
    assert not [p for p in seen if "test_images" in p.parts or p.name == "segmentations" or p.parent.name == "windows"]


@pytest.mark.parametrize("rerun", [False, True])
def test_an_alarm_fails_the_kernel_before_a_submission_is_spent(tmp_path, monkeypatch, rerun):
    monkeypatch.delenv("KAGGLE_IS_COMPETITION_RERUN", raising=False)
    if rerun:
        monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    (tmp_path / "submission.csv").write_text("row_id,fractured\na_C1,.5\n")
    (tmp_path / "test.csv").write_text("row_id\na_C1\n")

    def last(alarm):
        exec(sources(SUBMIT)[-1], {"os": os, "data": tmp_path, "working_folder": lambda: tmp_path, "report": {"alarm": alarm}})

    last(False)
    if rerun:
        last(True)
    else:
        with pytest.raises(RuntimeError, match="Do not submit this"):
            last(True)


def publish(*args, **env):
    return subprocess.run([sys.executable, ROOT / "kaggle/publish.py", *map(str, args)], capture_output=True, text=True, env=os.environ | env)


@pytest.fixture
def wheels(tmp_path):
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "cspine-0.1.0+1a2b3c4d-py3-none-any.whl").write_bytes(b"0" * 2_000_000)
    (folder / "requirements.lock").write_text("cspine==0.1.0+1a2b3c4d --hash=sha256:0\n")
    return folder


BUNDLE = ROOT / "cspine/demo_bundle"


def test_publish_shows_what_it_would_send(wheels, tmp_path):
    before = {p: p.read_bytes() for p in (ROOT / "kaggle").rglob("*.json")}
    done = publish("--user", "someone", "--wheels", wheels, "--bundle", BUNDLE, "--kernel", "submit", "--dry-run", PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for said in ("2.000 MB  cspine-0.1.0+1a2b3c4d-py3-none-any.whl", '"id": "someone/cspine-wheels"', '"id": "someone/cspine-bundle"',
                 '"id": "someone/cspine-submit"', "datasets create -p", "datasets version -p", "kernels push -p", "bundle.json"):
        assert said in done.stdout
    assert "YOUR_NAME" not in done.stdout and "\nrunning:" not in done.stdout
    assert before == {p: p.read_bytes() for p in (ROOT / "kaggle").rglob("*.json")}


FAKE = """#!/bin/sh
echo "$@" >> "$LOG"
for f in "$4"/*; do [ "$1" = status ] || basename "$f" >> "$LOG"; done
case "$1 $2" in "datasets status") [ -e "$LOG.made" ] && echo ready || exit 1;; "datasets create") touch "$LOG.made";; esac
"""


def test_publish_makes_a_data_set_once_and_then_versions_it(wheels, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kaggle").write_text(FAKE)
    (tmp_path / "bin/kaggle").chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    for _ in range(2):
        done = publish("--user", "someone", "--wheels", wheels, "--kernel", "submit", "--demo", **env)
        assert done.returncode == 0, done.stderr + done.stdout
    log = (tmp_path / "log").read_text()
    assert log.count("datasets create") == log.count("datasets version") == 1 and log.count("kernels push") == 2
    assert log.index("datasets create") < log.index("kernels push") < log.index("datasets version")
    assert "dataset-metadata.json" in log and "requirements.lock" in log and "submit.ipynb" in log


@pytest.mark.parametrize("args, says", [
    ((), "nothing to send"),
    (("--bundle", "tests"), "lacks bundle.json"),
    (("--kernel", "nothing"), "there are crop, submit, train-classification, train-segmentation"),
    (("--bundle", BUNDLE, "--demo"), "leave out one"),
])
def test_publish_says_what_is_missing(args, says):
    done = publish("--user", "someone", "--dry-run", *args)
    assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_publish_takes_the_name_from_the_credential_file(wheels, tmp_path):
    (tmp_path / "kaggle.json").write_text('{"username": "from_file", "key": "SECRET"}')
    env = {"KAGGLE_CONFIG_DIR": str(tmp_path), "KAGGLE_USERNAME": "", "HOME": str(tmp_path)}
    done = publish("--wheels", wheels, "--dry-run", **env)
    assert done.returncode == 0 and '"id": "from_file/cspine-wheels"' in done.stdout and "SECRET" not in done.stdout
    (tmp_path / "kaggle.json").unlink()
    done = publish("--wheels", wheels, "--dry-run", **env)
    assert done.returncode == 1 and "no user name: give it with --user" in done.stderr


def test_two_wheels_of_cspine_are_not_published(wheels):
    shutil.copy(next(wheels.glob("*.whl")), wheels / "cspine-0.1.0+99999999-py3-none-any.whl")
    done = publish("--user", "someone", "--wheels", wheels, "--dry-run")
    assert done.returncode == 1 and "2 wheels of cspine" in done.stderr
