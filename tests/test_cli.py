"""The command line from outside: exit codes, what is printed where, and the whole way of the data on a few phantoms."""
import contextlib
import importlib
import inspect
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cspine import __version__, cli
from cspine.dicom import read_series
from cspine.presets import TARGETS
from cspine.rsna import read_mask

COMMANDS = ('phantom', 'inspect', 'train segmentation', 'train detection', 'train classification', 'crop', 'bundle', 'predict', 'submit', 'score', 'evaluate', 'rivals', 'presets')


class Done:
    """What a shell would have seen of a command line, run in this process: starting Python and torch takes seconds."""
    def __init__(self, *args):
        self.returncode, out, err = None, io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: cli.main([*map(str, args)])
            except SystemExit as stop: self.returncode = stop.code or 0
        self.stdout, self.stderr = out.getvalue(), err.getvalue()


cspine = Done


def fails(code, *args):
    """Ends with `code` and without a traceback; what it said."""
    done = cspine(*args)
    assert done.returncode == code, (args, done.stdout, done.stderr)
    assert 'Traceback' not in done.stderr
    return done.stderr


@pytest.fixture(autouse=True)
def wide(monkeypatch): monkeypatch.setenv('COLUMNS', '100')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp('cli') / 'data'
    done = cspine('phantom', out, '--train', 1, '--test', 2, '--size', 64, '--seed', 90001)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope='module')
def bundle(tmp_path_factory):
    from cspine.bundle import random_bundle
    return random_bundle(tmp_path_factory.mktemp('cli_bundle') / 'random')


@pytest.fixture(scope='module')
def study(data):
    return sorted((data / 'test_images').iterdir())[0]


@pytest.mark.parametrize('command', COMMANDS)
def test_help_shows_an_example(command):
    done = cspine(*command.split(), '--help')
    assert done.returncode == 0 and f'Example: cspine {command}' in done.stdout and not done.stderr


def test_spelling_of_the_options():
    """Scripts outside this repository call these."""
    wanted = {'phantom': '--train --test --size --seed', 'inspect': '--png', 'bundle': '--out', 'predict': '--bundle --labels',
              'train segmentation': '--data --preset --out --fold --epochs --resume --weights --model --input',
              'train detection': '--data --preset --segmentation --out --fold --epochs --resume --predicted',
              'train classification': '--data --preset --segmentation --crops --out --fold --epochs --resume --weights --model',
              'crop': '--data --bundle --masks --out --preset --workers --device --view',
              'submit': '--data --bundle --out', 'score': '--truth --submission', 'evaluate': '--data --out --views --surfaces --threshold', 'rivals': '', 'presets': ''}
    assert set(wanted) == set(COMMANDS)
    for command, options in wanted.items():
        text = cspine(*command.split(), '--help').stdout
        assert not [o for o in options.split() if not re.search(rf'^\s+{o}\b', text, re.M)], command


