"""What the documentation says exists, exists: files it links to, commands it names, Python it shows."""

import ast
import re
from pathlib import Path

import pytest

import vlaflow
from vlaflow.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "vlaflow").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# Only where a command line begins, so that prose may say "vlaflow reads"; a word in capitals stands for any command.
CALL = re.compile(r"(?:^|-m |bin/)vlaflow +([a-z][\w-]*)", re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")


def name(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """The text that is rendered as text: without comments and code blocks."""
    return FENCE.sub("", COMMENT.sub("", page.read_text(encoding="utf-8")))


def anchors(page):
    """The names that headings can be linked by, as GitHub and most renderers make them."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(INLINE.sub("", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists() or (anchor and anchor not in anchors(goal)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_that_is_named_exists(page):
    text = page.read_text(encoding="utf-8")
    code = [body for language, body in FENCE.findall(text) if language != "python"] + INLINE.findall(prose(page))
    named = {command for snippet in code for command in CALL.findall(snippet)}
    assert named <= set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_that_is_shown_compiles(page):
    for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(body, name(page), "exec")


def defines(module, name):
    """Whether a module of ours has this name at its top, or is a package with a module of that name; nothing is imported."""
    file = ROOT / Path(*module.split(".")).with_suffix(".py")
    if not file.exists():
        file = file.with_suffix("") / "__init__.py"
        if (file.parent / f"{name}.py").exists():
            return True
    if not file.exists():
        return False
    body = ast.parse(file.read_text(encoding="utf-8")).body
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    exported = next((node.value for node in body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"), None)
    names = {getattr(node, "name", None) for node in body} | {getattr(t, "id", None) for t in targets}
    return name in names | set(ast.literal_eval(exported) if exported else ())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_the_python_imports_from_us_is_there(page):
    blocks = [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language == "python"]
    ours = [
        (node.module, alias.name)
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vlaflow"
        for alias in node.names
    ]
    assert not [f"{module}.{item}" for module, item in ours if not defines(module, item)]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_the_python_uses_of_the_package_is_offered(page):
    blocks = [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language == "python"]
    used = {
        node.attr
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vlaflow"
    }
    assert used <= set(vlaflow.__all__)


def fields_of(command):
    """Names of the options that a command's dataclasses declare, positional arguments and shared groups included."""
    body = ast.parse((ROOT / f"vlaflow/cli/{command.replace('-', '_')}.py").read_text(encoding="utf-8")).body
    classes = [node for node in body if isinstance(node, ast.ClassDef) and node.name != "Settings"]
    declared = [f for c in classes for f in c.body if isinstance(f, ast.AnnAssign)]
    shared = {"ReadingGroup": "reading", "HubGroup": "arguments", "ChunkGroup": "tokenizers"}
    own = {f.target.id.replace("_", "-") for f in declared if ast.unparse(f.annotation) not in shared}
    groups = {shared.get(ast.unparse(f.annotation)) for f in declared} - {None}
    return own.union(*(fields_of(group) for group in groups))


@pytest.mark.parametrize("command", COMMANDS)
def test_options_are_described_and_exist(command):
    """The tables of the command reference name each option of the command and no other; positional arguments in capitals."""
    sections = re.split(r"^## ", (ROOT / "docs/commands.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    section = next(s for s in sections if s.startswith(f"`vlaflow {command}`"))
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    options = {o for cell in first_cells for o in re.findall(r"--(?:no-)?([\w-]+)", cell)}
    positional = {word.lower() for cell in first_cells for word in re.findall(r"^ `([A-Z]+)`", cell)}
    assert options | positional == fields_of(command)


def test_every_command_is_described():
    """The command reference has a heading per command of the dispatcher, and no other."""
    described = re.findall(r"^## `vlaflow ([\w-]+)`", (ROOT / "docs/commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(described) == set(COMMANDS)


def test_every_page_is_in_the_index():
    listed = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in ("README.md", "performance.md")]
    assert not [page for page in pages if f"({page})" not in listed]


SHOWN = [
    body
    for language, body in FENCE.findall((ROOT / "docs/extending.md").read_text(encoding="utf-8"))
    if language in ("python", "toml")
]


@pytest.mark.parametrize("block", SHOWN, ids=lambda block: block.splitlines()[0])
def test_the_code_on_extending_is_the_plugin_that_a_test_installs(block):
    """Each piece, from one line of "..." to the next, stands in the file that the block's first line names."""
    first, *lines = block.splitlines()
    plugin = ROOT / "tests/plugin"
    file = next(f for f in (plugin / first[2:], plugin / "vlaflow_plugin_example" / first[2:]) if f.exists())
    pieces = re.split(r"^ *\.\.\.$", "\n".join(lines), flags=re.MULTILINE)
    whole = file.read_text(encoding="utf-8")
    assert all(piece.strip("\n") in whole for piece in pieces)


def test_extending_shows_every_part_of_the_plugin():
    modules = ("backbone", "decoder", "tokenizer", "rater", "compute", "corridor", "observation_keys", "recipes")
    assert {block.splitlines()[0][2:] for block in SHOWN} == {"pyproject.toml", *(f"{module}.py" for module in modules)}
