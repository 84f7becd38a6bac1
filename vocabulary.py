"""A vocabulary: train one, look into one, make one smaller.

    python vocabulary.py train --input book.txt more.txt --output out/tokenizer --vocab_size 8000
    python vocabulary.py inspect --tokenizer chatglm2/tokenizer.model out/pretrain --text book.txt --pieces 10
    python vocabulary.py prune --input chatglm2 --output data/small --size 24000 --corpus book.txt

`python vocabulary.py prune --help` says more of that word. Each word loads its own file of extras/vocabulary; torch is
loaded only where a model follows its tokenizer, by prune --remap_model.
"""

import sys

from core import config, errors
from core.errors import UserError


def main() -> None:
    word, argv = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if word in ("-h", "--help"):
        config.load(__doc__, SECTIONS, [word])
    if word not in WORDS:
        raise UserError(f"{word or 'nothing'}: no such word", f"python vocabulary.py {' or '.join(WORDS)}")
    WORDS[word](argv)


def train(argv: list[str]) -> None:
    """Texts to a new vocabulary."""
    from extras.vocabulary import train

    train.run(config.load(train.__doc__, {"train": train.VocabularyConfig}, argv).train)


def inspect(argv: list[str]) -> None:
    """What is in vocabularies, and how well they fit a text."""
    from extras.vocabulary import inspect

    inspect.run(config.load(inspect.__doc__, {"inspect": inspect.InspectConfig}, argv).inspect)


def prune(argv: list[str]) -> None:
    """A vocabulary to a smaller one."""
    from extras.vocabulary import prune

    prune.run(config.load(prune.__doc__, {"prune": prune.PruneConfig}, argv).prune, load_model)


def load_model(folder):
    """The model in a folder, of any family; what builds models, and torch with it, is loaded where one is asked for."""
    from assembly import models

    return models.load_model(folder)


WORDS = {"train": train, "inspect": inspect, "prune": prune}
SECTIONS = {
    "train": "extras.vocabulary.train:VocabularyConfig",
    "inspect": "extras.vocabulary.inspect:InspectConfig",
    "prune": "extras.vocabulary.prune:PruneConfig",
}

if __name__ == "__main__":
    errors.run(main)