def test_help_and_presets_load_no_torch():
    code = ('import sys\nfrom cspine.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code\n'
            'assert "torch" not in sys.modules')
    for args in (['--help'], ['train', 'segmentation', '--help'], ['presets']):
        done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_as_a_process():
    """The installed script's entry point, for the shell's part: exit codes, the two streams."""
    def shell(*args):
        done = subprocess.run([sys.executable, '-c', 'from cspine.cli import main; main()', *args], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    assert shell('--version') == (0, f'cspine {__version__}\n', '')
    line = 'score', '--truth', 'nowhere', '--submission', 'nowhere'
    assert shell(*line) == (1, '', fails(1, *line))
    assert shell('nonsense')[0] == 2


@pytest.mark.parametrize('line', ['', 'nonsense', 'train', 'train detection', 'predict', 'phantom', 'bundle a', 'score --truth a.csv',
                                  'phantom there --seed -1', 'phantom there --train many', 'submit --data d --colour red',
                                  'train segmentation --data d --out o --fold first', 'train segmentation --data d --out o --fold -1'])
def test_wrong_usage_is_2(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert 'Usage:' in fails(2, *line.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('line', ['inspect nowhere', 'predict nowhere --bundle nowhere', 'submit --data nowhere --bundle nowhere',
                                  'score --truth nowhere --submission nowhere', 'bundle nowhere --out b',
                                  'train segmentation --data nowhere --out r', 'train segmentation --data nowhere --preset huge --out r',
                                  'train classification --data nowhere --segmentation nowhere --out r', 'train classification --data nowhere --crops nowhere --out r',
                                  'crop --data nowhere --out r'])
def test_anything_else_is_1_and_one_sentence(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = fails(1, *line.split())
    assert len(said.splitlines()) == 1 and said.startswith('cspine: '), said
    assert 'nowhere' in said or 'huge' in said, 'it does not say what is wrong'
    assert 'CSPINE_DEBUG' not in said, f'an error that nobody worded: {said}'


def test_presets_by_name(capsys):
    with pytest.raises(SystemExit) as stop: cli.main(['presets', 'best', 'tiny'])
    out = capsys.readouterr().out.splitlines()
    assert not stop.value.code and out[0].split() == ['best', 'tiny']
    assert next(line for line in out if line.startswith('classification.size ')).split()[1:] == ['256', '128']
    assert fails(1, 'presets', 'tinny') == "cspine: there is no preset 'tinny'; the presets are paper, tiny, best. Did you mean tiny?\n"


def test_unforeseen_errors_are_one_line_too(monkeypatch, capsys):
    def broken(*args): raise KeyError('C9')
    monkeypatch.setattr('cspine.presets.presets', broken)
    with pytest.raises(SystemExit) as stop: cli.main(['presets'])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "cspine: KeyError: 'C9' (CSPINE_DEBUG=1 shows where)\n"
    monkeypatch.setenv('CSPINE_DEBUG', '1')
    with pytest.raises(KeyError): cli.main(['presets'])


def test_train_passes_on_what_was_asked(monkeypatch):
    import cspine.training
    seen = []
    for stage in ('segmentation', 'classification'):
        def record(*args, _bind=inspect.signature(getattr(cspine.training, f'train_{stage}')).bind, **kw):
            seen.append(_bind(*args, **kw).arguments)
        monkeypatch.setattr(cspine.training, f'train_{stage}', record)
    for line in ('segmentation --data d --preset paper --out r --fold all --epochs 3 --resume --weights w.pth --device cpu --precision fp32 --batch 4 --input 2.5d',
                 'classification --data d --preset tiny --segmentation s --out r --fold 2 --model vit', 'segmentation --data d --out r'):
        with pytest.raises(SystemExit) as stop: cli.main(['train', *line.split()])
        assert not stop.value.code
    d, r = Path('d'), Path('r')
    left = dict(device=None, precision='auto', batch=None)
    assert seen == [dict(data=d, preset='paper', out=r, fold='all', epochs=3, resume=True, weights='w.pth', device='cpu', precision='fp32', batch=4, model=None, input='2.5d'),
                    dict(data=d, preset='tiny', segmentation=Path('s'), out=r, fold=2, epochs=None, resume=False, weights=None, crops=None, detection=None, model='vit', **left),
                    dict(data=d, preset='tiny', out=r, fold=0, epochs=None, resume=False, weights=None, model=None, input=None, **left)]


@pytest.mark.parametrize('module, name', [('phantom', 'phantom'), ('report', 'inspect'), ('training', 'train_segmentation'), ('crops', 'crop_data_set'),
                                          ('training', 'train_classification'), ('bundle', 'bundle'), ('inference', 'predict'),
                                          ('rsna', 'score'), ('presets', 'presets')])
def test_the_library_has_the_same_names(module, name):
    """What a command takes, the library's function of that name takes, but for those that only write a page or a label map."""
    ours = set(inspect.signature(getattr(cli, name)).parameters) - {'page', 'labels'}
    assert ours <= set(inspect.signature(getattr(importlib.import_module(f'cspine.{module}'), name)).parameters)


def test_the_page_says_a_note_once():
    from cspine_submission.page import _notes
    assert _notes(dict(reason='one; two', notes=['one', 'two', 'three'])) == ('one', 'two', 'three')
    assert _notes(dict(reason='no slice; see there', notes=['one'])) == ('no slice; see there', 'one')
    assert _notes(dict(reason='', notes=[])) == ()


def test_inspect(study, tmp_path):
    done = cspine('inspect', study, '--png', tmp_path / 'study.png')
    assert done.returncode == 0, done.stderr
    assert study.name in done.stdout and (tmp_path / 'study.png').read_bytes()[:4] == b'\x89PNG'


def test_predict(study, bundle, tmp_path):
    done = cspine('predict', study, '--bundle', bundle, '--page', tmp_path / 'study.html', '--labels', tmp_path / 'l.nii.gz')
    assert done.returncode == 0, done.stderr
    assert f'labels: {tmp_path / "l.nii.gz"}\n' in done.stdout
    p = dict(re.findall(r'^(C\d|patient_overall)\s+([\d.]+)(?:   slice|$)', done.stdout, re.M))
    assert tuple(p) == TARGETS and all(0 < float(v) < 1 for v in p.values())
    assert 'data:image/png' in (tmp_path / 'study.html').read_text(encoding='utf-8')
    from_library = cli.predict(study, bundle=bundle)
    assert [f'{v:.4f}' for v in from_library.probabilities] == list(p.values())
    assert (read_mask(tmp_path / 'l.nii.gz', read_series(study)) == from_library.labels).all()


def test_predict_says_where_it_looked(study, capsys, monkeypatch):
    looked = np.full((7, 3), np.nan)
    looked[2], looked[6] = (10.6, 20.2, 30), (-.4, 0, 5)
    seen = SimpleNamespace(uid='1.2', probabilities=pd.Series(.25, TARGETS), looked=looked, notes=['odd'])
    monkeypatch.setattr('cspine.inference.Pipeline', lambda *_, **__: SimpleNamespace(predict=lambda volume, evidence: seen))
    cli.predict(study)
    assert capsys.readouterr().out.splitlines() == [
        '1.2', *(f'C{k}              0.2500' + {3: '   slice 11, row 20, column 30', 7: '   slice 0, row 0, column 5'}.get(k, '') for k in range(1, 8)),
        'patient_overall 0.2500', 'note: odd']


def test_submit_and_score(data, bundle, tmp_path):
    csv, page, truth = tmp_path / 's.csv', tmp_path / 's.html', data / 'test_truth.csv'
    done = cspine('submit', '--data', data, '--bundle', bundle, '--out', csv, '--page', page, '--truth', truth, '--pictures', 1)
    assert done.returncode == 0, done.stderr
    assert str(csv) in done.stdout and str(page) in done.stdout
    rows, asked = pd.read_csv(csv), pd.read_csv(data / 'test.csv')
    assert list(rows.row_id) == list(asked.row_id) and rows.fractured.between(0, 1).all()
    done = cspine('score', '--truth', truth, '--submission', csv)
    score, constant = (float(re.search(rf'^{what}\s+([\d.]+)$', done.stdout, re.M)[1]) for what in ('score', 'best constant'))
    html = page.read_text(encoding='utf-8')
    assert re.search(r'^0\.\d{4} (better|worse) than the best constant', done.stdout, re.M)
    assert html.count('data:image/png') == 2 and f'{score:.4f}' in html   # a study, and the histograms of all answers
    assert 'seconds per study: read' in html and f'{constant:.4f}' in html
    assert all(uid in html for uid in asked.StudyInstanceUID)
    assert 'Pictured: 1 of 2 studies' in html
    again = ['submit', '--data', data, '--bundle', bundle, '--out', csv, '--page', page, '--truth', truth, '--pictures']
    before = csv.read_bytes()
    assert 'predicting' not in (said := cspine(*again, 1).stdout) and 'reusing 2 of 2' in said   # drawn from what was kept
    assert page.read_text(encoding='utf-8').count('data:image/png') == 2
    cspine(*again, 2)   # one more picture than was kept: that study is looked at once more
    assert page.read_text(encoding='utf-8').count('data:image/png') == 3 and csv.read_bytes() == before
    s = cli.score(truth, csv)
    assert (round(s['score'], 4), round(s['best_constant'], 4)) == (score, constant)


def test_what_is_wrong_with_the_truth_is_said_first(data, bundle, tmp_path):
    def submit(*args): return fails(1, 'submit', '--data', data, '--bundle', bundle, '--out', tmp_path / 's.csv', *args)
    assert 'nowhere.csv does not exist' in submit('--truth', 'nowhere.csv')
    assert 'hold different studies' in submit('--truth', data / 'train.csv')
    for option in ('--page', '--out'): assert 'is a folder' in fails(2, 'submit', '--data', data, option, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('alarm, status', [(True, 3), (False, 0)])
def test_an_alarm_is_an_exit_status(data, bundle, tmp_path, monkeypatch, alarm, status):
    monkeypatch.setattr('cspine_submission.submit', lambda *a, **k: dict(path='s.csv', alarm=alarm))
    with pytest.raises(SystemExit) as end: cli.main(['submit', '--data', str(data), '--bundle', str(bundle), '--out', str(tmp_path / 's.csv')])
    assert end.value.code == status


def test_a_time_limit_that_is_none(data):
    assert "'soon' is no time: write 9h, 8h30m" in ' '.join(fails(2, 'submit', '--data', data, '--time-limit', 'soon').split())


def test_ctrl_c_ends_in_a_sentence():
    code = ('import atexit, os, signal, threading\nfrom cspine import cli, presets\n'
            'atexit.register(os.abort)\n'   # as a thread in torch does when the interpreter ends in good order
            'signal.signal(signal.SIGINT, signal.default_int_handler)\n'   # what runs in the background is born deaf to it
            'def wait(*a): os.kill(os.getpid(), signal.SIGINT); threading.Event().wait(20)\n'
            'presets.presets = wait\ncli.main(["presets"])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.splitlines()[-1].startswith('cspine: stopped')


def test_a_name_that_the_terminal_cannot_show():
    code = 'import pandas as pd\nfrom cspine import cli, presets\npresets.presets = lambda names: pd.Series(["gr\\xfcn"])\ncli.main(["presets"])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, 'PYTHONIOENCODING': 'ascii'})
    assert done.returncode == 0 and done.stdout == '0    gr\\xfcn\n', done.stderr


def test_page_of_a_submission_with_a_broken_study(data, bundle, tmp_path):
    """A folder of study folders without a test.csv; the one that cannot be read is on the page, with the reason."""
    folder = tmp_path / 'studies'
    good = sorted((data / 'test_images').iterdir())[0]
    folder.mkdir()
    (folder / 'neck').symlink_to(good)   # its headers name it otherwise
    (folder / '1.2.3').mkdir()
    (folder / '1.2.3' / '1.dcm').write_text('not DICOM')
    cli.submit(folder, bundle=bundle, out=tmp_path / 's.csv', page=tmp_path / 's.html')
    assert len(pd.read_csv(tmp_path / 's.csv')) == 16
    html = (tmp_path / 's.html').read_text(encoding='utf-8')
    assert html.count('data:image/png') == 2 and html.count('<li>') >= 1 and '1.2.3' in html
    assert '<h3>neck</h3>' in html and good.name not in html   # as in the submission


def test_as_a_module():
    "`accelerate launch -m cspine.cli` and the like need it"
    done = subprocess.run([sys.executable, '-m', 'cspine.cli', 'train', 'nothing'], capture_output=True, text=True)
    assert done.returncode == 2 and 'nothing' in done.stderr
