"YOLO: what is trained, resumed, bundled and refused; no network, no files elsewhere, no pickle"
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from cspine import crops
from cspine.bundle import bundle, load_bundle, random_bundle, small_preset
from cspine.cropping import boxes_from_labels
from cspine.detection import DetectionFigures, boxes_from_slices, build_detection, mask_note, predict_boxes
from cspine.dicom import read_series
from cspine.inference import Pipeline
from cspine.phantom import make_study, phantom
from cspine.presets import CspineError
from cspine.rsna import folds, read_folds, read_mask, read_train, write_folds
from cspine.training import read_run, train_classification, train_detection
from matplotlib import get_cachedir
from safetensors.torch import load_file
from test_bundle import edit, make_run

SMALL = small_preset()
SMALL = replace(SMALL, folds=2, detection=replace(SMALL.detection, epochs=3, batch=4))
YOLO = replace(SMALL, boxes='yolo')


@pytest.fixture(scope='module')
def data(tmp_path_factory): return phantom(tmp_path_factory.mktemp('data')/'phantom', train=4, test=0, size=64, seed=9200, odd=0, workers=1)


@pytest.fixture(scope='module')
def seg(data, tmp_path_factory):
    "A stage-1 run as training leaves it, with random weights"
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp('seg')/'seg'
    make_run(run, 'segmentation', SMALL)
    write_folds(folds(read_train(data/'train.csv'), 2, 0), run/'folds.csv')
    return run


GUARDED = '''
import json, socket, sys, torch
tried = []
def no(*a, **k):
    tried.append(str(a)); raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = no
save, printed, env = torch.save, torch._tensor_str.PRINT_OPTS.linewidth, None
import os
env = dict(os.environ)
from cspine.presets import Preset
from cspine.training import train_detection
train_detection(sys.argv[1], Preset.from_dict(json.loads(sys.argv[2])), sys.argv[3], sys.argv[4], workers=1)
assert torch.save is save and torch._tensor_str.PRINT_OPTS.linewidth == printed, "torch is as it was"
assert not {k for k in os.environ if k.startswith(("YOLO", "NUMEXPR"))}, "the environment is as it was"
assert "ultralytics.engine.trainer" not in sys.modules
assert not tried, tried
'''


@pytest.fixture(scope='module')
def trained(data, seg, tmp_path_factory):
    "A run, trained in a process of its own: its home, its folder, and what it said"
    at = tmp_path_factory.mktemp('trained')
    for d in ('home', 'here'): (at/d).mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(('YOLO', 'XDG'))}
    env |= dict(HOME=str(at/'home'), MPLCONFIGDIR=get_cachedir(),   # its list of fonts takes long to make
               PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, '-c', GUARDED, str(data), json.dumps(SMALL.to_dict()), str(seg), str(at/'run')],
                          cwd=at/'here', env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return at, done


def test_no_network_and_no_files_but_the_run(trained):
    at, done = trained
    assert not [*(at/'home').rglob('*')] and not [*(at/'here').rglob('*')]
    assert {p.name for p in (at/'run').iterdir()} == {'run.json', 'folds.csv', 'boxes.csv', 'fold0', 'cache', '.lock'}
    assert {p.name for p in (at/'run'/'fold0').iterdir()} == {'model.safetensors', 'log.csv', 'checkpoints'}
    assert len(done.stdout.splitlines()) == 1 and done.stdout.startswith('fold 0: IoU')   # and nothing of ultralytics'
    assert 'ltralytics' not in done.stdout + done.stderr


def test_a_run_holds_what_inference_needs(trained, seg):
    run = trained[0]/'run'
    d = read_run(run)
    assert d['kind'] == 'detection' and d['folds'] == [0] and d['preset'] == SMALL
    assert (run/'folds.csv').read_text() == (seg/'folds.csv').read_text()
    assert d['figures']['fold0']['studies'] == dict(train=2, valid=2, predicted=0)
    log = pd.read_csv(run/'fold0'/'log.csv')
    assert log.epoch.tolist() == [1, 2, 3] and {'recall', 'precision', 'iou'} <= set(log)
    net = build_detection(SMALL.detection)
    net.load_state_dict(load_file(run/'fold0'/'model.safetensors'))
    table = pd.read_csv(run/'boxes.csv', keep_default_na=False)
    assert len(table) == 2*7 and set(table.fold) == {0} and set(table.source) <= {'yolo', 'mask', ''}


