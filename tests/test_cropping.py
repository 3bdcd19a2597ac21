"Crops against a slow reference and against the truth of phantoms."
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from cspine.cropping import AIR, MUSCLE, boxes_from_labels, crop_fractures, crop_masks, crop_points, crop_slices, crop_vertebrae
from cspine.dicom import Volume
from cspine.phantom import make_study
from cspine.presets import CspineError, get_preset
from cspine.windowing import window

TINY = replace(get_preset('tiny').classification, isolate=False)


def volume_of(hu, spacing):
    dz, dy, dx = spacing
    return Volume(hu, np.array([[0, 0, dx, 5], [0, dy, 0, 6], [-dz, 0, 0, 7], [0, 0, 0, 1.]]), '1.2.3', [])


@pytest.fixture(scope='module')
def study():
    return make_study(902, size=160)


@pytest.mark.parametrize('box', [[10, 30, 12, 40, 9, 33], [0, 23, 30, 60, 0, 20], [35, 50, 2, 12, 40, 48]])
def test_against_a_slow_reference(box):
    "Where a crop is finer than the scan it is linear interpolation in mm, with air around"
    spacing = (1., .9, 1.3)
    preset = replace(TINY, size=96, margin_mm=3.)
    hu = np.random.default_rng(0).integers(-500, 1200, (50, 60, 48)).astype(np.int16)
    boxes = np.full((7, 6), -1)
    boxes[4] = box
    crops, present = crop_vertebrae(volume_of(hu, spacing), boxes, preset)
    b = np.reshape(box, (3, 2)) * np.array(spacing)[:, None]
    side = np.ptp(b[1:], axis=1).max() + 6
    tall = np.ptp(b[0]) + 6
    mid = b.mean(1)
    mm = [mid[0] + ((np.arange(30)+.5)/30 - .5)*tall] + [m + ((np.arange(96)+.5)/96 - .5)*side for m in mid[1:]]
    at = np.meshgrid(*[m/s - .5 for m, s in zip(mm, spacing)], indexing='ij')
    inside = np.all([(a >= -.5) & (a <= n-.5) for a, n in zip(at, hu.shape)], axis=0)
    want = np.where(inside, map_coordinates(hu.astype(float), at, order=1, mode='nearest'), AIR)
    assert tall/30 <= spacing[0] and present.tolist() == [False]*4+[True]+[False]*2
    assert np.abs(crops[4].astype(int) - window(want, *TINY.window, dtype='uint8')).max() <= 1
    assert not crops[[0, 1, 2, 3, 5, 6]].any()


def test_square_pixels_whatever_the_scan():
    "The same ball on an isotropic and on a stretched grid gives the same crop"
    out = []
    for spacing in ((1, 1, 1), (.8, .5, 1.25)):
        n = [round(80/s) for s in spacing]
        z, y, x = np.meshgrid(*[(np.arange(k)+.5)*s - 40 for k, s in zip(n, spacing)], indexing='ij')
        ball = z**2 + y**2 + x**2 < 20**2
        hu = np.where(ball, 800, -200).astype(np.int16)
        crops, _ = crop_vertebrae(volume_of(hu, spacing), boxes_from_labels(ball.astype(np.uint8)*2), TINY)
        out.append(crops[1] > 127)
    a, b = out
    assert 2*(a & b).sum() / (a.sum()+b.sum()) > .97


def test_a_vertebra_lies_whole_in_its_crop_under_its_mask(study):
    boxes = boxes_from_labels(study.labels)
    crops, present = crop_vertebrae(study.volume, boxes, TINY)
    masks = crop_masks(study.labels, study.volume.spacing, boxes, TINY)
    spacing = np.array(study.volume.spacing)
    for level in np.flatnonzero(present):
        assert not masks[level][[0, -1]].any() and not masks[level][:, [0, -1]].any() and not masks[level][..., [0, -1]].any()   # the margin is free
        own = masks[level].mean(0)
        b = boxes[level].reshape(3, 2)
        side = (np.ptp(b[1:], axis=1)*spacing[1:]).max() + 2*TINY.margin_mm
        tall = (np.ptp(b[0])*spacing[0]) + 2*TINY.margin_mm
        volume = own.mean()*side**2*tall                                                # mm3 of bone in the crop
        assert volume == pytest.approx((study.labels == level+1).sum()*spacing.prod(), rel=.05)   # thin bone loses a little at the threshold
        bone = crops[level].mean(0)                                                     # bone is bright where its mask is
        assert bone[own > .4].mean() > bone[own == 0].mean() + 15
        assert crops[level][masks[level]].mean() > crops[level][~masks[level]].mean() + 25   # slice by slice too


def test_labels_of_other_bones_do_not_matter(study):
    boxes = boxes_from_labels(study.labels)
    others = np.where(study.labels == 3, 3, 0).astype(np.uint8)
    assert np.array_equal(crop_masks(others, study.volume.spacing, boxes, TINY)[2], crop_masks(study.labels, study.volume.spacing, boxes, TINY)[2])


