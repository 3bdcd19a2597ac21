"""What reading and predicting cost on this machine: `make bench`. Medians of several runs; ratios travel, times do not.

`make bench` installs what the others need. Memory on Linux only, by the kernel's mark of a process's largest size.
"""
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import torch

from cspine import classification
from cspine.bundle import load_bundle
from cspine.classification import CrackNetBiLSTM
from cspine.cropping import boxes_from_labels, crop_planes, crop_vertebrae
from cspine.dicom import Volume, read_series, write_series
from cspine.engine import compiled, fastest
from cspine.inference import Pipeline
from cspine.oddities import write_odd
from cspine.phantom import make_study
from cspine.presets import get_preset
from cspine.segmentation import build_segmentation, channels_last, predict_labels
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


def by_dicomsdl(folder):
    """The same by dicomsdl, which ends the process on an empty file."""
    import dicomsdl

    slices = sorted((dicomsdl.open(str(p)) for p in folder.iterdir()), key=lambda d: -d.ImagePositionPatient[2])
    return np.stack([d.pixelData(storedvalue=True) * int(d.RescaleSlope) + int(d.RescaleIntercept) for d in slices]).astype(np.int16)


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
        readers = {'cspine': 'by_cspine', 'SimpleITK': 'by_simpleitk', 'dicomsdl': 'by_dicomsdl',
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


def cpu_seconds(function, runs=2):
    """Of all threads of this process, the least of some runs: what others do on the machine counts for little. And its answer."""
    took = []
    for _ in range(runs):
        start = time.process_time()
        out = function()
        took.append(time.process_time() - start)
    return min(took), out


def plain_predict(folder, bundle):
    """What a kernel would write over the same networks: pydicom, one study, float32, eager torch, nine maps on the scan's own grid."""
    import torch.nn.functional as F

    stage1, stage2, preset = bundle.segmentation[0], bundle.classification[0], bundle.preset
    headers = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda d: -d.ImagePositionPatient[2])
    hu = np.stack([(d.pixel_array * d.RescaleSlope + d.RescaleIntercept).astype(np.int16) for d in headers])
    dz = headers[0].ImagePositionPatient[2] - headers[1].ImagePositionPatient[2]
    spacing = (float(abs(dz)), *map(float, headers[0].PixelSpacing))
    scan = torch.from_numpy(hu).float()[None, None]

    def size(mm, k):
        return [max(k, round(n * d / mm / k) * k) for n, d in zip(hu.shape, spacing)]

    def windows(x):
        return torch.stack([((x[:, 0] - (level - width / 2)) / width).clamp(0, 1) for width, level in WINDOWS], 1)

    with torch.inference_mode():
        low = stage1.low(windows(F.interpolate(scan, size(4, 8), mode='area'))).softmax(1)
        fine = F.interpolate(scan, size(1, 8), mode='area')
        coarse = F.interpolate(low, [n // 2 for n in fine.shape[2:]], mode='trilinear')
        on = (low[0, 0] < .7).nonzero()
        ratio = torch.tensor(fine.shape[2:]) / torch.tensor(low.shape[2:])
        lo = ((on.amin(0) - 3).clamp(min=0) * ratio / 8).floor().int() * 8
        hi = torch.minimum((((on.amax(0) + 4) * ratio / 8).ceil().int() * 8), torch.tensor(fine.shape[2:]))
        box = tuple(slice(int(a), int(b)) for a, b in zip(lo, hi))
        half = tuple(slice(b.start // 2, b.stop // 2) for b in box)
        p = stage1.fine(windows(fine[(..., *box)]), coarse[(..., *half)]).softmax(1)
        own = [(int(round(b.start * n / m)), int(round(b.stop * n / m))) for b, n, m in zip(box, hu.shape, fine.shape[2:])]
        part = torch.cat([F.interpolate(q[None, None], [b - a for a, b in own], mode='trilinear')[0] for q in p[0]])
        labels = np.zeros(hu.shape, np.uint8)
        labels[tuple(slice(a, b) for a, b in own)] = part.argmax(0).byte().numpy()
        volume = Volume(hu, np.diag([*spacing, 1.]), '1', [])
        crops, present = crop_vertebrae(volume, boxes_from_labels(labels), preset.classification, labels)
        x, there = torch.from_numpy(crop_planes(crops, None, preset.classification))[None], torch.from_numpy(present)[None]
        return sum(stage2(v, there).logits[0].sigmoid() for v in (x, x.flip(-1))) / 2


def sharing(volume, tmp):
    """`tiny` on a 512 x 512 scan, one thread: which share the networks have, with and without the engine; times as fast as a plain loop."""
    torch.set_num_threads(1)
    folder = write_series(volume.hu, volume.affine, tmp / 'share')
    bundle, inside = load_bundle(), [0.0]
    pipeline = Pipeline(bundle, 'cpu')
    name = pipeline.engine
    stage1, stage2 = bundle.segmentation[0], bundle.classification[0]

    def timed(net):
        inner, forward = fastest(net), net.forward

        def call(*inputs):
            start = time.process_time()
            out = inner(*inputs) if inner is not net else forward(*inputs)
            inside[0] += time.process_time() - start
            return out
        return call

    nets = {'stage 1, 4 mm': stage1.low, 'stage 1, 1 mm': stage1.fine.net, 'stage 2': stage2.encoder}
    ours = {}
    reading, scan = cpu_seconds(lambda: read_series(folder))
    print(f'tiny, {volume.shape}, one thread, CPU seconds, the networks\' share (of stage 1 and the encoder, nothing about them); reading takes {reading:.2f} s more')
    for engine in dict.fromkeys((name, 'torch')):
        kept = {n: getattr(n, 'engine', None) for n in nets.values()}
        for n in nets.values():
            if engine == 'torch':
                vars(n).pop('engine', None)
        for n in nets.values():
            n.engine = timed(n)
        pipeline.predict(scan)
        took = []
        for _ in range(2):
            inside[0], start = 0.0, time.process_time()
            pipeline.predict(scan)
            took.append((time.process_time() - start, inside[0]))
        ours[engine], networks = min(took)
        print(f'  {engine:20}{ours[engine]:6.2f} s   {networks / ours[engine]:4.0%}', flush=True)
        for n in nets.values():
            vars(n).pop('engine', None)
            if kept[n] is not None:
                n.engine = kept[n]
    engines = {n: vars(n).pop('engine', None) for n in nets.values()}
    classification.AT_ONCE, few = 10**9, classification.AT_ONCE
    plain, _ = cpu_seconds(lambda: plain_predict(folder, bundle))
    classification.AT_ONCE = few
    for n, engine in engines.items():
        if engine is not None:
            n.engine = engine
    print(f'  {"plain loop":20}{plain:6.2f} s   cspine ' + ', '.join(f'{plain / (reading + t):.2f} times as fast with {e}' for e, t in ours.items()), flush=True)


def engines():
    """Each network by torch, eager, as it is and channels last, and by the engine; the largest difference."""
    tiny, paper = load_bundle(), get_preset('paper')
    winner = replace(get_preset('best').classification, group=5, every=2, mask_channel=True, head='pooled', sampled=0)
    torch.manual_seed(0)
    stage1 = tiny.segmentation[0]
    nets = {'tiny, stage 1, 4 mm': (stage1.low, True, (1, 3, 48, 48, 48)), 'tiny, stage 1, 1 mm': (stage1.fine.net, True, (1, 33, 64, 40, 44)),
            'tiny, stage 2': (tiny.classification[0].encoder, False, (5, 3, 128, 128)), 'first place, stage 2': (CrackNetBiLSTM(winner).encoder, False, (3, 6, 256, 256)),
            'paper, stage 1': (build_segmentation(paper.segmentation), False, (1, 3, 512, 512)), 'paper, stage 2': (CrackNetBiLSTM(paper.classification).encoder, False, (1, 30, 256, 256))}
    print('one pass by torch (eager; channels last) and by the engine: CPU seconds, engine over torch, largest difference over the largest answer')
    for name, (net, any_size, shape) in nets.items():
        net.eval()
        x, fast = torch.rand(shape), compiled(net, any_size)

        def last(t):
            return t[-1] if isinstance(t, (list, tuple)) else t

        with torch.inference_mode():
            for f in (net, fast):
                f(x)
            eager, want = cpu_seconds(lambda: last(net.to(memory_format=torch.contiguous_format)(x)))
            there, got = cpu_seconds(lambda: last(fast(x)))
            near, _ = cpu_seconds(lambda: net(channels_last(x)))
        print(f'  {name:22}{eager:6.2f} {near:6.2f} {there:6.2f} s   {there / eager:4.2f}   {(got - want).abs().max() / want.abs().max():.0e}', flush=True)


if __name__ == '__main__':
    study = make_study(90000, size=512).volume
    with tempfile.TemporaryDirectory() as tmp:
        reading(study, Path(tmp))
        sharing(make_study(90000, size=512, scan=dict(dz=.5565)).volume, Path(tmp))   # 300 slices
    engines()
    predicting(study)
    segmenting(study)
