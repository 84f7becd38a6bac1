"""A model as one GGUF file for llama.cpp, and an Ollama Modelfile beside it. Needs the package gguf.

In:  a model folder; or a model, its tokenizer, the name of its chat format. Out: FILE.gguf, Modelfile.
Knows no other family than Llama.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's convert_hf_to_gguf.py for the rows of
q and k and for which tensors stay in fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from core import files, hf_folder
from core.config import Section
from core.errors import UserError
from core.generate import SamplingConfig
from extras.formats.original_llama import interleaved, load_folder, vocabulary
from model import Llama
from tokenizer import Tokenizer, chat

# The largest weight that each type can hold: fp16's largest number, with q8_0 and q4_0 as a scale times 127 or 8.
LARGEST = {"f32": np.inf, "f16": 65504.0, "bf16": 3.3895e38, "q8_0": 127 * 65504.0, "q4_0": 8 * 65504.0}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class GgufConfig(Section):
    model: str = "out/sft"  # a model folder
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_0"] = "f16"  # of the matrices
    output: str = ""  # a file .gguf, or a folder; "": a folder beside the model, out/sft-f16
    overwrite: bool = False


def export(cfg: GgufConfig, open_model: Callable[..., hf_folder.Opened]) -> None:
    """What `python export.py gguf` does: the file, and a Modelfile for Ollama."""
    library()  # before the model is loaded
    folder, model, tokenizer = load_folder(cfg.model, open_model)
    name = Path(cfg.model).resolve().name
    path = Path(cfg.output or Path(cfg.model).resolve().with_name(f"{name}-{cfg.type}"))
    if path.suffix != ".gguf":
        path /= f"{name}-{cfg.type}.gguf"
    beside = path.with_name("Modelfile")
    files.check_free([path, beside], cfg.overwrite)
    chat_format = hf_folder.load_about(folder).get("chat_format")
    counts = write(path, model, tokenizer, cfg.type, name, chat_format)
    files.write_text(beside, modelfile(path.name, tokenizer, model.config.max_position_embeddings, chat_format))
    tensors = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    spoken = f"chat format {chat_format}" if chat_format else "no chat format: it continues texts"
    print(f"{path}: {path.stat().st_size:,} bytes, tensors: {tensors}; {spoken}")
    print(f"{beside}: ollama create {name} -f {beside}")


# ---------------------------------------------------------------- llama.cpp


def library():
    """The package gguf."""
    try:
        import gguf
    except ImportError:
        raise UserError("a GGUF file needs the package gguf", "pip install gguf") from None
    return gguf


def write(
    path: Path, model: Llama, tokenizer: Tokenizer, kind: str, name: str, chat_format: str | None
) -> dict[str, int]:
    """Write a model with its vocabulary and chat template.

    Args:
        path: the file; replaced in one step.
        model: fp32 weights.
        tokenizer: the model's, a sentencepiece BPE.
        kind: a key of LARGEST, of the matrices. Norms and biases are always f32; a matrix whose rows are no multiple of
            32 does not divide into the blocks of q8_0 and q4_0 and is f16, and with q4_0 the head (a tied embedding is
            the head) is q8_0. So does llama.cpp, but for the head's q6_k, which the package cannot write.
        name: of the model, to be shown.
        chat_format: a name from `chat.FORMATS`, or None for a model that only continues.
    Returns:
        number of tensors by the type they got.
    Raises:
        UserError: no gguf, a vocabulary llama.cpp cannot express, a weight too large for the type.
    """
    # The vocabulary first: what llama.cpp cannot express is refused before anything is written.
    gguf, pieces, counts = library(), vocabulary(tokenizer, model.config.vocab_size), {}
    path.parent.mkdir(parents=True, exist_ok=True)

    def fill(temporary: Path) -> None:
        out = gguf.GGUFWriter(temporary, "llama")
        try:
            _add_sizes(out, gguf, model, kind, name)
            _add_vocabulary(out, pieces, tokenizer, chat_format)
            # One tensor after another: rounded, checked and handed over.
            for tensor, weight in model.named_parameters():
                values, own = _values(tensor, weight, model.config), _kind(weight, kind, weight is model.lm_head.weight)
                if (largest := abs(values).max()) > LARGEST[own]:
                    raise UserError(f"{tensor} holds {largest:.4g}, too large for {own}", "--type f32")
                own_type = gguf.GGMLQuantizationType[own.upper()]
                out.add_tensor(_name(tensor), gguf.quants.quantize(values, own_type), raw_dtype=own_type)
                counts[own] = counts.get(own, 0) + 1
            out.write_header_to_file()
            out.write_kv_data_to_file()
            out.write_tensors_to_file()
        finally:
            out.close()

    files.replace(path, fill)
    return counts


def _add_sizes(out, gguf, model: Llama, kind: str, name: str) -> None:
    c = model.config
    out.add_name(name)
    out.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    out.add_vocab_size(c.vocab_size)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_key_length(c.head_dim)
    out.add_value_length(c.head_dim)
    out.add_rope_dimension_count(c.head_dim)
    out.add_rope_freq_base(c.rope_theta)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)


def _add_vocabulary(out, pieces: list, tokenizer: Tokenizer, chat_format: str | None) -> None:
    out.add_tokenizer_model("llama")  # llama.cpp's name for sentencepiece's merging by score
    out.add_tokenizer_pre("default")
    out.add_token_list([p.text.encode() for p in pieces])
    out.add_token_scores([p.score for p in pieces])
    out.add_token_types([p.type for p in pieces])  # sentencepiece's numbers are GGUF's
    out.add_add_space_prefix(tokenizer.model.add_dummy_prefix)
    out.add_unk_token_id(tokenizer.model.unk_id)
    out.add_bos_token_id(tokenizer.bos_id)
    out.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.pad_id is not None:
        out.add_pad_token_id(tokenizer.pad_id)
    out.add_add_bos_token(adds_bos(tokenizer, chat_format))
    out.add_add_eos_token(False)
    if chat_format:
        out.add_chat_template(chat.template(chat_format))
        for end in chat.end_ids(tokenizer, chat_format) - {tokenizer.eos_id}:  # what ends an answer, not the document
            out.add_eot_token_id(end)


def adds_bos(tokenizer: Tokenizer, chat_format: str | None) -> bool:
    """Does a prompt begin with bos? llama.cpp puts it in front of whatever it is given, of chats, too."""
    if not chat_format:
        return True
    ids, _ = chat.render([{"role": "user", "content": "a"}], tokenizer, chat_format, generation=True)
    return ids[0] == tokenizer.bos_id


def _name(tensor: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` -> `blk.0.ffn_up.weight`."""
    module, ending = tensor.rsplit(".", 1)
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{ending}"
    number, part = module.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{NAMES[part]}.{ending}"


