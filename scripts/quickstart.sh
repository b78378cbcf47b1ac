#!/usr/bin/env bash
# The whole pipeline on the miniature testbed, on whatever device there is: bash scripts/quickstart.sh
# A pretrained 28-block DiT gets sliding-window attention in 21 blocks; selection learns which 14
# blocks take their attention back to keep; the 50 % graft is finetuned, sampled and scored.
# OUT=<folder> puts the results elsewhere than runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
setup_env requirements.txt

# Threads that wait for each other give their core away soon. As they spin otherwise, one other busy
# program made a step on two cores three times as long.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"

out="${OUT:-runs/quickstart}"
began=$SECONDS
stage() { printf '\n== %s (%d s so far)\n' "$1" $((SECONDS - began)); }
if [ -d "$out" ] && [ ! -f "$out/.quickstart" ] && [ -n "$(ls -A "$out")" ]; then
    echo "error: $out holds other files; set OUT to another folder" >&2
    exit 1
fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.quickstart"

stage "1/6 images: unpack the emoji set"
python scripts/unpack_mini.py --out data/mini

stage "2/6 images -> latents"
python extract_features.py --data-path data/mini/train --features-path "$out/latents" \
    --vae assets/mini/vae --image-size 64 --num-classes 9 --no-mirror

stage "3/6 learned layer selection: 75 % -> 50 %"
python prune_by_learning.py --config configs/mini/75p_swa.yaml --data-path "$out/latents" \
    --results-dir "$out" --prefix selection --delta-w --lora --max-steps 100 \
    --global-batch-size 16 --lr 3e-4 --gate-lr 4e-3 --ema-decay 0.95 --log-every 10

stage "4/6 finetuning the selected 50 % graft"
python finetune_tinyfusion.py --config "$out/selection-DiT-Mini-2/selected.yaml" \
    --data-path "$out/latents" --results-dir "$out" --prefix finetune --max-steps 200 \
    --global-batch-size 16 --lr 5e-4 --lr-end-factor 0.1 --ema-decay 0.98 --log-every 20

stage "5/6 sampling 64 images"
python sample_ddp_finetuned.py --config "$out/selection-DiT-Mini-2/selected.yaml" \
    --graft-fusion-ckpt-path "$out/finetune-DiT-Mini-2/checkpoints/0000200.pt" \
    --sample-dir "$out" --folder-name samples --num-fid-samples 64 --labels balanced \
    --sampler dpm++ --num-sampling-steps 14 --cfg-scale 2.0

stage "6/6 score"
python evaluate_fid.py data/mini/train "$out/samples" --feature-net mini

stage "done"
cat <<TEXT
Look at
  $out/samples-grid.png                            what the finetuned 50 % graft draws
  $out/selection-DiT-Mini-2/trajectory.png         how the gates decided
  $out/selection-DiT-Mini-2/selection.json         the decision and its probabilities
  $out/samples/metrics.json                        the score and all it depends on
  tensorboard --logdir $out                        losses
TEXT
