"""Bundles: what is written comes back; what is damaged, foreign or of another version is refused with advice."""
import builtins
import hashlib
import json
import pickle
from dataclasses import replace

import pytest
import torch
from cspine import bundle as module
from cspine.bundle import bundle, bundle_size, load_bundle, random_bundle, small_preset
from cspine.presets import TARGETS, CspineError
from cspine.rsna import PRIOR
from safetensors.torch import load_file, save, save_file


def make_run(folder, kind, preset=None, folds=(0,), **more):
    """A run folder as training leaves it, with random weights; the folds' models."""
    preset, models = preset or small_preset(), {}
    for k in folds:
        (folder/f'fold{k}').mkdir(parents=True)
        models[k] = module._build(kind, preset)
        save_file(models[k].state_dict(), folder/f'fold{k}'/'model.safetensors')
    run = dict(kind=kind, preset=preset.to_dict(), folds=list(folds), seed=preset.seed, figures={}) | more
    (folder/'run.json').write_text(json.dumps(run))
    return models


@pytest.fixture
def runs(tmp_path):
    """Run folders of both stages, two folds each, and their models."""
    kinds = {'segmentation': tmp_path/'seg', 'classification': tmp_path/'cls'}
    return list(kinds.values()), {k: make_run(f, k, folds=(0, 1)) for k, f in kinds.items()}


def test_a_fold_that_was_killed_before_its_end_is_left_out(runs, tmp_path, capsys):
    """Its weights are there from the last epoch on, its calibration and out-of-fold answers are not."""
    (seg, cls), _ = runs
    said = json.loads((cls/'run.json').read_text())
    (cls/'run.json').write_text(json.dumps(said | dict(folds=[1])))
    b = load_bundle(bundle([seg, cls], tmp_path/'b'))
    assert len(b.segmentation) == 2 and len(b.classification) == 1
    assert f'fold 0 of {cls} is not finished, and left out' in capsys.readouterr().err
    (cls/'run.json').write_text(json.dumps(said | dict(folds=[])))
    with pytest.raises(CspineError, match='has no trained fold'): bundle([seg, cls], tmp_path/'c')
    (cls/'run.json').write_text(json.dumps(said | dict(folds=None)))
    with pytest.raises(CspineError, match='does not say which folds are trained'): bundle([seg, cls], tmp_path/'c')


@pytest.fixture
def written(tmp_path):
    return random_bundle(tmp_path/'bundle')


def edit(folder, change):
    """Change bundle.json in place."""
    d = json.loads((folder/'bundle.json').read_text())
    change(d)
    (folder/'bundle.json').write_text(json.dumps(d))


def test_weights_come_back_to_sixteen_bits(runs, tmp_path, capsys):
    folders, models = runs
    out = bundle(folders, tmp_path/'b', card=dict(data='12 phantoms'))
    assert '4 models' in capsys.readouterr().out
    b = load_bundle(out)
    assert b.preset == small_preset() and b.card['data'] == '12 phantoms' and b.card['not_for']
    assert b.prior.index.tolist() == list(TARGETS) and b.prior.equals(PRIOR.rename('prior'))
    for kind, made in models.items():
        loaded = getattr(b, kind)
        assert len(loaded) == 2
        for k, m in made.items():
            state = loaded[k].state_dict()
            for name, v in m.state_dict().items():
                assert state[name].dtype == v.dtype
                torch.testing.assert_close(state[name], v, rtol=1e-3, atol=1e-6)
        assert not any(m.training or any(p.requires_grad for p in m.parameters()) for m in loaded)


def test_files_are_safetensors_of_half_the_size_and_nothing_else(runs, tmp_path):
    folders, _ = runs
    out = bundle(folders, tmp_path/'b')
    assert sorted(f.name for f in out.iterdir()) == ['bundle.json'] + [
        f'{s}_fold{k}.safetensors' for s in ('classification', 'segmentation') for k in (0, 1)]
    state = load_file(out/'segmentation_fold0.safetensors')
    assert all(v.dtype == torch.float16 for v in state.values() if v.is_floating_point() and v.ndim > 1)
    # compared without headers, which weigh as much as these small models' weights
    big = sum(v.nbytes for v in load_file(folders[0]/'fold0'/'model.safetensors').values())
    assert sum(v.nbytes for v in state.values()) < .55*big
    assert sorted(tmp_path.iterdir()) == sorted([*folders, out])   # no temporary folder is left


