"""Ensembles: several models of stage 2 in a bundle, their weights, their answers, their scores. Networks are random, answers made up."""
import hashlib
import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from cspine import evaluation, inference
from cspine.bundle import (
    FEW,
    Bundle,
    at_odds,
    averaged,
    bundle,
    fit_ensemble,
    load_bundle,
    random_bundle,
    small_preset,
)
from cspine.classification import predict_probabilities, with_prior
from cspine.cropping import boxes_from_labels, crop_planes, crop_vertebrae
from cspine.evaluation import evaluate
from cspine.inference import EPS, Pipeline
from cspine.metrics import ensemble_metrics
from cspine.phantom import make_study
from cspine.presets import TARGETS, CspineError
from cspine.rsna import labels_sha256, metric, write_folds
from test_bundle import edit, make_run

SMALL = small_preset()
POOLED = dict(head='pooled', sampled=0, slice_loss=0., cell_loss=0.)
OWN = dict(plain={}, masked=dict(POOLED, mask_channel=True, group=1, along='slices'), tiny=dict(POOLED, size=32, margin_mm=0.))


def preset(name): return replace(SMALL, name=name, classification=replace(SMALL.classification, **OWN[name]))


def made_up(n=120, seed=0):
    """Labels, and answers of three readers: the second errs apart from the first, the third knows nothing."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((n, 8)) < .3).astype(int)
    truth[:, 7] = truth[:, :7].any(1)
    answers = [1/(1+np.exp(.7-skill*(truth-.3)-rng.normal(size=truth.shape))) for skill in (2, 1.9, 0)]
    uids = [f'1.{i+1}' for i in range(n)]
    def table(a): return pd.DataFrame(a, uids, list(TARGETS)).rename_axis('StudyInstanceUID')
    return table(truth), dict(zip(OWN, map(table, answers)))


def answered(folder, answers, truth, labels=True):
    """Give a run's folder the out-of-fold answers and the labels, as training does."""
    fold = pd.Series(np.arange(len(truth)) % len(json.loads((folder/'run.json').read_text())['folds']), truth.index)
    write_folds(fold, folder/'folds.csv')
    answers.assign(fold=fold).to_csv(folder/'oof.csv')
    if labels: truth.to_csv(folder/'labels.csv')
    edit_run(folder, labels_sha256=labels_sha256(truth))


def edit_run(folder, **more):
    (folder/'run.json').write_text(json.dumps(json.loads((folder/'run.json').read_text()) | more))


def card(n, k): return dict(figures=dict(fold0=dict(studies=dict(train=n, positives={t: k for t in TARGETS}))))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Stage 1 and three runs of stage 2 with their answers."""
    folder, (truth, answers) = tmp_path_factory.mktemp('runs'), made_up()
    make_run(folder/'seg', 'segmentation', folds=(0, 1))
    for name in OWN:
        make_run(folder/name, 'classification', preset(name), folds=(0, 1), **card(100, 20+10*len(name)))
        answered(folder/name, answers[name], truth)
    return folder


@pytest.fixture
def runs(made, tmp_path):
    """The folders of a copy of them, by name."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return {name: tmp_path/name for name in ('seg', *OWN)}


@pytest.fixture(scope='module')
def study(): return make_study(3, size=96)


