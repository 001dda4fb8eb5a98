# The package with torch for CUDA; `docker run --gpus all` gives it GPUs. The image needs no CUDA toolkit.
#   docker build --tag panfpn_fast .
#   docker run --rm --volume "$PWD:/data" panfpn_fast predict photo.jpg --out out/
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS build
# hadolint ignore=DL3008 # the newest patches of the distribution's compiler
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
# 0 leaves out the CUDA ops and takes one minute. Fewer architectures take less time: --build-arg TORCH_CUDA_ARCH_LIST=9.0
ARG PANFPN_CUDA=1
ARG TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;10.0;12.0+PTX"
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN --mount=type=cache,target=/root/.cache/pip \
  if [ "$PANFPN_CUDA" = 1 ]; then CUDA_HOME=$(.ci/install_nvcc /opt/nvcc); export CUDA_HOME; fi; \
  export PANFPN_CUDA TORCH_CUDA_ARCH_LIST; pip wheel --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm
# On a GPU, Triton compiles a small C program at the first call.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels --mount=type=cache,target=/root/.cache/pip \
  pip install "$(echo /wheels/*.whl)[video]" && useradd --uid 1000 --create-home user && install --directory --owner user /data
USER 1000
WORKDIR /data
ENTRYPOINT ["panfpn-fast"]
CMD ["--help"]
