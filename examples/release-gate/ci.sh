#!/bin/sh
# Trains the adapter and judges it.  Whatever follows the first word goes to train.py.
#     sh ci.sh record                        what this release measures becomes the baseline
#     sh ci.sh gate                          holds a release to the baseline
#     sh ci.sh gate --learning-rate 3e-2     the same, of an adapter trained otherwise
set -eu
cd "$(dirname "$0")"

case "${1:-}" in
    record) update=--lora-update-baseline-in-ci ;; # "record" is asking for it by name
    gate) update= ;;
    *) echo "usage: sh ci.sh record|gate [options of train.py]" >&2; exit 2 ;;
esac
shift

python train.py --out adapters/problems "$@"
exec python -m pytest -m lora \
    --lora-adapter=adapters/problems \
    --lora-profile=lora.toml \
    --lora-baseline=baseline.json \
    --lora-report=lora-report/report.json \
    --lora-report=lora-report/report.html \
    $update
