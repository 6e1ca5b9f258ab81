#!/usr/bin/env bash
# Builds llama.cpp from llama-cpp-python's source package into FOLDER, outside the repository. Needs a C++ compiler.
#
#     bash tests/optional/setup_llama_cpp.sh FOLDER
#     MOELAB_LLAMA_CPP=FOLDER python -m pytest tests/optional
#
# Everything comes from PyPI: one source package, sentencepiece, diskcache, and cmake and ninja where the machine has
# none. JOBS=1 for one core.
set -euo pipefail
VERSION=0.3.36
folder=$(realpath -m "${1:?give the folder to build in}")
python=${PYTHON:-python3}
mkdir -p "$folder"
cd "$folder"

[ -x tools/bin/pip ] || "$python" -m venv tools
if ! command -v cmake > /dev/null || ! command -v ninja > /dev/null; then
    tools/bin/pip install --quiet --disable-pip-version-check cmake ninja
    PATH=$folder/tools/bin:$PATH
fi
# What the converter and the binding import beyond what moelab's tests have.
tools/bin/pip install --quiet --disable-pip-version-check --target packages --upgrade --no-deps sentencepiece diskcache

if [ ! -d "llama_cpp_python-$VERSION" ]; then
    tools/bin/pip download --quiet --disable-pip-version-check --no-deps --no-binary llama_cpp_python \
        --dest . "llama_cpp_python==$VERSION"
    tar xzf "llama_cpp_python-$VERSION.tar.gz"
fi
ln -sfn "llama_cpp_python-$VERSION" source

# -O1 without NDEBUG: quick to build, and its assertions speak.
cmake -G Ninja -S source/vendor/llama.cpp -B build \
    -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DBUILD_SHARED_LIBS=ON \
    -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF -DGGML_LLAMAFILE=OFF > configure.txt
cmake --build build --target llama --parallel "${JOBS:-2}" > build.txt || { tail -30 build.txt; exit 1; }
test -e build/bin/libllama.so || test -e build/bin/libllama.dylib
echo "built: export MOELAB_LLAMA_CPP=$folder"