def test_what_does_not_fit_sixteen_bits_stays_as_it_is():
    half = module._half(dict(w=torch.full((2, 2), 1e6), small=torch.full((2, 2), .1), var=torch.tensor([.1]), n=torch.tensor(7)))
    assert [half[k].dtype for k in ('w', 'small', 'var', 'n')] == [torch.float32, torch.float16, torch.float32, torch.int64]


def test_other_epochs_are_the_same_preset_and_each_stage_keeps_its_own(tmp_path):
    p = small_preset()
    seg, cls = replace(p.segmentation, epochs=99), replace(p.classification, epochs=77)
    make_run(tmp_path/'seg', 'segmentation', replace(p, segmentation=seg))
    make_run(tmp_path/'cls', 'classification', replace(p, classification=cls))
    b = load_bundle(bundle([tmp_path/'cls', tmp_path/'seg'], tmp_path/'b'))
    assert b.preset == replace(p, segmentation=seg, classification=cls)


def test_folds_from_two_runs_are_joined(tmp_path):
    make_run(tmp_path/'s0', 'segmentation', folds=(0,))
    make_run(tmp_path/'s1', 'segmentation', folds=(3,))
    make_run(tmp_path/'cls', 'classification')
    b = load_bundle(bundle([tmp_path/'s0', tmp_path/'s1', tmp_path/'cls'], tmp_path/'b'))
    assert len(b.segmentation) == 2 and len(b.classification) == 1


@pytest.mark.parametrize('spoil, says', [
    (lambda seg, cls: [seg], 'a bundle needs a classification run'),
    (lambda seg, cls: [cls], 'a bundle needs a segmentation run'),
    (lambda seg, cls: [seg, cls, seg], 'once more'),
    (lambda seg, cls: [seg, cls.parent], 'has no run.json'),
    (lambda seg, cls: (seg/'run.json').write_text('{') and [seg, cls], 'cannot be read'),
    (lambda seg, cls: (seg/'fold0'/'model.safetensors').write_bytes(b'junk') and [seg, cls], 'damaged'),
    (lambda seg, cls: [(f.unlink(), seg, cls)[1:] for f in seg.glob('fold*/*')][0], 'no trained fold'),
])
def test_runs_that_do_not_make_a_bundle(tmp_path, spoil, says):
    make_run(tmp_path/'seg', 'segmentation')
    make_run(tmp_path/'cls', 'classification')
    with pytest.raises(CspineError, match=says):
        bundle(spoil(tmp_path/'seg', tmp_path/'cls'), tmp_path/'b')
    assert not (tmp_path/'b').exists()


def test_runs_of_another_kind_or_preset(tmp_path):
    p = small_preset()
    make_run(tmp_path/'seg', 'segmentation')
    make_run(tmp_path/'wide', 'classification', replace(p, classification=replace(p.classification, size=96)))
    make_run(tmp_path/'coarse', 'segmentation', replace(p, segmentation=replace(p.segmentation, spacing=p.segmentation.spacing+1)))
    with pytest.raises(CspineError, match='different presets: segmentation.spacing'):
        bundle([tmp_path/'coarse', tmp_path/'wide'], tmp_path/'b')
    bundle([tmp_path/'seg', tmp_path/'wide'], tmp_path/'b')   # what stage 1 was told of stage 2 is nothing to it
    assert load_bundle(tmp_path/'b').preset.classification.size == 96
    make_run(tmp_path/'other', 'segmentation')
    (tmp_path/'other'/'run.json').write_text(json.dumps(dict(kind='denoising')))
    with pytest.raises(CspineError, match="kind 'denoising'"):
        bundle([tmp_path/'other'], tmp_path/'b')


def test_figures_that_say_nothing(tmp_path):
    make_run(tmp_path/'seg', 'segmentation')
    make_run(tmp_path/'cls', 'classification', figures=dict(fold0=dict(studies=dict(positives=3))))
    with pytest.raises(CspineError, match='run.json of a classification run is damaged'):
        bundle([tmp_path/'seg', tmp_path/'cls'], tmp_path/'b')


def test_weights_of_another_model_are_refused_when_bundling(tmp_path):
    p = small_preset()
    make_run(tmp_path/'seg', 'segmentation', replace(p, segmentation=replace(p.segmentation, widths=(4, 8, 24))))
    run = json.loads((tmp_path/'seg'/'run.json').read_text())
    (tmp_path/'seg'/'run.json').write_text(json.dumps(run | dict(preset=p.to_dict())))
    make_run(tmp_path/'cls', 'classification')
    with pytest.raises(CspineError, match='do not fit'):
        bundle([tmp_path/'seg', tmp_path/'cls'], tmp_path/'b')


