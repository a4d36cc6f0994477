"Build the site in `_docs/`: notebooks -> `_proc/pages` -> Sphinx; links, formulas and pictures are checked before it is put there"
import copy, re, shutil, sys
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit
from bs4 import BeautifulSoup
from execnb.nbio import mk_cell, write_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from sphinx.cmd.build import main as sphinx
from pages import page

GROUPS = {'tutorials':'Tutorials', '0':'Measure', '1':'Data and models', '2':'Allocate', '3':'Prune', 'tools':'Tools'} # by first digit or folder
cfg = get_config()
site = f'{cfg.doc_host}{cfg.doc_baseurl}/'
work,out = Path('_proc'),Path('_docs')
src,html = work/'pages',work/'html'

def page_name(path): return path.with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', path.name.lower()))
def group(path): return GROUPS.get(path.parts[0] if len(path.parts)>1 else path.name[0], 'Tools')

def toctree(name, paths):
    "One group of the navigation, in the order of the notebooks"
    docs = '\n'.join(page_name(p).with_suffix('').as_posix() for p in paths if group(p)==name)
    return mk_cell(f'```{{toctree}}\n:hidden:\n:caption: {name}\n\n{docs}\n```', 'markdown')

def relink(md, anchors):
    "Links to notebooks lose the number; links to a member that has no entry lead to its class, or nowhere"
    def link(m):
        to = next((a for a in (m[2], re.sub(r'(#[^.]+)\..*', r'\1', m[2])) if a in anchors), None)
        return f'{m[1]}({site}{to})' if to else m[1][1:-1]
    md = re.sub(r'(\]\((?!\w+:)[^)\s]*?)\b\d+[a-z]?_(\w+\.ipynb)', r'\1\2', md)
    return re.sub(rf'(\[`[^`]+`\])\({re.escape(site)}([^)]+)\)', link, md)

def write_pages(nbs):
    "Each notebook in `nbs` as a page, and the pictures in `nbs/images`"
    shutil.rmtree(work, ignore_errors=True)
    src.mkdir(parents=True)
    if (nbs/'images').exists(): shutil.copytree(nbs/'images', src/'images')
    pages = {p.relative_to(nbs):page(p) for p in sorted(nbglob(nbs, as_path=True))}
    anchors = {f'{page_name(p).with_suffix(".html").as_posix()}#{a}' for p,nb in pages.items() for c in nb.cells
               if c.cell_type=='markdown' for a in re.findall('<span id="(.*?)">', c.source)}
    paths = [p for p in pages if p.name!='index.ipynb']
    for p,nb in pages.items():
        for c in nb.cells:
            if c.cell_type=='markdown': c.source = relink(c.source, anchors)
        if p.name=='index.ipynb': nb.cells += [toctree(g, paths) for g in dict.fromkeys(GROUPS.values()) if g in map(group, paths)]
        (src/p.parent).mkdir(parents=True, exist_ok=True)
        write_nb(nb, src/page_name(p))
    return len(pages)

def faults(path, soup, ids):
    "Links of the page at `path` that lead nowhere, and what it would load from the network"
    for o in soup.find_all(['a','img','link','script']):
        url,frag = urldefrag(o.get('href') or o.get('src') or '')
        parts = urlsplit(url)
        if parts.scheme or parts.netloc:
            if parts.netloc and o.name!='a': yield f'{path.name} loads {url} from the network'
            continue
        to = (path.parent/unquote(parts.path)).resolve() if url else path
        if not to.exists(): yield f'{path.name} links to {url}, which does not exist'
        elif frag and unquote(frag) not in ids.get(to, [frag]): yield f'{path.name} links to #{frag}, which {to.name} does not have'

def text_faults(path, soup):
    "TeX that became no formula, and pictures that say nothing to who cannot see them"
    for o in soup.select('article :is(p, li, td, th, dd, h1, h2, h3, h4)'):
        o = copy.copy(o)
        for skip in o.find_all(['code', 'pre', 'math', 'script']): skip.decompose()
        if m := re.search(r'.{0,30}(\$|\\[a-zA-Z]{2,}).{0,30}', o.get_text()): yield f'{path.name}: TeX is left in the text: {m[0]}'
    for o in soup.select('article img'):
        if re.fullmatch(r'|.*[0-9a-f]{16,}.*', o.get('alt', '')): yield f"{path.name}: a picture without words: {o.get('src')}"

def broken_links():
    soups = {p.resolve():BeautifulSoup(p.read_text(encoding='utf-8'), 'html.parser') for p in html.rglob('*.html')}
    ids = {p:{o['id'] for o in s.find_all(id=True)} for p,s in soups.items()}
    return sorted({f for p,s in soups.items() for f in [*faults(p, s, ids), *text_faults(p, s)]})

if __name__=='__main__':
    n = write_pages(cfg.nbs_path)
    args = ['-q', '-W', '--keep-going', '-c', str(Path(__file__).parent), '-d', str(work/'doctrees')]
    if sphinx([*args, str(src), str(html)]): sys.exit('Sphinx found the faults above')
    if found := broken_links(): sys.exit('\n'.join(found))
    (html/'.nojekyll').touch()
    shutil.rmtree(out, ignore_errors=True)
    html.rename(out)
    print(f'{n} pages: open {out}/index.html')
