"""A text continued as several programs do it, for `python -m bench decode`.

In:  a model folder (a GGUF file for llama.cpp), ids of prompts, a number of new tokens. Out: seconds and ids.
pip install transformers, xllamacpp for the peers.
Each runs in a process of its own: a line in, a text is made; a line out, what it took.

    python -m bench.decoders '{"name": "ours-bf16", ...}'       # arguments of `serve`
"""

import json
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch

from assembly.inference import InferenceConfig, open_generator
from core.generate import SamplingConfig
from model import Llama

PEERS = ("ours", "transformers", "llama.cpp")


def serve(name: str, path: str, prompt: list[int], new: int, threads: int) -> None:
    """For each line that comes, a line: seconds to the first id and to the last, and the ids; then bytes read an id."""
    torch.set_num_threads(threads)
    peer, *options = name.split("-")
    run, read = {"ours": ours, "transformers": theirs, "llama.cpp": llama_cpp}[peer](Path(path), options, threads)
    for _ in sys.stdin:
        print(json.dumps(dict(zip(("first_s", "seconds", "ids"), run(prompt, new)))), flush=True)
    print(json.dumps({"bytes": read}), flush=True)


def bytes_of_a_step(model: Llama) -> int:
    """What every new token reads of the weights: all but the embedding, of which it reads a row."""
    parts = (model.model.layers, model.lm_head)
    return sum(t.numel() * t.element_size() for part in parts for t in [*part.parameters(), *part.buffers()])


def ours(folder: Path, options: list[str], threads: int) -> tuple[Callable, int]:
    """What sample.py uses. Options: bf16, int8, int4, compiled, batch16."""
    cfg = InferenceConfig(
        model=str(folder),
        dtype="bf16" if "bf16" in options else "fp32",
        quantize=next((o for o in options if o in ("int8", "int4")), "none"),
        compile="compiled" in options,
        device="cpu",
    )
    generator = open_generator(cfg)
    rows = next((int(o.removeprefix("batch")) for o in options if o.startswith("batch")), 1)
    batches = []  # a compiled step is kept

    def run(prompt: list[int], new: int):
        if not batches:
            batches.append(generator.new_batch(rows, len(prompt) + new))
        began, first = time.perf_counter(), 0.0
        texts = batches[0].add_all([prompt] * rows, SamplingConfig(max_new_tokens=new, temperature=0), set())
        while batches[0].step():
            first = first or time.perf_counter() - began
        return first, time.perf_counter() - began, texts[0][0].added

    return run, bytes_of_a_step(generator.model)


def theirs(folder: Path, options: list[str], threads: int) -> tuple[Callable, int]:
    """Options: bf16."""
    import transformers

    dtype = torch.bfloat16 if "bf16" in options else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None

    class First:
        """Streamer: what is told with the prompt, and then with each id."""

        def __init__(self):
            self.at = []

        def put(self, value):
            self.at.append(time.perf_counter())

        def end(self):
            pass

    def run(prompt: list[int], new: int):
        ids, told, began = torch.tensor([prompt]), First(), time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, streamer=told
        )
        return told.at[1] - began, time.perf_counter() - began, out[0, len(prompt) :].tolist()

    return run, 0


def llama_cpp(path: Path, options: list[str], threads: int) -> tuple[Callable, int]:
    """The options are in the file."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.port = str(path), 512, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel = 1
    server = xllamacpp.Server(params)

    def run(prompt: list[int], new: int):
        body = {
            "prompt": prompt,
            "n_predict": new,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        request = urllib.request.Request(
            f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        began = time.perf_counter()
        with urllib.request.urlopen(request) as reply:
            answer = json.load(reply)
        assert answer["tokens_predicted"] == new, answer
        return answer["timings"]["prompt_ms"] / 1000, time.perf_counter() - began, answer["tokens"]

    return run, path.stat().st_size


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
