"""Modules whose library is not installed are left out, and by no other reason."""

from importlib.util import find_spec

_LIBRARIES = {"timm": "timm", "lightning": "lightning", "transformers": "transformers"}

collect_ignore = [
    f"src/dkl/integrations/{module}.py"
    for module, library in _LIBRARIES.items()
    if find_spec(library) is None
]
