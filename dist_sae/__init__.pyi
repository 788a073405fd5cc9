from dist_sae.errors import DistSaeError as DistSaeError
from dist_sae.notebook.codes import SparseCodes as SparseCodes
from dist_sae.notebook.dictionary import RawDictionary as RawDictionary
from dist_sae.notebook.rows import RowBatch as RowBatch
from dist_sae.notebook.run import OpenedRun as OpenedRun
from dist_sae.notebook.run import open_run as open_run
from dist_sae.notebook.texts import RowText as RowText
from dist_sae.notebook.texts import TokenLatents as TokenLatents

__version__: str
