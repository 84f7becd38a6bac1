"""A model as llama2.c's model.bin and tokenizer.bin, and back. The legacy format, version 0, which run.c reads.

In:  a model folder, or two .bin files. Out: two .bin files, or a model folder.
Knows no other family than Llama.

    model.bin       seven int32: hidden_size, intermediate_size, layers, heads, key/value heads, vocab_size, positions;
                    vocab_size is negative where the head is a matrix of its own. Then fp32: `order`, row by row.
    tokenizer.bin   int32: bytes of the longest piece. Then for each piece a float32 score, an int32 length, its bytes.

Source: https://github.com/karpathy/llama2.c, export.py (legacy_export), tokenizer.py (export), run.c. What run.c itself
says, a file cannot change: 1e-5 for the norms, 10000 for RoPE, bos 1, eos 2, byte b at id b + 3.
"""

import os
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from core import files, hf_folder
from core.config import Section
from core.device import num_parameters
from core.errors import UserError
from core.hf_config import CheckedConfig
from extras.formats.original_llama import half_split, interleaved, load_folder, vocabulary
from model import Llama, ModelConfig, rope_table
from tokenizer import Tokenizer
from tokenizer import load as load_tokenizer
from tokenizer.sentencepiece_model import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    Model,
    Piece,
    parse_model,
)
from tokenizer.sentencepiece_writer import write_model

HEADER = struct.Struct("<7i")
MAGIC = int.from_bytes(b"24ka", "little")  # begins the later versions
ROPE = "cosines and sines"  # of each position; run.c skips them, since it computes its own
LAYER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
)


@dataclass(frozen=True)
class Llama2cConfig(Section):
    model: str = "out/sft"  # a model folder
    output: str = ""  # model.bin; tokenizer.bin goes beside it
    overwrite: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not self.output:
            raise ValueError("output must be given")


@dataclass(frozen=True)
class FromLlama2cConfig(Section):
    model: str = ""  # llama2.c's model.bin
    tokenizer: str = ""  # its tokenizer.bin
    output: str = ""  # the folder to make
    overwrite: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not (self.model and self.tokenizer and self.output):
            raise ValueError("model, tokenizer and output must be given")


def export(cfg: Llama2cConfig, open_model: Callable[..., hf_folder.Opened]) -> None:
    """What `python export.py llama2c` does: the two files for run.c."""
    _, model, tokenizer = load_folder(cfg.model, open_model)
    path = Path(cfg.output)
    beside = path.with_name("tokenizer.bin")
    files.check_free([path, beside], cfg.overwrite)
    check(model, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(path, model)
    for note in write_tokenizer(beside, tokenizer, model.config.vocab_size):
        print(f"note: {note}", file=sys.stderr)
    print(f"{path}: {path.stat().st_size:,} bytes\n{beside}: {beside.stat().st_size:,} bytes")


def make_folder(cfg: FromLlama2cConfig, open_model: Callable[..., hf_folder.Opened]) -> None:
    """What `python export.py from-llama2c` does: a model folder of the two files. There is no folder to open."""
    folder = Path(cfg.output)
    files.check_free([folder], cfg.overwrite)
    model = read_weights(cfg.model)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "tokenizer.model"
        path.write_bytes(read_tokenizer(cfg.tokenizer, model.config.vocab_size))
        hf_folder.save_model(folder, model, load_tokenizer(path), {"source": Path(cfg.model).name})
    print(f"{folder}: {num_parameters(model)[0]:,} parameters; python sample.py --model {folder} --prompt ''")


def order(config: ModelConfig) -> Iterator[str]:
    """Names of the weights in the file's order: one kind after another, each of all layers."""
    yield "model.embed_tokens.weight"
    for part in LAYER:
        yield from (f"model.layers.{i}.{part}.weight" for i in range(config.num_hidden_layers))
    yield "model.norm.weight"
    yield ROPE
    if not config.tie_word_embeddings:
        yield "lm_head.weight"


def heads(name: str, config: ModelConfig) -> int:
    """Heads of a weight whose rows RoPE turns, 0 for any other."""
    part = name.split(".")[-2] if name != ROPE else ""
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part, 0)


# ---------------------------------------------------------------- out


