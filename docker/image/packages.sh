#!/bin/sh
# Install Debian packages and leave nothing of the installing behind: no lists, caches, documents or logs.
#     packages.sh NAME…
set -eu
export DEBIAN_FRONTEND=noninteractive
if ! apt-get update -qq || ! apt-get install -qq -y --no-install-recommends "$@" >/tmp/apt.log 2>&1; then
    cat /tmp/apt.log >&2 2>/dev/null || true
    echo "error: apt-get could not install: $*" >&2
    echo "  → is there a network, or a mirror (docker/images.py --apt FILE)? BASE must be Debian with Python 3.11" >&2
    exit 1
fi
rm -rf /tmp/apt.log /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/log/apt /var/log/dpkg.log \
    /var/log/alternatives.log /usr/share/doc/* /usr/share/man/* /usr/share/info/* /usr/share/lintian/*
