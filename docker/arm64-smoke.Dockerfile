# A smoke test of the very aarch64 wheels under qemu-user: it says that they load and compute, not how fast.
#   docker build --platform linux/arm64 -f docker/arm64-smoke.Dockerfile -t edge-sdss:arm64-smoke .
#   docker run --rm --platform linux/arm64 --network none edge-sdss:arm64-smoke
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm
FROM ${BASE_IMAGE}
ARG PIP_ARGS=""
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY export export
COPY kernels kernels
COPY edge_sdss edge_sdss
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=SC2086
RUN test "$(uname -m)" = aarch64 \
    && python3 -m venv /opt/edge-sdss \
    && /opt/edge-sdss/bin/pip install ${PIP_ARGS} -c constraints.txt '.[run]' \
    && install -d -o 10001 -g 10001 /data
ENV PATH=/opt/edge-sdss/bin:$PATH EDGE_SDSS_HOME=/data/home EDGE_SDSS_CACHE=/data/cache HOME=/tmp
USER 10001:10001
WORKDIR /data
HEALTHCHECK NONE
ENTRYPOINT ["edge-sdss"]
# Exit 1 says that there is no torch here, which the device's runtime does not need.
CMD ["doctor"]
