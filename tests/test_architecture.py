"""The architecture, read from the imports: floors, no circles, families behind a registry."""

import ast
import graphlib
import pathlib
import re
import tokenize

import pytest

from hmar_jax.families import FAMILIES

ROOT = pathlib.Path(__file__).resolve().parent.parent

# From the ground up; a module imports from its own floor or from those below. docs/architecture.md
# draws them.
FLOORS = (
    ("pallas_kernels", "hmar_jax.errors", "hmar_jax.interruption", "hmar_jax.logging"),
    ("hmar_jax.settings", "hmar_jax.class_names"),
    ("hmar_jax.config_files", "hmar_jax.parallel", "hmar_jax.progress"),
    ("hmar_jax.io",),
    ("hmar_jax.data",),
    ("hmar_jax.training",),
    ("hmar_jax.autoencoders",),
    ("hmar_jax.families",),
    ("hmar_jax.loading",),
    (
        "hmar_jax.experiment_data",
        "hmar_jax.initialization",
        "hmar_jax.pipeline",
        "hmar_jax.pipeline_arguments",
    ),
    ("hmar_jax.experiment", "hmar_jax.evaluation"),
    ("hmar_jax.planning",),
    ("hmar_jax.cli", "hmar_jax.__main__"),
)
# These know no family by name: what they need of one they ask the registry for.
NEUTRAL = ("io", "parallel", "data", "training", "evaluation", "planning", "cli")
NEUTRAL_FILES = (
    "loading.py",
    "pipeline.py",
    "pipeline_arguments.py",
    "experiment.py",
    "experiment_data.py",
    "initialization.py",
    "settings.py",
    "config_files.py",
)


def module_name(path: pathlib.Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


FILES = sorted([*(ROOT / "hmar_jax").rglob("*.py"), *(ROOT / "pallas_kernels").rglob("*.py")])
MODULES = {module_name(path): path for path in FILES}


def imports(path: pathlib.Path, inside_functions: bool = True) -> set[str]:
    """Modules that a file imports; what is for type checkers alone does not count."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        in_function = isinstance(node, ast.FunctionDef) and not inside_functions
        if for_types or in_function:
            skipped |= {id(inner) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def own_imports(path: pathlib.Path) -> set[str]:
    """Modules of this project that a file imports; submodules in place of their package."""
    found = {name for name in imports(path) if name in MODULES}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def floor_of(module: str) -> int:
    for floor, rooms in enumerate(FLOORS):
        if any(module == room or module.startswith(f"{room}.") for room in rooms):
            return floor
    raise AssertionError(f"{module} stands on no floor")


def test_every_module_stands_on_a_floor():
    assert {floor_of(name) for name in MODULES if name != "hmar_jax"} == set(range(len(FLOORS)))


def test_no_import_runs_upward():
    upward = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        if name != "hmar_jax"
        for other in own_imports(path)
        if other != "hmar_jax" and floor_of(other) > floor_of(name)
    ]
    assert not upward


def test_no_import_runs_in_a_circle():
    files = {name: own_imports(path) - {name} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(files).prepare()  # raises CycleError
    room = lambda name: ".".join(name.split(".")[:2])
    rooms: dict[str, set[str]] = {}
    for name, others in files.items():
        if name != "hmar_jax":  # the package's public face
            rooms.setdefault(room(name), set()).update(
                room(o) for o in others if o != "hmar_jax" and room(o) != room(name)
            )
    graphlib.TopologicalSorter(rooms).prepare()


def test_families_are_reached_through_the_registry_alone():
    offenders = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in own_imports(path)
        for package in FAMILIES.values()
        if other.startswith(f"{package}.") or other == package
        if not name.startswith(package)
    ]
    assert not offenders


def neutral_files() -> list[pathlib.Path]:
    package = ROOT / "hmar_jax"
    found = [path for room in NEUTRAL for path in sorted((package / room).rglob("*.py"))]
    return [*found, *(package / name for name in NEUTRAL_FILES)]


# A family's name in an identifier or a string, beside the project's own name and its command.
_NAMES = re.compile(r"\b(hi-?mar|var)\b|^[\"']hmar[\"']$|Hmar[A-Z]|HiMar", re.IGNORECASE)
_PARTS = re.compile(r"NextScale|Transformer|next_scale|MaskedTask|masked_depth|masked_guidance")


@pytest.mark.parametrize("path", neutral_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_serves_all_families_names_none(path):
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    words = [t.string for t in tokens if t.type in (tokenize.NAME, tokenize.STRING)]
    words = [w for w in words if not w.startswith('"""')]  # docstrings may give a source
    found = [w for w in words if _NAMES.search(w) or _PARTS.search(w)]
    # prog="hmar" is the command.
    assert [w for w in found if w != '"hmar"' or path.name != "main.py"] == []


def test_large_libraries_are_imported_where_they_are_needed():
    with_torch = {
        name
        for name, path in MODULES.items()
        if "torch" in {i.split(".")[0] for i in imports(path)}
    }
    assert with_torch == {"hmar_jax.io.torch_weights"}
    for path in FILES:
        at_the_top = {name.split(".")[0] for name in imports(path, inside_functions=False)}
        assert not at_the_top & {"torch", "sklearn", "tensorflow", "tensorflow_datasets"}, path
