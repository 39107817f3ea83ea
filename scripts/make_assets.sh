#!/usr/bin/env bash
# Makes an embedded pipeline and teacher anew: d4m_plugin/assets/NAME.
#     scripts/make_assets.sh digits           half an hour on two cores with bfloat16
#     scripts/make_assets.sh cifar10 FOLDER   three hours; FOLDER is what HuggingFace opens as CIFAR-10
set -euo pipefail
cd "$(dirname "$0")/.."
name=$1 assets=d4m_plugin/assets work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

case $name in
    digits)
        d4m pretrain --source Digits --output "$work/$name"
        source=()
        ;;
    cifar10)
        d4m pretrain --source HuggingFace --source.path "$2" --output "$work/first" \
            --vae_channels '[32,64]' --unet_channels '[64,128,256]' --vae_steps 2500 --unet_steps 9000 --unet_lr 5e-4 \
            --compile true
        d4m pretrain --source HuggingFace --source.path "$2" --output "$work/$name" --start_from "$work/first" \
            --unet_steps 6000 --unet_lr 4e-4 --compile true --seed 1
        source=(--data.source HuggingFace --data.source.path "$2")
        ;;
esac
lightning fit --config "config_examples/teacher_$name.yaml" "${source[@]}" \
    --trainer.default_root_dir "$work" --trainer.callbacks.init_args.dirpath "$work"
python -c "
import sys
from pathlib import Path
from d4m_plugin.teachers import save_teacher
save_teacher(Path(sys.argv[1]), Path(sys.argv[2]))
" "$work/last.ckpt" "$work/$name/teacher.safetensors"

rm -rf "$assets/$name"
mv "$work/$name" "$assets/$name"
