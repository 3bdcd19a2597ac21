"""DICOM's own geometry is the judge: a voxel of a slice, at the millimetres that its header gives, found again in the volume."""
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from scenes import COLUMNS, EVEN, KINDS, ROWS, acquire, judge, said

from cspine.acquired import even_grid, lay_out
from cspine.dicom import DicomError, Volume, read_series, write_series
from cspine.rsna import read_mask, write_mask

sys.path.insert(0, str(Path(__file__).parents[1] / 'scripts'))


@pytest.mark.parametrize('kind', KINDS)
def test_every_voxel_lies_where_its_header_says(tmp_path, kind):
    how, error, words = KINDS[kind]
    names = np.random.default_rng(5).permutation(len(how['heights']))
    folder = acquire(tmp_path, **how, names=names)
    volume = read_series(folder)
    assert len(said(volume)) == len(words) and all(any(w in n for n in said(volume)) for w in words), said(volume)
    off = judge(folder, volume)
    assert (off <= error).mean() > .999 and np.median(off) <= error/4, ((off <= error).mean(), off.max(), np.median(off))
    if error < 1 and kind not in ('gap', 'touching'):  # not one value changed
        stored = sorted(dcmread(p).pixel_array.tobytes() for p in folder.glob('*.dcm'))
        a = volume.acquired
        assert a.shape == (len(a.at), ROWS, COLUMNS) and (a.at % 1 == 0).all() and not a.shift.any() and len(stored) == len(a.at)
    # axial, head first, and a straight grid
    A = volume.affine[:3, :3]/volume.spacing
    assert np.allclose(A.T @ A, np.eye(3), atol=1e-3)
    assert all(np.abs(A[:, i]).argmax() == 2 - i for i in range(3)) and A[2, 0] < 0 < A[1, 1] and A[0, 2] > 0


@pytest.mark.parametrize('kind', ['tilted', 'tilted_and_turned', 'gap', 'straight'])
def test_left_as_it_is_where_asked(tmp_path, kind):
    how, _, words = KINDS[kind]
    folder = acquire(tmp_path, **how)
    volume = read_series(folder, straighten=False)
    assert judge(folder, volume).max() < .51 and len(said(volume)) == len(words)   # the affine is sheared, the values are the files'
    assert all('sheared' in n for n in said(volume) if 'tilted' in n)
    stacked = read_series(folder, straighten=False, even=False)
    stored = {int(dcmread(p).pixel_array.sum()) for p in folder.glob('*.dcm')}
    assert len(stacked.hu) == len(stored) and {int(z.sum(dtype=int)) for z in stacked.hu} == stored


def test_a_damaged_slice_of_an_uneven_tilted_series(tmp_path):
    how, error, _ = KINDS['head_tilted']
    folder = acquire(tmp_path, **how)
    path = folder / '9.dcm'
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    volume = read_series(folder)
    assert '1 damaged slice filled from the neighbours: 9.dcm is cut off' in said(volume)
    path.write_bytes(whole)
    assert judge(folder, volume).max() < 60  # over two steps, not one


def test_a_gap_that_is_too_long_is_not_filled(tmp_path):
    folder = acquire(tmp_path, np.r_[EVEN, -90 - 1.2*np.arange(12)])
    volume = read_series(folder)
    assert len(volume.hu) == 30 and said(volume) == ['a gap of 55 mm is too long to fill; kept the 30 slices from 30.dcm to 1.dcm, left out 12 beyond it']
    assert len(read_series(folder, even=False).hu) == 42


def test_slices_that_jump_aside_are_another_block(tmp_path):
    drift = np.zeros((30, 2))
    drift[20:, 0] = 60
    folder = acquire(tmp_path, EVEN, drift=drift)
    volume = read_series(folder)
    assert said(volume) == ['slices jump aside after 21.dcm; kept the 20 slices from 20.dcm to 1.dcm, left out 10 beyond it']
    for k in range(21, 31): (folder/f'{k}.dcm').unlink()
    assert judge(folder, volume).max() < .51


def test_two_series_in_one_do_not_make_a_thousand_slices():
    heights = np.cumsum(np.tile([.1, .9], 150))  # a tenth of a millimetre apart
    dz, at = even_grid(heights)
    assert .45 < dz < .55 and at[-1] < 310 and np.abs(at*dz - heights + heights[0]).max() < .08  # written with one digit


def test_slices_all_over_the_place_are_not_straightened(tmp_path):
    drift = np.random.default_rng(0).uniform(-200, 200, (30, 2))
    volume = read_series(acquire(tmp_path, EVEN, drift=drift))
    assert volume.shape == (30, ROWS, COLUMNS) and 'not straightened, they lie too far from each other' in said(volume)[0]


