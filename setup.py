"""Builds both packages from settings.ini, the one place that states the package's facts."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=['='], interpolation=None)
settings.read(Path(__file__).with_name('settings.ini'), encoding='utf-8')
package = settings['package']


def lines(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


extras = {name: lines(text) for name, text in settings['extras'].items()}
extras['all'] = sorted({r for name, rs in extras.items() if name not in ('dev', 'bench') for r in rs})

setup(
    name=package['name'],
    version=package['version'],
    description=package['description'],
    author=package['author'],
    license_expression=package['license'],
    keywords=[k.strip() for k in package['keywords'].split(',')],
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    python_requires=package['python'],
    install_requires=lines(package['requirements']),
    extras_require=extras,
    packages=find_packages(include=['cspine', 'cspine.*'])
             + find_packages('submission', include=['cspine_submission', 'cspine_submission.*']),
    package_dir={'cspine_submission': 'submission/cspine_submission'},
    include_package_data=False,     # MANIFEST.in is for the source distribution
    package_data={'cspine': ['demo_bundle/*']},
    entry_points={'console_scripts': lines(package['console_scripts'])},
    zip_safe=False,
)
