"""Pictures and pages: what they show, that they are whole, and that nothing from a scan gets into the page as markup."""
import base64
import io
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from cspine.bundle import random_bundle
from cspine.dicom import Volume, write_series
from cspine.inference import Pipeline
from cspine.phantom import make_study
from cspine.presets import LEVELS, TARGETS, CspineError
from cspine.view import midsagittal
from cspine.report import (COLOURS, Entry, entry, facts, inspect, orientation, png_bytes, report_page, show_planes,
                           show_study, study_page)
from cspine.rsna import score
from PIL import Image


@pytest.fixture(scope='module')
def study(): return make_study(3, size=96)


@pytest.fixture(scope='module')
def prediction(study, tmp_path_factory):
    """All levels but C7."""
    pipeline = Pipeline(random_bundle(tmp_path_factory.mktemp('bundle')/'b'), device='cpu')
    return pipeline.predict(study.volume, np.where(study.labels == 7, 0, study.labels))


@pytest.fixture(scope='module')
def nothing(study, prediction):
    """The same scan, no cervical spine found."""
    return replace(prediction, labels=study.labels*0, crops=prediction.crops*0, present=np.zeros(7, bool), cervical_spine=False,
                   reason='no vertebra found', probabilities=prediction.prior)


TRUTH = pd.Series([0, 1, 0, 0, 0, 0, 0, 1], list(TARGETS))
HOSTILE = '<script>alert(1)</script> & "quotes" \' <img src=x onerror=y>'
VOID = {'meta', 'img', 'br', 'link'}


class Page(HTMLParser):
    """Checks that tags close in order, and collects them."""
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ''
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data): self.text += data

    def all(self, tag): return [a for t, a in self.tags if t == tag]


def read(path): return Page(path.read_text(encoding='utf-8'))


def words(fig): return [t.get_text() for ax in fig.axes for t in ax.texts] + [ax.get_title() for ax in fig.axes]


def test_midsagittal_cuts_the_spine_where_it_is():
    labels = np.zeros((8, 4, 60), np.uint8)
    for i in range(7): labels[i, :, 30+i:41+i] = i+1        # leaning: only columns 36 to 40 cut all levels
    labels[7, :, 50:60] = 8
    assert 36 <= midsagittal(labels) <= 40
    assert midsagittal(np.where(labels == 8, 8, 0).astype(np.uint8)) in range(50, 60)
    assert midsagittal(labels*0) == 30


