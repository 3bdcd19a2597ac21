"""README.md from nbs/index.ipynb. `--check` only says whether they are in step (exit 1 if not)."""
import re
import sys
from pathlib import Path
from posixpath import normpath

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTE = '<!-- Made from nbs/index.ipynb by scripts/readme.py: edit the notebook, then run `make export`. -->\n\n'


def from_root(match):
    """A link that is relative to nbs/, made relative to the repository."""
    target = match[1]
    if re.match(r'[a-z]+:|#', target):
        return match[0]
    return f']({normpath("nbs/" + target)})'


def readme(notebook=ROOT / 'nbs/index.ipynb'):
    nb = nbformat.read(notebook, as_version=4)
    nb.cells = [c for c in nb.cells if not c.source.startswith('#| hide')]
    nb.metadata.language_info = {'name': 'python'}
    text, _ = MarkdownExporter(exclude_output=True).from_notebook_node(nb)
    return NOTE + re.sub(r'\]\(([^)\s]+)\)', from_root, text).strip() + '\n'


if __name__ == '__main__':
    path, new = ROOT / 'README.md', readme()
    if '--check' in sys.argv[1:]:
        if not path.exists() or path.read_text(encoding='utf-8') != new:
            sys.exit('README.md is not what nbs/index.ipynb makes; run `make export`')
    else:
        path.write_text(new, encoding='utf-8')
