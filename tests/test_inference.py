"""The pipeline: a neck gets answers from its own pixels; everything else gets the prior and a note."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cspine import inference
from cspine.bundle import load_bundle, random_bundle
from cspine.cropping import boxes_from_labels
from cspine.dicom import Volume, write_series
from cspine.inference import EPS, Pipeline, predict
from cspine.phantom import make_study
from cspine.presets import TARGETS, CspineError


@pytest.fixture(scope='module')
def study(): return make_study(3, size=96)


@pytest.fixture(scope='module')
def bundle(tmp_path_factory): return load_bundle(random_bundle(tmp_path_factory.mktemp('bundle')/'b', folds=2))


@pytest.fixture
def pipeline(bundle): return Pipeline(bundle, device='cpu')


def test_a_neck_gets_answers_and_the_evidence_for_them(pipeline, study):
    p = pipeline.predict(study.volume, study.labels)
    assert p.uid == study.volume.uid and p.cervical_spine and p.present.all()
    assert p.probabilities.index.tolist() == list(TARGETS) and p.probabilities.between(EPS, 1-EPS).all()
    assert np.array_equal(p.boxes, boxes_from_labels(study.labels)) and p.labels is study.labels
    cls = pipeline.bundle.preset.classification
    assert p.crops.shape == (7, cls.slices, cls.size, cls.size) and p.crops.dtype == np.uint8
    assert all(c.std() > 5 for c in p.crops)                        # pictures of something
    assert list(p.seconds) == ['labels', 'crops', 'probabilities'] and all(s >= 0 for s in p.seconds.values())
    assert not p.probabilities[:7].round(6).equals(p.prior[:7].round(6))


def test_the_answers_depend_on_the_pixels_and_are_the_same_again(pipeline, study):
    a, b = (pipeline.predict(study.volume, study.labels).probabilities for _ in range(2))
    assert a.equals(b)
    hu = study.volume.hu.copy()
    hu[study.labels == 3] = -1000
    c = pipeline.predict(Volume(hu, study.volume.affine, 'x'), study.labels).probabilities
    assert a['C3'] != c['C3']


def test_stage_1_is_used_when_no_labels_are_given(pipeline, study, monkeypatch):
    seen = []
    def labels_of(models, preset, volume, device, coarse, batch):
        seen.append((len(models), preset, device))
        return study.labels, .95
    monkeypatch.setattr(inference, 'find_labels', labels_of)
    p = pipeline.predict(study.volume)
    assert p.cervical_spine and seen == [(2, pipeline.bundle.preset.segmentation, torch.device('cpu'))]
    assert not any('unsure' in n for n in p.notes)


def test_a_label_map_that_stage_1_is_unsure_of_gets_a_note(pipeline, study, monkeypatch):
    monkeypatch.setattr(inference, 'find_labels', lambda *a, **k: (study.labels, .65))
    sure, unsure = pipeline.predict(study.volume, study.labels), pipeline.predict(study.volume)
    assert unsure.notes == [*sure.notes, 'stage 1 is unsure of the levels (certainty 0.65, below 0.8): is this a neck? Look at the label map before you believe the answers']
    assert unsure.probabilities.equals(sure.probabilities)


def test_stage_1_of_random_weights_runs_for_real(pipeline, study):
    p = pipeline.predict(study.volume)
    assert p.labels.shape == study.volume.shape and p.labels.dtype == np.uint8
    assert p.probabilities.between(EPS, 1-EPS).all()


def test_without_a_cervical_spine_the_prior_answers(pipeline, study):
    p = pipeline.predict(study.volume, np.zeros(study.volume.shape, np.uint8))
    assert not p.cervical_spine and p.reason
    assert np.allclose(p.probabilities, pipeline.bundle.prior)
    assert any('no cervical spine' in n and p.reason in n for n in p.notes)
    assert (p.boxes == -1).all() and not p.present.any() and not p.crops.any()


def test_a_vertebra_outside_of_the_scan_gets_its_prior(pipeline, study):
    labels = np.where(study.labels == 7, 0, study.labels)
    p, prior = pipeline.predict(study.volume, labels), pipeline.bundle.prior
    assert not p.present[6] and p.probabilities['C7'] == pytest.approx(prior['C7'])
    assert p.probabilities['C2'] != pytest.approx(prior['C2'])
    assert any('C7 not in the scan' in n for n in p.notes)


def test_the_prior_is_the_bundle_s_own(bundle, study):
    mine = replace(bundle, prior=bundle.prior*0 + .123)
    p = Pipeline(mine, device='cpu').predict(study.volume, np.where(study.labels == 7, 0, study.labels))
    assert p.probabilities['C7'] == pytest.approx(.123)
    p = Pipeline(mine, device='cpu').predict(study.volume, study.labels*0)
    assert np.allclose(p.probabilities, .123)


def test_notes_of_the_reader_are_kept_and_not_changed(pipeline, study):
    v = Volume(study.volume.hu, study.volume.affine, 'x', ['two slices were missing'])
    assert pipeline.predict(v, np.zeros(v.shape, np.uint8)).notes[0] == 'two slices were missing'
    assert v.notes == ['two slices were missing']


NOWHERE = np.full((7, 3, 4, 4), np.nan)


def test_where_it_looked_is_a_place_in_the_scan(pipeline, study, monkeypatch):
    "The hottest cell of each crop, as a voxel: in the first third of its slices, the middle of its rows, the last third of its columns"
    p = pipeline.predict(study.volume, study.labels, evidence=True)
    assert p.heat.shape[0] == 7 and p.looked.shape == (7, 3) and (np.isfinite(p.looked[:, 0]) == p.present).all()
    there, margin = p.boxes[p.present].reshape(-1, 3, 2), pipeline.bundle.preset.classification.margin_mm/np.array(study.volume.spacing)
    half = (there[..., 1]-there[..., 0]).max(1, keepdims=True)   # a crop is as wide as the longer side of its box
    assert (p.looked[p.present] >= there[..., 0]-margin-half).all() and (p.looked[p.present] <= there[..., 1]+margin+half).all()
    heat = np.zeros((7, 3, 3, 3))
    heat[:, 0, 1, 2] = 1
    monkeypatch.setattr(inference, 'predict_probabilities', lambda *a, **k: (np.full(8, .5), heat))
    looked = pipeline.predict(study.volume, study.labels, evidence=True).looked
    mm, spacing, m = there*np.array(study.volume.spacing)[:, None], np.array(study.volume.spacing), pipeline.bundle.preset.classification.margin_mm
    side = (mm[:, 1:, 1]-mm[:, 1:, 0]).max(1) + 2*m
    want = mm.mean(2)
    want[:, 0] = mm[:, 0, 0] - m + (mm[:, 0, 1]-mm[:, 0, 0] + 2*m)/6
    want[:, 2] += side/3
    np.testing.assert_allclose(looked[p.present], want/spacing - .5, atol=1e-6)
    assert np.isnan(looked[~p.present]).all()


@pytest.mark.parametrize('says, answer', [(0., EPS), (1., 1-EPS), (.3, .3)])
def test_no_answer_is_quite_sure(pipeline, study, monkeypatch, says, answer):
    monkeypatch.setattr(inference, 'predict_probabilities', lambda *a, **k: (np.full(8, says), NOWHERE))
    assert np.allclose(pipeline.predict(study.volume, study.labels, evidence=True).probabilities, answer)


def test_what_is_not_a_number_becomes_the_prior(pipeline, study, monkeypatch):
    monkeypatch.setattr(inference, 'predict_probabilities', lambda *a, **k: (np.array([np.nan, np.inf] + [.5]*6), NOWHERE))
    p = pipeline.predict(study.volume, study.labels, evidence=True)
    assert np.allclose(p.probabilities, [*pipeline.bundle.prior[:2]] + [.5]*6)
    assert any('C1, C2 came out as not a number' in n for n in p.notes)


def test_wrong_labels_and_devices_are_refused(bundle, pipeline, study):
    with pytest.raises(CspineError, match='same grid'):
        pipeline.predict(study.volume, study.labels[1:])
    for device in ('abacus', 'cuda:99', 'meta'):
        with pytest.raises(CspineError, match='cannot use the device'):
            Pipeline(bundle, device=device)


def test_a_scan_of_one_slice(pipeline):
    v = Volume(np.zeros((1, 64, 64), np.int16), np.diag([1., 1, 1, 1]), 'x')
    p = pipeline.predict(v)
    assert not p.cervical_spine and np.isfinite(p.probabilities).all()


def test_a_folder_of_dicom_files(study, tmp_path, bundle):
    small = study.volume.hu[:40]
    folder = write_series(small, study.volume.affine, tmp_path/'1.2.3', uid='1.2.3')
    p = predict(folder, bundle, device='cpu')
    assert p.uid == '1.2.3' and 'read' in p.seconds and p.labels.shape == small.shape
    with pytest.raises(CspineError):
        predict(tmp_path/'nowhere', bundle)


def test_odds_of_the_bundle_move_the_answer(tmp_path):
    """A bundle trained where fractures are too common says so in `odds`; the answers are brought back by that factor."""
    import dataclasses

    import numpy as np

    from cspine.bundle import load_bundle, random_bundle
    from cspine.dicom import Volume
    from cspine.inference import Pipeline

    bundle = load_bundle(random_bundle(tmp_path / 'bundle'))
    volume = Volume(np.zeros((70, 64, 64), np.int16), np.diag([-2., 2., 2., 1.]), '1.2.3', [])
    labels = np.zeros(volume.shape, np.uint8)
    for level in range(1, 7):                                       # C7 is not in the scan
        labels[10 * level:10 * level + 8, 20:36, 20:36] = level   # 16 cm3
    plain = Pipeline(bundle).predict(volume, labels)
    moved = Pipeline(dataclasses.replace(bundle, odds=bundle.odds * .25)).predict(volume, labels)
    assert plain.cervical_spine and not plain.present[6]
    odds = {n: p.probabilities / (1 - p.probabilities) for n, p in dict(plain=plain, moved=moved).items()}
    assert np.allclose((odds['moved'] / odds['plain']).drop('C7'), .25)
    assert np.isclose(moved.probabilities['C7'], plain.probabilities['C7'])     # the prior stays the prior


def test_pixels_too_coarse_are_told(pipeline, study):
    def notes(mm):
        affine = study.volume.affine.copy()
        affine[:3, 1:3] *= mm/np.linalg.norm(affine[:3, 1])
        v = Volume(study.volume.hu, affine, 'x', [])
        assert max(v.spacing[1:]) == pytest.approx(mm)
        return [n for n in pipeline.predict(v, study.labels).notes if 'too coarse' in n]
    assert len(notes(2.)) == 1 and '2.00 mm' in notes(2.)[0] and not notes(1.2)


def test_the_prevalence_does_not_put_the_patient_below_a_vertebra(bundle, study):
    few = Pipeline(replace(bundle, odds=bundle.odds.where(bundle.odds.index != 'patient_overall', 1e-3)), device='cpu')
    p = few.predict(study.volume, study.labels).probabilities
    assert p['patient_overall'] == pytest.approx(p.iloc[:7].max()) and p['patient_overall'] > .01


def test_evidence_is_computed_where_it_is_asked_for_and_changes_no_answer(pipeline, study):
    plain, seen = (pipeline.predict(study.volume, study.labels, evidence=e) for e in (False, True))
    assert plain.heat is None and plain.looked is None and np.isfinite(seen.heat[seen.present]).all()
    np.testing.assert_array_equal(plain.probabilities, seen.probabilities)
    assert pipeline.predict(study.volume, study.labels*0).looked is None


def test_each_effort_leaves_out_more(pipeline, study, monkeypatch):
    """Mirror images first, then all folds but one, then stage 1's second network."""
    asked = []
    n, m = len(pipeline.bundle.segmentation), len(pipeline.bundle.classification)
    assert min(n, m) > 1
    monkeypatch.setattr(inference, 'find_labels', lambda models, *a, coarse, **k: asked.append((len(models), coarse)) or (study.labels, 1.))
    monkeypatch.setattr(inference, 'predict_probabilities', lambda models, *a, mirror, **k: asked.append((len(models), mirror)) or np.full(8, .5))
    for effort in range(len(inference.EFFORTS)):
        pipeline.predict(study.volume, effort=effort)
    assert asked == [(n, False), (m, True), (n, False), (m, False), (1, False), (1, False), (1, True), (1, False)]


