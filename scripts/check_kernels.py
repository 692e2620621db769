"""Checks what the compiler made of the kernels, after a build has left it in build/csrc.

No register may spill, no warning be given, no wgmma be serialised, and the kernels of the table below must use the
tensor cores as their design says. Disassembling needs cuobjdump and nvdisasm: those of the CUDA toolkit, or
`pip install --no-deps nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "third_party"))
import resolve  # noqa: E402


EXTENSION = ROOT / "build" / "csrc" / "_C.abi3.so"
# Kernel, and the fewest warpgroup MMA instructions (HGMMA) in each of its instances.
TENSOR_CORES = {"prepare": 12, "recurrence": 16}


def kernel_name(symbol: str) -> str:
    """`recurrence` of `_ZN3kda10recurrenceI13__nv_bfloat16Li128EEv...`."""
    name, rest = symbol, symbol.removeprefix("_ZN").removeprefix("_Z")
    while match := re.match(r"\d+", rest):
        start, length = match.end(), int(match.group())
        name, rest = rest[start : start + length], rest[start + length :]
    return name


def logs() -> list[str]:
    """What nvcc and ptxas said of each source."""
    sources = sorted((ROOT / "csrc").glob("**/*.cu"))
    paths = [ROOT / "build" / "csrc" / f"{source.relative_to(ROOT / 'csrc')}.o.log" for source in sources]
    if missing := [str(path) for path in paths if not path.exists()]:
        sys.exit(f"not built: {', '.join(missing)}; run `python setup.py build_ext --inplace`")
    return [path.read_text() for path in paths]


def complaints(log: str) -> list[str]:
    found, symbol = [], ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            symbol = match.group(1)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spills and spills.groups() != ("0", "0"):
            found.append(f"{symbol} spills: {line.strip()}")
        if re.search("warning|performance loss", line, re.IGNORECASE):
            found.append(line.strip())
    return found


def tool(name: str) -> str:
    """A program of the toolkit that nvcc is of, of PATH, or of its PyPI package."""
    folders = [os.environ.get("PATH", os.defpath)]
    if nvcc := resolve.nvcc():
        folders.append(str(nvcc.resolve().parent))
    try:
        package = metadata.distribution(f"nvidia-cuda-{name}")
    except metadata.PackageNotFoundError:
        pass
    else:
        folders += [str(Path(str(package.locate_file(f))).parent) for f in package.files or () if f.name == name]
    found = shutil.which(name, path=os.pathsep.join(folders))
    return found or sys.exit(f"{name} not found: pip install --no-deps nvidia-cuda-{name}")


def instructions() -> dict[str, Counter[str]]:
    """How often each kernel has a warpgroup MMA, and reads or writes memory of its own (an array, not a spill)."""
    environment = os.environ | {"NVDISASM_PATH": str(Path(tool("nvdisasm")).parent)}
    environment["PATH"] = os.pathsep.join([environment["NVDISASM_PATH"], environment.get("PATH", os.defpath)])
    command = [tool("cuobjdump"), "-sass", str(EXTENSION)]
    sass = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    kernels: dict[str, Counter[str]] = {}
    count: Counter[str] = Counter()
    for line in sass.splitlines():
        if match := re.search(r"Function : (\w+)", line):
            count = kernels.setdefault(match.group(1), Counter())
        elif match := re.search(r"\b(HGMMA|LDL|STL)\b", line):
            count["HGMMA" if match.group(1) == "HGMMA" else "local"] += 1
    return kernels


def main() -> None:
    found = [complaint for log in logs() for complaint in complaints(log)]
    kernels = instructions()
    names = {kernel_name(symbol) for symbol in kernels}
    for symbol, count in sorted(kernels.items()):
        wanted = TENSOR_CORES.get(kernel_name(symbol), 0)
        print(f"HGMMA {count['HGMMA']:4}  local memory {count['local']:4}  {symbol}")
        if count["HGMMA"] < wanted:
            found.append(f"{symbol} has {count['HGMMA']} HGMMA, its design wants {wanted}")
        if count["local"]:
            found.append(f"{symbol} has an array that is not in registers: {count['local']} accesses")
    # A stub has no kernel at all: nothing to hold against it.
    found += [f"there is no kernel {name}" for name in TENSOR_CORES if kernels and name not in names]
    if found:
        sys.exit("\n".join(found))
    print(f"{len(kernels)} kernels: no spills, no warnings, tensor cores where they should be")


if __name__ == "__main__":
    main()