def test_weights_are_fitted_on_out_of_fold_answers_and_kept(runs, tmp_path, capsys):
    truth, answers = made_up()
    out = bundle([runs['seg'], runs['tiny'], runs['masked'], runs['plain']], tmp_path/'b')
    b, said = load_bundle(out), capsys.readouterr().out
    order = sorted(truth.index)
    weights, how = fit_ensemble(truth.loc[order], np.stack([answers[n].loc[order] for n in OWN]))
    got = {m.name: m.weight for m in b.members}
    assert got == pytest.approx(dict(zip(OWN, weights)), abs=1e-3) and b.average == how
    assert list(got.values()) == sorted(got.values(), reverse=True) and sum(got.values()) == pytest.approx(1)
    assert got['tiny'] < .2 < min(got['plain'], got['masked'])
    assert b.preset.classification == b.members[0].preset == preset(b.members[0].name).classification and b.preset.name == b.members[0].name
    for m in b.members:
        assert m.preset == preset(m.name).classification and len(m.models) == 2
        np.testing.assert_allclose(m.oof.loc[order, list(TARGETS)], answers[m.name].loc[order], rtol=1e-5)
        assert [set(f.split()) - {'-'} for f in m.oof.fractured] == [{t for t in TARGETS if truth.at[u, t]} for u in m.oof.index]
        assert m.odds['C3'] != 1   # of its own training studies
    assert len({m.odds['C3'] for m in b.members}) == 3
    # what is told of it: each on the same studies, and together better than each, by weights that the other half chose
    told = b.card['ensemble']
    for n in OWN: assert told[f'metric of {n}'] == pytest.approx(metric(truth, answers[n]), abs=1e-4)
    assert told['metric together'] < min(told[f'metric of {n}'] for n in OWN) and told['studies'] == len(truth)
    assert f'average of {how}: ' in said and '8 models' in said
    # what new studies should get
    p = np.stack([at_odds(m.oof.loc[order, list(TARGETS)].to_numpy(), m.odds) for m in b.members])
    want = averaged(p, list(got.values()), how)
    np.testing.assert_allclose(b.expected.loc[order].iloc[:, :7], want[:, :7])
    assert (b.expected.patient_overall >= b.expected.iloc[:, :7].max(axis=1)).all() and list(b.expected) == list(TARGETS)
    # an older cspine, which reads format 2, refuses it by its number, and reads a bundle of one model
    assert json.loads((out/'bundle.json').read_text())['format'] == 3
    one = bundle([runs['seg'], runs['tiny']], tmp_path/'one')
    meta = json.loads((one/'bundle.json').read_text())
    assert meta['format'] == 2 and set(meta['stages']) == {'segmentation', 'classification'} and meta['preset']['name'] == 'tiny'
    one = load_bundle(one)
    assert [(m.name, m.weight) for m in one.members] == [('tiny', 1)] and len(one.expected) == len(truth)
    # what is there and is replaced by less leaves nothing behind
    again = bundle([runs['seg'], runs['plain']], out)
    assert not list(again.glob('classification2*')) and load_bundle(again).others == []


def test_bundles_of_one_stage_1_become_an_ensemble(runs, tmp_path, study):
    whole = load_bundle(bundle([runs[n] for n in ('seg', *OWN)], tmp_path/'whole'))
    alone = [bundle([runs['seg'], runs[n]], tmp_path/f'of_{n}') for n in OWN]
    out = bundle(alone, tmp_path/'b')
    b = load_bundle(out)
    assert [m.name for m in b.members] == [m.name for m in whole.members] and b.average == whole.average
    np.testing.assert_allclose([m.weight for m in b.members], [m.weight for m in whole.members], atol=1e-3)
    assert all((out/f.name).read_bytes() == f.read_bytes() for f in alone[0].glob('segmentation*'))
    assert [len(c) for c in b.card['runs'].values()] == [1, 3]
    a, c = (Pipeline(x, 'cpu').predict(study.volume, study.labels).probabilities for x in (whole, b))
    np.testing.assert_allclose(a, c, atol=1e-3)
    # and an ensemble with one more
    two = bundle(alone[:2], tmp_path/'two')
    three = load_bundle(bundle([two, alone[2]], tmp_path/'three'))
    assert {m.name: round(m.weight, 3) for m in three.members} == {m.name: round(m.weight, 3) for m in b.members}
    other = random_bundle(tmp_path/'other', preset('masked'), seed=1)
    with pytest.raises(CspineError, match='of_plain and .*other have different networks of segmentation: the members of an ensemble share one stage 1'):
        bundle([alone[0], other], tmp_path/'c')
    with pytest.raises(CspineError, match='of_plain holds the weights that .*two holds, once more'): bundle([two, alone[0]], tmp_path/'c')
    edit(alone[0], lambda d: d['stages']['segmentation'][0].update(fold='../../x'))
    with pytest.raises(CspineError, match='which is no number of a fold'): bundle(alone, tmp_path/'c')
    assert not (tmp_path/'c').exists()


