from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import support
from benchmarks.markdown import fill

HEAD = "import pytest\n\n\n"


def claims_of(folder: Path, text: str) -> list[support.Claim]:
    (folder / "tests").mkdir(exist_ok=True)
    (folder / "tests" / "test_it.py").write_text(HEAD + text, encoding="utf-8")
    return support.find_claims(folder)


def test_readme_holds_the_matrix_of_the_markers() -> None:
    readme = (support.ROOT / "README.md").read_text(encoding="utf-8")
    made = fill(readme, {"support": support.render(support.find_claims())})
    assert made == readme, "run: python -m benchmarks.support"


def test_markers_on_a_test_and_on_its_parameters_are_combined(tmp_path: Path) -> None:
    text = (
        'KINDS = [pytest.param(1, marks=pytest.mark.supports(feature="full")),\n'
        '         pytest.param(2, marks=pytest.mark.supports(feature="LoRA"))]\n'
        '@pytest.mark.supports(host="Trainer")\n@pytest.mark.parametrize("kind", KINDS)\n'
        "def test_a(kind): ...\n"
        '@pytest.mark.supports(host="FSDP1", feature="full", refused=True)\ndef test_b(): ...\n'
        "def test_c(): ...\n"
    )
    found = {(c.host, c.feature, c.refused, c.test) for c in claims_of(tmp_path, text)}
    assert found == {
        ("Trainer", "full", False, "test_a"),
        ("Trainer", "LoRA", False, "test_a"),
        ("FSDP1", "full", True, "test_b"),
    }
    lines = support.render(claims_of(tmp_path, text)).splitlines()
    assert lines[2].startswith("| Trainer | [yes](tests/test_it.py) | [yes](tests/test_it.py) |  |")
    assert lines[3].startswith("| FSDP1 | [refused](tests/test_it.py) |  |")


@pytest.mark.parametrize(
    ("decorators", "message"),
    [
        ('@pytest.mark.supports(host="Trainer")', "needs both host and feature"),
        (
            '@pytest.mark.supports(host="Trainer", feature="full")\n@pytest.mark.skip',
            "claims support but may not run",
        ),
    ],
)
def test_a_claim_that_says_too_little_is_an_error(
    decorators: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        claims_of(tmp_path, f"{decorators}\ndef test_a(): ...\n")


def test_a_row_that_the_matrix_lacks_is_an_error(tmp_path: Path) -> None:
    text = '@pytest.mark.supports(host="Trainr", feature="full")\ndef test_a(): ...\n'
    with pytest.raises(ValueError, match="unknown host or feature"):
        support.render(claims_of(tmp_path, text))
