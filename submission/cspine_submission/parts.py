"""What is kept of a run, so that one that was killed goes on: the folder <out>.parts, a file per study that is done."""

import hashlib
import json
import os
from pathlib import Path

import cspine
from cspine.dicom import study_files
from cspine.rsna import write_whole
from cspine_submission.predicting import STOOD_IN


class Parts:
    """The folder of one submission; what another model or another test.csv left in it is not used."""

    def __init__(self, out, rows, model, resume):
        self.folder = Path(f"{out}.parts")
        self.number = {uid: i for i, uid in enumerate(dict.fromkeys(rows["StudyInstanceUID"]))}
        made_from = {"rows": _sha256("\n".join(rows["row_id"])), "model": model}
        mine = self.folder / "made_from.json"
        before = _read_json(mine)
        self.off = ""  # why nothing can be kept
        if resume and model is not None and before == made_from:
            return
        old = list(self.folder.glob("study_*.json"))
        if old:
            changed = "resume is off" if not resume else "the bundle, the code or test.csv is another"
            print(f"beginning again, not reusing {len(old)} studies in {self.folder}: {changed}", flush=True)
        try:
            for path in [*old, *self.folder.glob("study_*.npz")]:
                path.unlink()
            write_whole(mine, json.dumps(made_from))
        except OSError as e:  # a full disk costs the resume, not the run
            self.off = e.strerror or str(e)

    def _path(self, uid):
        return _file(self.folder, self.number[uid], "json")

    def load(self, uid, folder):
        """What an earlier run found, None if there is nothing or the study's files have changed."""
        part = _read_json(self._path(uid)) if not self.off else None
        if not isinstance(part, dict) or folder is None or part.get("uid") != uid or not part.get("files") or part["files"] != _files_stamp(folder):
            return None
        study = part.get("study")
        whole = isinstance(study, dict) and {"status", "reason", "notes", "probabilities"} <= set(study)
        return study | {"reused": True} if whole else None

    def save(self, uid, folder, study, view=None):
        """Keep a study and its view; one that failed is not kept: the next run tries it again."""
        if study["status"] == STOOD_IN:
            return
        if self.off:
            study["notes"].append(f"not kept for another run: {self.off}")
            return
        try:
            if view is not None:
                write_whole(self.view(uid), view)
            write_whole(self._path(uid), json.dumps({"uid": uid, "files": _files_stamp(folder), "study": study}))
        except OSError as e:  # a full disk costs the resume, not the run
            study["notes"].append(f"not kept for another run: {e.strerror}")

    def view(self, uid):
        """The file of a study's view, whether it is there or not."""
        return _file(self.folder, self.number[uid], "npz")


def view_file(out, number):
    """Where the run that wrote `out` kept the view of its study of that number, the first being 0."""
    return _file(Path(f"{out}.parts"), number, "npz")


def _file(folder, number, suffix):
    return folder / f"study_{number:05d}.{suffix}"  # not the uid: it need not be a file name


def model_stamp(bundle):
    """A hash of the bundle and of cspine's code: another model or an edited notebook asks for another run; None: not known."""
    if bundle is None:
        return None
    card = Path(bundle) / "bundle.json"  # holds the SHA-256 of each of its files
    if not card.is_file():
        return None
    code = sorted(Path(cspine.__file__).parent.glob("*.py"))
    return _sha256("".join(_sha256(p.read_bytes()) for p in [card, *code]))


def _files_stamp(folder):
    """A hash of the names, sizes and times of a study's files; None if they cannot be listed."""
    try:
        facts = [(os.path.relpath(f, folder), f.stat().st_size, f.stat().st_mtime_ns) for f in study_files(folder)]
    except OSError:  # gone or not ours to read: what is known of it is not used
        return None
    return _sha256(json.dumps(facts))


def _sha256(content):
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or not ours: then it is made again
        return None
