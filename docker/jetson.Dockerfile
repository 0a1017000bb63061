# The device's runtime on a Jetson: selects, chats from a bundle, answers its health check. JetPack 6 and 7:
#   docker build -f docker/jetson.Dockerfile --build-arg JETPACK=6 -t edge-sdss:jp6 .
#   docker build -f docker/jetson.Dockerfile --build-arg JETPACK=7 --build-arg BASE_IMAGE=docker.io/library/ubuntu:24.04 -t edge-sdss:jp7 .
# PIP_ARGS, RUNTIME: NVIDIA's Jetson index and onnxruntime-gpu, as `edge-sdss doctor` says for this image. EXTRAS: run,
# or "train,run" to tune as well, for which a torch for this GPU must be in PIP_ARGS' index.
# PYTHON: only for a base with another one than JetPack's.
ARG BASE_IMAGE=docker.io/library/ubuntu:22.04

FROM ${BASE_IMAGE} AS build
ARG JETPACK=6
ARG PYTHON=""
ARG EXTRAS=run
ARG RUNTIME=onnxruntime
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Versions are the distribution's: one file serves two of them.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY export export
COPY kernels kernels
COPY edge_sdss edge_sdss
# hadolint ignore=SC2086
RUN case "${JETPACK}" in 6) wanted=3.10 ;; 7) wanted=3.12 ;; *) echo "JETPACK is 6 or 7, not ${JETPACK}" >&2; exit 2 ;; esac; \
    wanted=${PYTHON:-${wanted}}; \
    found=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
    if [ "${found}" != "${wanted}" ]; then \
        echo "JetPack ${JETPACK} has Python ${wanted}, this base has ${found}: give another BASE_IMAGE" >&2; exit 2; \
    fi; \
    python3 -m venv /opt/edge-sdss \
    && /opt/edge-sdss/bin/pip install ${PIP_ARGS} -c constraints.txt ".[${EXTRAS}]" \
    && if [ "${RUNTIME}" != onnxruntime ]; then \
        /opt/edge-sdss/bin/pip uninstall -y onnxruntime && /opt/edge-sdss/bin/pip install ${PIP_ARGS} "${RUNTIME}"; \
    fi \
    && install -d -o 10001 -g 10001 /opt/edge-sdss/data

FROM ${BASE_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/edge-sdss /opt/edge-sdss
COPY --from=build --chown=10001:10001 /opt/edge-sdss/data /data
ENV PATH=/opt/edge-sdss/bin:$PATH EDGE_SDSS_HOME=/data/home EDGE_SDSS_CACHE=/data/cache \
    EDGE_SDSS_SOCKET=/tmp/edge-sdss.sock HOME=/tmp PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /data
VOLUME /data
HEALTHCHECK --interval=30s --timeout=10s --start-period=20s CMD ["edge-sdss", "health"]
ENTRYPOINT ["edge-sdss"]
CMD ["serve"]
