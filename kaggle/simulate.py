"""Run a kernel as the platform would: no network, inputs read-only and nested as they are mounted there, only the image's
packages and the attached wheels, papermill from top to bottom, a limit of time and of memory; then check submission.csv.

    python kaggle/simulate.py submit --data build/phantom --wheels build/wheels

Wheels are for the Python that runs this: `cspine wheels --out build/wheels --python 3.12 --image ...` where that is 3.12.
Needs Linux, with root or user namespaces (unshare), and papermill. What the image has is linked from this environment, in
the versions that are installed here: what the platform has in another version, or here is not, is said.
"""

import argparse
import csv
import ctypes
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import venv
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
NO_SANDBOX, NOT_OFFLINE = 97, 98  # exit statuses of the process that enters the sandbox
RUNS_NOTEBOOKS = ["ipykernel", "pip"]  # every image has them
UNSHARE = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child"]
SANDBOXES = [  # the first that this system allows: (command, are there mounts of our own?)
    (UNSHARE, True),
    ([*UNSHARE, "--user", "--map-root-user"], True),
    (["unshare", "--net"], False),
    (["unshare", "--net", "--user", "--map-root-user"], False),
]


class Failed(Exception):
    """The kernel would fail on the platform, or cannot be simulated here: one sentence."""


def main(argv=None):
    args = arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the sandbox ends with it
    try:
        simulate(args)
    except Failed as e:
        print(f"simulate: {e}", file=sys.stderr)
        return 1
    return 0


def arguments(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kernel", metavar="KERNEL", help="a folder with kernel-metadata.json, or the name of one in kaggle/kernels")
    p.add_argument("--data", type=Path, metavar="DIR", help="what stands in for the competition's files")
    p.add_argument("--wheels", type=Path, metavar="DIR", help="what `cspine wheels` collected; mounted as the data set cspine-wheels")
    p.add_argument("--bundle", type=Path, metavar="DIR", help="mounted as the data set cspine-bundle; without it, none is attached")
    p.add_argument("--attach", action="append", default=[], metavar="PATH=DIR",
                   help="mount DIR at /kaggle/input/PATH, such as models/me/spine/pytorch/default/1=my_bundle")
    p.add_argument("--image", type=Path, metavar="FILE", help="list of the packages that the image has; without it, the newest in kaggle/images")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for what the kernel writes, made anew; without it, build/simulation/KERNEL")
    p.add_argument("--time-limit", default="9h", type=seconds, metavar="TIME", help="such as 9h, 8h30m, 45m or 90 (seconds); default 9h")
    p.add_argument("--memory", type=float, default=None, metavar="GB", help="kill the kernel when all its processes hold more; default: no limit")
    p.add_argument("--parameter", action="append", default=[], metavar="NAME=VALUE", help="set a value of the cell tagged parameters")
    return p.parse_args(argv)


def seconds(text):
    m = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text)
    total = sum(float(n or 0) * f for n, f in zip(m.groups(), (3600, 60, 1))) if m else 0
    if not total > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: say 9h, 8h30m, 45m or seconds")
    return total


