"Stage 1 across modules: geometry, learning, the paper's model at full size"
import pickle
from dataclasses import replace
import numpy as np
import pytest
import torch
from cspine import segmentation as seg
from cspine.phantom import make_study, phantom
from cspine.presets import CspineError, get_preset

TINY,PAPER = get_preset('tiny').segmentation,get_preset('paper').segmentation
COARSE = replace(seg.low_preset(TINY), spacing=2., widths=(4,8,8))

class Scan:
    def __init__(self, hu, spacing): self.hu,self.spacing = hu,spacing

def back_and_forth(labels, spacing, grid):
    share,box = seg.soft_targets(labels, spacing, grid)
    p = torch.zeros(9, *seg.grid_shape(labels.shape, spacing, grid))
    p[(slice(1,None),)+tuple(slice(*b) for b in box)] = torch.from_numpy(share)/255
    p[0] = 1-p[1:].sum(0)
    return seg.labels_of(*seg.bone_scores(seg.on_own_grid(p, labels.shape))[:2], labels.shape, spacing)

@pytest.fixture(scope='module')
def study(): return make_study(9001, size=192)

def test_the_truth_survives_the_coarse_grid(study):
    labels,spacing = study.labels,study.volume.spacing
    back = back_and_forth(labels, spacing, TINY.spacing)
    dice = seg.dice_per_class(back, labels)
    assert np.nanmean(dice[1:8]) > 0.99 and np.nanmin(dice) > 0.98, dice
    for c in np.unique(labels)[1:]:
        shift = (np.argwhere(back==c).mean(0)-np.argwhere(labels==c).mean(0))*spacing
        assert np.abs(shift).max() < 0.2, (c, shift)   # mm; half a coarse voxel would be 1
    ok,why = seg.has_cervical_spine(seg.clean_labels(back, spacing), spacing)
    assert ok, why

@pytest.mark.parametrize('spacing', [(0.5,0.3,0.3), (1.,0.9,0.7), (3.,0.4,0.4), (2.,2.,2.), (5.,3.,3.)])
def test_no_spacing_shifts_a_box(spacing):
    shape = tuple(round(72/d) for d in spacing)
    mm = np.stack(np.meshgrid(*[(np.arange(n)+.5)*d for n,d in zip(shape, spacing)], indexing='ij'))
    labels = ((mm[0]>20)&(mm[0]<50)&(mm[1]>12)&(mm[1]<40)&(mm[2]>30)&(mm[2]<64)).astype(np.uint8)*6
    back = back_and_forth(labels, spacing, 2.)
    assert np.nanmin(seg.dice_per_class(back, labels)) > 0.95
    assert np.abs((np.argwhere(back).mean(0)-np.argwhere(labels).mean(0))*spacing).max() < 0.2   # mm

@pytest.mark.parametrize('shape', [(1,40,40), (3,17,90), (70,33,20)])
@pytest.mark.parametrize('preset', [COARSE, replace(TINY, widths=(4,8), low_widths=(4,8)), replace(PAPER, encoder='resnet18', size=32)],
                         ids=['unet3d', 'cascade3d', 'unet2d'])
def test_any_shape_gets_labels(shape, preset):
    torch.manual_seed(0)
    hu,model = np.random.default_rng(0).integers(-1000, 1500, shape).astype(np.int16),seg.build_segmentation(preset)
    if preset.model == 'cascade3d': model.low.head.bias.data[:] = torch.tensor([0.]*7+[3.,0])   # it finds a spine everywhere, so that the second has work
    at,p = seg.predict_scores([model], preset, Scan(hu, (1.,0.7,0.7)))
    assert p.shape == (len(at),8) and (at >= 0).all() and (at < shape).all() and len(np.unique(at, axis=0)) == len(at)
    labels = seg.predict_labels([model], preset, Scan(hu, (1.,0.7,0.7)))
    assert labels.shape == shape and labels.dtype == np.uint8 and labels.max() < 9

def test_a_scan_of_absurd_size_is_refused():
    "A wrong spacing in one header must not take all memory, and the whole run with it"
    hu = np.zeros((20,64,64), np.int16)
    with pytest.raises(CspineError, match='spans 20 x 64000 x 64000 mm'): seg.to_grid(hu, (1,1000,1000), 2.)

