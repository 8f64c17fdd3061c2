#!/usr/bin/env bash
# The study: does token supervision make the model see objects earlier? Every run, sweep, claim and table of
# research/README.md, part by part; what is done is not done again, so a study cut short goes on by the same words.
#
#   bash scripts/study.sh [FOLDER] [PART...]        FOLDER: logs/study; PARTS: base claims rates longer forms heavier again photographs
#
# JOBS=4 runs four at a time (default 2), each on one thread; on a GPU, JOBS=1 DEVICE=cuda. SEEDS='0 1' and
# OPTIONS='--train-num-samples 1280' (flags of every training) make a rehearsal, in a folder of its own. FLICKR=FOLDER names Flickr8k
# in COCO form with entity boxes, for photographs. Minutes on two CPU cores, the machine shared with other work: base 54, claims 14,
# photographs 56, rates 88, longer 78, forms 56, heavier 38, again 45.
set -euo pipefail
source "$(dirname "$0")/env.sh"
export OMP_NUM_THREADS=1

out=${1:-logs/study}
shift || true
jobs=${JOBS:-2} device=${DEVICE:-auto}
[ $# -gt 0 ] || set -- base claims rates longer forms heavier again ${FLICKR:+photographs}
for part in "$@"; do
    case $part in base | claims | rates | longer | forms | heavier | again | photographs) ;;
    *) echo "error: $part is no part; there are base claims rates longer forms heavier again photographs" >&2 && exit 2 ;; esac
done
case $out in base | claims | rates | longer | forms | heavier | again | photographs)
    echo "error: $out is a part; name a folder before it: scripts/study.sh FOLDER $out" >&2 && exit 2 ;; esac
if [[ " $* " == *" photographs "* && ! -d ${FLICKR:-} ]]; then
    echo "error: photographs needs FLICKR=FOLDER, Flickr8k in COCO form" >&2 && exit 2
fi
mkdir -p "$out/tables"
seeds=${SEEDS:-6 7 8 9 10 11} # 0 to 5 were looked at before the claims were written
study="seeds $seeds; options ${OPTIONS:-none}"
[ -e "$out/study.txt" ] || echo "$study" >"$out/study.txt"
if [ "$(cat "$out/study.txt")" != "$study" ]; then
    echo "error: $out is a study of other SEEDS or OPTIONS ($(cat "$out/study.txt")); name another folder" >&2 && exit 2
fi
now=$(git rev-parse HEAD 2>/dev/null || echo unknown) # every commit that worked here, in order
if [ "$(tail -n 1 "$out/commits.txt" 2>/dev/null)" != "$now" ]; then
    [ ! -e "$out/commits.txt" ] || echo "note: $out was begun by other code; $out/commits.txt tells which"
    echo "$now" >>"$out/commits.txt"
fi
read -ra options <<<"${OPTIONS:-}"
queue=() # commands that run side by side