@pytest.mark.parametrize('slice_mm', [SMALL.detection.slice_mm, 0.])
def test_the_room_for_the_slices_is_told_and_must_be_there(data, seg, trained, tmp_path, monkeypatch, slice_mm):
    preset = replace(SMALL, detection=replace(SMALL.detection, slice_mm=slice_mm))
    monkeypatch.setattr(crops.shutil, 'disk_usage', lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(CspineError, match='4 studies to read, .* MB each.* make room') as e: train_detection(data, preset, seg, tmp_path/'run', workers=1)
    told = float(re.search(r'read, ([\d.]+) MB', str(e.value))[1])*1e6
    if slice_mm: real = np.mean([f.stat().st_size for f in (trained[0]/'run'/'cache').iterdir()])
    else: real = np.mean([len(read_series(f).hu) for f in (data/'train_images').iterdir()])*4*preset.detection.size**2
    assert .9*real < told < 1.6*real   # a phantom is shorter than the 250 mm that are told


def test_a_run_that_was_cut_off_ends_the_same(data, seg, trained, tmp_path, monkeypatch, capsys):
    reset, calls = DetectionFigures.reset, []

    def cut(self):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        reset(self)
    monkeypatch.setattr(DetectionFigures, 'reset', cut)
    with pytest.raises(KeyboardInterrupt): train_detection(data, SMALL, seg, tmp_path/'run', workers=1)
    assert not (tmp_path/'run'/'fold0'/'model.safetensors').exists()
    train_detection(data, SMALL, seg, tmp_path/'run', resume=True, workers=1)
    whole, cut_off = (load_file(r/'fold0'/'model.safetensors') for r in (trained[0]/'run', tmp_path/'run'))
    for k, v in whole.items(): torch.testing.assert_close(cut_off[k], v, rtol=1e-3, atol=1e-4)
    with pytest.raises(CspineError, match='another preset, model or number of epochs'):
        train_detection(data, SMALL, seg, tmp_path/'run', resume=True, epochs=5)


def test_studies_without_a_mask_have_stage_1s_label_map(data, seg, tmp_path, capsys):
    few = tmp_path/'few'
    shutil.copytree(data, few)
    fold_of = read_folds(seg/'folds.csv')
    gone = fold_of.index[fold_of == 1][0]
    (few/'segmentations'/f'{gone}.nii').unlink()
    run = train_detection(few, SMALL, seg, tmp_path/'a', epochs=1, workers=1)
    assert read_run(run)['figures']['fold0']['studies'] == dict(train=1, valid=2, predicted=0)
    run = train_detection(few, SMALL, seg, tmp_path/'b', epochs=1, predicted=9, workers=1)
    assert read_run(run)['figures']['fold0']['studies'] == dict(train=2, valid=2, predicted=1)
    labels, = [np.load(p)[:, 1] for p in (run/'cache').glob(f'{gone}*.npy')]
    assert not labels.any()   # untrained, stage 1 finds nothing
    for f in (few/'segmentations').iterdir(): f.unlink()
    with pytest.raises(CspineError, match='more masks'): train_detection(few, SMALL, seg, tmp_path/'c', workers=1)
    with pytest.raises(CspineError, match='is a run of detection'): train_detection(data, SMALL, run, tmp_path/'c')


def test_it_learns():
    "From nothing to half of the boxes, and where they are, on slices that it was shown"
    from cspine.detection import DetectionLoss, detection_slices, slice_boxes
    from cspine.windowing import three_windows
    study = make_study(4, size=64)
    slices = detection_slices(study.volume, study.labels, SMALL.detection)
    slices = slices[(slices[:, 1] > 0).any((1, 2))][::2][:8]
    x = three_windows(torch.from_numpy(slices[:, 0]).float())
    true = torch.stack([torch.from_numpy(slice_boxes(s.astype(np.uint8))) for s in slices[:, 1]])
    torch.manual_seed(0)
    net = build_detection(SMALL.detection)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = .3   # a few steps must do for the running statistics

    def recall():
        figures = DetectionFigures(SMALL.detection)
        figures.reset()
        with torch.inference_mode(): figures.update(net.eval()(x), true)
        net.train()
        return figures.figures()
    before, loss = recall(), DetectionLoss(net)
    opt, losses = torch.optim.AdamW(net.parameters(), 3e-3), []
    for _ in range(65):
        losses.append(loss(net(x), true))
        opt.zero_grad(); losses[-1].backward(); opt.step()
    after = recall()
    assert losses[-1] < .5*max(losses) and before['recall'] == 0, (losses, before)
    assert after['recall'] > .35 and after['precision'] > .7 and after['iou'] > .7, after   # half of the boxes are slivers of 3 px


def no_pickle(monkeypatch):
    def no(*a, **k): raise AssertionError('a bundle is never unpickled')
    for module, name in ((torch, 'load'), (torch.serialization, 'load'), (pickle, 'load'), (pickle, 'loads'), (pickle, 'Unpickler')):
        monkeypatch.setattr(module, name, no)


def test_a_bundle_with_a_yolo_comes_back(trained, seg, data, tmp_path, monkeypatch, capsys):
    run = trained[0]/'run'
    make_run(tmp_path/'cls', 'classification', YOLO)
    out = bundle([seg, run, tmp_path/'cls'], tmp_path/'b')
    assert '3 models' in capsys.readouterr().out and (out/'detection_fold0.safetensors').exists()
    no_pickle(monkeypatch)
    b = load_bundle(out)
    assert b.preset.boxes == 'yolo' and b.preset.detection == SMALL.detection and len(b.detection) == 1 and 'YOLO' in repr(b)
    assert 'AGPL-3.0' in b.card['licence'] and b.card['runs']['detection']
    state = b.detection[0].state_dict()
    for k, v in load_file(run/'fold0'/'model.safetensors').items(): torch.testing.assert_close(state[k], v, rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for p in b.detection[0].parameters())


def test_what_does_not_belong_together_is_refused(trained, seg, tmp_path):
    run = trained[0]/'run'
    make_run(tmp_path/'mask', 'classification', SMALL)
    make_run(tmp_path/'yolo', 'classification', YOLO)
    with pytest.raises(CspineError, match='leave it out'): bundle([seg, run, tmp_path/'mask'], tmp_path/'b')
    with pytest.raises(CspineError, match="give that detection run's folder"): bundle([seg, tmp_path/'yolo'], tmp_path/'b')
    out = random_bundle(tmp_path/'r', YOLO)
    edit(out, lambda d: d['stages'].pop('detection'))
    with pytest.raises(CspineError, match='names 0 detection files'): load_bundle(out)
    out = random_bundle(tmp_path/'r', YOLO)
    edit(out, lambda d: d['preset'].update(boxes='mask'))
    with pytest.raises(CspineError, match='those of the label map'): load_bundle(out)
    out = random_bundle(tmp_path/'r', YOLO)
    edit(out, lambda d: d['stages']['detection'][0].update(file='../x.safetensors'))
    with pytest.raises(CspineError, match='not a plain'): load_bundle(out)
    out = random_bundle(tmp_path/'r', YOLO)
    edit(out, lambda d: d['preset']['detection'].update(model='yolov5s'))
    with pytest.raises(CspineError, match='do not fit'): load_bundle(out)
    random_bundle(out, SMALL)   # an old YOLO does not stay behind
    assert not (out/'detection_fold0.safetensors').exists() and not load_bundle(out).detection


def test_without_ultralytics_a_sentence_says_what_to_install(data, seg, tmp_path, monkeypatch):
    out = random_bundle(tmp_path/'b', YOLO)
    for name in [n for n in sys.modules if n.split('.')[0] == 'ultralytics']: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'ultralytics', None)
    env = dict(os.environ)
    for what in (lambda: build_detection(SMALL.detection), lambda: load_bundle(out), lambda: train_detection(data, SMALL, seg, tmp_path/'run')):
        with pytest.raises(CspineError, match=r'AGPL-3.0.*pip install "cspine\[yolo\]"'): what()
    assert not (tmp_path/'run').exists() and dict(os.environ) == env
    assert load_bundle(random_bundle(tmp_path/'m', SMALL)).detection == []   # and nobody else misses it


