#!/usr/bin/env bash
# Writes .clangd, so that editors understand the CUDA and CUTLASS code in csrc/.
#   CUDA_HOME      the CUDA toolkit (default: found through nvcc)
#   CUTLASS_HOME   a CUTLASS checkout (default: third_party/cutlass, else the PyPI package nvidia-cutlass)
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${CUDA_HOME:-}" ]; then
    # nvcc may be a wrapper: the toolkit's root is where the compiler itself says it is
    CUDA_HOME=$(nvcc --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -1)
    CUDA_HOME=$(cd "${CUDA_HOME:?no CUDA toolkit found: set CUDA_HOME}" && pwd)
fi
includes=$(find -L "$CUDA_HOME" -maxdepth 4 -name cuda_runtime.h -printf '%h\n' 2>/dev/null | head -1)
[ -n "$includes" ] || { echo "No cuda_runtime.h under CUDA_HOME=$CUDA_HOME" >&2; exit 1; }

cutlass=${CUTLASS_HOME:-}
[ -n "$cutlass" ] || ! [ -d third_party/cutlass/include ] || cutlass=$PWD/third_party/cutlass
if [ -z "$cutlass" ]; then
    cutlass=$(python3 -c "import cutlass_library, pathlib; print(pathlib.Path(cutlass_library.__file__).parent / 'source')" 2>/dev/null || true)
fi
torch=$(python3 -c "import torch, pathlib; print(pathlib.Path(torch.__file__).parent / 'include')" 2>/dev/null || true)

{
    echo "CompileFlags:"
    echo "  Compiler: clang++"
    echo "  Add:"
    echo "    - --cuda-path=$CUDA_HOME"
    echo "    - --cuda-gpu-arch=sm_90a"
    echo "    - -std=c++17"
    echo "    - -I$PWD/csrc"
    echo "    - -I$includes"
    [ -z "$cutlass" ] || printf -- "    - -I%s\n" "$cutlass/include" "$cutlass/tools/util/include"
    [ -z "$torch" ] || printf -- "    - -I%s\n" "$torch" "$torch/torch/csrc/api/include"
    echo "  Remove: [-arch=*, -gencode*, --generate-code*, --expt-*, -Xcompiler*, -Xptxas*, -forward-unknown-to-host-compiler]"
    echo "Diagnostics:"
    echo "  UnusedIncludes: None"
} > .clangd
echo "Wrote .clangd: CUDA in $CUDA_HOME, CUTLASS in ${cutlass:-(not found)}, torch in ${torch:-(not found)}"
