#!/usr/bin/env bash
# SuperCLIP against CLIP on generated scenes, end to end on two CPU cores in about ten minutes:
# train both side by side, evaluate, sweep every head, ablate the champion, write one report.
# Fails only if a model's retrieval is not above chance by its interval.
set -euo pipefail
source "$(dirname "$0")/env.sh"

out=${1:-logs/demo}
if [ -e "$out/report.html" ]; then
    echo "$out holds a finished demo; delete it or name another folder: scripts/demo.sh FOLDER" >&2
    exit 2
fi
mkdir -p "$out"
began=$SECONDS
export OMP_NUM_THREADS=1
arms=(superclip clip)

both() { # run one command per arm side by side; the output follows when both are done
    local title=$1 status=0
    shift
    echo "== $title (watch it: tail -f $out/*.${title// /-}.log)"
    local pids=()
    for arm in "${arms[@]}"; do
        "$@" "$arm" >"$out/$arm.${title// /-}.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=1; done
    if [ $status -ne 0 ]; then
        for arm in "${arms[@]}"; do tail -n 5 "$out/$arm.${title// /-}.log" >&2; done
        exit 1
    fi
    echo "   ($((SECONDS - began)) s since the start)"
}
train() { python -m superclip.train --recipe "scenes-$1" --threads 1 --out "$out/$1"; }
evaluate() { python -m superclip.evaluate --ckpt "$out/$1/final_epoch.pt" --overwrite; }
sweep() { python -m interp.sweep --ckpt "$out/$1/final_epoch.pt" --threads 1; }
ablate() { python -m interp.ablate --ckpt "$out/$1/final_epoch.pt" --threads 1; }

for arm in "${arms[@]}"; do # a demo cut short goes on where it stopped
    [ -e "$out/$arm/sweep/results.json" ] && rm -r "$out/$arm/sweep"
done
both train train
for arm in "${arms[@]}"; do tail -n 1 "$out/$arm.train.log"; done
both evaluate evaluate
both sweep sweep
both ablate ablate
for arm in "${arms[@]}"; do
    printf '\n===== %s (all of it: %s.{evaluate,sweep,ablate}.log)\n' "$arm" "$out/$arm"
    grep -m 3 -E 'measure|to-(text|image) R@1 ' "$out/$arm.evaluate.log"
    sed '/^champion/,$d' "$out/$arm.sweep.log" # up to the verdict
done
printf '\n===== both\n'
python -m interp.compare "$out"/{superclip,clip}/final_epoch.pt --threads 1 >"$out/compare.log"
sed -n '1,/^chance/p' "$out/compare.log"
echo "(head by head: $out/compare.log; one seed an arm describes these two files, not the two losses)"
echo
python -m interp.report "$out/superclip/sweep" "$out/clip/sweep" --out "$out/report.html" | grep written
echo "demo: $((SECONDS - began)) s wall, installation aside; now open $out/report.html"
python - "$out" <<'PY'
import json
import sys

failed = []
for arm in ("superclip", "clip"):
    for row in json.load(open(f"{sys.argv[1]}/{arm}/eval_val.json"))["results"][0]["rows"]:
        if row["measure"].endswith("R@1") and not row["low"] > row["chance"]:
            failed.append(f"{arm} {row['measure']} {row['value']:.3f}, chance {row['chance']:.3f}")
if failed:
    sys.exit("error: not above chance by its interval: " + "; ".join(failed))
PY
