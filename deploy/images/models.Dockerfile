# reimagen/models: a model repository and nothing else, mounted by Tritons; nothing in it runs.
#
# The context is the folder that `python -m generator_svc export` made: make image-build IMAGE=models MODELS=FOLDER.
FROM scratch
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="reimagen/models" \
      org.opencontainers.image.description="model repository of the stages" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
COPY . /
USER 10001:10001
