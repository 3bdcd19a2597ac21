"""What reading and predicting cost on this machine: `make bench`. Medians of several runs; ratios travel, times do not.

`make bench` installs what the others need. Memory on Linux only, by the kernel's mark of a process's largest size.
"""
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pydicom
import torch

from cspine.bundle import load_bundle
from cspine.dicom import Volume, read_series, write_series
from cspine.inference import Pipeline
from cspine.oddities import write_odd
from cspine.phantom import make_study
from cspine.presets import get_preset
from cspine.segmentation import build_segmentation, predict_labels
from cspine.windowing import WINDOWS, three_windows

SLICES, RUNS = 300, 3


def median_ms(function, *args):
    took = []
    for _ in range(RUNS):
        start = time.perf_counter()
        function(*args)
        took.append(time.perf_counter() - start)
    return 1000 * statistics.median(took)


def by_cspine(folder):
    return read_series(folder).hu


def by_simpleitk(folder):
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return sitk.GetArrayFromImage(reader.Execute())


def by_resampling(folder):
    """What a tilted or uneven series takes besides SimpleITK's reader: one linear resampling. Only its cost counts here."""
    import SimpleITK as sitk

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image, shear = reader.Execute(), sitk.AffineTransform(3)
    shear.Shear(1, 2, -0.3)
    return sitk.GetArrayFromImage(sitk.Resample(image, image, shear, sitk.sitkLinear, -1024.0))


def by_pydicom(folder, plugin=''):
    """What most kernels do: pydicom in a loop, sorted by position."""
    slices = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda d: -d.ImagePositionPatient[2])
    for d in slices:
        d.pixel_array_options(decoding_plugin=plugin)
    return np.stack([(d.pixel_array * d.RescaleSlope + d.RescaleIntercept).astype(np.int16) for d in slices])


def best_plugin(folder, tmp):
    """The fastest of pydicom's plug-ins for these files, by the first ten of them."""
    few = tmp / 'few'
    few.mkdir(exist_ok=True)
    for k in range(10):
        shutil.copy(folder / f'{k + 1}.dcm', few)
    took = {}
    for plugin in ('', 'pydicom', 'gdcm', 'pylibjpeg'):   # '': raw, which needs none
        try:
            by_pydicom(few, plugin)
            took[plugin] = median_ms(by_pydicom, few, plugin)
        except (RuntimeError, ValueError, NotImplementedError, AttributeError):
            continue    # this one does not read the syntax
    return min(took, key=took.get)


def peak(reader, folder):
    """How many times the int16 volume a process grows by while it reads: in a process of its own, warmed up on another study."""
    code = (
        'import re, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import bench\n'
        'rss = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024\n'
        'read = eval(sys.argv[2], vars(bench)); read(Path(sys.argv[4])); before = rss()\n'
        'hu = read(Path(sys.argv[3])); print((rss() - before) / (2 * hu.size))\n'
    )
    few = folder.parent / 'few'
    shutil.rmtree(few, ignore_errors=True)
    few.mkdir()
    for k in range(4):
        shutil.copy(folder / f'{k + 1}.dcm', few)
    args = [sys.executable, '-c', code, str(Path(__file__).parent), reader, str(folder), str(few)]
    return float(subprocess.run(args, check=True, capture_output=True, text=True).stdout)


def compare(what, readers, folder):
    """One line for each reader: seconds, memory, and how many times as fast cspine is."""
    functions = {name: eval(code) for name, code in readers.items()}
    runs = {name: [] for name in readers}
    for _ in range(RUNS):                    # in turn, so that a busy machine is busy for all
        for name, f in functions.items():
            start = time.perf_counter()
            f(folder)
            runs[name].append(time.perf_counter() - start)
    took = {name: statistics.median(r) for name, r in runs.items()}
    for name, t in took.items():
        ratio = '' if name == 'cspine' else f'   cspine {t / took["cspine"]:5.2f} times as fast'
        print(f'  {what:14}{name:18}{t:6.2f} s   memory {peak(readers[name], folder):4.2f}{ratio}', flush=True)


