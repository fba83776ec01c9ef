#!/usr/bin/env bash
# From raw chats to a trained adapter, in a minute or two on a laptop. `make demo` runs this; each command is shown first.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONWARNINGS=ignore

step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

rm -rf demo
mkdir demo
echo "A tiny model to train: a tokenizer and a Llama made on the spot (your own model's name goes here)."
step python examples/tiny_model.py --output demo/model
echo
echo "1. Raw records become packed shards."
step sftprep build examples/data --tokenizer demo/model --train-on assistant --max-length 1024 --output demo/shards
echo
echo "2. Is it whole, and what will the model see? Green is trained."
step sftprep verify demo/shards
step sftprep inspect demo/shards --row 3 --color
echo
echo "3. Train an adapter on the shards."
step sfttrain run demo/shards --model demo/model --output_dir demo/adapter --use_peft --lora_r 16 \
    --lora_modules_to_save embed_tokens lm_head --num_train_epochs 5 --learning_rate 3e-3 --per_device_train_batch_size 1 \
    --logging_steps 25 --save_strategy no
echo
echo "4. Ask it something. It has a million parameters and has read 200 kB, so do not expect sense."
step python examples/generate.py --model demo/model --adapter demo/adapter --ask "How do I boil an egg?"
