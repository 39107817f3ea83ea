#!/usr/bin/env bash
# Makes the embedded models anew: d4m_plugin/assets/digits. About half an hour on two cores with bfloat16.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

d4m pretrain --source Digits --output "$work/digits"
lightning fit --config config_examples/teacher_digits.yaml --trainer.default_root_dir "$work" \
    --trainer.callbacks.init_args.dirpath "$work"
python -c "
import sys
from pathlib import Path
from d4m_plugin.teachers import save_teacher
save_teacher(Path(sys.argv[1]), Path(sys.argv[2]))
" "$work/last.ckpt" "$work/digits/teacher.safetensors"

rm -rf d4m_plugin/assets/digits
mv "$work/digits" d4m_plugin/assets/digits