def simulate(args):
    folder = next((f for f in (Path(args.kernel), HERE / "kernels" / args.kernel) if (f / "kernel-metadata.json").is_file()), None)
    if folder is None:
        raise Failed(f"{args.kernel} is no kernel: there are {', '.join(sorted(p.parent.name for p in HERE.glob('kernels/*/kernel-metadata.json')))}")
    meta = json.loads((folder / "kernel-metadata.json").read_text(encoding="utf-8"))
    notebook = folder / meta["code_file"]
    mounts = attachments(meta, args)
    out = (args.out or Path("build/simulation") / folder.name).resolve()
    begin(out)
    with tempfile.TemporaryDirectory(prefix="simulate-") as tmp:
        tmp = Path(tmp)
        make_environment(tmp, args.image)
        sandbox, mounted = find_sandbox(tmp)
        spec = {"root": str(tmp / "root"), "tmp": str(tmp), "inputs": {p: str(d.resolve()) for p, d in mounts.items()},
                "working": str(out / "working"), "mounted": mounted, "env": environment(tmp, out, mounted)}
        spec["command"] = [sys.executable, "-m", "papermill", "-k", "simulated", "--log-output", "--no-progress-bar",
                           *(x for p in args.parameter for x in ("-p", *pair(p, "--parameter"))), str(tmp / "notebook.ipynb"), "__notebook__.ipynb"]
        shutil.copy(notebook, tmp / "notebook.ipynb")
        if not mounted:
            print("this system allows no mounts of our own: there is no /kaggle, KAGGLE_INPUT and KAGGLE_WORKING name the folders, and inputs can be written to")
        for path, source in sorted(mounts.items()):
            print(f"attached: {path} <- {source}")
        print(f"running; what it says goes to {out / 'log.txt'}", flush=True)
        took, peak, status = run(sandbox, spec, out / "log.txt", args.time_limit, args.memory)
    print((out / "log.txt").read_text(encoding="utf-8", errors="replace"), end="")
    if status == NOT_OFFLINE:
        raise Failed("the sandbox still has a network, so this would prove nothing")
    if status:
        raise Failed(f"the kernel fails after {took:.0f} s; the log is {out / 'log.txt'}")
    print(f"{notebook.name} ran in {took:.0f} s, with at most {peak / 1e9:.2f} GB")
    if "submission.csv" in notebook.read_text(encoding="utf-8"):
        print(check_submission(out / "working", args.data))


def begin(out):
    """A folder of our own, empty."""
    if out.exists() and not (out / "log.txt").is_file() and any(out.iterdir()):
        raise Failed(f"{out} holds something else than a simulation: name another --out")
    shutil.rmtree(out, ignore_errors=True)
    (out / "working").mkdir(parents=True)
    (out / "log.txt").touch()


def pair(text, option):
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise Failed(f"{option} {text}: say it as NAME=VALUE")
    return name, value


def attachments(meta, args):
    """Where each thing that the metadata attaches is mounted, and which folder stands in for it: path -> folder."""
    given = {}
    for text in args.attach:
        path, folder = pair(text, "--attach")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise Failed(f"--attach {text}: the path is one below /kaggle/input")
        given[path] = Path(folder)
    mounts, lost = dict(given), []
    for slug in meta.get("competition_sources", []):
        mounts.setdefault(f"competitions/{slug}", args.data)
    for slug in meta.get("dataset_sources", []):
        mounts.setdefault(f"datasets/{slug}", {"cspine-wheels": args.wheels, "cspine-bundle": args.bundle}.get(slug.split("/")[-1]))
    for slug in meta.get("kernel_sources", []):
        mounts.setdefault(f"notebooks/{slug}", None)
    for slug in meta.get("model_sources", []):
        mounts.setdefault(f"models/{slug}", None)
    for path, folder in list(mounts.items()):
        if folder is None and path.endswith("/cspine-bundle"):
            del mounts[path]
            if not given:
                print("no --bundle: the demo bundle answers")
        elif folder is None:
            lost.append(path)
        elif not folder.is_dir():
            raise Failed(f"{folder} is no folder")
    if lost:
        say = {"competitions": "--data DIR", "datasets": "--wheels DIR, made by `cspine wheels --out DIR`"}
        raise Failed("; ".join(f"the kernel's metadata attaches {p}: give {say.get(p.split('/')[0], f'--attach {p}=DIR')}" for p in lost))
    return mounts


