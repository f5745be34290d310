#!/usr/bin/env bash
# Installs SLURM and munge for tests/slurm, from Debian's or Ubuntu's packages; as root. Without them those tests skip.
set -euo pipefail
if command -v slurmctld munged > /dev/null; then
  exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get > /dev/null; then
  echo "tests/slurm will be skipped: slurm-wlm and munge are not installed, which takes root and apt-get" >&2
  exit 0
fi
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurm-wlm munge
