"""A chat model and questions in, a model whose answers are rewarded more often out: reinforcement learning by GRPO.

    python grpo.py --init_from out/sft                                    # data/sft_train.jsonl, the exact answer
    python grpo.py --init_from out/sft --reward format --pattern ".{1,20}。" --questions.train data/sft_train.jsonl
    python grpo.py --init_from out/sft --reward model --reward_model out/reward --kl 0.1

The model answers each question several times; answers above their group's mean reward become likelier. Validation is
greedy: its loss is 1 - the mean reward. Writes a model folder, or with LoRA an adapter, to out/grpo. Stopped by Ctrl-C
or killed, the same command goes on where it was.
"""

import sys
from dataclasses import dataclass
from functools import partial

import trainer
from core import config, distributed, errors, hf_folder
from core.generate import SamplingConfig
from core.optim import OptimConfig
from extras.families import others as families
from extras.finetune import lora, nf4
from extras.preferences import open_chat_model, questions, scalar
from extras.tracking import trackers
from tokenizer import chat


@dataclass(frozen=True)
class QuestionsConfig:
    init_from: str = "out/sft"  # a chat model's folder
    train: tuple[str, ...] = ("data/sft_train.jsonl",)  # chats: all but their last answer is asked
    val: tuple[str, ...] = ("data/sft_val.jsonl",)  # none: no validation
    chat_format: str = "auto"  # auto: the model's own

    def __post_init__(self):
        if self.chat_format not in ("auto", *chat.FORMATS):
            raise ValueError(f"chat_format = {self.chat_format!r}, must be auto or one of {', '.join(chat.FORMATS)}")


def main() -> None:
    sections = {
        "questions": QuestionsConfig,
        "reward": questions.RewardConfig,
        "lora": lora.LoraConfig,
        "optim": OptimConfig,
        "train": trainer.TrainConfig,
        "track": trackers.TrackConfig,
    }
    cfg = config.load(__doc__, sections, sys.argv[1:], default="configs/grpo.toml")
    families.register()
    if cfg.train.parallel != "ddp":
        raise errors.UserError(f'parallel = "{cfg.train.parallel}" cannot answer questions', "--parallel ddp")
    if cfg.train.max_memory_gb:
        raise errors.UserError("max_memory_gb does not know what answers take", "a smaller --micro_batch or --group")
    ranks = distributed.start(cfg.train.device, cfg.train.timeout_s)
    folder, model, fill, text, chat_format = open_chat_model(cfg.questions.init_from, cfg.questions.chat_format)
    intro, context = [config.show(cfg)], model.config.max_position_embeddings
    read = partial(questions.read_questions, text=text, chat_format=chat_format, context=context, intro=intro)
    rows, val_rows = (
        questions.QuestionRows(read(paths), context) if paths else None
        for paths in (cfg.questions.train, cfg.questions.val)
    )
    identity = {
        "tokenizer": text.sha256,
        "base": hf_folder.weights_digest(folder),
        "chat_format": chat_format,
        "reward": config.as_dict(cfg)["reward"],
    }
    fill, saver = lora.tune(model, fill, cfg, folder, identity, intro, nf4.Weight, {})
    reference = None
    if cfg.reward.kl:
        reference = hf_folder.build(*hf_folder.open_model(folder), ranks.device).eval().requires_grad_(False)
    ends, judge = chat.end_ids(text, chat_format), questions.judge(cfg.reward, text, judging_model(cfg, text, ranks))
    loss = questions.grpo_loss(cfg.reward, ends, judge, reference)
    options = config.as_dict(cfg)
    about = {"command": "grpo", "chat_format": chat_format, "options": options, "intro": intro}
    with trackers.tracking(cfg.track, cfg.train.out_dir, options, ranks.first) as track:
        trainer.train(
            model,
            loss,
            rows,
            {"questions": val_rows} if val_rows else {},
            cfg.train,
            cfg.optim,
            ranks,
            text,
            identity,
            about,
            lambda m: told(m, val_rows or rows, cfg, text, ends, judge),
            fill,
            saver,
            track,
        )
    ranks.close()


def judging_model(cfg, text, ranks):
    """The reward model that the options name, or None."""
    if not cfg.reward.reward_model:
        return None
    folder = hf_folder.model_folder(cfg.reward.reward_model)
    model, fill = scalar.open_reward(folder)
    if (noted := hf_folder.load_about(folder).get("tokenizer_sha256")) != text.sha256:
        raise errors.UserError(
            f"{folder}: made with tokenizer {str(noted)[:12]}, the model has {text.sha256[:12]}",
            "python reward.py --init_from the same model",
        )
    return hf_folder.build(model, fill, ranks.device).eval().requires_grad_(False)


def told(model, rows, cfg, text, ends: set[int], judge: questions.Judge) -> str:
    """Greedy answers to three questions, with their rewards."""
    batch = trainer.batch(rows, range(min(3, len(rows))))
    groups = questions.answered(model, batch, ends, SamplingConfig(cfg.reward.max_new_tokens, 0.0), 1)
    said = [texts[0] for texts in groups]
    return "\n".join(
        f"  {text.decode(t.prompt).strip()} -> {text.decode(t.added)} ({reward:.3g})"
        for t, reward in zip(said, judge(said, batch.answers))
    )


if __name__ == "__main__":
    errors.run(main)
