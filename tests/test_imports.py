"""The walls between the rooms: who may import whom (design), walked over the real imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {"train", "sample", "evaluate", "compile", "benchmark", "sweep", "weights", "report"}
COMMANDS |= {"benchmark_diffusers", "goodput"}
ANYTHING = None

# room -> rooms of mmdit_jax that it may import (itself always). None: anything but a command.
MAY_IMPORT = {
    "mmdit_jax.command": {"hosts"},
    "mmdit_jax.config": {"ranges"},
    "mmdit_jax.presets": {"config"},
    "mmdit_jax.ranges": set(),
    "mmdit_jax.strict_json": set(),
    "mmdit_jax.files": set(),
    "mmdit_jax.page": {"files"},
    "mmdit_jax.mesh": set(),
    "mmdit_jax.sharding": {"mesh"},
    "mmdit_jax.overview": {"sharding"},
    "mmdit_jax.hosts": set(),
    "mmdit_jax.flow": set(),
    "mmdit_jax.models": {"sharding"},
    "mmdit_jax.encoders": {"sharding", "strict_json"},
    "mmdit_jax.data": {"sharding", "strict_json"},
    "mmdit_jax.scaling": {"config", "mesh", "files", "strict_json"},
    "mmdit_jax.interop": {"models", "encoders", "strict_json"},
    "mmdit_jax.training": {
        "config",
        "hosts",
        "ranges",
        "sharding",
        "strict_json",
        "flow",
        "models",
        "data",
    }
    | {"scaling.chips", "scaling.flops"},
    "mmdit_jax.evaluation": {
        "sharding",
        "flow",
        "encoders",
        "data",
        "files",
        "page",
        "strict_json",
    },
    "mmdit_jax.finetuning": {"flow", "models", "sharding", "training.state", "training.step"},
    "mmdit_jax.run": ANYTHING,
    "mmdit_jax.evaluators": ANYTHING,
    "mmdit_jax.programs": ANYTHING,
    "mmdit_jax.trained_run": ANYTHING,
    "mmdit_jax.topologies": {"scaling"},
    "data_pipelines": {
        "command",
        "config",
        "presets",
        "hosts",
        "sharding",
        "strict_json",
        "data",
        "encoders",
    }
    | {"interop"},
    "configs": {"config", "presets"},
} | {f"mmdit_jax.{name}": ANYTHING for name in COMMANDS}

FILES = sorted(
    path
    for folder in ("mmdit_jax", "data_pipelines", "configs")
    for path in (ROOT / folder).rglob("*.py")
)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "mmdit_jax" else parts[0]


def imports(path: Path) -> set[str]:
    """Every module of ours that a file imports, `from package import module` resolved."""
    known = {module_of(p) for p in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return {name for name in found if name.split(".")[0] in ("mmdit_jax", "data_pipelines")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    module = module_of(path)
    room = room_of(module)
    if module == "mmdit_jax":
        assert not imports(path)
        return
    allowed = MAY_IMPORT[room]
    for name in imports(path) - {"mmdit_jax"}:
        target = room_of(name)
        if target == room:
            continue
        assert target.removeprefix("mmdit_jax.") not in COMMANDS, f"{path} imports a command"
        if allowed is ANYTHING:
            continue
        inside = name.removeprefix("mmdit_jax.")
        fits = any(inside == a or inside.startswith(a + ".") for a in allowed)
        assert fits, f"{path} imports {name}; {room} may import {sorted(allowed)}"


def test_no_file_is_longer_than_400_lines_or_named_after_nothing():
    for path in FILES:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
        assert path.stem not in ("utils", "util", "common", "helpers", "core", "base", "misc"), path


def test_a_source_of_pictures_knows_no_stage():
    for path in (ROOT / "data_pipelines" / "sources").glob("*.py"):
        assert not any("stages" in name for name in imports(path)), path


def test_partition_specs_are_written_in_sharding_only():
    for path in FILES:
        if module_of(path) != "mmdit_jax.sharding":
            assert "PartitionSpec" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("module", ["mmdit_jax.train", "data_pipelines.build"])
def test_training_and_pipelines_import_neither_torch_nor_tensorflow(module):
    code = f"import sys, {module}; print({{'torch', 'tensorflow', 'diffusers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr[-2000:]
