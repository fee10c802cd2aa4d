"""The rules of the house that can be checked by reading the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dkl

PACKAGE = Path(dkl.__file__).parent
ROOT = PACKAGE.parents[1]
MODULES = sorted(PACKAGE.rglob("*.py"))

# Own modules that each module may import, besides its own folder.
ARROWS: dict[str, set[str]] = {
    "losses": set(),
    "attacks": set(),
    "models": set(),
    "data": set(),
    "reports": set(),
    "recipes": set(),
    "config": {"recipes"},
    "methods": {"losses", "attacks"},
    "evaluation": {"attacks"},
    "engine": {"methods.protocol"},
    "integrations": {"losses"},
    "build": {
        "attacks",
        "config",
        "data",
        "engine",
        "evaluation",
        "losses",
        "methods",
        "models",
        "reports",
    },
    "bench": {
        "attacks",
        "build",
        "config",
        "data",
        "engine",
        "evaluation",
        "losses",
        "methods",
        "models",
        "reports",
    },
    "cli": {"bench", "build", "config", "reports"},
    "__init__": {"losses", "build"},
    "__main__": {"cli"},
}

PUBLIC_NAMES = {
    "ClassStatistics",
    "DKLLoss",
    "DecoupledParts",
    "GKLLoss",
    "IKLLoss",
    "JSDLoss",
    "KLLoss",
    "ReverseKLLoss",
    "decoupled_kl_loss",
    "dkl_loss",
    "from_authors",
    "gkl_loss",
    "ikl_loss",
    "jsd_loss",
    "kl_loss",
    "linear_ikl_loss",
    "linear_top_k_ikl_loss",
    "reverse_kl_loss",
    "top_k_ikl_loss",
    "train",
}


def place(path: Path) -> str:
    """Return the row of the table that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_imports(path: Path) -> set[str]:
    """Return dotted names of our own modules that a file imports, without the leading package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dkl":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dkl."):
            found.add(str(node.module).removeprefix("dkl."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("dkl.") for a in node.names if a.name.startswith("dkl.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    own = place(path)
    for name in own_imports(path):
        if name in ("__version__",) or name.split(".")[0] == own:
            continue
        allowed = ARROWS[own]
        assert name in allowed or name.split(".")[0] in allowed, f"{own} may not import dkl.{name}"


def test_only_the_engine_imports_accelerate() -> None:
    for path in MODULES:
        names = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        uses = any(str(name).split(".")[0] == "accelerate" for name in names)
        assert not uses or place(path) == "engine", path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert text.isascii()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.body:
            # The docstring does not count: it is there to be long enough.
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            length = (node.end_lineno or 0) - first.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def test_public_names_are_frozen() -> None:
    assert set(dkl.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(dkl, name).__doc__, f"dkl.{name} has no docstring"


def test_every_public_name_is_in_the_readme_or_docs() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    missing = [name for name in PUBLIC_NAMES if f"{name}" not in text]
    assert not missing


def modules_after(statement: str) -> set[str]:
    code = f"import sys, {statement}; print(sorted({{n.split('.')[0] for n in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(done.stdout))


def test_import_loads_torch_alone() -> None:
    assert modules_after("dkl") - modules_after("torch") <= {"dkl"}


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'dlk_loss'"):
        _ = dkl.dlk_loss
