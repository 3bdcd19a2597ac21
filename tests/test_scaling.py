"Training by several processes, a run cut off within an epoch, precision and device: what each may change, and what not"
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import cspine.crops as crops
import cspine.training as training
from cspine import cli
from cspine.phantom import phantom
from cspine.presets import PRESETS, CspineError, get_preset
from cspine.rsna import find_studies, read_mask
from cspine.segmentation import find_device

TINY = get_preset('tiny')
# both stages small, and without what depends on the number of processes: dropout, and batch norm on a CPU
SMALL = replace(TINY, name='small', folds=2,
                segmentation=replace(TINY.segmentation, widths=(4, 8), low_widths=(4, 8), low_epochs=2, low_steps=4, low_patch=24, low_spacing=8., patch=24, spacing=4.,
                                     steps=5, epochs=2, ema=.9),
                classification=replace(TINY.classification, encoder='tu-test_convnext', pretrained=False, head='pooled', group=15, every=15, size=32, hidden=16, epochs=2,
                                       batch=2, dropout=0., margin_mm=2.))
TIMES = ['seconds', 'waiting']
SEGMENTATION = 'train segmentation --data data --preset small --batch 2 --precision fp32 --device cpu --out'


def true_labels(models, preset, volume, device='cpu'):
    "Stage 1 that knows the truth, and which processes asked"
    with open('labelled.txt', 'a') as f: f.write(f'{volume.uid} {training._rank()}\n')
    return read_mask(f'data/segmentations/{volume.uid}.nii', volume)


def shell(line):
    "A command line in this process; the preset has a name as if it came with cspine. The norm of each gradient goes to RUN.norms"
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    def note(parameters, most): norms.append(float(clip(parameters, most)))
    PRESETS['small'], torch.nn.utils.clip_grad_norm_ = SMALL, note
    try: cli.main(line.split())
    except SystemExit as stop: assert not stop.code
    finally:
        del PRESETS['small']
        torch.nn.utils.clip_grad_norm_ = clip
    if not training._rank(): np.savetxt(line.split(' --out ')[1].split()[0] + '.norms', norms)


def stage_2(out):
    "As `cspine train classification` would"
    crops.predict_labels = true_labels
    return training.train_classification('data', SMALL, 'seg', out, workers=1, device='cpu')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "A folder with data, a run `one` of one process, the same cut off within an epoch, and what two processes make of all that"
    here, before = tmp_path_factory.mktemp('scaling'), os.getcwd()
    labels, save, every = crops.predict_labels, training._save, training.EVERY
    phantom(here/'data', train=5, test=0, size=64, seed=9100, workers=1)
    os.chdir(here)
    try:
        shell(f'{SEGMENTATION} one')
        def cut(path, thing):
            save(path, thing)
            if path.parts[-3:] == ('fold0', 'checkpoints', 'epoch_001_step_000003.pt'): raise KeyboardInterrupt
        training._save, training.EVERY = cut, 0
        for run in ('cut', 'two'):   # without reading the studies again
            shutil.copytree('one/cache', f'{run}/cache')
            shutil.copy('one/run.json', run)
        with pytest.raises(KeyboardInterrupt):
            training.train_segmentation('data', replace(SMALL, segmentation=replace(SMALL.segmentation, batch=2)), 'cut', precision='fp32', device='cpu')
        training._save, training.EVERY = save, every
        shutil.copytree('cut', 'cut2')
        shutil.copytree('one', 'seg')
        stage_2('crops1')
        os.remove('labelled.txt')
        code = f'import sys; sys.path[:0] = {sys.path!r}\nfrom test_scaling import *\n' \
               f'if __name__ == "__main__":\n shell("{SEGMENTATION} two")\n shell("{SEGMENTATION} cut2 --resume")\n stage_2("crops2")\n'
        (here/'both.py').write_text(code)
        launch = [sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--num_machines', '1', '--mixed_precision',
                  'no', '--dynamo_backend', 'no', '--main_process_port', '0', '-m', 'both']
        done = subprocess.run(launch, capture_output=True, text=True, timeout=600, env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(here)))
        assert not done.returncode, done.stderr
    finally:
        os.chdir(before)
        crops.predict_labels, training._save, training.EVERY = labels, save, every
    return here, done.stderr