def test_folds_of_one_recipe_are_one_member(runs, tmp_path, capsys):
    truth, answers = made_up()
    later = tmp_path/'later'
    make_run(later, 'classification', preset('plain'), folds=(3,))
    answered(later, answers['plain'].iloc[:5]*.5, truth.iloc[:5])
    b = load_bundle(bundle([runs['seg'], runs['plain'], runs['masked'], later], tmp_path/'b'))
    assert sorted((m.name, len(m.models)) for m in b.members) == [('masked', 2), ('plain', 3)]
    plain = next(m for m in b.members if m.name == 'plain')
    np.testing.assert_allclose(plain.oof.loc['1.1', list(TARGETS)].astype(float), answers['plain'].loc['1.1'], rtol=1e-5)   # of a study with two answers the first
    # the same recipe, trained otherwise: another member, told apart by its folder
    seeded = tmp_path/'seeded'
    make_run(seeded, 'classification', replace(preset('plain'), seed=1), folds=(0, 1))
    answered(seeded, answers['masked'], truth)
    names = [m.name for m in load_bundle(bundle([runs['seg'], runs['plain'], seeded], tmp_path/'b')).members]
    assert sorted(names) == ['plain of plain', 'plain of seeded']
    (tmp_path/'x').mkdir()
    shutil.copytree(seeded, tmp_path/'x'/'plain')
    with pytest.raises(CspineError, match='two members are called plain of plain; rename one'): bundle([runs['seg'], runs['plain'], tmp_path/'x'/'plain'], tmp_path/'c')
    with pytest.raises(CspineError, match='holds the weights that .* once more'): bundle([runs['seg'], runs['plain'], runs['plain']], tmp_path/'c')
    again = tmp_path/'again'
    make_run(again, 'classification', preset('plain'), folds=(1,))
    with pytest.raises(CspineError, match='again holds classification fold 1 once more'): bundle([runs['seg'], runs['plain'], again], tmp_path/'c')


@pytest.mark.parametrize('spoil, says', [
    (lambda r, t, a: (r/'oof.csv').unlink(), 'masked brings no out-of-fold answers'),
    (lambda r, t, a: (r/'labels.csv').unlink(), None),
    (lambda r, t, a: answered(r, a.iloc[:FEW-1], t.iloc[:FEW-1]), f'answered only {FEW-1} studies in common'),
])
def test_without_common_answers_members_count_equally_and_it_is_said(runs, tmp_path, capsys, spoil, says):
    truth, answers = made_up()
    spoil(runs['masked'], truth, answers['masked'])
    if says is None:   # the other run knows the labels: enough
        assert len({m.weight for m in load_bundle(bundle([runs['seg'], runs['masked'], runs['plain']], tmp_path/'b')).members}) == 2
        (runs['plain']/'labels.csv').unlink()
        says = 'do not say which studies are fractured .put the train.csv'
    b = load_bundle(bundle([runs['seg'], runs['masked'], runs['plain']], tmp_path/'b'))
    assert [m.weight for m in b.members] == [.5, .5] and b.average == 'probabilities' and b.card['ensemble']['weights'] == 'equal'
    import re
    assert re.search('members count equally: .*'+says, capsys.readouterr().err)
    assert (b.expected is None) == ('no out-of-fold' in says)


def with_nan(folder):
    table = pd.read_csv(folder/'oof.csv', dtype={'StudyInstanceUID': str})
    table.loc[3, 'C2'] = np.nan
    table.to_csv(folder/'oof.csv', index=False, na_rep='nan')


def relabelled(folder):
    truth, answers = made_up()
    truth.loc['1.7', 'C4'] ^= 1
    answered(folder, answers['masked'], truth)


def in_labels(folder):
    truth, _ = made_up()
    truth.loc['1.7', 'C4'] ^= 1
    truth.to_csv(folder/'labels.csv')


