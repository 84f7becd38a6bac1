"""Base model and chats in, chat model out: the loop and the model of pretraining, a loss on the answers only.

    python sft.py                                                 # configs/demo-sft.toml: the facts of the demo
    python sft.py configs/sft.toml --init_from out/llama-92m --train chats.jsonl --out_dir out/my-chat
    python sft.py configs/sft.toml configs/lora.toml              # small matrices beside the base's weights: LoRA
    python sft.py --show_mask 3                                   # print samples, trained tokens marked, and stop

A line of a chat file: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
Writes a Hugging Face folder with its chat template to out/sft; run.json in it names the chat format. With LoRA it is
an adapter in PEFT's format.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from assembly import training
from assembly.chats import chat_rows, mark_trained, refuse_twins
from core import errors
from core.config import Range, Section
from core.generate import SamplingConfig, generate
from model import Llama
from tokenizer import Tokenizer, chat
from trainer import Task, next_token_loss


@dataclass(frozen=True)
class ChatConfig(Section):
    init_from: str = "out/pretrain"  # a model folder: ours, or Hugging Face's of a known family
    allow_pickle: bool = False  # its weights may be a .bin, .pt or .pth: only tensors are read from it
    train: tuple[str, ...] = ("data/sft_train.jsonl",)  # chat files
    val: tuple[str, ...] = ("data/sft_val.jsonl",)  # none: no validation; several: a loss for each, and of all
    chat_format: Literal[*chat.FORMATS] = "chatml"  # how roles and turns become tokens: see tokenizer/chat.py
    # assistant: loss on all answers and their ends; last: on the last; all: on every token.
    train_on: Literal[*chat.TRAIN_ON] = "assistant"
    # Positions per row; 0: the model's max_position_embeddings.
    seq_len: Annotated[int, Range(least=0)] = 0
    # Chats with more tokens in front of their last answer, or in it, are left out and counted; 0: no limit.
    max_prompt_tokens: Annotated[int, Range(least=0)] = 0
    max_answer_tokens: Annotated[int, Range(least=0)] = 0
    pack: bool = True  # several chats in one row, attention within each
    # Print so many samples with their trained tokens marked, and stop.
    show_mask: Annotated[int, Range(least=0)] = 0
    prompt: str = ""  # answered after every validation; "": none


def main() -> None:
    # The options, this process among the ranks, and the model to begin with.
    cfg = training.load_options(__doc__, {"chat": ChatConfig}, "configs/demo-sft.toml")
    ranks = training.join_ranks(cfg)
    base = training.adapt(training.open_base(cfg.chat.init_from, cfg.chat.allow_pickle), cfg)
    model, tokenizer = base.model, base.tokenizer

    # Rows of chats: ids and mask are born together, so that only answers have a loss.
    seq_len = cfg.chat.seq_len or base.context or model.config.max_position_embeddings
    rows, lines = chat_rows(cfg.chat.train, tokenizer, cfg.chat, seq_len)
    if cfg.chat.show_mask:
        for ids, mask, where in rows.samples[: cfg.chat.show_mask]:
            print(f"{where}: {mark_trained(tokenizer, ids, mask)}")
        return
    refuse_twins(cfg.chat.val)
    paths = () if training.is_dry_run(cfg) else cfg.chat.val
    val_rows = {path: chat_rows((path,), tokenizer, cfg.chat, seq_len) for path in paths}

    # The same loss and the same loop as in pretraining.
    own = {"chat_format": cfg.chat.chat_format}
    identity = base.identity | own | {"train_on": cfg.chat.train_on}
    intro = (*base.intro, *lines, *(line for _, lines in val_rows.values() for line in lines))
    sample = (lambda m: answer(m, tokenizer, cfg.chat)) if cfg.chat.prompt else None
    val_rows = {path: rows for path, (rows, _) in val_rows.items()}
    parts = (model, base.weights, rows, val_rows, next_token_loss, tokenizer)
    training.run(Task(*parts, identity, {"command": "sft"} | own, intro, sample, base.saver), cfg, ranks)


def answer(model: Llama, tokenizer: Tokenizer, cfg: ChatConfig) -> str:
    """What the model answers to cfg.prompt, each time the most likely token."""
    # Rendered as the training chats are, up to where the assistant begins to speak.
    messages = [{"role": "user", "content": cfg.prompt}]
    ids, _ = chat.render(messages, tokenizer, cfg.chat_format, generation=True)
    greedy, ends = SamplingConfig(max_new_tokens=60, temperature=0), chat.end_ids(tokenizer, cfg.chat_format)
    return f"{cfg.prompt} -> {tokenizer.decode(generate(model, ids, greedy, ends))}"


if __name__ == "__main__":
    errors.run(main)