def test_figures_that_are_not_numbers_stay_valid_json(tmp_path):
    make_run(tmp_path/'seg', 'segmentation', figures=dict(dice=[float('nan'), .5]))
    make_run(tmp_path/'cls', 'classification')
    out = bundle([tmp_path/'seg', tmp_path/'cls'], tmp_path/'b')
    assert 'NaN' not in (out/'bundle.json').read_text()
    assert load_bundle(out).card['runs']['segmentation'][0]['figures'] == dict(dice=[None, .5])


def test_a_bundle_lends_its_stage_1(tmp_path, written, capsys):
    "Stage 2 trained on crops that a bundle cut, and that bundle"
    models, old = make_run(tmp_path/'cls', 'classification'), load_bundle(written)
    got = load_bundle(bundle([written, tmp_path/'cls'], tmp_path/'b'))
    assert '2 models' in capsys.readouterr().out
    for key, v in old.segmentation[0].state_dict().items(): assert torch.equal(got.segmentation[0].state_dict()[key], v)
    for key, v in models[0].state_dict().items(): torch.testing.assert_close(got.classification[0].state_dict()[key], v, atol=2e-3, rtol=2e-3)
    with pytest.raises(CspineError, match='is a bundle already: name a run of classification beside it'): bundle([written], tmp_path/'c')
    assert got.others == [] and len(got.classification) == 1   # its own stage 2 stays behind
    other = replace(small_preset(), segmentation=replace(small_preset().segmentation, widths=(4, 6)))
    make_run(tmp_path/'other', 'classification', other)
    with pytest.raises(CspineError, match='segmentation.widths is'): bundle([written, tmp_path/'other'], tmp_path/'c')
    (written/'segmentation_fold0.safetensors').write_bytes(b'x')
    with pytest.raises(CspineError): bundle([written, tmp_path/'cls'], tmp_path/'c')


def test_a_bundle_is_replaced_and_anything_else_is_left_alone(tmp_path, written):
    before = (written/'segmentation_fold0.safetensors').read_bytes()
    random_bundle(written, seed=1)
    assert (written/'segmentation_fold0.safetensors').read_bytes() != before
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('years of work')
    with pytest.raises(CspineError, match='is not a bundle'):
        random_bundle(tmp_path/'mine')
    (tmp_path/'mine'/'bundle.json').write_text('{"name": "the bundle of another program"}')
    with pytest.raises(CspineError, match='is not a bundle'):
        random_bundle(tmp_path/'mine')
    assert (tmp_path/'mine'/'thesis.txt').read_text() == 'years of work'
    make_run(tmp_path/'seg', 'segmentation')
    with pytest.raises(CspineError, match='not a bundle but a run: make one of both stages'): load_bundle(tmp_path/'seg')
    # Kaggle's own description of a data set, and what a user keeps beside it, stay; weights of a fold that is no more go
    (written/'dataset-metadata.json').write_text('{}')
    (written/'notes').mkdir()
    (written/'notes'/'a.txt').write_text('kept')
    random_bundle(written, folds=2)
    random_bundle(written, folds=1)
    assert sorted(f.name for f in written.iterdir()) == ['bundle.json', 'classification_fold0.safetensors', 'dataset-metadata.json', 'notes',
                                                         'segmentation_fold0.safetensors']
    assert (written/'notes'/'a.txt').read_text() == 'kept'


def test_a_failed_write_leaves_the_old_bundle_and_no_rubbish(written, monkeypatch):
    before = {f.name: f.read_bytes() for f in written.iterdir()}
    monkeypatch.setattr(module, '_sha256', lambda b: 1/0)
    with pytest.raises(ZeroDivisionError):
        random_bundle(written, seed=1)
    assert {f.name: f.read_bytes() for f in written.iterdir()} == before
    assert list(written.parent.iterdir()) == [written]


def rename(name):
    def change(folder): edit(folder, lambda d: d['stages']['segmentation'][0].update(file=name))
    return change


def reset(**fields):
    return lambda folder: edit(folder, lambda d: d.update(fields))


def with_prior(**values):
    return lambda folder: edit(folder, lambda d: d['prior'].update(values))


def in_preset(d): d['preset']['segmentation']['colour'] = 1


def put(data):
    """Other bytes under the right hash."""
    def change(folder):
        (folder/'segmentation_fold0.safetensors').write_bytes(data)
        edit(folder, lambda d: d['stages']['segmentation'][0].update(sha256=hashlib.sha256(data).hexdigest()))
    return change