later() { queue+=("$(printf '%q ' "$@")"); }
run_queue() { # all of them, or the first error, with the end of its log
    [ ${#queue[@]} -eq 0 ] && return
    echo "   ${#queue[@]} commands, $jobs at a time"
    local failed=0
    printf '%s\0' "${queue[@]}" | xargs -0 -P "$jobs" -I{} bash -c '{} || exit 255' || failed=1
    [ $failed -eq 0 ] || { echo "error: a command failed; its log is named above" >&2 && exit 1; }
    queue=()
}
quietly() { # LOG COMMAND...
    local log=$1
    shift
    if "$@" >"$log.part" 2>&1; then mv "$log.part" "$log"; else
        echo "$log.part:" >&2
        tail -n 3 "$log.part" >&2
        return 1
    fi
}
export -f quietly
train() { # NAME SEED OPTIONS...: queued
    local run="$out/$1/seed$2" seed=$2
    shift 2
    [ -e "$run/final_epoch.pt" ] && [ -e "$run.done" ] && return
    mkdir -p "$(dirname "$run")"
    later bash -c 'quietly "$0.log" "$@" && touch "$0.done"' "$run" python -m superclip.train "$@" --seed "$seed" \
        --threads 1 --device "$device" "${options[@]}" --out "$run"
}
arm() { # NAME OPTIONS...: all seeds
    local name=$1 seed
    shift
    for seed in $seeds; do train "$name" "$seed" "$@"; done
}
of() { local name && for name in "$@"; do for seed in $seeds; do echo "$out/$name/seed$seed/final_epoch.pt"; done; done; }
sweep() { # every checkpoint named that is not swept
    local ckpt
    for ckpt in "$@"; do
        [ -e "$(dirname "$ckpt")/sweep/findings.json" ] && continue
        later quietly "$(dirname "$ckpt").sweep.log" python -m interp.sweep --ckpt "$ckpt" --metric legacy-mass \
            --threads 1 --device "$device" --overwrite
    done
    run_queue
}
table() { # NAME FIRST SECOND OPTIONS...: one arm against another
    local name=$1 first=$2 second=$3
    shift 3
    [ -e "$out/tables/$name.txt" ] && return
    # shellcheck disable=SC2046
    python -m superclip.evaluate --ckpt $(of "$first") --against $(of "$second") --device "$device" "$@" \
        --out "$out/tables/$name.json" --overwrite >"$out/tables/$name.part"
    mv "$out/tables/$name.part" "$out/tables/$name.txt"
}
grounding() { # NAME FIRST SECOND: every tower's champion and the excess of its layers, on validation pictures
    [ -e "$out/tables/$1.txt" ] && return
    # shellcheck disable=SC2046
    python -m interp.compare $(of "$2") --against $(of "$3") --device "$device" --overwrite >"$out/tables/$1.part"
    mv "$out/tables/$1.part" "$out/tables/$1.txt"
}
claim() { # NAME AS CHECKPOINTS...: decided once; queued
    local name=$1 as=$2
    shift 2
    mkdir -p "$out/claims"
    later quietly "$out/claims/$as.txt" python -m interp.hypothesis "research/hypotheses/$name.toml" "$@" \
        --device "$device" --out "$out/claims/$as.json"
}

base() { # superclip and clip at their own rates (5e-4 and 3e-4), and superclip at clip's
    for name in superclip clip; do arm "$name" --recipe "scenes-$name" --save-every 200; done
    arm superclip-3e-4 --recipe scenes-superclip --lr 3e-4 --save-every 200
    run_queue
    table base superclip clip --tasks retrieval zeroshot
    table base-same-rate superclip-3e-4 clip --tasks retrieval zeroshot
    table base-compositional superclip clip --tasks compositional --num 10000
    cat "$out"/tables/base*.txt
}
claims() {
    # shellcheck disable=SC2046
    sweep $(of superclip clip)
    grounding grounding superclip clip
    local one
    for one in superclip clip; do
        for name in early_grounding late_crystallisation champion_is_causal; do
            # shellcheck disable=SC2046
            claim "$name" "$name-$one" --ckpt $(of "$one")
        done
    done
    for name in earlier_in_depth earlier_in_training earlier_in_depth_patches earlier_in_training_patches binding; do
        # shellcheck disable=SC2046
        claim "$name" "$name" --ckpt $(of superclip) --against $(of clip)
    done
    run_queue
    for name in earlier_in_depth earlier_in_training; do
        # shellcheck disable=SC2046
        claim "${name}_same_rate" "${name}_same_rate" --ckpt $(of superclip-3e-4) --against $(of clip)
    done
    run_queue
    cat "$out/tables/grounding.txt" "$out"/claims/*.txt
}
rates() {
    local rate all=(1.5e-4 6e-4 1.2e-3) # and 3e-4, of base
    for rate in "${all[@]}"; do
        for name in superclip clip; do arm "$name-$rate" --recipe "scenes-$name" --lr "$rate"; done
    done
    run_queue
    for rate in "${all[@]}"; do table "rates-$rate" "superclip-$rate" "clip-$rate" --tasks retrieval zeroshot; done
    # shellcheck disable=SC2046
    claim learning_rate_sensitivity learning_rate_sensitivity --ckpt $(of superclip-3e-4 "${all[@]/#/superclip-}") \
        --against $(of clip "${all[@]/#/clip-}")
    run_queue
    cat "$out/claims/learning_rate_sensitivity.txt"
}
longer() { # is token supervision worth more than training on? (at the rate of the shorter runs)
    arm clip-2x --recipe scenes-clip --train-num-samples 230400
    arm clip-4x --recipe scenes-clip --train-num-samples 460800
    run_queue
    for times in 2x 4x; do table "longer-$times" superclip "clip-$times" --tasks retrieval zeroshot; done
}
forms() { # the small study's token loss, and the weight of the term, at the best of four rates of both arms (rates)
    local bce=(--recipe scenes-superclip --token-loss bce --head-input pooled) weight name
    arm superclip-bce "${bce[@]}" # at SuperCLIP's own 5e-4, which is not this form's
    arm superclip-bce-3e-4 "${bce[@]}" --lr 3e-4
    for weight in 0.25 4; do arm "superclip-weight-$weight" --recipe scenes-superclip --lr 3e-4 --token-weight "$weight"; done
    run_queue
    for name in superclip-bce superclip-bce-3e-4 superclip-weight-0.25 superclip-weight-4; do
        table "forms-$name" "$name" clip --tasks retrieval zeroshot
    done
}
heavier() { # what forms suggested, asked of eight other seeds: zero-shot top-1 at four times the weight
    local seeds="12 13 14 15 16 17 18 19"
    arm heavier/superclip --recipe scenes-superclip --lr 3e-4 --token-weight 4
    arm heavier/clip --recipe scenes-clip
    run_queue
    table heavier-zeroshot heavier/superclip heavier/clip --tasks zeroshot # top-1 is the question
    table heavier heavier/superclip heavier/clip --tasks retrieval zeroshot
    cat "$out/tables/heavier-zeroshot.txt"
}
again() { # heavier's question once more, of other seeds and other pictures
    local seeds="20 21 22 23 24 25 26 27"
    arm again/superclip --recipe scenes-superclip --lr 3e-4 --token-weight 4
    arm again/clip --recipe scenes-clip
    run_queue
    table again-zeroshot again/superclip again/clip --tasks zeroshot --data-seed 1 # top-1 is the question
    table again again/superclip again/clip --tasks retrieval zeroshot --data-seed 1
    cat "$out/tables/again-zeroshot.txt"
}
photographs() { # Flickr8k, 3 seeds: descriptive
    local seeds="0 1 2" name
    for name in superclip clip; do
        arm "flickr/$name" --loss "$name" ${head[$name]:-} --train-data "coco:$FLICKR:train" --val-data "coco:$FLICKR:dev" \
            --model small-vit --resize squash --aug-scale 0.5 1.0 --epochs 5 --warmup 50 --lr 2.5e-4 --save-every 50
    done
    run_queue
    table flickr flickr/superclip flickr/clip
    # shellcheck disable=SC2046
    sweep $(of flickr/superclip flickr/clip)
    grounding flickr-grounding flickr/superclip flickr/clip
    local ckpt run
    # shellcheck disable=SC2046
    for ckpt in $(of flickr/superclip flickr/clip); do
        run=$(dirname "$ckpt") # *[05].pt: steps 50 to 450, and epoch_5, the end
        [ -e "$run/course.json" ] || later quietly "$run.course.log" python -m interp.sweep --ckpt "$run/*[05].pt" \
            --threads 1 --device "$device"
        [ -e "$run/sweep/ablation.json" ] || later quietly "$run.ablation.log" python -m interp.ablate --ckpt "$ckpt" \
            --kinds mean --device "$device"
    done
    run_queue
    for name in superclip clip; do tail -n 99 "$out/flickr/$name"/seed*.{course,ablation}.log; done >"$out/tables/flickr-course.txt"
    cat "$out"/tables/flickr*.txt
}
declare -A head=([superclip]="--head-vocab seen")

began=$SECONDS
for part in "$@"; do
    echo "== $part"
    "$part"
    echo "   ($((SECONDS - began)) s since the start)"
done
