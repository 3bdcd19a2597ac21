"Crops that turn with the vertebra, the mask beside the image, and the crop data set: killed, damaged, refused, read in batches."
import csv
import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import map_coordinates

import cspine.crops as module
from cspine import cli
from cspine.bundle import load_bundle, random_bundle, small_preset
from cspine.classification import CropDataset
from cspine.cropping import (AIR, _Frame, _frames, _resample, _turned, boxes_from_labels, crop_masks, crop_planes, crop_slices, crop_vertebrae,
                             cut_by_scan, vertebra_axes, whole_vertebra)
from cspine.crops import CROP_FIELDS, Crops, crop_data_set, crop_study
from cspine.dicom import Volume, read_series, write_series
from cspine.inference import Pipeline
from cspine.phantom import make_study, phantom
from cspine.presets import LEVELS, CspineError, Preset, get_preset
from cspine.report import contact_sheet
from cspine.rivals import CLASSIFICATION
from cspine.rsna import read_mask
from cspine.training import train_classification

TINY = replace(get_preset('tiny').classification, isolate=False, size=64)
TILT = replace(TINY, tilt=True)


def affine_of(spacing): return np.array([[0, 0, spacing[2], 0], [0, spacing[1], 0, 0], [-spacing[0], 0, 0, 0], [0, 0, 0, 1.]])