def test_paper_size():
    paper = get_preset('paper').classification
    hu = np.zeros((60, 512, 512), np.int16)
    boxes = np.array([[i*8, i*8+12, 180, 300, 190, 330] for i in range(7)])
    crops, present = crop_vertebrae(volume_of(hu, (1, .4, .4)), boxes, paper)
    assert crops.shape == (7, 30, 256, 256) and crops.dtype == np.uint8 and present.all()
    assert (np.unique(crops) == [round((0+500)/1800*255)]).all()


def test_one_vertebra_alone():
    "Voxels of other labels become muscle before anything is interpolated; what has no label stays"
    rng = np.random.default_rng(1)
    hu = rng.integers(100, 1200, (40, 40, 40)).astype(np.int16)
    labels = rng.choice([0, 3, 4, 8], hu.shape).astype(np.uint8)
    boxes = np.full((7, 6), -1)
    boxes[2] = [5, 35, 5, 35, 5, 35]
    volume = volume_of(hu, (1, 1, 1))
    alone, _ = crop_vertebrae(volume, boxes, replace(TINY, isolate=True), labels)
    painted = volume_of(np.where(np.isin(labels, (4, 8)), MUSCLE, hu).astype(np.int16), (1, 1, 1))
    assert np.array_equal(alone, crop_vertebrae(painted, boxes, TINY)[0])
    assert not np.array_equal(alone, crop_vertebrae(volume, boxes, TINY)[0])
    with pytest.raises(CspineError, match='a label map of shape'): crop_vertebrae(volume, boxes, replace(TINY, isolate=True))


def test_slices_of_fractures_on_phantoms():
    "Every slice of a crop that the phantom's boxes reach is marked, for the vertebra that is broken there"
    study = make_study(903, size=160, fractured=np.array([0, 1, 0, 0, 1, 1, 0], bool))
    boxes = boxes_from_labels(study.labels)
    f = study.boxes
    found = np.column_stack([f.slice_number-1, f.slice_number, f.y, f.y+f.height, f.x, f.x+f.width]).astype(int)
    broken = crop_slices(found, study.labels, study.volume.spacing, boxes, study.fractured, TINY)
    for level in range(7):
        if not study.fractured[level]: assert not broken[level].any()
        else: assert set(broken[level]) == {0, 1}
    # every pixel of the map leads back into a box that its own vertebra fills most of, and no other vertebra has one
    where = crop_fractures(found, study.labels, study.volume.spacing, boxes, study.fractured, TINY)
    assert (where.any((1, 2, 3)) == study.fractured).all()
    most = [max((c for c in range(1, 8) if study.fractured[c-1]), key=lambda c: (study.labels[z0:z1, y0:y1, x0:x1] == c).sum()) for z0, z1, y0, y1, x0, x1 in found]
    for level in np.flatnonzero(study.fractured):
        assert (broken[level][where[level].any((1, 2))] == 1).all()
        own = found[np.array(most) == level+1].reshape(-1, 3, 2)
        for pixel in np.random.default_rng(level).permutation(np.argwhere(where[level]))[:40]:
            at = np.full((7, 3), np.nan)
            at[level] = (pixel+.5)/where[level].shape
            voxel = crop_points(at, boxes, study.volume.spacing, TINY)[level]
            assert ((voxel > own[..., 0]-1.5) & (voxel < own[..., 1]+.5)).all(1).any(), (level, voxel)
    # each marked slice lies at a box, and each box that lies in the crop of a broken vertebra alone marks a slice
    dz = study.volume.spacing[0]
    reached = np.zeros(study.volume.hu.shape[0], bool)
    for level in np.flatnonzero(study.fractured):
        z0, z1 = boxes[level][:2]*dz + np.array([-1, 1])*TINY.margin_mm
        edges = (z0 + np.arange(31)*(z1-z0)/30)/dz
        for i in np.flatnonzero(broken[level]):
            lo, hi = int(np.floor(edges[i])), int(np.ceil(edges[i+1]))
            assert set(range(lo, hi)) & set(found[:, 0])
            reached[max(lo, 0):hi] = True
    assert reached[found[:, 0]].mean() > .97


def test_wrong_input_is_named():
    with pytest.raises(CspineError, match='seven boxes'): crop_vertebrae(volume_of(np.zeros((4, 4, 4), np.int16), (1, 1, 1)), np.zeros((3, 6)), TINY)
    with pytest.raises(CspineError, match='box of C1 is empty'): crop_masks(np.zeros((4, 4, 4), np.uint8), (1, 1, 1), np.zeros((7, 6), int), TINY)
    with pytest.raises(CspineError, match=r'\(z, y, x\)'): boxes_from_labels(np.zeros((4, 4), np.uint8))