def test_unet3d_learns_and_predicts_on_the_fine_grid(monkeypatch):
    "A dense and a porous bone; float32 and bfloat16 agree on them"
    torch.manual_seed(0)
    labels = np.zeros((48,48,48), np.uint8)
    labels[8:22,16:36,12:34],labels[28:42,16:36,12:34] = 1,2
    hu = np.choose(labels, (40,900,300)).astype(np.int16)+np.random.default_rng(0).normal(0, 20, labels.shape).astype(np.int16)
    preset = replace(COARSE, widths=(8,16,32), patch=24, lr=1e-2)
    x = seg.network_input(seg.to_grid(hu, (1,1,1), 2.))[None]
    share,box = seg.soft_targets(labels, (1,1,1), 2.)
    y = torch.zeros(1, 9, 24, 24, 24)
    y[(0,slice(1,None))+tuple(slice(*b) for b in box)] = torch.from_numpy(share)/255
    y[:,0] = 1-y[:,1:].sum(1)
    model,loss = seg.build_segmentation(preset),seg.segmentation_loss(preset)
    opt = torch.optim.AdamW(model.parameters(), preset.lr)
    for _ in range(40):
        loss(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    fast = seg.predict_labels([model], preset, Scan(hu, (1,1,1)))
    assert np.nanmin(seg.dice_per_class(fast, labels)) > 0.95, seg.dice_per_class(fast, labels)
    monkeypatch.setattr(seg, 'fast_dtype', lambda device: None)
    assert (seg.predict_labels([model], preset, Scan(hu, (1,1,1))) == fast).mean() > 0.995

def test_unet2d_learns_two_slices():
    torch.manual_seed(0)
    preset = replace(PAPER, encoder='resnet18', size=64)
    hu,labels = np.full((2,64,64), 40, np.int16),np.zeros((2,64,64), np.uint8)
    hu[0,10:40,10:30],labels[0,10:40,10:30] = 900,3
    hu[1,30:60,20:60],labels[1,30:60,20:60] = 400,4
    x,y = torch.stack([seg._one_slice(hu, preset, z) for z in (0,1)]),torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 9).permute(0,3,1,2).float()
    model,loss = seg.build_segmentation(preset),seg.segmentation_loss(preset)
    opt,losses = torch.optim.AdamW(model.parameters(), 2e-3),[]
    for _ in range(40):
        at = loss(model(x), y)
        at.backward()
        opt.step()
        opt.zero_grad()
        losses.append(at.item())
    assert losses[-1] < 0.3*losses[0], losses
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = 0.9
    with torch.no_grad():
        for _ in range(3): model(x)   # statistics of the weights as they are now
    got = seg.predict_labels([model], preset, Scan(hu, (1.,1.,1.)))
    assert np.nanmin(seg.dice_per_class(got, labels)) > 0.9, seg.dice_per_class(got, labels)

def test_the_papers_model_trains_and_predicts_at_full_size():
    "EfficientNet-B5 U-Net, 512 x 512, three windows in, nine maps out: one step, one slice"
    torch.manual_seed(0)
    assert (PAPER.encoder,PAPER.size,PAPER.loss,PAPER.input) == ('efficientnet-b5',512,'bce_jaccard','windows')
    model,loss = seg.channels_last(seg.build_segmentation(PAPER)),seg.segmentation_loss(PAPER)
    assert 31e6 < sum(p.numel() for p in model.parameters()) < 32e6
    hu = np.random.default_rng(0).integers(-1000, 1500, (1,512,512)).astype(np.int16)
    x,y = seg.channels_last(next(seg._slices(hu, PAPER, 'cpu'))[1]),torch.zeros(1, 9, 512, 512)
    assert x.shape == (1,3,512,512) and 0 <= x.min() and x.max() <= 1
    y[:,0,:256] = y[:,4,256:] = 1
    opt = torch.optim.AdamW(model.parameters(), PAPER.lr, weight_decay=PAPER.weight_decay)
    before = model.segmentation_head[0].weight.detach().clone()
    with seg.fast(): out = model(x)
    assert out.shape == (1,9,512,512)
    at = loss(out, y)
    at.backward()
    opt.step()
    assert torch.isfinite(at) and all(p.grad is not None for p in model.decoder.parameters())
    assert next(model.encoder.parameters()).grad.abs().sum() > 0
    assert not torch.equal(before, model.segmentation_head[0].weight)
    labels = seg.predict_labels([model], PAPER, Scan(hu, (1.,0.4,0.4)))
    assert labels.shape == (1,512,512) and labels.max() < 9

