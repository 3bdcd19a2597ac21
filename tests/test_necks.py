"""Necks: kinds, decoys, options, scanners, odd folders; what holds for every data set is in test_phantom."""
from dataclasses import fields, replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from cspine.anatomy import Prevalence, _evaluate, _spine
from cspine.ctfile import LOSSY, SYNTAXES
from cspine.dicom import read_series, write_series
from cspine.fractures import DECOYS, KINDS, _decoys_of, _fractures_of, _warp, decoy, fracture, kinds_of
from cspine.neck import _both
from cspine.oddities import ODDITIES
from cspine.phantom import _draw_files, _kernel, _noise_tiles, make_study, phantom
from cspine.presets import LEVELS, CspineError
from cspine.rsna import read_boxes, read_mask, read_train

QUIET = dict(fov=170, dz=.8, thickness=.8, blur=.3, overshoot=.3, noise=0)
BROKEN = (dict(C1='jefferson', C2='dens type II', C4='burst', C6='facet', C7='spinous process'),
          dict(C1='posterior arch', C2='hangman', C3='compression', C5='lamina', C7='transverse process'),
          dict(C1='lateral mass', C2='body', C5='pedicle'))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return phantom(tmp_path_factory.mktemp('phantom') / 'a', train=2, test=1, size=64, seed=21, odd=0)


def within(boxes, shape, grow=3, deep=0):
    """Where boxes of truth (a row a slice) or of a table (x0 ... z1) lie, grown by what the kernel spreads, and `deep` slices along z."""
    out = np.zeros(shape, bool)
    for b in boxes.itertuples():
        if hasattr(b, 'slice_number'): z0, z1, y0, y1, x0, x1 = b.slice_number - 1, b.slice_number, b.y, b.y + b.height, b.x, b.x + b.width
        else: z0, z1, y0, y1, x0, x1 = b.z0, b.z1, b.y0, b.y1, b.x0, b.x1
        out[max(z0 - deep, 0):z1 + deep, max(y0 - grow, 0):y1 + grow, max(x0 - grow, 0):x1 + grow] = True
    return out


@cache
def whole(seed, **prevalence):
    return make_study((11, seed), 192, fractured=np.zeros(7), scan=QUIET, prevalence=Prevalence.none(**prevalence))


@pytest.mark.parametrize('number', range(len(BROKEN)))
def test_a_fracture_is_dark_or_moved_inside_its_box_and_nowhere_else(number):
    kinds = BROKEN[number]
    study, before = make_study((11, number), 192, kinds=kinds, scan=QUIET, prevalence=Prevalence.none()), whole(number)
    assert dict(zip(study.fractures.level, study.fractures.kind)) == kinds and len(study.fractures) == len(kinds)
    change = study.volume.hu.astype(int) - before.volume.hu
    outside = ~within(study.boxes, change.shape, deep=4)   # there is no box where the bone went away, up to 3.2 mm
    assert np.abs(change[outside]).max() <= 3, 'a fracture changed what lies outside its boxes'
    for b in study.boxes.itertuples():
        assert study.labels[b.slice_number-1, b.y:b.y+b.height, b.x:b.x+b.width].any(), 'a box without bone'
    for row in study.fractures.itertuples():
        box = np.s_[row.z0:row.z1, row.y0:row.y1, row.x0:row.x1]
        bone = before.labels[box] == LEVELS.index(row.level) + 1
        assert change[box][bone].min() < -80, f'{row.level} {row.kind}: nothing is darker'
    assert np.abs(study.labels.astype(int) - before.labels)[outside].max() == 0