def reading(volume, tmp):
    hu = np.resize(volume.hu, (SLICES, *volume.shape[1:]))
    print(f'reading {SLICES} slices of {hu.shape[1]} x {hu.shape[2]}: seconds, times as fast as the others, peak memory over the volume\'s own')
    for syntax in ('explicit', 'jpeg_lossless', 'rle', 'jpeg2000'):
        folder = write_series(hu, volume.affine, tmp / syntax, syntax=syntax)
        plugin = best_plugin(folder, tmp)
        readers = {'cspine': 'by_cspine', 'SimpleITK': 'by_simpleitk',
                   f'pydicom {plugin}'.strip(): f'lambda folder: by_pydicom(folder, {plugin!r})'}
        functions = {name: eval(code) for name, code in readers.items()}
        for name, f in functions.items():
            got = f(folder)
            assert (got == hu).all() or (got[::-1] == hu).all(), name   # SimpleITK goes from the feet to the head
        compare(syntax, readers, folder)
        shutil.rmtree(folder)
    for odd in ('tilted', 'uneven'):
        folder = tmp / odd
        write_odd(hu, volume.affine, folder, odd)
        compare(odd, {'cspine': 'by_cspine', 'SimpleITK, shear': 'by_resampling'}, folder)
        shutil.rmtree(folder)


def predicting(volume):
    pipeline = Pipeline(load_bundle())
    pipeline.predict(volume)    # the first call warms up
    seconds = pipeline.predict(volume).seconds
    whole = sum(seconds.values())
    print(f'predicting one study of {volume.shape}: {whole:.2f} s')
    for step, s in seconds.items():
        print(f'  {step:14}{s:6.2f} s   {s / whole:4.0%}')


def plain_loop(net, hu):
    """What a kernel would write: each slice windowed by numpy, one by one through smp's network, and the likeliest class."""
    out = np.zeros(hu.shape, np.uint8)
    for z, slice_ in enumerate(hu.astype(np.float32)):
        x = np.stack([np.clip((slice_ - (level - width / 2)) / width, 0, 1) for width, level in WINDOWS])
        with torch.inference_mode():
            out[z] = net(torch.from_numpy(x)[None])[0].sigmoid().argmax(0).numpy()
    return out


def segmenting(volume, slices=12):
    """The paper's stage 1 with the same random weights, in turn with a plain loop; which share of the time the network has."""
    preset = get_preset('paper').segmentation
    net = build_segmentation(preset).eval()
    scan = Volume(volume.hu[len(volume.hu) // 2:][:slices], volume.affine, volume.uid, [])
    with torch.inference_mode():    # about as much bone as in a neck, 2 %: random weights call everything bone
        logits = net(three_windows(torch.from_numpy(scan.hu[:1]).float()))[0]
        net.segmentation_head[0].bias[1:] -= torch.quantile((logits[1:].logsumexp(0) - torch.nn.functional.logsigmoid(logits[0]))[::4, ::4], .98)
    inside = [0.0]

    def timed(module, inputs, kwargs, inner=net.forward):
        start = time.perf_counter()
        out = inner(*inputs, **kwargs)
        inside[0] += time.perf_counter() - start
        return out

    runs = {'cspine': [], 'plain loop over smp': []}
    net.forward = lambda *a, **k: timed(net, a, k)
    for _ in range(2):
        for name, f in (('cspine', lambda: predict_labels([net], preset, scan)), ('plain loop over smp', lambda: plain_loop(net, scan.hu))):
            inside[0], start = 0.0, time.perf_counter()
            f()
            runs[name].append((time.perf_counter() - start, inside[0]))
    print(f'segmenting {slices} slices of {scan.hu.shape[1]} x {scan.hu.shape[2]} with {preset.encoder}: seconds, share of the network')
    ours = min(t for t, _ in runs['cspine'])
    for name, r in runs.items():
        t, n = min(r)
        print(f'  {name:20}{t:6.2f} s   {n / t:4.0%}' + ('' if name == 'cspine' else f'   cspine {t / ours:5.2f} times as fast'), flush=True)


if __name__ == '__main__':
    study = make_study(90000, size=512).volume
    with tempfile.TemporaryDirectory() as tmp:
        reading(study, Path(tmp))
    predicting(study)
    segmenting(study)