@pytest.mark.parametrize('kind', ['tilted', 'head', 'head_tilted', 'gap', 'out_of_line', 'sagittal', 'tilted_prone'])
def test_a_mask_and_a_box_on_the_slices_find_their_place(tmp_path, kind):
    how, _, _ = KINDS[kind]
    folder = acquire(tmp_path, **how)
    volume, stacked = read_series(folder), read_series(folder, straighten=False, even=False)
    labels = np.zeros(stacked.shape, np.uint8)
    centre = [s//2 for s in stacked.shape]
    labels[tuple(slice(c - 4, c + 4) for c in centre)] = 3
    labels[tuple(slice(c + 5, c + 8) for c in centre)] = 9
    A, a = stacked.affine.copy(), volume.acquired
    if kind in ('head', 'head_tilted', 'gap'):   # as others write it: the first slice, and the mean of the steps
        run = stacked.acquired.grids
        assert len(run) == 2
        A = read_as_others(stacked)
    got = read_mask(write_mask(labels, A, tmp_path / 'm.nii'), volume)
    assert got.shape == volume.shape and set(np.unique(got)) == {0, 3, 8}
    # each voxel of the mask has the HU of its slice under it
    under = volume.hu[got == 3].mean(), stacked.hu[labels == 3].mean()
    assert abs(under[0] - under[1]) < 25, under
    # a box on one slice holds what was drawn there
    k = len(a.at)//2
    drawn = np.zeros((len(a.at), ROWS, COLUMNS), np.uint8)
    drawn[k, 10:20, 30:37] = 1
    z0, z1, y0, y1, x0, x1 = a.box(a.names[k], (10, 20), (30, 37))
    there = np.argwhere(a.labels(drawn))
    assert (there.min(0) >= (z0, y0, x0)).all() and (there.max(0) < (z1, y1, x1)).all() and len(there) >= 70
    assert (z1 - z0)*(y1 - y0)*(x1 - x0) <= 1.5*len(there) and a.box('nowhere.dcm', (0, 1), (0, 1)) is None


def read_as_others(stacked):
    "The affine of the stack in standard axes with the mean distance of its slices."
    from cspine.acquired import standardize
    a = stacked.acquired
    mean = max(a.grids, key=lambda g: np.linalg.norm(g[:3, 0]))
    return standardize(mean, a.shape)[0]


def test_a_box_on_every_orientation(tmp_path):
    hu = np.zeros((5, 6, 7), 'i2')
    hu[1, 2:4, 3:6] = 500
    for order in itertools.permutations(range(3)):
        for flip in itertools.product((1, -1), repeat=3):
            A = np.zeros((4, 4))
            A[3, 3] = 1
            for i, o in enumerate(order):
                A[o, i] = flip[i]*(.5 + .1*i)
            name = ''.join(map(str, (*order, *flip)))
            if np.linalg.det(A[:3, :3]) > 0:  # rows and columns may not be mirrored: DICOM has no left-handed slices
                A[:3, 0] *= -1
            volume = read_series(write_series(hu, A, tmp_path / name))
            z0, z1, y0, y1, x0, x1 = volume.acquired.box('2.dcm', (2, 4), (3, 6))
            box = np.zeros(volume.shape, bool)
            box[z0:z1, y0:y1, x0:x1] = True
            assert (box == (volume.hu == 500)).all(), name


@pytest.mark.parametrize('kind', [k for k, (_, error, _) in KINDS.items() if error < 1 and k not in ('gap', 'touching')])
def test_second_opinions_agree_where_slices_are_straight_and_even(tmp_path, kind):
    "Where they do not agree, scripts/second_opinions.py shows who is right."
    from second_opinions import READERS
    acquire(tmp_path, **KINDS[kind][0])
    assert set(READERS) == {'cspine', 'SimpleITK', 'dcm2niix'}
    for name, read in READERS.items():
        assert judge(tmp_path, read(tmp_path)).max() < .51, name


def test_a_volume_that_was_made_otherwise_still_takes_masks(tmp_path):
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[1, 2, 3] = 2
    assert (read_mask(write_mask(labels, np.diag([-1., 1, 1, 1])[:, [2, 1, 0, 3]], tmp_path / 'm.nii'),
                      Volume(np.zeros((4, 5, 6), 'i2'), np.diag([-1., 1, 1, 1])[:, [2, 1, 0, 3]])) == labels).all()


def test_moving_a_slice_makes_no_new_extremes():
    positions = np.outer(np.arange(9), [0, .1, 1.2])
    a, _, _ = lay_out([f'{k}.dcm' for k in range(9)], positions, (1, 0, 0, 0, 1, 0), (.5, .5), (20, 20))
    frame = np.zeros((20, 20), 'i2')
    frame[8:12, 8:12] = 3000  # metal
    moved = [a.place(frame, k) for k in range(9) if (a.shift[k] % 1).any()]
    assert moved and all(set(np.unique(m[m < 0])) <= {-1024} and m.max() <= 3000 for m in moved)


def test_a_volume_that_would_be_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('cspine.dicom._VOXELS', 1000)
    with pytest.raises(DicomError, match='12 x 5 x 20 voxels, more than 1,000; give a folder with fewer slices'):
        read_series(write_series(np.zeros((12, 5, 20), 'i2'), np.diag([-1., 1, 1, 1])[:, [2, 1, 0, 3]], tmp_path))