@pytest.mark.parametrize('number', range(len(BROKEN)))
def test_a_gap_is_dark_where_nothing_moved(number, monkeypatch):
    def still(bone, kind, rng):
        lesion = fracture(bone, kind, rng, 'gap')
        return replace(lesion, moves=[], cuts=[replace(c, shift=np.zeros(3), dense=0.) for c in lesion.cuts])
    monkeypatch.setattr('cspine.phantom.fracture', still)
    study, before = make_study((11, number), 192, kinds=BROKEN[number], scan=QUIET, prevalence=Prevalence.none()), whole(number)
    assert (study.labels == before.labels).all(), 'a gap belongs to its vertebra'
    change = study.volume.hu.astype(int) - before.volume.hu
    for r in study.fractures.itertuples():
        assert r.displacement_mm == 0 and change[r.z0:r.z1, r.y0:r.y1, r.x0:r.x1].min() < -120, f'{r.level} {r.kind}'


@pytest.mark.parametrize('seed', [0, 6, 15])   # these once had loose pieces: tips of C1, C2, the spinous process of C5
def test_what_is_not_broken_is_in_one_piece(seed):
    study, n = make_study((77, seed), 192, fractured=np.zeros(7)), 0
    mm3 = np.prod(study.volume.spacing)
    for k in range(1, 8):
        bone = study.labels == k
        if _touches_the_rim(bone): continue
        pieces = np.sort(np.bincount(ndimage.label(bone)[0].ravel())[1:])*mm3
        n += 1
        assert (pieces[:-1] < 30).all(), f'C{k}: {pieces.round()} mm3'
    assert n >= 5


def _touches_the_rim(bone): return not bone.any() or any(bone.take((0, -1), axis).any() for axis in range(3))


@pytest.mark.parametrize('level, kind', [('C2', 'hangman'), ('C7', 'spinous process')])
def test_a_fragment_that_moved_away_leaves_a_gap(level, kind):
    "Walking through the cut, there is no bone for as long as the fragment moved, not bone that was stretched."
    box, still = (np.array([-60., -60, -60]), np.array([60., 110, 60])), dict(degenerative=False, turned=False, tilted=False, large=False)
    for seed in range(4):
        bone = _spine(np.random.default_rng([seed, 3]), 1., still)[0][level]
        lesion = fracture(bone, kind, np.random.default_rng([seed, 9]), 'displaced')
        field, cut = _evaluate(bone.shapes, np.eye(3), np.zeros(3), box, .5, waves=bone.waves, warp=_warp([lesion]), pad=6), lesion.cuts[-1]
        p = cut.centre + cut.normal*np.arange(-9, 9, .1)[:, None]
        at = [(field.first[0] - p[:, 2])/.5, (p[:, 1] - field.first[1])/.5, (p[:, 0] - field.first[2])/.5]
        distance, (away, half, _) = ndimage.map_coordinates(field.values, at, order=1), cut.gape(*p.T)
        empty = ndimage.label((distance > 0) | (away < half))[0]
        middle = empty[np.abs(away).argmin()]
        forwards = dict((m, mm) for m, mm, _ in lesion.moves).get('slide', 0)*abs(cut.normal[1])
        assert middle and (empty == middle).sum()*.1 > .8*(max(cut.opening, forwards) + cut.gap), (seed, lesion.displacement)


@pytest.mark.parametrize('seed, scale', [(0, .98), (3, .9), (6, 1.05), (1, 1.15), (9, .7), (5, .55)])
def test_neighbours_keep_apart_and_face_each_other(seed, scale):
    "A joint space between the facets, discs between the bodies, nothing loose; in children, worn and turned necks, too."
    spine, _ = _spine(np.random.default_rng([seed, 3]), scale, dict(degenerative=seed % 3 == 0, turned=seed == 1, tilted=seed == 5))
    bounds, step = (np.array([-80., -110, -70]), np.array([80., 110, 170])), .85
    first, before = (bounds[1][2], bounds[0][1], bounds[0][0]), None
    for name, v in spine.items():
        field = _evaluate(v.shapes, v.R, v.c, bounds, step, waves=v.waves)
        pieces = np.sort(np.bincount(ndimage.label(field.values < 0)[0].ravel())[1:])*step**3
        if name != 'T3': assert pieces[:-1].sum() < 3, f'{name}: {pieces.round()} mm3'
        grid = np.full(np.ceil((bounds[1] - bounds[0])/step).astype(int)[::-1] + 3, 9, 'f4')
        part, values = _both(field, first, grid); part[:] = values
        if before is not None:
            both = np.maximum(grid, before)                                      # half the distance between them, in the middle
            assert (both < 0).sum()*step**3 < 3, f'{name} and what lies above it'
            assert 2*both.min() < 3.2, f'{name} and what lies above it are far apart'
        before = grid


