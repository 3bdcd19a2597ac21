"""Models of stage 2, each trained for the same time on the same crops and scored on the same others.

    python scripts/table_2.py TRAIN CROPS HELD HELD_CROPS OUT [--minutes 25 | --steps 320] [--studies 400] [--only NAME ...] [--weights none]
    python scripts/table_2.py TRAIN CROPS HELD HELD_CROPS OUT --run RUN ...

TRAIN and HELD are folders as `cspine phantom` makes them, CROPS and HELD_CROPS what `cspine crop` made of their train_images/ with one
preset; several of TRAIN and CROPS may be given, joined by commas. A model learns from the first --studies of TRAIN in as many steps of one
study as fit into the minutes, or as are asked for, the cosine ending with the last. Its calibration is fitted on one half of HELD and used on the
other, since HELD may be fractured more or less often than what it learned from. A RUN of `cspine train classification` answers with its first fold, calibrated alike. OUT gets of each model NAME.csv, the answers, NAME.evidence.csv,
NAME.table.csv and a row of summary.csv, and of all in OUT differences.csv: how much better the last one named is, with intervals. A model whose answers are
there is not trained again. scripts/table_2.csv and table_2_differences.csv are what was measured so, and what the notebook of rivals shows.
"""
import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from cspine.classification import CrackNetBiLSTM, CropDataset, FractureLoss, _answers, cross_calibrated, evidence_hits, with_prior
from cspine.cropping import crop_planes
from cspine.crops import Crops
from cspine.encoders import load_encoder_weights
from cspine.metrics import _evidence, fracture_metrics, metrics_by_kind, read_kinds, read_sizes, shown
from cspine.presets import LEVELS, TARGETS, progress
from cspine.rivals import with_model
from cspine.rsna import _per_exam, best_constant, read_train
from cspine.training import fit, read_run


class Joined:
    "Several crop data sets as one"
    def __init__(self, stores): self.of = {u: s for s in stores for u in s.uids}
    def read(self, uid): return self.of[uid].read(uid)


