# reimagen/retrieval: knowledge bases: (image, caption) pairs in, neighbors out
#
# Built from the repository's root: make image-build IMAGE=retrieval (README.md beside this file says what it wants).
ARG DEBIAN_DIGEST

FROM docker.io/library/debian:bookworm-slim@${DEBIAN_DIGEST} AS build
ARG DEBIAN_MIRROR=http://snapshot.debian.org/archive
ARG DEBIAN_SNAPSHOT
COPY deploy/images/debian-python.sh /build/
RUN ["sh", "/build/debian-python.sh", "/image"]
COPY deploy/images/python-packages.sh deploy/images/packages/stubs.lock deploy/images/packages/retrieval*.lock /build/
RUN ["sh", "/build/python-packages.sh", "/build/stubs.lock", "/build/stubs"]
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu/torch/
# `retrieval-clip` looks up by CLIP too: torch and transformers more.
ARG LOCK=retrieval
RUN sh /build/python-packages.sh "/build/${LOCK}.lock" /opt/reimagen
COPY deploy/images/product.sh /build/
COPY proto /build/proto
COPY LICENSE NOTICE /opt/product/
COPY common /opt/product/common
COPY client /opt/product/client
COPY retrieval_svc /opt/product/retrieval_svc
COPY deploy/__init__.py /opt/product/deploy/
COPY deploy/k8s /opt/product/deploy/k8s
RUN ["sh", "/build/product.sh", "/build/proto", "/opt/product", "/opt/reimagen"]

FROM scratch
COPY --from=build /image /
COPY --from=build /opt/reimagen /opt/reimagen
COPY --from=build /opt/product /opt/product
ARG DEBIAN_DIGEST
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="reimagen/retrieval" \
      org.opencontainers.image.description="knowledge bases: (image, caption) pairs in, neighbors out" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim" \
      org.opencontainers.image.base.digest="${DEBIAN_DIGEST}"
ENV PATH=/opt/reimagen/bin \
    HOME=/tmp \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    REIMAGEN_RETRIEVAL_REVISION=${REVISION}
WORKDIR /opt/product
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "retrieval_svc"]
CMD ["serve"]
