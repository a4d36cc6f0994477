"A notebook as a page: nbdev resolves what is hidden, documented and linked; `show_doc` becomes an anchor, a signature and a table"
import ast, importlib, inspect, os, re, textwrap, warnings
from pathlib import Path
from execnb.nbio import read_nb
from fastcore.docments import DocmentTbl
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.frontmatter import FrontmatterProc
from nbdev.processors import FilterDefaults, add_fold, clean_show_doc, exec_show_docs, insert_warning, _show_docs
from nbdev.showdoc import BasicMarkdownRenderer

TAGS = {'#| echo: false':'remove-input', '#| output: false':'remove-output', '#| code-fold: true':'hide-input'} # Quarto's -> MyST-NB's

def _library(): return importlib.import_module(f'{get_config().lib_name}.all')

def _class_source(name):
    "The lines of a class of the library; one that a notebook has just defined has no source of its own"
    for path in get_config().lib_path.glob('*.py'):
        text = path.read_text(encoding='utf-8')
        for o in ast.parse(text).body:
            if isinstance(o, ast.ClassDef) and o.name==name: return text.split('\n')[o.lineno:o.end_lineno]
    return []

class ApiDoc(BasicMarkdownRenderer):
    "What `show_doc` puts on a page"
    def _sig(self):
        ps = [p.replace(annotation=p.empty) for p in self.sig.parameters.values() if p.name!='self']
        sig = re.sub(r"<(?:class|function) '?([\w.]+)[^>]*>", r'\1', f'{self.nm}{inspect.Signature(ps)}')      # as one writes it
        return textwrap.fill(sig, 90, subsequent_indent='    ', break_long_words=False, break_on_hyphens=False)

    def _table(self):
        tbl = DocmentTbl(self.sym)._repr_markdown_().replace('| NoneType |', '|  |')
        tbl = re.sub(r'^\|  \|', '| Parameter |', tbl)                        # a column without a name is none to a screen reader
        return re.sub(r'^\| (\w+) \|', lambda m: m[0] if m[1]=='Parameter' else f'| `` {m[1]} `` |', tbl, flags=re.M)   # double backticks: not a link

    def _fields(self):
        "The fields of a NamedTuple, which explains them by the comments beside them"
        if not (inspect.isclass(self.sym) and issubclass(self.sym, tuple) and hasattr(self.sym, '_fields')): return
        types, notes = self.sym.__annotations__, {}
        for line in _class_source(self.sym.__name__):
            if m := re.match(r'\s+(\w+)\s*:.*?#\s*(.+)$', line): notes[m[1]] = m[2]
        rows = [f"| `` {f} `` | {getattr(types.get(f), '__name__', types.get(f, ''))} | {notes.get(f, '')} |" for f in self.sym._fields]
        return '\n'.join(['| Field | Type | Details |', '|---|---|---|', *rows])

    def _repr_markdown_(self):
        src = NbdevLookup().code(self.fn)
        title = re.sub('([_*])', r'\\\1', self.nm)
        parts = [f'<span id="{self.nm.lower()}"></span>', f'### {title}', src and f'<a class="source" href="{src}">source</a>',
                 self.sig and f'```python\n{self._sig()}\n```', self.docs, self._fields() or self.sig and self._table()]
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

def math_cell(cell):
    "Display math is a paragraph of its own, also where the notebook has it directly below or above a line of text"
    if cell.cell_type!='markdown': return
    parts = re.split(r'(^(?:```|~~~).*?^(?:```|~~~)[^\n]*$)', cell.source, flags=re.M|re.S)  # code stays as it is
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r'^([ \t]*)\$\$(.+?)\$\$[ \t]*([.,;:]?)[ \t]*$', r'\n\1$$\2\3$$\n', parts[i], flags=re.M|re.S)
    cell.source = re.sub(r'\n{3,}', '\n\n', ''.join(parts)).strip('\n')

def _first_line(name):
    "The first line of the docstring of a public function of the library"
    return (inspect.getdoc(getattr(_library(), name, None)) or '').split('\n')[0].strip(' .').replace('`', '')

def _strings(tree, *keys):
    "The texts given to arguments of these names"
    return [k.value.value for c in ast.walk(tree) if isinstance(c, ast.Call) for k in c.keywords
            if k.arg in keys and isinstance(k.value, ast.Constant) and isinstance(k.value.value, str)]

def derived_alt(source, before=''):
    "What a picture shows, as far as its code tells: the plotting function, titles and names of axes, else the words before it"
    try: tree = ast.parse(re.sub(r'^[%!].*$', '', source, flags=re.M))
    except SyntaxError: tree = ast.parse('')
    calls = [getattr(c.func, 'attr', getattr(c.func, 'id', '')) for c in ast.walk(tree) if isinstance(c, ast.Call)]
    known = [d for n in dict.fromkeys(calls) if n.startswith('plot_') and (d := _first_line(n))]
    words = _strings(tree, 'title', 'xlabel', 'ylabel', 'label', 'metric', 'value')
    text = '. '.join([*known, *([f'Shown: {", ".join(dict.fromkeys(words))}'] if words else [])])
    return re.sub(r'[$\\{}"\n]', '', text or f'Picture of: {before}')[:300].strip()

def _directive(source, name):
    m = re.search(rf'^#\|\s*{name}:\s*(.+)$', source, re.M)
    return m[1].strip() if m else ''

def picture_alts(nb):
    "Each picture gets the words of `#| fig-alt`, else of `#| fig-cap`, else those derived from its code"
    before = ''
    for cell in nb.cells:
        if cell.cell_type=='markdown':
            prose = [l for l in cell.source.split('\n') if l.strip() and not l.startswith(('|', '```', '<', '$$'))]
            if prose: before = re.sub(r'[#>*`_]|\]\(.*?\)|\[', '', prose[-1]).strip()
            continue
        if cell.cell_type!='code' or not any(k.startswith('image/') for o in cell.outputs for k in o.get('data', {})): continue
        cap = _directive(cell.source, 'fig-cap')
        alt = _directive(cell.source, 'fig-alt') or cap or derived_alt(cell.source, before)
        cell.metadata['mystnb'] = {'image': {'alt': alt}} | ({'figure': {'caption': cap}} if cap else {})

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
        return [*procs[:i], exec_imports, doc_cell, *procs[i+1:], math_cell, tag_cell]

def page(path):
    "The notebook at `path`, as a page"
    os.environ['IN_TEST'] = '1'
    get_config()['renderer'] = f'{__name__}.ApiDoc'
    nb = read_nb(path)
    picture_alts(nb)
    try: PageProcs()(nb)
    except Exception as e: e.add_note(f'while making a page of {path}'); raise
    return nb