# The environment: the image's packages are linked from the one that runs this, so that nothing is downloaded


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def make_environment(tmp, image):
    """A fresh environment: the image's packages that are installed here, and what they need."""
    from cspine.presets import CspineError
    from cspine.wheels import read_image

    image = image or max((HERE / "images").glob("*.txt"), key=lambda p: p.name)
    try:
        python, has = read_image(image)
    except CspineError as e:
        raise Failed(str(e)) from None
    installed = {canonical(d.name): d for d in reversed(list(importlib.metadata.distributions()))}  # the first on the path last
    installed.pop("cspine", None)  # comes from its wheel
    there = closure([*has, *RUNS_NOTEBOOKS], installed)
    link(there, installed, tmp / "image")
    venv.create(tmp / "env", with_pip=False, symlinks=True)
    site = next((tmp / "env").glob("lib/python*/site-packages"))
    (site / "image.pth").write_text(f"{tmp / 'image'}\n")
    spec = tmp / "env/share/jupyter/kernels/simulated"
    spec.mkdir(parents=True)
    argv = [str(tmp / "env/bin/python"), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "simulated", "language": "python"}))
    other = sorted(n for n, s in has.items() if n in there and re.fullmatch(r"==[\w.!+-]+", s)
                   and s[2:].split("+")[0] != installed[n].version.split("+")[0])
    lacking = sorted(n for n in has if n not in there)
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    print(f"image: {image}, of which {len(has) - len(lacking)} of {len(has)} packages are here, {len(other)} in another version"
          + (f"; Python {here}, not {python}" if python and python != here else ""))
    if lacking:
        print(f"not here, so not in the simulation: {', '.join(lacking[:8])}{f' and {len(lacking) - 8} more' if len(lacking) > 8 else ''}")


def closure(names, installed):
    """The names that are installed here, with what they need."""
    from packaging.requirements import InvalidRequirement, Requirement

    found, todo = set(), [(canonical(n), frozenset()) for n in names]
    done = set(todo)
    while todo:
        name, extras = todo.pop()
        if name not in installed:
            continue
        found.add(name)
        for text in installed[name].requires or []:
            try:
                need = Requirement(text)
            except InvalidRequirement:
                continue  # an old package's own affair
            if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in extras or [""]):
                item = canonical(need.name), frozenset(need.extras)
                if item not in done:
                    done.add(item)
                    todo.append(item)
    return found


def link(names, installed, folder):
    """Link the files of some packages into a folder; what they share with others is linked piece by piece."""
    folder.mkdir()
    owners = defaultdict(set)  # first parts of a path -> packages
    files = defaultdict(set)
    for name, dist in installed.items():
        for f in dist.files or []:
            if f.parts[0] == ".." or f.is_absolute() or f.suffix == ".pth" or "__pycache__" in f.parts:
                continue
            parts = f.parts
            for n in range(1, min(len(parts), 4) + 1):
                owners[parts[:n]].add(name)
            if name in names:
                files[parts[: min(len(parts), 4)]].add(name)
    for parts, who in sorted(files.items()):
        # the shortest path that is one package's own: mostly its folder
        n = next(n for n in range(1, len(parts) + 1) if len(owners[parts[:n]]) == 1 or n == len(parts))
        source, target = Path(installed[min(who)].locate_file("/".join(parts[:n]))), folder.joinpath(*parts[:n])
        if source.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)


def environment(tmp, out, mounted):
    """The variables that the kernel sees: few, and none that lead to this environment's packages."""
    keep = ("LANG", "LC_ALL", "TZ", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "LD_LIBRARY_PATH")
    env = {k: os.environ[k] for k in keep if k in os.environ}
    env |= {"PATH": f"{tmp / 'env/bin'}:/usr/local/bin:/usr/bin:/bin", "HOME": str(tmp / "home"), "TMPDIR": str(tmp / "tmp"),
            "JUPYTER_PATH": str(tmp / "env/share/jupyter"), "IPYTHONDIR": str(tmp / "home/ipython"), "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore",
            "KAGGLE_KERNEL_RUN_TYPE": "Batch"}
    if not mounted:
        env |= {"KAGGLE_INPUT": str(tmp / "input"), "KAGGLE_WORKING": str(out / "working")}
    for name in ("home", "tmp", "root"):
        (tmp / name).mkdir(exist_ok=True)
    return env


# The sandbox


