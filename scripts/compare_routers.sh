#!/usr/bin/env bash
# Compares all routers under an equal budget: the same backbone, recipe, steps and images per step, the
# same splits in each of three trials. Writes results/tables/routers_emojidg.{md,csv} (seen, unseen and
# ceiling per test domain with standard errors, differences to LTDR paired by trial with 95 % confidence
# intervals, active experts) and the records behind them. Run it again to go on where it was stopped.
#
#   bash scripts/compare_routers.sh                      # --size gpu where PyTorch finds one, else cpu
#   bash scripts/compare_routers.sh --size cpu           # openmoji held out, 176 steps of 48 images, and
#                                                        # the ceiling: about 40 minutes on two idle cores
#   bash scripts/compare_routers.sh --size gpu           # all four held out, the whole recipe (2501 steps
#                                                        # of 96 images): hours of one large GPU
#   STEPS=1201 TEST_ENVS="1 3" BATCH_SIZE=32 bash scripts/compare_routers.sh --size cpu
#
# Environment variables, with what a size sets (cpu / gpu):
#   STEPS        of each job (176 / 2501)
#   BATCH_SIZE   images per training domain and step (16 / 32)
#   TEST_ENVS    domains to hold out, one at a time (1 / 0 1 2 3)
#   TRIALS       splits and seeds (3)
#   JOBS         how many jobs at once (one per core / the same, at most 15 on a GPU)
#   DEVICE       cpu or cuda
#   ALGORITHMS   what to compare (all; LTDR has to be there)
#   DATASET      EmojiDG
#   DATA_DIR     where it is (data; `ltdr download EmojiDG --data_dir data`)
#   OUTPUT       the sweep's folder (sweeps/routers_emojidg)
#   RESULTS      where tables/ and records/ are (results)
#   PYTHON       an interpreter with the package (python3)
# Paths are relative to the repository's root.
#
# DISTILL has no sweep of its own: each LTDR run, once finished, teaches one student (`ltdr distill`).
# GROUPS tells class or register tokens from patches. EmojiDG's ViT has none, so GROUPS alone gets the
# twin with a register token (vit_dim128_stem16_reg1_64).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "scripts/$(basename "${BASH_SOURCE[0]}")"
}

die() {
    echo "error: $1" >&2
    exit 2
}

PYTHON=${PYTHON:-python3}
SIZE=
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage && exit ;;
        --size) SIZE=${2:-} && shift $(($# > 1 ? 2 : 1)) ;;
        --size=*) SIZE=${1#*=} && shift ;;
        *) die "unknown argument $1; see bash $0 --help" ;;
    esac
    [ -n "$SIZE" ] || die "--size takes cpu or gpu"
done

"$PYTHON" -c 'import domainbed_ext' ||
    die "$PYTHON cannot import the package; name an interpreter that has it: PYTHON=.venv/bin/python bash $0"
if [ -z "$SIZE" ]; then
    SIZE=$("$PYTHON" -c 'import torch; print("gpu" if torch.cuda.is_available() else "cpu")')
fi
cores=$("$PYTHON" -c 'from domainbed_ext.launchers.devices import num_cores; print(num_cores())')
case $SIZE in
    cpu)
        : "${STEPS:=176}" "${BATCH_SIZE:=16}" "${TEST_ENVS:=1}" "${DEVICE:=cpu}" "${JOBS:=$cores}"
        ;;
    gpu)
        : "${STEPS:=2501}" "${BATCH_SIZE:=32}" "${TEST_ENVS:=0 1 2 3}" "${DEVICE:=cuda}"
        : "${JOBS:=$((cores < 15 ? cores : 15))}"
        ;;
    *) die "--size $SIZE is unknown; choose cpu or gpu" ;;
esac
TRIALS=${TRIALS:-3}
DATASET=${DATASET:-EmojiDG}
DATA_DIR=${DATA_DIR:-data}
name=routers_$(tr '[:upper:]' '[:lower:]' <<<"$DATASET")
OUTPUT=${OUTPUT:-sweeps/$name}
RESULTS=${RESULTS:-results}
if [ -z "${ALGORITHMS:-}" ]; then
    ALGORITHMS=$("$PYTHON" -c 'from domainbed_ext.hparams import VIT_ALGORITHMS; print(*VIT_ALGORITHMS)')