@pytest.mark.parametrize('spoil, says', [
    (with_nan, "oof.csv, line 5: C2: 'nan' is not a finite number"),
    (relabelled, 'trained on other labels of 1 studies, the first is 1.7'),
    (in_labels, 'labels.csv does not hold the labels that .*masked was trained on'),
    (lambda r: (r/'oof.csv').write_text((r/'oof.csv').read_text().replace('\n1.1,', '\n9.9,')), '1 studies that folds.csv beside it has not, the first is 9.9'),
    (lambda r: (r/'oof.csv').write_text('StudyInstanceUID,fold\n'), 'no column C1'),
])
def test_answers_that_do_not_belong_are_refused(runs, tmp_path, spoil, says):
    spoil(runs['masked'])
    with pytest.raises(CspineError, match=says): bundle([runs['seg'], runs['plain'], runs['masked']], tmp_path/'b')
    assert not (tmp_path/'b').exists()


def test_members_share_stage_1_and_its_boxes(runs, tmp_path):
    make_run(tmp_path/'yolo', 'classification', replace(preset('masked'), boxes='yolo'))
    with pytest.raises(CspineError, match="were cut by the label map's boxes and those of .*yolo by YOLO's: an ensemble cuts them once"):
        bundle([runs['seg'], runs['plain'], tmp_path/'yolo'], tmp_path/'b')
    make_run(tmp_path/'coarse', 'classification', replace(preset('masked'), segmentation=replace(SMALL.segmentation, spacing=5.)))
    with pytest.raises(CspineError, match='different presets: segmentation.spacing is 5.0 there and 3.0 here|different presets: segmentation.spacing'):
        bundle([runs['seg'], runs['plain'], tmp_path/'coarse'], tmp_path/'b')


# --- prediction ------------------------------------------------------------------------------------------------------

def random_ensemble(runs, folder, **weights) -> Bundle:
    """A bundle of the three with these weights."""
    out = bundle([runs[n] for n in ('seg', *OWN)], folder)
    def change(d):
        for m in d['members']: m['weight'] = weights[m['name']]
        d['members'].sort(key=lambda m: -m['weight'])
        d['preset']['classification'] = d['members'][0]['classification']
        d['average'] = 'logits'
    edit(out, change)
    return load_bundle(out)


def test_members_answer_together_and_what_they_share_is_done_once(runs, tmp_path, study, monkeypatch):
    b = random_ensemble(runs, tmp_path/'b', plain=.5, masked=.2, tiny=.3)
    done = []
    for name in ('find_labels', 'crop_vertebrae', 'crop_masks', 'boxes_from_labels'):
        right = getattr(inference, name)
        monkeypatch.setattr(inference, name, lambda *a, right=right, name=name, **k: done.append(name) or right(*a, **k))
    monkeypatch.setattr(inference, 'find_labels', lambda *a, **k: done.append('find_labels') or (study.labels, 1.))
    together = Pipeline(b, 'cpu').predict(study.volume, evidence=True)
    assert sorted(done) == ['boxes_from_labels', 'crop_masks', 'crop_vertebrae', 'crop_vertebrae', 'find_labels']   # plain and masked look at the same crops
    assert len(together.notes) == 1 and 'too coarse' in together.notes[0]   # the phantom is small
    alone = {}
    for m in b.members:
        one = replace(b, preset=replace(b.preset, classification=m.preset), classification=m.models, odds=m.odds, others=[], name=m.name)
        alone[m.name] = Pipeline(one, 'cpu').predict(study.volume, evidence=True)
    def logit(p): return np.log(p)-np.log1p(-p)
    want = sum(m.weight*logit(alone[m.name].probabilities) for m in b.members)
    np.testing.assert_allclose(together.probabilities.iloc[:7], (1/(1+np.exp(-want))).iloc[:7], atol=1e-6)
    assert max(abs(together.probabilities - alone[n].probabilities).max() for n in alone) > .01
    # what is shown is the heaviest member's
    np.testing.assert_array_equal(together.heat, alone['plain'].heat)
    np.testing.assert_array_equal(together.crops, alone['plain'].crops)
    np.testing.assert_array_equal(together.looked, alone['plain'].looked)
    assert alone['tiny'].crops.shape != together.crops.shape


