# megatron-vlm on AMD GPUs (ROCm). docs/rocm.md says which images and cards it has been run on.
#   docker build -t megatron-vlm .
#   docker run -it --device /dev/kfd --device /dev/dri --group-add video \
#       --group-add "$(stat -c %g /dev/kfd)" --ipc host --network host --shm-size 64G \
#       --cap-add SYS_PTRACE --security-opt seccomp=unconfined -v /data:/data megatron-vlm
# For several nodes, also: --device /dev/infiniband --ulimit memlock=-1
#
# AMD's training image: torch, Transformer Engine, flash-attn, aiter and Apex. v26.5 (July 2026) is on a nightly ROCm;
# v26.3 is the newest on a released one (7.2.1), with torch 2.10:
#   docker build --build-arg BASE=rocm/primus:v26.3 .
ARG BASE=rocm/primus:v26.5
# hadolint ignore=DL3006
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
USER 0
ARG USER_ID=10001
RUN useradd --create-home --uid "${USER_ID}" --shell /bin/bash trainer

ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
WORKDIR /opt/megatron-vlm

# PyPI has no ROCm builds of these packages. pip, now and in the running container, may not replace them.
COPY docker/base_packages.py docker/
RUN python3 docker/base_packages.py write /etc/megatron-vlm-constraints.txt
ENV PIP_CONSTRAINT=/etc/megatron-vlm-constraints.txt

# Apex has the optimizer kernels. Not every base image has it.
ARG APEX_REF=release/1.10.0
RUN if ! python3 -c 'import apex.optimizers'; then \
        git clone --depth 1 --branch "${APEX_REF}" https://github.com/ROCm/apex /tmp/apex \
        && APEX_BUILD_AMP_C=1 APEX_BUILD_APEX_C=1 python3 -m pip install --no-deps --no-build-isolation /tmp/apex \
        && rm -rf /tmp/apex; \
    fi

COPY --chown=${USER_ID} . .
# Versions: the ranges of pyproject.toml, and what the base image has.
# hadolint ignore=DL3013
RUN python3 -m pip install '.[rocm,inference,test]' \
    && python3 -m pip install --no-deps mosaicml-streaming==0.13.0 \
    && python3 docker/base_packages.py check "${PIP_CONSTRAINT}" \
    && python3 -c 'import torch; assert torch.version.hip, "this torch is not built for ROCm"' \
    && python3 -m pip list --format=freeze > /etc/megatron-vlm-manifest.txt \
    && chown trainer /opt/megatron-vlm

USER ${USER_ID}