def same(a, b, log=2e-4, weights=5e-4):
    "Logs of two folders, to a share of each figure; and weights, their mean difference: Adam makes a step of a gradient that is only rounding"
    x, y = (pd.read_csv(f/'log.csv').drop(columns=TIMES) for f in (a, b))
    pd.testing.assert_frame_equal(x, y, rtol=log, atol=1e-6)
    x, y = (torch.cat([v.flatten().double() for _, v in sorted(load_file(f/'model.safetensors').items())]) for f in (a, b))
    assert (x - y).abs().mean() < weights


@pytest.mark.parametrize('fold', ['fold0/low', 'fold0'])
def test_two_processes_train_as_one(place, fold):
    same(place[0]/'one'/fold, place[0]/'two'/fold)
    one, two = (np.loadtxt(place[0]/f'{run}.norms') for run in ('one', 'two'))   # AdamW, after clipping, would not show a factor
    assert len(one) == 8 + 10
    np.testing.assert_allclose(two, one, rtol=.02)


def test_so_they_do_in_stage_2_whose_crops_the_first_makes(place):
    here = place[0]
    same(here/'crops1'/'fold0', here/'crops2'/'fold0')
    lines = (here/'labelled.txt').read_text().splitlines()
    assert sorted(lines) == sorted(f'{uid} 0' for uid in find_studies(here/'data', 'train'))
    np.testing.assert_allclose(*(pd.read_csv(here/r/'oof.csv').iloc[:, 2:] for r in ('crops1', 'crops2')), atol=1e-3)


def test_two_processes_go_on_where_one_was_cut_off(place):
    same(place[0]/'one'/'fold0', place[0]/'cut2'/'fold0')


def test_only_the_first_process_speaks_and_writes(place):
    here, said = place
    # two networks; one of them again, for the first of `cut2` is done already; stage 2, in the format that the CPU is fast in
    assert [line.split()[4] for line in said.splitlines() if line.startswith('training on cpu in ') and ', 2 processes' in line][:3] == ['fp32,']*3
    assert said.count(', 2 processes') == 4
    assert not list((here/'two').rglob('*.part*'))
    one, two = ({p.relative_to(here/r).as_posix() for p in (here/r).rglob('*')} for r in ('one', 'two'))
    assert one == two
    assert training.read_run(here/'two')['figures']['fold0']['studies'] == training.read_run(here/'one')['figures']['fold0']['studies']


def test_a_run_cut_off_within_an_epoch_ends_the_same(place, monkeypatch):
    here = place[0]
    assert max(p.name for p in (here/'cut'/'fold0'/'checkpoints').iterdir()) == 'epoch_001_step_000003.pt'
    steps, average = [], training._average
    monkeypatch.setattr(training, '_average', lambda *a: (steps.append(1), average(*a)))
    monkeypatch.chdir(here)
    shell(f'{SEGMENTATION} cut --resume')
    assert len(steps) == 2   # of five
    same(here/'one'/'fold0', here/'cut'/'fold0', 1e-5, 1e-7)


def test_the_log_says_what_a_step_waited_for_and_how_it_computed(place):
    log = pd.read_csv(place[0]/'one'/'fold0'/'log.csv')
    assert log.waiting.between(0, 1).all() and log.waiting.gt(0).all() and set(log['dtype']) == {'fp32'}
    assert training.read_run(place[0]/'one')['figures']['fold0']['last']['dtype'] == 'fp32'


class Slow(torch.utils.data.Dataset):
    "Ten numbers, each of which takes a while"
    def __init__(self, seconds): self.seconds = seconds
    def __len__(self): return 10
    def __getitem__(self, i):
        training.time.sleep(self.seconds)
        return torch.full((1,), float(i)), torch.zeros(1)


@pytest.mark.parametrize('data, step, least, most', [(.15, 0, .6, 1), (0, .15, 0, .4)])
def test_the_share_of_waiting(tmp_path, data, step, least, most):
    def loss(pred, true):
        training.time.sleep(step)
        return (pred - true).square().mean()
    log = training.fit(torch.nn.Linear(1, 1), loss, Slow(data), Slow(0), tmp_path, 1, device='cpu')
    assert least <= log.waiting.iloc[0] <= most