class Passes(torch.utils.data.Dataset):
    "A data set gone through again and again, until there are n items"
    def __init__(self, ds, n):
        self.ds, self.n, self.epoch = ds, n, 0
        self.weights = None if ds.weights is None else np.resize(ds.weights, n) / np.resize(ds.weights, n).sum()

    def __len__(self): return self.n

    def __getitem__(self, i):
        if isinstance(i, tuple): return self.ds[i[0] % len(self.ds), i[0] // len(self.ds) + i[1] * (1 + self.n // len(self.ds))]
        self.ds.epoch = i // len(self.ds)
        return self.ds[i % len(self.ds)]


def step_seconds(cls, net, loss, ds, n=4):
    "What a training step on one study takes"
    took = []
    for i in range(n + 1):
        start = time.monotonic()
        *x, = (t[None] for t in ds[i])
        loss(net.train()(*x[:2]), *x[2:]).backward()
        net.zero_grad()
        took.append(time.monotonic() - start)
    return float(np.median(took[1:]))


def trained(cls, args, store, uids, truth, folder):
    "A model of that preset, after so many minutes; and its steps"
    torch.manual_seed(0)
    net, loss = CrackNetBiLSTM(cls), FractureLoss(cls.loss, cls.mask_loss, cls.slice_loss, cls.cell_loss)
    if cls.pretrained and 'random weights' not in load_encoder_weights(net.encoder, cls.encoder, args.weights, print): net.freeze()
    ds = CropDataset(store, uids, truth.loc[uids, list(TARGETS)].to_numpy(), cls)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    steps = args.steps or max(20, int(60 * args.minutes / step_seconds(cls, net, loss, ds)))
    net.load_state_dict(start)
    few = CropDataset(store, uids[:2], truth.loc[uids[:2], list(TARGETS)].to_numpy(), cls, train=False)
    print(f'{steps} steps, {steps / len(uids):.1f} times through {len(uids)} studies', flush=True)
    fit(net, loss, Passes(ds, steps), few, folder, 1, 1, args.lr, cls.weight_decay, .998, inputs=2, resume=True)
    return net, steps


def answers(net, cls, store, uids):
    "What a model says, who is there and evidence, of studies that nobody has learned from"
    p, there, met = [], [], []
    for u in progress(uids, 'answering'):
        s = store.read(u)
        q, heat = _answers([net], cls, crop_planes(s['crops'], s['masks'], cls), s['present'], evidence=True)
        p.append(q)
        there.append(s['present'])
        met += [(u, LEVELS[level], int(hit), share) for level, hit, share in evidence_hits(heat, s)]
    return np.array(p), np.array(there), pd.DataFrame(met, columns=['StudyInstanceUID', 'level', 'hit', 'share'])


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ('train', 'crops', 'held', 'held_crops', 'out'): args.add_argument(name)
    args.add_argument('--minutes', type=float, default=25)
    args.add_argument('--steps', type=int, help='instead of minutes')
    args.add_argument('--studies', type=int)
    args.add_argument('--run', nargs='*', default=[], type=Path, help='score these, train nothing')
    args.add_argument('--only', nargs='*', default=['cracknet_bilstm', 'slice_lstm', 'best'])
    args.add_argument('--preset', default='tiny')
    args.add_argument('--weights', help="encoder weights, as of `cspine train`: none, a file; what is installed, if not given")
    args.add_argument('--lr', type=float, default=1e-3)
    args.add_argument('--set', nargs='*', default=[], help='FIELD=NUMBER: another value than the model has')
    args.add_argument('--as', dest='label', help='what to call it in OUT')
    args = args.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    truth = pd.concat([read_train(Path(d) / 'train.csv') for d in args.train.split(',')])
    store = Joined([Crops(c) for c in args.crops.split(',')])
    uids = [u for u in truth.index if u in store.of][:args.studies]
    held, held_truth = Crops(args.held_crops), read_train(Path(args.held) / 'train.csv')
    asked = [u for u in held_truth.index if u in held]
    held_truth = held_truth.loc[asked]
    prior = best_constant(truth.loc[uids])[list(TARGETS)].to_numpy()
    kinds = [read(Path(args.held) / 'fractures.csv') for read in (read_kinds, read_sizes)]
    for run in args.run:
        cls = read_run(run)['preset'].classification
        label, net, log = run.name, CrackNetBiLSTM(cls), pd.read_csv(run / 'fold0' / 'log.csv')
        if not (out / f'{label}.csv').exists():
            net.load_state_dict(load_file(run / 'fold0' / 'model.safetensors'))
            net.scale.fill_(1)
            net.shift.zero_()
            p, there, met = answers(net, cls, held, asked)
            met.to_csv(out / f'{label}.evidence.csv', index=False)
            n = read_run(run)['figures']['fold0']['studies']['train']
            p = with_prior(cross_calibrated(held_truth.to_numpy(), p, there), there, prior)
            pd.DataFrame(p, index=held_truth.index, columns=list(TARGETS)).assign(
                minutes=log.seconds.sum() / 60, steps=len(log) * (n // cls.batch), studies=n).to_csv(out / f'{label}.csv')
        show(out, label, held_truth, kinds, args.held)
    for name in [] if args.run else args.only:
        cls = with_model(args.preset, name, stage='classification').classification
        cls = replace(cls, **{k: type(getattr(cls, k))(float(v)) if not isinstance(getattr(cls, k), str) else v for k, v in (s.split('=') for s in args.set)})
        label = args.label or name + (f'-{len(uids)}' if args.studies else '') + (f'-{args.weights}' if args.weights else '')
        if not (out / f'{label}.csv').exists():
            said, settings = out / label / 'asked.json', json.dumps([name, args.steps or f'{args.minutes} minutes', len(uids), args.lr, args.set, args.weights])
            if said.exists() and said.read_text() != settings: raise SystemExit(f'{out / label} was begun with {said.read_text()}, not {settings}: name another --as, or delete it')
            said.parent.mkdir(exist_ok=True)
            said.write_text(settings)
            start = time.monotonic()
            net, steps = trained(cls, args, store, uids, truth, out / label)
            took = (time.monotonic() - start) / 60
            p, there, met = answers(net, cls, held, asked)
            met.to_csv(out / f'{label}.evidence.csv', index=False)
            p = pd.DataFrame(with_prior(cross_calibrated(held_truth.to_numpy(), p, there), there, prior), index=held_truth.index, columns=list(TARGETS))
            p.assign(minutes=took, steps=steps, studies=len(uids)).to_csv(out / f'{label}.csv')
        show(out, label, held_truth, kinds, args.held)
    others = {f.name.removesuffix('.table.csv'): read_answers(f.with_name(f.name.replace('.table', ''))) for f in sorted(out.glob('*.table.csv'))}
    mine = others.pop(label)
    if others:
        table = differences({**{k: p.loc[held_truth.index] for k, p in others.items()}, label: mine.loc[held_truth.index]}, held_truth).assign(held=Path(args.held).name)
        print(table.to_markdown(index=False, floatfmt='.3f'))
        table = table.round(4)
        if (path := out / 'differences.csv').exists(): table = pd.concat([(old := pd.read_csv(path))[old.better != label], table])
        table.to_csv(path, index=False)


def read_answers(path):
    "Answers, with minutes, steps and studies"
    return pd.read_csv(path, index_col=0, dtype={'StudyInstanceUID': str})


def show(out, label, truth, kinds, held):
    "The figures of one model; its answers"
    p = read_answers(out / f'{label}.csv')
    table = pd.concat([fracture_metrics(truth, p[list(TARGETS)]), *(metrics_by_kind(truth, p[list(TARGETS)], k) for k in kinds),
                       _evidence(pd.read_csv(out / f'{label}.evidence.csv', dtype={'StudyInstanceUID': str}), 1000)])
    table.to_csv(out / f'{label}.table.csv', index=False)
    row = dict(model=label, held=Path(held).name, **p[['studies', 'steps', 'minutes']].iloc[0].round(1))
    for short, (of, figure) in FIGURES.items():
        at = table[(table.row == of) & (table.figure == figure)].iloc[0]
        row |= {short: round(at.value, 4), f'{short}_low': round(at.low, 4), f'{short}_high': round(at.high, 4), f'{short}_constant': round(at.constant, 4)}
    new = pd.DataFrame([row])
    if (path := out / 'summary.csv').exists(): new = pd.concat([(old := pd.read_csv(path))[(old.model != label) | (old.held != row['held'])], new])
    new.to_csv(path, index=False)
    print(f"{label}: {p.minutes.iloc[0]:.1f} min, {p.steps.iloc[0]} steps\n{shown(table).to_markdown()}", flush=True)


FIGURES = dict(auroc=('C1-C7', 'auroc'), metric=('all', 'metric'), patient=('patient_overall', 'auroc'), evidence=('C1-C7', 'evidence'),
               under_1mm=('under 1 mm', 'auroc'), from_1_to_3mm=('1 to 3 mm', 'auroc'), over_3mm=('over 3 mm', 'auroc'))


def differences(answers, truth, samples=1000):
    "The last one's metric and AUROC of vertebrae less those of each other, drawn from the same studies"
    names, y, rng, rows = list(answers), truth[list(TARGETS)].to_numpy(), np.random.default_rng(0), []
    loss = {n: _per_exam(truth, p) for n, p in answers.items()}

    def area(n, d): return roc_auc_score(y[d, :7].ravel(), answers[n].to_numpy()[d, :7].ravel())
    def mean(n, d): return loss[n][d].mean()
    draws = [np.arange(len(y)), *(rng.integers(0, len(y), len(y)) for _ in range(samples))]
    for other in names[:-1]:
        for figure, of in (('metric', mean), ('AUROC of vertebrae', area)):
            d = [of(names[-1], at) - of(other, at) for at in draws]
            rows.append(dict(better=names[-1], than=other, figure=figure, difference=d[0], low=np.percentile(d[1:], 2.5), high=np.percentile(d[1:], 97.5)))
    return pd.DataFrame(rows)


if __name__ == '__main__':
    main()
