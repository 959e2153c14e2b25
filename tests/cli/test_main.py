"""The dispatcher: quick help, lazy commands, errors as sentences, exit statuses."""

import errno
import importlib.util
import os
import resource
import subprocess
import sys
import types

import pytest

from vlaflow import __version__
from vlaflow.cli import main as dispatcher
from vlaflow.errors import ConfigError, DataError


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "vlaflow", *arguments], capture_output=True, text=True, check=False, **options)


@pytest.fixture
def command(monkeypatch):
    """Replace ``vlaflow demo`` by a function."""

    def install(function):
        module = types.ModuleType("vlaflow.cli.demo")
        module.main = function
        monkeypatch.setitem(sys.modules, "vlaflow.cli.demo", module)

    return install


def raises(error):
    def function(argv):
        raise error

    return function


def test_help_takes_less_than_a_tenth_of_a_second():
    """Of processor time, the interpreter's start included, and the least of five: another process may slow one down."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert answer.returncode == 0, answer.stderr
    assert min(seconds) < 0.1, seconds


def test_help_imports_the_standard_library_and_nothing_else():
    """The reason why help is quick; unlike the time, this does not depend on the machine."""
    script = (
        "import sys; before = set(sys.modules); from vlaflow.cli.main import main; main(['--help']);"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; print(*sorted(new - sys.stdlib_module_names))"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "vlaflow"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command_with_a_summary(arguments, capsys):
    assert dispatcher.main(arguments) == 0
    shown = capsys.readouterr().out
    for name, summary in dispatcher.COMMANDS.items():
        assert f"  {name} " in shown
        assert summary in shown


def test_version_names_vlaflow_and_torch(capsys):
    assert dispatcher.main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"vlaflow {__version__}"
    assert any(line.startswith("torch ") for line in lines)


def test_an_unknown_command_is_refused_with_the_nearest_name():
    answer = run("trane")
    assert answer.returncode == 2
    assert answer.stderr == "There is no command 'trane'; did you mean 'train'? (vlaflow --help lists them)\n"
    assert answer.stdout == ""


def test_a_command_gets_the_rest_of_the_line_and_its_status_is_returned(command):
    seen = []
    command(lambda argv: seen.append(argv) or 1)
    assert dispatcher.main(["demo", "--out", "runs/x"]) == 1
    assert seen == [["--out", "runs/x"]]


def test_an_error_that_users_can_mend_is_one_sentence(command, capsys):
    command(raises(DataError("Episode 12 has 61 actions but 58 frames.")))
    assert dispatcher.main(["demo"]) == 2
    assert capsys.readouterr().err == "Episode 12 has 61 actions but 58 frames.\n"


def test_a_missing_package_names_the_extra_that_brings_it(command, capsys):
    command(raises(ModuleNotFoundError("No module named 'mujoco'", name="mujoco.egl")))
    assert dispatcher.main(["demo"]) == 2
    assert "pip install 'vlaflow[metaworld]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), ModuleNotFoundError("no", name="vlaflow.nothing"), FileNotFoundError(2, "x")]
)
def test_a_defect_of_ours_keeps_its_traceback(command, error):
    command(raises(error))
    with pytest.raises(type(error)):
        dispatcher.main(["demo"])


def test_a_file_that_the_system_refuses_is_a_sentence_wherever_it_happens(command, capsys):
    command(raises(PermissionError(errno.EACCES, "Permission denied", "a/b.json")))
    assert dispatcher.main(["demo"]) == 2
    assert capsys.readouterr().err.startswith("a/b.json cannot be read or written (Permission denied).")


def test_an_interrupt_is_a_short_sentence_and_status_130(command, capsys):
    command(raises(KeyboardInterrupt()))
    assert dispatcher.main(["demo"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_reader_that_goes_away_is_no_error():
    """`vlaflow --help | true` must not end in a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    answer = subprocess.run(
        [sys.executable, "-m", "vlaflow", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert answer.returncode == 141
    assert answer.stderr == ""


@pytest.mark.skipif(importlib.util.find_spec("vlaflow.cli.demo") is None, reason="commands are still being written")
@pytest.mark.parametrize("name", dispatcher.COMMANDS)
def test_every_listed_command_has_a_module_with_main(name):
    assert callable(importlib.import_module(f"vlaflow.cli.{name.replace('-', '_')}").main)


@pytest.mark.skipif(importlib.util.find_spec("vlaflow.cli.demo") is None, reason="commands are still being written")
@pytest.mark.parametrize("name", dispatcher.COMMANDS)
def test_every_command_shows_an_example_in_its_help(name):
    answer = run(name, "--help")
    assert answer.returncode == 0, answer.stderr
    assert f"vlaflow {name}" in answer.stdout


def test_a_demo_in_a_place_that_cannot_be_made_is_one_sentence(tmp_path):
    from vlaflow.cli.demo import Demo, DemoLog, Settings

    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be created .* Choose another --out"):
        DemoLog(tmp_path / "file/deeper/demo", Settings.of(Demo(quick=True)))
