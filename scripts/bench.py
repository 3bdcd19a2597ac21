"""What reading and predicting cost on this machine: `make bench`. Medians of several runs; ratios travel, times do not."""
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pydicom

from cspine.bundle import load_bundle
from cspine.dicom import read_series, write_series
from cspine.inference import Pipeline
from cspine.phantom import make_study

SLICES, RUNS = 48, 5


def median_ms(function, *args):
    took = []
    for _ in range(RUNS):
        start = time.perf_counter()
        function(*args)
        took.append(time.perf_counter() - start)
    return 1000 * statistics.median(took)


def plain(folder):
    """What most kernels do: pydicom in a loop."""
    slices = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda d: d.ImagePositionPatient[2])
    return np.stack([d.pixel_array * d.RescaleSlope + d.RescaleIntercept for d in slices]).astype(np.int16)


def reading(volume, tmp):
    print(f'reading, ms per slice of {volume.shape[1]} x {volume.shape[2]}, {SLICES} slices')
    hu = volume.hu[:SLICES]
    for syntax in ('explicit', 'rle', 'jpeg_lossless', 'jpeg2000'):
        folder = write_series(hu, volume.affine, tmp / syntax, syntax=syntax)
        ours, line = median_ms(read_series, folder) / len(hu), f'  {syntax:14}'
        line += f'read_series {ours:6.2f}'
        if syntax in ('explicit', 'rle'):   # pydicom reads the others only with further packages
            theirs = median_ms(plain, folder) / len(hu)
            line += f'   pydicom in a loop {theirs:6.2f}   {theirs / ours:4.1f} times as fast'
        print(line)


def predicting(volume):
    pipeline = Pipeline(load_bundle())
    pipeline.predict(volume)    # the first call warms up
    seconds = pipeline.predict(volume).seconds
    whole = sum(seconds.values())
    print(f'predicting one study of {volume.shape}: {whole:.2f} s')
    for step, s in seconds.items():
        print(f'  {step:14}{s:6.2f} s   {s / whole:4.0%}')


if __name__ == '__main__':
    study = make_study(90000, size=512).volume
    with tempfile.TemporaryDirectory() as tmp:
        reading(study, Path(tmp))
    predicting(study)
