"""The repository holds together: notebooks and library, README and index, facts stated once."""
import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:     # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
settings = ConfigParser(delimiters=['='], interpolation=None)
settings.read(ROOT / 'settings.ini', encoding='utf-8')
PACKAGE = settings['package']
EXTRAS = {name: text.split() for name, text in settings['extras'].items()}


def run(*args, cwd=ROOT, **env):
    return subprocess.run([str(a) for a in args], cwd=cwd, env={**os.environ, **env}, text=True, capture_output=True)


def tracked():
    listed = run('git', 'ls-files', '-z')
    assert listed.returncode == 0, listed.stderr
    return [ROOT / f for f in listed.stdout.split('\0') if f and (ROOT / f).exists()]


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """The project's files without what was built from them."""
    out = tmp_path_factory.mktemp('copy')
    for name in ('cspine', 'nbs', 'submission'):
        shutil.copytree(ROOT / name, out / name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE', 'MANIFEST.in'):
        shutil.copy(ROOT / name, out)
    return out


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob('*'))
            if f.is_file() and '__pycache__' not in f.parts}


def test_export_changes_nothing(copy):
    before = contents(copy)
    done = run(Path(sys.executable).with_name('nbdev-export'), cwd=copy)
    assert done.returncode == 0, done.stdout + done.stderr
    after = contents(copy)
    changed = [f for f in sorted({*before, *after}) if before.get(f) != after.get(f)]
    assert not changed, f'notebook and library are out of step, run `make export`: {changed}'


def test_every_module_comes_from_a_notebook():
    for f in (ROOT / 'cspine').glob('*.py'):
        if f.name not in ('__init__.py', '_modidx.py'):
            source = re.search(r'File to edit: \.\./(nbs/\S+\.ipynb)', f.read_text(encoding='utf-8'))
            assert source and (ROOT / source[1]).exists(), f'{f.name} has no notebook'


def test_readme_in_step():
    done = run(sys.executable, 'scripts/readme.py', '--check')
    assert done.returncode == 0, done.stderr


def test_readme_links_lead_somewhere():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    links = [t for t in re.findall(r'\]\(([^)\s#]+)\)', text) if '://' not in t]
    assert len(links) > 10
    assert not [t for t in links if not (ROOT / t).exists()]


