"""Distributed training of sparse autoencoders on language-model activations.

In a notebook: `run = dist_sae.open_run("work/runs/quickstart")`. Names are imported on first use,
so that `import dist_sae` is fast. Their types are in `__init__.pyi`.
"""

from importlib import import_module

__version__ = "0.1.0"

_MODULES = {
    "DistSaeError": "dist_sae.errors",
    "OpenedRun": "dist_sae.notebook.run",
    "RawDictionary": "dist_sae.notebook.dictionary",
    "RowBatch": "dist_sae.notebook.rows",
    "RowText": "dist_sae.notebook.texts",
    "SparseCodes": "dist_sae.notebook.codes",
    "TokenLatents": "dist_sae.notebook.texts",
    "open_run": "dist_sae.notebook.run",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
