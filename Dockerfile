# megatron-vlm on AMD GPUs (ROCm).
#   docker build -t megatron-vlm .
#   docker run -it --device /dev/kfd --device /dev/dri --group-add video --ipc host --network host \
#       --security-opt seccomp=unconfined -v /data:/data megatron-vlm
# Any base image with Python 3.11 or 3.12 and a ROCm build of torch 2.6 or later works, also rocm/megatron-lm:*_py312:
#   docker build --build-arg BASE=... .
ARG BASE=rocm/pytorch:rocm7.2_ubuntu24.04_py3.12_pytorch_release_2.9.1
FROM ${BASE}

ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1
WORKDIR /opt/megatron-vlm
COPY . .

# These packages keep the versions of the base image, because PyPI has no ROCm builds of them. If the image's
# megatron-core is too old, pip fails here with a message.
RUN python3 -m pip list --format=freeze \
        | grep -iE '^(torch|torchvision|torchaudio|triton|pytorch[-_]triton[-_]rocm|apex|transformer[-_]engine|flash[-_]attn|amd[-_]aiter|megatron[-_]core)==' \
        > /tmp/from-base.txt \
    && cat /tmp/from-base.txt \
    && python3 -m pip install -c /tmp/from-base.txt '.[train,serve,inference,test]' \
    && python3 -m pip install --no-deps mosaicml-streaming==0.13.0 \
    && python3 -c 'import torch; assert torch.version.hip, "pip has replaced the ROCm build of torch"'
