"""What public bug reports describe is read right and said, or refused in a sentence: each condition of conditions.py."""
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from conditions import CONDITIONS, neck

from test_ctfile import mutated

from cspine.dicom import DicomError, read_series


@pytest.fixture(scope='module')
def scan(): return neck()


@pytest.mark.parametrize('name', CONDITIONS)
def test_it_is_read_right_and_said(tmp_path, scan, name, capfd):
    write, says = CONDITIONS[name]
    hu, affine = scan
    right = write(tmp_path, hu, affine)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        if says.startswith('error: '):
            with pytest.raises(DicomError, match=says.removeprefix('error: ')): read_series(tmp_path)
            return
        volume = read_series(tmp_path)
    if right is None: right = hu
    notes = ' | '.join(volume.notes)
    assert says in notes if says else not volume.notes, notes
    if isinstance(right, np.ndarray):
        other = np.roll(right, 4, axis=2)[:-1]   # of two volumes either is right
        assert any(volume.hu.shape == r.shape and (volume.hu == r).all() for r in ([right, other] if name.startswith('two volumes') else [right])), (volume.hu.shape, notes)
    assert capfd.readouterr() == ('', '')


def test_four_thousand_mutated_files_of_these_kinds(tmp_path, scan):
    "One file of each condition, small: each mutation of it is read or refused by our own error."
    hu, affine = scan
    for k, (write, _) in enumerate(CONDITIONS.values()):
        folder = tmp_path/f'{k}'
        folder.mkdir()
        write(folder, hu[:, ::6, ::6], affine)
        for p in sorted(folder.rglob('*.dcm'))[:1]: p.rename(tmp_path/f'{k:03}.seed')
    ends = mutated(tmp_path, 4000)
    assert 'shape' not in ends and min(ends['read'], ends['refused'], ends['damaged']) > 300 and sum(ends.values()) >= 4000


def test_the_page_of_oddities_lists_them():
    page = json.loads((Path(__file__).parents[1]/'nbs/01_oddities.ipynb').read_text(encoding='utf-8'))
    rows = [line.split(' | ')[0].removeprefix('| ') for c in page['cells'] for line in ''.join(c['source']).splitlines() if line.startswith('| ')]
    assert not [name for name in CONDITIONS if name not in rows]
