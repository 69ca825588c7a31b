#!/usr/bin/env bash
# From a fresh clone to a trained model and its pictures: ./launch/quickstart.sh [OUT]
#
# Makes .venv, installs, draws and encodes 16,000 captioned pictures, trains, evaluates, samples.
# Leaves OUT/samples/grid.png and OUT/results.json (OUT is out/quickstart unless given).
# Needs python3 >= 3.11 with venv, a network to PyPI, and about ten minutes on two CPU cores.
# Running it again goes on where it stopped. STEPS=4800 trains longer (give it its own OUT).
set -euo pipefail
started=$SECONDS
out=$(realpath -m "${1:-out/quickstart}")
cd "$(dirname "$0")/.."
# shellcheck source=launch/venv.sh
source launch/venv.sh
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TPU_SKIP_MDS_QUERY=1 HF_HUB_OFFLINE=1

say() { printf '\n== %s (%d s)\n' "$1" $((SECONDS - started)); }

say "data: captioned shapes, latents, text, shards"
python -m data_pipelines.build --source=shapes --output="$out/data" --resolution=16 \
    --count=16000 --text_length=12 --synthetic_fraction=0.3

say "training"
# Two devices of one core each share a step better than two threads do: a tenth less time.
JAX_NUM_CPU_DEVICES=2 python -m mmdit_jax.train --config=configs/shapes.py --workdir="$out/run" \
    --config.data.path="$out/data" ${STEPS:+--config.steps="$STEPS"}

say "evaluation on prompts that do not occur in training"
python -m mmdit_jax.evaluate --workdir="$out/run" --evaluators=val_loss,shapes \
    --output="$out/results.json"

say "samples"
python -m mmdit_jax.sample --workdir="$out/run" --prompts=launch/quickstart_prompts.txt \
    --output="$out/samples"

say "done"
python - "$out/results.json" <<'PY'
import json, sys
shapes = json.load(open(sys.argv[1]))["shapes"]
print("  ".join(f"{k} {v:.2f}" for k, v in shapes.items() if not k.startswith("n_")))
PY
echo "look at $out/samples/grid.png"
