#!/bin/bash
# From a stock Ubuntu 24.04 GPU image and this code to a running service. Every assumption is a line that checks it, and
# says what was found; the first that does not hold ends the instance, since its replacement would be the same.
#   bootstrap.sh [ROOT]      ROOT comes before every path of the system, for a try in an empty folder
set -euo pipefail

ROOT=${1:-}
CODE=$(cd "$(dirname "$0")/.." && pwd)
SETTINGS=$ROOT/etc/wds-train.env
INSTANCE=$CODE/infra/instance.sh
trap '"$INSTANCE" give-up "the bootstrap failed at line $LINENO"' ERR

say() { echo "wds-train: $1"; }
need() { # WHAT COMMAND...: the command must succeed
  local what=$1
  shift
  "$@" >/dev/null 2>&1 || refuse "$what"
}
refuse() {
  trap - ERR
  "$INSTANCE" give-up "$1"
  exit 1
}
setting() { grep -q "^$1=." "$SETTINGS"; }
is_whole() { [[ $1 =~ ^(0|[1-9][0-9]{0,8})$ ]]; }
is_ubuntu() { grep -q '^VERSION_ID="24.04"' "$ROOT/etc/os-release"; }
has_room() { [ "$(df --output=avail -BG "$CODE" | tail -1 | tr -dc 0-9)" -ge "${WDS_ROOM_GB:-20}" ]; }
has_gpus() { nvidia-smi --list-gpus | grep -q '^GPU '; }
has_drive() { [ -n "$(drive)" ]; }
drive() { # the first local disk of this instance, none of EBS
  lsblk --nodeps --noheadings --paths --output NAME,MODEL | awk '/Instance Storage/ { print $1; exit }'
}

need "$SETTINGS is missing; the stack's user data writes it" test -r "$SETTINGS"
for name in WDS_RUN WDS_RECIPE WDS_BUCKET AWS_REGION; do
  need "$SETTINGS does not set $name; make the stack anew with wds-train launch" setting "$name"
done
for name in WDS_ROOM_GB WDS_TRY_SECONDS; do
  need "$name = '${!name:-}' in the environment is not a whole number of at least 0; unset it" is_whole "${!name:-0}"
done
need "this image is no Ubuntu 24.04 ($(sed -n 's/^PRETTY_NAME=//p' "$ROOT/etc/os-release" 2>/dev/null || true))" is_ubuntu
need "this machine is no x86_64 but $(uname -m)" test "$(uname -m)" = x86_64
for tool in curl aws python3 systemctl nvidia-smi lsblk; do
  need "the image has no $tool" command -v "$tool"
done
need "the image's python3 is older than 3.11" python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'
need "nvidia-smi finds no GPU; the driver does not run, or this instance type has none" has_gpus
need "the metadata service tells no instance id; wds-train wants IMDSv2 on an EC2 instance" "$INSTANCE" about instance-id
need "less than ${WDS_ROOM_GB:-20} GB are free on $CODE; give the stack a larger DiskGiB" has_room
need "the code holds no wheel of uv" compgen -G "$CODE/wheels/uv-*.whl"

# The local disk: where the image has mounted it, else the first one, formatted if it holds no file system yet.
CACHE=$ROOT/opt/dlami/nvme
if ! mountpoint --quiet "$CACHE"; then
  CACHE=$ROOT/mnt/nvme
  if mountpoint --quiet "$CACHE"; then
    say "the local disk is mounted already"
  elif has_drive; then
    mkdir -p "$CACHE"
    blkid "$(drive)" >/dev/null || mkfs.ext4 -q "$(drive)"
    mount "$(drive)" "$CACHE"
  else
    CACHE=""
    say "this instance has no local disk; every epoch will be read from S3"
  fi
fi
[ -z "$CACHE" ] || chmod 1777 "$CACHE"
sed -i '/^WDS_CACHE=/d' "$SETTINGS"
echo "WDS_CACHE=$CACHE" >>"$SETTINGS"

# uv comes with the code: the image may have neither pip nor venv.
python3 -m zipfile -e "$CODE"/wheels/uv-*.whl "$CODE/wheels/uv"
UV=$(find "$CODE/wheels/uv" -path '*/scripts/uv')
chmod +x "$UV"
cd "$CODE"
"$UV" venv --quiet --allow-existing --python python3 .venv
# The way to the packages fails now and then, and giving up ends the run for good.
tries=0
until "$UV" pip install --quiet --python .venv/bin/python --require-hashes -r requirements.lock; do
  tries=$((tries + 1))
  [ "$tries" -lt 5 ] || refuse "the packages cannot be installed, for the reason above; five tries were made"
  sleep $((tries * ${WDS_TRY_SECONDS:-15}))
done
"$UV" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
touch .venv/.installed

install -m 644 infra/wds-train.service infra/wds-train-give-up.service "$ROOT/etc/systemd/system/"
systemctl daemon-reload
systemctl enable --now wds-train.service
say "the training is started; its log is CloudWatch's $(sed -n 's/^WDS_LOG=//p' "$SETTINGS") and journalctl -u wds-train"