def check(model: Llama, tokenizer: Tokenizer) -> None:
    """UserError where run.c would compute something else than this model, or make other ids of most texts."""
    c = model.config
    vocabulary(tokenizer, c.vocab_size)
    fixed = (tokenizer.model.unk_id, tokenizer.bos_id, tokenizer.eos_id)
    problems = {
        "attention_bias is true: run.c has no biases": any(n.endswith("bias") for n, _ in model.named_parameters()),
        f"head_dim is {c.head_dim}: run.c has hidden_size / heads": c.head_dim * c.num_attention_heads != c.hidden_size,
        f"rope_theta is {c.rope_theta:g}: run.c computes with 10000": c.rope_theta != 10000,
        f"rms_norm_eps is {c.rms_norm_eps:g}: run.c computes with 1e-5": c.rms_norm_eps != 1e-5,
        f"unknown, bos and eos are ids {fixed}: run.c takes (0, 1, 2)": fixed != (0, 1, 2),
    }
    for problem, there in problems.items():
        if there:
            raise UserError(problem, "python export.py gguf holds it")


def write_weights(path: Path, model: Llama) -> None:
    """Write model.bin, replaced in one step, of a model that `check` lets pass."""
    c = model.config
    vocab_size = c.vocab_size if c.tie_word_embeddings else -c.vocab_size
    weights = dict(model.named_parameters())

    def fill(temporary: Path) -> None:
        with open(temporary, "wb") as f:
            f.write(
                HEADER.pack(
                    c.hidden_size,
                    c.intermediate_size,
                    c.num_hidden_layers,
                    c.num_attention_heads,
                    c.num_key_value_heads,
                    vocab_size,
                    c.max_position_embeddings,
                )
            )
            for name in order(c):
                weight = _rope(c) if name == ROPE else weights[name].detach().float().cpu()
                weight = interleaved(weight, heads(name, c)) if heads(name, c) else weight
                weight.contiguous().numpy().astype("<f4", copy=False).tofile(f)

    files.replace(path, fill)


