"""Where the build finds what this repository does not hold: compilers, CUTLASS and torch's headers.

`python third_party/resolve.py nvcc|compiler|cutlass|torch|missing` prints it, for scripts. What is looked for is not
imported.
"""

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path


HERE = Path(__file__).resolve().parent
CHECKOUT = HERE / "cutlass"
UNPACKED = HERE.parent / "build" / "third_party"
PIN = next(line for line in (HERE / "requirements.txt").read_text().splitlines() if not line.startswith("#"))
CUTLASS_PACKAGE, CUTLASS_VERSION = PIN.split("==")
TORCH = "torch>=2.11"


class NotFound(Exception):
    """Says what is missing and what to do about it."""


def nvcc() -> Path | None:
    """The CUDA compiler: `CUDACXX`, else that of `CUDA_HOME`, else the one on PATH or in the usual place; or None."""
    if os.environ.get("CUDACXX"):
        found = shutil.which(os.environ["CUDACXX"])
    elif os.environ.get("CUDA_HOME"):
        found = shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    else:
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Path(found) if found else None


def compiler() -> list[str]:
    """The C++ compiler for the CPU, with its first arguments: `CXX`, else the usual one on PATH."""
    names = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]
    for name in names:
        if name and shutil.which(name[0]):
            return name
    raise NotFound(f"no C++ compiler is found: {' or '.join(' '.join(name) for name in names)}.")


def cutlass() -> Path:
    """CUTLASS's headers: a checkout in third_party/cutlass, which may be of any version, else the pinned package's,
    unpacked in build/third_party or installed."""
    if CHECKOUT.is_dir():
        include, origin = CHECKOUT / "include", str(CHECKOUT)
    else:
        packages = [
            *metadata.distributions(name=CUTLASS_PACKAGE, path=[str(UNPACKED)]),
            *metadata.distributions(name=CUTLASS_PACKAGE),
        ]
        package = next((found for found in packages if found.version == CUTLASS_VERSION), None)
        if package is None:
            versions = f", only {packages[0].version}" if packages else ""
            raise NotFound(f"CUTLASS {CUTLASS_VERSION} is not installed{versions}. {_advice()}")
        include, origin = Path(str(package.locate_file("cutlass_library/source/include"))), CUTLASS_PACKAGE
    if not (include / "cute" / "tensor.hpp").exists():
        raise NotFound(f"{origin} has no headers: {include}/cute/tensor.hpp does not exist. {_advice()}")
    return include


def _advice() -> str:
    return f"Run `pip install --no-deps {PIN}`, or put a checkout of CUTLASS into {CHECKOUT}."


def torch() -> Path:
    """The folder of torch, of which any version from 2.11 on has the headers of the stable ABI.

    pip's isolated build environment hides the environment that it installs into, where torch usually is.
    """
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    for folder in candidates:
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return folder
    raise NotFound(f"torch's headers are not installed. Run `pip install '{TORCH}'`.")


def missing() -> list[str]:
    """Requirements that pip has to fetch before it can build the extension; none where there is no nvcc."""
    if nvcc() is None:
        return []
    requirements = [] if shutil.which("ninja") else ["ninja"]
    for find, requirement in ((cutlass, PIN), (torch, TORCH)):
        try:
            find()
        except NotFound:
            requirements.append(requirement)
    return requirements


if __name__ == "__main__":
    try:
        finders = {"nvcc": nvcc, "compiler": compiler, "cutlass": cutlass, "torch": torch, "missing": missing}
        found = finders[sys.argv[1]]()
        print(*found if isinstance(found, list) else [found or ""])
    except NotFound as error:
        sys.exit(str(error))
