"""The files of the package, and what importing it loads. `lint-imports` checks which subpackage imports which."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import tessel

ROOT = Path(tessel.__file__).parent
ROOMS = ["kernels", "blocks", "zoo", "checkpoints", "export", "train", "predict", "compare", "cli"]


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_package_list_equals_the_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {"tessel"} | {
        ".".join(("tessel", *path.parent.relative_to(ROOT).parts))
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert set(settings["packages"]) == on_disk | {"tessel.configs"}
    assert not (ROOT / "tests" / "__init__.py").exists()  # tests import `tessel.*`, never a second copy of it


def test_every_module_belongs_to_a_package():
    """A folder without `__init__.py` is missing from the wheel, and lint-imports does not see it."""
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_modules_import_their_own_package_relatively():
    """`import tessel.x` within the package would load a second copy where a checkout is imported by another name."""
    for path in [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            assert "tessel" not in {module.split(".")[0] for module in modules}, f"{path}:{node.lineno}"


def test_kernels_need_only_torch():
    in_a_new_process("""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"timm", "torchvision", "matplotlib", "sklearn", "pydantic", "yaml"}:
            raise ImportError(name + " must not be imported here")
sys.meta_path.insert(0, Refuse())
import tessel.kernels
""")


def test_importing_the_zoo_loads_nothing_heavy_besides_timm():
    """Counts what is imported, since import times are noisy; benchmarks/import_time.py measures the seconds."""
    new = in_a_new_process("""
import sys, timm
before = set(sys.modules)
import tessel.zoo
print(",".join({name.split(".")[0] for name in set(sys.modules) - before}))
""")
    heavy = {"sklearn", "scipy", "matplotlib", "pydantic", "wandb", "tensorboard", "rich", "pandas"}
    assert not heavy & set(new.split(","))


def test_importing_the_package_loads_no_subpackage():
    assert in_a_new_process("import sys, tessel; print([n for n in sys.modules if n.startswith('tessel.')])") == "[]"
