"""kaggle/simulate.py: the submit kernel and the examples as the platform would run them, and what it must not let pass."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cspine.bundle import random_bundle
from cspine.phantom import phantom
from cspine.wheels import _write_lock, build_wheel

ROOT = Path(__file__).resolve().parents[1]
SIMULATE = ROOT / "kaggle/simulate.py"
spec = importlib.util.spec_from_file_location("simulate", SIMULATE)
simulate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(simulate)


def run(kernel, out, *args, status=0):
    done = subprocess.run([sys.executable, SIMULATE, kernel, "--out", out, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The project's own wheel and its lock; all else is in the images here."""
    out = tmp_path_factory.mktemp("wheels")
    build_wheel(ROOT, out)
    _write_lock(out, "3", "stand-in")
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "rsna"
    phantom(out, train=0, test=1, size=128, seed=20221027, workers=1)
    for name in ("train.csv", "train_bounding_boxes.csv", "test_truth.csv"):  # only what the hidden set is sure to have
        (out / name).unlink(missing_ok=True)
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two images: what cspine asks for, and one without torch."""
    folder = tmp_path_factory.mktemp("images")
    from configparser import ConfigParser

    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    (folder / "torch.txt").write_text(settings["package"]["requirements"])
    (folder / "no-torch.txt").write_text("numpy\npydicom\nimagecodecs\ntqdm\n")
    return {p.stem: p for p in folder.glob("*.txt")}


def test_the_submit_kernel_runs_as_on_the_platform(wheels, data, images, tmp_path):
    """With the bundle as a model, which is mounted deepest."""
    random_bundle(tmp_path / "bundle")
    model = "models/me/spine/pytorch/default/1"
    said = run("submit", tmp_path / "out", "--data", data, "--wheels", wheels, "--attach", f"{model}={tmp_path / 'bundle'}",
               "--image", images["torch"], "--time-limit", "10m", "--memory", "8")
    assert "network: none" in said and "Network is unreachable" in said
    assert f"bundle: /kaggle/input/{model}" in said
    assert "submission.csv: 8 rows, each once, each a probability" in said
    report = json.loads((tmp_path / "out/working/submission_report.json").read_text())
    assert "prior" not in report["counts"], report
    notebook = json.loads((tmp_path / "out/working/__notebook__.ipynb").read_text())
    assert all(c["execution_count"] for c in notebook["cells"] if c["cell_type"] == "code")


@pytest.mark.parametrize("name", ["windowing", "read-series"])
def test_another_kernel_imports_one_function_without_torch(wheels, data, images, tmp_path, name):
    data = ["--data", data] if name == "read-series" else []
    said = run(ROOT / "kaggle/examples" / name, tmp_path / "out", "--wheels", wheels, "--image", images["no-torch"], *data)
    assert f"{name}.ipynb ran in" in said


def kernel(folder, *cells, **meta):
    folder.mkdir()
    code = [{"cell_type": "code", "id": f"c{i}", "execution_count": None, "metadata": {}, "outputs": [], "source": c} for i, c in enumerate(cells)]
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    (folder / "k.ipynb").write_text(json.dumps({"cells": code, "metadata": spec, "nbformat": 4, "nbformat_minor": 5}))
    (folder / "kernel-metadata.json").write_text(json.dumps({"code_file": "k.ipynb"} | meta))
    return folder


PLATFORM = """
import errno, os, socket, sys
from importlib.util import find_spec
from pathlib import Path
lost = [n for n in ('cspine', 'torch', 'pandas') if find_spec(n)]
assert not lost, f'the image has {lost}'
import numpy
here = Path('/kaggle/input/datasets/me/things')
assert (here / 'a.txt').read_text() == 'a' and [p.name for p in Path('/kaggle/input').iterdir()] == ['datasets']
for path in (here / 'b.txt', Path('/kaggle/b.txt'), Path('/usr/b.txt')):
    try:
        path.write_text('b')
    except OSError as e:
        assert e.errno == errno.EROFS, e
    else:
        raise AssertionError(f'{path} can be written')
try:
    socket.create_connection(('198.51.100.1', 80), timeout=5)
except OSError as e:
    assert e.errno == errno.ENETUNREACH, e
