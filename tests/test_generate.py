"""Promises of `core/generate.py` and `extras/decoding`: it draws what it says, each row as if it were alone."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.generate import SamplingConfig, generate, next_probabilities, penalise
from extras.decoding.batching import Batch, continued, generate_all
from extras.decoding.batching import complete as complete_together
from extras.decoding.beams import beam_search
from model import ModelConfig

V = 97
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0)


def complete_each(model, prompts, cfg, stop_ids):
    """What is added to each prompt, one after another."""
    return [list(generate(model, prompt, cfg, stop_ids)) for prompt in prompts]


both_ways = pytest.mark.parametrize("complete", [complete_together, complete_each], ids=["together", "each"])


def prompts_of(*lengths, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, V, (n,), generator=generator).tolist() for n in lengths]


# Probabilities --------------------------------------------------------------------------------------------------------


def naive(logits, seen, cfg, made=()):
    """One row of logits (floats) -> probabilities, id by id, by the definitions."""
    r, made = cfg.repetition_penalty, list(made) or [0] * len(logits)
    z = [x - cfg.presence_penalty * (m > 0) - cfg.frequency_penalty * m for x, m in zip(logits, made)]
    z = [(x / r if x > 0 else x * r) if s else x for x, s in zip(z, seen)]
    top = max(z)
    if cfg.temperature == 0:
        return [float(i == z.index(top)) for i in range(len(z))]
    kept = set(range(len(z)))
    if cfg.top_k:
        kept = {i for i in kept if sum(z[j] > z[i] for j in range(len(z))) < cfg.top_k}

    def normal():
        weights = [math.exp((z[i] - top) / cfg.temperature) if i in kept else 0.0 for i in range(len(z))]
        return [w / sum(weights) for w in weights]

    p = normal()
    if cfg.min_p:
        kept = {i for i in kept if p[i] >= cfg.min_p * max(p)}
        p = normal()
    if cfg.top_p < 1:
        before, running = {}, 0.0
        for i in sorted(kept, key=lambda i: -p[i]):
            before[i], running = running, running + p[i]
        # So near the border rounding decides: such an example says nothing.
        if any(abs(b - cfg.top_p) < 1e-5 for b in before.values()):
            return None
        kept = {i for i in kept if before[i] < cfg.top_p}
        p = normal()
    return p


CONFIGS = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0, 0.3, 0.8, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 10, 30, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.7, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 1.1, -0.4]),
)


@given(cfg=CONFIGS, seed=st.integers(0, 10**6), width=st.integers(1, 40))
def test_probabilities_equal_naive_top_k_top_p_min_p_and_penalties(cfg, seed, width):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, width, generator=generator) * 3
    seen = torch.rand(3, width, generator=generator) < 0.3
    made = torch.randint(0, 4, (3, width), generator=generator, dtype=torch.int32)
    got = next_probabilities(penalise(logits, seen, made, cfg), cfg)
    for row in range(3):
        expected = naive(logits[row].tolist(), seen[row].tolist(), cfg, made[row].tolist())
        if expected is not None:
            torch.testing.assert_close(got[row], torch.tensor(expected), rtol=1e-4, atol=1e-6)


ANY_LOGIT = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, 50.0, -50.0, 1e4, -1e4, 1e38, -1e38, 3.4e38, -3.4e38])


@given(
    logits=st.lists(ANY_LOGIT, min_size=1, max_size=8),
    temperature=st.sampled_from([0, 1e-300, 1e-38, 1e-6, 1e-5, 1e-3, 1.0, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 10**9]),
    top_p=st.sampled_from([1e-300, 1e-9, 0.5, 1 - 1e-9, 1.0]),
    min_p=st.sampled_from([0.0, 1e-300, 1.0]),
    penalty=st.sampled_from([0.01, 0.5, 1.0, 2.0, 100.0]),
)
def test_extreme_numbers_never_give_nan_and_always_leave_an_id(logits, temperature, top_k, top_p, min_p, penalty):
    cfg = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    seen = torch.tensor([[i % 2 == 0 for i in range(len(logits))]])
    p = next_probabilities(penalise(torch.tensor([logits]), seen, seen.int(), cfg), cfg)
    assert p.isfinite().all() and (p >= 0).all() and p.max() > 0
    assert p.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e30},
        {"max_new_tokens": -1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": math.inf},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e40},
        {"presence_penalty": 2.1},
        {"presence_penalty": math.nan},
        {"frequency_penalty": -2.1},
        {"truncate": "right"},
    ],
    ids=str,
)
def test_a_bad_option_is_refused_and_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingConfig(**bad)


# Text of one row ------------------------------------------------------------------------------------------------------


def argmax_loop(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("kv_heads", [1, 4])
@both_ways
def test_greedy_equals_an_argmax_loop_without_a_cache(tiny_config, make_model, kv_heads, complete):
    model = make_model(dataclasses.replace(tiny_config, num_key_value_heads=kv_heads))
    for prompt in prompts_of(1, 6, 20):
        assert complete(model, [prompt], GREEDY, set()) == [argmax_loop(model, prompt, 12)]


@both_ways
def test_prompts_in_one_batch_go_on_as_each_alone(tiny_model, complete):
    prompts = prompts_of(9, 1, 4, 17, 4)
    assert complete(tiny_model, prompts, GREEDY, set()) == [argmax_loop(tiny_model, p, 12) for p in prompts]


@both_ways
def test_a_row_draws_the_same_whatever_else_is_in_the_batch(tiny_model, complete):
    cfg = SamplingConfig(max_new_tokens=12, temperature=1.5, top_p=0.95, seed=7)
    prompts = prompts_of(9, 1, 4, 17)
    alone = [complete(tiny_model, [p], cfg, set())[0] for p in prompts]
    assert complete(tiny_model, prompts, cfg, set()) == alone
    assert complete(tiny_model, prompts[::-1], cfg, set()) == alone[::-1]


@both_ways
def test_the_seed_alone_decides_what_is_drawn(tiny_model, complete):
    cfg = SamplingConfig(max_new_tokens=20, temperature=1.5, top_p=1.0, seed=7)
    prompts = prompts_of(5, 8)
    torch.manual_seed(1)
    first = complete(tiny_model, prompts, cfg, set())
    torch.manual_seed(2)
    assert complete(tiny_model, prompts, cfg, set()) == first
    assert complete(tiny_model, prompts, dataclasses.replace(cfg, seed=8), set()) != first


@both_ways
def test_ids_are_drawn_as_often_as_their_probabilities_say(tiny_model, complete):
    # Small weights: a spread-out distribution, of which the 8 likeliest ids are left.
    with torch.no_grad():
        tiny_model.model.norm.weight.mul_(0.1)
    cfg = SamplingConfig(max_new_tokens=1, temperature=1.0, top_k=8, top_p=1.0)
    prompt, draws = prompts_of(3)[0], 600
    p = next_probabilities(tiny_model(torch.tensor([prompt]))[:, -1], cfg)[0]
    counts = torch.zeros(V)
    for seed in range(draws):
        counts[complete(tiny_model, [prompt], dataclasses.replace(cfg, seed=seed), set())[0][0]] += 1
    kept = p > 0
    assert kept.sum() == 8 and counts[~kept].sum() == 0
    chi_square = ((counts - draws * p) ** 2 / (draws * p))[kept].sum().item()
    assert chi_square < 24.3  # 7 degrees of freedom: 1 in 1,000


@both_ways
def test_the_repetition_penalty_covers_the_prompt_and_what_was_made(tiny_model, complete):
    cfg = dataclasses.replace(GREEDY, max_new_tokens=30, repetition_penalty=100.0)
    prompt = prompts_of(20)[0]
    ids = list(prompt)
    for _ in range(30):
        with torch.no_grad():
            z = tiny_model(torch.tensor([ids]))[0, -1].tolist()
        ids.append(naive(z, [i in ids for i in range(V)], cfg).index(1.0))
    assert complete(tiny_model, [prompt], cfg, set()) == [ids[20:]]


# Endings --------------------------------------------------------------------------------------------------------------


@both_ways
def test_a_stop_id_ends_its_row_only_and_is_not_given_out(tiny_model, complete):
    prompts = prompts_of(9, 4)
    free = [argmax_loop(tiny_model, p, 12) for p in prompts]
    stop = next(token for token in free[0][3:] if token not in free[1] and token not in free[0][:3])
    made = complete(tiny_model, prompts, GREEDY, {stop})
    assert made == [free[0][: free[0].index(stop)], free[1]]


@both_ways
def test_no_step_is_computed_once_every_row_has_stopped(tiny_model, complete):
    prompt = prompts_of(9)[0]
    calls = []
    tiny_model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    assert complete(tiny_model, [prompt], dataclasses.replace(GREEDY, max_new_tokens=40), set(range(V))) == [[]]
    assert len(calls) == 1


def test_ids_come_one_step_at_a_time(tiny_model):
    prompts = prompts_of(9, 4)
    steps = generate_all(tiny_model, prompts, GREEDY, set())
    first = next(steps)
    assert [row for row, _ in first] == [0, 1]
    assert [token for _, token in first] == [argmax_loop(tiny_model, p, 1)[0] for p in prompts]
    assert len(list(steps)) == 11


@both_ways
def test_no_new_tokens_wanted_gives_none(tiny_model, complete):
    assert complete(tiny_model, prompts_of(3, 2), dataclasses.replace(GREEDY, max_new_tokens=0), set()) == [[], []]


@pytest.mark.parametrize("length, made", [(64, 1), (63, 2), (60, 5)])
@both_ways
def test_a_row_ends_where_the_context_is_full(tiny_model, length, made, complete):
    # The 64th position still predicts one id more.
    assert len(complete(tiny_model, prompts_of(length), GREEDY, set())[0]) == made


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, said",
    [
        ([], "no tokens"),
        ([1] * 65, "65 tokens, the model's context is 64"),
        ([1, V, 2], f"id {V}, the model knows {V}"),
        ([1, -3, 2], "id -3"),
    ],
)
@both_ways
def test_an_impossible_prompt_is_refused(tiny_model, prompt, said, complete):
    with pytest.raises(UserError, match=said):
        complete(tiny_model, [[1, 2], prompt], GREEDY, set())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@both_ways
def test_logits_that_are_not_numbers_are_refused(tiny_model, value, complete):
    with torch.no_grad():
        tiny_model.lm_head.weight[5, 3] = value
    with pytest.raises(UserError, match="not finite"):
        complete(tiny_model, [[1, 2]], GREEDY, set())


# Texts that come and go -------------------------------------------------------------------------------------------------


def alone(model, prompt, cfg, stop_ids=frozenset(), complete=complete_together):
    return complete(model, [prompt], cfg, stop_ids)[0]


@pytest.mark.parametrize("seed", range(5))
def test_texts_that_join_and_leave_at_random_say_what_each_says_alone(tiny_model, seed):
    chance = random.Random(seed)
    batch, running, ended, cut = Batch(tiny_model, 5), [], [], 0
    while len(ended) < 25:
        if batch.free and chance.random() < 0.6:
            cfg = SamplingConfig(
                max_new_tokens=chance.randint(1, 30),
                temperature=chance.choice([0, 1.0, 1.5]),
                seed=chance.randint(0, 99),
                repetition_penalty=chance.choice([1.0, 1.2]),
                presence_penalty=chance.choice([0.0, 0.5]),
            )
            running += batch.add(prompts_of(chance.randint(1, 40), seed=chance.randint(0, 99))[0], cfg, {3, 7})
        if running and chance.random() < 0.1:
            gone = running.pop(chance.randrange(len(running)))
            batch.remove(gone)
            cut += 1
            assert gone.added == alone(tiny_model, gone.prompt, gone.sampling, {3, 7})[: len(gone.added)]
        for token in batch.step():
            assert (token.end == "stop") == (token.id in (3, 7))
            if token.end:
                running.remove(token.text)
                ended.append(token.text)
    assert cut and batch.free == 5 - len(running)
    for text in ended:
        assert text.added == alone(tiny_model, text.prompt, text.sampling, {3, 7})


def test_several_texts_of_a_prompt_read_it_once_and_have_seeds_of_their_own(tiny_model):
    cfg, prompt = SamplingConfig(max_new_tokens=9, temperature=1.5, seed=4), prompts_of(11)[0]
    read = []
    tiny_model.model.embed_tokens.register_forward_hook(lambda _, ids, __: read.append(tuple(ids[0].shape)))
    ((one, two, three),) = continued(tiny_model, [prompt], cfg, set(), rows=1, n=3)
    assert read == [(1, 11)] + [(3, 1)] * 8
    assert [t.added for t in (one, two, three)] == [
        alone(tiny_model, prompt, dataclasses.replace(cfg, seed=s)) for s in (4, 5, 6)
    ]
    assert one.added != two.added != three.added


@pytest.mark.parametrize("seed", range(20))
def test_a_text_by_itself_is_the_one_that_a_batch_of_one_says(tiny_model, seed):
    chance = random.Random(seed)
    cfg = SamplingConfig(
        max_new_tokens=chance.randint(1, 150),
        temperature=chance.choice([0, 0.8, 1.5]),
        top_k=chance.choice([0, 5]),
        min_p=chance.choice([0.0, 0.05]),
        seed=chance.randint(0, 99),
        repetition_penalty=chance.choice([1.0, 1.2]),
        presence_penalty=chance.choice([0.0, 0.5]),
        frequency_penalty=chance.choice([0.0, 0.3]),
        truncate=chance.choice(["none", "left"]),
    )
    prompt = prompts_of(chance.randint(1, 64), seed=seed)[0]
    stop_ids = {chance.randrange(V)}
    ((text,),) = continued(tiny_model, [prompt], cfg, stop_ids, rows=1)
    assert list(generate(tiny_model, prompt, cfg, stop_ids)) == text.added


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_prompts_of_a_file_are_continued_in_their_order_whatever_fits_at_once(tiny_model, rows):
    prompts, cfg = prompts_of(9, 1, 30, 4, 17, 4, 2), SamplingConfig(max_new_tokens=6, temperature=1.2, seed=3)
    groups = continued(tiny_model, prompts, cfg, {5}, rows=rows, n=2)
    for prompt, group in zip(prompts, groups):
        assert [t.added for t in group] == [
            alone(tiny_model, prompt, dataclasses.replace(cfg, seed=s), {5}) for s in (3, 4)
        ]


def test_log_probabilities_are_the_models_own_whatever_is_drawn(tiny_model):
    cfg = SamplingConfig(max_new_tokens=15, temperature=1.7, top_k=20, repetition_penalty=1.5)
    prompt = prompts_of(6)[0]
    ((text,),) = continued(tiny_model, [prompt], cfg, {9}, rows=1, logprobs=4)
    with torch.no_grad():
        logp = tiny_model(torch.tensor([prompt + text.added]))[0].log_softmax(dim=-1)
    assert [t.id for t in text.tokens][: len(text.added)] == text.added
    for at, token in enumerate(text.tokens, len(prompt) - 1):
        assert token.logprob == pytest.approx(logp[at, token.id].item(), abs=1e-4)
        best = sorted(range(V), key=lambda i: -logp[at, i].item())[:4]
        assert [i for i, _ in token.top] == best
        assert [p for _, p in token.top] == pytest.approx(logp[at, best].tolist(), abs=1e-4)


@both_ways
def test_truncate_goes_on_from_the_newer_half_each_time_the_context_is_full(tiny_model, complete):
    cfg = dataclasses.replace(GREEDY, max_new_tokens=100, truncate="left")
    prompt = prompts_of(50)[0]
    ids, kept = list(prompt), list(prompt)
    for _ in range(100):
        if len(kept) == 65:  # 64 positions are full: the newest id is to be read behind the 32 before it
            kept = kept[-33:]
        ids += argmax_loop(tiny_model, kept, 1)
        kept = kept + ids[-1:]
    assert alone(tiny_model, prompt, cfg, complete=complete) == ids[50:]
    longer = prompts_of(200)[0]
    assert alone(tiny_model, longer, cfg, complete=complete) == alone(tiny_model, longer[-32:], cfg)
    few = dataclasses.replace(cfg, max_new_tokens=10)
    assert alone(tiny_model, longer, few, complete=complete) == alone(tiny_model, longer[-54:], few)


@pytest.mark.heavy
def test_a_compiled_step_says_the_same(tiny_model):
    prompts, cfg = prompts_of(9, 1, 4), SamplingConfig(max_new_tokens=8, temperature=1.0)
    got = [t.added for (t,) in continued(tiny_model, prompts, cfg, set(), rows=3, compiled=True)]
    assert got == complete_together(tiny_model, prompts, cfg, set())


# Against transformers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same small model here and there, end of text 3; logits are spread widely, so that no two are nearly equal."""
    import transformers
    from conftest import lively

    config = ModelConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    ours = lively(config, seed=1)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=52,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            tie_word_embeddings=True,
            eos_token_id=3,
        )
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval()


