"""The core needs NumPy and the standard library, and nothing else."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import fedavg_core

ALLOWED = {"numpy", "fedavg_core"}


def foreign_imports(statement: str) -> set[str]:
    """The top-level packages, other than allowed ones, that a statement loads in a new process."""
    program = (
        "import sys, numpy\n"
        "before = set(sys.modules)\n"  # what the interpreter and NumPy themselves load
        f"{statement}\n"
        "loaded = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*sorted(loaded - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split()) - ALLOWED


def test_the_core_imports_nothing_but_numpy_and_the_standard_library() -> None:
    package = Path(fedavg_core.__file__).parent
    modules = [
        ".".join(("fedavg_core", *path.relative_to(package).with_suffix("").parts))
        for path in sorted(package.rglob("*.py"))
        if path.name not in ("__init__.py", "__main__.py")
    ]
    assert "fedavg_core.exact.exact_sum" in modules
    assert foreign_imports("import fedavg_core, " + ", ".join(modules)) == set()


def test_a_training_file_that_nvflare_runs_does_not_load_the_command_line() -> None:
    program = "import sys, nvflare_adapter; print('fedavg_core.cli' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_foreign_import_would_be_noticed() -> None:
    assert "ml_dtypes" in foreign_imports("import fedavg_core, ml_dtypes")
    assert foreign_imports("import json, numpy") == set()


def test_no_name_of_a_package_hides_a_module_of_it() -> None:
    package = Path(fedavg_core.__file__).parent
    for folder in (package, *(path.parent for path in package.rglob("*/__init__.py"))):
        name = ".".join(("fedavg_core", *folder.relative_to(package).parts))
        owner = importlib.import_module(name)
        for path in folder.glob("*.py"):
            if path.stem in ("__init__", "__main__"):
                continue
            importlib.import_module(f"{name}.{path.stem}")
            assert isinstance(getattr(owner, path.stem), ModuleType), f"{name}.{path.stem}"
