"""What `cost.py` calls of each library: one file per library, one set of cells per row of the table."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

from cost_peers.base import failure

#: Files of this folder, in the order of the table, and what each is called on PyPI.
LIBRARIES = {
    "ours": "kronfac",
    "first_order": "torch",
    "curvlinops_side": "curvlinops-for-pytorch",
    "asdl_side": "asdfghjkl",
    "nngeometry_side": "nngeometry",
    "backpack_side": "backpack-for-pytorch",
    "kronfluence_side": "kronfluence",
    "singd_side": "singd",
    "pytorch_optimizer_side": "pytorch_optimizer",
}


def load(library: str) -> ModuleType | str:
    """Import one library's file.

    Args:
        library: A name in :data:`LIBRARIES`.

    Returns:
        Its module with ``ROWS`` and ``EVERYTHING``, or why there is none.
    """
    try:
        return importlib.import_module(f"cost_peers.{library}")
    except Exception as error:  # a peer may raise anything at all when it is imported
        return failure(error)


def version(library: str) -> str:
    """Return the version that is installed, or nothing."""
    try:
        return importlib.metadata.version(LIBRARIES[library])
    except importlib.metadata.PackageNotFoundError:
        return ""