def test_parts_make_up_the_batch():
    whole = training._Loader(Slow(0), 4, True, 1, 1, torch.device('cpu'))
    parts = [training._Loader(Slow(0), 4, True, 1, 1, torch.device('cpu'), r, 2) for r in range(2)]
    for w, *p in zip(whole, *parts, strict=True): assert torch.equal(w[0], torch.cat([x[0] for x in p]))
    valid = [training._Loader(Slow(0), 3, False, 1, 1, torch.device('cpu'), r, 3) for r in range(3)]
    assert [len(v) for v in valid] == [len(list(v)) for v in valid] == [2, 1, 1]
    assert sorted(int(i) for v in valid for b in v for i in b[0]) == list(range(10))
    with pytest.raises(CspineError, match='3 processes cannot share a batch of 4 equally; give a multiple of 3 with --batch'):
        training._Loader(Slow(0), 4, True, 1, 1, torch.device('cpu'), 0, 3)


def test_precision(monkeypatch):
    cpu, gpu = torch.device('cpu'), torch.device('cuda')
    fast = {}
    monkeypatch.setattr(training, 'fast_dtype', lambda device: fast[device.type])
    for fast in (dict(cpu=None, cuda=torch.float16), dict(cpu=torch.bfloat16, cuda=torch.bfloat16)):
        for device in (cpu, gpu):
            assert training._dtype('auto', device) == fast[device.type] and training._dtype('fp32', device) is None
        assert training._dtype('fp16', gpu) == torch.float16
        with pytest.raises(CspineError, match='fp16 trains on a GPU, not on cpu'): training._dtype('fp16', cpu)
    assert training._dtype('bf16', cpu) == training._dtype('bf16', gpu) == torch.bfloat16
    fast = dict(cpu=None, cuda=torch.float16)
    for device in (cpu, gpu):
        with pytest.raises(CspineError, match=f'this {device.type} cannot compute in bf16'): training._dtype('bf16', device)
    with pytest.raises(CspineError, match='one of auto, fp32, bf16, fp16'): training._dtype('half', cpu)


def test_bf16_is_what_computes(tmp_path, monkeypatch):
    seen = []
    def loss(pred, true):
        seen.append(pred.dtype)
        return (pred.float() - true).square().mean()
    monkeypatch.setattr(training, 'fast_dtype', lambda device: torch.bfloat16)
    flat = torch.nn.Linear(1, 1)
    deep = torch.nn.Sequential(torch.nn.Unflatten(1, (1, 1, 1, 1)), torch.nn.Conv3d(1, 1, 1), torch.nn.Flatten())
    for net, precision, dtype in ((deep, 'auto', torch.bfloat16), (flat, 'auto', torch.float32), (flat, 'bf16', torch.bfloat16), (deep, 'fp32', torch.float32)):
        log = training.fit(net, loss, Slow(0), Slow(0), tmp_path, 1, device='cpu', precision=precision)
        assert set(seen) == {dtype} and set(log['dtype']) == {'fp32' if dtype == torch.float32 else 'bf16'}
        seen.clear()


@pytest.mark.parametrize('option, says', [('--device abacus', "cannot use the device 'abacus': there is none of that name; use cpu or cuda"),
                                          ('--precision half', 'one of auto, fp32, bf16, fp16'), ('--device cuda:99', "cannot use the device 'cuda:99'")])
def test_what_cannot_be_is_said_before_the_work(place, capsys, option, says):
    with pytest.raises(SystemExit) as stop: cli.main(f'train segmentation --data {place[0]}/data --out {place[0]}/none {option}'.split())
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert says in said and said.count('\n') == 1 and 'mkldnn' not in said and not (place[0]/'none').exists()


def test_several_processes_choose_their_device_and_precision_one_way(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(CspineError, match='each gets its own GPU'): training._processes('cuda:1')
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'bf16')
    with pytest.raises(CspineError, match="--precision of `cspine train` sets it"): training._processes('cpu')


def test_accelerates_own_cpu_switch_is_said_to_start_one_process(monkeypatch, capsys):
    for k, v in dict(MASTER_ADDR='127.0.0.1', ACCELERATE_USE_CPU='True').items(): monkeypatch.setenv(k, v)
    assert training._processes() is None and '--multi_gpu' in capsys.readouterr().err
    assert find_device('cpu') == torch.device('cpu')


def test_the_time_left_counts_what_comes_after(tmp_path, capsys):
    training.fit(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, Slow(.21), Slow(0), tmp_path, 2, batch=5, device='cpu', later=60)
    said = [line.rsplit('; ')[1] for line in capsys.readouterr().err.splitlines() if 'waiting for data' in line]
    assert len(said) == 2 and said[1] == '1:00 left of the fold' and '1:02' <= said[0].split()[0] < '1:10'
