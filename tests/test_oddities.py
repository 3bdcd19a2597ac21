"""Every oddity of the list, in several syntaxes: what is read is what was written, and a mask on the slices finds its place."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scenes import judge
from scipy.ndimage import map_coordinates
from test_dicom import block

from cspine.ctfile import SYNTAXES
from cspine.dicom import DicomError, read_series
from cspine.oddities import ODDITIES, acquire, write_odd
from cspine.rsna import read_mask, write_mask

CHANGED = dict(tilted='resampled', uneven='filled', gap='filled', damaged_slice='filled', padding='air', no_positions='origin')


@pytest.fixture(scope='module')
def neck():
    "A column that leans, in 24 slices, and its labels."
    z, y, x = np.indices((24, 40, 36))
    labels = (np.hypot(y - 20 - z/4, x - 17) < 7)*(1 + z//4).clip(0, 7)
    hu = np.where(labels, 500 + 40*labels, 30) + 3*y - 2*x
    hu[np.hypot(y - 20, x - 18) > 19] = -1000
    return hu.astype('i2'), block()[1], labels.astype('u1')


@pytest.mark.parametrize('syntax', ['explicit', 'jpeg_lossless', 'rle', 'jpegls'])
@pytest.mark.parametrize('name', ODDITIES)
def test_what_is_odd_is_read_and_said(tmp_path, neck, name, syntax):
    hu, affine, _ = neck
    odd = ODDITIES[name]
    volume = read_series(write_odd(hu, affine, tmp_path / 's', name, uid='1.2.3', syntax=syntax, seed=4))
    assert any(odd.gives in n for n in volume.notes) if odd.gives else volume.notes == [], volume.notes
    assert volume.uid == ('ct' if name == 'nifti' else '1.2.3')
    how = CHANGED.get(name)
    if how in ('origin', None):
        assert (volume.hu == hu).all() and (how or np.allclose(volume.affine, affine, atol=.06))
    if how == 'air':
        assert (volume.hu == hu)[volume.hu != -1024].all() and (volume.hu == -1024).sum() > 100
    if how == 'filled':
        n = len(volume.hu)
        assert n >= 22 and np.abs(volume.hu.astype(int) - hu[:n]).mean() < 25 and (volume.hu == hu[:n]).all((1, 2)).sum() >= 16
    if how == 'resampled':
        assert volume.shape != hu.shape
        z, y, x = (a.ravel() for a in np.mgrid[6:18, 10:32, 8:28])  # the same places in the patient
        there = np.linalg.inv(volume.affine) @ affine @ np.stack([z, y, x, np.ones_like(z)])
        assert np.abs(map_coordinates(volume.hu.astype(float), there[:3], order=1) - hu[z, y, x]).mean() < 25
        if syntax in ('explicit', 'rle'):  # the judge reads with pydicom alone, which decodes no others
            assert np.median(judge(tmp_path / 's', volume)) < 6


@pytest.mark.parametrize('name', [n for n in ODDITIES if n not in ('no_positions', 'nifti')])
def test_a_mask_on_the_slices_finds_its_place(tmp_path, neck, name):
    hu, affine, labels = neck
    volume = read_series(write_odd(hu, affine, tmp_path / 's', name))
    drawn, A, _ = acquire(labels, affine, name, order=0)
    mask = read_mask(write_mask(drawn, A, tmp_path / 'm.nii'), volume)
    assert mask.shape == volume.shape
    if volume.shape == labels.shape and name not in ('gap', 'uneven'):
        assert (mask == labels).all()
    bone, other = volume.hu[mask > 0], volume.hu[(mask == 0) & (volume.hu > -500)]
    assert (bone > 400).mean() > .9 and (other < 400).mean() > .97


def test_the_list_in_the_notebook_is_complete():
    nb = json.loads((Path(__file__).parents[1] / 'nbs' / '01_oddities.ipynb').read_text(encoding='utf-8'))
    page = ''.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')
    rows = re.findall(r'^\| `(.*)` \| (.*) \| (.*) \|$', page, re.M)
    assert rows == [(name, o.what, o.gives or 'nothing') for name, o in ODDITIES.items()]


def test_a_name_that_is_none():
    with pytest.raises(DicomError, match="'bent' is no oddity; one of: shuffled_names, feet_first"):
        acquire(np.zeros((2, 3, 4), 'i2'), np.eye(4), 'bent')


def test_the_same_seed_gives_the_same_bytes(tmp_path, neck):
    for name in ODDITIES:
        a, b, c = (write_odd(*neck[:2], tmp_path / f'{name}{i}', name, uid='1.2.3', seed=s) for i, s in enumerate((1, 1, 2)))
        files = [{str(p.relative_to(f)): p.read_bytes() for p in f.rglob('*') if p.is_file()} for f in (a, b, c)]
        assert files[0] == files[1], name
        if name in ('damaged_slice', 'overlay', 'shuffled_names', 'enhanced'): assert files[0] != files[2], name


def test_every_oddity_can_be_written_in_every_syntax(tmp_path, neck):
    hu, affine, _ = neck
    rarest = 'big_endian', 'jpeg_baseline'   # bytes turned round; eight bits
    for name in ODDITIES:
        for syntax in SYNTAXES if name in ('padding', 'screenshot') else rarest:
            folder = write_odd(hu[::2], affine @ np.diag([2, 1, 1, 1]), tmp_path / name / syntax, name, syntax=syntax, seed=4)
            assert read_series(folder).hu.max() > 300, (name, syntax)