@pytest.mark.parametrize('seed', range(4))
def test_a_ring_that_spreads_is_not_stretched(seed):
    "Beyond its cuts bone moves as a whole; where it came from nothing is left."
    box, still = (np.array([-60., -60, -30]), np.array([60., 60, 30])), dict(degenerative=False, turned=False, tilted=False)
    bone = _spine(np.random.default_rng([seed, 3]), 1., still)[0]['C1']
    lesion = fracture(bone, 'jefferson', np.random.default_rng([seed, 9]), 'displaced')
    at = dict(R=np.eye(3), c=np.zeros(3), bounds=box, step=.6, waves=bone.waves, pad=6)
    whole, moved = (_evaluate(bone.shapes, warp=w, **at).values < 0 for w in (None, _warp([lesion])))
    assert abs(moved.sum()/whole.sum() - 1) < .025
    pieces = np.bincount(ndimage.label(moved)[0].ravel())[1:]*.6**3
    assert lesion.displacement >= 1.5 and (pieces > 300).sum() == 1 + len(lesion.moves) + (len(lesion.cuts) == 4)
    for move, mm, (side, *_) in lesion.moves:
        came, went = ((np.argwhere(x.any((0, 1)))*side).max()*.6 for x in (whole, moved))
        assert move == 'spread' and went - came == pytest.approx(mm, abs=.7), 'the tip of a transverse process'


def test_every_kind_is_tried():
    assert {k for kinds in BROKEN for k in kinds.values()} == set(KINDS.index)


def test_a_displaced_fracture_moves_bone():
    spine, _ = _spine(np.random.default_rng(1), 1., dict(degenerative=False, turned=False, tilted=False))
    points = np.random.default_rng(2).uniform(-15, 15, (3, 5000)).astype('f4')
    for level in LEVELS:
        for kind in kinds_of(level).index:
            for grade, (low, high) in dict(hairline=(0, .7), displaced=(.3, 9)).items():
                found = [fracture(spine[level], kind, np.random.default_rng(s), grade) for s in range(4)]
                if kind not in ('compression', 'burst'): assert all(f.displacement <= high for f in found), (kind, grade)
                assert all(f.displacement >= low for f in found) and all(f.gap >= .2 for f in found), (kind, grade)
    dens = fracture(spine['C2'], 'dens type II', np.random.default_rng(0), 'displaced')
    moved = np.linalg.norm(np.array(dens.warp(*points)) - points, axis=0)
    assert moved.max() == pytest.approx(dens.displacement, abs=.01), 'the dens moves'
    below = np.array([[0, 0, -5], [14, 14, -4], [0, 30, 9], [25, 5, 0]], 'f4').T + spine['C2'].m['h']*np.array([[0], [0], [.5]], 'f4')
    assert not (np.array(dens.warp(*below)) - below).any(), 'the body and what lies behind the canal stay'


