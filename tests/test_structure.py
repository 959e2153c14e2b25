"""The architecture as tests: which room may import which, what may be imported early, what is not done anywhere.

Everything is read from the source text with ``ast``; nothing is imported, so a broken module cannot hide.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vlaflow"
SOURCES = sorted(PACKAGE.rglob("*.py"))
DOOR = PACKAGE / "__init__.py"
EVERYTHING = sorted(
    p for room in ("vlaflow", "tests", "benchmarks", "tools", "integrations") for p in (ROOT / room).rglob("*.py")
)

# From the ground up. A room may import rooms of earlier storeys and itself, not its neighbours ...
STOREYS = (
    (
        "__init__",
        "errors",
        "text",
        "registry",
        "spec",
        "config",
        "strict",
        "io",
        "outputs",
        "ranges",
        "versions",
        "progress",
        "packages",
        "hub",
    ),
    ("nn", "flows", "data", "actions", "simulators", "robot"),
    ("backbones", "stacks"),
    ("decoders",),
    ("compute",),
    ("engine",),
    ("policies",),
    ("training", "evaluation", "serving"),
    ("claims",),
    ("reports",),
    ("cli",),
    ("__main__",),
)
# ... except on the ground floor, and here:
NEIGHBOURS = {
    ("simulators", "vlaflow.data"),
    ("stacks", "vlaflow.backbones.base"),
    ("actions", "vlaflow.nn"),
}
STOREY = {room: number for number, rooms in enumerate(STOREYS) for room in rooms}

# Packages that are slow to import or come with an extra, and the rooms that may import them at the top of a module.
# Everywhere else they are imported inside the function that needs them.
HEAVY = {
    "transformers": {"backbones"},
    "tokenizers": {"actions", "backbones"},
    "mujoco": {"simulators"},
    "metaworld": {"simulators"},
    "gymnasium": {"simulators"},
    "matplotlib": set(),
    "scipy": set(),
    "accelerate": {"training"},
    "tensorboard": set(),
    "openvino": set(),
}
UNSAFE = {"cloudpickle", "dill", "joblib", "shelve", "marshal"}


def relative(path):
    return str(path.relative_to(ROOT))


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def every_node(path):
    return tuple(ast.walk(tree(path)))


def imported(node, path):
    """Full names of the modules or members that an import statement asks for; for other nodes nothing."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = list(path.relative_to(ROOT).with_suffix("").parts[: -node.level]) if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]
    return []


def home(path):
    """The room that a file of the package lives in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def room_of(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in STOREY else "__init__"


def may_import(room, target):
    """Whether code in ``room`` may import the module (or member) with the full name ``target``.

    The door, the package's own ``__init__``, offers names of upper rooms; a room that took them from there could point up.
    """
    other = room_of(target)
    if other == "__init__":
        return target == "vlaflow.__version__"
    allowed_neighbour = any(room == a and (target == b or target.startswith(f"{b}.")) for a, b in NEIGHBOURS)
    return room == other or STOREY[other] < STOREY[room] or STOREY[other] == STOREY[room] == 0 or allowed_neighbour


def at_the_top(module):
    """Statements that run when a module is imported; those for the type checker only do not."""
    queue = list(module.body)
    while queue:
        node = queue.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            queue.extend(node.orelse)
            continue
        yield node
        queue.extend(ast.iter_child_nodes(node))


def outside_type_checking(module):
    """Every statement and expression but those for the type checker only; imports inside functions count."""
    queue = [module]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            queue.extend(node.orelse)
            continue
        yield node
        queue.extend(ast.iter_child_nodes(node))


def imports_between(sources):
    """By module, the modules among ``sources`` that it imports; a package's own file stands for what it defines itself."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in sources}

    def module_of(name):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    return {
        name: {module_of(target) for node in outside_type_checking(tree(path)) for target in imported(node, path)} - {"", name}
        for name, path in modules.items()
    }


