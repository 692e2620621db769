# Sourced by scripts/demo.sh and tests/test.sh: makes a virtual environment with kda_hf in it and puts it on PATH.
#
#   KDA_HF_VENV           where the environment is (default: .venv in the repository)
#   KDA_HF_TRANSFORMERS   the version of transformers to test with (default: the newest 5.x)
#   PYTHON                the interpreter to start from (default: python3)
#
# On a machine whose Python already has torch, that torch is used: it is the one that fits the GPU.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${KDA_HF_VENV:-$repository/.venv}
python=${PYTHON:-python3}

if ! [ -x "$venv/bin/python" ]; then
    echo "Creating $venv"
    if "$python" -c "import torch, transformers" 2>/dev/null; then
        "$python" -m venv --system-site-packages "$venv"
    else
        "$python" -m venv "$venv"
    fi
fi
export PATH="$venv/bin:$PATH"
pip=(python -m pip --disable-pip-version-check)

if ! python -c "import torch" 2>/dev/null; then
    echo "Installing torch"
    "${pip[@]}" install --quiet "torch==2.13.0"
fi
if [ -n "${KDA_HF_TRANSFORMERS:-}" ]; then
    "${pip[@]}" install --quiet "transformers==$KDA_HF_TRANSFORMERS"
fi
# The build runs in this environment: an isolated one would fetch its own setuptools, which needs a network.
if ! python -c "import setuptools, sys; sys.exit(int(setuptools.__version__.split('.')[0]) < 77)" 2>/dev/null; then
    "${pip[@]}" install --quiet "setuptools>=77"
fi
if [ -z "$(python "$repository/third_party/resolve.py" nvcc)" ]; then
    echo "No nvcc here: the CUDA kernels are not built"
else
    for requirement in $(python "$repository/third_party/resolve.py" missing); do
        options=()
        # Of CUTLASS only the headers are used: out of the environment, where pip would miss what its Python part needs.
        [[ $requirement != nvidia-cutlass* ]] || options=(--no-deps --upgrade --target "$repository/build/third_party")
        "${pip[@]}" install --quiet "${options[@]}" "$requirement" || [ -e "$repository/kda_hf/_C.abi3.so" ]
    done
fi
echo "Installing kda_hf"
"${pip[@]}" install --quiet --no-build-isolation "$repository[${KDA_HF_EXTRAS:-test}]"
