# The gpt2box image. Build arguments choose the stack:
#   STACK=cu121 (default)   CUDA 12.1, Python 3.10, PyTorch 2.4: GPUs up to RTX 40xx
#   STACK=cu13x             CUDA 13, Python 3.13, a current PyTorch: RTX 50xx, which CUDA 12.1 cannot drive
#   STACK=cpu               no GPU: Debian 12, Python 3.11
#   PYTHON=distro           use the distribution's Python instead of conda's
# Everything is pinned: base images by digest, conda's Python by version, packages by hash (requirements/*.lock).
ARG STACK=cu121
ARG PYTHON=${STACK}
ARG CU121_BASE=nvidia/cuda:12.1.1-base-ubuntu22.04@sha256:457a4076c56025f51217bff647ca631c7880ad3dbf546b03728ba98297ebbc22
ARG CU13X_BASE=nvidia/cuda:13.0.1-base-ubuntu24.04@sha256:f8ef28f579ea42a44b415d2c5d46f788e6a9b395c6c83f2929416e1fc192c143
ARG CPU_BASE=debian:bookworm-slim@sha256:4724b8cc51e33e398f0e2e15e18d5ec2851ff0c2280647e1310bc1642182655d
ARG MICROMAMBA=mambaorg/micromamba:1.5.8@sha256:475730daef12ff9c0733e70092aeeefdf4c373a584c952dac3f7bdb739601990

# Additional wheels, such as PyTorch's CPU build: --build-context wheelhouse=FOLDER
FROM scratch AS wheelhouse
# hadolint ignore=DL3006
FROM ${MICROMAMBA} AS micromamba
FROM ${CU121_BASE} AS base-cu121
FROM ${CU13X_BASE} AS base-cu13x
FROM ${CPU_BASE} AS base-cpu

# torch.compile needs gcc for its GPU kernels and g++ for its CPU code.
# hadolint ignore=DL3006
FROM base-${STACK} AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/*.log /var/cache/ldconfig/aux-cache /var/cache/apt/*.bin

# Each of the next two stages installs Python and its headers in /opt/python.
FROM base AS python-conda
ARG STACK
RUN --mount=type=bind,from=micromamba,source=/bin/micromamba,target=/usr/local/bin/micromamba \
    --mount=type=bind,source=requirements,target=/requirements \
    --mount=type=cache,target=/var/cache/conda \
    MAMBA_ROOT_PREFIX=/var/cache/conda micromamba create --yes --always-copy \
        --prefix /opt/python --file "/requirements/conda-${STACK}.yml"

FROM base AS python-distro
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/*.log /var/cache/ldconfig/aux-cache /var/cache/apt/*.bin \
    && mkdir -p /opt/python/bin \
    && ln -s /usr/bin/python3 /opt/python/bin/python3

FROM python-conda AS python-cu121
FROM python-conda AS python-cu13x
FROM python-distro AS python-cpu

# hadolint ignore=DL3006
FROM python-${PYTHON} AS deps
ARG STACK
ENV PATH=/opt/venv/bin:$PATH
# Compile the bytecode here: the user who runs the image cannot write it. It refers to its source by hash, because
# modification times differ between two builds of the same image (make image-verify). SOURCE_DATE_EPOCH does so for pip.
RUN --mount=type=bind,source=requirements,target=/requirements \
    --mount=type=bind,from=wheelhouse,target=/wheelhouse \
    --mount=type=cache,target=/root/.cache \
    export SOURCE_DATE_EPOCH=315532800 PYC_INVALIDATION_MODE=UNCHECKED_HASH PYTHONHASHSEED=0 \
    && /opt/python/bin/python3 -m venv /opt/venv \
    && /opt/python/bin/python3 -m venv /tmp/uv \
    && /tmp/uv/bin/pip install --quiet --require-hashes --requirement /requirements/installer.lock \
    && PATH=/tmp/uv/bin:$PATH UV_SYSTEM_CERTS=1 UV_FIND_LINKS=/wheelhouse UV_LINK_MODE=copy \
        sh /requirements/install.sh /opt/venv "${STACK}" \
    && rm -r /tmp/uv

# The vocabulary and the Shakespeare texts, so that a first run needs no network. gpt2box verifies their sha256 each
# time it reads them.
FROM deps AS assets
WORKDIR /src
COPY gpt2box/__init__.py gpt2box/errors.py gpt2box/
COPY gpt2box/utils/__init__.py gpt2box/utils/files.py gpt2box/utils/paths.py gpt2box/utils/progress.py gpt2box/utils/ranks.py gpt2box/utils/
COPY gpt2box/data/__init__.py gpt2box/data/downloads.py gpt2box/data/
COPY tests/data_files/tinyshakespeare.txt /opt/gpt2box/assets/
RUN python -c "from gpt2box.data.downloads import fetch_all_assets; fetch_all_assets('/opt/gpt2box/assets')"

FROM deps AS runtime
# Any user may run the image, with a read-only root file system and a /tmp that is mounted exec.
ENV HOME=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    HF_HOME=/tmp/cache/huggingface \
    PYTHONPATH=/opt/gpt2box \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_DISABLE_REQUIRE=true \
    GPT2BOX_ASSETS=/opt/gpt2box/assets \
    GPT2BOX_CONFIGS=/configs \
    GPT2BOX_VOLUMES=/volumes
COPY --from=assets /opt/gpt2box/assets /opt/gpt2box/assets
RUN mkdir -p /tmp/cache /input /configs /workspace /volumes \
    && chmod 1777 /tmp/cache
COPY --chmod=755 entrypoint/entrypoint.sh /usr/local/bin/gpt2box
COPY configs /opt/gpt2box/configs
COPY gpt2box /opt/gpt2box/gpt2box
RUN PYTHONHASHSEED=0 python -m compileall -q --invalidation-mode unchecked-hash /opt/gpt2box/gpt2box
USER 1000:1000
WORKDIR /workspace
ARG VERSION=unknown
ARG REVISION=unknown
ARG LOCK_SHA256=unknown
ARG STACK
ENV GPT2BOX_IMAGE="${STACK} ${VERSION} ${REVISION} ${LOCK_SHA256}"
LABEL org.opencontainers.image.title="gpt2box" \
      org.opencontainers.image.description="Train and fine-tune GPT-2 on one consumer GPU" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      gpt2box.stack="${STACK}" \
      gpt2box.lock.sha256="${LOCK_SHA256}"
ENTRYPOINT ["gpt2box"]
