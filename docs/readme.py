"Write `README.md` from `nbs/index.ipynb`"
import re, nbformat
from pathlib import Path
from execnb.nbio import nb2str
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from pages import page

def readme():
    "The front page as GitHub shows it: outputs as text, links relative to the repository"
    nb = nbformat.reads(nb2str(page(get_config().nbs_path/'index.ipynb')), as_version=4)
    nb.metadata['language_info'] = {'name':'python'}
    for data in [o.get('data', {}) for c in nb.cells for o in c.get('outputs', [])]:
        if 'image/png' in data: raise ValueError('index.ipynb: a picture must be a file, ![what it shows](images/name.png)')
        data.pop('text/html', None)
    md,_ = MarkdownExporter().from_notebook_node(nb)
    return re.sub('\n{3,}', '\n\n', re.sub(r'(\]\()(?!\w+:|#)', r'\1nbs/', md)).strip()+'\n'

if __name__=='__main__': Path('README.md').write_text(readme(), encoding='utf-8')
