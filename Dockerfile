# The gateway as a container image: docker build --tag email-fax-gateway .
#
# It wants, when it runs: the volume below on a local disk, a configuration (a file mounted at
# /etc/email-fax-gateway/config.toml, or variables FAX_GATEWAY_SECTION__KEY), and three minutes to stop, since a fax
# that is being handed to the carrier is waited for (docker run --stop-timeout 180). It runs as well with a read-only
# root (--read-only --tmpfs /tmp), without capabilities (--cap-drop ALL) and with any user that may write the volume.
FROM python:3.13-slim AS build
WORKDIR /source
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/email-fax-gateway/venv
COPY requirements.lock requirements-dev.lock ./
RUN /opt/email-fax-gateway/venv/bin/pip install --require-hashes --requirement requirements.lock
# Hatchling and what it needs in turn, out of the development lock: it builds the package and stays behind.
RUN awk '/^[a-z]/ { name = $1 } NR == FNR { if (/(^| )hatchling(=|$)/) wanted[name]; next } name in wanted' \
        requirements-dev.lock requirements-dev.lock > /build.lock \
    && pip install --require-hashes --requirement /build.lock
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/email-fax-gateway/venv/bin/pip install --no-deps --no-index /wheels/*.whl \
    && /opt/email-fax-gateway/venv/bin/pip uninstall --yes pip

FROM python:3.13-slim
COPY --from=build /opt/email-fax-gateway /opt/email-fax-gateway
RUN install --directory --mode 0700 --owner 10001 --group 10001 /var/lib/email-fax-gateway
# Loopback would be the container's own; who may send is still decided by senders.networks.
ENV PATH=/opt/email-fax-gateway/venv/bin:$PATH \
    FAX_GATEWAY_SMTP__LISTEN=0.0.0.0:2525 \
    FAX_GATEWAY_HTTP__LISTEN=0.0.0.0:8080
USER 10001:10001
VOLUME /var/lib/email-fax-gateway
EXPOSE 2525 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=5m --retries=3 CMD ["fax-gateway", "health"]
ENTRYPOINT ["fax-gateway"]
CMD ["serve"]