def test_truth_table_and_boxes_agree():
    study = make_study((11, 0), 192, kinds=BROKEN[0], scan=QUIET, prevalence=Prevalence.none())
    f, b = study.fractures, study.boxes
    assert (f.StudyInstanceUID == study.volume.uid).all() and (b.StudyInstanceUID == study.volume.uid).all()
    table, rows = within(f, study.labels.shape, 0), within(b, study.labels.shape, 0)
    assert (rows & ~table).sum() == 0, 'a box that no fracture explains'
    for r in f.itertuples():
        inside = b[(b.slice_number > r.z0) & (b.slice_number <= r.z1) & (b.x >= r.x0) & (b.x + b.width <= r.x1) & (b.y >= r.y0) & (b.y + b.height <= r.y1)]
        assert (inside.slice_number.min(), inside.slice_number.max()) == (r.z0 + 1, r.z1)
        assert (inside.x.min(), (inside.x + inside.width).max(), inside.y.min(), (inside.y + inside.height).max()) == (r.x0, r.x1, r.y0, r.y1)
        assert (r.width_mm, r.height_mm) == (pytest.approx((r.x1 - r.x0)*170/192, abs=.1), pytest.approx((r.z1 - r.z0)*.8, abs=.1))
        label = LEVELS.index(r.level) + 1
        assert (study.labels[r.z0:r.z1, r.y0:r.y1, r.x0:r.x1] == label).any()


def test_decoys_are_no_fractures():
    everything = dict(nutrient_canal=1, healed=1, limbus=1, os_odontoideum=1, cleft=1)
    study, before = whole(0, **everything), whole(0)
    assert not study.fractured.any() and not len(study.fractures) and not len(study.boxes)
    assert set(study.decoys.kind) == set(DECOYS) and not len(before.decoys)
    change = study.volume.hu.astype(int) - before.volume.hu
    assert np.abs(change[~within(study.decoys, change.shape)]).max() <= 3
    for r in study.decoys.itertuples():
        box = np.s_[r.z0:r.z1, r.y0:r.y1, r.x0:r.x1]
        change_here = change[box] if r.kind != 'healed' else -change[box]       # healed bone is denser, the others are dark lines
        assert change_here.min() < -80, r.kind


def test_an_old_gap_has_a_cortex_and_a_fresh_one_has_none():
    spine, _ = _spine(np.random.default_rng(1), 1., dict(degenerative=False, turned=False, tilted=False))
    for kind, level in (('limbus', 'C4'), ('os odontoideum', 'C2'), ('cleft', 'C1'), ('healed', 'C5')):
        assert not any(c.fresh for c in decoy(spine[level], kind, np.random.default_rng(0)).cuts)
    assert all(c.fresh for level in LEVELS for kind in kinds_of(level).index for c in fracture(spine[level], kind, np.random.default_rng(0)).cuts)


def likely(count, n, p):
    """A count within four standard deviations of a binomial's mean."""
    return abs(count - n*p) <= 4*np.sqrt(n*p*(1 - p)) + 1e-9


def test_options_and_decoys_come_as_often_as_they_should():
    p, rng, n = Prevalence(), np.random.default_rng(5), 1500
    drawn = pd.DataFrame([p.draw(rng, [f.name for f in fields(p)]) for _ in range(n)])
    assert all(likely(drawn[f.name].sum(), n, getattr(p, f.name)) for f in fields(p))
    spine, _ = _spine(rng, 1., dict(degenerative=False, turned=False, tilted=False))
    found = pd.Series([f'{v.name} {d.kind}' for s in range(n) for v in (spine['C1'], spine['C2'], spine['C5']) for d in _decoys_of(v, np.random.default_rng(s), p)]).value_counts()
    for kind, level in (('cleft', 'C1'), ('os odontoideum', 'C2'), ('limbus', 'C5'), ('nutrient canal', 'C5'), ('healed', 'C1'), ('healed', 'C2'), ('healed', 'C5')):
        assert likely(found.pop(f'{level} {kind}'), n, getattr(p, kind.replace(' ', '_'))), (level, kind)
    assert not len(found), f'where they do not belong: {found}'


