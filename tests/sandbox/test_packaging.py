"""`rlef-sandbox` alone: from its source distribution to a program that runs, without a network."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SANDBOX = Path(__file__).parents[2] / "sandbox"
BUILD_SDIST = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
OFFLINE = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the source distribution, in a folder that knows nothing of the repository."""
    folder = tmp_path_factory.mktemp("packaging")
    run(sys.executable, "-c", BUILD_SDIST, folder, cwd=SANDBOX)
    [source] = folder.glob("*.tar.gz")
    pip_wheel = (sys.executable, "-m", "pip", "wheel", *OFFLINE, "--no-build-isolation")
    run(*pip_wheel, "--wheel-dir", folder, source, cwd=folder)
    [wheel] = folder.glob("*.whl")
    return wheel


def test_wheel_is_typed_licensed_and_depends_on_nothing(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(name) for name in names if name.endswith("/METADATA")]
        [licence] = [archive.read(name) for name in names if name.endswith("/licenses/LICENSE")]

    assert {"rlef_sandbox/py.typed", "rlef_sandbox/_core.pyi", "rlef_sandbox/command_worker"} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"rlef_sandbox"}
    assert not [name for name in names if "__pycache__" in name]
    headers = email.message_from_bytes(metadata)
    assert (headers["Name"], headers.get_all("Requires-Dist")) == ("rlef-sandbox", None)
    assert licence == (SANDBOX.parent / "LICENSE").read_bytes()


def test_readmes_example_runs_from_the_wheel_in_an_environment_with_nothing_else(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, wheel, cwd=tmp_path)
    example, *_ = re.findall(r"```python\n(.*?)```", (SANDBOX / "README.md").read_text(), re.DOTALL)
    show_packages = "\nimport importlib.metadata as m; print(sorted({d.name for d in m.distributions()}))"

    command = (
        "\nassert executor.run(Command(['/bin/echo', '1']), [Test('', '1')])[0].verdict.value == 'passed'"
    )
    in_executor = (
        "\nfrom rlef_sandbox import Command\nwith Executor(workers=1) as executor:"
        + command.replace("\n", "\n    ")
    )

    said = run(python, "-I", "-c", example + in_executor + show_packages, cwd=tmp_path)

    promised = [line.removeprefix("# ") for line in example.splitlines() if line.startswith("# ")]
    assert said.splitlines() == [*promised, "['rlef-sandbox']"]