def preset(stage, **fields):
    return lambda folder: edit(folder, lambda d: d['preset'][stage].update(fields))


def flip(folder):
    f = folder/'classification_fold0.safetensors'
    b = bytearray(f.read_bytes())
    b[len(b)//2] ^= 1
    f.write_bytes(b)


def cut(folder):
    f = folder/'segmentation_fold0.safetensors'
    f.write_bytes(f.read_bytes()[:-100])


@pytest.mark.parametrize('spoil, says', [
    (lambda f: (f/'bundle.json').unlink(), 'is not a bundle: it has no bundle.json'),
    (lambda f: (f/'bundle.json').write_text('{"format": 1'), 'cannot be read'),
    (lambda f: (f/'bundle.json').write_text('[1]'), 'JSON object'),
    (lambda f: (f/'bundle.json').write_bytes(b'\xff\xfe'), 'cannot be read'),
    (reset(format=4), 'bundle format 4 and this cspine reads 2 and 3'),
    (reset(format=None), 'bundle format None'),
    (reset(preset=None), 'preset'),
    (lambda f: edit(f, in_preset), 'unknown field colour'),
    (preset('classification', encoder='tu-hf-hub:somebody/model'), 'field encoder'),   # timm would go to the network
    (preset('classification', encoder='tu-local-dir:/etc'), 'field encoder'),
    (preset('classification', encoder='resnet_of_tomorrow'), 'no encoder .resnet_of_tomorrow. can be built for stage 2'),
    (preset('classification', size=10**6), 'size of the preset should lie in 16 to 2048'),
    (preset('classification', group=0), 'group'),
    (preset('classification', every=7), 'every should divide the slices'),
    (preset('classification', window=[0, 0]), 'window'),
    (preset('classification', window=[1800]), 'window'),
    (preset('segmentation', spacing=0), 'spacing of the preset should lie in'),
    (preset('segmentation', spacing=None), 'spacing of the preset must be set'),
    (preset('segmentation', widths=None), 'widths of the preset must be set'),
    (preset('segmentation', widths=['a']), 'widths'),
    (reset(prior=None), 'prior'),
    (with_prior(C1=0), 'prior'),
    (with_prior(C1='0.5'), 'prior'),
    (with_prior(C1=float('nan')), 'prior'),
    (with_prior(C8=.1), 'prior'),
    (reset(odds=None), 'odds'),
    (reset(stages={}), 'names no files'),
    (reset(stages=dict(segmentation=[], classification=[])), 'names no files'),
    (lambda f: edit(f, lambda d: d['stages'].update(segmentation=['a.safetensors'])), 'not a plain'),
    *[(rename(n), 'not a plain') for n in ('../seg.safetensors', '/etc/seg.safetensors', 'a/b.safetensors', 'a\\b.safetensors',
                                           '.hidden.safetensors', 'model.pkl', 'model.pt', 'x.safetensors\n', '', None, 3)],
    (rename('other.safetensors'), 'lacks other.safetensors'),
    (flip, 'SHA-256'),
    (cut, 'SHA-256'),
    (put(b'junk'), 'not a safetensors file'),
    (put(save(dict(w=torch.zeros(2)))), 'do not fit'),
])
def test_a_bad_bundle_says_so(written, spoil, says):
    spoil(written)
    with pytest.raises(CspineError, match=says) as e:
        load_bundle(written)
    assert '\n' not in str(e.value).strip()


class Bomb:
    def __reduce__(self): return exec, ('import builtins; builtins.exploded = True',)


def test_no_pickle_is_opened(written):
    put(pickle.dumps(Bomb()))(written)
    with pytest.raises(CspineError, match='not a safetensors file'):
        load_bundle(written)
    assert not hasattr(builtins, 'exploded')


def test_the_demo_bundle_is_the_default_and_says_so(written, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, 'default_bundle', lambda: written)
    assert load_bundle().path == written
    assert 'never a diagnosis' in capsys.readouterr().err
    load_bundle(written)
    assert capsys.readouterr().err == ''
    monkeypatch.setattr(module, 'default_bundle', lambda: tmp_path/'none')
    with pytest.raises(CspineError, match='no demo bundle'):
        load_bundle()


def test_size_and_repeated_writing(tmp_path):
    a, b = random_bundle(tmp_path/'a'), random_bundle(tmp_path/'b')
    assert bundle_size(a) == bundle_size(b) < 1e6
    assert all((a/f.name).read_bytes() == f.read_bytes() for f in b.iterdir())