def _values(tensor: str, weight, config) -> np.ndarray:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(tensor.split(".")[-2])
    weight = weight.detach().float().cpu()
    return (interleaved(weight, heads) if heads else weight).contiguous().numpy()


def _kind(weight, kind: str, is_head: bool) -> str:
    if weight.ndim == 1:
        return "f32"
    if kind.startswith("q") and weight.shape[1] % 32:
        return "f16"
    return "q8_0" if kind == "q4_0" and is_head else kind


# ---------------------------------------------------------------- Ollama


def modelfile(gguf_name: str, tokenizer: Tokenizer, context: int, chat_format: str | None) -> str:
    """What `ollama create NAME -f Modelfile` reads: the file, how a chat is written, and sample.py's defaults.

    Args:
        gguf_name: the file's name, in the same folder.
        tokenizer, chat_format: as in `write`.
        context: positions; Ollama's own default may be more than the model was trained on.
    Source: https://github.com/ollama/ollama/blob/main/docs/modelfile.md, docs/template.md
    """
    sampling = SamplingConfig()
    options = {
        "num_ctx": context,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "repeat_penalty": sampling.repetition_penalty,
    }
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{_template(tokenizer, chat_format)}"""']
    return "\n".join([*lines, *(f"PARAMETER {key} {value}" for key, value in options.items())]) + "\n"


def _template(tokenizer: Tokenizer, chat_format: str | None) -> str:
    """The chat format as a template of Go's text/template. White space around a message stays: Go cannot strip it."""
    if not chat_format:
        return "{{ .Prompt }}"
    form, special = chat.FORMATS[chat_format], chat.special_ids(tokenizer, chat_format)

    def say(part: str, content: str = "") -> str:
        return part.format(content=content, **{slot: tokenizer.id_to_piece(id) for slot, id in special.items()})

    start, opening = form.start, form.question
    if adds_bos(tokenizer, chat_format):  # llama.cpp writes it
        start, opening = (start.removeprefix("{bos}"), opening) if start else ("", opening.removeprefix("{bos}"))
    first = say(opening, "{{ .Content }}")
    if form.system is None:
        joined = form.system_in_question.replace("{system}", "{{ $.System }}").replace("{content}", "{{ .Content }}")
        first = f"{{{{ if $.System }}}}{say(opening, joined)}{{{{ else }}}}{first}{{{{ end }}}}"
    system = f"{{{{ if .System }}}}{say(form.system, '{{ .System }}')}{{{{ end }}}}" if form.system else ""
    later = say(form.between + form.question, "{{ .Content }}")
    return (
        f"{{{{ $first := true }}}}{say(start)}{system}"
        '{{ range .Messages }}{{ if eq .Role "user" }}'
        f"{{{{ if $first }}}}{first}{{{{ else }}}}{later}{{{{ end }}}}{{{{ $first = false }}}}"
        f'{{{{ else if eq .Role "assistant" }}}}{say(form.answer, "{{ .Content }}")}{{{{ end }}}}{{{{ end }}}}'
    )