def test_a_study_shows_its_slice_levels_crops_and_bars(study, prediction):
    fig = show_study(study.volume, prediction, TRUTH)
    slice_, *crops, bars = fig.axes
    assert len(crops) == 7 and len(set(COLOURS.values())) == 8
    dz, dy, _ = study.volume.spacing
    assert slice_.get_aspect() == pytest.approx(dz/dy)
    assert {t.get_text() for t in slice_.texts} == {*LEVELS[:6], 'T'}
    assert [ax.get_title() for ax in crops] == [f'{t}  {prediction.probabilities[t]:.0%}' for t in LEVELS]
    assert [bool(ax.images) for ax in crops] == [True]*6+[False] and [t.get_text() for t in crops[6].texts] == ['absent']
    assert np.array_equal(crops[2].images[0].get_array(), prediction.crops[2][prediction.crops.shape[1]//2])
    assert np.allclose([b.get_height() for b in bars.patches], prediction.probabilities)
    assert {t.get_text() for t in bars.get_legend().get_texts()} == {'prior', 'fractured', 'intact'}
    dots = {c.get_label(): c.get_offsets()[:, 0].tolist() for c in bars.collections if c.get_label() in ('fractured', 'intact')}
    assert dots == dict(fractured=[1, 7], intact=[0, 2, 3, 4, 5, 6])


def test_head_is_up_and_face_to_the_left(study, prediction):
    ax = show_study(study.volume, prediction).axes[0]
    assert np.array_equal(np.asarray(ax.images[1].get_array()), prediction.labels[:, :, midsagittal(prediction.labels)])
    (top, bottom), (left, right) = sorted(ax.get_ylim()), ax.get_xlim()
    assert ax.get_ylim() == (bottom, top) and left < right and (top, bottom) == (-.5, study.volume.shape[0]-.5)


def test_without_truth_there_are_no_dots(study, prediction):
    bars = show_study(study.volume, prediction).axes[-1]
    assert [t.get_text() for t in bars.get_legend().get_texts()] == ['prior']


def test_a_scan_without_a_neck_says_so(study, nothing):
    fig = show_study(study.volume, nothing)
    assert words(fig).count('absent') == 7 and 'no cervical spine: no vertebra found' in words(fig)


@pytest.mark.parametrize('shape', [(1, 64, 64), (2, 8, 300), (300, 16, 16)])
def test_odd_shapes_can_be_shown(nothing, shape):
    v = Volume(np.zeros(shape, np.int16), np.array([[0, 0, .5, 0], [0, .5, 0, 0], [-5., 0, 0, 0], [0, 0, 0, 1]]), 'x')
    for fig in (show_study(v, replace(nothing, labels=np.zeros(shape, np.uint8))), show_planes(v)):
        w, h = Image.open(io.BytesIO(png_bytes(fig, 40))).size
        assert 50 < w < 2000 and 50 < h < 2000


def test_a_figure_shows_itself_and_needs_no_closing(study, prediction):
    import matplotlib.pyplot as plt
    before = plt.get_fignums()
    fig = show_study(study.volume, prediction)
    assert fig._repr_png_()[:8] == b'\x89PNG\r\n\x1a\n' and plt.get_fignums() == before


def test_the_page_of_a_study_is_one_whole_file(study, prediction, tmp_path):
    page = read(study_page(study.volume, prediction, tmp_path/'new'/'page.html', TRUTH, card=dict(name='small', runs=[1])))
    (img,) = page.all('img')
    kind, data = img['src'].split(',')
    assert kind == 'data:image/png;base64'
    Image.open(io.BytesIO(base64.b64decode(data, validate=True))).load()
    assert not page.all('script') and not page.all('link') and 'never base a diagnosis' in page.text
    raw = (tmp_path/'new'/'page.html').read_text(encoding='utf-8')
    assert not re.search(r'https?://', raw) and 'C7 not in the scan' in raw
    assert len([c for c in page.all('td') if c.get('class') == 'true']) == 2
    assert [f.name for f in (tmp_path/'new').iterdir()] == ['page.html']
    for t in TARGETS: assert f'{prediction.probabilities[t]:.2f}' in page.text


def test_what_comes_from_outside_is_escaped(study, prediction, tmp_path):
    p = replace(prediction, uid=HOSTILE, notes=[HOSTILE])
    e = Entry(HOSTILE+'2', prediction.probabilities, notes=(HOSTILE,))
    page = read(report_page([entry(study.volume, p), e], tmp_path/'p.html', title=HOSTILE, card={HOSTILE: HOSTILE}))
    assert not page.all('script') and len(page.all('img')) == 1 and not any('onerror' in a for _, a in page.tags)
    assert page.text.count(HOSTILE) == 10      # title twice, table twice, headings twice, notes twice, card twice


def test_scores_stand_beside_the_best_constant(tmp_path, prediction):
    uids = ['1.2', '1.3', '1.4']
    truth = pd.DataFrame([TRUTH, TRUTH*0, TRUTH], pd.Index(uids, name='StudyInstanceUID'), TARGETS).astype(int)
    truth.to_csv(tmp_path/'truth.csv')
    rows = [(f'{u}_{t}', .2) for u in uids for t in TARGETS]
    pd.DataFrame(rows, columns=['row_id', 'fractured']).to_csv(tmp_path/'s.csv', index=False)
    s = score(tmp_path/'truth.csv', tmp_path/'s.csv')
    entries = [Entry(u, prediction.probabilities, truth=truth.loc[u]) for u in uids]
    page = read(report_page(entries, tmp_path/'p.html', score=s))
    for k in ('score', 'best_constant', 'half'): assert f'{s[k]:.4f}' in page.text
    assert 'worse than the best constant' in page.text
    for low, more, tone, chance in ((.01, .1, 'tile good', 0), (-.01, .1, 'tile ', 1), (-.03, -.1, 'tile bad', 1)):
        page = read(report_page(entries, tmp_path/'p.html', score=dict(s, better=.02, better_low=low, half=s['score'] + more)))
        assert [a['class'] for a in page.all('div') if a.get('class', '').startswith('tile ')] == [tone]
        assert ('may be chance' in page.text) == chance
    assert 'loss best constant' in page.text and 'nan' not in page.text
    assert len([c for c in page.all('td') if c.get('class') == 'true']) == 4


def test_a_page_of_no_study_and_a_page_of_many(tmp_path, prediction):
    assert '0 studies' in read(report_page([], tmp_path/'p.html')).text
    many = [Entry(f'1.2.{i}', prediction.probabilities, cervical_spine=i > 0) for i in range(200)]
    page = read(report_page(many, tmp_path/'p.html'))
    assert len(page.all('tr')) == 201 and not page.all('img') and 'no cervical spine in the scan' in page.text


def test_links_lead_to_the_studies(tmp_path, study, prediction):
    one = entry(study.volume, prediction)
    page = read(report_page([Entry('0', one.probabilities), one, replace(one, uid='2')], tmp_path/'p.html'))
    ids = [a['id'] for a in page.all('section')]
    assert [a['href'] for a in page.all('a')] == [f'#{i}' for i in ids] and len(set(ids)) == 2


def test_orientation_names_both_ends_of_each_axis(study):
    assert orientation(study.volume.affine) == 'HF AP RL'
    assert orientation(np.diag([-1., 1, 1, 1])) == 'LR AP FH'     # z, y, x run along x, y, z of the patient


@pytest.mark.parametrize('syntax, name', [('explicit', 'Explicit VR Little Endian'), ('rle', 'RLE Lossless')])
def test_inspect_prints_what_there_is_to_know(study, tmp_path, capsys, monkeypatch, syntax, name):
    monkeypatch.setenv('COLUMNS', '200')
    v = study.volume
    folder = write_series(v.hu[:20], v.affine, tmp_path/'1.2.3', uid='1.2.3', syntax=syntax)
    (folder/'notes.txt').write_text('not a slice')
    got = inspect(folder, png=tmp_path/'new'/'planes.png')
    assert got.uid == '1.2.3' and got.shape == (20, 96, 96)
    said = capsys.readouterr().out
    dz, dy, dx = v.spacing
    for word in ('1.2.3', '20 x 96 x 96', f'{dz:.3f} x {dy:.3f} x {dx:.3f} mm', 'HF AP RL', f'20 x {name}', '1 x not DICOM',
                 f'max {v.hu[:20].max()}', f'min {v.hu[:20].min()}', 'planes.png'): assert word in said, word
    assert Image.open(tmp_path/'new'/'planes.png').size[0] > 500
    for n in got.notes: assert ' '.join(n.split()[:3]) in said


def test_inspect_says_what_is_wrong(tmp_path):
    with pytest.raises(CspineError): inspect(tmp_path/'nowhere')
    (tmp_path/'empty').mkdir()
    with pytest.raises(CspineError): inspect(tmp_path/'empty')


def test_inspect_lists_what_the_reader_can_do_without(study, tmp_path, capsys):
    "A slice cut off in its header, and slices that lie in a subfolder"
    folder = write_series(study.volume.hu[:6], study.volume.affine, tmp_path/'study'/'series')
    slices = sorted(folder.iterdir())
    slices[0].write_bytes(slices[0].read_bytes()[:154])
    inspect(tmp_path/'study')
    said = ' '.join(capsys.readouterr().out.split())
    assert '5 x Explicit VR Little Endian, 1 x not DICOM, or damaged' in said


def test_markup_in_a_series_is_printed_as_it_is(study, capsys, monkeypatch):
    monkeypatch.setattr('cspine.report.read_series', lambda folder: Volume(study.volume.hu, study.volume.affine, '[red]x[/red]', ['[bold]y']))
    monkeypatch.setattr('cspine.report._syntaxes', lambda folder: Counter())
    inspect('anywhere')
    said = capsys.readouterr().out
    assert '[red]x[/red]' in said and '[bold]y' in said


def test_planes_are_square_in_millimetres(study):
    dz, dy, dx = study.volume.spacing
    fig = show_planes(study.volume)
    assert [ax.get_aspect() for ax in fig.axes] == pytest.approx([dy/dx, dz/dy, dz/dx])
    assert np.array_equal(fig.axes[1].images[0].get_array().shape, study.volume.shape[:2])
    # drawn at one scale: a mm is as many pixels in each picture
    fig.draw_without_rendering()
    scale = [ax.get_window_extent().width/(np.diff(ax.get_xlim())[0]*s) for ax, s in zip(fig.axes, (dx, dy, dx))]
    assert max(scale)/min(scale) < 1.05


def test_facts_are_text(study):
    assert all(isinstance(v, str) for v in facts(study.volume).values())
