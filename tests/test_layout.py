"""The rules of the house: which room imports which, what is shipped, how long things grow."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tessel
from tessel.train import engine

ROOT = Path(tessel.__file__).parent
FLOORS = ["kernels", "blocks", "zoo", "train"]  # each imports from those before it
ASIDE = "checkpoints"  # imports no room; zoo and train read it
SOURCES = sorted(p for room in [*FLOORS, ASIDE] for p in (ROOT / room).rglob("*.py"))
TRAIN = ROOT / "train"
SOFT_LINES, HARD_LINES, TRITON_LINES, FUNCTION_LINES = 300, 500, 700, 60


def imported_rooms(path: Path, depth: int) -> set[str]:
    """Rooms of this package that a file imports; depth: of its folder below the package."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > depth:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            rooms |= {name.split(".")[0] for name in names if name}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None) or ""
            names = [module] if module else [alias.name for alias in node.names]
            absolute = getattr(node, "level", 0) == 0
            assert not (absolute and any(n.split(".")[0] == "tessel" for n in names)), f"{path}: import relatively"
    return rooms


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    room, *inner = path.relative_to(ROOT).parts
    allowed = {ASIDE, *FLOORS[: FLOORS.index(room)]} if room in FLOORS else set()
    if room in ("kernels", "blocks"):
        allowed -= {ASIDE}
    assert imported_rooms(path, len(inner)) <= allowed


def test_the_walk_sees_arrows_that_run_back(tmp_path):
    (tmp_path / "bad.py").write_text("from ..train import engine\nfrom .. import zoo\n")
    assert imported_rooms(tmp_path / "bad.py", 1) == {"train", "zoo"}


def test_package_list_equals_the_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {"tessel"} | {
        "tessel." + ".".join(p.parent.relative_to(ROOT).parts)
        for room in [*FLOORS, ASIDE]
        for p in (ROOT / room).rglob("__init__.py")
    }
    assert set(settings["packages"]) == on_disk | {"tessel.configs"}
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_the_root_holds_a_docstring_and_the_version():
    statements = [type(node).__name__ for node in ast.parse((ROOT / "__init__.py").read_text()).body]
    assert statements == ["Expr", "Assign"]


def test_kernels_need_only_torch():
    unwanted = "timm, torchvision, matplotlib, sklearn, pydantic, yaml"
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {unwanted.split(", ")}:
            raise ImportError(name + " is not needed here")
sys.meta_path.insert(0, Refuse())
import tessel.kernels
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_zoo_costs_little_more_than_timm():
    """Import times are noisy: count what is imported instead, and leave seconds to benchmarks/import_time.py."""
    code = """
import sys, timm
before = set(sys.modules)
import tessel.zoo
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(",".join(sorted(new - {"tessel"})))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    heavy = {"sklearn", "scipy", "matplotlib", "pydantic", "wandb", "tensorboard", "rich", "torchmetrics", "pandas"}
    assert not heavy & set(run.stdout.strip().split(","))


def test_sizes(capsys):
    """Print what outgrows the soft limits; refuse what outgrows the hard ones."""
    too_long, long_functions = [], []
    for path in SOURCES:
        lines = path.read_text().splitlines()
        hard = TRITON_LINES if path.stem.endswith("_triton") else HARD_LINES
        if len(lines) > SOFT_LINES:
            too_long.append((len(lines), hard, path.relative_to(ROOT)))
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    long_functions.append((length, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
    with capsys.disabled():
        for count, _, path in too_long:
            print(f"\n  {path}: {count} lines", end="")
        for length, where in long_functions:
            print(f"\n  {where}: {length} lines", end="")
    assert not [entry for entry in too_long if entry[0] > entry[1]]


def test_engine_is_short_and_knows_no_task():
    source = (TRAIN / "engine.py").read_text()
    assert not re.search("segment|detect|classif", source, re.IGNORECASE)
    assert len(source.splitlines()) < 250
    for verb in ("step", "evaluate", "save", "log"):
        assert callable(getattr(engine.Engine, verb))


def test_models_are_reached_through_timm_alone():
    apart = {"backbones.py", "explain.py", "mmseg.py"}  # dense backbones, mixers, another framework
    for path in {*TRAIN.glob("*.py")} - {TRAIN / name for name in apart}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert node.module is None and {name.name for name in node.names} <= {"zoo", "__version__"}, path
