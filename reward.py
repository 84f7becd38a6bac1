"""Pairs of answers in, a model that gives any answer a number out: the better answer of a pair the higher one.

    python data_process.py sft --input pairs.json --out_dir data/pairs       # preference files of the usual formats
    python reward.py --init_from out/sft --train data/pairs/chats.jsonl
    python reward.py score --input chats.jsonl --keep 0.5 --output better.jsonl      # the half with the higher rewards
    python sample.py --prompts questions.txt --n 8 --output out/answers.jsonl
    python reward.py score --input out/answers.jsonl --best true --output best.jsonl     # the best of each 8

Writes a folder that transformers reads as LlamaForSequenceClassification to out/reward, or an adapter for it. After
each validation it says how often held-out pairs are the right way round. The same command goes on after a stop.
"""

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

from assembly import inference, models, training
from core import config, errors, hf_folder
from core.distributed import start
from extras.preferences import pairs, scalar, score
from tokenizer import load as load_tokenizer
from trainer import Task


def main() -> None:
    if sys.argv[1:2] == ["score"]:
        return score_file(config.load(__doc__, {"score": score.ScoreConfig}, sys.argv[2:]).score)
    # The options, this process among the ranks, and the chat model to begin with: its head becomes one number.
    sections = {"pairs": pairs.PairsConfig}
    cfg = training.load_options(__doc__, sections, "configs/reward.toml", wings=("lora", "track"))
    ranks = training.join_ranks(cfg)
    base, chat_format = training.open_chat_base(cfg.pairs.init_from, cfg.pairs.chat_format)
    model, weights = scalar.begin(base.model, base.weights, base.folder)
    base = replace(base, model=model, weights=weights, saver=scalar.RewardFolder())

    # Pairs of answers.
    length = cfg.pairs.seq_len or model.config.max_position_embeddings
    rows, held_out, lines = pairs.pair_rows(cfg.pairs, cfg.train.seed, base.tokenizer, chat_format, length)

    # The loss of a pair, and the loop.
    base = training.adapt(base, with_score(cfg))
    identity = base.identity | {"chat_format": chat_format, "reward": True}
    about, intro = {"command": "reward", "chat_format": chat_format}, (*lines, *base.intro)
    sizes = {"micro": cfg.train.micro_batch, "device": ranks.device}
    sample = partial(pairs.report, rows=held_out, score=scalar.differences, **sizes)
    parts = (base.model, base.weights, rows, {"held out": held_out}, scalar.pair_loss, base.tokenizer)
    training.run(Task(*parts, identity, about, intro, sample, base.saver), cfg, ranks)


def with_score(cfg) -> SimpleNamespace:
    """The options; with LoRA the score is trained whole, since no matrix of the base stands in its place."""
    if cfg.lora is None or not cfg.lora.r:
        return cfg
    lora = replace(cfg.lora, modules_to_save=(*cfg.lora.modules_to_save, "score"))
    return SimpleNamespace(**vars(cfg) | {"lora": lora})


def score_file(cfg: score.ScoreConfig) -> None:
    """Rewards of all lines of a file; those that are kept go into another, in their order."""
    folder, base = inference.find_adapter(cfg.model)
    if base is None:
        model, weights = scalar.open_reward(folder)
    else:
        opened = models.open_model(base)
        opened.model, opened.weights = scalar.begin(opened.model, opened.weights, base)
        model, weights = inference.attach(opened, folder)
    about, tokenizer = hf_folder.load_about(folder), load_tokenizer(base or folder)
    model = hf_folder.build(model, weights, start(cfg.device).device).eval()
    score.score_file(cfg, model, tokenizer, about.get("chat_format"))


if __name__ == "__main__":
    errors.run(main)
