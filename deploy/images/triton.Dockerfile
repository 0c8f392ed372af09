# reimagen/triton: NVIDIA's Triton with the Python that the stages of a model repository run in.
#
# Built from the repository's root: make image-build IMAGE=triton (README.md beside this file says what it wants).
ARG TRITON_DIGEST

FROM nvcr.io/nvidia/tritonserver:26.07-py3@${TRITON_DIGEST} AS build
RUN ["python3", "-c", "import sys; sys.exit(sys.version_info[:2] != (3, 12))"]
COPY deploy/images/python-packages.sh deploy/images/packages/triton-stubs.lock deploy/images/packages/triton.lock /build/
RUN ["sh", "/build/python-packages.sh", "/build/triton-stubs.lock", "/build/stubs"]
ARG LOCK=triton
RUN sh /build/python-packages.sh "/build/${LOCK}.lock" /opt/reimagen
COPY deploy/images/product.sh /build/
COPY proto /build/proto
COPY LICENSE NOTICE /opt/product/
COPY common /opt/product/common
COPY generator_svc /opt/product/generator_svc
COPY deploy/__init__.py /opt/product/deploy/
COPY deploy/k8s /opt/product/deploy/k8s
RUN ["sh", "/build/product.sh", "/build/proto", "/opt/product", "/opt/reimagen"]

FROM nvcr.io/nvidia/tritonserver:26.07-py3@${TRITON_DIGEST}
COPY --from=build /opt/reimagen /opt/reimagen
COPY --from=build /opt/product /opt/product
ARG TRITON_DIGEST
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="reimagen/triton" \
      org.opencontainers.image.description="Triton with the Python that the stages of a model repository run in" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/tritonserver:26.07-py3" \
      org.opencontainers.image.base.digest="${TRITON_DIGEST}"
# The stub of the Python backend takes the environment of the first `python3` on the path.
ENV PATH=/opt/reimagen/bin:/opt/tritonserver/bin:/usr/local/nvidia/bin:/usr/local/cuda/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/product
USER 10001:10001
STOPSIGNAL SIGTERM
ENTRYPOINT ["tritonserver"]
CMD ["--help"]
