"""A program that a model wrote can fail its row, and never the run."""

import glob
import os
import subprocess
import sys
import tempfile

import pytest

from finermoe_jax.evaluation import code_execution
from finermoe_jax.evaluation.code_execution import local_code_eval, passes


def _namespaces():
    """Returns whether this system gives an ordinary process namespaces of its own."""
    flags = "os.CLONE_NEWUSER | os.CLONE_NEWPID"
    done = subprocess.run([sys.executable, "-c", f"import os; os.unshare({flags})"], check=False)
    return done.returncode == 0


needs_namespaces = pytest.mark.skipif(
    not _namespaces(), reason="needs user namespaces (unshare), which this system refuses"
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Makes the programs' directories under tmp_path; nothing may be left of them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not glob.glob(f"{tmp_path}/finermoe-code-*")


def test_directories_of_any_depth_are_removed():
    """Deeper than Python recurses, than files may be open, and than a path may be long."""
    name = "x" * 100
    deep = f"import os\nfor _ in range(1200):\n    os.mkdir({name!r}); os.chdir({name!r})\n"
    assert passes(deep + "open('file', 'w').close(); os.symlink('/', 'root')", seconds=60.0)


def test_a_link_in_place_of_the_directory_is_not_followed(tmp_path):
    """Clearing up leaves what the link points at, its content and its rights, as it was."""
    (other := tmp_path / "other").mkdir()
    (other / "file").touch()
    (other / "file").chmod(0o440)
    swap = f"""
import os
mine, away = os.getcwd(), {str(tmp_path / "away")!r}
open("left", "w").close()
os.rename(mine, away)
os.symlink({str(other)!r}, mine)
"""
    passes(swap, seconds=20.0)
    assert (other / "file").stat().st_mode & 0o777 == 0o440
    (link,) = tmp_path.glob("finermoe-code-*")
    assert link.is_symlink() and not any((tmp_path / "away").iterdir())
    link.unlink()


HOSTILE = (
    "import os; os.mkdir('a'); os.mkdir('a/b'); os.chmod('a/b', 0); os.chmod('a', 0)",
    "import os; os.chmod('.', 0)",
    "import os; os.mkdir('done'); os.mkdir('done/x')",
    "import os, shutil; shutil.rmtree(os.getcwd())",
    "import os; os.mkfifo('done'); os._exit(0)",
    "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
)


def test_hostile_programs_fail_their_rows_alone(tmp_path):
    """As a user without root's rights, whom a mode of 0 keeps out."""
    lines = [
        "import os, tempfile",
        # Before there are threads, with which a process cannot change its namespace.
        "if os.geteuid() == 0: os.unshare(os.CLONE_NEWUSER)",
        "from finermoe_jax.evaluation.code_execution import passes",
        f"tempfile.tempdir = {str(tmp_path)!r}",
        f"for program in {HOSTILE!r}:",
        "    print(program, flush=True)",
        "    passes(program, seconds=20.0)",
        "assert passes('pass', seconds=20.0)",
    ]
    if os.geteuid() == 0 and not _namespaces():
        pytest.skip("as root, needs user namespaces (unshare), which this system refuses")
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=120)


@needs_namespaces
def test_other_processes_are_out_of_reach():
    mine = os.getpid()
    assert not passes(f"open('/proc/{mine}/environ', 'rb').read()", seconds=20.0)
    assert not passes(f"open('/proc/{mine}/mem', 'rb')", seconds=20.0)
    assert not passes(f"import os; os.kill({mine}, 0)", seconds=20.0)
    everywhere = """
import os
for name in os.listdir("/proc"):
    if name.isdigit():
        try:
            content = open(f"/proc/{name}/environ", "rb").read()
        except OSError:
            continue
        assert b"PYTEST_CURRENT_TEST" not in content and b"HOME=" not in content, name
"""
    assert passes(everywhere, seconds=20.0)


@needs_namespaces
def test_what_left_the_session_ends_with_the_program(tmp_path):
    child = "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)"
    assert passes(child, seconds=20.0)
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in commands.stdout


@pytest.mark.slow
@pytest.mark.parametrize("reachable", [True, False])
def test_an_environment_in_reach_is_said(reachable, monkeypatch, capsys):
    pytest.importorskip("evaluate")
    if reachable:  # as where the kernel refuses namespaces
        without = code_execution._RUNNER.replace("os.unshare(", "raise OSError(")
        monkeypatch.setattr(code_execution, "_RUNNER", without)
    elif not _namespaces():
        pytest.skip("needs user namespaces (unshare), which this system refuses")
    with local_code_eval():
        pass
    assert ("can read this process's environment" in capsys.readouterr().err) == reachable
