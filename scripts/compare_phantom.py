"""Phantoms beside real CT: pictures in one window, histograms, and what can be measured on both.

    python scripts/compare_phantom.py FOLDER [PICTURE]

FOLDER holds real CT: slices (*.dcm), and a vertebra with its mask (*_ct.nii.gz and *_mask.nii.gz beside it).
"""
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
from matplotlib import pyplot as plt
from scipy.ndimage import gaussian_filter, uniform_filter, zoom

from cspine.phantom import make_study

PERCENTILES = (5, 25, 50, 75, 95)


def noise(hu, px, low=-150, high=150, side=9):
    """Noise of one slice: sigma (HU) and correlation length (mm, where the autocorrelation falls to 1/e), in its most even squares."""
    inside = uniform_filter(((hu > low) & (hu < high)).astype(float), side) > .999
    mean = uniform_filter(hu, side)
    std = np.sqrt(np.maximum(uniform_filter(hu**2, side) - mean**2, 0))
    if inside.sum() < 50: return np.nan, np.nan
    even = inside & (std <= np.percentile(std[inside], 25))
    rest, r = hu - gaussian_filter(hu, side/3), side//2
    tops = np.argwhere(even)[::max(1, even.sum()//400)]
    tops = tops[((tops > r) & (tops < np.array(hu.shape) - r - 1)).all(1)]
    squares = np.stack([rest[y - r:y + r + 1, x - r:x + r + 1] for y, x in tops])
    squares = squares - squares.mean((1, 2), keepdims=True)
    acf = [1.] + [(squares[:, :, k:]*squares[:, :, :-k]).mean()/(squares**2).mean() for k in range(1, r)]
    k = next((i for i, a in enumerate(acf) if a < np.exp(-1)), len(acf) - 1)
    return float(np.median(std[even])), float(px*(k - 1 + (acf[k - 1] - np.exp(-1))/(acf[k - 1] - acf[k])))


def edge(hu, px):
    """10-90 % width (mm) of the edge between air and skin, at the front of the body; median over columns."""
    widths = []
    for x in range(int(hu.shape[1]*.4), int(hu.shape[1]*.6)):
        column = hu[:, x]
        at = np.argmax(column > -500)
        if at < 8 or at > len(column) - 12 or column[:at - 5].max() > -850: continue
        low, high = np.median(column[at - 8:at - 3]), column[at + 1:at + 4].max()
        p = (column[at - 4:at + 4] - low)/(high - low)
        def cross(level): i = np.argmax(p > level); return i - 1 + (level - p[i - 1])/(p[i] - p[i - 1])
        widths.append((cross(.9) - cross(.1))*px)
    return float(np.median(widths)) if len(widths) > 5 else np.nan


def phantoms(px, dz, n=8, **scan):
    """Phantoms around C5 with the voxels of a real scan."""
    for seed in range(n):
        yield make_study((404, seed), int(2*round(160/px)), np.zeros(7), scan=dict(fov=px*2*round(160/px), dz=dz, thickness=dz, top=70, bottom=-5, **scan))


def coarse(study, mm):
    """HU and labels on cubic voxels, read off without averaging, as the real vertebra's noise says it was."""
    s = np.array(study.volume.spacing)
    return zoom(study.volume.hu.astype('f4'), s/mm, order=1), zoom(study.labels, s/mm, order=0)


def compare(folder, picture=None):
    """Measure both, print the tables, draw the figure; returns (measured, percentiles)."""
    folder, rows, slices = Path(folder), [], []
    for f in sorted(folder.glob('*.dcm')):
        d = pydicom.dcmread(f)
        hu = d.pixel_array*float(d.RescaleSlope) + float(d.RescaleIntercept)
        slices.append((hu, float(d.PixelSpacing[0])))
        rows.append((f'real {f.stem}', slices[-1][1], *noise(*slices[-1]), edge(*slices[-1])))
    ct = next(folder.glob('*_ct.nii.gz'))
    v, m = (nib.load(p) for p in (ct, Path(str(ct).replace('_ct.', '_mask.'))))
    axes = [nib.aff2axcodes(v.affine).index(next(a for a in nib.aff2axcodes(v.affine) if a in pair)) for pair in ('IS', 'AP', 'LR')]
    mm = float(v.header.get_zooms()[0])
    v, m = (np.transpose(np.asarray(x.dataobj), axes) for x in (v, m))
    sizes = {int(k): (m == k).sum() for k in np.unique(m) if k}
    bone = m == max(sizes, key=sizes.get)
    z = int(np.argwhere(bone).mean(0)[0])
    rows.append((f'real {ct.name.split(".")[0]}', mm, *noise(v[z].astype(float), mm, side=5), np.nan))
    real_bone, real_soft = v[bone], np.concatenate([h[(h > -200) & (h < 200)].ravel() for h, _ in slices])
    px = slices[0][1] if slices else .6
    found = list(phantoms(px, 1.))
    for s in found:
        k = s.volume.hu[len(s.volume.hu)//2].astype(float)
        rows.append((f'phantom, {s.facts["kernel"]} kernel, {s.facts["noise_hu"]:.0f} HU', px, *noise(k, px), edge(k, px)))
    small = [coarse(s, mm) for s in found]
    rows += [('phantom, resampled', mm, *noise(hu[len(hu)//2], mm, side=5), np.nan) for hu, _ in small]
    bones = [hu[(lab >= 3) & (lab <= 7)] for hu, lab in small]
    soft = np.concatenate([h[(h > -200) & (h < 200)].ravel() for s in found for h in s.volume.hu[::20]])
    measured = pd.DataFrame(rows, columns='scan pixel_mm sigma_hu correlation_mm edge_mm'.split()).round(2)
    table = pd.DataFrame({'real vertebra': np.percentile(real_bone, PERCENTILES), 'phantoms C3-C7': np.percentile(np.concatenate(bones), PERCENTILES),
                          **{f'phantom {i}': np.percentile(b, PERCENTILES) for i, b in enumerate(bones)},
                          'real soft tissue': np.percentile(real_soft, PERCENTILES), 'phantoms, soft tissue': np.percentile(soft, PERCENTILES)}, index=PERCENTILES).T.round()
    print(measured.to_string(index=False), '\n\nHU at percentiles\n', table.to_string(), sep='')
    if picture:
        fig, ax = plt.subplots(2, 4, figsize=(11, 5.6), dpi=80, layout='constrained')
        hu, lab = small[0]
        p = np.argwhere((lab >= 4) & (lab <= 6)).mean(0).astype(int)
        first = found[0].volume.hu
        views = [(slices[0][0], 'real, thorax', 1) if slices else (v[z], 'real', 1), (v[z], f'real, {mm} mm', 1), (v[:, :, v.shape[2]//2], 'sagittal', 1),
                 (first[len(first)//2, 110:-110, 110:-110], f'phantom, {px} mm, cropped', 1), (hu[p[0], p[1] - 37:p[1] + 37, p[2] - 37:p[2] + 37], f'phantom, {mm} mm', 1),
                 (hu[:, p[1] - 37:p[1] + 37, p[2]], 'sagittal', 1)]
        for a, (im, title, aspect) in zip((*ax[0, :3], *ax[1, :3]), views):
            a.imshow(im, cmap='gray', vmin=-500, vmax=1300, aspect=aspect)
            a.set_title(title, fontsize=8)
            a.axis('off')
        for a, pair, title in ((ax[0, 3], (real_bone, np.concatenate(bones)), 'in vertebrae'), (ax[1, 3], (real_soft, soft), 'soft tissue')):
            for x, name in zip(pair, ('real', 'phantom')): a.hist(x, np.linspace(-300, 1500, 73) if title == 'in vertebrae' else np.arange(-200, 200, 8), density=True, histtype='step', label=name)
            a.set_title(f'HU {title}', fontsize=8)
            a.set_yticks([])
            a.legend(fontsize=7)
        fig.savefig(picture, pil_kwargs=dict(optimize=True))
    return measured, table


if __name__ == '__main__':
    if len(sys.argv) not in (2, 3): sys.exit(__doc__)
    compare(*sys.argv[1:])
