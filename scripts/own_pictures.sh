#!/usr/bin/env bash
# The path of docs/own-pictures.md: every stage of nano's sizes on emoji, then everything that a finished model does.
#
#   scripts/own_pictures.sh data/emoji runs/emoji        about half an hour on a core
#   scripts/own_pictures.sh data/emoji runs/long 500     five times as many steps: two hours and a half
#   scripts/own_pictures.sh data/emoji runs/try 5        5 %, to see that all of it runs
set -euo pipefail
data=$1 run=$2 percent=${3:-100}
out=$run/out model=$run/model
sf() { echo "+ starflow2 $*"; python -m starflow2 "$@"; }
train() { # STAGE MIXTURE STEPS DOCUMENTS OPTIONS...
    local steps=$(($3 * percent / 100))
    ((steps >= 8)) || steps=8
    sf train nano --stage "$1" --corpus.mixture "$data/train-$2.json" --steps $steps --batch "$4" \
        --corpus.rows $(($4 / 8)) --corpus.width 768 --corpus.held-out "$data/held-$2.json" --held-out-batches 4 \
        --evaluate-every $((steps / 8)) -o "$run" "${@:5}"
}
mkdir -p "$out"
sf data check "$data/train-joint.json" --limit 500

train features draw 120 64
train fae draw 620 32
sf eval fae --images "$data/held" --model "$model" --json "$out/fae.json"
train vlm look 120 32
train t2i draw 344 32 --whitening-captions 512
train adapter look 24 32
train joint joint 16 32 --kl-to-t2i 0 --hidden-latents-share 0 --optim.matrix-lr 2e-3

sf generate --prompts "$data/prompts.txt" --tries 1 -o "$out/drawn/" --model "$model"
python scripts/own_pictures.py judge "$data" "$out/drawn" --json "$out/judged.json"
python scripts/own_pictures.py sheet "$data" "$out/drawn" "$out/sheet.png"
python scripts/own_pictures.py losses "$run"
sf ask "$data/train/1f436.png" "What is this?" --model "$model"
sf edit "$data/train/1f44b.png" "make the skin dark" -o "$out/edited.png" --model "$model"
sf score "dog face" "$data/train/1f436.png" --model "$model"
