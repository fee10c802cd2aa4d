"""Without the package an integration names the extra to install; without any, torch is enough."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("package", ["timm", "lightning", "transformers"])
def test_a_missing_package_names_the_extra(package: str) -> None:
    said = run(
        f"""
import sys
sys.modules[{package!r}] = None
try:
    import dkl.integrations.{package}
except ImportError as error:
    print(error)
"""
    )
    assert f'pip install "dkl[{package}]"' in said


def test_the_loss_itself_needs_torch_alone() -> None:
    code = """
import sys, dkl.integrations.distillation
print({name.partition(".")[0] for name in sys.modules} & {"timm", "lightning", "transformers"})
"""
    assert run(code).strip() == "set()"
