#!/usr/bin/env bash
# The whole road without any published graft, on the miniature testbed: bash scripts/road_mini.sh
# Stage 1 distills Hyena-Y into 21 of 28 blocks, Stage 2 finetunes that 75 % graft, selection learns
# which 14 blocks keep their attention, and the 50 % graft is finetuned, sampled and scored.
# OUT=<folder> puts the results elsewhere than runs/road; STEPS="distill finetune select finetune"
# shortens it (default "1500 600 600 600", some minutes on a GPU).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_env.sh
setup_env requirements.txt

out="${OUT:-runs/road}"
read -r distill_steps first_steps select_steps last_steps <<<"${STEPS:-1500 600 600 600}"
train=(--data-path "$out/latents" --results-dir "$out" --global-batch-size "${BATCH:-64}" --resume auto)
stage() { printf '\n== %s\n' "$1"; }

stage "images -> latents"
python scripts/unpack_mini.py --out data/mini
python extract_features.py --data-path data/mini/train --features-path "$out/latents" \
    --vae assets/mini/vae --image-size 64 --num-classes 9 --no-mirror

stage "1/6 Stage 1: distill the operators of a 75 % graft"
python distill_operators.py --config configs/mini/75p_hyena_y.yaml --prefix distill "${train[@]}" \
    --num-samples 1600 --val-samples 104 --max-steps "$distill_steps" --lr 1e-3 --lr-schedule cosine

stage "2/6 Stage 2: finetune the 75 % graft"
python finetune_tinyfusion.py --config "$out/distill-DiT-Mini-2/distilled.yaml" --prefix stage2 \
    "${train[@]}" --max-steps "$first_steps" --lr 3e-4 --warmup-steps 50 --ema-decay 0.99

stage "3/6 learned layer selection: 75 % -> 50 %"
python prune_by_learning.py --config "$out/stage2-DiT-Mini-2/finetuned.yaml" --prefix selection \
    "${train[@]}" --delta-w --lora --max-steps "$select_steps" --lr 3e-4 --gate-lr 3e-3 \
    --ema-decay 0.99

stage "4/6 finetune the selected 50 % graft"
python finetune_tinyfusion.py --config "$out/selection-DiT-Mini-2/selected.yaml" --prefix final \
    "${train[@]}" --max-steps "$last_steps" --lr 3e-4 --ema-decay 0.99

stage "5/6 sample"
python sample_ddp_finetuned.py --config "$out/final-DiT-Mini-2/finetuned.yaml" --sample-dir "$out" \
    --folder-name samples --num-fid-samples "${SAMPLES:-1024}" --labels balanced --sampler dpm++ \
    --num-sampling-steps 20 --cfg-scale 1.5

stage "6/6 score"
python evaluate_fid.py data/mini/train "$out/samples" --feature-net mini

stage "what each stage came to"
python scripts/road_table.py "$out" --json "$out/road.json"
