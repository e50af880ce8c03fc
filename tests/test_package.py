"""The package as a user gets it: what it imports, what the wheel holds, what is documented."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import safeopt

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"safeopt": ROOT / "safeopt", "safeopt_kernels": ROOT / "kernels" / "safeopt_kernels"}
# Named too, since Python 3.10 does not know the modules of every distribution.
OPTIONAL = {
    "accelerate", "gguf", "jinja2", "lightning", "matplotlib", "peft", "rich", "tqdm",
    "transformers", "triton", "yaml",
}  # fmt: skip
SOURCES = sorted(
    path
    for folder in ("safeopt", "kernels", "recipes", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)


def requirements(distribution: str) -> set[str]:
    """Names of a distribution and of everything that it requires, extras left out."""
    found: set[str] = set()
    waiting = [distribution]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [re.split(r"[^\w.-]", item)[0] for item in required if "extra ==" not in item]
    return found


def run_without(blocked: set[str], code: str) -> subprocess.CompletedProcess[str]:
    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(blocked)!r}))\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block + code],
        cwd=ROOT / "kernels",
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.trap("ux 2.2.1")
def test_imports_with_torch_alone() -> None:
    kept = requirements("torch") | {"safeopt-llm"}
    blocked = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if module.isidentifier()
        and not any(re.sub(r"[-_.]+", "-", owner).lower() in kept for owner in owners)
    } | OPTIONAL
    done = run_without(blocked, "import safeopt, safeopt_kernels; print(safeopt.__version__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == safeopt.__version__


def test_blocking_a_package_is_noticed() -> None:
    done = run_without({"torch"}, "import safeopt")
    assert done.returncode != 0
    assert "torch" in done.stderr


def imported_names(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_functorch_is_never_imported() -> None:
    assert len(SOURCES) > 20
    guilty = {
        str(path.relative_to(ROOT)): name
        for path in SOURCES
        for name in imported_names(path)
        if "functorch" in name.split(".")
    }
    assert not guilty


def test_each_third_party_import_is_declared() -> None:
    declared = {
        re.split(r"[^\w.-]", item)[0].lower()
        for item in importlib.metadata.requires("safeopt-llm") or []
    }
    used = {name.split(".")[0] for path in SOURCES for name in imported_names(path)} - set(
        sys.stdlib_module_names
    )
    own = {"safeopt", "safeopt_kernels", "recipes", "benchmarks", "tests"}
    own |= {"alignment_risk"}  # run by benchmarks/forecast in an environment of its own
    assert {"torch", "transformers", "yaml"} <= used
    assert {"pyyaml" if name == "yaml" else name for name in used - own} <= declared


@pytest.mark.trap("ux 2.2.1")
@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels", {"safeopt"}),
        ("safeopt/geometry", {"safeopt.guard", "safeopt.optim", "safeopt.training"}),
        ("safeopt/curvature", {"safeopt.guard", "safeopt.optim", "safeopt.training"}),
        ("safeopt/diagnostics", {"safeopt.integrations", "safeopt.training", "safeopt.evaluation"}),
        ("safeopt/integrations", {"safeopt.training", "safeopt.evaluation", "safeopt.demo"}),
        (
            "safeopt/optim",
            {"safeopt.integrations", "safeopt.training", "safeopt.evaluation", "safeopt.demo"},
        ),
        ("safeopt", {"recipes", "benchmarks", "tests"}),
    ],
)
def test_arrows_point_one_way(folder: str, forbidden: set[str]) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    guilty = {
        str(path.relative_to(ROOT)): name
        for path in paths
        for name in imported_names(path)
        if any(name == top or name.startswith(f"{top}.") for top in forbidden)
    }
    assert not guilty


@pytest.mark.trap("ux 0.15")
def test_folder_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), (
        "a top-level package called kernels breaks transformers"
    )


def test_folder_kernels_shadows_no_real_package(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("real = True\n")
    done = subprocess.run(
        [sys.executable, "-c", "import kernels; print(kernels.real)"],
        cwd=ROOT,  # which comes first on the path
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.trap("ux 0.15")
def test_transformers_does_not_take_folder_kernels_for_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.utils.import_utils import is_kernels_available

    monkeypatch.syspath_prepend(ROOT)
    is_kernels_available.cache_clear()
    assert importlib.util.find_spec("kernels") is not None
    assert is_kernels_available() == ("kernels" in importlib.metadata.packages_distributions())


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_wheel_holds_only_the_two_packages(wheel_names: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert tops == {*PACKAGES, f"safeopt_llm-{safeopt.__version__}.dist-info"}


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_each_file_of_the_package(package: str, wheel_names: list[str]) -> None:
    folder = PACKAGES[package]
    on_disk = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".tmp"
    }
    assert f"{package}/py.typed" in on_disk
    assert on_disk == {name for name in wheel_names if name.startswith(f"{package}/")}


def test_version_is_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    cited = re.search(r"^version: (\S+)$", citation, flags=re.MULTILINE)
    assert cited is not None
    assert safeopt.__version__ == importlib.metadata.version("safeopt-llm") == cited.group(1)


def test_public_names_are_documented() -> None:
    assert {"Anchors", "Guard", "SafeAdamW"} <= set(safeopt.__all__)
    bare = []
    for name in safeopt.__all__:
        item = getattr(safeopt, name)
        if not (inspect.isclass(item) or callable(item)):
            continue
        members = inspect.getmembers(item, inspect.isroutine) if inspect.isclass(item) else []
        named = [(name, item)] + [
            (f"{name}.{member}", function)
            for member, function in members
            if not member.startswith("_") and function.__module__.startswith("safeopt")
        ]
        bare += [label for label, thing in named if not inspect.getdoc(thing)]
    assert not bare
