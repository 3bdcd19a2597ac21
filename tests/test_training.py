"Stage-1 runs: what is written, split, resumed and refused"
import json
from dataclasses import replace
from functools import partial
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
import cspine.training as training
from cspine.phantom import phantom
from cspine.presets import CspineError,Preset,get_preset
from cspine.segmentation import CubeDataset,FineDataset,SegmentationFigures,SliceDataset,build_segmentation,cache_studies,low_preset
from cspine.rsna import folds,read_folds,read_train
from cspine.training import _origin,_start_run,read_run,train_segmentation

TINY = get_preset('tiny')
SMALL = replace(TINY, folds=2, segmentation=replace(TINY.segmentation, widths=(4,8), low_widths=(4,8), low_epochs=2, low_steps=3, low_patch=24, low_spacing=8., patch=24, spacing=2., steps=3, epochs=2))
FLAT = replace(SMALL, segmentation=replace(get_preset('paper').segmentation, encoder='tu-test_resnet', size=32, batch=32,
                                           epochs=1, pretrained=False))

@pytest.fixture(scope='module')
def data(tmp_path_factory): return phantom(tmp_path_factory.mktemp('data')/'phantom', train=4, test=0, size=64, seed=9100, workers=1)

@pytest.fixture(scope='module')
def run(data, tmp_path_factory): return train_segmentation(data, SMALL, tmp_path_factory.mktemp('run')/'run', fold=0)

def uids(data): return pd.read_csv(data/'train.csv', dtype=str).StudyInstanceUID.tolist()

def test_a_run_holds_what_inference_needs(run, data):
    d = read_run(run)
    assert d['kind'] == 'segmentation' and d['folds'] == [0] and d['preset'] == SMALL and d['seed'] == 0
    assert d['versions']['torch'].split('+')[0] == torch.__version__.split('+')[0]
    last = d['figures']['fold0']['last']
    assert {'dice','dice_with_background','accuracy','accuracy_all_background','dice_C1','dice_T'} <= set(last)
    assert 0.5 < last['accuracy_all_background'] < 1   # of cubes about the spine
    json.loads((run/'run.json').read_text(), parse_constant=lambda c: pytest.fail(f'{c} is no JSON'))
    folds = pd.read_csv(run/'folds.csv', dtype={0:str})
    assert sorted(folds.StudyInstanceUID) == sorted(uids(data)) and set(folds.fold) == {0,1}
    model = build_segmentation(SMALL.segmentation)
    model.load_state_dict(load_file(run/'fold0'/'model.safetensors'))
    log = pd.read_csv(run/'fold0'/'log.csv')
    assert log.epoch.tolist() == [1,2] and log.notna().train_loss.all()
    ck = torch.load(run/'fold0'/'checkpoints'/'epoch_002.pt', weights_only=True)
    assert ck['epoch'] == 2 and ck['opt']['state']

@pytest.mark.parametrize('at', [2, 4])   # the second epoch of the cascade's first U-Net, and that of the whole
def test_a_run_that_was_cut_off_ends_the_same(run, data, tmp_path, monkeypatch, at):
    reset,calls = SegmentationFigures.reset,[]
    def cut(self):
        calls.append(1)
        if len(calls) == at: raise KeyboardInterrupt
        reset(self)
    monkeypatch.setattr(SegmentationFigures, 'reset', cut)
    with pytest.raises(KeyboardInterrupt): train_segmentation(data, SMALL, tmp_path/'run')
    assert not (tmp_path/'run'/'fold0'/'model.safetensors').exists() and read_run(tmp_path/'run')['folds'] == []
    train_segmentation(data, SMALL, tmp_path/'run', resume=True)
    assert len(calls) == 5   # four epochs, and the one that was cut off
    whole,cut_off = (load_file(r/'fold0'/'model.safetensors') for r in (run, tmp_path/'run'))
    for k,v in whole.items(): torch.testing.assert_close(cut_off[k], v, rtol=1e-4, atol=1e-5)

def test_another_fold_adds_to_the_run(run, data):
    weights = (run/'fold0'/'model.safetensors').read_bytes()
    train_segmentation(data, SMALL, run, fold='all', resume=True)
    assert read_run(run)['folds'] == [0,1] and set(read_run(run)['figures']) == {'fold0','fold1'}
    assert (run/'fold0'/'model.safetensors').read_bytes() == weights   # a finished fold stays as it is

def test_slices_train_with_the_same_command(data, tmp_path):
    out = train_segmentation(data, FLAT, tmp_path/'flat', fold=1)
    d = read_run(out)
    assert d['folds'] == [1] and d['preset'].segmentation.model == 'unet2d'
    build_segmentation(FLAT.segmentation).load_state_dict(load_file(out/'fold1'/'model.safetensors'))

