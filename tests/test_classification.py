"Stage 2: the paper's size, learning, and a whole training run with its folds, its cache and its second start."
import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

import cspine.crops as crops_module
import cspine.evaluation as evaluation
import cspine.training as training
from cspine.bundle import bundle, load_bundle
from cspine.classification import (CrackNetBiLSTM, CropDataset, FractureLoss, _answers, _sample, cross_calibrated, evidence_hits, fit_calibration,
                                   predict_probabilities, with_prior)
from cspine.cropping import crop_planes
from cspine.cli import main
from cspine.dicom import write_series
from cspine.metrics import evaluate_run, read_oof
from cspine.presets import TARGETS, CspineError, get_preset
from cspine.rivals import CLASSIFICATION
from cspine.rsna import PRIOR, folds, metric, read_folds, read_train, write_folds
from cspine.segmentation import build_segmentation, low_preset

TINY = get_preset('tiny')
SMALL = replace(TINY, folds=2,
                segmentation=replace(low_preset(TINY.segmentation), widths=(4, 8), patch=16, steps=60, epochs=3),
                classification=replace(TINY.classification, head='pooled', sampled=0, cell_loss=0., frozen=0, ema=.9, encoder='tu-test_resnet', decoder_channels=(16, 8, 8, 8, 8), mask_loss=.2, group=15, every=15, size=32,
                                       hidden=16, epochs=3, batch=2, margin_mm=2.))


