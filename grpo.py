"""A chat model and a rule, or a reward model, in; a model whose answers are rewarded more out: GRPO.

    python grpo.py --init_from out/sft                                              # the answers of the file: exact
    python grpo.py --init_from out/sft --reward format --pattern ".+，字.+。"         # answers of this form
    python grpo.py --init_from out/sft --reward both --pattern ".+，字.+。" --train data/sft_train.jsonl
    python grpo.py --init_from out/sft --reward model --reward_model out/reward --kl 0.1

The model answers each question several times; answers above their group's mean reward become likelier. Validation is
greedy: its loss is 1 - the mean reward. Writes a model folder, or with LoRA an adapter, to out/grpo. Stopped by Ctrl-C
or killed, the same command goes on where it was.
"""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from assembly import models, training
from core import errors, hf_folder
from core.config import Section
from core.distributed import Ranks
from core.errors import UserError
from extras.preferences import questions, scalar
from model import Llama
from tokenizer import Tokenizer, chat
from trainer import Task


@dataclass(frozen=True)
class QuestionsConfig(Section):
    init_from: str = "out/sft"  # a chat model's folder
    train: tuple[str, ...] = ("data/sft_train.jsonl",)  # chats: all but their last answer is asked
    val: tuple[str, ...] = ("data/sft_val.jsonl",)  # none: no validation
    chat_format: Literal["auto", *chat.FORMATS] = "auto"  # auto: the model's own


SECTIONS = {"questions": QuestionsConfig, "reward": questions.RewardConfig}


def main() -> None:
    # The options, this process among the ranks, and the chat model to begin with.
    cfg = training.load_options(__doc__, SECTIONS, "configs/grpo.toml", wings=("lora", "track"))
    ranks = join_ranks(cfg)
    base, chat_format = training.open_chat_base(cfg.questions.init_from, cfg.questions.chat_format)
    tokenizer, context = base.tokenizer, base.model.config.max_position_embeddings

    # Questions to learn from, and questions that are held out.
    rows, lines = questions.question_rows(cfg.questions.train, tokenizer, chat_format, context)
    held_out, more = questions.question_rows(cfg.questions.val, tokenizer, chat_format, context)

    # How the model answers (many texts at once are a wing's), how answers are judged, and the loop.
    from extras.decoding.batching import continued

    base = training.adapt(base, cfg)
    respond = questions.Respond(continued, chat.end_ids(tokenizer, chat_format))
    judge = questions.make_judge(cfg.reward, tokenizer, open_judge(cfg.reward.reward_model, tokenizer, ranks))
    reference = open_reference(base, ranks) if cfg.reward.kl else None
    loss = questions.grpo_loss(cfg.reward, respond, judge, reference)
    told = {"rows": held_out or rows, "respond": respond, "judge": judge, "tokenizer": tokenizer}
    sample = partial(questions.report, **told, most=cfg.reward.max_new_tokens)
    identity = base.identity | {"chat_format": chat_format, "reward": asdict(cfg.reward)}
    about, intro = {"command": "grpo", "chat_format": chat_format}, (*lines, *more, *base.intro)
    parts = (base.model, base.weights, rows, {"questions": held_out} if held_out else {}, loss, tokenizer)
    training.run(Task(*parts, identity, about, intro, sample, base.saver), cfg, ranks)


def join_ranks(cfg) -> Ranks:
    if cfg.train.parallel != "ddp":
        raise UserError(f'parallel = "{cfg.train.parallel}" cannot answer questions', "--parallel ddp")
    return training.join_ranks(cfg)


def open_reference(base: training.Base, ranks: Ranks) -> Llama:
    """The model as it was."""
    return models.load_model(base.folder, ranks.device).eval().requires_grad_(False)


def open_judge(path: str, tokenizer: Tokenizer, ranks: Ranks) -> scalar.RewardModel | None:
    """The reward model that the options name, or None."""
    if not path:
        return None
    folder = hf_folder.model_folder(path)
    model, weights = scalar.open_reward(folder)
    if (noted := hf_folder.load_about(folder).get("tokenizer_sha256")) != tokenizer.sha256:
        said = f"{folder}: made with tokenizer {str(noted)[:12]}, the model has {tokenizer.sha256[:12]}"
        raise UserError(said, "python reward.py --init_from the same model")
    return hf_folder.build(model, weights, ranks.device).eval().requires_grad_(False)


if __name__ == "__main__":
    errors.run(main)
