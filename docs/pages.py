"A notebook as a page: nbdev resolves what is hidden, documented and linked; `show_doc` becomes an anchor, a signature and a table"
import ast, inspect, os, re, textwrap, warnings
from pathlib import Path
from execnb.nbio import read_nb
from fastcore.docments import DocmentTbl
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.frontmatter import FrontmatterProc
from nbdev.processors import FilterDefaults, add_fold, clean_show_doc, exec_show_docs, insert_warning, _show_docs
from nbdev.showdoc import BasicMarkdownRenderer

TAGS = {'#| echo: false':'remove-input', '#| output: false':'remove-output', '#| code-fold: true':'hide-input'} # Quarto's -> MyST-NB's

class ApiDoc(BasicMarkdownRenderer):
    "What `show_doc` puts on a page"
    def _sig(self):
        ps = [p.replace(annotation=p.empty) for p in self.sig.parameters.values() if p.name!='self']
        sig = re.sub(r"<(?:class|function) '?([\w.]+)[^>]*>", r'\1', f'{self.nm}{inspect.Signature(ps)}')      # as one writes it
        return textwrap.fill(sig, 90, subsequent_indent='    ', break_long_words=False, break_on_hyphens=False)

    def _table(self):
        tbl = DocmentTbl(self.sym)._repr_markdown_().replace('| NoneType |', '|  |')
        return re.sub(r'^\| (\w+) \|', r'| `` \1 `` |', tbl, flags=re.M)   # double backticks: not a link

    def _repr_markdown_(self):
        src = NbdevLookup().code(self.fn)
        title = re.sub('([_*])', r'\\\1', self.nm)
        parts = [f'<span id="{self.nm.lower()}"></span>', f'### {title}', src and f'<a class="source" href="{src}">source</a>',
                 self.sig and f'```python\n{self._sig()}\n```', self.docs, self.sig and self._table()]
        return '\n\n'.join(filter(None, parts))

class exec_imports(exec_show_docs):
    "Executes what is exported and shown; of all other cells only the imports at their start"
    def __call__(self, cell):
        trees = cell.parsed_() if cell.cell_type=='code' and hasattr(self, 'k') else None
        if not trees or cell.directives_.keys() & {'export', 'exec_doc'} or _show_docs(trees): return super().__call__(cell)
        if self.nb.has_docs_: self.k.run_cell('\n'.join(ast.unparse(t) for t in trees if isinstance(t, (ast.Import, ast.ImportFrom))))

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
        i = procs.index(exec_show_docs)
        return [*procs[:i], exec_imports, doc_cell, *procs[i+1:], tag_cell]

def page(path):
    "The notebook at `path`, as a page"
    os.environ['IN_TEST'] = '1'
    get_config()['renderer'] = f'{__name__}.ApiDoc'
    nb = read_nb(path)
    try: PageProcs()(nb)
    except Exception as e: e.add_note(f'while making a page of {path}'); raise
    return nb
