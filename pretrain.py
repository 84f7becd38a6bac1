"""Bins in, base model out.

    python pretrain.py                                            # configs/demo.toml: a small model on a laptop
    python pretrain.py configs/llama-92m.toml --lr 2e-4
    torchrun --standalone --nproc_per_node=4 pretrain.py          # the same on four cards or processes

Reads data/train.bin, data/val.bin and data/tokenizer (made by data_process.py); writes the model, a Hugging Face
folder, to out/pretrain. Stopped by Ctrl-C or killed, the same command goes on where it was.
"""

from dataclasses import dataclass
from typing import Annotated

from assembly import training
from core import errors
from core.bins import TokenBin
from core.config import Range, Section
from core.data import BinRows, Rows
from core.device import describe
from core.generate import SamplingConfig, generate
from core.hf_config import CheckedConfig, identify
from model import Llama
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer
from trainer import Task, next_token_loss


@dataclass(frozen=True)
class DataConfig(Section):
    train: tuple[str, ...] = ("data/train.bin",)  # several are mixed: wiki.bin:0.7,medical.bin:0.3
    val: str = "data/val.bin"  # "": no validation
    tokenizer: str = "data/tokenizer"
    # Positions per row; 0: the model's max_position_embeddings.
    seq_len: Annotated[int, Range(least=0)] = 0
    docs: bool = True  # attention stays within a document where several share a row
    verify: bool = False  # before step 0 read every bin whole and compare it with the hashes in its .json
    trust: bool = False  # bins without .json: do not read them whole first; ids are still checked as they are used
    init_from: str = ""  # a model folder to go on from; "": new weights
    allow_pickle: bool = False  # its weights may be a .bin, .pt or .pth: only tensors are read from it
    prompt: str = ""  # continued after every validation; "": none


SECTIONS = {"model": CheckedConfig, "kin": "extras.families.llama_kin:KinOptions", "data": DataConfig}


def main() -> None:
    # The options, this process among the ranks, and the model to begin with.
    cfg = training.load_options(__doc__, SECTIONS, "configs/demo.toml")
    ranks = training.join_ranks(cfg)
    if training.estimate_without_data(cfg, ranks):
        return
    base = open_model(cfg)
    model, tokenizer = base.model, base.tokenizer
    intro = (describe(model), *base.intro)

    # Rows of the bins: consecutive windows of the text.
    seq_len = cfg.data.seq_len or base.context or model.config.max_position_embeddings
    rows = open_train_rows(cfg.data, seq_len, base)
    val_rows = {cfg.data.val: open_rows(cfg.data.val, cfg.data, seq_len, base, tail=True)} if cfg.data.val else {}

    # The loss of every next token, and the loop.
    identity = base.identity | {"docs": cfg.data.docs, "model": identify(model.config)}
    sample = (lambda m: continue_text(m, tokenizer, cfg.data.prompt)) if cfg.data.prompt else None
    about, intro = {"command": "pretrain"}, (*intro, rows.describe())
    parts = (model, base.weights, rows, val_rows, next_token_loss, tokenizer)
    training.run(Task(*parts, identity, about, intro, sample, base.saver), cfg, ranks)


def open_model(cfg) -> training.Base:
    """A folder to go on from, or a new model of the configured size."""
    if cfg.data.init_from:
        base = training.open_base(cfg.data.init_from, cfg.data.allow_pickle)
    else:
        base = training.new_base(cfg.model, cfg.kin, load_tokenizer(cfg.data.tokenizer), cfg.train.seed)
    return training.adapt(base, cfg)


def open_train_rows(cfg: DataConfig, seq_len: int, base: training.Base) -> Rows:
    """Rows of one bin, or of several together."""
    # A lone bin needs no shares; several, or one with a share behind a colon, are the mixture's affair.
    if len(cfg.train) == 1 and ":" not in cfg.train[0]:
        return open_rows(cfg.train[0], cfg, seq_len, base)
    from extras.mixture.mix import MixedRows, parse_mix

    paths, shares = parse_mix(cfg.train)
    parts = [open_rows(path, cfg, seq_len, base) for path in paths]
    return MixedRows(parts, shares) if len(parts) > 1 else parts[0]


def open_rows(path: str, cfg: DataConfig, seq_len: int, base: training.Base, tail: bool = False) -> BinRows:
    """Rows of a bin, which is checked against the tokenizer and the model's vocabulary."""
    # The bin's .json says which tokenizer made it: another one's ids would train nonsense.
    bin = TokenBin(path, base.model.config.vocab_size, base.tokenizer.sha256, trust=cfg.trust)
    if cfg.verify:
        bin.verify()
    return BinRows(bin, seq_len, cfg.docs, base.tokenizer.eos_id, tail)


def continue_text(model: Llama, tokenizer: Tokenizer, prompt: str) -> str:
    """How the model goes on after the prompt, 60 tokens, each time the most likely one."""
    # Greedy: what changes from one validation to the next is the model, not the dice.
    ids = tokenizer.encode(prompt, bos=True)
    greedy = SamplingConfig(max_new_tokens=60, temperature=0)
    return tokenizer.decode(ids + list(generate(model, ids, greedy, {tokenizer.eos_id})))


if __name__ == "__main__":
    errors.run(main)
