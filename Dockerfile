# Image with finermoe-jax and all presets. Build it from a clone:
#
#   docker build --build-arg DEVICE=tpu -t finermoe-jax:tpu .
#
# DEVICE: cpu, tpu or cuda. Package versions are those of constraints.txt.
FROM python:3.12-slim-bookworm

ARG DEVICE=cpu

WORKDIR /opt/finermoe-jax
COPY . .
RUN case "$DEVICE" in \
      cpu) extra='' ;; \
      tpu | cuda) extra="[$DEVICE]" ;; \
      *) echo "DEVICE=$DEVICE must be cpu, tpu or cuda" >&2; exit 1 ;; \
    esac \
    && pip install --no-cache-dir -c constraints.txt -e ".$extra" \
    && finermoe --help

CMD ["finermoe", "--help"]
