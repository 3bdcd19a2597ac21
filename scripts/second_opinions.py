"""What other readers make of series acquired in every way, and of what public bug reports describe. Needs `pip install cspine[dev]`.

python scripts/second_opinions.py                     where voxels lie, by the headers: a table in Markdown
python scripts/second_opinions.py reports [BEFORE]    the conditions of tests/conditions.py; BEFORE: a checkout of an older cspine

In the second table `right` is every voxel as it was written; `said` means that a note names what was wrong, `refused`
an error in a sentence, and SILENT another volume, or only a part of it, without a word. The other readers say nothing
of values, so theirs is right or not.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tests'))
from scenes import KINDS, acquire, judge  # noqa: E402

from cspine.dicom import Volume, read_series  # noqa: E402


def by_simpleitk(folder):
    """SimpleITK's series reader; its own sorting and its own geometry."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    found = list(folder.glob('*.nii*'))
    if found:
        image = sitk.ReadImage(str(found[0]))
    else:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)) or [str(p) for p in folder.glob('all.dcm')])
        image = reader.Execute()
    affine = np.eye(4)
    axes = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, :3], affine[:3, 3] = axes[:, ::-1], image.GetOrigin()
    return Volume(sitk.GetArrayFromImage(image), affine)


def by_dcm2niix(folder):
    """dcm2niix and nibabel; of several files (tilt and spacing mended or not) the last in name, which is the mended one."""
    import dcm2niix

    with tempfile.TemporaryDirectory() as out:
        subprocess.run([dcm2niix.bin, '-o', out, '-b', 'n', '-f', 'a', str(folder)], check=True, capture_output=True, timeout=60)
        image = nib.load(sorted(Path(out).glob('*.nii'))[-1])
        return Volume(np.asarray(image.dataobj), np.diag([-1.0, -1, 1, 1]) @ image.affine)


def by_pydicom(folder):
    """What most kernels do: a loop, sorted by position."""
    slices = sorted(map(pydicom.dcmread, folder.glob('*.dcm')), key=lambda d: -d.ImagePositionPatient[2])
    return Volume(np.stack([d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in slices]), np.eye(4))


READERS = dict(cspine=read_series, SimpleITK=by_simpleitk, dcm2niix=by_dcm2niix)


def positions():
    print('| acquired | within HU |', ' | '.join(READERS), '|\n|---|---|' + '---|' * len(READERS))
    for kind, (how, error, _) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            acquire(Path(folder), **how)
            cells = []
            for read in READERS.values():
                off = judge(Path(folder), read(Path(folder)))
                cells.append(f'{100 * (off <= error).mean():.0f} %')
        print(f"| {kind.replace('_', ' ')} | {error:g} |", ' | '.join(cells), '|', flush=True)


def alike(hu, rights):
    """Whether a volume is one of those that are right, in any order of its axes' directions, as other tools have them."""
    turned = [hu[:, ::a, ::b][::c] for a in (1, -1) for b in (1, -1) for c in (1, -1)] if hu.ndim == 3 else []
    if hu.ndim == 3:
        turned += [t.transpose(2, 1, 0) for t in turned]
    return any(t.shape == r.shape and np.abs(t.astype(float) - r).max() < .51 for t in turned for r in rights)


def verdict(read, folder, rights, says=None):
    """One cell: what a reader makes of a folder. `says`: of the note that should be there, where a reader has notes."""
    try:
        volume = read(folder)
    except Exception as e:  # noqa: BLE001, of any reader
        return 'refused' if says is not None and type(e).__module__.startswith('cspine') else 'fails'
    right = alike(np.asarray(volume.hu), rights) if rights else None
    if says is None:
        return '–' if right is None else 'right' if right else 'other'
    said = bool(volume.notes)
    if right:
        return 'right, said' if said else 'right'
    return ('said' if right is None else 'other, said') if said else 'SILENT'


def judged(names, folders):
    """The column of a cspine, for the process that has it on its path."""
    from conditions import CONDITIONS

    return [verdict(read_series, Path(f), rights_of(f), CONDITIONS[n][1]) for n, f in zip(names, folders)]


def rights_of(folder):
    return list(np.load(f'{folder}.npz').values()) if Path(f'{folder}.npz').exists() else []


def reports(before=None):
    from conditions import CONDITIONS, neck

    hu, affine = neck()
    others = {'pydicom': by_pydicom, 'SimpleITK': by_simpleitk, 'dcm2niix': by_dcm2niix}
    with tempfile.TemporaryDirectory() as tmp:
        folders = []
        for k, (name, (write, says)) in enumerate(CONDITIONS.items()):
            folder = Path(tmp) / f'{k:03}'
            folder.mkdir()
            right = write(folder, hu, affine)
            if not isinstance(right, str) and not says.startswith('error'):
                right = hu if right is None else right
                rights = [right, np.roll(right, 4, axis=2)[:-1]] if name.startswith('two volumes') else [right]
                np.savez(f'{folder}.npz', *rights)
            folders.append(str(folder))
        names = list(CONDITIONS)
        columns = {}
        if before:
            code = 'import json, sys; sys.path.insert(0, sys.argv[1]); import second_opinions as s; print(json.dumps(s.judged(*json.load(sys.stdin))))'
            env = os.environ | {'PYTHONPATH': os.pathsep.join([str(Path(before).resolve()), str(ROOT / 'tests')])}
            out = subprocess.run([sys.executable, '-c', code, str(ROOT / 'scripts')], input=json.dumps([names, folders]), env=env, capture_output=True, text=True, check=True, cwd=tmp)
            columns['before'] = json.loads(out.stdout.splitlines()[-1])
        columns['cspine'] = judged(names, folders)
        for label, read in others.items():
            columns[label] = [verdict(read, Path(f), rights_of(f)) for f in folders]
    print('| condition |', ' | '.join(columns), '|\n|---|' + '---|' * len(columns))
    for name, *cells in zip(names, *columns.values()):
        print(f'| {name} |', ' | '.join(cells), '|')
    for label in columns:
        print(f'{label}: {sum(c.startswith("right") for c in columns[label])} of {len(names)} right, {columns[label].count("SILENT")} silently something else', file=sys.stderr)


if __name__ == '__main__':
    reports(*sys.argv[2:3]) if sys.argv[1:2] == ['reports'] else positions()
