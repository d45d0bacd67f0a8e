#!/usr/bin/env bash
# From a fresh clone to a results table: installs into .venv, then compares a dense ViT, GMoE and LTDR on
# the embedded RotatedDigits. About five minutes on two cores after the install; no downloads of data.
# Run it again to go on where it was stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_here ".[emoji]"

.venv/bin/python -m domainbed.scripts.sweep launch \
    --algorithms ERM_ViT GMOE LTDR --datasets RotatedDigits --test_envs 0 3 --single_test_envs \
    --n_hparams 1 --n_trials 1 --steps 250 --output_dir quickstart_output --skip_confirmation

.venv/bin/python -m domainbed.scripts.collect_results --input_dir quickstart_output \
    --selection training-domain

cat <<'NEXT'

This was a short run of two of the six test domains, once each: enough to see everything work, not to
compare methods. Next:

    source .venv/bin/activate
    ltdr doctor                                   # what this machine has, and how to get the rest
    ltdr download EmojiDG                         # a benchmark that needs no pretrained weights
    ltdr sweep --algorithms ERM_ViT GMOE LTDR --datasets EmojiDG \
        --n_hparams 1 --n_trials 3 --single_test_envs --output_dir sweeps/emojidg
    ltdr collect --input_dir sweeps/emojidg
NEXT