def test_neighbours_are_the_channels_of_2_5d():
    preset = replace(PAPER, input='2.5d', size=32)
    hu = np.stack([np.full((32,32), v, np.int16) for v in (0,500,1000)])
    first,middle,last = (seg._one_slice(hu, preset, n)[:,5,5] for n in range(3))
    assert torch.equal(middle.argsort(), torch.tensor([0,1,2]))
    assert first[0] == first[1] < first[2] and last[0] < last[1] == last[2]   # the ends repeat themselves
    slices,x = seg._slices(hu, preset, 'cpu'),[]
    x.append(next(slices)[1])
    x.append(slices.send(2)[1])                                               # one, then two at once
    assert torch.equal(torch.cat(x)[:,:,5,5], torch.stack([first, middle, last]))

def test_a_broken_off_piece_stays_with_its_vertebra():
    "A dens fracture parts the dens from C2: what lies beyond the gap is no speck"
    labels = np.zeros((40,30,30), np.uint8)
    labels[20:32,5:25,5:25] = 2      # the body
    labels[8:18,10:18,10:18] = 2     # the dens, beyond a gap of 2 mm
    labels[36:,:8,:8] = 2            # a speck near by
    far = labels.copy()
    labels[:6,:10,:10] = 2           # 400 mm3 and more, but 11 mm away from the body
    far[labels != far] = 0; far[36:] = 0
    assert np.array_equal(seg.clean_labels(labels, (1.,1.,1.)), far)

def test_what_the_end_of_the_scan_parts_stays():
    "Body and spinous process of C4, whose arch lies above the first slice"
    labels = np.zeros((20,60,30), np.uint8)
    labels[:12,5:20,5:25] = labels[:8,45:58,12:18] = 4
    assert np.array_equal(seg.clean_labels(labels, (1.,1.,1.)), labels)
    inside = np.pad(labels, ((4,0),(0,0),(0,0)))                     # the same, with four slices above: two things, and one is no C4
    assert (seg.clean_labels(inside, (1.,1.,1.))[:,45:] == 0).all()

@pytest.mark.parametrize('levels,neck', [((1,2,3,4,5,6,7), True), ((4,5,6), True), ((3,5,7), False), ((1,4,7), False), ((2,3), False)])
def test_a_neck_is_a_row_of_neighbouring_levels(levels, neck):
    "A real abdomen gave C3, C5 and C7 in order, 2 levels apart: no neck skips every other vertebra"
    labels = np.zeros((150,40,40), np.uint8)
    for c in levels: labels[18*c:18*c+12,10:30,10:30] = c
    said,why = seg.has_cervical_spine(labels, (1.,1.,1.))
    assert said == neck, why
    assert not seg.has_cervical_spine(labels, (1.,2.5,2.5))[0]   # 30 cm3 each: a loin

def test_a_network_that_calls_everything_bone_is_stopped(monkeypatch):
    q = torch.full((9,4,10,10), 1/9)
    assert len(seg.bone_scores([seg.bone_of((0,0,0), q), seg.bone_of((4,0,0), q)])[0]) == 800
    monkeypatch.setattr(seg, 'MOST_BONE', 700)
    with pytest.raises(CspineError, match='not trained'): seg.bone_scores([seg.bone_of((0,0,0), q), seg.bone_of((4,0,0), q)])
    assert len(seg.bone_scores([seg.bone_of((0,0,0), q)])[0]) == 400

def test_slices_are_read_when_they_are_wanted(tmp_path):
    "The studies stay on disk; another process opens them itself"
    data = phantom(tmp_path/'data', train=1, test=0, size=64, seed=3, odd=0)
    uid = next((data/'segmentations').glob('*.nii')).name.removesuffix('.nii')
    for input in ('windows','2.5d'):
        preset = replace(get_preset('paper').segmentation, size=64, input=input)
        path = seg.cache_studies(data, [uid], tmp_path/'cache', preset, workers=1)[uid]
        ds = seg.SliceDataset([path], preset, train=False)
        volume = seg.read_series(data/'train_images'/uid)
        labels = seg.read_mask(data/'segmentations'/f'{uid}.nii', volume)
        assert len(ds) == len(volume.hu) and not [v for v in vars(ds).values() if torch.is_tensor(v)]
        at = int((labels > 0).sum((1,2)).argmax())
        for z in (0, at, len(ds)-1):
            x,maps = ds[z]
            assert torch.equal(x, seg._one_slice(volume.hu, preset, z))
            assert np.array_equal(maps.argmax(0), labels[z])
        assert torch.equal(pickle.loads(pickle.dumps(ds))[at][0], ds[at][0])
        few = seg.SliceDataset([path], replace(preset, steps=30, batch=20))
        assert len(few) == 600 and len(seg.SliceDataset([path], replace(preset, steps=30, batch=20), train=False)) == len(volume.hu)
    before = path.stat().st_mtime_ns
    assert seg.cache_studies(data, [uid], tmp_path/'cache', preset, workers=1)[uid].stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:1000])    # cut off: made again
    seg.cache_studies(data, [uid], tmp_path/'cache', preset, workers=1)
    assert len(seg.SliceDataset([path], preset)) == len(volume.hu)