def circles(graph):
    """Groups of modules that import each other in a circle, whichever is imported first."""

    def reached(start):
        found, queue = set(), [start]
        while queue:
            new = graph[queue.pop()] - found
            found |= new
            queue.extend(new)
        return found

    beyond = {name: reached(name) for name in graph}
    groups = {frozenset(other for other in beyond[name] if name in beyond[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def offences_of(paths, offence, nodes=None):
    """``file:line what`` for every node that ``offence(node, path)`` describes, of all or of those that ``nodes`` selects."""
    chosen = every_node if nodes is None else lambda path: nodes(tree(path))
    found = ((path, node, offence(node, path)) for path in paths for node in chosen(path))
    return [f"{relative(path)}:{node.lineno} {what}" for path, node, what in found if what]


def test_every_room_has_its_place():
    """A new room must be given a storey above, or the import rule would not see it."""
    rooms = {
        p.stem if p.suffix == ".py" else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert rooms <= set(STOREY)


def test_imports_point_down():
    def offence(node, path):
        ours = [name for name in imported(node, path) if name.split(".")[0] == "vlaflow"]
        wrong = [name for name in ours if not may_import(home(path), name)]
        return f"imports {wrong[0]}" if wrong else None

    assert not offences_of([path for path in SOURCES if path != DOOR], offence)


def test_the_door_imports_nothing_by_itself():
    """It names every room, for the type checker and inside functions; what it runs when it is imported needs none."""
    assert not [name for node in at_the_top(tree(DOOR)) for name in imported(node, DOOR) if name.startswith("vlaflow")]


def test_no_files_import_each_other_in_a_circle():
    """Hidden inside functions a circle still ties its files together: none can be read, tested or moved alone."""
    assert not circles(imports_between(SOURCES))


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, [["a", "b"]]),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"d"}}, [["a", "b", "c"], ["d", "e"]]),
    ],
)
def test_a_circle_of_any_length_is_found(graph, found):
    assert circles(graph) == found


def test_imports_of_every_form_are_seen(tmp_path, monkeypatch):
    """Of a module, of a member, inside a function; not those for the type checker."""
    text = {
        "a": "import vlaflow.b",
        "b": "from vlaflow.c import name",
        "c": "def late():\n    from vlaflow import d",
        "d": "if TYPE_CHECKING:\n    import vlaflow.a",
    }
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "vlaflow").mkdir()
    for name, source in text.items():
        (tmp_path / f"vlaflow/{name}.py").write_text(source)
    found = imports_between(sorted(tmp_path.rglob("*.py")))
    assert found == {"vlaflow.a": {"vlaflow.b"}, "vlaflow.b": {"vlaflow.c"}, "vlaflow.c": {"vlaflow.d"}, "vlaflow.d": set()}


@pytest.mark.parametrize(
    ("room", "target", "allowed"),
    [
        ("nn", "vlaflow.spec.Chunk", True),
        ("nn", "vlaflow.data.batch", False),
        ("simulators", "vlaflow.data.lerobot", True),
        ("data", "vlaflow.simulators", False),
        ("stacks", "vlaflow.backbones.base.Prefix", True),
        ("stacks", "vlaflow.backbones.tiny", False),
        ("stacks", "vlaflow.backbones.base_extra", False),
        ("policies", "vlaflow.training.trainer", False),
        ("cli", "vlaflow.evaluation", True),
        ("reports", "vlaflow.evaluation.results", True),
        ("evaluation", "vlaflow.reports", False),
        ("errors", "vlaflow.spec", True),
        ("spec", "vlaflow.__version__", True),
        ("spec", "vlaflow.Policy", False),
        ("cli", "vlaflow.train", False),
        ("cli", "vlaflow", False),
        ("evaluation", "vlaflow.robot.client", True),
        ("serving", "vlaflow.robot.wire", True),
        ("robot", "vlaflow.data.batch", False),
        ("evaluation", "vlaflow.serving.server", False),
    ],
)
def test_the_import_rule_means_what_the_design_says(room, target, allowed):
    assert may_import(room, target) is allowed