def test_the_pipeline_cuts_by_yolos_boxes(tmp_path, monkeypatch):
    study = make_study(5, size=64)
    pipeline = Pipeline(random_bundle(tmp_path/'b', YOLO), device='cpu')
    n, ny, nx = study.volume.shape

    class Painted(torch.nn.Module):   # sees C5 on every slice, in the middle
        def forward(self, x):
            y = torch.zeros(len(x), 11, 1)
            y[:, :4, 0], y[:, 4+4, 0] = torch.tensor([32., 32., 16., 8.]), .9
            return y, None
    pipeline.bundle.detection = [Painted()]
    p = pipeline.predict(study.volume, labels=study.labels)
    assert p.boxes[4].tolist() == [0, n, round(28*ny/64), round(36*ny/64), round(24*nx/64), round(40*nx/64)]
    absent = {f'C{i+1}' for i in range(7) if not (study.labels == i+1).any()} | {'C5'}
    note, = [s for s in p.notes if 'YOLO' in s]
    assert note.startswith('YOLO finds no ' + ', '.join(c for c in ('C1', 'C2', 'C3', 'C4', 'C6', 'C7') if c not in absent))
    assert p.present.sum() == 8-len(absent) and 'boxes' in p.seconds
    assert p.boxes_from == tuple('yolo' if i == 4 else 'mask' if f'C{i+1}' not in absent else '' for i in range(7))
    p = Pipeline(random_bundle(tmp_path/'m', SMALL), device='cpu').predict(study.volume, labels=study.labels)
    assert p.boxes_from == tuple('mask' if (study.labels == i+1).any() else '' for i in range(7))


