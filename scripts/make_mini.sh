#!/usr/bin/env bash
# Makes every weight of assets/mini anew from its images alone; about 20 minutes on one H200.
# OUT=<folder> writes them elsewhere than assets/mini, STEPS=<n> trains the DiT for so many steps.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${OUT:-assets/mini}"
mkdir -p "$out"

python scripts/unpack_mini.py --out data/mini
python scripts/train_mini_vae.py --data-path data/mini --out "$out/vae" --steps 7955 \
    --preview "$out/vae/preview.png"
python scripts/train_mini_features.py --data-path data/mini \
    --labels assets/mini/images/labels.csv --out "$out/feature_net.safetensors"

# The DiT sees no mirrors: flags and letters must not come out flipped. (The VAE may: it only codes.)
python extract_features.py --data-path data/mini/train --features-path data/mini_encoded \
    --vae "$out/vae" --image-size 64 --num-classes 9 --no-mirror
python finetune_tinyfusion.py --config configs/mini/no_graft.yaml --data-path data/mini_encoded \
    --prefix pretrain --global-batch-size 256 --max-steps "${STEPS:-46000}" --epochs 100000 \
    --lr 1e-3 --warmup-steps 500 --lr-end-factor 0.01 --ema-decay 0.9995 --log-every 500
python scripts/export_weights.py outputs/pretrain-DiT-Mini-2/checkpoints/*"${STEPS:-46000}".pt \
    --out "$out/dit_mini.safetensors"
