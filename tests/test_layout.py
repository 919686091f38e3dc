"""The order of the house: an import only ever points down the list, and never in a circle."""

import ast
import graphlib
import re
from pathlib import Path

from conftest import ROOT

# from the scripts that people type down to what everything stands on; a room may import its own files
FLOORS = [
    ["problem", "plan", "train_ddp", "train_deepspeed"],
    ["serve"],
    ["train", "inference", "evaluate"],
    ["plot_loss", "plot_attention", "convert"],
    ["evaluation", "planning"],
    ["training"],
    ["serving"],
    ["data"],
    ["weights"],
    ["problems", "model"],
    ["text"],
    ["vision"],
    ["layers"],
    ["base"],
]
FLOOR_OF = {place: i for i, places in enumerate(FLOORS) for place in places}


def modules() -> dict[str, Path]:
    """The project's own modules by dotted name: the scripts at the top, and what is in the rooms."""
    rooms = [path.parent for path in ROOT.glob("*/__init__.py")]
    files = [*ROOT.glob("*.py"), *(file for room in rooms for file in room.glob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}


def imports_of(file: Path, known: dict[str, Path]) -> set[str]:
    """Names of the project's modules that a file imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name for name in names if name in known}
    return found


def place_of(module: str) -> str:
    return module.split(".")[0]


def test_every_module_has_its_place():
    places = {place_of(name) for name in modules()}
    assert places == set(FLOOR_OF), "a new script or room needs its place in FLOORS"
    assert len(list(ROOT.glob("*.py"))) <= 13


def test_imports_point_down():
    known = modules()
    upward = []
    for name, file in known.items():
        for imported in imports_of(file, known):
            here, there = place_of(name), place_of(imported)
            if here != there and FLOOR_OF[there] <= FLOOR_OF[here]:
                upward.append(f"{name} imports {imported}")
    assert not upward, upward


def test_no_circle_of_imports():
    known = modules()
    graph = {name: imports_of(file, known) for name, file in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError that names the circle


def test_the_check_itself_sees_a_circle_and_an_import_inside_a_function(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    import b\n")
    (tmp_path / "b.py").write_text("from a import f\n")
    known = {name: tmp_path / f"{name}.py" for name in "ab"}
    assert imports_of(known["a"], known) == {"b"} and imports_of(known["b"], known) == {"a"}


def test_files_stay_short():
    """About 500 lines a file; the files that a learner reads first under 450."""
    lengths = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in modules().items()}
    assert {name: n for name, n in lengths.items() if n > 500} == {}
    assert lengths["model"] < 450 and lengths["train"] < 450


def test_pages_name_files_that_exist():
    """Every link of README and docs to a file of the project leads somewhere."""
    for page in [*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
