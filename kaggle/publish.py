"""Make or version the data sets of wheels and of the bundle, and push a kernel: one command.

    python kaggle/publish.py --wheels build/wheels --bundle my_bundle --kernel submit --dry-run

Without --dry-run it sends, through the platform's own command line (pip install 'cspine[kaggle]'), which takes your
credentials from where it keeps them. YOUR_NAME in the metadata becomes your user name on the way; nothing in the
repository changes. Data sets and kernel are private.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "YOUR_NAME"
BUNDLE = f"{NAME}/cspine-bundle"
READY = 600  # s to wait until the platform has unpacked a data set


class Refused(Exception):
    """One sentence on what is missing."""


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--user", metavar="NAME", help="your user name there; without it, KAGGLE_USERNAME or the one in kaggle.json")
    p.add_argument("--wheels", type=Path, metavar="DIR", help="what `cspine wheels` collected, to the data set cspine-wheels")
    p.add_argument("--bundle", type=Path, metavar="DIR", help="what `cspine bundle` made, to the data set cspine-bundle")
    p.add_argument("--kernel", metavar="KERNEL", help="a folder with kernel-metadata.json, or the name of one in kaggle/kernels")
    p.add_argument("--demo", action="store_true", help="push the kernel without a bundle: the demo bundle answers")
    p.add_argument("--message", default="from kaggle/publish.py", metavar="TEXT", help="what is new in this version")
    p.add_argument("--dry-run", action="store_true", help="only show what would be sent; needs neither network nor credentials")
    args = p.parse_args(argv)
    try:
        publish(args)
    except Refused as e:
        print(f"publish: {e}", file=sys.stderr)
        return 1
    return 0


def publish(args):
    if not (args.wheels or args.bundle or args.kernel):
        raise Refused("nothing to send: name --wheels, --bundle or --kernel")
    if args.demo and args.bundle:
        raise Refused("--demo pushes the kernel without a bundle, so leave out one of --demo and --bundle")
    user = user_name(args.user)
    with tempfile.TemporaryDirectory(prefix="publish-") as tmp:
        tmp = Path(tmp)
        # all is laid out before anything is sent: what is wrong is said first
        datasets = []
        if args.wheels:
            datasets.append(stage_dataset("cspine-wheels", args.wheels, user, tmp, ("requirements.lock", "cspine-*.whl"), "`cspine wheels --out DIR` makes it"))
        if args.bundle:
            datasets.append(stage_dataset("cspine-bundle", args.bundle, user, tmp, ("bundle.json", "*.safetensors"), "`cspine bundle RUN... --out DIR` makes it"))
        kernel = stage_kernel(args.kernel, user, tmp, args.demo) if args.kernel else None
        for slug, folder in datasets:
            show(folder)
            send_dataset(slug, folder, args.message, args.dry_run)
        if kernel:
            show(kernel)
            command("kernels", "push", "-p", kernel, dry=args.dry_run)
            slug = json.loads((kernel / "kernel-metadata.json").read_text(encoding="utf-8"))["id"]
            print(f"{'would run' if args.dry_run else 'runs'} as {slug}: kaggle kernels status {slug}")


def user_name(given):
    """The name to put for YOUR_NAME; of the credential file only the name is read."""
    if given or os.environ.get("KAGGLE_USERNAME"):
        return given or os.environ["KAGGLE_USERNAME"]
    folders = [os.environ.get("KAGGLE_CONFIG_DIR"), Path.home() / ".kaggle", Path.home() / ".config/kaggle"]
    for path in (Path(f) / "kaggle.json" for f in folders if f):
        try:
            return json.loads(path.read_text(encoding="utf-8"))["username"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            raise Refused(f"{path} states no user name: give it with --user") from None
    raise Refused("no user name: give it with --user")


def filled(path, user, target):
    """The metadata with the user's name in the place of YOUR_NAME."""
    text = path.read_text(encoding="utf-8").replace(NAME, user)
    (target / path.name).write_text(text, encoding="utf-8")
    return json.loads(text)


def stage_dataset(name, source, user, tmp, patterns, made_by):
    """A folder as the platform's command line wants it: the files and dataset-metadata.json."""
    folder = tmp / name
    folder.mkdir()
    for pattern in patterns:
        if not list(source.glob(pattern)):
            raise Refused(f"{source} lacks {pattern}: {made_by}")
    for f in sorted(source.iterdir()):
        if f.is_dir():
            raise Refused(f"{source} holds the folder {f.name}, which is none of its own: {made_by} anew")
        if f.name != "dataset-metadata.json":
            (folder / f.name).symlink_to(f.resolve())
    if name == "cspine-wheels" and len(own := list(source.glob("cspine-*.whl"))) > 1:
        raise Refused(f"{source} has {len(own)} wheels of cspine, and the kernel wants one: {made_by} anew")
    meta = filled(HERE / "datasets" / name / "dataset-metadata.json", user, folder)
    return meta["id"], folder


def stage_kernel(name, user, tmp, demo):
    """The notebook and its metadata."""
    source = next((f for f in (Path(name), HERE / "kernels" / name) if (f / "kernel-metadata.json").is_file()), None)
    if source is None:
        raise Refused(f"{name} is no kernel: there are {', '.join(sorted(p.parent.name for p in HERE.glob('kernels/*/kernel-metadata.json')))}")
    folder = tmp / "kernel"
    folder.mkdir()
    meta = filled(source / "kernel-metadata.json", user, folder)
    if demo:
        meta["dataset_sources"] = [s for s in meta["dataset_sources"] if s != BUNDLE.replace(NAME, user)]
        (folder / "kernel-metadata.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    shutil.copy(source / meta["code_file"], folder)
    return folder


def show(folder):
    """What is in a folder that is to be sent."""
    print(f"{folder.name}:")
    for f in sorted(folder.iterdir()):
        print(f"  {f.stat().st_size / 1e6:9.3f} MB  {f.name}")
    for f in folder.glob("*-metadata.json"):
        print("  " + f.read_text(encoding="utf-8").strip().replace("\n", "\n  "))


def send_dataset(slug, folder, message, dry):
    """Make the data set, or another version of it, and wait until it can be attached."""
    if dry:
        print(f"would make the data set {slug}, or another version of it:")
        command("datasets", "create", "-p", folder, dry=True)
        command("datasets", "version", "-p", folder, "-m", message, dry=True)
        return
    there = command("datasets", "status", slug, quiet=True)
    command(*(["datasets", "version", "-p", folder, "-m", message] if there else ["datasets", "create", "-p", folder]))
    end = time.monotonic() + READY
    while "ready" not in (command("datasets", "status", slug, quiet=True) or ""):
        if time.monotonic() > end:
            raise Refused(f"the data set {slug} is not ready after {READY} s: look at it there, then run this again")
        time.sleep(10)


def command(*parts, dry=False, quiet=False):
    """Run the platform's command line: what it printed, or None where it failed and that is an answer too."""
    line = ["kaggle", *map(str, parts)]
    print(f"{'would run' if dry else 'running'}: {' '.join(line)}", flush=True)
    if dry:
        return None
    if shutil.which("kaggle") is None:
        raise Refused("the platform's command line is not here: pip install 'cspine[kaggle]'")
    done = subprocess.run(line, capture_output=True, text=True)
    if not quiet:
        print((done.stdout + done.stderr).strip(), flush=True)
    # it says some errors with status 0
    if done.returncode or "error" in done.stdout.lower():
        if quiet:
            return None
        raise Refused(f"{' '.join(line[:3])} failed, see above")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