def test_efforts_and_members_that_weigh_nothing(runs, tmp_path, study, monkeypatch):
    b = random_ensemble(runs, tmp_path/'b', plain=.4, masked=.6, tiny=0)
    asked = []
    monkeypatch.setattr(inference, 'predict_probabilities', lambda models, cls, *a, mirror, evidence, **k: asked.append((len(models), cls.size, cls.mask_channel, mirror, evidence)) or np.full(8, .5))
    p = Pipeline(b, 'cpu')
    for effort in (0, 1, 2): p.predict(study.volume, study.labels, effort=effort)
    assert asked == [(2, 64, True, True, False), (2, 64, False, True, False), (2, 64, True, False, False), (2, 64, False, False, False), (1, 64, True, False, False), (1, 64, False, False, False)]


def test_a_member_that_says_what_is_no_number_leaves_the_answer_to_the_others(runs, tmp_path, study, monkeypatch):
    b = random_ensemble(runs, tmp_path/'b', plain=.4, masked=.6, tiny=0)
    b = replace(b, odds=b.odds*0+1, others=[replace(m, odds=m.odds*0+1) for m in b.others])
    monkeypatch.setattr(inference, 'predict_probabilities', lambda models, cls, *a, **k: np.array([np.nan]*3 + [.3]*5) if cls.mask_channel else np.full(8, .2))
    p = Pipeline(b, 'cpu').predict(study.volume, study.labels)
    np.testing.assert_allclose(p.probabilities[:3], .2)
    assert 'masked answered with what is not a number: the other members answer there' in p.notes and (p.probabilities[3:] > .2).all()
    monkeypatch.setattr(inference, 'predict_probabilities', lambda models, cls, *a, **k: np.array([np.nan]*(1+cls.mask_channel) + [.3]*(7-cls.mask_channel)))
    p = Pipeline(b, 'cpu').predict(study.volume, study.labels)
    assert p.probabilities['C2'] == pytest.approx(.3) and 'masked answered with what is not a number: the other members answer there' in p.notes   # though nobody answers for C1
    monkeypatch.setattr(inference, 'predict_probabilities', lambda *a, **k: np.array([np.nan] + [.3]*7))
    p = Pipeline(b, 'cpu').predict(study.volume, study.labels)
    assert p.probabilities['C1'] == pytest.approx(b.prior['C1']) and 'C1 came out as not a number: the prior stands in' in p.notes[-1]


def test_one_model_answers_as_ever(runs, tmp_path, study, monkeypatch):
    """By torch, to the last bit what one model of stage 2 answered before there were ensembles, with the keys of a bundle of now and of then."""
    monkeypatch.setattr(inference, 'accelerate', lambda *a: 'torch')
    out = bundle([runs['seg'], runs['plain']], tmp_path/'b')
    b = load_bundle(out)
    boxes, cls = boxes_from_labels(study.labels), b.preset.classification
    crops, present = crop_vertebrae(study.volume, boxes, cls, study.labels)
    p = predict_probabilities(b.classification, cls, crop_planes(crops, None, cls), present, prior=b.prior)
    p = np.where([*present, True], p*b.odds/(1-p+p*b.odds), p)
    want = np.clip(with_prior(p, present, b.prior), EPS, 1-EPS)
    assert b.odds['C3'] != 1
    np.testing.assert_array_equal(Pipeline(b, 'cpu').predict(study.volume, study.labels).probabilities, want)
    for f in out.glob('*.csv'): f.unlink()
    edit(out, lambda d: [d.pop(k) for k in ('name', 'oof', 'written_by')])
    old = load_bundle(out)
    assert old.expected is None and [m.name for m in old.members] == ['plain']
    np.testing.assert_array_equal(Pipeline(old, 'cpu').predict(study.volume, study.labels).probabilities, want)


# --- bad bundles -----------------------------------------------------------------------------------------------------

def change(**fields): return lambda f: edit(f, lambda d: d.update(fields))


def second(**fields): return lambda f: edit(f, lambda d: d['members'][1].update(fields))


def rename_first(f): edit(f, lambda d: d['members'][1].update(name=d['members'][0]['name']))