def their_way(theirs, prompt, **options):
    ids = torch.tensor([prompt])
    out = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=0, do_sample=False, max_new_tokens=20, **options
    )
    return [row[len(prompt) :] for row in out.tolist()]


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=["greedy", "penalty"])
@both_ways
def test_greedy_texts_are_those_of_transformers_on_200_prompts(pair, options, complete):
    ours, theirs = pair
    prompts = [prompts_of(1 + k % 30, seed=k)[0] for k in range(200)]
    got = complete(ours, prompts, SamplingConfig(max_new_tokens=20, temperature=0, **options), {3})
    ended = 0
    for prompt, new in zip(prompts, got):
        expected = their_way(theirs, prompt, **options)[0]
        ended += 3 in expected
        assert new == expected[: expected.index(3) if 3 in expected else None]
    assert ended > 10


@pytest.mark.heavy
@pytest.mark.parametrize("beams, penalty, repetition", [(2, 1.0, 1.0), (4, 0.0, 1.0), (3, 2.0, 1.0), (4, 1.0, 1.2)])
def test_beams_are_those_of_transformers_on_200_prompts(pair, beams, penalty, repetition):
    ours, theirs = pair
    cfg = SamplingConfig(max_new_tokens=20, repetition_penalty=repetition)
    ended = 0
    for k in range(200):
        prompt = prompts_of(1 + k % 30, seed=k)[0]
        expected = their_way(
            theirs,
            prompt,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=penalty,
            repetition_penalty=repetition,
        )
        expected = [row[: row.index(3) if 3 in row else None] for row in expected]
        ended += any(len(row) < 20 for row in expected)
        assert [ids for ids, _ in beam_search(ours, prompt, cfg, {3}, beams, penalty)] == expected
    assert ended > 20


@pytest.mark.parametrize("penalty", [0.0, 1.0, 1.7])
def test_a_beams_score_is_the_re_scored_log_probability_over_its_length(tiny_model, penalty):
    prompt = prompts_of(5)[0]
    for ids, score in beam_search(tiny_model, prompt, GREEDY, {3}, 4, penalty):
        whole = prompt + ids + [3] * (len(ids) < 12)
        with torch.no_grad():
            logp = tiny_model(torch.tensor([whole]))[0].log_softmax(dim=-1)
        total = sum(logp[at, whole[at + 1]].item() for at in range(len(prompt) - 1, len(whole) - 1))
        assert score == pytest.approx(total / (len(whole) - len(prompt)) ** penalty, abs=1e-4)


def test_one_beam_is_greedy(tiny_model):
    for prompt in prompts_of(1, 6, 20, 60):
        ((ids, _),) = beam_search(tiny_model, prompt, GREEDY, {3}, 1)
        assert ids == alone(tiny_model, prompt, GREEDY, {3})
