# moelab from its sources, for a CPU; for a GPU with torch's builds for its CUDA (pytorch.org lists them):
#   docker build -t moelab .
#   docker build -t moelab:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#   docker run --rm -v "$PWD:/work" moelab demo
# CUDA's libraries come as packages with such a build; the host brings the driver (docker run --gpus all).
ARG BASE=python:3.13-slim
FROM ${BASE} AS wheel
RUN python -m pip install --no-cache-dir 'build>=1.2' 'hatchling>=1.25'
WORKDIR /source
COPY . .
RUN python -m build --wheel --no-isolation --outdir /dist

FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.lock /tmp/requirements.lock
# torch first and from its own index: the version is the lock's, the build (CPU or CUDA) the index's.
RUN python -m pip install --no-cache-dir --index-url "${TORCH_INDEX}" "$(grep '^torch==' /tmp/requirements.lock)"
COPY --from=wheel /dist /dist
RUN python -m pip install --no-cache-dir -c /tmp/requirements.lock /dist/*.whl && rm -r /dist /tmp/requirements.lock
# Nothing needs root; what is mounted at /work must be writable by the user that is given (docker run --user).
RUN useradd --create-home moelab && mkdir /work && chown moelab /work
USER moelab
WORKDIR /work
ENTRYPOINT ["moelab"]
CMD ["--help"]
