#!/usr/bin/env bash
# The whole line on real text: dense Qwen2 -> upcycle -> train MoE variants -> compare.
#   bash configs/experiments/demo/run.sh RUNS [key=value...]      overrides go to every training run
set -euo pipefail
moelab=${MOELAB:-moelab}
runs=${1:?"usage: run.sh RUNS [key=value...]"}
shift
configs=$(dirname "$0")
started=$SECONDS

step() { printf '\n\033[1m[%s s] %s\033[0m\n' "$((SECONDS - started))" "$1"; shift; printf '$ %s\n' "$*"; "$@"; }

if [ -e "$runs" ]; then
    echo "replacing the demo in $runs"
    rm -rf -- "$runs"/{dense,dense_hf,upcycled_hf,dense_continued,upcycled,upcycled_loss_free,report}
fi
step "Train a small dense Qwen2" "$moelab" train $configs/dense.yaml run_dir="$runs/dense" "$@"
step "Save it as a Hugging Face checkpoint" "$moelab" export "$runs/dense" "$runs/dense_hf" --dtype float32
step "Upcycle it into the shape of 57B-A14B, scaled down" \
    "$moelab" upcycle $configs/upcycle.yaml source="$runs/dense_hf" output="$runs/upcycled_hf"
step "Baseline: the dense model, trained on" \
    "$moelab" train $configs/dense_continued.yaml run_dir="$runs/dense_continued" train.init_from="$runs/dense_hf" "$@"
for variant in upcycled upcycled_loss_free; do
    step "Variant: $variant" \
        "$moelab" train $configs/$variant.yaml run_dir="$runs/$variant" train.init_from="$runs/upcycled_hf" "$@"
done
step "Compare" "$moelab" compare "$runs/dense_continued" "$runs/upcycled" "$runs/upcycled_loss_free" \
    --baseline "$runs/dense_continued" --output "$runs/report"
printf '\n[%s s] Watch the curves:\n  tensorboard --logdir %s\n' "$((SECONDS - started))" "$runs"