NO_KERNEL = 'CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be asynchronously reported'


def test_a_gpu_that_cannot_compute_costs_speed_only(bundle, monkeypatch, capsys):
    """The platform's default P100 under a torch built without its kernels."""
    import cspine.segmentation as seg
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda i: 'Tesla P100-PCIE-16GB')
    right = seg.F.conv3d

    def conv3d(x, *a, **k):
        if x.device.type != 'cpu': raise RuntimeError(NO_KERNEL)
        return right(x, *a, **k)

    ones = torch.ones
    monkeypatch.setattr(torch, 'ones', lambda *a, device='cpu', **k: ones(*a, device='meta' if 'cuda' in str(device) else device, **k))
    monkeypatch.setattr(seg.F, 'conv3d', conv3d)
    p = Pipeline(bundle)
    said = capsys.readouterr().err
    assert p.device.type == 'cpu' and said.strip() == p.device_note and said.count('P100') == 1
    assert 'no kernel image is available' in said and 'choose the accelerator GPU T4 x2' in said and 'asynchronously' not in said
    with pytest.raises(CspineError, match='no kernel image'):
        Pipeline(bundle, device='cuda:0')
    monkeypatch.setattr(seg, '_why_not', lambda d: NO_KERNEL if str(d) == 'cuda:0' else '')
    found, said = seg.find_devices()
    assert [str(d) for d in found] == ['cuda:1'] and 'the other GPU computes' in said
    assert [str(d) for d in seg.find_devices('cuda:1')[0]] == ['cuda:1']
    monkeypatch.setattr(seg, '_why_not', lambda d: '')
    assert [str(d) for d in seg.find_devices('cuda')[0]] == ['cuda:0', 'cuda:1']


def test_a_device_that_computes_wrongly_is_not_taken(monkeypatch):
    import cspine.segmentation as seg
    monkeypatch.setattr(seg.F, 'conv3d', lambda *a, **k: torch.zeros(1))
    with pytest.raises(CspineError, match='computes 0 where 2000 is right'):
        seg.find_devices('cpu')


@pytest.mark.parametrize('model, n', [('cascade3d', 3), ('unet2d', 4), ('unet3d', 3)])
def test_a_coarse_stage_1_is_offered_where_it_pays(pipeline, monkeypatch, model, n):
    bundle = replace(pipeline.bundle, preset=SimpleNamespace(segmentation=SimpleNamespace(model=model)))
    monkeypatch.setattr(pipeline, 'bundle', bundle)
    assert pipeline.efforts == n
