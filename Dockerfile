#   docker build --target cpu -t kdtrain --build-arg COMMIT=$(git rev-parse HEAD) .
#   docker run --rm kdtrain            # the demo (downloads the teacher: 93 MB)
#   docker run --rm kdtrain test       # the fast tier of the tests
#   docker build --target gpu -t kdtrain-gpu .
#   docker run --rm --gpus all --shm-size 8g kdtrain-gpu deepspeed launch/train.py CONFIG.yaml
#
# For torch's small CPU build add --build-arg PIP_EXTRA_INDEX_URL=<index with torch's CPU wheels>.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 HF_HUB_OFFLINE=1
RUN useradd --create-home --uid 1000 kdtrain && mkdir /app && chown kdtrain /app
WORKDIR /app
USER kdtrain

FROM base AS cpu
ARG PIP_EXTRA_INDEX_URL
# Only what the installation reads, so that a change of the source does not install everything again.
COPY --chown=kdtrain setup.py pyproject.toml README.md constraints-cpu.txt ./
COPY --chown=kdtrain kdtrain/__init__.py kdtrain/
COPY --chown=kdtrain kernels/ kernels/
COPY --chown=kdtrain launch/quickstart.sh launch/
RUN sh launch/quickstart.sh install
ENV PATH=/app/.venv/bin:$PATH
COPY --chown=kdtrain . .
ARG COMMIT=unknown
LABEL org.opencontainers.image.revision=$COMMIT org.opencontainers.image.licenses=Apache-2.0
ENTRYPOINT ["sh", "launch/quickstart.sh"]
CMD ["demo"]

# The CUDA toolkit is here for flash-attn, which is compiled, and for DeepSpeed's fused operators, built at first use.
# gcc and python3-dev are needed when a run starts, too: Triton compiles a launcher for each kernel.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS gpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 DEBIAN_FRONTEND=noninteractive
RUN apt-get update && apt-get install -y --no-install-recommends \
        build-essential python3 python3-dev python3-venv git pdsh openssh-client \
    && rm -rf /var/lib/apt/lists/* \
    && (userdel --remove ubuntu || true) && useradd --create-home --uid 1000 kdtrain && mkdir /app && chown kdtrain /app
WORKDIR /app
USER kdtrain
ENV PATH=/app/.venv/bin:$PATH
# Compilations of flash-attn at a time; each takes up to 10 GB of memory.
ARG JOBS=4
COPY --chown=kdtrain setup.py pyproject.toml README.md constraints-cpu.txt constraints-gpu.txt ./
COPY --chown=kdtrain kdtrain/__init__.py kdtrain/
COPY --chown=kdtrain kernels/ kernels/
RUN python3 -m venv .venv \
    && pip install --upgrade -c constraints-gpu.txt pip setuptools wheel \
    && pip install -c constraints-gpu.txt torch ninja packaging psutil einops \
    && DS_BUILD_OPS=0 MAX_JOBS=$JOBS pip install -c constraints-gpu.txt --no-build-isolation deepspeed flash-attn \
    && pip install -c constraints-gpu.txt --no-build-isolation -e '.[dev,gguf,gpu,wandb]'
COPY --chown=kdtrain . .
# An image whose flash-attn was built for another torch ends here, not in a run: attention=auto would pass it by.
RUN python -c "import sys; from kdtrain.models.attention_packages import flash_obstacle as why; sys.exit(why('flash_attention_2'))"
ARG COMMIT=unknown
LABEL org.opencontainers.image.revision=$COMMIT org.opencontainers.image.licenses=Apache-2.0
CMD ["python", "-m", "pytest", "-m", "gpu"]