def leak(f):
    (f.parent/'secret.csv').write_bytes((f/'classification_oof.csv').read_bytes())
    edit(f, lambda d: d['members'][0]['oof'].update(file='../secret.csv'))


def rewritten(text):
    """Other answers under the right hash."""
    def put(f):
        data = text((f/'classification_oof.csv').read_text()).encode()
        (f/'classification_oof.csv').write_bytes(data)
        edit(f, lambda d: d['members'][0]['oof'].update(sha256=hashlib.sha256(data).hexdigest()))
    return put


@pytest.mark.parametrize('spoil, says', [
    (change(members=None), 'should name 2 to 16 members'),
    (lambda f: edit(f, lambda d: d.update(members=d['members'][:1])), 'should name 2 to 16 members'),
    (lambda f: edit(f, lambda d: d.update(members=d['members']*9)), 'should name 2 to 16 members'),
    (rename_first, 'names two members'),
    (second(name=3), 'which is no name'),
    (second(name='a\nb'), 'which is no name'),
    (second(weight=-.1), 'should be 0 or more and sum to 1'),
    (second(weight=float('nan')), 'should be 0 or more and sum to 1'),
    (second(weight='1'), 'should be 0 or more and sum to 1'),
    (change(average='votes'), "averages 'votes'; it should be one of probabilities, logits"),
    (second(files=[]), 'names a member without files'),
    (second(files=[dict(file='../x.safetensors', fold=0)]), 'not a plain .safetensors'),
    (second(odds=None), 'as odds, a number'),
    (second(classification=None), 'classification of the preset must be a table'),
    (second(oof='x'), 'not a plain .csv'),
    (leak, 'not a plain .csv'),
    (lambda f: (f/'classification_oof.csv').write_text('x'), 'SHA-256'),
    (lambda f: (f/'classification2_oof.csv').unlink(), 'lacks classification2_oof.csv'),
    (rewritten(lambda t: t.replace('\n1.1,', '\n../x,')), 'is not a StudyInstanceUID'),
    (rewritten(lambda t: t.replace('C1 ', 'C9 ')), "fractured: 'C9' is none of"),
    (rewritten(lambda t: t.replace(',0.', ',7.')), 'is outside 0 to 1'),
])
def test_a_bad_ensemble_says_so(runs, tmp_path, spoil, says):
    out = bundle([runs['seg'], runs['plain'], runs['masked']], tmp_path/'b')
    spoil(out)
    with pytest.raises(CspineError, match=says) as e: load_bundle(out)
    assert '\n' not in str(e.value).strip()


@pytest.mark.parametrize('spoil, says', [
    (lambda d: d['preset']['classification'].update(attention=4), 'unknown field attention'),
    (lambda d: d['preset']['classification'].update(encoder='resnet_of_tomorrow'), 'no encoder .resnet_of_tomorrow'),
    (lambda d: d['preset']['classification'].update(hidden=9), 'do not fit the model'),
])
def test_a_bundle_of_edited_code_names_the_cspine_that_it_needs(tmp_path, spoil, says):
    out = random_bundle(tmp_path/'b')
    edit(out, spoil)
    with pytest.raises(CspineError, match=says) as e: load_bundle(out)   # this very code wrote it: it is the file that is wrong
    assert 'needs the cspine' not in str(e.value)
    edit(out, lambda d: d.update(written_by=dict(wheel='cspine-7.8.9+01234567-py3-none-any.whl')))
    with pytest.raises(CspineError, match=f'this bundle needs the cspine that trained it .wheel cspine-7.8.9.01234567-py3-none-any.whl; here is wheel cspine-.*: .*{says}'): load_bundle(out)
    for by in (None, 'x', dict(wheel='a\nb'), dict(wheel=3)):
        edit(out, lambda d: d.update(written_by=by))
        with pytest.raises(CspineError, match='needs the cspine that trained it .it does not say which') as e: load_bundle(out)
        assert '\n' not in str(e.value)