fi

# A job that failed leaves a gap in the tables and does not keep the others from being run.
failed=0
go_on_after_failures() {
    local status=0
    "$@" || status=$?
    [ "$status" -le 1 ] || exit "$status"
    [ "$status" -eq 0 ] || failed=1
}

# sweep HPARAMS ALGORITHM...: all trials and test domains of these, and the ceiling.
sweep() {
    local hparams=$1
    shift
    # shellcheck disable=SC2086  # a list of numbers
    go_on_after_failures "$PYTHON" -m domainbed_ext.scripts.sweep launch --algorithms "$@" \
        --datasets "$DATASET" --data_dir "$DATA_DIR" --test_envs $TEST_ENVS --single_test_envs \
        --selection training-domain --n_hparams 1 --n_trials "$TRIALS" --steps "$STEPS" \
        --hparams "$hparams" --jobs "$JOBS" --device "$DEVICE" --no_tensorboard \
        --output_dir "$OUTPUT" --skip_confirmation
}

# distill_one RUN: its student.
distill_one() {
    echo "distilling $1" >&2
    "$PYTHON" -m domainbed_ext.scripts.distill --teacher "$1" \
        --output_dir "$OUTPUT/distilled-$(basename "$1")" --device "$DEVICE" --eval_splits needed \
        --no_tensorboard --skip_model_save >/dev/null # what it prints is in its out.txt, too
}

# distill_all: a student for each finished LTDR run, so many at a time as other jobs.
distill_all() {
    local model runs=()
    for model in $(grep -l '"algorithm": "LTDR"' "$OUTPUT"/*/model.json); do
        runs+=("$(dirname "$model")")
    done
    [ ${#runs[@]} -gt 0 ] || return 0
    export -f distill_one
    export PYTHON OUTPUT DEVICE
    printf '%s\0' "${runs[@]}" | OMP_NUM_THREADS=$((cores > JOBS ? cores / JOBS : 1)) \
        xargs -0 -n 1 -P "$JOBS" bash -c 'distill_one "$1"' distill_one || failed=1
}

budget="\"batch_size\": $BATCH_SIZE"
others=()
distills=
for algorithm in $ALGORITHMS; do
    case $algorithm in
        DISTILL) distills=yes ;;
        GROUPS) [ "$DATASET" = EmojiDG ] || others+=(GROUPS) ;;
        *) others+=("$algorithm") ;;
    esac
done
[[ " ${others[*]} " == *" LTDR "* ]] || die "ALGORITHMS lacks LTDR, which the others are compared with"

sweep "{$budget}" "${others[@]}"
if [[ $DATASET = EmojiDG && " $ALGORITHMS " == *" GROUPS "* ]]; then
    sweep "{$budget, \"backbone\": \"vit_dim128_stem16_reg1_64\"}" GROUPS
fi
[ -z "$distills" ] || distill_all

mkdir -p "$RESULTS/tables" "$RESULTS/records"
for format in csv markdown; do
    extension=${format/markdown/md}
    "$PYTHON" -m domainbed_ext.scripts.collect_results --input_dir "$OUTPUT" --format "$format" \
        --selection training-domain --baseline LTDR --costs LTDR >/dev/null
    cp "$OUTPUT/results.$extension" "$RESULTS/tables/$name.$extension"
done
rm -rf "$RESULTS/records/$name" # like the tables, those of this comparison alone
for finished in "$OUTPUT"/*/done; do
    job=$(dirname "$finished")
    mkdir -p "$RESULTS/records/$name/$(basename "$job")"
    cp "$finished" "$job/results.jsonl" "$RESULTS/records/$name/$(basename "$job")"
done
cat "$RESULTS/tables/$name.md"
echo "written: $RESULTS/tables/$name.{md,csv}, $RESULTS/records/$name" >&2
exit "$failed"
