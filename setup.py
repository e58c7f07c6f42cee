"What pip builds from: everything is in settings.ini; edit there, not here"
from configparser import ConfigParser
from pathlib import Path
import shlex, setuptools

here = Path(__file__).parent
settings = ConfigParser(delimiters=['='])
settings.read(here/'settings.ini', encoding='utf-8')
cfg = settings['DEFAULT']
lib = cfg['lib_path']

def words(key): return shlex.split(cfg.get(key, '')) # a requirement with a marker is quoted: "numpy>=2; python_version>='3.11'"

setuptools.setup(
    version=cfg['version'], license_expression=cfg['license'], keywords=cfg['keywords'], author=cfg['author'], author_email=cfg['author_email'],
    packages=setuptools.find_packages(include=[lib, f'{lib}.*']), package_data={lib: words('package_data')},
    install_requires=words('requirements'),
    extras_require={k.removesuffix('_requirements'): words(k) for k in cfg if k.endswith('_requirements')},
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    entry_points=dict(console_scripts=words('console_scripts'), nbdev=[f'{lib}={lib}._modidx:d']))