def find_sandbox(tmp):
    """The command that enters a namespace without a network, and whether it may mount."""
    said = ""
    for command, mounted in SANDBOXES:
        (tmp / "root").mkdir(exist_ok=True)
        (tmp / "probe").mkdir(exist_ok=True)
        spec = {"root": str(tmp / "root"), "tmp": str(tmp), "inputs": {}, "working": str(tmp / "probe"), "mounted": mounted,
                "env": dict(os.environ), "command": ["true"]}
        done = subprocess.run([*command, sys.executable, __file__, "--inside"], input=json.dumps(spec), capture_output=True, text=True)
        if not done.returncode:
            return command, mounted
        said = (done.stderr.strip().splitlines() or [said])[-1]
    raise Failed(f"the network cannot be taken away here ({said}): run this on Linux as root, or allow user namespaces")


MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
FLAGS = {"nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21}


def mount(source, target, kind=None, flags=0):
    libc = ctypes.CDLL(None, use_errno=True)
    encode = [None if x is None else os.fsencode(x) for x in (source, target, kind)]
    if libc.mount(*encode, ctypes.c_ulong(flags), None):
        number = ctypes.get_errno()
        raise OSError(number, f"mount {target}: {os.strerror(number)}")


def inside():
    """In the new namespaces: lay out /kaggle, prove that there is no network, and become the command."""
    spec = json.loads(sys.stdin.read())
    try:
        if spec["mounted"]:
            new_root(spec)
        else:
            nest(spec)
        loopback_up()
    except OSError as e:
        print(f"simulate: {e}", file=sys.stderr)
        return NO_SANDBOX
    print(f"network: {no_network()}", flush=True)
    os.execvpe(spec["command"][0], spec["command"], spec["env"])


def new_root(spec):
    """This machine, read-only, with /kaggle/input and /kaggle/working."""
    root = spec["root"]
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs")
    for name in sorted(set(os.listdir("/")) - {"kaggle", "proc"}):
        path, target = f"/{name}", f"{root}/{name}"
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.mkdir(target)
            mount(path, target, None, MS_BIND | MS_REC)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        at, options = line.split()[4:6]
        at = at.encode().decode("unicode_escape")
        if at.startswith(f"{root}/") and at.split("/")[root.count("/") + 1] not in ("dev", "tmp"):
            flags = sum(FLAGS.get(o, 0) for o in options.split(","))
            mount(None, at, None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
    os.mkdir(f"{root}/proc")
    try:
        mount("proc", f"{root}/proc", "proc")
    except OSError:  # in a container that masks parts of it
        mount("/proc", f"{root}/proc", None, MS_BIND | MS_REC)
    mount(spec["tmp"], root + spec["tmp"], None, MS_BIND | MS_REC)
    os.makedirs(f"{root}/kaggle/working")
    os.makedirs(f"{root}/kaggle/input")
    for path, source in spec["inputs"].items():
        target = f"{root}/kaggle/input/{path}"
        os.makedirs(target)
        mount(source, target, None, MS_BIND | MS_REC)
        flags = sum(FLAGS[o] for o in statvfs_flags(target))
        mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
    mount(spec["working"], f"{root}/kaggle/working", None, MS_BIND)
    mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY)
    os.chroot(root)
    os.chdir("/kaggle/working")


def statvfs_flags(path):
    """The flags of a mount that a namespace of a user may not take away."""
    flag = os.statvfs(path).f_flag
    names = {"nosuid": os.ST_NOSUID, "nodev": os.ST_NODEV, "noexec": os.ST_NOEXEC, "noatime": os.ST_NOATIME, "relatime": os.ST_RELATIME}
    return [n for n, bit in names.items() if flag & bit]


def nest(spec):
    """Links in the place of mounts."""
    for path, source in spec["inputs"].items():
        target = Path(spec["tmp"], "input", path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
    os.chdir(spec["working"])


def loopback_up():
    """Jupyter's processes talk over localhost, which a new network namespace has, but switched off."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP


def no_network():
    """What proves that there is none; ends the process if there is one."""
    interfaces = sorted(name for _, name in socket.if_nameindex())
    try:
        socket.create_connection(("198.51.100.1", 80), timeout=5).close()  # an address of documentation: nobody is there
        said = "a connection succeeds"
    except OSError as e:
        said = str(e)
        if interfaces == ["lo"] and e.errno == errno.ENETUNREACH:
            return f"none: the only interface is lo, and a connection to 198.51.100.1 fails ({e.strerror})"
    print(f"network: {interfaces}, {said}", flush=True)
    sys.exit(NOT_OFFLINE)


def run(sandbox, spec, log, time_limit, memory):
    """Run it under the limits: seconds, bytes at most, exit status."""
    start, peak = time.monotonic(), 0
    with log.open("w", encoding="utf-8") as f:
        process = subprocess.Popen([*sandbox, sys.executable, __file__, "--inside"], stdin=subprocess.PIPE, stdout=f, stderr=subprocess.STDOUT,
                                   text=True, start_new_session=True)
        try:
            process.stdin.write(json.dumps(spec))
            process.stdin.close()
            while process.poll() is None:
                peak = max(peak, tree_memory(process.pid))
                took = time.monotonic() - start
                if took > time_limit:
                    raise Failed(f"the kernel is not done after {time_limit:g} s: the platform would stop it there and keep nothing; the log is {log}")
                if memory and peak > memory * 1e9:
                    raise Failed(f"the kernel's processes hold {peak / 1e9:.2f} GB after {took:.0f} s, more than {memory:g}: the platform would end it there; the log is {log}")
                try:
                    process.wait(0.5)
                except subprocess.TimeoutExpired:
                    pass
        finally:
            stop(process)
    return time.monotonic() - start, peak, process.returncode


def stop(process):
    """End the sandbox and all that runs in it."""
    for pid in [*descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def descendants(pid):
    """Processes below one, by parentage."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it ended meanwhile
            continue
    found, level = [], [pid]
    while level:
        level = [p for p, parent in parents.items() if parent in level]
        found += level
    return found


def tree_memory(pid):
    """Bytes that a process and all below it hold, what they share counted once."""
    total = 0
    for p in descendants(pid):
        try:
            total += int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{p}/smaps_rollup").read_text(), re.M)[1]) * 1024
        except (OSError, TypeError):  # it ended meanwhile
            continue
    return total


# The scorer


def check_submission(working, data):
    """As the platform's scorer reads it: one file of that name, a number for each row, in any order. Returns a sentence."""
    named = [p for p in working.rglob("*") if p.name.lower() == "submission.csv"]
    if named != [working / "submission.csv"]:
        raise Failed("the scorer wants one submission.csv in /kaggle/working, and finds "
                     + (", ".join(str(p.relative_to(working)) for p in sorted(named)) or "none"))
    with (data / "test.csv").open(encoding="utf-8-sig", newline="") as f:
        wanted = [row["row_id"].strip() for row in csv.DictReader(f)]
    with named[0].open(encoding="utf-8", newline="") as f:
        rows = list(csv.reader(f))
    if not rows or sorted(rows[0]) != ["fractured", "row_id"]:
        raise Failed(f"submission.csv begins with {','.join(rows[0]) if rows else 'nothing'}, and the scorer wants row_id,fractured")
    if uneven := [i for i, row in enumerate(rows, 1) if len(row) != 2]:
        raise Failed(f"line {uneven[0]} of submission.csv has {len(rows[uneven[0] - 1])} fields, and the scorer wants 2")
    at, value = rows[0].index("row_id"), rows[0].index("fractured")
    answered = [row[at] for row in rows[1:]]
    for what, ids in (("lacks", set(wanted) - set(answered)), ("has rows that nobody asked for:", set(answered) - set(wanted)),
                      ("answers twice:", {i for i in answered if answered.count(i) > 1} if len(set(answered)) < len(answered) else set())):
        if ids:
            raise Failed(f"submission.csv {what} {len(ids)} of {len(set(wanted))} rows, such as {min(ids)}")
    for row in rows[1:]:
        try:
            p = float(row[value])
        except ValueError:
            p = math.nan
        if not 0 <= p <= 1:
            raise Failed(f"submission.csv says {row[value]!r} for {row[at]}, which is no probability")
    return f"submission.csv: {len(wanted)} rows, each once, each a probability"


if __name__ == "__main__":
    sys.exit(inside() if sys.argv[1:] == ["--inside"] else main())
