"""How near an answer is to its reference: BLEU, ROUGE, exact match and F1 over characters.

In:  texts. Out: numbers, BLEU from 0 to 100 as is usual, all others from 0 to 1.
Knows no model and no file. A text is cut in one of three ways, and each score says which:

    bleu_tokens   sacrebleu's tokenizer `zh`: every Chinese character apart, all else as in WMT's mteval-v13a
    characters    every character apart; white space does not count
    words         Chinese characters and punctuation apart, other words whole and in small letters: BERT's first step
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence

# What sacrebleu's tokenizer `zh` takes for Chinese. Its list means to name two blocks above U+FFFF as well, but writes
# them with four digits; what it then compares with is U+2001 to U+2A6D, so quotation marks, dashes and arrows stand
# apart, too, and characters above U+FFFF do not.
# Source: https://github.com/mjpost/sacrebleu/blob/master/sacrebleu/tokenizers/tokenizer_zh.py
CHINESE = re.compile(
    "([\u2001-\u2a6d\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31ef\u3200-\u4db5\u4e00-\u9fbb"
    "\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef])"
)
# The rules of mteval-v13a for what is not Chinese, in its order: marks stand apart; point and comma, unless they are
# between digits; a dash behind a digit. Source: https://aclanthology.org/W18-6319 (sacrebleu), section 2.1
V13A = [
    (re.compile(r"([!-&(-+/:-@\[-`{-~])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
]
ORDER = 4  # BLEU counts runs of one to four tokens
# Characters that BERT's tokenizer sets apart as Chinese.
# Source: https://github.com/google-research/bert/blob/master/tokenization.py, _is_chinese_char
IDEOGRAPH = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf\U0002f800-\U0002fa1f]"
)


# How a text is cut ----------------------------------------------------------------------------------------------------


def bleu_tokens(text: str) -> list[str]:
    """Tokens as sacrebleu's tokenizer `zh` makes them."""
    text = CHINESE.sub(r" \1 ", text.strip())
    for pattern, apart in V13A:
        text = pattern.sub(apart, text)
    return text.split()


def characters(text: str) -> list[str]:
    """Every character that is not white space."""
    return list("".join(text.split()))


def words(text: str) -> list[str]:
    """Chinese characters and punctuation one by one, other words whole, in small letters and without accents.

    Equal to the `BasicTokenizer` of transformers, which PromptCBLUE's script cuts with.
    """
    text = "".join(c for c in unicodedata.normalize("NFC", text) if c.isspace() or unicodedata.category(c)[0] != "C")
    plain = unicodedata.normalize("NFD", text.lower())  # an accent is a character of its own there, and left out
    apart = (f" {c} " if IDEOGRAPH.match(c) or is_mark(c) else c for c in plain if unicodedata.category(c) != "Mn")
    return "".join(apart).split()


def is_mark(c: str) -> bool:
    """Punctuation; of ASCII all that is neither letter nor digit."""
    return unicodedata.category(c).startswith("P") or (c.isascii() and not c.isalnum() and not c.isspace())


# Scores of one answer -------------------------------------------------------------------------------------------------


def exact_match(answer: str, reference: str) -> float:
    """1 where both say the same, but for spaces and line ends around them, else 0."""
    return float(answer.strip() == reference.strip())


def char_f1(answer: str, reference: str) -> float:
    """F1 over the bags of characters: how often a character may count is how often it stands in both.

    The F1 of SQuAD with characters as its words, without its removal of articles and punctuation. (CMRC's own script
    takes the longest common substring instead of the bag.) Two empty texts agree.

    Source: https://arxiv.org/abs/1606.05250, section 6.1
    """
    a, b = Counter(characters(answer)), Counter(characters(reference))
    common = sum((a & b).values())
    return 2 * common / total if (total := a.total() + b.total()) else 1.0