def test_paper_at_full_size():
    "One step of training and one prediction, 30 x 256 x 256, ResNet-101 and all"
    preset = get_preset('paper').classification
    assert (preset.encoder, preset.slices, preset.size, preset.layers, preset.classes) == ('resnet101', 30, 256, 2, 7)
    torch.manual_seed(0)
    model = CrackNetBiLSTM(preset).train()
    assert 50e6 < sum(p.numel() for p in model.parameters()) < 70e6
    opt = torch.optim.AdamW(model.parameters(), lr=preset.lr, weight_decay=preset.weight_decay)
    crops = torch.randint(0, 256, (1, 7, 30, 256, 256), dtype=torch.uint8)
    present = torch.tensor([[1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)   # what is absent takes no time, and needs the same weights
    pred = model(crops, present)
    assert pred[0].shape == (1, 8) and pred[1].shape == (1, 7, 256, 256) and pred[2] is None
    loss = FractureLoss(mask_loss=preset.mask_loss)(pred, torch.tensor([[0, 1, 0, 0, 0, 0, 0, 1.]]), present,
                                                    (crops[:, :, 0] > 127).byte()*255, torch.full((1, 7, 1), np.nan), torch.zeros(1, 7, 0))
    loss.backward()
    lost = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not lost   # every weight learns: encoder, decoder, map, LSTM
    before = model.lstm.weight_ih_l0.detach().clone()
    opt.step()
    assert (model.lstm.weight_ih_l0 != before).any()
    p = predict_probabilities([model], preset, crops[0].numpy(), present[0].numpy())
    assert p.shape == (8,) and (p > 0).all() and (p < 1).all()
    assert p[7] >= p[:2].max() - 1e-9   # noisy or


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('preset', [SMALL.classification, replace(SMALL.classification, decoder_channels=()), replace(SMALL.classification, decoder_channels=(), head='cells')], ids=['map', 'no map', 'cells'])
def test_mixed_precision(preset, dtype):
    "What a GPU, or a CPU with bfloat16, does in training: half precision inside, float32 answers close to the full ones"
    torch.manual_seed(0)
    model = CrackNetBiLSTM(replace(preset, dropout=0.)).train()
    crops, present = torch.randint(0, 256, (2, 7, 30, 32, 32), dtype=torch.uint8), torch.rand(2, 7) < .8
    with torch.no_grad(): full = model(crops, present)
    with torch.autocast('cpu', dtype): half = model(crops, present)
    for f, h in zip(full, half):
        if f is None: assert h is None; continue
        assert h.dtype == torch.float32 and (f-h)[..., :7].abs().max() < .1*max(1, f.abs().max())
    FractureLoss('competition', .2, 1., .25)(half, torch.ones(2, 8), present, crops[:, :, 0], torch.zeros(2, 7, 2), torch.zeros(2, 7, 2, 2, 2)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(model.get_parameter(n).grad is not None for n in ('likely.weight' if preset.head == 'cells' else 'slice.weight', 'squeeze.weight', 'vertebra.weight'))


def test_tiny_fits_the_demo_bundle():
    n = sum(v.numel() for v in CrackNetBiLSTM(TINY.classification).state_dict().values())
    assert 2*n < 11e6   # bytes as float16; 20 MB, less 8 MB for stage 1


def broken_necks(n, size=32, seed=0):
    "Crops of bright squares, and which of them have a dark gap; the square's place differs from level to level"
    rng = np.random.default_rng(seed)
    crops = rng.integers(20, 60, (n, 7, 30, size, size)).astype(np.uint8)
    truth = rng.random((n, 7)) < .3
    masks = np.zeros((n, 7, size, size), np.uint8)
    for i, level in np.ndindex(n, 7):
        y, x = rng.integers(4, 10, 2)
        crops[i, level, :, y:y+16, x:x+16] = 200
        masks[i, level, y:y+16, x:x+16] = 255
        if truth[i, level]: crops[i, level, 5:25, y+7:y+9, x:x+16] = 40
    return crops, masks, np.concatenate([truth, truth.any(1, keepdims=True)], 1)


def test_it_learns_which_vertebra_is_broken():
    torch.manual_seed(0)
    preset = replace(SMALL.classification, dropout=0.)
    crops, masks, truth = broken_necks(16)
    model, loss = CrackNetBiLSTM(preset), FractureLoss('competition', 1., 1.)
    opt = torch.optim.AdamW(model.parameters(), lr=8e-3)
    x, m, y = torch.from_numpy(crops), torch.from_numpy(masks), torch.from_numpy(truth).float()
    z = y[:, :7, None].expand(16, 7, 2)   # slices 5 to 24 of 30, in groups of 15
    nothing = torch.zeros(16, 7, 0)
    there = torch.ones(16, 7, dtype=torch.bool)
    for epoch in range(12):
        for i in torch.randperm(16).split(4):
            opt.zero_grad()
            loss(model(x[i], there[i]), y[i], there[i], m[i], z[i], nothing[i]).backward()
            opt.step()
    new, masks, truth = broken_necks(12, seed=1)
    model.eval()
    p = np.array([predict_probabilities([model], preset, c, np.ones(7, bool)) for c in new])
    assert roc_auc_score(truth[:, :7].ravel(), p[:, :7].ravel()) > .9
    with torch.no_grad(): own = model(torch.from_numpy(new), torch.ones(12, 7, dtype=torch.bool))[1]
    assert ((own > 0) == (torch.from_numpy(masks) > 127)).float().mean() > .85   # the map has found the bone
    assert 2*((own > 0) & (torch.from_numpy(masks) > 127)).sum() / ((own > 0).sum() + (masks > 127).sum()) > .7


# --- a run from DICOM to oof.csv -------------------------------------------------------------------------------------

UIDS = [f'1.2.3.{i}' for i in range(10)]
BLANK = UIDS[4]    # stage 1 finds nothing
NOT_CT = UIDS[7]   # its folder holds a text


def label_map():
    labels = np.zeros((70, 40, 44), np.uint8)
    for level in range(7): labels[6+9*level:13+9*level, 12:28, 14:30] = level+1
    return labels


def finds(models, preset, volume, device='cpu'):
    "Stands in for stage 1, which these small necks cannot train: the truth, and for one study nothing"
    assert len(models) == 1 and preset == SMALL.segmentation
    return label_map() if volume.uid != BLANK else np.zeros(volume.hu.shape, np.uint8)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    rng, rows = np.random.default_rng(0), []
    affine = np.array([[0, 0, 1, 0], [0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 1.]])
    for i, uid in enumerate(UIDS):
        broken = np.zeros(7, int)
        if i % 2: broken[rng.integers(7)] = 1
        hu = np.where(label_map() > 0, 600, 30) + rng.normal(0, 30, label_map().shape)
        for level in np.flatnonzero(broken): hu[6+9*level:13+9*level, 19:21, 14:30] = 0
        if uid == NOT_CT: (folder/'train_images'/uid).mkdir(parents=True); (folder/'train_images'/uid/'1.dcm').write_text('not a scan')
        else: write_series(hu.astype(np.int16), affine, folder/'train_images'/uid, uid=uid)
        rows.append([uid, broken.any().astype(int), *broken])
    pd.DataFrame(rows, columns=['StudyInstanceUID', 'patient_overall', *TARGETS[:7]]).to_csv(folder/'train.csv', index=False)
    return folder


@pytest.fixture(scope='module')
def seg_run(tmp_path_factory, data):
    run = tmp_path_factory.mktemp('seg')/'run'
    for k in range(2):
        (run/f'fold{k}').mkdir(parents=True)
        torch.manual_seed(k)
        save_file(build_segmentation(SMALL.segmentation).state_dict(), run/f'fold{k}'/'model.safetensors')
    write_folds(folds(read_train(data/'train.csv'), 2, 0), run/'folds.csv')
    (run/'run.json').write_text(json.dumps(dict(kind='segmentation', preset=SMALL.to_dict(), folds=[0, 1], seed=0, figures={})))
    return run


@pytest.fixture(autouse=True)
def stage_1(monkeypatch):
    monkeypatch.setattr(crops_module, 'predict_labels', finds)


@pytest.fixture
def few_samples(monkeypatch):
    "Of the bootstrap, whose intervals are tested elsewhere: a thousand take half a minute a table"
    monkeypatch.setattr(evaluation, 'evaluate_run', partial(evaluate_run, samples=20))


def train(data, seg_run, out, **kw):
    return training.train_classification(data, replace(SMALL, folds=5), seg_run, out, workers=1, **kw)


@pytest.fixture(scope='module')
def cut_off(data, seg_run, tmp_path_factory):
    "A run of fold 0 with its checkpoints, stopped before its answers; and what it comes to when it goes on undisturbed. To be copied, not changed"
    cut = tmp_path_factory.mktemp('runs')/'cut'
    def stopped(*_): raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as m:
        m.setattr(crops_module, 'predict_labels', finds)
        with m.context() as stop:
            stop.setattr(training, '_write_oof', stopped)
            with pytest.raises(KeyboardInterrupt): train(data, seg_run, cut)
        return cut, train(data, seg_run, cut.parent/'whole')


def check_oof(run, oof, k, store, truth, cls):
    "Each answer is that of the model which has not seen the study, with the calibration that the other half of such studies teaches"
    model = CrackNetBiLSTM(cls)
    model.load_state_dict(load_file(run/f'fold{k}'/'model.safetensors'))
    assert not (model.scale == 1).all()
    model.scale.fill_(1)
    model.shift.zero_()
    uids = oof.index[oof.fold == k]
    read = [store.read(u) if u in store.uids else None for u in uids]
    there = np.array([np.zeros(7, bool) if s is None else s['present'] for s in read])
    raw = np.array([PRIOR[list(TARGETS)] if s is None else _answers([model], cls, crop_planes(s['crops'], s['masks'], cls), s['present'])[0] for s in read])
    want = with_prior(cross_calibrated(truth.loc[uids, list(TARGETS)].to_numpy(), raw, there), there)
    np.testing.assert_allclose(want, oof.loc[uids, list(TARGETS)].astype(float), atol=1e-5)
    assert len(uids) > 1


def test_a_run(data, seg_run, tmp_path, capsys):
    run = train(data, seg_run, tmp_path/'run', fold='all')
    said = capsys.readouterr().err
    assert f'{BLANK}: stage 1 finds no vertebra' in said and f'left out: {NOT_CT}' in said and said.count('left out') == 2
    d = training.read_run(run)
    assert d['kind'] == 'classification' and d['folds'] == [0, 1]
    assert d['preset'].folds == 2 and d['preset'].classification == SMALL.classification   # folds are the segmentation run's
    assert read_folds(run/'folds.csv').equals(read_folds(seg_run/'folds.csv'))
    pd.testing.assert_frame_equal(read_train(run/'labels.csv').sort_index(), read_train(data/'train.csv').sort_index())   # for a bundle of several runs
    for k in range(2):
        log = pd.read_csv(run/f'fold{k}'/'log.csv')
        assert log.epoch.tolist() == [1, 2, 3] and log[['metric', 'best_constant', 'valid_loss']].notna().all().all()
    oof = pd.read_csv(run/'oof.csv').set_index('StudyInstanceUID')
    assert sorted(oof.index) == UIDS and (oof.fold == read_folds(run/'folds.csv')[oof.index]).all()
    for uid in (BLANK, NOT_CT): np.testing.assert_allclose(oof.loc[uid, list(TARGETS)].astype(float), PRIOR[list(TARGETS)])
    # each answer is that of the model which has not seen the study
    store = crops_module.Crops(run/'crops'/crops_module.crop_key(SMALL.classification))
    for k in range(2): check_oof(run, oof, k, store, read_train(data/'train.csv'), SMALL.classification)
    # a second run of one fold finds the crops, keeps the other fold's answers
    before = {p: p.stat().st_mtime_ns for p in (run/'crops').rglob('*.safetensors')}
    assert len(before) == len(UIDS)-2
    train(data, seg_run, run, fold=1, resume=True)
    assert {p: p.stat().st_mtime_ns for p in (run/'crops').rglob('*.safetensors')} == before
    again = pd.read_csv(run/'oof.csv').set_index('StudyInstanceUID')
    pd.testing.assert_frame_equal(again.sort_index(), oof.sort_index())


def test_a_study_is_labelled_by_the_model_that_has_not_seen_it(data, seg_run, tmp_path, monkeypatch, capsys):
    used = {}
    nets = {k: load_file(seg_run/f'fold{k}'/'model.safetensors') for k in range(2)}
    def which(models, preset, volume, device='cpu'):
        sd = models[0].state_dict()
        used[volume.uid] = [k for k in nets if all(torch.equal(sd[n], nets[k][n]) for n in sd)]
        return finds(models, preset, volume)
    monkeypatch.setattr(crops_module, 'predict_labels', which)
    fold_of = read_folds(seg_run/'folds.csv')
    store = crops_module.crop_data_set(data, seg_run, tmp_path/'crops', workers=1)
    assert used == {u: [fold_of[u]] for u in UIDS if u != NOT_CT}
    assert set(store.uids) == set(UIDS) - {BLANK, NOT_CT} and set(store.left_out) == {BLANK, NOT_CT}
    pd.testing.assert_series_equal(store.fold_of.sort_index(), fold_of.sort_index(), check_names=False)
    assert (store.table.labelled_by == store.table.fold).all()
    assert 'is not trained' not in capsys.readouterr().err
    half = tmp_path/'half'   # of which one fold is trained only
    shutil.copytree(seg_run, half)
    shutil.rmtree(half/'fold1')
    made = crops_module.crop_data_set(data, half, tmp_path/'others', workers=1).table
    assert "stage 1's fold 1 is not trained: fold 0, which may have learned from their studies, labels them" in capsys.readouterr().err
    assert (made.labelled_by.astype(int) == 0).all() and set(made.fold.astype(int)) == {0, 1}


def test_a_ready_crop_data_set_trains_the_same(data, seg_run, tmp_path, monkeypatch):
    store = crops_module.crop_data_set(data, seg_run, tmp_path/'c', workers=1)
    preset = replace(SMALL, classification=replace(SMALL.classification, epochs=1))
    own = training.train_classification(data, preset, seg_run, tmp_path/'own', workers=1)
    monkeypatch.setattr(training, 'crop_data_set', None)   # nothing is cut again
    ready = training.train_classification(data, preset, out=tmp_path/'ready', crops=store.folder)
    a, b = (load_file(r/'fold0'/'model.safetensors') for r in (own, ready))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert read_folds(ready/'folds.csv').sort_index().equals(read_folds(own/'folds.csv').sort_index())
    assert (own/'oof.csv').read_bytes() == (ready/'oof.csv').read_bytes()
    # nor does it matter which study was cut first
    table = (store.folder/'studies.csv').read_text().splitlines(keepends=True)
    (store.folder/'studies.csv').write_text(''.join([table[0], *table[:0:-1]]))
    other = training.train_classification(data, preset, out=tmp_path/'other', crops=store.folder)
    assert list(read_folds(other/'folds.csv').index) == list(read_folds(ready/'folds.csv').index)[::-1]
    assert (other/'oof.csv').read_bytes() == (ready/'oof.csv').read_bytes()


def test_a_run_is_scored_by_its_out_of_fold_answers(data, seg_run, few_samples, tmp_path, capsys):
    run = train(data, seg_run, tmp_path/'r', fold='all')
    capsys.readouterr()
    truth, oof = read_train(data/'train.csv'), read_oof(run)
    threshold = oof.patient_overall.sort_values().iloc[len(oof)//2]   # some above, some below
    with pytest.raises(SystemExit) as stop: main(['evaluate', str(run), '--data', str(data), '--out', str(tmp_path/'f.csv'), '--threshold', str(threshold)])
    assert not stop.value.code
    (said, err), table = capsys.readouterr(), pd.read_csv(tmp_path/'f.csv').set_index(['row', 'figure'])
    assert table.value['all', 'metric'] == pytest.approx(metric(truth.loc[oof.index], oof))
    called = oof.patient_overall >= threshold
    assert 0 < called.sum() < len(called)
    y = truth.loc[oof.index].patient_overall
    assert table.value['patient_overall', 'sensitivity'] == pytest.approx((called & (y == 1)).sum()/y.sum())
    assert table.value['patient_overall', 'specificity'] == pytest.approx((~called & (y == 0)).sum()/(y == 0).sum())
    assert f'{len(oof)} studies: the intervals of so few' in err and 'evidence' in said
    assert f"{table.value['all', 'metric']:.3f}" in said and 'best constant' in said and 'C1-C7' in said
    with pytest.raises(CspineError, match='two stages one after the other'): evaluation.evaluate([run, seg_run], data)
    other = tmp_path/'other'
    other.mkdir()
    truth.iloc[:2].to_csv(other/'train.csv')
    with pytest.raises(CspineError, match='trained on other data'): evaluation.evaluate([run], other)


@pytest.mark.parametrize('model', ['slice_lstm', 'slice_lstm_patient', 'resnet101_3d', 'yolov5', 'cnn_svm', 'best'])
def test_rivals_train_by_name_on_the_same_crops(data, seg_run, tmp_path, model):
    "From one crop data set, through a run and a bundle to an answer; overlapping groups and volumes, too"
    store = crops_module.crop_data_set(data, seg_run, tmp_path/'c', preset=SMALL, workers=1)
    (few := tmp_path/'few').mkdir()
    truth = read_train(data/'train.csv').iloc[:6]
    truth.to_csv(few/'train.csv')
    run = training.train_classification(few, SMALL, out=tmp_path/'r', crops=store.folder, model=model, epochs=1)
    made = training.read_run(run)['preset']
    rival = CLASSIFICATION[model]
    assert made.name == f'tiny-{model}' and all(getattr(made.classification, f) == v for f, v in (rival.large | rival.small).items())
    assert made.classification.size == SMALL.classification.size   # the preset's crops
    oof = pd.read_csv(run/'oof.csv').set_index('StudyInstanceUID')
    loaded = load_bundle(bundle([seg_run, run], tmp_path/'b'))
    cls = loaded.preset.classification
    check_oof(run, oof, 0, store, truth, cls)
    own = CrackNetBiLSTM(cls)
    own.load_state_dict(load_file(run/'fold0'/'model.safetensors'))
    s = store.read(next(u for u in oof.index if u in store))
    p, q = (predict_probabilities([m], cls, crop_planes(s['crops'], s['masks'], cls), s['present']) for m in (own, loaded.classification[0]))
    assert cls == made.classification and (np.abs(p - q) < .02).all()   # float16 weights


CHANCE = replace(SMALL, folds=5, classification=replace(SMALL.classification, decoder_channels=(), mask_loss=0., head='cells', size=64, sampled=1, cell_loss=.25, loss='bce', balance=.7, mixup=.4))


@pytest.fixture(scope='module')
def boxed(tmp_path_factory, data):
    "The same studies, with boxes about what is broken, as a radiologist draws them"
    folder = tmp_path_factory.mktemp('boxed')
    shutil.copytree(data, folder, dirs_exist_ok=True)
    truth = read_train(data/'train.csv')
    rows = [(u, 14, 17, 16, 8, n) for u in truth.index if u != NOT_CT for level in range(7) if truth.loc[u, f'C{level+1}'] for n in range(7+9*level, 14+9*level)]
    pd.DataFrame(rows, columns=['StudyInstanceUID', 'x', 'y', 'width', 'height', 'slice_number']).to_csv(folder/'train_bounding_boxes.csv', index=False)
    return folder


def test_boxes_teach_cells_and_evidence_is_counted(boxed, seg_run, tmp_path):
    run = training.train_classification(boxed, CHANCE, seg_run, tmp_path/'r', workers=1, fold='all')
    met, oof = pd.read_csv(run/'evidence.csv'), pd.read_csv(run/'oof.csv').set_index('StudyInstanceUID')
    store = crops_module.Crops(run/'crops'/crops_module.crop_key(CHANCE.classification))
    truth = read_train(boxed/'train.csv')
    broken = [(u, f'C{i+1}') for u in store.uids for i in range(7) if truth.loc[u, f'C{i+1}']]
    assert len(broken) >= 3 and sorted(zip(met.StudyInstanceUID, met.level)) == sorted(broken)
    assert (met.fold == oof.fold[met.StudyInstanceUID].to_numpy()).all() and met.hit.isin([0, 1]).all() and met.share.between(.05, .95).all()
    # what is written is what the fold's model says of the study
    uid, k = met.StudyInstanceUID[0], met.fold[0]
    model = CrackNetBiLSTM(CHANCE.classification)
    model.load_state_dict(load_file(run/f'fold{k}'/'model.safetensors'))
    study = store.read(uid)
    q, heat = predict_probabilities([model], CHANCE.classification, crop_planes(study['crops'], study['masks'], CHANCE.classification), study['present'], evidence=True)
    assert [(f'C{i+1}', int(h)) for i, h, _ in evidence_hits(heat, study)] == [(l, h) for u, l, h in zip(met.StudyInstanceUID, met.level, met.hit) if u == uid]
    check_oof(run, oof, k, store, truth, CHANCE.classification)
    assert not np.allclose(q, oof.loc[uid, list(TARGETS)].astype(float), atol=1e-3)   # of the model's own, fitted on this study as well
    assert any((item[6] == 1).any() and (item[5] == 1).any() for item in (CropDataset(store, store.uids, truth.loc[store.uids, list(TARGETS)].to_numpy(), replace(CHANCE.classification, mixup=0.))[i] for i in range(len(store.uids))))
    row = evaluate_run(run, boxed, samples=50).set_index(['row', 'figure']).loc[('C1-C7', 'evidence')]
    assert row.value == pytest.approx(met.hit.mean()) and row.constant == pytest.approx(met.share.mean()) and row.of == len(broken) and row.low <= row.value <= row.high
    # an epoch draws as many studies as there are, of the fractured the share that was asked for
    ds = CropDataset(store, store.uids, truth.loc[store.uids, list(TARGETS)].to_numpy(), CHANCE.classification)
    drawn = []
    class Spy(torch.utils.data.Dataset):
        weights = ds.weights
        def __len__(self): return len(ds)
        def __getitem__(self, i): drawn.append(i); return torch.zeros(1)
    loader = training._Loader(Spy(), 1, True, 0, 60, torch.device('cpu'))
    for loader.epoch in range(60): list(loader)
    broken = [ds.labels[i[0] if isinstance(i, tuple) else i, 7] for i in drawn]
    assert len(drawn) == 60*len(ds) and abs(np.mean(broken) - .7) < .07
    assert all(len(set(epoch)) == len(ds) for epoch in np.array([str(i) for i in drawn]).reshape(60, -1)) and any(isinstance(i, tuple) for i in drawn)   # the same study, another look


def test_a_strongest_point_that_is_nowhere_has_missed():
    "A blank map is a miss, a vertebra that was not cut is nobody's"
    fractures = np.zeros((7, 6, 32, 32), bool)
    fractures[1:4, 2:4, 8:16, 8:16] = True
    heat = np.zeros((7, 3, 2, 2))
    heat[1, 1, 0, 0], heat[3] = 1, np.nan
    assert [(level, hit) for level, hit, _ in evidence_hits(heat, dict(fractures=fractures, masks=np.ones_like(fractures)))] == [(1, True), (2, False)]


def test_the_patient_is_never_below_a_vertebra_that_is_there():
    p = with_prior(np.array([[.1, .9, .1, .1, .1, .1, .1, .3], [.1]*7 + [np.nan], [.1]*7 + [.5]]), np.array([[True]*7, [True]*7, [True]*6 + [False]]), np.array([.2]*6 + [.7, .4]))
    assert p[0, 7] == .9 and np.isnan(p[1, 7]) and p[2].tolist() == [.1]*6 + [.7, .5]   # an absent one's prior lifts nobody
    assert with_prior(np.full(8, np.nan), np.zeros(7, bool))[7] == PRIOR['patient_overall']


def test_a_run_cut_off_before_its_calibration_is_not_trained(data, seg_run, cut_off, tmp_path):
    shutil.copytree(cut_off[0], tmp_path/'r')
    assert training.read_run(tmp_path/'r')['folds'] == []
    train(data, seg_run, tmp_path/'r', resume=True)
    assert training.read_run(tmp_path/'r')['folds'] == [0] and (tmp_path/'r'/'oof.csv').exists()


def test_a_finished_fold_is_left_alone_when_a_run_goes_on(data, seg_run, cut_off, tmp_path, monkeypatch, capsys):
    "A kill while another fold trains must not take the first one's calibration"
    run = shutil.copytree(cut_off[1], tmp_path/'r')
    before = {p: p.read_bytes() for p in (run/'fold0').rglob('*') if p.is_file()} | {run/'oof.csv': (run/'oof.csv').read_bytes()}
    def stopped(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(training, '_write_oof', stopped)
        with pytest.raises(KeyboardInterrupt): train(data, seg_run, run, fold='all', resume=True)
    assert f'fold 0 of {run} is trained' in capsys.readouterr().err
    assert {p: p.read_bytes() for p in before} == before and training.read_run(run)['folds'] == [0]
    train(data, seg_run, run, fold='all', resume=True)
    assert training.read_run(run)['folds'] == [0, 1] and sorted(set(pd.read_csv(run/'oof.csv').fold)) == [0, 1]
    shutil.rmtree(run/'fold0')   # to train it anew
    of = pd.read_csv(run/'folds.csv', index_col=0, dtype={'StudyInstanceUID': str}).fold
    with monkeypatch.context() as m:
        m.setattr(training, '_write_oof', stopped)
        with pytest.raises(KeyboardInterrupt): train(data, seg_run, run, resume=True)
    assert (run/'fold0'/'model.safetensors').exists()   # but it is not the model that answered before, nor calibrated
    assert training.read_run(run)['folds'] == [1] and list(training.read_run(run)['figures']) == ['fold1']
    assert set(read_oof(run).index) == set(of.index[of == 1])
    train(data, seg_run, run, resume=True)
    assert training.read_run(run)['folds'] == [0, 1] and sorted(set(pd.read_csv(run/'oof.csv').fold)) == [0, 1]
    assert set(read_oof(run).index) == set(of.index)


def _other_bytes(path):
    "As a disk goes bad: the archive opens, some weights are others"
    b = bytearray(path.read_bytes())
    b[len(b)//2:len(b)//2+2000] = np.random.default_rng(0).integers(0, 256, 2000, np.uint8).tobytes()
    path.write_bytes(bytes(b))


@pytest.mark.parametrize('damage', [lambda p: p.write_bytes(p.read_bytes()[:5000]), _other_bytes, lambda p: torch.save([1, 2], p)], ids=['cut', 'bytes', 'else'])
def test_a_damaged_checkpoint_is_left_out(data, seg_run, cut_off, tmp_path, capsys, damage):
    cut, whole = cut_off
    shutil.copytree(cut, tmp_path/'r')
    *_, older, newest = sorted((tmp_path/'r'/'fold0'/'checkpoints').glob('epoch_*.pt'))
    damage(newest)
    capsys.readouterr()
    run = train(data, seg_run, tmp_path/'r', resume=True)
    assert f'{newest} is damaged and left out' in capsys.readouterr().err
    a, b = (load_file(r/'fold0'/'model.safetensors') for r in (whole, run))
    assert all(torch.equal(a[k], b[k]) for k in a)
    for p in (older, newest): p.write_bytes(b'nothing')
    with pytest.raises(CspineError, match='no checkpoint in .* can be read'): training._newest([older, newest], 'cpu')
    (tmp_path/'c'/'checkpoints').mkdir(parents=True)
    for n in ('epoch_998', 'epoch_1000', 'epoch_999', 'epoch_998_step_000007'): (tmp_path/'c'/'checkpoints'/f'{n}.pt').touch()
    assert [p.stem for p in training._checkpoints(tmp_path/'c')] == ['epoch_998', 'epoch_998_step_000007', 'epoch_999', 'epoch_1000']


def test_a_run_goes_on_with_its_own_studies_and_labels_only(data, seg_run, tmp_path, monkeypatch, capsys):
    store = crops_module.crop_data_set(data, seg_run, tmp_path/'c', preset=SMALL, workers=1)
    def go(folder, **kw): return training.train_classification(folder, SMALL, out=tmp_path/'r', crops=store.folder, epochs=1, **kw)
    def stopped(*_): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(training, '_write_oof', stopped)
        with pytest.raises(KeyboardInterrupt): go(data)
    truth, before = read_train(data/'train.csv'), (tmp_path/'r'/'run.json').read_text()
    for name, other in (('turned', 1-truth), ('fewer', truth.iloc[:-1])):
        (tmp_path/name).mkdir()
        other.to_csv(tmp_path/name/'train.csv')
        with pytest.raises(CspineError, match=f'begun with other studies, or other labels of them, than {tmp_path/name}/train.csv'): go(tmp_path/name, resume=True)
    assert (tmp_path/'r'/'run.json').read_text() == before
    capsys.readouterr()
    go(data, resume=True)
    assert f'{data} has no train_bounding_boxes.csv' in capsys.readouterr().err
    assert training.read_run(tmp_path/'r')['folds'] == [0]
    with pytest.raises(CspineError, match='begun with other studies'): go(tmp_path/'turned', fold=1)   # nor another fold of it
    capsys.readouterr()
    evaluate_run(tmp_path/'r', data, samples=5)
    assert not capsys.readouterr().err
    evaluate_run(tmp_path/'r', tmp_path/'turned', samples=5)
    assert f'{tmp_path}/turned/train.csv are not those that {tmp_path}/r was trained on' in capsys.readouterr().err


def test_what_is_not_a_number_is_neither_scored_nor_bundled(data, seg_run, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(training, '_answers', lambda *a, **kw: (np.full(8, np.nan), np.full((7, 1, 1, 1), np.nan)))
        with pytest.raises(CspineError, match='what is not a number: remove .*r/fold0 and train it anew'): train(data, seg_run, tmp_path/'r')
    assert training.read_run(tmp_path/'r')['folds'] == [] and not (tmp_path/'r'/'oof.csv').exists()
    run = train(data, seg_run, tmp_path/'r', resume=True)
    bundle([seg_run, run], tmp_path/'b')
    w = load_file(run/'fold0'/'model.safetensors')
    w['vertebra.bias'][0] = np.inf
    save_file(w, run/'fold0'/'model.safetensors')
    with pytest.raises(CspineError, match='holds what is not a number .vertebra.bias, 1 of'): bundle([seg_run, run], tmp_path/'b2')


def test_no_answer_is_lost_from_the_scores(boxed, seg_run, few_samples, tmp_path):
    run = training.train_classification(boxed, SMALL, seg_run, tmp_path/'a'/'r', workers=1, epochs=1, fold='all')
    (tmp_path/'b').mkdir()
    shutil.copytree(run, other := tmp_path/'b'/'r')
    table = evaluation.evaluate([run, other], boxed)
    assert table.run.drop_duplicates().tolist() == ['a/r', 'b/r', 'together', 'together minus a/r', 'together minus b/r'] and (table[table.run == 'a/r'].figure.to_numpy() == table[table.run == 'b/r'].figure.to_numpy()).all()
    with pytest.raises(CspineError, match='is named twice'): evaluation.evaluate([run, run], boxed)
    with pytest.raises(CspineError, match='there is no folder .*a/q: name runs'): evaluation.evaluate([tmp_path/'a'/'q'], boxed)
    with pytest.raises(CspineError, match='neither a run nor a bundle'): evaluation.evaluate([boxed], boxed)
    oof, evidence = (other/'oof.csv').read_text().splitlines(), (other/'evidence.csv').read_text().splitlines()
    (other/'oof.csv').write_text('\n'.join(oof[:4]) + '\n')
    with pytest.raises(CspineError, match=f'oof.csv lacks {len(oof)-4} of the {len(oof)-1} studies'): evaluation.evaluate([other], boxed)
    (other/'oof.csv').write_text('\n'.join(oof) + '\n')
    uid, fold, level, hit, share = evidence[1].split(',')
    for row, said in ((f'{uid},{fold},{level},7,{share}', 'hit: .7. should be 0 or 1'), (f'{uid},{fold},{level},{hit},nan', 'share: .nan. does not lie in 0 to 1'), (f'1.2.3,{fold},{level},{hit},{share}', '1 studies that oof.csv beside it has not')):
        (other/'evidence.csv').write_text('\n'.join([evidence[0], row, *evidence[2:]]) + '\n')
        with pytest.raises(CspineError, match=said): evaluation.evaluate([other], boxed)
    (other/'evidence.csv').write_text('\n'.join(evidence) + '\n')
    of = pd.Series([int(row.split(',')[1]) for row in evidence[1:]])
    (other/'run.json').write_text(json.dumps(json.loads((other/'run.json').read_text()) | dict(folds=[int(of[0])])))   # another is being trained anew
    some = evaluation.evaluate([other], boxed).set_index('figure')
    assert some.of['evidence'] == (of == of[0]).sum() < len(of) and some.of['metric'] < table.of[table.figure == 'metric'].iloc[0]
    (other/'run.json').write_text('{"kind": "classification", "preset": 7, ')
    with pytest.raises(CspineError, match='run.json'): evaluation.evaluate([other], boxed)
    with pytest.raises(CspineError, match='run.json is damaged'): training.read_run(other)


def test_weights_for_a_network_that_takes_none_are_refused(data, seg_run, tmp_path):
    with pytest.raises(CspineError, match='tiny-cnn_lstm starts from random weights; leave out --weights'):
        training.train_classification(data, SMALL, seg_run, tmp_path/'r', model='cnn_lstm', weights='/nowhere/at/all.pth')
    assert not (tmp_path/'r').exists()


def test_the_calibration_is_of_what_the_model_says(data, cut_off, tmp_path):
    "Not of a patient who was lifted to the likeliest vertebra: a bundle lifts after the calibration"
    run = shutil.copytree(cut_off[1], tmp_path/'r')
    store, truth, cls = crops_module.Crops(run/'crops'/crops_module.crop_key(SMALL.classification)), read_train(data/'train.csv'), SMALL.classification
    model = CrackNetBiLSTM(cls)
    model.load_state_dict(load_file(run/'fold0'/'model.safetensors'))
    model.patient.bias.data.fill_(-6)
    fold_of = read_folds(run/'folds.csv')
    truth['patient_overall'] = np.arange(len(truth)) % 2
    training._write_oof(run, 0, model, cls, fold_of, store, truth)
    found = model.scale.clone(), model.shift.clone()
    model.scale.fill_(1)
    model.shift.zero_()
    uids = [u for u in fold_of.index if fold_of[u] == 0 and u in store]
    read = [store.read(u) for u in uids]
    raw = np.array([_answers([model], cls, crop_planes(s['crops'], s['masks'], cls), s['present'])[0] for s in read])
    want = fit_calibration(truth.loc[uids, list(TARGETS)].to_numpy(), raw, np.array([s['present'] for s in read]))
    for a, b in zip(found, want): np.testing.assert_allclose(a, b, atol=1e-3)
    assert (raw[:, 7] < raw[:, :7].max(1)).all() and abs(want[1][7]) > .01   # the patient is below, and there was something to fit


def test_the_number_of_groups_looked_at_says_nothing():
    "Boxes or none, broken or whole: as many, or a network could read the answer off their number"
    broken = np.zeros((7, 15), np.float32)
    broken[0, 3:9] = broken[1, 7] = 1
    broken[2] = np.nan
    looks = np.array([_sample(broken, 5, np.random.default_rng(i)) for i in range(3000)])
    assert (looks.sum(2) == 5).all() and (looks[:, 0, 3:9].sum(1) >= 3).all() and looks[:, 1, 7].all()
    assert abs(looks[:, 2, :3].any(1).mean() - (1 - 792/3003)) < .03 and abs(looks[:, 3].mean(0) - 1/3).max() < .04   # C(12, 5) of C(15, 5) miss three groups


def test_what_was_frozen_stays_frozen_when_a_run_goes_on(data, seg_run, tmp_path, monkeypatch):
    "Whatever encoder weights are named or gone by then: the checkpoint has them"
    cls = replace(SMALL.classification, encoder='resnet18', decoder_channels=(), mask_loss=0., frozen=2, epochs=2, pretrained=True)
    torch.manual_seed(5)
    weights = tmp_path/'w.safetensors'
    save_file({k: v.contiguous() for k, v in CrackNetBiLSTM(cls).encoder.state_dict().items()}, weights)
    for begun, on in ((weights, 'none'), ('none', weights)):
        out = tmp_path/f'r{begun == weights}'
        def stopped(*_): raise KeyboardInterrupt
        with monkeypatch.context() as m:
            m.setattr(training, '_write_oof', stopped)
            with pytest.raises(KeyboardInterrupt): training.train_classification(data, replace(SMALL, classification=cls), seg_run, out, workers=1, weights=begun)
        (out/'fold0'/'checkpoints'/'epoch_002.pt').unlink()
        run = training.train_classification(data, replace(SMALL, classification=cls), seg_run, out, workers=1, weights=on, resume=True)
        stem = next(k for k in load_file(run/'fold0'/'model.safetensors') if k == 'encoder.conv1.weight')
        same = torch.equal(load_file(run/'fold0'/'model.safetensors')[stem], load_file(weights)['conv1.weight'])
        assert same == (begun == weights)


def test_frozen_stages_keep_their_weights_if_they_have_any(data, seg_run, tmp_path):
    cls = replace(SMALL.classification, encoder='resnet18', decoder_channels=(), mask_loss=0., frozen=2, epochs=1, pretrained=True)
    torch.manual_seed(5)
    given = {k: v.clone() for k, v in CrackNetBiLSTM(cls).encoder.state_dict().items()}
    save_file(given, tmp_path/'given.safetensors')
    store = crops_module.crop_data_set(data, seg_run, tmp_path/'c', workers=1)
    def encoder(name, weights):
        run = training.train_classification(data, replace(SMALL, classification=cls), out=tmp_path/name, crops=store.folder, weights=weights)
        return {k.removeprefix('encoder.'): v for k, v in load_file(run/'fold0'/'model.safetensors').items() if k.startswith('encoder.')}
    def held(k): return k.startswith(('conv1', 'bn1', 'layer1', 'layer2'))
    kept = encoder('a', str(tmp_path/'given.safetensors'))
    assert all(torch.equal(kept[k], given[k]) for k in given if held(k))
    assert not any(torch.equal(kept[k], given[k]) for k in given if k.endswith('weight') and not held(k))
    torch.manual_seed(replace(SMALL).seed)
    start, free = CrackNetBiLSTM(cls).encoder.state_dict(), encoder('b', 'none')   # what starts at random learns
    assert not any(torch.equal(free[k], start[k]) for k in start if k.endswith('conv1.weight'))


@pytest.mark.parametrize('preset', [None, CHANCE], ids=['plain', 'all chance'])
def test_killed_and_resumed_is_as_if_never_killed(boxed, seg_run, tmp_path, monkeypatch, preset):
    data = boxed
    def train(data, seg_run, out, **kw): return training.train_classification(data, preset or replace(SMALL, folds=5), seg_run, out, workers=1, **kw)
    whole = train(data, seg_run, tmp_path/'whole')
    calls = []
    class Dies(training.ClassificationFigures):
        def figures(self):
            calls.append(1)
            if len(calls) == 3: raise KeyboardInterrupt
            return super().figures()
    monkeypatch.setattr(training, 'ClassificationFigures', Dies)
    with pytest.raises(KeyboardInterrupt): train(data, seg_run, tmp_path/'cut')
    assert not (tmp_path/'cut'/'fold0'/'model.safetensors').exists()
    train(data, seg_run, tmp_path/'cut', resume=True)
    assert len(calls) == 4   # one epoch, not three
    a, b = (load_file(p/'fold0'/'model.safetensors') for p in (whole, tmp_path/'cut'))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_studies_that_stage_1_does_not_know(data, seg_run, tmp_path):
    "Stage 2 may have more studies than stage 1: known ones keep their fold, new ones are dealt"
    known = read_folds(seg_run/'folds.csv').iloc[:6]
    _, fold_of = training._start_run(tmp_path/'a', 'classification', SMALL, data, read_train(data/'train.csv'), False, known)
    assert (fold_of[known.index] == known).all() and sorted(fold_of.index) == UIDS and set(fold_of) == {0, 1}
    stranger = known.rename(lambda u: u + '.9')
    _, fold_of = training._start_run(tmp_path/'b', 'classification', SMALL, data, read_train(data/'train.csv'), False, stranger)
    assert fold_of.equals(folds(read_train(data/'train.csv'), 2, 0))


def test_refusals(data, seg_run, tmp_path):
    with pytest.raises(CspineError, match='no run folder'): train(data, tmp_path/'none', tmp_path/'x')
    other = tmp_path/'cls'
    other.mkdir()
    (other/'run.json').write_text((seg_run/'run.json').read_text().replace('"segmentation", "preset"', '"classification", "preset"'))
    with pytest.raises(CspineError, match='needs one of segmentation'): train(data, other, tmp_path/'x')
    with pytest.raises(CspineError, match='fold must be'): train(data, seg_run, tmp_path/'x', fold=7)


def test_slices_of_a_vertebra_share_one_transform():
    "A bone that is the same on every slice is so after augmentation too, in both pipelines"
    crops, masks, truth = broken_necks(1)
    crops[0] = crops[0, :, :1]
    class One:
        def read(self, uid): return dict(crops=crops[0].copy(), fractures=np.zeros((7, 30, 32, 32), bool), masks=np.repeat(masks[0, :, None] > 0, 30, 1), present=np.ones(7, bool), broken=np.zeros((7, 30), np.uint8))
    for name in ('light', 'paper'):
        ds = CropDataset(One(), ['1.2'], truth.astype(int), replace(SMALL.classification, augment=name))
        for ds.epoch in range(4):
            out = ds[0][0].float()
            spread = (out - out.mean(1, keepdim=True)).abs()
            assert spread.median() <= 8   # noise apart, which the paper's pipeline adds slice by slice
