"""Builds `kda_hf/_C.abi3.so` where nvcc is found, and `kda_hf/_cpu.abi3.so` where a C++ compiler and torch are.

KDA_HF_CUDA_ARCHS   GPU architectures, separated by spaces (default: 90a)
MAX_JOBS            files compiled at the same time (default: 2; the compiler takes gigabytes of memory for each)
CXX                 the C++ compiler for the CPU (default: c++, g++ or clang++)

Without them kda_hf installs as pure Python, and so it does where the CPU extension does not compile. The extensions
need no GPU to build. They use torch's stable ABI and nothing of Python's, so that one file serves every Python from
3.10 and every torch from 2.11 on. What was built stays in build: only what changed is compiled again.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "third_party"))
import resolve  # noqa: E402


PREBUILT = ROOT / "kda_hf" / "_C.abi3.so"
OBJECTS = ROOT / "build" / "csrc"
CPU_SOURCES = ROOT / "csrc" / "cpu"
CPU_BUILT = ROOT / "build" / "cpu" / "_cpu.abi3.so"
OLDEST_TORCH = "0x020b000000000000"  # 2.11: newer functions of the stable ABI are hidden from the bindings


def ninja_file() -> str:
    nvcc, cutlass, torch = resolve.nvcc(), resolve.cutlass(), resolve.torch()
    archs = os.environ.get("KDA_HF_CUDA_ARCHS", "90a").replace(";", " ").replace(",", " ").split()
    gencode = " ".join(f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
    host = f"-std=c++17 -O3 -DNDEBUG -Xcompiler -fPIC,-fvisibility=hidden,-ffile-prefix-map={_quoted(ROOT)}=."
    sources = [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.cu")]
    sources = sorted(source for source in sources if CPU_SOURCES not in source.parents)
    lines = [
        "ninja_required_version = 1.8",
        f"nvcc = {shlex.quote(str(nvcc))}",
        f"common = {host} -I{_quoted(ROOT / 'csrc')}",
        "rule kernel",
        f"  command = $nvcc $common {gencode} --expt-relaxed-constexpr -isystem {_quoted(cutlass)} "
        "-Xptxas -v -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || { cat $out.log; exit 1; }; "
        "grep -iE 'warning|performance loss' $out.log || true",  # the rest of it is for scripts/check_kernels.py
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $in",
        "rule bindings",
        f"  command = $nvcc $common -DUSE_CUDA -DTORCH_TARGET_VERSION={OLDEST_TORCH} "
        f"-isystem {_quoted(torch / 'include')} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = g++ $in",
        "rule link",
        # libtorch brings libtorch_cuda where there is one; nothing here refers to it, so that it must not be dropped
        f"  command = $nvcc {gencode} -shared -cudart static $in -o $out -L{_quoted(torch / 'lib')} "
        "-Xlinker --no-as-needed,--exclude-libs,ALL -ltorch -ltorch_cpu -lc10",
        "  description = link $out",
    ]
    objects = []
    for source in sources:
        name = source.relative_to(ROOT / "csrc").as_posix()
        objects.append(name + ".o")
        rule = "kernel" if source.suffix == ".cu" else "bindings"
        lines.append(f"build {objects[-1]}: {rule} {_escaped(source)}")
    lines.append(f"build {PREBUILT.name}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path)).replace("$", "$$")


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildExtension(build_ext):
    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if ext.name == "kda_hf._cpu":
            built = self.compile_for_cpu()
        elif resolve.nvcc() and not (resolve.missing() and PREBUILT.exists()):
            built = self.compile()
        else:
            built = PREBUILT
            _say(f"{', '.join(resolve.missing()) or 'nvcc'} not found: {PREBUILT} is taken as it is, built elsewhere.")
        if target != built:
            target.parent.mkdir(parents=True, exist_ok=True)
            # A new file, not new bytes in the old one: a process may have that one mapped.
            target.unlink(missing_ok=True)
            if built is not None:
                shutil.copy2(built, target)

    @staticmethod
    def compile() -> Path:
        OBJECTS.mkdir(parents=True, exist_ok=True)
        try:
            (OBJECTS / "build.ninja").write_text(ninja_file())
        except resolve.NotFound as error:
            sys.exit(f"kda_hf: {error}")
        if shutil.which("ninja") is None:
            sys.exit("kda_hf: ninja is not installed. Run `pip install ninja`.")
        subprocess.run(["ninja", "-C", str(OBJECTS), "-j", os.environ.get("MAX_JOBS", "2")], check=True)
        return OBJECTS / PREBUILT.name

    @staticmethod
    def compile_for_cpu() -> Path | None:
        """The extension, or None where it does not compile: there is another way for all that it does."""
        compiler, torch = resolve.compiler(), resolve.torch()
        # For any processor of the kind: which instructions it has is looked up when it runs.
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-psabi"]
        paths = [f"-ffile-prefix-map={ROOT}=.", "-isystem", str(torch / "include"), f"-L{torch / 'lib'}"]
        sources = sorted(map(str, CPU_SOURCES.glob("*.cpp")))
        command = [*compiler, *flags, f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", *paths, *sources]
        changed = max(path.stat().st_mtime for path in (*CPU_SOURCES.iterdir(), Path(__file__)))
        if not CPU_BUILT.exists() or CPU_BUILT.stat().st_mtime < changed:
            CPU_BUILT.parent.mkdir(parents=True, exist_ok=True)
            CPU_BUILT.unlink(missing_ok=True)
            try:
                subprocess.run([*command, "-o", str(CPU_BUILT), "-ltorch_cpu", "-lc10"], check=True)
            except (OSError, subprocess.CalledProcessError):
                CPU_BUILT.unlink(missing_ok=True)
                (ROOT / "kda_hf" / CPU_BUILT.name).unlink(missing_ok=True)  # of other sources
                _say_without_cpu(f"{' '.join(compiler)} does not compile it.")
                return None
        return CPU_BUILT


def _say_without_cpu(reason: object) -> None:
    _say(f"the CPU extension is NOT built, and decoding on a CPU is slower without it: {reason}")


def _say(text: str) -> None:
    print(f"kda_hf: {text}", file=sys.stderr)


def extensions() -> list[Extension]:
    found = []
    if resolve.nvcc() or PREBUILT.exists():
        found.append(Extension("kda_hf._C", sources=[], py_limited_api=True))
    else:
        _say("nvcc not found: the CUDA extension is NOT built.")
    try:
        resolve.compiler(), resolve.torch()
        found.append(Extension("kda_hf._cpu", sources=[], py_limited_api=True, optional=True))
    except resolve.NotFound as reason:
        _say_without_cpu(reason)
    return found


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
