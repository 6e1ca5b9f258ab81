#!/usr/bin/env bash
# The whole line on real text: dense Qwen2 -> upcycle -> train MoE variants -> compare, from one dense model for each seed.
#   bash configs/experiments/demo/run.sh RUNS [key=value...]      overrides go to every training run
#   SEEDS="0 1 2" says how often all of it is done: a verdict takes three
set -euo pipefail
moelab=${MOELAB:-moelab}
runs=${1:?"usage: run.sh RUNS [key=value...]"}
seeds=${SEEDS:-0 1 2}
shift
configs=$(dirname "$0")
started=$SECONDS

step() { printf '\n\033[1m[%s s] %s\033[0m\n' "$((SECONDS - started))" "$1"; shift; printf '$ %s\n' "$*"; "$@"; }

# train VARIANT SEED [key=value...]: the runs of a variant differ in seed and name alone, so that compare groups them
train() {
    local name=$1_seed$2
    step "$1, seed $2" "$moelab" train "$configs/$1.yaml" name="$name" run_dir="$runs/$name" "${@:3}"
}

if [ -e "$runs" ]; then
    echo "replacing the demo in $runs"
    rm -rf -- "$runs"/{dense,dense_continued,dense_equal_flops,upcycled,upcycled_loss_free}_seed*
    rm -rf -- "$runs"/report_equal_{tokens,flops}
fi
for seed in $seeds; do
    dense=$runs/dense_seed$seed
    upcycled=$runs/upcycled_seed$seed
    train dense "$seed" seed="$seed" "$@"
    step "Save it as a Hugging Face checkpoint" "$moelab" export "$dense" "${dense}_hf" --dtype float32
    step "Upcycle it into the shape of 57B-A14B, scaled down" \
        "$moelab" upcycle "$configs/upcycle.yaml" source="${dense}_hf" output="${upcycled}_hf" seed="$seed"
    # Another seed than the dense run's: with its own a run would read the same batches once more.
    for variant in dense_continued dense_equal_flops; do
        train $variant "$seed" seed=$((seed + 100)) train.init_from="${dense}_hf" "$@"
    done
    for variant in upcycled upcycled_loss_free; do
        train $variant "$seed" seed=$((seed + 100)) train.init_from="${upcycled}_hf" "$@"
    done
done
runs_of() { for seed in $seeds; do echo "$runs/$1_seed$seed"; done; }
variants=$(runs_of upcycled; runs_of upcycled_loss_free)
# shellcheck disable=SC2046,SC2086  (one word a run)
step "Compare at equal tokens" "$moelab" compare $(runs_of dense_continued) $variants \
    --baseline dense_continued --output "$runs/report_equal_tokens"
# shellcheck disable=SC2046,SC2086
step "Compare at equal FLOPs" "$moelab" compare $(runs_of dense_equal_flops) $variants \
    --baseline dense_equal_flops --output "$runs/report_equal_flops"
printf '\n[%s s] Watch the curves:\n  tensorboard --logdir %s\n' "$((SECONDS - started))" "$runs"