def test_processes_find_a_folder_named_from_here(tmp_path, monkeypatch):
    "joblib's processes stay, in the folder where they were begun"
    preset = replace(get_preset('paper').segmentation, size=32)
    for name in ('a','b'):
        monkeypatch.chdir((tmp_path/name).mkdir() or tmp_path/name)
        phantom('data', train=2, test=0, size=64, seed=ord(name), odd=0)
        uids = [p.name.removesuffix('.nii') for p in (tmp_path/name/'data'/'segmentations').glob('*.nii')]
        paths = seg.cache_studies('data', uids, 'cache', preset, workers=2)
        assert all(p.exists() for p in paths.values()) and len(paths) == 2

def test_a_piece_joined_to_another_vertebra_is_that_ones():
    "The spinous process of C6, named C7; two bodies that only touch in their joints keep their names"
    truth = np.zeros((60,70,40), np.uint8)
    truth[5:20,5:25,5:35] = truth[8:14,25:60,15:25] = 6          # body and process
    truth[28:43,5:25,5:35] = truth[31:37,25:60,15:25] = 7
    truth[20:28,22:25,5:9] = 6                                    # a joint: it touches C7
    truth[50:58,5:25,5:35] = truth[54:58,40:60,15:25] = 8         # T1, two pieces
    truth[43:50,22:25,5:9] = 7
    labels = truth.copy()
    labels[8:14,45:60,15:25] = 7                                  # 900 mm3 of C6's process; C7's own is apart from it
    labels[31:37,50:60,15:25] = 8
    labels[8:10,30:32,15:17] = 5                                  # and a speck
    assert np.array_equal(seg.clean_labels(labels, (1.,1.,1.)), truth)
    assert np.array_equal(labels[8:14,45:60,15:25], np.full((6,15,10), 7))   # what came in stays as it was
    assert np.array_equal(seg.clean_labels(truth, (1.,1.,1.)), truth)

@pytest.mark.parametrize('spacing', [(1.,1.,1.), (3.,.5,.5)])
def test_contact_is_measured_in_mm(spacing):
    "The same piece in mm is the same vertebra's, whatever the voxels"
    def n(*mm): return tuple(round(a/b) for a,b in zip(mm, spacing))
    def box(labels, c, a, b): labels[tuple(slice(i, j) for i,j in zip(n(*a), n(*b)))] = c
    for wide,level in ((9, 4), (3, 0)):                          # a contact of 9 x 9 mm is a part of C4, one of 3 x 3 mm is not
        labels = np.zeros(n(60, 60, 60), np.uint8)
        box(labels, 4, (0,0,0), (15,30,30))
        box(labels, 5, (45,0,0), (60,30,30))
        box(labels, 4, (6,30,6), (6+wide,36,6+wide))
        box(labels, 5, (6,36,6), (18,48,18))
        assert (seg.clean_labels(labels, spacing)[tuple(slice(i, j) for i,j in zip(n(6,36,6), n(18,48,18)))] == level).all()

@pytest.mark.parametrize('dz,n', [(1., 9), (.5, 5), (4., 25)])
def test_in_a_hurry_a_2d_network_reads_a_slice_every_3_mm(dz, n):
    "What lies between is interpolated: a cone comes out as it went in, to within a slice"
    class Bone(torch.nn.Module):
        "Class 2 where the spine-bone window is more than half full"
        def __init__(self):
            super().__init__()
            self.used,self.seen = torch.nn.Conv2d(1, 1, 1),0
        def forward(self, x):
            self.seen += len(x)
            out = torch.full((len(x),9,*x.shape[2:]), -9.)
            out[:,0],out[:,2] = 0,(x[:,2]-.5)*50
            return out
    z,y,x = np.indices((25,64,64))
    hu = np.where(np.hypot(y-32, x-32) < 8+z/2, 1000, 0).astype(np.int16)
    scan,net,preset = Scan(hu, (dz,1.,1.)),Bone(),replace(PAPER, size=64)
    whole = seg.find_labels([net], preset, scan)[0] > 0
    net.seen = 0
    quick = seg.find_labels([net], preset, scan, coarse=True)[0] > 0
    assert net.seen == n
    assert 2*(quick & whole).sum()/(quick.sum()+whole.sum()) > .94   # .87 where each slice is that before it
    assert quick[[0,-1]].sum() == whole[[0,-1]].sum() > 0
