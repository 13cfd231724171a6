"""Does the house stand? Floors, walls, no cycles, every module importable alone, and lists that must agree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from hubert_ray import cli
from hubert_ray.config.presets import PRESETS
from hubert_ray.pipeline import unroll

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hubert_ray"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

# A folder (or top-level module) may import from its own folder and from the folders named here.
FLOORS = {
    "errors": set(),
    "machine": set(),
    "config": {"errors"},
    "storage": {"errors"},
    "data": {"config", "storage", "errors"},
    "model": {"data", "config", "errors"},
    "units": {"model", "data", "storage", "config", "errors"},
    "formats": {"model", "data", "storage", "config", "errors"},
    "asr": {"model", "data", "storage", "config", "errors"},
    "distributed": {"units", "asr", "model", "data", "storage", "config", "errors", "machine"},
    "stages": {
        "distributed",
        "speech_model",
        "formats",
        "units",
        "asr",
        "model",
        "data",
        "storage",
        "config",
        "errors",
        "machine",
    },
    "health": {"data", "storage", "config", "errors", "machine"},
    "pipeline": {"stages", "health", "storage", "config", "errors", "machine"},
    "speech_model": {"formats", "asr", "model", "data", "storage", "config", "errors"},
    "unit_bundle": {"speech_model", "formats", "units", "model", "data", "storage", "config", "errors"},
    "unit_files": {"unit_bundle", "units", "data", "storage", "errors"},
    "cli": {
        "pipeline",
        "distributed",
        "speech_model",
        "unit_bundle",
        "unit_files",
        "storage",
        "config",
        "errors",
        "machine",
    },
}
# model/ and units/ read only these of data/: no file of theirs opens a corpus
MODEL_MAY_READ = {"hubert_ray.data.frames"}


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_down_only(path):
    here = room(path)
    if here == "__init__":
        return
    for name in imports(path):
        if name.startswith("hubert_ray.") and len(name.split(".")) > 1:
            there = name.split(".")[1]
            assert there in FLOORS[here] | {here, "__version__"}, f"{dotted(path)} imports {name}: {here} may not"


def test_model_reads_only_frame_arithmetic_of_data():
    for path in (PACKAGE / "model").glob("*.py"):
        used = {name for name in imports(path) if name.startswith("hubert_ray.data.")}
        assert all(name.startswith("hubert_ray.data.frames") for name in used), f"{dotted(path)}: {used}"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("ray", lambda path: room(path) == "distributed"),
        ("deepspeed", lambda path: path == PACKAGE / "distributed" / "zero.py"),
        ("faiss", lambda path: path == PACKAGE / "units" / "kmeans.py"),
        ("fastabx", lambda path: path == PACKAGE / "units" / "abx.py"),
        ("espeakng_loader", lambda path: path == PACKAGE / "data" / "espeak_voice.py"),
        ("silero_vad", lambda path: path == PACKAGE / "data" / "voice_activity.py"),
    ],
)
def test_libraries_stay_in_their_room(library, allowed):
    users = [path for path in MODULES if any(name.split(".")[0] == library for name in imports(path))]
    assert users, f"nothing imports {library}: has its room moved?"
    assert [dotted(path) for path in users if not allowed(path)] == []


def test_light_rooms_import_no_heavy_library():
    heavy = {"torch", "torchaudio", "ray", "deepspeed", "faiss", "flashlight"}
    for path in MODULES:
        if room(path) in ("config", "storage", "errors", "machine", "cli", "pipeline", "model"):
            allowed = {"torch"} if room(path) == "model" else set()
            used = {name.split(".")[0] for name in imports(path)} & heavy
            assert used <= allowed, f"{dotted(path)} imports {used}"


def test_no_import_cycle():
    names = {dotted(path): path for path in MODULES}
    graph = {name: {n for n in imports(path) if n in names and n != name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            for following in sorted(graph[name]):
                visit(following, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.slow
def test_every_module_imports_alone():
    """Workers unpickle code by importing one module in a fresh process: none may count on another having been imported."""
    script = (
        "import importlib, os, sys\n"
        "for name in sys.argv[1:]:\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        try:\n"
        "            importlib.import_module(name)\n"
        "        except BaseException as error:\n"
        "            print(f'{name}: {error!r}', flush=True)\n"
        "            os._exit(1)\n"
        "        os._exit(0)\n"
        "    if os.waitpid(pid, 0)[1]:\n"
        "        sys.exit(1)\n"
    )
    # The heavy libraries are loaded once in the parent; each child then imports one of our modules and nothing else of ours.
    preload = "import torch, torchaudio, ray.data, ray.train.torch, ray.tune, faiss\n"
    result = subprocess.run(
        [sys.executable, "-c", preload + script, *map(dotted, MODULES)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_help_and_plan_start_without_heavy_libraries(tmp_path):
    script = (
        "import sys; from hubert_ray.cli import main\n"
        f"assert main(['plan', '--recipe', 'hubert_large_ll60k', '--storage', {str(tmp_path)!r}]) == 0\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'faiss', 'torchaudio'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_stages_jobs_and_commands_agree():
    kinds = {stage.kind for recipe in PRESETS.values() for stage in unroll(recipe)}
    assert kinds == set(cli.STAGES)
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == set(cli.STAGES) | {"run_recipe"}
    for kind in kinds:
        source = (PACKAGE / "stages" / f"{kind}.py").read_text()
        assert any(isinstance(n, ast.FunctionDef) and n.name == kind for n in ast.parse(source).body)


def test_readme_names_every_stage():
    readme = (ROOT / "README.md").read_text()
    assert [stage for stage in cli.STAGES if stage not in readme] == []
