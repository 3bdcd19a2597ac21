"""What three readers make of series acquired in every way: the share of voxels that lie where their headers say.

python scripts/second_opinions.py    prints a table in Markdown; needs `pip install cspine[dev]`
"""
import subprocess
import sys
import tempfile
from pathlib import Path

import dcm2niix
import nibabel as nib
import numpy as np
import SimpleITK as sitk

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))
from scenes import KINDS, acquire, judge  # noqa: E402

from cspine.dicom import Volume, read_series  # noqa: E402


def by_simpleitk(folder):
    """SimpleITK's series reader; its own sorting and its own geometry."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image, affine = reader.Execute(), np.eye(4)
    axes = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, :3], affine[:3, 3] = axes[:, ::-1], image.GetOrigin()
    return Volume(sitk.GetArrayFromImage(image), affine)


def by_dcm2niix(folder):
    """dcm2niix and nibabel; of several files (tilt and spacing mended or not) the last in name, which is the mended one."""
    with tempfile.TemporaryDirectory() as out:
        subprocess.run([dcm2niix.bin, '-o', out, '-b', 'n', '-f', 'a', str(folder)], check=True, capture_output=True)
        image = nib.load(sorted(Path(out).glob('*.nii'))[-1])
        return Volume(np.asarray(image.dataobj), np.diag([-1.0, -1, 1, 1]) @ image.affine)


READERS = dict(cspine=read_series, SimpleITK=by_simpleitk, dcm2niix=by_dcm2niix)


def main():
    print('| acquired | within HU |', ' | '.join(READERS), '|\n|---|---|' + '---|' * len(READERS))
    for kind, (how, error, _) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            acquire(Path(folder), **how)
            cells = []
            for read in READERS.values():
                off = judge(Path(folder), read(Path(folder)))
                cells.append(f'{100 * (off <= error).mean():.0f} %')
        print(f"| {kind.replace('_', ' ')} | {error:g} |", ' | '.join(cells), '|', flush=True)


if __name__ == '__main__':
    main()