def test_items_repeat_for_a_seed_and_change_with_the_epoch(data, tmp_path):
    seg,low = SMALL.segmentation,low_preset(SMALL.segmentation)
    fine = partial(FineDataset, low=build_segmentation(low))
    for preset,kind in ((low,CubeDataset), (seg,fine), (FLAT.segmentation,SliceDataset)):
        paths = list(cache_studies(data, uids(data)[:2], tmp_path, preset).values())
        a,b = kind(paths, preset, train=True, seed=1),kind(paths, preset, train=True, seed=1)
        i = len(a)//2
        for x,u in zip(a[i], b[i]): assert torch.equal(x, u)
        y = a[i][-1]
        torch.testing.assert_close(y.sum(0), torch.ones_like(y[0]))
        b.epoch = 5
        assert any(not torch.equal(a[k][0], b[k][0]) for k in range(min(3, len(a))))
        whole = kind(paths, preset, train=False)
        assert torch.equal(whole[i][0], whole[i][0]) and whole[len(whole)//2][-1].argmax(0).any()

def test_the_cache_is_made_once_and_again_if_the_mask_changes(data, tmp_path):
    uid = uids(data)[0]
    path = cache_studies(data, [uid], tmp_path, SMALL.segmentation)[uid]
    made = path.stat().st_mtime_ns
    cache_studies(data, [uid], tmp_path, SMALL.segmentation)
    assert path.stat().st_mtime_ns == made
    mask = data/'segmentations'/f'{uid}.nii'
    mask.write_bytes(mask.read_bytes())
    cache_studies(data, [uid], tmp_path, SMALL.segmentation)
    assert path.stat().st_mtime_ns > made
    assert not list(tmp_path.glob('*.part*'))

def test_a_run_keeps_the_folds_it_was_begun_with(data, tmp_path, monkeypatch):
    table = read_train(data/'train.csv')
    begun = _start_run(tmp_path/'run', 'segmentation', SMALL, data, table, resume=False)[1]
    pd.testing.assert_series_equal(begun, folds(table, 2, 0))
    # another release deals otherwise, and two studies are new; the next fold, or the rest of this one, must not mix them up
    monkeypatch.setattr('cspine.training.folds', lambda t, n, seed: 1 - folds(t, n, seed))
    more = pd.concat([table, table[:2].rename(index=lambda u: u + '.9')])
    for resume in (True, False):
        again = _start_run(tmp_path/'run', 'segmentation', SMALL, data, more, resume)[1]
        pd.testing.assert_series_equal(again[begun.index], begun, check_names=False)
        assert set(again.index) == set(more.index) and set(again) == {0, 1}
        pd.testing.assert_series_equal(read_folds(tmp_path/'run'/'folds.csv'), again, check_names=False)
    other = _start_run(tmp_path/'run', 'segmentation', replace(SMALL, seed=1), data, table, resume=False)[1]
    pd.testing.assert_series_equal(other, 1 - folds(table, 2, 1))

@pytest.mark.parametrize('kw,says', [
    (dict(fold=7), 'fold must be all or a number from 0 to 1'), (dict(preset='huge'), 'paper, tiny'),
    (dict(weights='x.pth'), 'no encoder weights'), (dict(epochs=9, resume=True), r'another preset, model or number of epochs.*\(segmentation.epochs [0-8], not 9\)'), (dict(epochs=0), 'epochs of the preset should lie in 1')])
def test_what_cannot_work_is_said(run, data, kw, says):
    with pytest.raises(CspineError, match=says): train_segmentation(**{**dict(data=data, preset=SMALL, out=run), **kw})

def test_a_run_says_where_its_studies_come_from(run, data):
    assert json.loads((run/'run.json').read_text())['data'] == 'cspine phantom --train 4 --test 0 --size 64 --seed 9100 --rate 1.0 --odd 0.15'
    assert _origin(run) == run.name

def test_a_foreign_folder_is_left_alone(data, tmp_path):
    (tmp_path/'thesis.txt').write_text('years of work')
    with pytest.raises(CspineError, match='is no run folder'): train_segmentation(data, 'tiny', tmp_path)

def test_masks_are_needed(data, tmp_path):
    pd.read_csv(data/'train.csv', dtype=str).to_csv(tmp_path/'train.csv', index=False)
    with pytest.raises(CspineError, match='masks for 0 of the 4'): train_segmentation(tmp_path, SMALL, tmp_path/'run')
    with pytest.raises(CspineError, match='no run folder'): read_run(tmp_path)

def test_a_preset_travels_through_the_run(run):
    assert Preset.from_dict(json.loads((run/'run.json').read_text())['preset']) == SMALL
    assert np.isfinite(pd.read_csv(run/'fold0'/'log.csv').seconds).all()


def test_a_trained_fold_is_not_trained_over(data, tmp_path, monkeypatch):
    "Forgetting --resume costs nothing; nor do two processes share a run"
    monkeypatch.setattr(training, '_LOCKS', {})
    table = read_train(data/'train.csv')
    def start(resume=False, which=(0,)): _start_run(tmp_path/'run', 'segmentation', SMALL, data, table, resume, which=which)
    start()
    kept = tmp_path/'run'/'fold0'/'low'/'checkpoints'/'epoch_001.pt'
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b'x')
    with pytest.raises(CspineError, match='has fold 0 already, trained or begun: go on with --resume'): start()
    assert kept.exists()
    start(resume=True)
    start(which=[1])
    with pytest.raises(CspineError, match='has fold 0 already, trained or begun, with another preset'):   # a run has one recipe
        _start_run(tmp_path/'run', 'segmentation', replace(SMALL, seed=1), data, table, False, which=[1])
    lock = training._LOCKS.pop((tmp_path/'run').resolve())   # as another process holds it
    with pytest.raises(CspineError, match='another process trains in'): start(resume=True)
    lock.release()
    start(resume=True)