def scene():
    "Boxes and scores of a perfect YOLO on 70 slices of 1 mm: ten of each level, one below the other"
    boxes = np.tile(np.array([10., 30., 20., 50.]), (70, 7, 1))
    scores = np.zeros((70, 7))
    for level in range(7): scores[10*level:10*level+10, level] = .8
    return boxes, scores


def union(boxes, scores, dz=1.): return boxes_from_slices(boxes, scores, 1, (len(boxes), 64, 64), dz, .25)


def test_one_slice_changes_no_box():
    boxes, scores = scene()
    want = np.array([[10*i, 10*i+10, 10, 30, 20, 50] for i in range(7)])
    assert (union(boxes, scores) == want).all()
    for z in range(70):
        for level in range(7):
            b, s = boxes.copy(), scores.copy()
            b[z, level] = [0, 64, 0, 64]
            assert (union(b, s) == want).all()          # too large where it is
            if abs(z-(10*level+4.5)) > 6:
                s[z, level] = .99
                assert (union(b, s) == want).all()      # and where it is not
            if 1 < z-10*level < 8:
                s[z, level] = 0
                assert (union(boxes, s) == want).all()  # or missing


def test_levels_come_in_order_and_are_tall_enough():
    boxes, scores = scene()
    scores[:, 2] = 0
    scores[60:70, 2] = .5   # C3 where C7 is: the weaker of the two goes
    got = union(boxes, scores)
    assert got[2].tolist() == [-1]*6 and (got[[0, 1, 3, 4, 5, 6], 0] >= 0).all()
    boxes, scores = scene()
    scores[:, 3] = 0
    scores[33:36, 3] = .9   # three slices of 1 mm are no vertebra, of 2 mm they are
    assert (union(boxes, scores)[3] == -1).all() and (union(boxes, scores, 2.)[3] >= 0).all()
    scores[:] = 0
    scores[:3, 0] = .9      # the scan ends in it
    assert union(boxes, scores)[0].tolist() == [0, 3, 10, 30, 20, 50]
    assert (union(boxes, scores*0) == -1).all()
    boxes[:, 0] = [-20, -10, 70, 90]
    assert (union(boxes, scores) == -1).all()   # beyond the scan