Path('/kaggle/working/mine.txt').write_text('kept')
assert Path.cwd() == Path('/kaggle/working')
"""


@pytest.mark.parametrize("number", [0, 1], ids=["root", "user"])
def test_a_kernel_sees_what_the_platform_shows(images, tmp_path, number, monkeypatch):
    if number == 0 and os.geteuid():
        pytest.skip("for root; a user's namespaces are the other case")
    monkeypatch.setattr(simulate, "SANDBOXES", simulate.SANDBOXES[number : number + 1])
    (tmp_path / "things").mkdir()
    (tmp_path / "things/a.txt").write_text("a")
    k = kernel(tmp_path / "k", PLATFORM, dataset_sources=["me/things"])
    things = f"datasets/me/things={tmp_path / 'things'}"
    assert not simulate.main([str(k), "--out", str(tmp_path / "out"), "--attach", things, "--image", str(images["no-torch"])])
    assert (tmp_path / "out/working/mine.txt").read_text() == "kept"
    assert [p.name for p in (tmp_path / "things").iterdir()] == ["a.txt"]


WITHOUT_MOUNTS = """
import os
from pathlib import Path
assert (Path(os.environ['KAGGLE_INPUT']) / 'datasets/me/things/a.txt').read_text() == 'a'
assert Path.cwd() == Path(os.environ['KAGGLE_WORKING'])
"""


def test_where_no_mounts_are_allowed_variables_name_the_folders(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simulate, "SANDBOXES", simulate.SANDBOXES[2:])
    (tmp_path / "things").mkdir()
    (tmp_path / "things/a.txt").write_text("a")
    k = kernel(tmp_path / "k", WITHOUT_MOUNTS, dataset_sources=["me/things"])
    things = f"datasets/me/things={tmp_path / 'things'}"
    assert not simulate.main([str(k), "--out", str(tmp_path / "out"), "--attach", things, "--image", str(images["no-torch"])])
    said = capsys.readouterr().out
    assert "there is no /kaggle" in said and "network: none" in said


SLEEPS = "import subprocess\nsubprocess.run(['sleep', '600.{}'])"  # a process below the notebook's
FILLS = "import time\nx = bytearray(700_000_000)\nx[::4096] = b'1' * len(x[::4096])\ntime.sleep(600)"


@pytest.mark.parametrize("first", [0, 2], ids=["processes of its own", "without"])
def test_a_kernel_that_takes_too_long_is_ended(images, tmp_path, first, monkeypatch, capsys):
    """With all that it has started."""
    monkeypatch.setattr(simulate, "SANDBOXES", simulate.SANDBOXES[first:])
    k = kernel(tmp_path / "k", SLEEPS.format(f"{first}{os.getpid()}"))
    assert simulate.main([str(k), "--out", str(tmp_path / "out"), "--image", str(images["no-torch"]), "--time-limit", "8"]) == 1
    assert "not done after 8 s" in capsys.readouterr().err
    assert "Executing Cell 1" in (tmp_path / "out/log.txt").read_text()
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if f"600.{first}{os.getpid()}".encode() in _read(p)]


def test_a_kernel_that_takes_too_much_memory_is_ended(images, tmp_path):
    said = run(kernel(tmp_path / "k", FILLS), tmp_path / "out", "--image", images["no-torch"], "--memory", "0.6", "--time-limit", "2m", status=1)
    assert "more than 0.6" in said


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_kernel_that_fails_or_writes_nothing_fails_here(images, data, tmp_path):
    k = kernel(tmp_path / "k", "1 / 0  # before submission.csv")
    assert "ZeroDivisionError" in run(k, tmp_path / "out", "--image", images["no-torch"], "--data", data, status=1)
    k = kernel(tmp_path / "l", "# leaves submission.csv to chance")
    assert "finds none" in run(k, tmp_path / "out2", "--image", images["no-torch"], "--data", data, status=1)


@pytest.mark.parametrize("args, says", [
    ([], "give --data DIR; the kernel's metadata attaches datasets/YOUR_NAME/cspine-wheels: give --wheels DIR"),
    (["--data", "tests", "--wheels", "nowhere"], "nowhere is no folder"),
    (["--attach", "../up=tests"], "the path is one below /kaggle/input"),
    (["--data", "tests", "--wheels", "tests", "--image", "nowhere.txt"], "the list of the image nowhere.txt cannot be read"),
    (["--data", "tests", "--wheels", "tests", "--out", "tests"], "tests holds something else than a simulation"),
])
def test_what_is_missing_is_said(args, says, tmp_path):
    out = [] if "--out" in args else ["--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, SIMULATE, "submit", *out, *args], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and says in done.stderr, done.stderr


IDS = ["a_C1", "a_C2", "b_C1"]
GOOD = "row_id,fractured\nb_C1,0.5\na_C2,1e-3\na_C1,1\n"  # in any order


def answer(tmp_path, text, name="submission.csv"):
    working, data = tmp_path / "working", tmp_path / "data"
    for folder in (working, data):
        folder.mkdir(exist_ok=True)
    (data / "test.csv").write_text("\ufeffrow_id,StudyInstanceUID\n" + "".join(f"{i},{i[0]}\n" for i in IDS), encoding="utf-8")
    (working / name).parent.mkdir(exist_ok=True)
    (working / name).write_text(text)
    return simulate.check_submission(working, data)


def test_a_right_submission_passes(tmp_path):
    assert answer(tmp_path, GOOD) == "submission.csv: 3 rows, each once, each a probability"


@pytest.mark.parametrize("text, says", [
    (GOOD.replace("a_C1,1\n", ""), "lacks 1 of 3 rows, such as a_C1"),
    (GOOD + "c_C1,.5\n", "nobody asked for: 1"),
    (GOOD + "a_C1,.5\n", "answers twice"),
    (GOOD.replace("1e-3", ""), "says '' for a_C2"),
    (GOOD.replace("1e-3", "nan"), "says 'nan' for a_C2"),
    (GOOD.replace("1e-3", "1.5"), "no probability"),
    (GOOD.replace("row_id,", "id,"), "begins with id,fractured"),
    (GOOD.replace("1e-3", "1e-3,2"), "line 3 of submission.csv has 3 fields"),
    ("", "begins with nothing"),
])
def test_a_wrong_submission_is_refused(tmp_path, text, says):
    with pytest.raises(simulate.Failed, match=says):
        answer(tmp_path, text)


def test_another_name_is_refused(tmp_path):
    with pytest.raises(simulate.Failed, match="finds Submission.csv"):
        answer(tmp_path, GOOD, "Submission.csv")
    (tmp_path / "working/Submission.csv").rename(tmp_path / "working/submission.csv")
    with pytest.raises(simulate.Failed, match="finds sub/submission.csv, submission.csv"):
        answer(tmp_path, GOOD, "sub/submission.csv")


@pytest.mark.parametrize("text, s", [("9h", 32400), ("8h30m", 30600), ("45m", 2700), ("90", 90), ("1.5s", 1.5)])
def test_times_are_read(text, s):
    assert simulate.seconds(text) == s
    for wrong in ("", "soon", "-3", "0"):
        with pytest.raises(Exception, match="no time"):
            simulate.seconds(wrong)


def test_a_network_that_is_there_ends_it(tmp_path, monkeypatch):
    """The proof fails outside of the sandbox, where there are more interfaces than lo, or a route."""
    monkeypatch.setattr(simulate.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setattr(simulate.socket, "create_connection", lambda *a, **k: (_ for _ in ()).throw(OSError(101, "Network is unreachable")))
    with pytest.raises(SystemExit) as e:
        simulate.no_network()
    assert e.value.code == simulate.NOT_OFFLINE


def test_only_the_files_of_the_image_are_linked(tmp_path):
    """Also where packages share a folder."""
    site = tmp_path / "site"
    for name, files in {"one": ["ns/one/__init__.py", "one.py"], "two": ["ns/two/__init__.py"], "three": ["three/a.py"]}.items():
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" + ("Requires-Dist: three; extra == 'x'\n" if name == "one" else ""))
        for f in files:
            (site / f).parent.mkdir(parents=True, exist_ok=True)
            (site / f).touch()
        (info / "RECORD").write_text("".join(f"{f},,\n" for f in [*files, f"{info.name}/METADATA", f"{info.name}/RECORD"]))
    installed = {d.name: d for d in simulate.importlib.metadata.distributions(path=[str(site)])}
    assert simulate.closure(["one"], installed) == {"one"}
    assert simulate.closure(["One", "nothing"], installed) == {"one"}
    simulate.link({"one", "three"}, installed, tmp_path / "image")
    there = sorted(os.path.relpath(os.path.join(d, f), tmp_path / "image") for d, _, fs in os.walk(tmp_path / "image", followlinks=True) for f in fs if f.endswith(".py"))
    assert there == ["ns/one/__init__.py", "one.py", "three/a.py"]
