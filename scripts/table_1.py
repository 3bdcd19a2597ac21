"""The paper's Table I with our own rows: every model trained for the same time on the same studies and scored on the same others.

    python scripts/table_1.py DATA OUT [--minutes 15] [--preset tiny]

DATA holds train_images/ with segmentations/ and test_images/ with test_segmentations/, as `cspine phantom` makes them.
Each model is a run in OUT, trained by `train_segmentation` on fold 0's training studies, in one epoch of as many steps
as fit into the minutes (the cascade: half of the time for each of its networks). A run that is there is not trained again.
"""
import argparse
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from cspine.evaluation import evaluate
from cspine.rivals import with_model
from cspine.segmentation import build_segmentation, find_device, segmentation_loss
from cspine.training import _dtype, _fine_item, _step_seconds, read_run, train_segmentation

PAPER = dict(unet_efficientnet=(.999, 1.), unet_efficientnet_25d=(.980, 1.), resnet101_3d=(.82, .52), efficientnetv2=(.953, None))   # accuracy, Dice


def steps(net, seg, item, seconds):
    "How many training steps fit into that time"
    device = find_device()
    return max(1, int(seconds / _step_seconds(net.to(device), segmentation_loss(seg), item, seg.batch, device, _dtype('auto', device, net))))


def item_of(seg):
    "An item of the size that a model learns from"
    if seg.by_slice:
        x, y = torch.rand(seg.in_channels, seg.size, seg.size), torch.rand(seg.classes, seg.size, seg.size).softmax(0)
        return x, y if seg.model == 'unet2d' else (torch.rand(seg.classes - 1) > .5).float()
    n = seg.low_patch or seg.patch
    return torch.rand(seg.in_channels, *[n] * 3), torch.rand(seg.classes, *[n] * 3).softmax(0)


def in_time(preset, seconds):
    "The preset, trained for that long"
    seg, net = preset.segmentation, build_segmentation(preset.segmentation)
    if seg.model != 'cascade3d':
        return replace(preset, segmentation=replace(seg, epochs=1, steps=steps(net, seg, item_of(seg), seconds)))
    low, fine = steps(net.low, seg, item_of(seg), seconds / 2), steps(net.fine, seg, _fine_item(seg), seconds / 2)
    return replace(preset, segmentation=replace(seg, low_epochs=1, low_steps=low, epochs=1, steps=fine))


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('data', type=Path)
    args.add_argument('out', type=Path)
    args.add_argument('--minutes', type=float, default=15)
    args.add_argument('--preset', default='tiny')
    args.add_argument('--only', nargs='*', default=[*PAPER, 'own'], help="models; own: the preset's own stage 1")
    args = args.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.only:
        run = args.out / name
        preset = with_model(args.preset, None if name == 'own' else name)
        start = time.monotonic()
        if not (run / 'fold0' / 'model.safetensors').exists():
            begun = (run / 'run.json').exists()    # then with as many steps as it began with
            train_segmentation(args.data, read_run(run)['preset'] if begun else in_time(preset, 60 * args.minutes), run, resume=begun)
        print(f'{name}: {(time.monotonic() - start) / 60:.1f} min with reading and validation', flush=True)
        logs = [pd.read_csv(f) for f in sorted(run.rglob('log.csv'))]
        table = evaluate([run], args.data, out=args.out / f'{name}.csv', views=False)
        best = table.iloc[-1]    # in the order of a spine, where there is a map
        paper = PAPER.get(name, (None, None))
        rows.append({'model': name, 'accuracy': best['accuracy'], 'all background': best['accuracy_all_background'],
                     'Dice, each voxel for itself': table.iloc[0].get('dice'), 'Dice, in order': best.get('dice'), 'wrong level': best.get('wrong_level'),
                     'studies': best['studies'], 'minutes with validation': sum(log['seconds'].sum() for log in logs) / 60,
                     "paper's accuracy": paper[0], "paper's Dice": paper[1]})
        pd.DataFrame(rows).to_csv(args.out / 'table_1.csv', index=False)
        print(pd.DataFrame(rows).to_markdown(index=False, floatfmt='.3f', missingval='-'), flush=True)


if __name__ == '__main__':
    main()