def test_weights_that_are_no_numbers_find_nothing():
    study = make_study(5, size=64)
    net = build_detection(SMALL.detection)
    for p in net.parameters(): p.data.fill_(float('nan'))
    boxes, source = predict_boxes([net], SMALL.detection, study.volume, labels=study.labels)
    assert set(source) <= {'mask', ''} and mask_note(source)
    with pytest.raises(CspineError, match='no detection model'): predict_boxes([], SMALL.detection, study.volume)
    with pytest.raises(CspineError, match='same grid'): predict_boxes([net], SMALL.detection, study.volume, labels=study.labels[1:])


def test_stage_2_learns_from_yolos_boxes(data, seg, trained, tmp_path, monkeypatch, capsys):
    yolo, seen = trained[0]/'run', []

    def boxes(models, preset, volume, device, labels):
        "A box half as high as the vertebra, and none of C5"
        seen.append(volume.uid)
        assert isinstance(models[0], torch.nn.Module) and preset == SMALL.detection
        b = boxes_from_labels(labels)
        b[:, 1] = np.where(b[:, 0] < 0, -1, (b[:, 0]+b[:, 1]+1)//2)
        b[4] = boxes_from_labels(labels)[4]
        return b, ['mask' if i == 4 else 'yolo' for i in range(7)]
    monkeypatch.setattr(crops, 'predict_labels', lambda n, p, volume, d: read_mask(data/'segmentations'/f'{volume.uid}.nii', volume))
    monkeypatch.setattr(crops, 'predict_boxes', boxes)
    run = train_classification(data, SMALL, seg, tmp_path/'cls', epochs=1, workers=1, detection=yolo)
    store, = map(crops.Crops, (run/'crops').iterdir())
    assert sorted(seen) == sorted(store.uids) and len(seen) == 4
    assert 'YOLO finds no box of 4 of 28 vertebrae, in 4 of 4 studies' in capsys.readouterr().err
    assert set(store.table.from_mask) == {'C5'} and read_run(run)['preset'].boxes == 'yolo'
    volume = read_series(data/'train_images'/seen[0])
    labels = read_mask(data/'segmentations'/f'{seen[0]}.nii', volume)
    half = crops.crop_study(volume, labels, SMALL.classification, boxes=boxes([torch.nn.Module()], SMALL.detection, volume, 'cpu', labels)[0])
    np.testing.assert_array_equal(store.read(seen[0])['crops'], half['crops'])
    assert (half['crops'] != crops.crop_study(volume, labels, SMALL.classification)['crops']).any()

    with pytest.raises(CspineError, match='crops that other networks cut'): train_classification(data, SMALL, seg, run, epochs=1, workers=1, resume=True)
    out = bundle([seg, yolo, run], tmp_path/'b')
    assert load_bundle(out).preset.boxes == 'yolo'
    seen.clear()
    assert len(crops.crop_data_set(data, out, tmp_path/'crops', workers=1)) == len(seen) == 4   # as the bundle cuts when it predicts
    seen.clear()
    train_classification(data, SMALL, seg, tmp_path/'mask', epochs=1, workers=1)
    assert not seen and read_run(tmp_path/'mask')['preset'].boxes == 'mask'


def test_a_rival_of_stage_1_comes_into_a_bundle(data, tmp_path, monkeypatch):
    "Its run has a preset of its own name; stage 2 takes that name over"
    rival = replace(SMALL, name='small-rival', segmentation=replace(SMALL.segmentation, low_widths=(4, 12)))
    make_run(tmp_path/'seg', 'segmentation', rival)
    write_folds(folds(read_train(data/'train.csv'), 2, 0), tmp_path/'seg'/'folds.csv')
    monkeypatch.setattr(crops, 'predict_labels', lambda n, p, volume, d: read_mask(data/'segmentations'/f'{volume.uid}.nii', volume))
    run = train_classification(data, SMALL, tmp_path/'seg', tmp_path/'cls', epochs=1, workers=1)
    b = load_bundle(bundle([tmp_path/'seg', run], tmp_path/'b'))
    assert b.preset.segmentation == rival.segmentation and b.preset.name == 'small-rival'
    other = replace(rival, segmentation=replace(rival.segmentation, low_widths=(4, 16)))
    make_run(tmp_path/'other', 'segmentation', other)
    write_folds(folds(read_train(data/'train.csv'), 2, 0), tmp_path/'other'/'folds.csv')
    with pytest.raises(CspineError, match='crops that other networks cut'):      # another stage 1 in the middle of a run
        train_classification(data, SMALL, tmp_path/'other', run, epochs=1, workers=1, resume=True)


def test_a_box_that_fits_another_vertebra_is_not_taken(monkeypatch):
    "YOLO calls C4 by the name of C3 and sees nothing else: the label map's boxes, each vertebra once"
    study = make_study(6, size=64)
    drawn = boxes_from_labels(study.labels)
    assert (drawn[2:4] >= 0).all()
    boxes = np.full((7, 6), -1)
    boxes[2] = drawn[3]
    monkeypatch.setattr('cspine.detection.predict_slices', lambda *a: (None, None, 1))
    monkeypatch.setattr('cspine.detection.boxes_from_slices', lambda *a: boxes.copy())
    got, source = predict_boxes([], SMALL.detection, study.volume, 'cpu', study.labels)
    np.testing.assert_array_equal(got, drawn)
    assert set(source) <= {'mask', ''}
    boxes[2] = drawn[2]+[1, 1, 0, 0, 2, 2]      # its own, a little off, stays
    got, source = predict_boxes([], SMALL.detection, study.volume, 'cpu', study.labels)
    np.testing.assert_array_equal(got[2], boxes[2])
    assert source[2] == 'yolo' and source[3] == 'mask'


def test_two_slices_make_a_union():
    boxes, scores = np.zeros((2, 7, 4)), np.zeros((2, 7))
    boxes[:, 3], scores[:, 3] = [[0, 10, 10, 20], [12, 20, 15, 30]], .8
    assert boxes_from_slices(boxes, scores, 1, (2, 64, 64), 3., .25)[3].tolist() == [0, 2, 0, 20, 10, 30]


def test_yolo_is_refused_where_it_cannot_serve(data, seg, tmp_path, monkeypatch):
    with pytest.raises(CspineError, match='tilt'): replace(YOLO, classification=replace(YOLO.classification, tilt=True))
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(CspineError, match='one process'): train_detection(data, SMALL, seg, tmp_path/'run')


def test_another_detection_run_is_refused(data, seg, trained, tmp_path):
    other = tmp_path/'other'
    shutil.copytree(trained[0]/'run', other)
    write_folds(1-read_folds(other/'folds.csv'), other/'folds.csv')
    with pytest.raises(CspineError, match='belong together'): train_classification(data, SMALL, seg, tmp_path/'a', detection=other)
    with pytest.raises(CspineError, match='is a run of segmentation; crops need one of detection'): train_classification(data, SMALL, seg, tmp_path/'a', detection=seg)
    with pytest.raises(CspineError, match='whose own boxes cut'): crops.crop_data_set(data, random_bundle(tmp_path/'b', SMALL), tmp_path/'a', detection=other)
    assert not (tmp_path/'a').exists()