@pytest.mark.parametrize('level', ['C1', 'C2', 'C4', 'C7'])
def test_kinds_come_as_often_as_they_should(level):
    spine, _ = _spine(np.random.default_rng(1), 1., dict(degenerative=False, turned=False, tilted=False))
    first = pd.Series([_fractures_of(spine[level], np.random.default_rng(s))[0].kind for s in range(800)]).value_counts()
    want = kinds_of(level)
    assert want.sum() == pytest.approx(1) and set(first.index) <= set(want.index)
    assert all(likely(first.get(k, 0), 800, p) for k, p in want.items())


def test_some_kinds_are_commoner_than_others():
    assert kinds_of('C2').idxmax() == 'dens type II' and kinds_of('C7').idxmax() == 'spinous process'
    assert kinds_of('C7')['spinous process'] > 1.5*kinds_of('C4')['spinous process']
    with pytest.raises(CspineError, match='no cervical level'): kinds_of('T1')


def test_syntaxes_matrices_and_oddities():
    drawn = pd.DataFrame([_draw_files(1, i, 256, .15) for i in range(6000)], columns=['size', 'syntax', 'oddity'])
    share = drawn.syntax.value_counts(normalize=True)
    assert set(share.index) == set(SYNTAXES), 'every transfer syntax of the writer occurs'
    assert share.explicit > .5 and .02 < share[share.index.isin(LOSSY)].sum() < .06
    size = drawn['size'].value_counts(normalize=True)
    assert set(size.index) == {256, 192, 320} and size[256] > .9
    odd = drawn.oddity.value_counts(normalize=True)
    assert set(odd.index) == {'', *ODDITIES} - {'no_positions'} and .83 < odd[''] < .87 and odd.iloc[1:].max() < 3*odd.min()
    assert {_draw_files(1, i, 256, 0)[2] for i in range(50)} == {''} and '' not in {_draw_files(1, i, 256, 1)[2] for i in range(50)}
    assert _draw_files(1, 7, 256, .15) == _draw_files(1, 7, 256, .15)


def test_odd_folders_keep_their_truth(tmp_path):
    "Masks lie on the bone, boxes on slices that are there under their numbers."
    out = phantom(tmp_path / 'a', train=7, test=1, size=64, seed=8, odd=1, workers=2)
    studies = pd.read_csv(out / 'studies.csv').set_index('StudyInstanceUID')
    boxes = read_boxes(out / 'train_bounding_boxes.csv').groupby('StudyInstanceUID')
    assert studies.oddity.nunique() > 3 and {ODDITIES[o].named for o in studies.oddity} == {True, False}
    train = read_train(out / 'train.csv')
    for uid, oddity in studies.oddity.items():
        split = 'train' if uid in train.index else 'test'
        volume = read_series(out / f'{split}_images' / uid)
        mask = read_mask(out / ('segmentations' if split == 'train' else 'test_segmentations') / f'{uid}.nii', volume)
        inside = volume.hu[(mask > 0) & (mask < 8)]
        assert np.median(inside) > np.median(volume.hu[(mask == 0) & (volume.hu > -200)]) + 100, (uid, oddity)
        if uid in boxes.groups:
            assert ODDITIES[oddity].named
            for b in boxes.get_group(uid).itertuples():
                z0, z1, y0, y1, x0, x1 = volume.acquired.box(f'{b.slice_number}.dcm', (b.y, b.y + b.height), (b.x, b.x + b.width))
                assert mask[max(z0 - 2, 0):z1 + 2, max(y0 - 3, 0):y1 + 3, max(x0 - 3, 0):x1 + 3].any()  # a fragment may lie beside


def test_every_syntax_holds_a_phantom(data, tmp_path):
    v = make_study((21, 0), 64, prevalence=Prevalence.none(metal=1)).volume
    hu = v.hu[::40]
    for syntax in SYNTAXES:
        back = read_series(write_series(hu, v.affine, tmp_path / syntax, syntax=syntax)).hu
        wrong = np.abs(back.astype(int) - hu)
        assert wrong.mean() < 30 if syntax in LOSSY else not wrong.any(), syntax


