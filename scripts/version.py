"""Copy settings.ini's version into cspine/__init__.py, where nbdev and `cspine.__version__` look for it."""
from configparser import ConfigParser
from pathlib import Path

from nbdev.config import set_version

root = Path(__file__).resolve().parents[1]
settings = ConfigParser(delimiters=['='], interpolation=None)
settings.read(root / 'settings.ini', encoding='utf-8')
set_version(root / 'cspine', settings['package']['version'])
