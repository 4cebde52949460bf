# Farthing for the CPU, or with BUILD=cuda for NVIDIA's GPUs:
#   docker build -t farthing .
#   docker build -t farthing:cuda --build-arg BUILD=cuda .
# Runs, models and downloads are kept in the volume /data:
#   docker run --rm -it -v farthing:/data farthing run quickstart
#   docker run --rm -it --gpus all -v farthing:/data farthing:cuda run quickstart
FROM python:3.12-slim-bookworm

ARG BUILD=cpu
ARG UV_VERSION=0.13.9

# uv knows where torch's builds are: `cpu`, or `auto` and `cu130` and the like for CUDA.
ARG CUDA=cu130

ENV PYTHONUNBUFFERED=1 \
    UV_NO_CACHE=1 \
    UV_SYSTEM_PYTHON=1

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN case "$BUILD" in cpu) torch=cpu ;; cuda) torch="$CUDA" ;; \
      *) echo "BUILD=$BUILD: must be cpu or cuda" >&2; exit 2 ;; esac \
    && pip install --no-cache-dir "uv==$UV_VERSION" \
    && uv pip install --torch-backend "$torch" -c constraints.txt '.[data]' \
    && rm -rf /src/*

RUN useradd --create-home --uid 1000 farthing && install -d -o farthing -g farthing /data
USER 1000:1000
WORKDIR /data
ENV FARTHING_CACHE=/data/cache \
    HF_HOME=/data/huggingface
VOLUME /data

ENTRYPOINT ["farthing"]
CMD ["--help"]