def test_tables_beside_the_competitions(data):
    decoys, studies, kinds = (pd.read_csv(data / f'{n}.csv') for n in ('decoys', 'studies', 'fractures'))
    assert list(decoys.columns) == list(kinds.columns) and {'level', 'kind', 'gap_mm', 'displacement_mm', 'x0', 'z1', 'height_mm'} <= set(kinds.columns)
    assert set(decoys.kind) <= set(DECOYS) and not set(kinds.kind) & set(DECOYS)
    assert len(studies) == 3 and set(studies.syntax) <= set(SYNTAXES)
    for s in studies.itertuples():
        v = read_series(next(data.glob(f'*_images/{s.StudyInstanceUID}')))
        assert v.hu.shape == (s.slices, s.rows, s.rows) and v.spacing == (pytest.approx(s.spacing_mm), pytest.approx(s.pixel_mm, abs=1e-3), pytest.approx(s.pixel_mm, abs=1e-3))


def test_fracture_truth_is_where_the_bone_is_broken():
    study = make_study((5, 1), 192, fractured=[0, 0, 0, 0, 1, 0, 0])
    assert study.fractured.tolist() == [False] * 4 + [True] + [False] * 2
    assert set(study.fractures.level) == {'C5'} and len(study.boxes)
    for b in study.boxes.itertuples():
        inside = np.s_[max(b.slice_number - 3, 0):b.slice_number + 2, b.y:b.y + b.height, b.x:b.x + b.width]
        assert (study.labels[inside] == 5).any(), 'a box of truth far from C5'
    whole = make_study((5, 1), 192, fractured=np.zeros(7, bool))
    assert not whole.fractured.any() and not len(whole.boxes) and not len(whole.fractures)


SMALL = dict(fov=200, dz=1.5, thickness=1.5, blur=.4, overshoot=0, noise=0)


@cache
def neck(option=None, **scan):
    return make_study((31, 4), 112, fractured=np.zeros(7), scan={**SMALL, **scan}, prevalence=Prevalence.none(**{option: 1} if option else {}))


def centre(study, label):
    return np.argwhere(study.labels == label).mean(0)*study.volume.spacing


def size_of(study, label=4):
    return (study.labels == label).sum()*np.prod(study.volume.spacing)


def tissue(study):
    return study.volume.hu[(study.labels == 0) & (study.volume.hu > -300)]


def axis(study, label):
    """The direction, in degrees, in which a vertebra is longest in the axial plane."""
    yx = np.argwhere(study.labels == label)[:, 1:]
    v = np.linalg.eigh(np.cov(yx.T))[1][:, -1]
    return np.rad2deg(np.arctan2(v[0], v[1])*np.sign(v[1]))


def metal(study):
    return (study.volume.hu > 3000).sum()


SIGNS = dict(
    osteoporosis=lambda a, b: np.median(b.volume.hu[b.labels == 5]) < .75*np.median(a.volume.hu[a.labels == 5]),
    sclerotic=lambda a, b: np.median(b.volume.hu[b.labels == 5]) > 1.2*np.median(a.volume.hu[a.labels == 5]),
    degenerative=lambda a, b: centre(b, 7)[0] - centre(b, 4)[0] < centre(a, 7)[0] - centre(a, 4)[0] - 1,
    child=lambda a, b: size_of(b) < .7*size_of(a),
    large=lambda a, b: (b.volume.hu > -300).sum() > 1.08*(a.volume.hu > -300).sum(),
    turned=lambda a, b: 12 < abs(axis(b, 1) - axis(a, 1)) < 55,
    tilted=lambda a, b: abs((centre(b, 2) - centre(b, 7))[2] - (centre(a, 2) - centre(a, 7))[2]) > 4,
    contrast=lambda a, b: ((tissue(b) > 130) & (tissue(b) < 450)).sum() > ((tissue(a) > 130) & (tissue(a) < 450)).sum() + 1000,
    tube=lambda a, b: (b.volume.hu > -900).sum() > (a.volume.hu > -900).sum() + 100,
    metal=lambda a, b: metal(b) > metal(a) + 10 and (b.volume.hu < -1000).sum() > (a.volume.hu < -1000).sum() + 50,
    hardware=lambda a, b: metal(b) > metal(a) + 10,
    collar=lambda a, b: ((b.volume.hu > -200) & (a.volume.hu < -900)).sum() > 2000,
    table=lambda a, b: ((b.volume.hu > -300) & (a.volume.hu < -900)).sum() > 500,
    motion=lambda a, b: 4 < (a.labels != b.labels).any((1, 2)).sum() < 27,
    cut_short=lambda a, b: len(np.unique(b.labels)) < len(np.unique(a.labels)))


