#!/usr/bin/env bash
# Compiles every C++ source with clang for systems that are not at hand, and runs the kernels of aarch64 in an emulator
# (qemu-aarch64-static, if it is installed).
#   packaging/check_compilers.sh [TARGET...]
# PYTHON has pybind11, and ziglang: clang with the headers of all these systems. Those of Python are this machine's: they
# fit any 64-bit system but Windows.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")
targets=("$@")
[ $# -gt 0 ] || targets=(x86_64-linux-gnu.2.28 aarch64-linux-gnu.2.28 x86_64-macos aarch64-macos)
"$python" -c 'import pybind11, ziglang' || { echo "$python needs packages: pip install pybind11 ziglang" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
read -ra headers < <("$python" -c 'import pybind11, sysconfig; print("-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include())')
# Without OpenMP the number of threads is not read; a processor without SSE has no subnormals to switch off.
flags=(-std=c++17 -O3 -Wall -Wextra -Werror -Wno-psabi -Wno-unused-parameter -Wno-unused-variable)
clang() { "$python" -m ziglang c++ "${flags[@]}" "$@"; }

for target in "${targets[@]}"; do
    variants=(generic) macros=(-DMEDGMAE_GENERIC)
    case $target in x86_64-*) variants+=(avx2 avx512) macros+=(-DMEDGMAE_AVX2 -DMEDGMAE_AVX512) ;; esac
    for variant in "${variants[@]}"; do
        case $variant in
            generic) extra=() ;;
            avx2) extra=(-mavx2 -mfma) ;;
            avx512) extra=(-mavx512f -mfma) ;;
        esac
        # Apple's compiler has no OpenMP runtime, so setup.py compiles without it there.
        case $target in *-linux-*) extra+=(-fopenmp) ;; esac
        clang -target "$target" "${extra[@]}" -DMEDGMAE_VARIANT="$variant" -c cuda/cpu_kernels.cpp -o "$folder/kernels.o"
    done
    clang -target "$target" "${headers[@]}" "${macros[@]}" -DMEDGMAE_VERSION='"0"' -c cuda/module.cpp -o "$folder/module.o"
    echo "$target: compiled ${variants[*]} and the bindings"
done

if command -v qemu-aarch64-static >/dev/null; then
    clang -target aarch64-linux-musl -static -DMEDGMAE_VARIANT=generic -c cuda/cpu_kernels.cpp -o "$folder/kernels.o"
    for driver in driver driver_sequences driver_project; do
        clang -target aarch64-linux-musl -static "$folder/kernels.o" -DMEDGMAE_VARIANT=generic tests/sanitize/$driver.cpp -o "$folder/$driver"
        echo -n "aarch64 in qemu: "
        qemu-aarch64-static "$folder/$driver" 40
    done
else
    echo "aarch64: not run, qemu-aarch64-static is not installed"
fi
