"""A bundle's figures on studies with masks: Dice per class, AUROC of the whole pipeline, and the trivial answers.

    python scripts/evaluate.py DATA BUNDLE [--write]

DATA holds test_images/, test_segmentations/ and test_truth.csv, as `cspine phantom` makes them. Everything is
measured on each study's own grid, from the DICOM files on: predicted label maps, predicted crops. --write puts the
figures, and what phantom.json says of the data, into the bundle's card.
"""
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from cspine.dicom import read_series
from cspine.inference import Pipeline
from cspine.presets import CLASSES, LEVELS, TARGETS, progress
from cspine.rsna import best_constant, find_studies, metric, read_mask, read_train
from cspine.segmentation import dice_per_class
from cspine.training import _origin


def evaluate(data, bundle):
    data, pipeline = Path(data), Pipeline(bundle)
    truth, folders = read_train(data / 'test_truth.csv'), find_studies(data, 'test')
    answers, dice, accuracy, background, seconds = {}, [], [], [], []
    for uid in progress(list(truth.index), 'evaluating'):
        volume = read_series(folders[uid])
        p = pipeline.predict(volume)
        mask = read_mask(data / 'test_segmentations' / f'{uid}.nii', volume)
        answers[uid] = p.probabilities
        dice.append(dice_per_class(p.labels, mask))
        accuracy.append((p.labels == mask).mean())
        background.append((mask == 0).mean())
        seconds.append(sum(p.seconds.values()))
    answers = pd.DataFrame(answers).T.loc[truth.index, list(TARGETS)]
    levels, constant = list(LEVELS), best_constant(truth)
    dice = np.nanmean(dice, axis=0)
    return {
        'studies': len(truth),
        'dice': {c: round(float(d), 4) for c, d in zip(CLASSES, dice)},
        'dice_C1_C7': round(float(dice[1:8].mean()), 4),
        'voxel_accuracy': round(float(np.mean(accuracy)), 5),
        'voxel_accuracy_all_background': round(float(np.mean(background)), 5),
        'auroc_vertebrae': round(float(roc_auc_score(truth[levels].to_numpy().ravel(), answers[levels].to_numpy().ravel())), 4),
        # a constant per level cannot tell two necks apart, but it knows which levels break more often
        'auroc_vertebrae_best_constant': round(float(roc_auc_score(
            truth[levels].to_numpy().ravel(), np.tile(constant[levels], len(truth)))), 4),
        'auroc_patient': round(float(roc_auc_score(truth['patient_overall'], answers['patient_overall'])), 4),
        'score': round(metric(truth, answers), 4),
        'score_best_constant': round(metric(truth, truth * 0. + constant), 4),
        'score_half': round(metric(truth, truth * 0. + .5), 4),
        'seconds_per_study': round(float(np.mean(seconds)), 2),
    }


def write(figures, data, bundle):
    path = Path(bundle) / 'bundle.json'
    meta = json.loads(path.read_text(encoding='utf-8'))
    meta['card'] |= {'figures_on': f'the test studies of {_origin(Path(data))}', 'figures': figures}
    path.write_text(json.dumps(meta, indent=1, allow_nan=False) + '\n', encoding='utf-8')


if __name__ == '__main__':
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ['--write']):
        sys.exit(__doc__)
    figures = evaluate(*sys.argv[1:3])
    print(json.dumps(figures, indent=1))
    if sys.argv[3:]:
        write(figures, *sys.argv[1:3])
