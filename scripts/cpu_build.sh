#!/usr/bin/env bash
# The package with its compiled CPU operators, without CMake: scripts/cpu_build.sh FOLDER [COMPILER FLAGS]
# writes FOLDER/src, to be put on PYTHONPATH.
# Needs a C++17 compiler (CXX, default g++) and nanobind in the environment of PYTHON (default python3).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
native=$root/src/selfindex/backends/cpu/native
mkdir -p "$1/build"
cp -r "$root/src" "$1/src"
rm -f "$1"/src/selfindex/backends/cpu/_native*
# An editable installation would bring its own module: its import hook goes.
echo 'import sys; sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]' \
  > "$1/src/sitecustomize.py"
cd "$1/build"
shift
read -r nanobind headers < <("${PYTHON:-python3}" -c \
  'import nanobind, sysconfig; print(nanobind.source_dir(), sysconfig.get_path("include"))')
[ -f "$headers/Python.h" ] || { echo "Python's headers are not in $headers: install them" >&2; exit 1; }

export NATIVE_FLAGS="-std=c++17 -fPIC -fvisibility=hidden -Wno-psabi ${*:--O2} -I$nanobind/../include
  -I$nanobind/../ext/robin_map/include -I$headers"
case $(uname -m) in
  x86_64) NATIVE_FLAGS+=" -DSELFINDEX_X86" others=neon ;;
  aarch64 | arm64) NATIVE_FLAGS+=" -DSELFINDEX_NEON" others='avx.*' ;;
  *) others='avx.*|neon' ;;
esac

compile() {
  local flags=(-Wall -Wextra)
  case $1 in
    *_avx2.cpp) flags+=(-mavx2 -mfma) ;;
    *_avx512.cpp) flags+=(-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl) ;;
    *nb_combined.cpp) flags=(-w -fno-strict-aliasing -O1 -fno-sanitize=all) ;;  # not ours
  esac
  # Word splitting is meant.
  ${CXX:-g++} $NATIVE_FLAGS "${flags[@]}" -c "$1" -o "$(basename "$1" .cpp).o"
}
export -f compile

# The longest first.
{ echo "$nanobind/nb_combined.cpp"; ls "$native"/*.cpp | grep -Ev "kernels_($others)\.cpp"; } |
  xargs -P "$(nproc)" -I{} bash -ec 'compile {}'
${CXX:-g++} ${*:--O2} -shared -o ../src/selfindex/backends/cpu/_native.so ./*.o -lpthread -ldl
