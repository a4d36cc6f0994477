"A notebook as a page: nbdev resolves what is hidden, documented and linked; `show_doc` becomes an anchor, a signature and a table"
import inspect, os, re, textwrap, warnings
from pathlib import Path
from execnb.nbio import read_nb
from fastcore.docments import DocmentTbl
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.frontmatter import FrontmatterProc
from nbdev.processors import FilterDefaults, add_fold, clean_show_doc, exec_show_docs, insert_warning
from nbdev.showdoc import BasicMarkdownRenderer

TAGS = {'#| echo: false':'remove-input', '#| output: false':'remove-output', '#| code-fold: true':'hide-input'} # Quarto's -> MyST-NB's

class ApiDoc(BasicMarkdownRenderer):
    "What `show_doc` puts on a page"
    def _sig(self):
        ps = [p.replace(annotation=p.empty) for p in self.sig.parameters.values() if p.name!='self']
        return textwrap.fill(f'{self.nm}{inspect.Signature(ps)}', 90, subsequent_indent='    ', break_long_words=False, break_on_hyphens=False)

    def _table(self):
        tbl = DocmentTbl(self.sym)._repr_markdown_().replace('| NoneType |', '|  |')
        return re.sub(r'^\| (\w+) \|', r'| `` \1 `` |', tbl, flags=re.M)   # double backticks: not a link

    def _repr_markdown_(self):
        src = NbdevLookup().code(self.fn)
        title = re.sub('([_*])', r'\\\1', self.nm)
        parts = [f'<span id="{self.nm.lower()}"></span>', f'### {title}', src and f'<a class="source" href="{src}">source</a>',
                 self.sig and f'```python\n{self._sig()}\n```', self.docs, self.sig and self._table()]
        return '\n\n'.join(filter(None, parts))

def doc_cell(cell):
    "Put what `show_doc` returned into the text of the page"
    if cell.cell_type!='code' or not cell.source.startswith('show_doc('): return
    md = ''.join(''.join(o.data['text/markdown']) for o in cell.outputs if 'data' in o)
    cell.cell_type,cell.source,cell.outputs = 'markdown',md,[]

def tag_cell(cell):
    "Obey and drop the directives that are left"
    if cell.cell_type!='code': return
    cell.metadata['tags'] = [t for d,t in TAGS.items() if d in cell.source]
    cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()

class PageProcs(FilterDefaults):
    "nbdev's processors, without those that prepare for Quarto"
    def base_procs(self):
        procs = [p for p in super().base_procs() if p not in (FrontmatterProc, insert_warning, clean_show_doc, add_fold)]
        procs.insert(procs.index(exec_show_docs)+1, doc_cell)
        return procs + [tag_cell]

def page(path):
    "The notebook at `path`, as a page"
    os.environ['IN_TEST'] = '1'
    warnings.filterwarnings('ignore', 'Found cells containing imports')
    get_config()['renderer'] = f'{__name__}.ApiDoc'
    nb = read_nb(path)
    try: PageProcs()(nb)
    except Exception as e: e.add_note(f'while making a page of {path}'); raise
    return nb