def _rope(config: ModelConfig) -> torch.Tensor:
    """(2, positions, head_dim / 2): all cosines, then all sines."""
    positions = torch.arange(config.max_position_embeddings)[None]
    return torch.stack([table[0, 0, :, : config.head_dim // 2] for table in rope_table(positions, config)])


def write_tokenizer(path: Path, tokenizer: Tokenizer, size: int) -> list[str]:
    """Write tokenizer.bin, replaced in one step.

    Args:
        tokenizer: that `check` lets pass.
        size: pieces run.c will read, the model's vocab_size.
    Returns:
        what run.c will do otherwise than this tokenizer, a sentence each.
    """
    pieces = vocabulary(tokenizer, size)
    # Control pieces stand between line breaks, so that "<s>" in a prompt does not become one.
    texts = [f"\n{p.text}\n" if p.type in (CONTROL, UNUSED) else p.text.replace(SPACE, " ") for p in pieces]
    rows = [struct.pack("<fi", p.score, len(t.encode())) + t.encode() for p, t in zip(pieces, texts)]
    longest = struct.pack("<i", max(len(row) - 8 for row in rows))
    files.replace(path, lambda temporary: temporary.write_bytes(longest + b"".join(rows)))
    first_byte = next(i for i, p in enumerate(pieces) if p.text == "<0x00>")
    notes = []
    if first_byte != 3:
        notes.append(
            f"run.c takes ids 3 to 258 for bytes, here they begin at {first_byte}: of a prompt's characters "
            "without a token of their own it makes wrong ids"
        )
    if not tokenizer.model.add_dummy_prefix:
        notes.append("run.c puts a space in front of every prompt, this tokenizer does not")
    return notes


# ---------------------------------------------------------------- in


def read_weights(path: str | Path) -> Llama:
    """The model in a model.bin.

    Args:
        path: the file.
    Returns:
        the model, fp32.
    Raises:
        UserError: not such a file, or not of the size that its header tells; nothing was allocated then.
    """
    with open(path, "rb") as f:
        # The size of the file must be what the header describes, before anything is allocated.
        size, head = os.fstat(f.fileno()).st_size, f.read(HEADER.size)
        config = _config(path, head)
        with torch.device("meta"):  # names and shapes without memory
            described = Llama(config)
        shapes = {name: p.shape for name, p in described.named_parameters()}
        shapes[ROPE] = torch.Size([2, config.max_position_embeddings, config.head_dim // 2])
        expected = HEADER.size + 4 * sum(shape.numel() for shape in shapes.values())
        if size != expected:
            raise UserError(f"{path}: its header describes {expected:,} bytes, it has {size:,}", "is the file whole?")
        # Then the weights in the file's order; q and k are brought into our layout.
        state = {}
        for name in order(config):
            weight = torch.from_numpy(np.fromfile(f, "<f4", shapes[name].numel()).astype(np.float32, copy=False))
            if not weight.isfinite().all() and name != ROPE:
                raise UserError(f"{path}: {name} holds NaN or infinity")
            weight = weight.view(shapes[name])
            state[name] = half_split(weight, heads(name, config)) if heads(name, config) else weight
    del state[ROPE]
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    described.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        described.lm_head.weight = described.model.embed_tokens.weight
    return described


def _config(path: str | Path, head: bytes) -> ModelConfig:
    if len(head) < HEADER.size:
        raise UserError(f"{path}: {len(head)} bytes are no header of llama2.c", "is the file whole?")
    if int.from_bytes(head[:4], "little") == MAGIC:
        raise UserError(
            f"{path}: version {int.from_bytes(head[4:8], 'little')} of llama2.c's format, only 0 is read",
            "llama2.c's export.py --version 0 writes it",
        )
    hidden, intermediate, layers, of_queries, of_keys, vocab_size, positions = HEADER.unpack(head)
    try:
        if of_keys < 1 or vocab_size == 0:  # ModelConfig takes zero for "the usual"
            raise ValueError(f"{of_keys} key/value heads, {vocab_size} pieces")
        sizes = (abs(vocab_size), hidden, intermediate, layers, of_queries, of_keys)
        checked = CheckedConfig(
            *sizes,
            max_position_embeddings=positions,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            tie_word_embeddings=vocab_size > 0,
        )
        return ModelConfig(**asdict(checked))
    except ValueError as e:
        raise UserError(f"{path}: no header of llama2.c: {e}", "is it a model.bin?") from None


def read_tokenizer(path: str | Path, size: int) -> bytes:
    """A tokenizer.bin as a sentencepiece model that gives run.c's ids.

    Args:
        path: the file.
        size: pieces in it, the model's vocab_size: the file does not tell.
    Returns:
        the bytes of a `.model`.
    Raises:
        UserError, TokenizerError: not such a file, or not of this many pieces.
    """
    data, at, pieces = Path(path).read_bytes(), 4, []
    while at < len(data) and len(pieces) < size:
        score, length = struct.unpack_from("<fi", data, at) if at + 8 <= len(data) else (0.0, -1)
        if not 0 <= length <= len(data) - at - 8:
            break
        try:
            pieces.append(_piece(len(pieces), data[at + 8 : at + 8 + length].decode(), score))
        except UnicodeDecodeError:
            raise UserError(f"{path}: piece {len(pieces)} is not UTF-8") from None
        at += 8 + length
    if len(pieces) < size or at < len(data):
        raise UserError(
            f"{path}: {len(pieces)} of the model's {size} pieces end at byte {at} of {len(data)}",
            "are the two files of one model, and whole?",
        )
    trainer = (
        (3, 0, BPE),
        (4, 0, size),
        (35, 0, 1),
        (40, 0, 0),
        (41, 0, 1),
        (42, 0, 2),
        *((45 + i, 2, piece.text.encode()) for i, piece in enumerate(pieces[:3])),
    )
    # As run.c: a space in front of a prompt, and nothing of the text changed.
    normalizer = ((1, 2, b"identity"), (3, 0, 1), (4, 0, 0), (5, 0, 1))
    model = write_model(Model(pieces, trainer, normalizer))
    parse_model(model, str(path))
    return model


def _piece(number: int, text: str, score: float) -> Piece:
    control = re.fullmatch(r"\n(<[^\n]+>)\n", text)
    if number == 0:
        return Piece(text, score, UNKNOWN)
    if number in (1, 2) or control:
        return Piece(control[1] if control else text, score, CONTROL)
    if re.fullmatch("<0x[0-9A-F]{2}>", text):
        return Piece(text, score, BYTE)
    return Piece(text.replace(" ", SPACE), score, NORMAL)
