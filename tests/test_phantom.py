"""Phantoms: the same seed gives the same bytes, the truth is where the picture shows it, bad requests are refused."""
import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import cspine.dataset
import cspine.phantom
from cspine.fractures import draw_fractured
from cspine.phantom import make_study, phantom
from cspine.presets import LEVELS, CspineError
from cspine.rsna import PREVALENCE, read_boxes, read_test, read_train


def digest(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(folder).rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return phantom(tmp_path_factory.mktemp('phantom') / 'a', train=2, test=1, size=64, seed=21)


def test_same_seed_same_bytes(data, tmp_path):
    again = phantom(tmp_path / 'b', train=2, test=1, size=64, seed=21, workers=1)
    assert digest(data) == digest(again)
    other = phantom(tmp_path / 'c', train=2, test=1, size=64, seed=22, workers=1)
    assert digest(other)['train.csv'] != digest(data)['train.csv']


def test_stopped_run_goes_on(data, tmp_path, monkeypatch):
    out, write, calls = tmp_path / 'd', cspine.phantom._write_study, []

    def failing(i, *args, **kw):
        calls.append(i)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(i, *args, **kw)

    monkeypatch.setattr(cspine.phantom, '_write_study', failing)
    with pytest.raises(KeyboardInterrupt):
        phantom(out, train=2, test=1, size=64, seed=21, workers=1)
    monkeypatch.setattr(cspine.phantom, '_write_study', write)
    assert digest(phantom(out, train=2, test=1, size=64, seed=21, workers=1)) == digest(data)


def test_tables(data):
    train, test, boxes = read_train(data / 'train.csv'), read_test(data / 'test.csv'), read_boxes(data / 'train_bounding_boxes.csv')
    assert len(train) == 2 and len(test) == 8 and len(read_train(data / 'test_truth.csv')) == 1
    assert (train.patient_overall == train[list(LEVELS)].max(axis=1)).all()
    assert set(boxes.StudyInstanceUID) <= set(train.index)
    kinds = pd.read_csv(data / 'fractures.csv')
    for uid, row in train.iterrows():
        assert set(kinds[kinds.StudyInstanceUID == uid].level) == {v for v in LEVELS if row[v]}


def test_two_fractures_with_one_box(tmp_path):
    box = ('1.2', 3, 4, 5, 6, 7)
    done = [dict(uid='1.2', split='train', truth=[0]*8, boxes=[box, (*box[:5], 8), box])]
    cspine.dataset._write_tables(tmp_path, done, {})
    assert pd.read_csv(tmp_path / 'train_bounding_boxes.csv').slice_number.tolist() == [7, 8]


def test_fracture_truth_is_where_the_bone_is_broken():
    study = make_study((5, 1), 192, fractured=[0, 0, 0, 0, 1, 0, 0])
    assert study.fractured.tolist() == [False] * 4 + [True] + [False] * 2
    assert set(study.fractures.level) == {'C5'} and len(study.boxes)
    c5 = np.zeros(study.labels.shape, bool)
    for b in study.boxes.itertuples():
        inside = np.s_[b.slice_number - 1, b.y:b.y + b.height, b.x:b.x + b.width]
        assert (study.labels[inside] == 5).any(), 'a box of truth without C5 in it'
        c5[inside] = True
    whole = make_study((5, 1), 192, fractured=np.zeros(7, bool))
    assert not whole.fractured.any() and not len(whole.boxes) and not len(whole.fractures)


def test_geometry_is_axial_head_first():
    study = make_study((5, 2), 96)
    a = study.volume.affine
    assert a[2, 0] < 0 < min(a[1, 1], a[0, 2]) and np.count_nonzero(a[:3, :3]) == 3
    centre = [np.argwhere(study.labels == k).mean(0) for k in range(1, 9)]
    assert all(p[0] < q[0] for p, q in zip(centre, centre[1:]))
    spinous = np.argwhere(study.labels == 7)[:, 1]
    body = np.argwhere((study.labels == 7))[:, 1].min()
    assert spinous.max() * a[1, 1] - body * a[1, 1] > 30, "C7's spinous process points to the back, a long way"


def test_prevalence():
    rng = np.random.default_rng(3)
    draws = np.array([draw_fractured(rng) for _ in range(8000)])
    assert abs(draws.any(1).mean() - PREVALENCE.patient_overall) < .03
    assert np.abs(draws.mean(0) - PREVALENCE[list(LEVELS)]).max() < .02


@pytest.mark.parametrize('wrong', [dict(train=0, test=0), dict(size=8), dict(seed=-1), dict(train=-1)])
def test_bad_requests_are_refused(wrong, tmp_path):
    with pytest.raises(CspineError):
        phantom(tmp_path / 'x', **{**dict(train=1, test=0, size=64, seed=1), **wrong})
    assert not (tmp_path / 'x').exists()


def test_a_damaged_note_of_an_earlier_run(tmp_path):
    for text in ('{"asked": {', '[1]', '{}'):
        (tmp_path/'phantom.json').write_text(text)
        with pytest.raises(CspineError, match='is damaged'): phantom(tmp_path, train=1, test=0, size=32)


def test_foreign_folder_is_left_alone(data, tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    with pytest.raises(CspineError, match='something else'):
        phantom(tmp_path, train=1, test=0, size=64, seed=1)
    with pytest.raises(CspineError, match='already holds phantoms'):
        phantom(data, train=1, test=0, size=64, seed=1)
