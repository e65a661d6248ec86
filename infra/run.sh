#!/bin/bash
# One attempt at the run, and what its end means for this instance:
#   this instance is about to go    stay down, the group keeps its wish for another: exit 0
#   0, 1, 2                         done, failed or wrong: no other attempt would differ. The instance ends, none follows: exit 0
#   anything else                   interrupted without a notice, or killed: exit 75, and systemd tries again, a few times
set -uo pipefail

CODE=$(cd "$(dirname "$0")/.." && pwd)
INSTANCE=$CODE/infra/instance.sh
cd "$CODE" || exit 1
if [ -n "${WDS_LOG:-}" ]; then # to CloudWatch, and on to the journal
  exec > >(.venv/bin/python -m wds_train.aws.log_shipper "$WDS_LOG" "$("$INSTANCE" about instance-id)-$(date -u +%H%M%S)") 2>&1
  ship=$!
  # systemd kills what is left when this shell ends: the last lines are waited for.
  trap 'exec >&- 2>&-; wait "$ship"' EXIT
fi
if [ -n "${WDS_WANDB_SECRET:-}" ]; then # into this process's environment alone, never to a disk
  WANDB_API_KEY=$(aws secretsmanager get-secret-value --secret-id "$WDS_WANDB_SECRET" --query SecretString --output text) &&
    export WANDB_API_KEY || echo "wds-train: the W&B key could not be read; training without a login" >&2
fi

# Not by make, which ends with 2 whatever its command ended with.
arguments=(train --run "$WDS_RUN" --recipe "$WDS_RECIPE" --bucket "$WDS_BUCKET")
[ -z "${WDS_CACHE:-}" ] || arguments+=(--cache-dir "$WDS_CACHE")
read -ra more <<<"${WDS_ARGUMENTS:-}"
"${WDS_TRAIN:-.venv/bin/wds-train}" "${arguments[@]}" "${more[@]}" &
child=$!
trap 'kill -TERM "$child"' TERM INT # systemd asks this shell alone
while :; do
  wait "$child"
  code=$?
  kill -0 "$child" 2>/dev/null || break # `wait` also returns at a signal
done

if "$INSTANCE" leaving; then
  echo "wds-train: exit code $code; this instance is about to go, and its successor goes on"
  "$INSTANCE" gone || true # a spot instance is in no hook
  exit 0
fi
case $code in
  0) "$INSTANCE" give-up "the run is done" ;;
  1 | 2) "$INSTANCE" give-up "the run ended with exit code $code, which another start would end with, too" ;;
  *) echo "wds-train: exit code $code; starting again"; exit 75 ;;
esac
