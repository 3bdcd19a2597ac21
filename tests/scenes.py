"""Series of a known scene, acquired in every way, and the judge: DICOM's own geometry. For test_geometry and scripts/second_opinions.py."""
import shutil

import numpy as np
from pydicom import dcmread
from scipy.ndimage import map_coordinates

from cspine.dicom import write_series

ROWS, COLUMNS, PIXEL = 44, 52, (.9, .7)


def scene(p):
    "HU at a place in LPS mm: smooth, different everywhere, never the same along two axes."
    x, y, z = np.moveaxis(p, -1, 0)
    return 260*np.sin(x/5 + .3) + 210*np.cos(y/6) + 240*np.sin(z/7 + x/40) + 3*z - 2*y + x


def rotation(axis, degrees):
    a, b = [i for i in range(3) if i != axis]
    r, c, s = np.eye(3), np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    r[a, a] = r[b, b] = c
    r[a, b], r[b, a] = -s, s
    return r


def acquire(folder, heights, turn=np.eye(3), tilt=0, drift=None, names=None, digits=None):
    """Slices at `heights` mm of the table, whose planes are tilted by `tilt` degrees against its way.

    `drift`: (n, 2) mm by which each slice's field of view is moved in its plane.
    """
    axes = turn @ rotation(0, tilt)            # columns: row, column direction, normal
    row, column = axes[:, 0], axes[:, 1]
    y, x = np.mgrid[:ROWS, :COLUMNS]
    for k, h in enumerate(heights):
        at = turn @ np.array([-18., -21, h])
        if drift is not None:
            at = at + drift[k][0]*column + drift[k][1]*row
        if digits is not None:
            at = np.round(at, digits)
        p = at + y[..., None]*PIXEL[0]*column + x[..., None]*PIXEL[1]*row
        A = np.eye(4)
        A[:3, 0], A[:3, 1], A[:3, 2], A[:3, 3] = axes[:, 2], column*PIXEL[0], row*PIXEL[1], at
        ds = dcmread(write_series(scene(p)[None], A, folder / '.one', uid='1.2.3', series=dict(
            GantryDetectorTilt=f'{tilt:.1f}', Manufacturer='SIEMENS', PixelRepresentation=1, RescaleIntercept=0)) / '1.dcm')
        ds.InstanceNumber, ds.SOPInstanceUID = k + 1, f"1.2.3.{k + 1}"
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.save_as(folder / f'{names[k] if names is not None else k + 1}.dcm')
    shutil.rmtree(folder / '.one')
    return folder


def said(volume):
    """The notes, but for those on values: a scene has no air."""
    return [n for n in volume.notes if not n.startswith('these may not be Hounsfield units')]


def judge(folder, volume, n=40, seed=0):
    """By how many HU random voxels of every slice, by their headers, differ from `volume` at the same millimetres.

    inf where the volume does not reach.
    """
    rng, mm, hu = np.random.default_rng(seed), [], []
    for path in sorted(folder.glob('*.dcm')):
        ds = dcmread(path)
        o, at = np.array(ds.ImageOrientationPatient, float).reshape(2, 3), np.array(ds.ImagePositionPatient, float)
        y, x = rng.integers(2, ds.Rows - 2, n), rng.integers(2, ds.Columns - 2, n)
        mm.append(at + np.outer(y, o[1])*ds.PixelSpacing[0] + np.outer(x, o[0])*ds.PixelSpacing[1])
        hu.append(ds.pixel_array[y, x]*float(ds.RescaleSlope) + float(ds.RescaleIntercept))
    mm, hu = np.concatenate(mm), np.concatenate(hu)
    index, last = (np.linalg.inv(volume.affine) @ np.c_[mm, np.ones(len(mm))].T)[:3], np.array(volume.shape)[:, None] - 1
    inside = ((index > -.1) & (index < last + .1)).all(0)
    found = map_coordinates(volume.hu.astype(float), np.clip(index, 0, last), order=1)
    return np.where(inside, np.abs(found - hu), np.inf)


EVEN = -1.2*np.arange(30)
HEAD = np.r_[-1.*np.arange(20), -19 - 2.3*np.arange(1, 13)]          # fine below the skull, coarse above
TOUCHING = np.r_[-1.*np.arange(20), -20.5 - 2*np.arange(12)]         # 1 mm thick, then 2 mm: the coarse ones lie on half steps of the fine
KINDS = dict(  # how it was acquired -> (arguments, largest error in HU, words of the notes)
    straight=(dict(heights=EVEN), .51, []),
    turned_head=(dict(heights=EVEN, turn=rotation(2, 12) @ rotation(1, 7)), .51, []),
    feet_first=(dict(heights=EVEN, turn=rotation(1, 180)), .51, []),
    prone=(dict(heights=EVEN, turn=rotation(2, 180)), .51, []),
    decubitus=(dict(heights=EVEN, turn=rotation(2, 90)), .51, []),
    sagittal=(dict(heights=EVEN, turn=np.array([(0, 0, 1.), (1, 0, 0), (0, -1, 0)])), .51, []),
    coronal=(dict(heights=EVEN, turn=np.array([(1., 0, 0), (0, 0, 1), (0, -1, 0)])), .51, []),
    tilted=(dict(heights=EVEN, tilt=17), 3, ['tilted gantry, 17.0 degrees: straightened']),
    tilted_back=(dict(heights=EVEN, tilt=-21.5), 3, ['tilted gantry, 21.5 degrees', '22 degrees off']),
    tilted_and_turned=(dict(heights=EVEN, tilt=12, turn=rotation(2, 9) @ rotation(1, 5)), 3, ['tilted gantry, 12.0']),
    tilted_prone=(dict(heights=EVEN, tilt=15, turn=rotation(2, 180)), 3, ['tilted gantry, 15.0']),
    tilted_feet_first=(dict(heights=EVEN, tilt=15, turn=rotation(1, 180)), 3, ['tilted gantry, 15.0']),
    out_of_line=(dict(heights=EVEN, drift=np.random.default_rng(0).uniform(-3, 3, (30, 2))), 4, ['out of line']),
    head=(dict(heights=HEAD), 12, ['uneven spacing: 1.00 to 2.30 mm; evened to 1.00 mm']),
    head_tilted=(dict(heights=HEAD, tilt=18), 12, ['tilted gantry, 18.0', 'uneven spacing']),
    touching=(dict(heights=TOUCHING), .51, ['uneven spacing: 1.00 to 2.00 mm; evened to 0.50 mm']),
    touching_tilted=(dict(heights=TOUCHING, tilt=-18), 3, ['tilted gantry, 18.0', 'uneven spacing']),
    jittered=(dict(heights=EVEN + np.random.default_rng(1).uniform(-.35, .35, 30)), 12, ['uneven spacing']),
    gap=(dict(heights=np.delete(EVEN, [7, 8])), .51, ['gap of 3.60 mm']),
    one_digit=(dict(heights=-.625*np.arange(40), digits=1), 3, []),
    one_digit_tilted=(dict(heights=-.625*np.arange(40), digits=1, tilt=18), 8, ['tilted gantry, 18']),
)
