"Pages of the site: formulas, words for pictures, fields of tuples; the checks of the build find what they are there for"
import sys, pytest
from pathlib import Path
from types import SimpleNamespace as NS
from bs4 import BeautifulSoup
from execnb.nbio import read_nb
from nbdev.doclinks import nbglob

sys.path.insert(0, str(Path(__file__).parent.parent/'docs'))
from build import text_faults
from pages import _class_source, derived_alt, math_cell, picture_alts

@pytest.mark.parametrize('given, made', [
    ('text\n$$a$$', 'text\n\n$$a$$'), ('$$a$$\ntext', '$$a$$\n\ntext'), ('text\n$$\na\nb\n$$\nmore', 'text\n\n$$\na\nb\n$$\n\nmore'),
    ('text\n\n$$a$$\n\nmore', 'text\n\n$$a$$\n\nmore'), ('in $a$ line', 'in $a$ line'), ('text\n$$a$$.', 'text\n\n$$a.$$'),
    ('```\nx\n$$a$$\n```', '```\nx\n$$a$$\n```')])
def test_display_math(given, made):
    "Display math stands in a paragraph of its own, and code is left alone"
    cell = NS(cell_type='markdown', source=given)
    for _ in range(2): math_cell(cell); assert cell.source==made

@pytest.mark.parametrize('html, n', [
    ('<p>costs $x$</p>', 1), ('<p>the \\alpha of it</p>', 1), ('<li>a $ b</li>', 1), ('<p><code>$HOME \\alpha</code></p>', 0), ('<p><math>$</math> fine</p>', 0),
    ('<img src="a" alt="">', 1), ('<img src="a">', 1), ('<img src="a" alt="_images/0123456789abcdef0123.png">', 1), ('<img src="a" alt="alpha by depth">', 0)])
def test_faults(html, n):
    soup = BeautifulSoup(f'<article>{html}</article>', 'html.parser')
    assert len([*text_faults(Path('a.html'), soup)])==n

def test_derived_alt():
    assert derived_alt("plot_depth(df, metric='D');")=='metric of each layer, from input to output. Shown: D'
    assert derived_alt("ax.set(xlabel='epoch', ylabel='$\\\\alpha$')")=='Shown: epoch, alpha'
    assert derived_alt('draw()', 'The words before it')=='Picture of: The words before it'

@pytest.mark.parametrize('nb', sorted(nbglob()), ids=lambda p: p.rsplit('nbs/')[-1])
def test_every_picture(nb):
    "Every picture of every page has words"
    cells = read_nb(nb)
    picture_alts(cells)
    for c in cells.cells:
        if c.cell_type=='code' and any(k.startswith('image/') for o in c.outputs for k in o.get('data', {})):
            assert len(c.metadata['mystnb']['image']['alt'])>8, c.source

def test_class_source():
    assert any('Kolmogorov' in l for l in _class_source('TailFit')) and not _class_source('NoSuchClass')
