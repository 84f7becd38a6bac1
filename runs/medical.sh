#!/usr/bin/env bash
# Purpose: a model that answers medical questions, from your own files: vocabulary, base, chats, samples. The
#   answers of a model with six million parameters are NO medical advice; repeat the recipe with larger bases and more text.
# Hardware: 2 CPU cores, 3 GB of memory.  Time: 15 minutes: about a second for each of the 400 + 600 steps.
# Data: texts are files that data_process.py reads, in UTF-8 or GB18030; JSON has its text in "text" (convert others with
#   data_process.py clean --input cmrc2018_dev.json --adapter cmrc2018 --out_dir data/cmrc). Chats are questions with
#   answers in any of 20 formats:
#   bash runs/medical.sh out/medical --texts books/*.txt data/cmrc/docs.jsonl --chats sft.jsonl questions.csv
# The same command continues a stopped run. STEPS, SFT_STEPS, VOCAB and SIZES are environment variables.
set -eu
code=$(dirname "$0")/..
usage="usage: bash runs/medical.sh OUT_DIR --texts FILE ... --chats FILE ..."
out=${1:?$usage}
shift
texts=() chats=() list=
for word in "$@"; do
  case $word in
  --texts | --chats) list=${word#--} ;;
  *) case $list in texts) texts+=("$word") ;; chats) chats+=("$word") ;; *) echo "$usage" >&2 && exit 2 ;; esac ;;
  esac
done
if [ ${#texts[@]} = 0 ] || [ ${#chats[@]} = 0 ]; then echo "$usage" >&2 && exit 2; fi

mkdir -p "$out"
asked=$(printf '%s\n' "${VOCAB:-6000}" "${texts[@]}" --chats "${chats[@]}")
[ ! -e "$out/files.txt" ] || [ "$asked" = "$(cat "$out/files.txt")" ] || {
  echo "error: $out was made of other files, see $out/files.txt -- another OUT_DIR" >&2
  exit 2
}
echo "$asked" >"$out/files.txt"

# Windows without overlap: a book is many documents, some of which are held out.
[ -e "$out/text/train.bin" ] || python "$code/data_process.py" clean dedup window tokenize --input "${texts[@]}" \
  --window_chars 1000 --window_step 1000 --vocab_size "${VOCAB:-6000}" --out_dir "$out/text"
[ -e "$out/chats/chats.jsonl" ] || python "$code/data_process.py" sft --input "${chats[@]}" --out_dir "$out/chats"
# Every 50th question is held out, with all its answers.
awk -v train="$out/chats/train.jsonl" -v val="$out/chats/val.jsonl" '{
  question = $0
  sub(/"role": "assistant".*/, "", question)
  if (!(question in side)) side[question] = ++n % 50 ? train : val
  print > side[question]
}' "$out/chats/chats.jsonl"

python "$code/pretrain.py" "$code/configs/demo.toml" --out_dir "$out/base" --tokenizer "$out/text/tokenizer" --data.train "$out/text/train.bin" \
  --data.val "$out/text/val.bin" --hidden_size 256 --intermediate_size 704 --num_attention_heads 4 \
  --max_position_embeddings 512 --batch_tokens 4096 --max_steps "${STEPS:-400}" --prompt "" ${SIZES:-}
python "$code/sft.py" "$code/configs/demo-sft.toml" --out_dir "$out/chat" --init_from "$out/base" --chat.train "$out/chats/train.jsonl" \
  --chat.val "$out/chats/val.jsonl" --batch_tokens 4096 --max_steps "${SFT_STEPS:-600}" --prompt ""

echo "These are the answers of a very small model. They are no medical advice."
printf '%s\n' "感冒了应该怎么办？" "高血压患者饮食上要注意什么？" "医生，我最近总是失眠，吃什么药好？" "小孩发烧39度怎么办？" \
  "糖尿病有哪些症状？" >"$out/questions.txt"
python "$code/sample.py" --model "$out/chat" --prompts "$out/questions.txt" --temperature 0 --repetition_penalty 1.1 \
  --max_new_tokens 120