def test_heavy_packages_are_imported_late():
    def offence(node, path):
        packages = [name.split(".")[0] for name in imported(node, path)]
        wrong = [p for p in packages if p in HEAVY and home(path) not in HEAVY[p]]
        return f"imports {wrong[0]} at the top" if wrong else None

    assert not offences_of(SOURCES, offence, at_the_top)


def test_flows_hold_no_network():
    """The flows room is pure tensor mathematics: no class derives from Module and torch.nn is not even imported."""

    def offence(node, path):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Module") for base in node.bases):
            return f"class {node.name} is a Module"
        names = [n for n in imported(node, path) if n in ("torch.nn", "torch.nn.Module") or n.startswith("torch.nn.modules")]
        return f"imports {names[0]}" if names else None

    assert not offences_of((PACKAGE / "flows").rglob("*.py"), offence)


def test_nothing_that_is_loaded_can_run_code():
    """Files from elsewhere are data: nothing is unpickled in any disguise, no code comes from a model hub.

    Writing a pickle in memory is harmless, and Meta-World wants one; so is catching its error.
    """

    def offence(node, path):
        names = [n for n in imported(node, path) if n.split(".")[0] in UNSAFE or n.startswith("pickle.")]
        if names:
            return f"imports {names[0]}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            return None if node.attr in ("dumps", "PicklingError") else f"pickle.{node.attr}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            return f"{ast.unparse(node)}: use safetensors"
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            return None if isinstance(node.value, ast.Constant) and node.value.value is False else node.arg
        return None

    assert not offences_of(EVERYTHING, offence)


def test_nobody_edits_the_import_path():
    """What only works from one folder does not work installed."""

    def offence(node, path):
        return "sys.path" if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path" else None

    assert not offences_of(EVERYTHING, offence)


def test_files_stay_readable_in_one_sitting():
    long = {relative(p): lines for p in EVERYTHING if (lines := len(p.read_text(encoding="utf-8").splitlines())) > 450}
    assert not long


def test_every_public_module_says_what_lives_there():
    public = [p for p in SOURCES if not p.stem.startswith("_") or p.stem in ("__init__", "__main__")]
    assert not [relative(p) for p in public if not ast.get_docstring(tree(p))]


def test_every_system_has_the_same_files():
    systems = {p.parent for p in (PACKAGE / "policies").glob("*/*.py")}
    missing = [
        f"{relative(s)}/{name}" for s in systems for name in ("policy.py", "recipes.py", "README.md") if not (s / name).exists()
    ]
    assert not missing


def test_no_two_classes_share_a_name():
    """One word for one thing: a reader who searches for a class finds one."""
    places = {}
    for path in SOURCES:
        for node in every_node(path):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(relative(path))
    assert not {name: files for name, files in places.items() if len(files) > 1}


# Words that the field's own replaced: one word for one thing.
RETIRED = {
    "horizon",
    "seen",
    "departure",
    "departures",
    "commitment",
    "picture",
    "pictures",
    "dialect",
    "journal",
    "guard",
    "film",
}
SPARED = {"CHANGELOG.md", "test_structure.py"}
UNIDIOMATIC = re.compile(r"\b(anew|commonest|mends?|mended|whoever)\b", re.IGNORECASE)


def test_replaced_words_name_nothing_in_the_package():
    """Modules, classes, functions, arguments, fields and variables: 'padding_mask' did not become 'seen' again elsewhere."""

    def named(node):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            return node.name
        if isinstance(node, ast.arg):
            return node.arg
        return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else ""

    def offence(node, path):
        words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+", named(node))}
        return f"{named(node)}" if words & RETIRED else None

    assert not offences_of(SOURCES, offence)
    assert not [relative(path) for path in SOURCES if set(path.stem.split("_")) & RETIRED]


def test_words_without_an_idiom_stay_out():
    """Of docstrings, messages, comments and pages; the changelog names what was replaced."""
    pages = [p for p in (*EVERYTHING, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if p.name not in SPARED]
    assert not [f"{relative(p)}: {found[0]}" for p in pages if (found := UNIDIOMATIC.search(p.read_text(encoding="utf-8")))]
