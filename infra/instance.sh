#!/bin/bash
# What an instance asks of its metadata service, and says to its Auto Scaling group.
#   instance.sh about NAME   one document of the metadata, such as instance-id; fails where there is none
#   instance.sh leaving      succeeds when this instance is about to go: a spot notice, or the group ends it
#   instance.sh gone         tells the group that it need not wait any longer
#   instance.sh give-up WHY  ends this instance and the group's wish for another: nothing more is paid for
set -euo pipefail

SECONDS_EACH=${WDS_METADATA_SECONDS:-2} # for an answer of the metadata service
IMDS=${AWS_EC2_METADATA_SERVICE_ENDPOINT:-http://169.254.169.254}

about() {
  local token
  token=$(curl --silent --fail --max-time "$SECONDS_EACH" -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 300" "$IMDS/latest/api/token")
  curl --silent --fail --max-time "$SECONDS_EACH" -H "X-aws-ec2-metadata-token: $token" "$IMDS/latest/meta-data/$1"
}

leaving() {
  [ -n "$(about spot/instance-action || true)" ] || [ "$(about autoscaling/target-lifecycle-state || true)" = Terminated ]
}

gone() {
  aws autoscaling complete-lifecycle-action --lifecycle-hook-name commit --lifecycle-action-result CONTINUE \
    --auto-scaling-group-name "$(about tags/instance/aws:autoscaling:groupName)" --instance-id "$(about instance-id)"
}

give_up() {
  echo "wds-train: $1; ending this instance, and no other follows" >&2
  aws autoscaling terminate-instance-in-auto-scaling-group --should-decrement-desired-capacity \
    --instance-id "$(about instance-id)" && return
  # Its replacement will find the same; the scheduled end of the group bounds that.
  echo "wds-train: the group could not be told; shutting down" >&2
  shutdown -h now
}

case ${1:-} in
  about) about "$2" ;;
  leaving) leaving ;;
  gone) gone ;;
  give-up) give_up "$2" ;;
  *) echo "usage: instance.sh about NAME | leaving | gone | give-up WHY" >&2; exit 2 ;;
esac
