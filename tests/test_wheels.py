"""cspine wheels, from end to end, where the only index is a folder of small wheels."""

import base64
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from cspine.version import code_version
from cspine.wheels import LOCK, canonical, missing, read_image

ROOT = Path(__file__).resolve().parents[1]
settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(ROOT / "settings.ini", encoding="utf-8")
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
TAG = f"cp{sys.version_info[0]}{sys.version_info[1]}"
OTHER = "cp314" if TAG != "cp314" else "cp313"


def wheel(folder, name, version, needs=(), tag="py3-none-any"):
    """A wheel with one file, whole as pip wants it."""
    info, files = f"{name}-{version}.dist-info", {f"{name}.py": f"version = '{version}'\n"}
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + "".join(f"Requires-Dist: {n}\n" for n in needs)
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"
    digest = {n: base64.urlsafe_b64encode(hashlib.sha256(t.encode()).digest()).rstrip(b"=").decode() for n, t in files.items()}
    files[f"{info}/RECORD"] = "".join(f"{n},sha256={digest[n]},{len(t)}\n" for n, t in files.items()) + f"{info}/RECORD,,\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as z:
        for n, text in files.items():
            z.writestr(n, text)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """The only index: wheels for this Python and another; torch is there too, and too large to want."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel(folder, "imagecodecs", "2026.1.1", ["numpy"], f"{TAG}-{TAG}-manylinux_2_28_x86_64")
    wheel(folder, "imagecodecs", "2026.9.9", ["numpy"], f"{OTHER}-{OTHER}-manylinux_2_28_x86_64")
    wheel(folder, "segmentation_models_pytorch", "0.6.0", ["torch>=1.8", "tiny_helper; python_version >= '3.9'", "never; python_version < '3'"])
    wheel(folder, "tiny_helper", "1.0")
    wheel(folder, "torch", "2.15.0", ["nvidia_cudnn"])
    wheel(folder, "nvidia_cudnn", "9.0")
    wheel(folder, "numpy", "9.9.9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


LACKING = {"imagecodecs", "segmentation-models-pytorch"}


@pytest.fixture
def image(tmp_path):
    """An image with all of cspine's requirements but two, at the lowest versions that it asks for."""
    lines = [f"# python {PYTHON}.1"]
    for r in settings["package"]["requirements"].split():
        name, least = re.match(r"([\w.-]+)>=([\w.]+)", r).groups()
        if canonical(name) not in LACKING:
            lines.append(f"{name}=={least}" + ("+cu128" if name == "torch" else ""))
    (tmp_path / "image.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "image.txt"


def collect(out, image, *args):
    return subprocess.run([sys.executable, "-m", "cspine.cli", "wheels", "--out", str(out), "--image", str(image), "--extras", "", *args],
                          capture_output=True, text=True, cwd=ROOT)


def test_what_the_image_lacks_is_brought_and_nothing_else(index, image, tmp_path):
    out = tmp_path / "wheels"
    out.mkdir()
    (out / "old-1.0-py3-none-any.whl").touch()
    done = collect(out, image)
    assert done.returncode == 0, done.stderr
    version = code_version(ROOT / "cspine", ROOT / "submission/cspine_submission")
    names = {f"cspine-{version}-py3-none-any.whl", f"imagecodecs-2026.1.1-{TAG}-{TAG}-manylinux_2_28_x86_64.whl",
             "segmentation_models_pytorch-0.6.0-py3-none-any.whl", "tiny_helper-1.0-py3-none-any.whl"}
    assert {p.name for p in out.glob("*.whl")} == names  # neither torch nor its CUDA, nor another numpy
    size = sum(p.stat().st_size for p in out.glob("*.whl"))
    assert f"4 wheels, {size / 1e6:.1f} MB" in done.stdout

    locked = dict(re.findall(r"^(\S+)==\S+ --hash=sha256:([0-9a-f]{64})$", (out / LOCK).read_text(), re.M))
    assert set(locked) == {"cspine", "imagecodecs", "segmentation-models-pytorch", "tiny-helper"}
    assert locked["cspine"] == hashlib.sha256((out / f"cspine-{version}-py3-none-any.whl").read_bytes()).hexdigest()

    def install(target):
        return subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--find-links", out, "--require-hashes",
                               "-r", out / LOCK, "--target", target], capture_output=True, text=True, env=os.environ | {"PIP_FIND_LINKS": ""})

    assert install(tmp_path / "site").returncode == 0 and code_version(tmp_path / "site/cspine", tmp_path / "site/cspine_submission") == version
    with zipfile.ZipFile(out / "tiny_helper-1.0-py3-none-any.whl", "a") as z:
        z.writestr("tiny_helper_2.py", "# not what was locked\n")
    done = install(tmp_path / "again")
    assert done.returncode and "DO NOT MATCH THE HASHES" in done.stderr


def test_what_cannot_fit_is_refused_in_words(index, image, tmp_path):
    image.write_text(re.sub(r"torch==\S+", "torch==2.1.0+cu118", image.read_text()))
    done = collect(tmp_path / "wheels", image)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "wheels").exists()
    assert "does not fit what the image has" in done.stderr and "torch>=2.6" in done.stderr and "torch 2.1.0 (the image's)" in done.stderr


def test_a_wheel_for_another_python_is_none(index, image, tmp_path):
    for f in index.glob(f"imagecodecs-*-{TAG}-*"):
        f.unlink()
    done = collect(tmp_path / "wheels", image)
    assert done.returncode == 1 and "imagecodecs" in done.stderr


def test_a_version_that_is_not_known_is_taken_to_fit(index):
    """Then nothing below it is brought, nor is it itself."""
    found = missing(["segmentation-models-pytorch"], {"torch": ""}, PYTHON)
    assert set(found) == {"segmentation-models-pytorch", "tiny-helper"}
    assert set(missing(["segmentation-models-pytorch"], {}, PYTHON)) == {"segmentation-models-pytorch", "tiny-helper", "torch", "nvidia-cudnn"}


@pytest.mark.parametrize("args, says", [
    (["--project", "kaggle"], "is no checkout of cspine"),
    (["--python", "three"], "--python takes a version such as 3.12"),
    (["--out", "settings.ini"], "is a file"),
])
def test_what_is_wrong_is_said(image, tmp_path, args, says):
    done = collect(tmp_path / "wheels", image, *args)
    assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_images_in_the_repository_say_what_they_are():
    images = list((ROOT / "kaggle/images").glob("*.txt"))
    assert images
    for path in images:
        python, has = read_image(path)
        assert re.fullmatch(r"[\w-]+-20\d\d-\d\d", path.stem) and python and {"torch", "numpy", "fastcore"} <= set(has)
        assert int(re.match(r"==(\d+)", has["fastcore"])[1]) < 2
        text = path.read_text()
        assert "pip list --format=freeze" in text and "A guess" in text and "Known" in text
        # what it has fits: of the requirements only two are not in it
        base = {canonical(re.match(r"[\w.-]+", r)[0]) for r in settings["package"]["requirements"].split()}
        assert base - set(has) == LACKING