def rouge(answer: Sequence[Hashable], reference: Sequence[Hashable]) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L of two token sequences, as the package rouge-chinese 1.0.3 computes them.

    That is: ROUGE-1 and -2 over the *sets* of tokens and of pairs, so a repeated one counts once; ROUGE-L over the
    longest common subsequence of the whole texts, whatever their sentences; 1e-8 in the denominator, so a perfect
    score is 0.999999995. The package refuses an empty text, here it scores 0. On the characters of a text that has
    line ends the package also counts an empty word behind some of them; `characters` has none.

    Args:
        answer, reference: tokens, any of the three kinds above.
    Returns:
        {"rouge_1": ..., "rouge_2": ..., "rouge_l": ...}, each from 0 to 1.

    Source: https://aclanthology.org/W04-1013 and https://github.com/Isaac-JL-Chen/rouge_chinese
    """
    scores = {}
    for n in (1, 2):
        mine, theirs = (set(zip(*(tokens[i:] for i in range(n)))) for tokens in (answer, reference))
        scores[f"rouge_{n}"] = f_measure(len(mine & theirs), len(mine), len(theirs))
    return scores | {"rouge_l": f_measure(common_subsequence(answer, reference), len(answer), len(reference))}


def f_measure(common: int, answered: int, wanted: int) -> float:
    """F1 of what is common, with rouge-chinese's 1e-8."""
    precision, recall = common / answered if answered else 0.0, common / wanted if wanted else 0.0
    return 2 * precision * recall / (precision + recall + 1e-8)


def common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence.

    A row of the usual table is one integer, with a zero bit where the length grows by one: a step is an addition, and
    2,000 characters against 2,000 take 2 ms instead of 2 s.

    Source: H. Hyyrö, Bit-parallel LCS-length computation revisited, 2004
    """
    places: dict[Hashable, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    everywhere = (1 << len(a)) - 1
    row = everywhere
    for token in b:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    return len(a) - row.bit_count()


# BLEU -----------------------------------------------------------------------------------------------------------------


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """BLEU-4 of all answers together: what is counted is summed first. From 0 to 100.

    Equal to `sacrebleu.corpus_bleu(answers, [references], tokenize="zh")`.

    Source: https://aclanthology.org/P02-1040
    """
    each = [counts(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    return bleu_of([sum(column) for column in zip(*each)]) if each else 0.0


def sentence_bleu(answer: str, reference: str) -> float:
    """BLEU of one answer, over the orders of which it has any runs. From 0 to 100.

    Equal to `sacrebleu.sentence_bleu(answer, [reference], tokenize="zh")`.
    """
    return bleu_of(counts(answer, reference), effective_order=True)


def counts(answer: str, reference: str) -> list[int]:
    """Tokens of both, then for each order 1 to 4 the answer's runs that the reference has, then all the answer's."""
    a, b = bleu_tokens(answer), bleu_tokens(reference)
    right, made = [], []
    for n in range(1, ORDER + 1):
        mine, theirs = (Counter(zip(*(tokens[i:] for i in range(n)))) for tokens in (a, b))
        right.append((mine & theirs).total())
        made.append(mine.total())
    return [len(a), len(b), *right, *made]


def bleu_of(sums: Sequence[int], effective_order: bool = False) -> float:
    """BLEU of counts: the geometric mean of the precisions, less where the answers are shorter than the references.

    An order without a match takes half of one run, the next such order a quarter, and so on: smoothing "exp", which is
    method 3 of https://aclanthology.org/W14-3346.

    Args:
        sums: as `counts` gives them.
        effective_order: orders without any run are left out; without this they make the score 0.
    """
    length, wanted, right, made = sums[0], sums[1], sums[2 : 2 + ORDER], sums[2 + ORDER :]
    if not any(right):
        return 0.0
    precisions, part = [], 1.0
    for hits, runs in zip(right, made):
        if not runs:
            break
        part = part / 2 if not hits else part
        precisions.append((hits or part) / runs)
    if len(precisions) < ORDER and not effective_order:
        return 0.0
    brevity = min(1.0, math.exp(1 - wanted / length))
    return 100 * brevity * math.exp(sum(map(math.log, precisions)) / len(precisions))