@pytest.mark.parametrize('option', SIGNS)
def test_an_option_does_what_it_says(option):
    plain, other = neck(), neck(option)
    assert not plain.facts[option] and other.facts[option]
    assert SIGNS[option](plain, other)


def test_every_option_is_tried():
    assert {f.name for f in fields(Prevalence)} == {*SIGNS, *(k.replace(' ', '_') for k in DECOYS)}


def test_noise_is_what_the_facts_say():
    quiet, noisy = neck(), neck(noise=40.)
    noise = (noisy.volume.hu.astype(float) - quiet.volume.hu)[(quiet.volume.hu > -300) & (quiet.volume.hu < 1500)]
    assert noise.std() == pytest.approx(noisy.facts['noise_hu'], rel=.5) and abs(noise.mean()) < 1


def test_a_soft_kernel_blurs_and_its_noise_is_coarse():
    def width(kernel):
        edge = np.convolve(np.r_[np.zeros(60), np.ones(60)], kernel, 'same')[20:100]
        return (edge > .9).argmax() - (edge > .1).argmax()
    assert width(_kernel(6, 0)) == pytest.approx(2.56*6, abs=1.5) and width(_kernel(6, .8)) < width(_kernel(6, 0))
    assert _kernel(3, .8).sum() == pytest.approx(1) and _kernel(3, .8).min() < 0 <= _kernel(3, 0).min()
    def neighbour(blur): t = _noise_tiles(np.random.default_rng(0), 128, .4, blur, 1)[0]; return np.corrcoef(t[:, 1:].ravel(), t[:, :-1].ravel())[0, 1]
    assert neighbour(.3) < .5 < .75 < neighbour(.7)


@pytest.mark.parametrize('wrong, message', [
    (dict(size=8), 'pixels from 16 to 2048'), (dict(seed=-1), 'a seed is 0 or more'), (dict(fractured=[1, 0]), 'should hold 7 values'),
    (dict(kinds={'C4': 'hangman'}), 'does not happen at C4; one of '), (dict(kinds={'C9': 'burst'}), 'kinds names C9'),
    (dict(scan={'fow': 170}), 'scan names fow; it may hold fov'), (dict(prevalence=.5), 'must be a cspine.anatomy.Prevalence')])
def test_what_cannot_be_made_is_said(wrong, message):
    with pytest.raises(CspineError, match=message): make_study(**{'seed': 1, 'size': 32, **wrong})


def test_a_prevalence_is_a_probability():
    with pytest.raises(CspineError, match='metal=2 is not a probability'): replace(Prevalence(), metal=2)
    assert all(getattr(Prevalence.none(), f.name) == 0 for f in fields(Prevalence))


def test_the_command_line_makes_them(tmp_path):
    from cspine import cli
    out = cli.phantom(tmp_path / 'd', train=3, test=0, size=32, seed=3, odd=1)
    assert pd.read_csv(out / 'studies.csv').oddity.notna().all()
    assert pd.read_csv(cli.phantom(tmp_path / 'e', train=3, test=0, size=32, seed=3, odd=0) / 'studies.csv').oddity.isna().all()


