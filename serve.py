"""A model in, a server out: OpenAI's API, and a chat page in the browser.

    python serve.py                                      # out/sft, at http://127.0.0.1:8000
    python serve.py --model out/pretrain --port 9000     # a base model: /v1/completions only
    python serve.py --adapter out/lora --dtype bf16 --rows 32
    python serve.py --host 0.0.0.0 --api_key "$(cat key.txt)"       # for others, too

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
      -d '{"messages": [{"role": "user", "content": "曹操字什么？"}], "stream": true}'

/v1/models, /v1/chat/completions, /v1/completions, /health, and the page at /. What a request does not say is as in
sample.py, but for the seed, which is then drawn, and the length, which the context ends.
Needs starlette, uvicorn and pydantic: pip install -r requirements-serve.txt
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from assembly.inference import InferenceConfig, open_generator
from core import config, errors
from core.config import Range, Section
from core.errors import UserError
from extras.serve import app, wire, worker


@dataclass(frozen=True)
class ServeConfig(Section):
    host: str = "127.0.0.1"  # the address to listen on; others than this machine's own need an api_key
    port: Annotated[int, Range(least=0, most=(1 << 16) - 1)] = 8000  # 0: a free one
    api_key: str = ""  # what clients have to bring, as "Authorization: Bearer ..."
    names: tuple[str, ...] = ()  # host names of this server that requests may say, beside localhost and `host`
    rows: Annotated[int, Range(least=1, most=1024)] = 16  # texts at once, each with a cache of `context` positions
    queue: Annotated[int, Range(least=1, most=1 << 16)] = (
        64  # requests that may wait for a row; more are told to come again
    )
    context: Annotated[int, Range(least=0)] = 0  # positions of a text, prompt and answer; 0: the model's

    def __post_init__(self):
        super().__post_init__()
        if not self.host:
            raise ValueError("host = '': needs an address")
        if not (self.api_key.isascii() and self.api_key.isprintable()) or self.api_key != self.api_key.strip():
            raise ValueError("api_key must be printable ASCII without spaces around it")
        if not app.is_loopback(self.host) and not self.api_key:
            raise ValueError(f"host = {self.host!r} lets others ask: it needs an api_key")


def main() -> None:
    cfg = config.load(__doc__, {"inference": InferenceConfig, "serve": ServeConfig}, sys.argv[1:])
    wire.packages()  # before the model is loaded
    asked, generator = cfg.serve, open_generator(cfg.inference)
    if asked.context > generator.context:
        raise UserError(f"--context {asked.context}: the model has {generator.context} positions")
    name = Path(cfg.inference.adapter or generator.name).resolve().name
    sock = wire.listening(asked.host, asked.port)
    writer = worker.Worker(generator, asked.rows, asked.queue, asked.context or generator.context)
    server = wire.make(app.App(writer, name, asked.host, asked.api_key, asked.names), writer)
    host = f"[{asked.host}]" if ":" in asked.host else asked.host
    print(
        f"{name}: {'a chat' if generator.chat_format else 'a base'} model, {writer.context} positions, "
        f"{asked.rows} texts at once; http://{host}:{sock.getsockname()[1]}",
        flush=True,
    )
    wire.run(server, sock, writer)


if __name__ == "__main__":
    errors.run(main)