def rotation(pitch, roll):
    "Rows: the axes (z, y, x) of a neck that is bent forward and to a side, degrees"
    a, b = np.radians([pitch, roll])
    return np.array([[np.cos(a), np.sin(a), 0], [-np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])


def neck(axes, spacing, size=132.):
    "Seven flat vertebrae one below the other along the first of `axes`, each with a dark cleft on one side: hu, labels"
    n = [round(size/s) for s in spacing]
    at = np.stack(np.meshgrid(*[(np.arange(k)+.5)*s - size/2 for k, s in zip(n, spacing)], indexing='ij'), -1) @ axes.T
    z, y, x = np.moveaxis(at, -1, 0)
    hu, labels = np.full(n, 30, np.int16), np.zeros(n, np.uint8)
    for i in range(7):
        own = (abs(z-15*(i-3)) < 5) & ((y/24)**2 + (x/20)**2 < 1)
        labels[own] = i+1
        hu[own] = 500
        hu[own & (abs(x-8) < 2) & (y > 0)] = -100
    return hu, labels


# --- geometry --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('spacing', [(1.8, 1., 1.2), (1., 1.5, 1.2)])
@pytest.mark.parametrize('pitch, roll', [(24, 0), (-15, 12)])
def test_a_bent_neck_gives_the_crops_of_a_straight_one(spacing, pitch, roll):
    axes = rotation(pitch, roll)
    hu, labels = neck(np.eye(3), (1., 1.2, 1.2))
    volume = Volume(hu, affine_of((1, 1.2, 1.2)), '1')
    want, _ = crop_vertebrae(volume, boxes_from_labels(labels), TINY)
    masks = crop_masks(labels, volume.spacing, boxes_from_labels(labels), TINY)
    hu, labels = neck(axes, spacing)
    bent, boxes = Volume(hu, affine_of(spacing), '1'), boxes_from_labels(labels)
    down = vertebra_axes(labels, spacing)
    assert np.degrees(np.arccos(np.clip(down @ axes[0], -1, 1))).max() < 1.5
    got, there = crop_vertebrae(bent, boxes, TILT, labels)
    straight, _ = crop_vertebrae(bent, boxes, TINY)
    apart = [np.abs(c.astype(float)-want)[there].mean() for c in (got, straight)]
    assert there.all() and apart[0] < 4 and apart[0] < .3*apart[1]
    own = crop_masks(labels, spacing, boxes, TILT)
    assert (own & masks).sum()/(own | masks).sum() > .8
    np.testing.assert_array_equal(whole_vertebra(boxes, labels, spacing, TILT), np.ones(7))


@pytest.mark.parametrize('corner', [(12., 20., 20.), (-4., 20., 20.), (20., -6., 20.), (20., 20., 45.)], ids=['inside', 'top', 'front', 'side'])
def test_a_turned_crop_against_a_slow_reference(corner):
    "Where it is finer than the scan it is linear interpolation at the turned points, with air beyond the scan's outer faces"
    spacing = np.array([1.6, .8, 1.1])
    hu = np.random.default_rng(0).integers(-500, 1200, (30, 60, 50)).astype(np.int16)
    axes = _turned(np.array([.9, .3, -.2])/np.linalg.norm([.9, .3, -.2]))
    frame = _Frame(axes @ np.array(corner), np.array([.7, .5, .6]), (12, 30, 28), axes)
    got = _resample(hu, frame, spacing, outside=AIR).numpy()
    mm = np.stack(np.meshgrid(*[(np.arange(n)+.5)*s for n, s in zip(frame.n, frame.step)], indexing='ij'), -1) + frame.corner
    at = np.moveaxis(mm @ axes/spacing - .5, -1, 0)
    inside = np.all([(a >= -.5) & (a <= n-.5) for a, n in zip(at, hu.shape)], axis=0)
    want = np.where(inside, map_coordinates(hu.astype(float), at, order=1, mode='nearest'), AIR)
    assert np.abs(got-want)[np.abs(at[0]+.5) > 1e-3].max() < .5
    assert .05 < inside.mean() < 1 or (corner[0] == 12 and inside.all())


def test_a_coarse_turned_crop_averages():
    "A thin sheet that lies between the crop's points still darkens it by its share"
    axes = rotation(20, 0)
    hu = np.full((60, 80, 60), 1000, np.int16)
    z, y, x = np.meshgrid(*[np.arange(n)+.5 for n in hu.shape], indexing='ij')
    sheet = np.floor((np.stack([z, y, x], -1) @ axes.T)[..., 2]) % 4 == 0   # one voxel of four along the crop's x
    hu[sheet] = 0
    frame = _Frame(axes @ np.array([25., 25., 20.]), np.array([1., 1., 4.]), (6, 6, 5), axes)
    got = _resample(hu, frame, np.ones(3)).numpy()
    assert abs(got.mean() - 750) < 40 and got.std() < 60


def test_tilt_is_limited():
    spacing = (1., 1., 1.)
    hu, labels = neck(rotation(72, 0), spacing, 190.)
    assert (vertebra_axes(labels, spacing) == [1, 0, 0]).all()       # no neck is bent so far
    hu, labels = neck(rotation(20, 0), spacing)
    alone = np.where(labels == 4, labels, 0).astype(np.uint8)
    assert np.degrees(np.arccos(vertebra_axes(alone, spacing)[3] @ rotation(20, 0)[0])) < 1   # by its own form
    dot = np.zeros((9, 9, 9), np.uint8)
    dot[4, 4, 4] = 3
    assert (vertebra_axes(dot, spacing) == [1, 0, 0]).all()
    assert np.isfinite(crop_vertebrae(Volume(np.zeros((9, 9, 9), np.int16), affine_of(spacing), '1'), boxes_from_labels(dot), TILT, dot)[0]).all()
    # a vertebra that the scan cuts is turned as its neighbours say: what is left of it is a wedge
    middle = np.flatnonzero((labels == 4).any((1, 2)))
    ends = labels[:middle[len(middle)//2]]
    assert cut_by_scan(boxes_from_labels(ends), ends.shape)[3]
    assert np.degrees(np.arccos(vertebra_axes(ends, spacing)[3] @ rotation(20, 0)[0])) < 3


def test_a_box_beyond_the_scan_is_no_vertebra():
    study = make_study(902, size=96)
    boxes = boxes_from_labels(study.labels)
    n, h, w = study.labels.shape
    beyond = boxes.copy()
    beyond[1, :2], beyond[2, 2:4], beyond[3, 4:] = (n, n+9), (h+1, h+9), (w-1, w+9)   # the last has one column of the scan
    crops, present = crop_vertebrae(study.volume, beyond, TINY)
    assert present.tolist() == [True, False, False, True, True, True, True] and not crops[1:3].any()
    same(dict(c=crops[4:]), dict(c=crop_vertebrae(study.volume, boxes, TINY)[0][4:]))
    assert (beyond[1, :2] == (n, n+9)).all()   # the caller's boxes are as they were


def test_crops_do_not_know_how_the_scan_lies_in_the_room():
    "An oblique affine is a turned patient; a tilted gantry is straightened when it is read"
    study = make_study(902, size=96)
    boxes = boxes_from_labels(study.labels)
    room = np.eye(4)
    room[:3, :3] = rotation(25, 10)
    want = crop_vertebrae(study.volume, boxes, TINY)[0]
    assert np.array_equal(crop_vertebrae(replace(study.volume, affine=room @ study.volume.affine), boxes, TINY)[0], want)


def test_a_ball_in_a_tilted_gantry_is_round(tmp_path):
    affine = affine_of((1.25, .8, .8))
    affine[1, 0] = 1.25*np.tan(np.radians(18))      # each slice lies farther back than the one above
    index = np.stack(np.meshgrid(*[np.arange(n) for n in (70, 120, 100)], indexing='ij'), -1)
    mm = index @ affine[:3, :3].T
    ball = ((mm - mm[35, 60, 50])**2).sum(-1) < 18**2
    write_series(np.where(ball, 900, 0).astype(np.int16), affine, tmp_path/'s', uid='1.2.3')
    volume = read_series(tmp_path/'s')
    got = crop_masks((volume.hu > 450).astype(np.uint8)*3, volume.spacing, boxes_from_labels((volume.hu > 450).astype(np.uint8)*3), replace(TINY, slices=64))[2]
    side = [got.any(tuple(a for a in range(3) if a != axis)).sum() for axis in range(3)]
    assert max(side)-min(side) <= 2 and abs(got.mean() - 4/3*np.pi*18**3/(36+2*TINY.margin_mm)**3) < .02


@pytest.mark.parametrize('preset', [TINY, TILT])
def test_the_share_of_a_vertebra_in_its_crop(preset):
    hu, labels = neck(rotation(20, 0), (1., 1., 1.))
    boxes, spacing = boxes_from_labels(labels), (1., 1., 1.)
    np.testing.assert_array_equal(whole_vertebra(boxes, labels, spacing, preset), np.ones(7))
    truth = labels.copy()
    truth[truth == 7] = 0
    found = labels.copy()
    found[found == 2] = 0
    found[:boxes[3, :2].sum()//2 - 1][found[:boxes[3, :2].sum()//2 - 1] == 4] = 0     # the upper half of C4 is missed
    got = whole_vertebra(boxes_from_labels(found), truth, spacing, replace(preset, margin_mm=0.), found)
    assert np.isnan(got[6]) and got[1] == 0 and (got[[0, 2, 4, 5]] == 1).all()
    assert .3 < got[3] < .95
    # the same by the crop itself: what its masks hold of the truth
    frame = _frames(boxes_from_labels(found), spacing, replace(preset, margin_mm=0.), found)[3]
    held = _resample(truth == 4, frame, np.array(spacing)).sum().item()*frame.step.prod()
    assert held/(truth == 4).sum() == pytest.approx(got[3], abs=.06)


def test_fractured_slices_of_a_tilted_crop():
    "Certain at the middle of a box, unknown where only its ends reach, whole beyond"
    axes, spacing = rotation(22, 0), (1., 1., 1.)
    hu, labels = neck(axes, spacing)
    boxes = boxes_from_labels(labels)
    middle = boxes[3].reshape(3, 2).mean(1).astype(int)
    box = np.array([[middle[0], middle[0]+1, middle[1]-8, middle[1]+8, middle[2]-3, middle[2]+3]])
    fractured = np.arange(7) == 3
    got = crop_slices(box, labels, spacing, boxes, fractured, TILT)[3]
    frame = _frames(boxes, spacing, TILT, labels)[3]
    sure, known = np.flatnonzero(got == 1), np.flatnonzero(got != 0)
    assert len(sure)*frame.step[0] == pytest.approx(np.cos(np.radians(22)), abs=2*frame.step[0])
    assert len(known)*frame.step[0] == pytest.approx(16*np.sin(np.radians(22)) + 1, abs=2.5*frame.step[0])
    assert set(got[known[0]:sure[0]]) == set(got[sure[-1]+1:known[-1]+1]) == {255} and known[-1]-known[0]+1 == len(known)
    straight = crop_slices(box, labels, spacing, boxes, fractured, TINY)[3]
    assert set(straight) == {0, 1}


def test_tilt_needs_a_label_map():
    study = make_study(902, size=64)
    with pytest.raises(CspineError, match='turn with the vertebra: a label map of shape'): crop_vertebrae(study.volume, boxes_from_labels(study.labels), TILT)


# --- the mask beside the image ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('group, planes', [(3, 4), (6, 7)])
def test_a_network_with_a_mask_channel(tmp_path, group, planes):
    "Through a bundle and back: the first convolution has a channel more, and the mask changes the answer"
    small = small_preset()
    preset = replace(small, classification=replace(small.classification, head='pooled', group=group, every=group, mask_channel=True))
    bundle = load_bundle(random_bundle(tmp_path/'b', preset))
    assert bundle.preset == preset and preset.classification.planes == 6 + 6//group
    assert next(bundle.classification[0].encoder.parameters()).shape[1] == planes
    study = make_study(902, size=64)
    pipeline = Pipeline(bundle, 'cpu')
    p = pipeline.predict(study.volume, labels=study.labels)
    assert np.isfinite(p.probabilities).all() and p.crops.shape == (7, 6, 64, 64)
    boxes = boxes_from_labels(study.labels)
    planes = crop_planes(p.crops, crop_masks(study.labels, study.volume.spacing, boxes, preset.classification), preset.classification)
    x, there = torch.from_numpy(planes)[None], torch.from_numpy(p.present)[None]
    blind = x.unflatten(2, (-1, group+1)).clone()
    blind[:, :, :, -1] = 0
    with torch.no_grad(): a, b = (bundle.classification[0](i, there)[0][:, :7][there] for i in (x, blind.flatten(2, 3)))
    assert (a != b).all()


def test_presets_keep_both_off():
    for name in ('paper', 'tiny'):
        c = get_preset(name).classification
        assert (c.tilt, c.mask_channel) == (False, False)
    d = get_preset('tiny').to_dict()
    d['classification']['tilt'] = 1
    with pytest.raises(CspineError, match='field tilt of the preset should be bool'): Preset.from_dict(d)


# --- the data set ----------------------------------------------------------------------------------------------------

SMALL = replace(small_preset(), classification=replace(small_preset().classification, isolate=False, size=48))
Made = namedtuple('Made', 'data bundle')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp('crops')
    return Made(phantom(folder/'data', train=5, test=0, size=64, seed=9200, rate=3., odd=0., workers=1), random_bundle(folder/'bundle', SMALL))


def uids(data): return pd.read_csv(data/'train.csv', dtype=str).StudyInstanceUID.tolist()


@pytest.fixture
def calls(made, monkeypatch):
    "Stage 1 answers with the truth, in this process, and keeps count"
    calls = []

    def truth(networks, preset, volume, device):
        calls.append(volume.uid)
        return read_mask(made.data/'segmentations'/f'{volume.uid}.nii', volume)
    monkeypatch.setattr(module, 'predict_labels', truth)
    return calls


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(a[k], b[k])
        assert a[k].dtype == b[k].dtype


def test_it_holds_what_the_studies_gave(made, calls, tmp_path, capsys):
    crops = crop_data_set(made.data, made.bundle, tmp_path/'c', workers=1)
    said = capsys.readouterr().err
    assert '5 studies to crop' in said and 'GB free' in said
    assert sorted(calls) == sorted(crops.uids) == sorted(uids(made.data)) and len(Crops(tmp_path/'c')) == 5
    truth = pd.read_csv(made.data/'train.csv', dtype={'StudyInstanceUID': str}).set_index('StudyInstanceUID')
    boxes = pd.read_csv(made.data/'train_bounding_boxes.csv', dtype={'StudyInstanceUID': str})
    marked = 0
    for uid in crops.uids:
        volume = read_series(made.data/'train_images'/uid)
        labels = read_mask(made.data/'segmentations'/f'{uid}.nii', volume)
        found = module.fracture_boxes(volume, boxes[boxes.StudyInstanceUID == uid])
        got = crops.read(uid)
        same(got, crop_study(volume, labels, SMALL.classification, truth.loc[uid, list(LEVELS)].to_numpy(bool), found))
        marked += (got['broken'] == 1).sum()
        assert crops.table.fractured[uid].split() == [level for level in LEVELS if truth.loc[uid, level]]
        assert crops.table.cut[uid].split() == [LEVELS[i] for i in np.flatnonzero(got['cut'])]
    assert marked > 5
    assert crops.preset == SMALL and crops.made['stage_1'] == 'bundle'
    assert crops.made['sha256'] == {'0': json.loads((made.bundle/'bundle.json').read_text())['stages']['segmentation'][0]['sha256']}
    size = sum(f.stat().st_size for f in (tmp_path/'c'/'studies').iterdir())
    assert size == crops.bytes < module._SHARE*5*7*6*48*48*1.1 + 5*4000   # about what was told; small crops have their overhead
    with pytest.raises(CspineError, match='has no crops of study 1.2.3'): crops.read('1.2.3')


def test_masks_cut_instead_of_a_bundle(made, calls, tmp_path, capsys):
    "The crops of a network that answers with the truth; a study without a mask is named, a new mask is seen"
    data = shutil.copytree(made.data, tmp_path/'data')
    want = crop_data_set(data, made.bundle, tmp_path/'b', workers=1)
    del calls[:]
    gone, empty, new = want.uids[:3]
    (data/'segmentations'/f'{gone}.nii').rename(tmp_path/'kept.nii')
    crops = crop_data_set(data, None, tmp_path/'c', SMALL, workers=1, masks=True)
    assert not calls and crops.uids and set(crops.uids) == set(want.uids) - {gone} and crops.left_out == {gone: 'it has no mask in segmentations'}
    assert f'left out: {gone}: it has no mask' in capsys.readouterr().err
    for uid in crops.uids: same(crops.read(uid), want.read(uid))
    assert crops.made['stage_1'] == 'masks' and crops.made['sha256'] == {} and not len(crops.fold_of)
    when = {u: crops.path(u).stat().st_mtime_ns for u in crops.uids}
    (tmp_path/'kept.nii').rename(data/'segmentations'/f'{gone}.nii')
    for uid, change in ((empty, lambda m: m*0), (new, lambda m: np.where(m == 2, 0, m))):
        file = data/'segmentations'/f'{uid}.nii'
        mask = nib.load(file)
        nib.save(nib.Nifti1Image(change(np.asarray(mask.dataobj)).astype(np.uint8), mask.affine), file)
    crops = crop_data_set(data, None, tmp_path/'c', SMALL, workers=1, masks=True)
    assert set(crops.uids) == set(want.uids) - {empty} and crops.left_out == {empty: 'its mask holds no vertebra'}
    assert not crops.read(new)['present'][1] and want.read(new)['present'][1]
    assert {u for u in crops.uids if when.get(u) == crops.path(u).stat().st_mtime_ns} == set(want.uids) - {gone, empty, new}
    for more in (dict(bundle=made.bundle), dict(bundle=None, detection='run')):
        with pytest.raises(CspineError, match='either masks or networks cut'): crop_data_set(data, out=tmp_path/'d', masks=True, **more)
    with pytest.raises(CspineError, match='preset|begun'): crop_data_set(data, None, tmp_path/'c', 'tiny', masks=True)
    with pytest.raises(CspineError, match='holds crops that masks cut: go on with --masks'): crop_data_set(data, made.bundle, tmp_path/'c', SMALL, workers=1)


def test_killed_it_goes_on(made, calls, tmp_path, monkeypatch, capsys):
    whole = crop_data_set(made.data, made.bundle, tmp_path/'whole', workers=1)
    answer, n = module.predict_labels, len(calls)

    def dies(*args):
        if len(calls) == n+2: raise KeyboardInterrupt
        return answer(*args)
    monkeypatch.setattr(module, 'predict_labels', dies)
    with pytest.raises(KeyboardInterrupt): crop_data_set(made.data, made.bundle, tmp_path/'cut', workers=1)
    cut = Crops(tmp_path/'cut')
    assert len(cut) == 2
    # the machine went down while a line and a file were being written
    with open(tmp_path/'cut'/'studies.csv', 'a') as f: f.write(cut.uids[0] + ',,0,')
    (tmp_path/'cut'/'studies'/'.x.safetensors.part').write_bytes(b'half')
    del calls[:]
    monkeypatch.setattr(module, 'predict_labels', answer)
    crops = crop_data_set(made.data, made.bundle, tmp_path/'cut', workers=1)
    assert len(calls) == 3 and not set(calls) & set(cut.uids)
    for uid in uids(made.data):
        same(crops.read(uid), whole.read(uid))
        assert crops.path(uid).read_bytes() == whole.path(uid).read_bytes()
    assert len(list((tmp_path/'cut'/'studies').iterdir())) == 5
    assert 'line' not in capsys.readouterr().err


@pytest.mark.parametrize('how', ['flipped', 'short', 'gone'])
def test_a_damaged_study_is_named_and_made_again(made, calls, tmp_path, how, capsys):
    crops = crop_data_set(made.data, made.bundle, tmp_path/'c', workers=1)
    uid = crops.uids[3]
    path, data = crops.path(uid), crops.path(uid).read_bytes()
    if how == 'flipped': path.write_bytes(data[:-50] + bytes([data[-50] ^ 1]) + data[-49:])
    if how == 'short': path.write_bytes(data[:len(data)//2])
    if how == 'gone': path.unlink()
    with pytest.raises(CspineError, match=f'{uid}.safetensors (is damaged|cannot be read)'): crops.read(uid)
    del calls[:]
    capsys.readouterr()
    again = crop_data_set(made.data, made.bundle, tmp_path/'c', workers=1)
    assert calls == [uid] and path.read_bytes() == data and len(again) == 5
    assert f'{uid}.safetensors is damaged: it is made again' in capsys.readouterr().err


def test_what_changed_is_made_again(made, calls, tmp_path):
    data = tmp_path/'data'
    shutil.copytree(made.data, data)
    before = crop_data_set(data, made.bundle, tmp_path/'c', workers=1)
    del calls[:]
    table = pd.read_csv(data/'train.csv', dtype={'StudyInstanceUID': str})
    table.loc[2, 'C4'] = 1 - table.loc[2, 'C4']
    table.to_csv(data/'train.csv', index=False)
    crop_data_set(data, made.bundle, tmp_path/'c', workers=1)
    assert calls == [table.StudyInstanceUID[2]]
    del calls[:]
    crop_data_set(data, random_bundle(tmp_path/'other', SMALL, seed=5), tmp_path/'c', workers=1)   # another stage 1
    assert len(calls) == len(before) == 5


def test_other_files_or_boxes_are_other_crops(made, calls, tmp_path):
    data = tmp_path/'data'
    shutil.copytree(made.data, data)
    crop_data_set(data, made.bundle, tmp_path/'c', workers=1)
    boxes = pd.read_csv(data/'train_bounding_boxes.csv', dtype={'StudyInstanceUID': str})
    moved, left = boxes.StudyInstanceUID.iloc[0], uids(data)
    cut = next(u for u in left if u != moved)
    for f in list((data/'train_images'/cut).iterdir())[::2]: f.unlink()                  # half of its slices
    boxes.loc[boxes.StudyInstanceUID == moved, 'height'] += 3
    boxes.to_csv(data/'train_bounding_boxes.csv', index=False)
    del calls[:]
    crop_data_set(data, made.bundle, tmp_path/'c', workers=1)
    assert sorted(calls) == sorted([moved, cut])
    del calls[:]
    crop_data_set(data, made.bundle, tmp_path/'c', workers=1)
    assert not calls


def test_a_study_that_stage_1_refuses_does_not_stop_the_others(made, calls, tmp_path, monkeypatch):
    answer, bad = module.predict_labels, uids(made.data)[1]

    def refuse(n, p, volume, d):
        if volume.uid == bad: raise CspineError('the scan spans\n3 m')
        return answer(n, p, volume, d)
    monkeypatch.setattr(module, 'predict_labels', refuse)
    crops = crop_data_set(made.data, made.bundle, tmp_path/'c', workers=1)
    assert len(crops) == 4 and crops.left_out == {bad: 'stage 1: the scan spans 3 m'}


def test_two_processes_make_the_same(made, tmp_path):
    "With the random network's own label maps, since the processes are others'"
    one, two = (crop_data_set(made.data, made.bundle, tmp_path/f'{n}', workers=n) for n in (1, 2))
    assert sorted(one.uids) == sorted(two.uids) and one.left_out == two.left_out and len(one) + len(one.left_out) == 5
    for uid in one.uids: assert one.path(uid).read_bytes() == two.path(uid).read_bytes()


def test_studies_without_crops(made, calls, tmp_path, monkeypatch, capsys):
    answer, data = module.predict_labels, tmp_path/'data'
    shutil.copytree(made.data, data)
    blank, lost, bad, *good = uids(data)
    shutil.rmtree(data/'train_images'/lost)
    for f in (data/'train_images'/bad).iterdir(): f.write_text('not a scan')
    monkeypatch.setattr(module, 'predict_labels', lambda n, p, volume, d: np.zeros_like(answer(n, p, volume, d)) if volume.uid == blank else answer(n, p, volume, d))
    crops = crop_data_set(data, made.bundle, tmp_path/'c', workers=1)
    assert sorted(crops.uids) == sorted(good) and set(crops.left_out) == {blank, lost, bad}
    assert 'finds no vertebra' in crops.left_out[blank] and 'no folder' in crops.left_out[lost]
    assert capsys.readouterr().err.count('left out: ') == 3
    with pytest.raises(CspineError, match=f'no crops of study {blank}: stage 1 finds no vertebra'): crops.read(blank)
    # copied again, it is read; the blank one is not labelled again
    shutil.rmtree(data/'train_images'/bad)
    shutil.copytree(made.data/'train_images'/bad, data/'train_images'/bad)
    del calls[:]
    assert sorted(crop_data_set(data, made.bundle, tmp_path/'c', workers=1).uids) == sorted([bad, *good]) and calls == [bad]


def test_it_says_beforehand_what_cannot_fit(made, calls, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda path: namedtuple('u', 'total used free')(10**9, 10**9-200_000, 200_000))
    with pytest.raises(CspineError, match='5 studies to crop, 0.1 MB each.*has 0.00 GB free: make room'): crop_data_set(made.data, made.bundle, tmp_path/'c', workers=1)
    assert not calls and not list((tmp_path/'c'/'studies').iterdir())


def test_it_refuses(made, calls, tmp_path):
    with pytest.raises(CspineError, match="no.* of that name"): crop_data_set(made.data, made.bundle, tmp_path/'none', device='abacus')
    assert not (tmp_path/'none').exists()
    crop_data_set(made.data, made.bundle, tmp_path/'c', workers=1)
    with pytest.raises(CspineError, match='another preset .slices 6, not 30; size 48, not 256;'): crop_data_set(made.data, made.bundle, tmp_path/'c', preset='paper')
    (tmp_path/'thesis').mkdir()
    (tmp_path/'thesis'/'x.txt').write_text('years of work')
    with pytest.raises(CspineError, match='is no crop data set'): crop_data_set(made.data, made.bundle, tmp_path/'thesis')
    with pytest.raises(CspineError, match='has no crops.json'): Crops(tmp_path/'thesis')
    shutil.copytree(made.data, tmp_path/'others')
    with pytest.raises(CspineError, match='crops of the data data, not of others'): crop_data_set(tmp_path/'others', made.bundle, tmp_path/'c')
    assert len(calls) == 5
    # what comes from elsewhere names no path
    path = tmp_path/'c'/'studies.csv'
    good = path.read_text()
    path.write_text(good.replace(uids(made.data)[1], '../../x'))
    with pytest.raises(CspineError, match='studies.csv is damaged'): Crops(tmp_path/'c')
    path.write_text(good)
    meta = json.loads((tmp_path/'c'/'crops.json').read_text())
    (tmp_path/'c'/'crops.json').write_text(json.dumps({**meta, 'format': 99}))
    with pytest.raises(CspineError, match='another version'): Crops(tmp_path/'c')


def test_every_field_that_decides_is_looked_at():
    "A field of the preset changes the crops if and only if it is one of CROP_FIELDS"
    study = make_study(902, size=64)
    base = replace(TINY, slices=6, size=32, sampled=0)   # so that each field may change alone
    want = crop_study(study.volume, study.labels, base)
    other = dict(encoder='resnet18', pretrained=False, decoder_channels=(16, 8, 8, 8, 8), slices=8, size=48, margin_mm=9., window=(900, 300), tilt=True, isolate=True,
                 group=6, every=6, along='slices', mask_channel=True, head='pooled', sampled=3, slice_loss=.5, cell_loss=.1, frozen=1, loss='bce', balance=.5, mixup=.2, classes=3, hidden=8, layers=1, patient='noisy_or', mask_loss=.3, dropout=.5, augment='none', epochs=7, batch=3,
                 lr=1e-5, weight_decay=.5, ema=.5, mirror=False)
    assert set(other) == set(base.__dataclass_fields__)
    for field, value in other.items():
        assert getattr(base, field) != value
        got = crop_study(study.volume, study.labels, replace(base, **{field: value}))
        alike = got['crops'].shape == want['crops'].shape and np.array_equal(got['crops'], want['crops'])
        assert alike == (field not in CROP_FIELDS), field


def test_a_rival_gets_crops_of_its_own(made, calls, tmp_path):
    preset = replace(get_preset('tiny'), segmentation=small_preset().segmentation)
    store = crop_data_set(made.data, made.bundle, tmp_path/'c', preset=preset, workers=1, model='resnet50_no_crop')
    want = {**CLASSIFICATION['resnet50_no_crop'].large, **CLASSIFICATION['resnet50_no_crop'].small}
    assert store.preset.classification.margin_mm == want['margin_mm'] != preset.classification.margin_mm
    with pytest.raises(CspineError, match='cspine crop --preset tiny --model resnet50_no_crop'):
        train_classification(made.data, preset, model='resnet50_no_crop', out=tmp_path/'r',
                             crops=crop_data_set(made.data, made.bundle, tmp_path/'d', preset=preset, workers=1).folder)


def test_batches(made, calls, tmp_path):
    "In other processes too, shuffled; the planes of a mask channel; two items of a seed are one"
    crops = crop_data_set(made.data, made.bundle, tmp_path/'c', workers=1)
    preset = replace(SMALL.classification, mask_channel=True)
    ds = CropDataset(crops, crops.uids, np.zeros((5, 8)), preset, seed=3)
    batches = [list(torch.utils.data.DataLoader(ds, batch_size=2, num_workers=n)) for n in (0, 2)]
    for a, b in zip(*batches):
        for x, y in zip(a, b): torch.testing.assert_close(x, y, atol=0, rtol=0, equal_nan=True)   # nan: nobody knows
    assert batches[0][0][0].shape == (2, 7, preset.planes, 48, 48) and batches[0][0][4].shape == (2, 7, 48, 48)
    study, plain = crops.read(crops.uids[0]), CropDataset(crops, crops.uids, np.zeros((5, 8)), preset, train=False)[0]
    assert np.array_equal(plain[0], crop_planes(study['crops'], study['masks'], preset))
    assert np.abs(plain[4].numpy()/255 - study['masks'].mean(1)).max() < .01


def test_training_wants_crops_that_suit(made, calls, tmp_path, capsys):
    crops = crop_data_set(made.data, made.bundle, tmp_path/'c', workers=1)
    with pytest.raises(CspineError, match='do not suit preset paper .slices 6, not 30'): train_classification(made.data, 'paper', crops=crops.folder, out=tmp_path/'r')
    with pytest.raises(CspineError, match='either the segmentation run .* or a crop data set'): train_classification(made.data, SMALL, out=tmp_path/'r')
    assert not (tmp_path/'r').exists()
    preset = replace(SMALL, folds=2, classification=replace(SMALL.classification, epochs=1, pretrained=False))
    run = train_classification(made.data, preset, crops=crops.folder, out=tmp_path/'r')
    assert 'cut by a bundle' in capsys.readouterr().err
    assert len(pd.read_csv(run/'oof.csv')) and not (run/'crops').exists()   # nothing is made twice


def test_a_contact_sheet(made, calls, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(['crop', '--data', str(made.data), '--bundle', str(made.bundle), '--out', str(tmp_path/'c'), '--workers', '1', '--view', str(tmp_path/'v.png')])
    assert not stop.value.code and (tmp_path/'v.png').read_bytes()[:4] == b'\x89PNG'
    assert f'crops: {tmp_path/"c"}, 5 of 5 studies' in capsys.readouterr().out
    crops = Crops(tmp_path/'c')
    fig = contact_sheet(crops, studies=2, slices=3)
    assert len(fig.axes) == 2*7*3
    most = sorted(crops.table.fractured, key=lambda f: -len(f.split()))[0].split()
    red = [ax.get_title() for ax in fig.axes[:7] if ax.title.get_color() == 'red']
    assert red == most and most
    framed = sum(ax.spines['top'].get_visible() for ax in fig.axes)
    uid = fig.subfigs[0].texts[0].get_text()
    at = np.linspace(0, 5, 5).round().astype(int)[1:-1]
    want = sum((crops.read(sub.texts[0].get_text())['broken'][:, at] == 1).sum() for sub in fig.subfigs)
    assert framed == want and uid in crops
    assert len(list(csv.DictReader(open(tmp_path/'c'/'studies.csv')))) == 5
    assert Path(tmp_path/'c'/'crops.json').exists()


def test_boxes_of_slices_that_are_not_there_are_counted(made, calls, tmp_path, capsys):
    data = shutil.copytree(made.data, tmp_path/'data')
    path = data/'train_bounding_boxes.csv'
    boxes = pd.read_csv(path, dtype={'StudyInstanceUID': str})
    uid, n = boxes.StudyInstanceUID.iloc[0], len(boxes)
    some = boxes.copy()
    some.loc[some.index[:2], 'slice_number'] += 5000
    pd.concat([some, some.iloc[-1:].assign(StudyInstanceUID='1.2.3')]).to_csv(path, index=False)
    crops = crop_data_set(data, None, tmp_path/'c', SMALL, workers=1, masks=True)
    said = capsys.readouterr().err
    assert f'2 of {n} boxes name slices that are not there, in {uid} (2 of {(boxes.StudyInstanceUID == uid).sum()})' in said
    assert '1 boxes are of studies that train.csv lacks' in said and crops.table.no_slice[uid] == '2'
    crop_data_set(data, None, tmp_path/'c', SMALL, workers=1, masks=True)   # nothing to do, and said again
    assert f'2 of {n} boxes' in capsys.readouterr().err
    boxes.assign(slice_number=boxes.slice_number + 5000).to_csv(path, index=False)
    with pytest.raises(CspineError, match=f'{n} of {n} boxes name slices that are not there.*a slice_number is the number in the name'):
        crop_data_set(data, None, tmp_path/'c2', SMALL, workers=1, masks=True)


def test_masks_that_are_nowhere_are_an_error(made, tmp_path):
    data = shutil.copytree(made.data, tmp_path/'data')
    for f in (data/'segmentations').iterdir(): f.rename(f.with_name('mask_' + f.name))
    with pytest.raises(CspineError, match=r'holds no mask of any of the 5 studies: a mask is named StudyInstanceUID\.nii'):
        crop_data_set(data, None, tmp_path/'c', SMALL, workers=1, masks=True)
    assert not (tmp_path/'c').exists()