# --- scores ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def scored(runs, tmp_path, monkeypatch):
    """Labels, and a bundle of two members; few samples of the bootstrap."""
    for name, n in dict(evaluate_run=10, ensemble_metrics=200).items(): monkeypatch.setattr(evaluation, name, partial(getattr(evaluation, name), samples=n))
    (tmp_path/'data').mkdir()
    made_up()[0].to_csv(tmp_path/'data'/'train.csv')
    return tmp_path/'data', bundle([runs['seg'], runs['plain'], runs['masked']], tmp_path/'b')


def test_an_ensemble_is_scored_member_by_member_and_together(runs, scored, tmp_path, capsys):
    from cspine import cli
    (truth, answers), (data, out) = made_up(), scored
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop: cli.main(['evaluate', str(out), '--data', str(data), '--out', str(tmp_path/'t.csv')])
    said = capsys.readouterr()
    assert not stop.value.code, said.err
    heads = [line.split(':')[0] for line in said.out.splitlines() if '95 % interval' in line]
    assert sorted(heads[:2]) == ['masked', 'plain'] and heads[2] == 'together' and sorted(heads[3:]) == ['together minus masked', 'together minus plain']
    table = pd.read_csv(tmp_path/'t.csv').set_index(['run', 'row', 'figure'])
    assert table.value['plain', 'all', 'metric'] == pytest.approx(metric(truth, answers['plain']), abs=1e-5)
    assert table.value['together', 'all', 'metric'] == pytest.approx(load_bundle(out).card['ensemble']['metric together'], abs=1e-4)
    assert table.high['together minus plain', 'all', 'metric'] < 0 and (table.low <= table.high).all()
    # the runs say the same of it
    both = evaluate([runs['plain'], runs['masked']], data).set_index(['run', 'row', 'figure'])
    key = ('together minus plain', 'C1-C7', 'auroc')
    assert both.value[key] == pytest.approx(table.value[key], abs=1e-4) and both.low[key] == pytest.approx(table.low[key], abs=1e-3)
    assert both.value['plain', 'C3', 'auroc'] > .5   # each run's own figures stay
    assert 'too few' not in capsys.readouterr().err


def test_what_cannot_be_scored_together_is_said(runs, scored, capsys):
    (truth, answers), (data, out) = made_up(), scored
    answered(runs['masked'], answers['masked'].iloc[:FEW-1], truth.iloc[:FEW-1])
    few = evaluate([runs['plain'], runs['masked']], data)
    assert not few.run.str.contains('together').any() and f'{FEW-1} studies in common out of fold: too few' in capsys.readouterr().err
    # other labels are said, other studies refused, and so is what cannot be compared
    other = truth.copy()
    other.loc['1.3', 'C2'] ^= 1
    other.to_csv(data/'train.csv')
    evaluate([out], data)
    assert 'are not those that the members' in capsys.readouterr().err
    truth.iloc[1:].to_csv(data/'train.csv')
    with pytest.raises(CspineError, match='knows 1 studies that .*train.csv does not, the first is 1.1'): evaluate([out], data)
    with pytest.raises(CspineError, match='is an ensemble, .* and others are not'): evaluate([out, runs['seg']], data)
    (runs['plain']/'oof.csv').unlink()
    bundle([runs['seg'], runs['plain'], runs['masked']], out)
    with pytest.raises(CspineError, match='no out-of-fold answers of plain'): evaluate([out], data)


def test_the_figure_of_an_ensemble_is_not_of_weights_fitted_on_the_same_answers():
    """Twelve readers who know nothing: weights fitted on the answers look better than the best of the readers, cross-fitted ones do not."""
    rng = np.random.default_rng(5)
    truth, _ = made_up(30)
    flat = np.log(.3/.7)
    readers = {f'r{i}': pd.DataFrame(1/(1+np.exp(-flat-rng.normal(size=truth.shape))), truth.index, list(TARGETS)) for i in range(12)}
    guess = np.stack(list(readers.values()))
    fitted = metric(truth, pd.DataFrame(averaged(guess, *fit_ensemble(truth, guess)), truth.index, list(TARGETS)))
    told = ensemble_metrics(truth, readers, samples=5).set_index(['run', 'row', 'figure']).value['together', 'all', 'metric']
    assert told > fitted + .003