def test_index_lists_every_notebook():
    text = (ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8')
    assert not [p.name for p in NOTEBOOKS if p.stem != 'index' and f'[{p.stem}]({p.name})' not in text]


def test_version_in_step():
    init = (ROOT / 'cspine/__init__.py').read_text(encoding='utf-8')
    assert re.search(r'^__version__ = "(.+)"$', init, re.M)[1] == PACKAGE['version'], 'run `make export`'
    assert f'## {PACKAGE["version"]}\n' in (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')


def test_pyproject_states_no_fact_of_settings():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
    assert set(project) == {'name', 'dynamic'} and project['name'] == PACKAGE['name']


def canonical(requirement):
    return re.sub(r'[-_.]+', '-', re.match(r'[\w.-]+', requirement)[0]).lower()


@pytest.fixture(scope='module')
def wheel(copy, tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    done = run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', out, copy)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob('*.whl')))


def test_wheel_says_what_settings_say(wheel):
    info = next(n for n in wheel.namelist() if n.endswith('.dist-info/METADATA'))
    meta = message_from_bytes(wheel.read(info))
    assert meta['Version'] == PACKAGE['version'] and meta['Summary'] == PACKAGE['description']
    assert meta['License-Expression'] == PACKAGE['license']
    assert set(meta['Requires-Python'].split(',')) == set(PACKAGE['python'].split(','))
    base = {canonical(r) for r in meta.get_all('Requires-Dist') if 'extra ==' not in r}
    assert base == {canonical(r) for r in PACKAGE['requirements'].split()}
    assert {*meta.get_all('Provides-Extra')} == {*EXTRAS, 'all'}
    in_all = {canonical(r) for r in meta.get_all('Requires-Dist') if re.search(r'extra == "all"', r)}
    assert in_all == {canonical(r) for name, rs in EXTRAS.items() if name not in ('dev', 'bench') for r in rs}


def test_wheel_holds_both_packages_and_the_demo_bundle(wheel, copy):
    names = set(wheel.namelist())
    assert {'cspine/cli.py', 'cspine/windowing.py', 'cspine_submission/__init__.py', 'cspine/demo_bundle/bundle.json'} <= names
    assert not [n for n in names if n.startswith(('nbs', 'tests', 'submission/'))]
    for f in (copy / 'cspine').rglob('*'):
        if f.is_file() and '__pycache__' not in f.parts:
            assert f.relative_to(copy).as_posix() in names


def imports(path, at_import):
    """Packages that a module imports, anywhere or when it is itself imported."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.split('.')[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split('.')[0]


@pytest.mark.parametrize('at_import', [True, False])
def test_every_import_is_a_requirement(at_import):
    """What the library imports, it asks for; and what it imports at once, it asks for without an extra."""
    declared = {canonical(r) for r in PACKAGE['requirements'].split()}
    if not at_import:
        declared |= {canonical(r) for name, rs in EXTRAS.items() if name not in ('dev', 'bench') for r in rs}
    owners = {'sklearn': ['scikit-learn']} | dict(importlib.metadata.packages_distributions())   # Python 3.10 does not know all
    lost = {}
    for f in [*(ROOT / 'cspine').glob('*.py'), *(ROOT / 'submission').rglob('*.py')]:
        for name in set(imports(f, at_import)) - set(sys.stdlib_module_names) - {'cspine', 'cspine_submission'}:
            if not {canonical(d) for d in owners.get(name, [name])} & declared:
                lost.setdefault(name, []).append(f.name)
    assert not lost, f'imported, but in no requirement of settings.ini: {lost}'


def test_nothing_large_is_tracked():
    big = [f.relative_to(ROOT).as_posix() for f in tracked() if f.stat().st_size > 1_000_000]
    assert not [f for f in big if not f.startswith('cspine/demo_bundle/')]


def test_demo_bundle_is_small():
    files = list((ROOT / 'cspine/demo_bundle').iterdir())
    assert files and sum(f.stat().st_size for f in files) <= 20_000_000


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    text = path.read_text(encoding='utf-8')
    here = {str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir() + '/'} - {'/'}
    assert not [p for p in here if p in text] and not re.search(r'"[^"]*/(home|Users)/\w', text)
    for cell in nb['cells']:
        assert cell.get('execution_count') is None
        for out in cell.get('outputs', []):
            assert set(out.get('data', {})) == {'image/png'}, 'only pictures stay in a notebook: nbdev-clean'


LIGHT = ('version', 'presets', 'dicom', 'windowing', 'rsna', 'anatomy', 'dataset', 'fractures', 'neck', 'phantom', 'ordering', 'kernels', 'wheels', 'cli')


@pytest.mark.parametrize('module', LIGHT)
def test_imports_without_torch(module):
    code = f'import sys, cspine.{module}; sys.exit(",".join({{"torch", "fastai", "timm", "albumentations"}} & set(sys.modules)) or 0)'
    done = run(sys.executable, '-c', code)
    assert done.returncode == 0, f'cspine.{module} loads {done.stderr}'


def test_windowing_imports_at_once():
    # the processor's time: on an idle machine the wall's, and a busy one should not fail the test
    code = 'import time; t = time.process_time(); import cspine.windowing; print(time.process_time() - t)'
    best = min(float(run(sys.executable, '-c', code).stdout) for _ in range(5))
    assert best < 0.3, f'{best:.2f} s'


def test_plain_python_passes_ruff():
    done = run(Path(sys.executable).with_name('ruff'), 'check', '--no-cache', '.')
    assert done.returncode == 0, done.stdout