@pytest.mark.parametrize('oddity', ['tilted', 'uneven', 'sagittal', 'gap'])
def test_the_boxes_of_the_tables_lie_on_the_grid_that_is_read(tmp_path, monkeypatch, oddity):
    monkeypatch.setattr('cspine.phantom._draw_files', lambda *a: (96, 'explicit', oddity))
    data = phantom(tmp_path / 'd', train=2, test=0, size=96, seed=9, rate=5., workers=1)
    table, n = pd.read_csv(data / 'fractures.csv'), 0
    assert len(table) > 3
    for uid, rows in table.groupby('StudyInstanceUID'):
        volume = read_series(data / 'train_images' / uid)
        labels = read_mask(data / 'segmentations' / f'{uid}.nii', volume)
        for r in rows.itertuples():
            assert 0 <= r.z0 < r.z1 <= len(labels) and r.y1 <= labels.shape[1] and r.x1 <= labels.shape[2]
            n += (labels[r.z0:r.z1, r.y0:r.y1, r.x0:r.x1] == LEVELS.index(r.level) + 1).any()
    assert n >= len(table) - 1


def test_a_fresh_gap_holds_blood_not_fat():
    how = dict(size=192, prevalence=Prevalence.none(), scan=dict(fov=130, dz=.6, thickness=.6, blur=.3, overshoot=0., noise=0))
    study, before = make_study((61, 1), kinds=dict(C4='burst', C5='burst'), **how), make_study((61, 1), fractured=np.zeros(7), **how)
    core = ndimage.binary_erosion((study.labels == 4) & (before.labels == 4), iterations=3)
    assert core.sum() > 500 and np.percentile(study.volume.hu[core], 1) > 0


def test_what_the_end_of_the_scan_leaves_of_a_fracture_is_none():
    study = make_study((71, 3), 128, fractured=np.ones(7), prevalence=replace(Prevalence.none(), cut_short=1))
    n, dz = len(study.labels), study.volume.spacing[0]
    for r in study.fractures.itertuples():
        assert (r.z1 - r.z0)*dz > 3 or (r.z0 > 0 and r.z1 < n), (r.level, r.kind)
    assert len(study.fractures) and not study.fractured[3], 'of the facets of C4 one slice is left'


@pytest.mark.parametrize('wrong, says', [
    (dict(seed='a'), "seed='a' is no integer"), (dict(seed=[]), 'a seed is 0 or more'), (dict(size=64.5), 'size=64.5 is no whole number'),
    (dict(rate=float('nan')), 'rate=nan'), (dict(kinds=['C4']), "should be a dict of levels"), (dict(kinds={'C4': ['burst']}), 'should be a dict of levels'),
    (dict(scan=dict(dz=0)), 'scan dz=0 should be a number'), (dict(scan=dict(fov='170')), "scan fov='170'"), (dict(scan=dict(noise=-5)), 'scan noise=-5'),
    (dict(scan=dict(top=-500, bottom=300)), 'should lie above'), (dict(fractured=np.full(7, .3)), 'each 0 or 1'), (dict(uid='../x'), 'is not a StudyInstanceUID')])
def test_bad_arguments_of_a_study(wrong, says):
    with pytest.raises(CspineError, match=says): make_study(**{'seed': 1, 'size': 64, **wrong})


@pytest.mark.parametrize('wrong, says', [(dict(train=1.5), 'train=1.5 is no whole number'), (dict(seed='x'), "seed='x' is no whole number"), (dict(workers=-1), 'one process or more')])
def test_bad_arguments_of_a_data_set(tmp_path, wrong, says):
    with pytest.raises(CspineError, match=says): phantom(tmp_path / 'd', **{'train': 1, 'test': 0, 'size': 64, **wrong})


def test_a_place_where_no_data_set_can_be(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(CspineError, match='file is a file; name a folder'): phantom(tmp_path / 'file', train=1, test=0)
    with pytest.raises(CspineError, match='cannot be written'): phantom(tmp_path / 'file' / 'd', train=1, test=0)
