"""The neck around the spine: what lies in what. Distances (mm) of the shapes themselves, in a few necks, no pictures."""
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from cspine.anatomy import _ellipsoid, _evaluate, _spine
from cspine.neck import _others, _soft

SEEDS = range(4)
BOUNDS = np.array([-100, -150, -70.]), np.array([100, 110, 190.])
SKULL, CONDYLES, MASTOIDS, JAW, MAXILLA = range(5)


@cache
def neck(seed, contrast=False):
    has = dict.fromkeys('degenerative turned tilted large contrast tube metal hardware'.split(), False) | dict(contrast=contrast, turned=seed == 3)
    rng = np.random.default_rng([seed, 3]); scale = float(np.clip(rng.normal(1, .07), .8, 1.2))
    spine, turn = _spine(rng, scale, has); others, teeth = _others(spine, rng, scale)
    soft, sharp, skin = _soft(spine, np.random.default_rng(seed), scale, turn, has, BOUNDS, ([_ellipsoid([0, -25, 73], [64, 82, 56])], *teeth[1:]))
    return SimpleNamespace(spine=spine, others=others, teeth=teeth, soft=soft, sharp=sharp, skin=skin, scale=scale)


def solid(shapes, R, c, g=1., step=1.4):
    """Points (n, 3), x, y, z in mm, inside shapes."""
    f = _evaluate(shapes, R, c, BOUNDS, step, g, blend=1.)
    return points(f)


def points(f):
    k = np.argwhere(f.values < 0)
    return np.c_[f.first[2] + k[:, 2]*f.step, f.first[1] + k[:, 1]*f.step, f.first[0] - k[:, 0]*f.step]


def at(f, p):
    """A field's values at points within it."""
    i = np.rint(np.c_[f.first[0] - p[:, 2], p[:, 1] - f.first[1], p[:, 0] - f.first[2]]/f.step).astype(int)
    inside = ((i >= 0) & (i < f.values.shape)).all(1)
    return f.values[tuple(i[inside].T)]


@pytest.mark.parametrize('seed', SEEDS)
def test_the_skin_covers_the_head(seed):
    n = neck(seed)
    for k in range(MAXILLA + 1):
        assert at(n.skin, solid(*n.others[k])).max() < -1, f'head bone {k} outside the skin'
    assert at(n.skin, solid(*n.teeth[:4])).max() < -1, 'teeth outside the skin'


def within_skull(n, p, radii=(64, 82, 56), centre=(0, -25, 73)):
    """Which points lie within the skull's inner table."""
    _, R, c, g = n.others[SKULL]
    return ((((p - c)@R/g - centre)/radii)**2).sum(1) < 1


@pytest.mark.parametrize('seed', SEEDS)
def test_no_air_inside_the_skull(seed):
    n = neck(seed)
    for f, value in n.sharp:
        if value < -900: assert not within_skull(n, points(f)).any()
    airway = points(next(f for f, value in n.sharp if value < -900))
    top = airway[:, 2].max()
    assert top > n.spine['C1'].c[2] and not (at(n.skin, airway) > -1).any()
    assert (airway[:, 2] > top - .5).sum() < .4*(np.abs(airway[:, 2] - top + 6) < .61).sum(), 'a flat end'


@pytest.mark.parametrize('seed', SEEDS)
def test_the_clivus_is_no_peg_in_the_brain(seed):
    n = neck(seed)
    for k in (SKULL, CONDYLES):
        p = solid(*n.others[k])
        assert not within_skull(n, p, (61, 79, 53)).any(), 'bone in the brain'
    _, R, c, g = n.others[SKULL]
    v, w = np.meshgrid(np.arange(-44, -9, 2.), np.arange(0, 30.))
    local = np.stack([np.zeros(v.size), v.ravel(), w.ravel()], 1)
    f = _evaluate(n.others[SKULL][0], R, c, BOUNDS, 1.4, g, blend=1.)
    thick = (at(f, c + g*local@R.T) < 0).reshape(v.shape).sum(0)
    assert (thick >= 5).all() and thick.max() > 8, 'a plate from the foramen forwards, thicker than the skull'


@pytest.mark.parametrize('seed', SEEDS)
def test_ribs_lie_before_the_transverse_processes(seed):
    n = neck(seed)
    for v in n.spine.values():
        if v.name not in ('C7', 'T1', 'T2', 'T3'): continue
        bone = _evaluate(v.shapes, v.R, v.c, BOUNDS, waves=v.waves, pad=4.)
        for ribs in (o for o in n.others if o[2] is n.spine['T1'].c or o[2] is n.spine['T2'].c):
            near = at(bone, solid(*ribs, step=.8))
            assert not (near < 0).any(), f'a rib in {v.name}'
            if v.c is ribs[2]: assert near.min() < 4.5, 'a rib without a joint'


@pytest.mark.parametrize('seed', SEEDS[:2])
@pytest.mark.parametrize('contrast', [False, True])
def test_a_vertebral_artery_fills_its_foramina(seed, contrast):
    n = neck(seed, contrast)
    for name in ('C2', 'C3', 'C4', 'C5', 'C6'):
        v = n.spine[name]
        for side in (-1, 1):
            p = v.at([side*18, 3, -2] if name == 'C2' else [side*(v.m['a'] + 4.6), 2.2, 0])[None]
            if contrast: assert any(value > 150 and at(f, p).min(initial=9) < 0 for f, value in n.sharp), name
            else: assert at(n.soft, p) > -10, f'fat in a foramen of {name}'


@pytest.mark.parametrize('seed', SEEDS)
def test_muscles_end_at_the_skull_and_run_on_below(seed):
    n = neck(seed)
    z = n.soft.first[0] - np.arange(len(n.soft.values))*n.soft.step
    muscle = ((n.soft.values > 15) & (n.soft.values < 90)).sum((1, 2))*n.soft.step**2
    part = muscle[(z > n.spine['T3'].c[2] - 8) & (z < n.spine['C1'].c[2] + 5)]
    assert part.min() > 1500 and (np.abs(np.diff(part))/part[1:]).max() < .2, 'muscles cut flat'
    R, c, g = n.teeth[1:4]
    places = [n.spine['T3'].at([side*18, 46, -4], n.scale) for side in (-1, 1)] + [c + g*R@[side*14, 49, 14] for side in (-1, 1)]
    assert (at(n.soft, np.array(places)) > -40).all(), 'fat where a muscle should be'
