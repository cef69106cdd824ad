"""Log-likelihoods against a plain forward pass; windows of a text."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from finermoe_jax.config.model import MoEConfig
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.errors import InputError
from finermoe_jax.evaluation import scoring
from finermoe_jax.evaluation.scoring import Continuation, score, windows
from finermoe_jax.layers import sharding
from finermoe_jax.layers.sharding import Placement
from finermoe_jax.model.decoder import Decoder
from tests.support import SMALL

DENSE = dataclasses.replace(SMALL, initializer_range=0.3, num_hidden_layers=2)
MOE = dataclasses.replace(DENSE, moe=MoEConfig(4, 2, 1, 2, 1))
LIMIT = SMALL.max_position_embeddings


def _model(config):
    return Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def moe():
    return _model(MOE)


def _requests():
    """Of all lengths, some beyond the limit; one question with several answers."""
    rng = np.random.default_rng(0)

    def tokens(count):
        return rng.integers(0, SMALL.vocab_size, count).tolist()

    question = tokens(20)
    lengths = [1, 2, 30, 31, 32, 33, 45, 62, 63, 64, 65, 90]
    return [
        *(Continuation(tokens(n), tokens(rng.integers(1, 12))) for n in lengths),
        *(Continuation(question, [answer]) for answer in range(SMALL.vocab_size)),
        *(Continuation(question, tokens(2)) for _ in range(3)),
        Continuation(tokens(3), tokens(LIMIT)),
    ]


def _plain(model, requests):
    """One forward pass over whole rows; causality keeps what pads them from being seen."""
    ids = np.full((len(requests), LIMIT), 7, np.int32)
    inputs = [[*context, *targets][-LIMIT - 1 : -1] for context, targets in requests]
    for row, tokens in zip(ids, inputs, strict=True):
        row[: len(tokens)] = tokens
    log_p = np.asarray(jax.nn.log_softmax(model(ids).logits), np.float64)
    found = []
    for row, tokens, (_, targets) in zip(log_p, inputs, requests, strict=True):
        scored = row[len(tokens) - len(targets) : len(tokens)]
        sums = scored[np.arange(len(targets)), targets].sum()
        found.append((sums, bool((scored.argmax(-1) == targets).all())))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("config", "batch_tokens"), [(MOE, 100), (MOE, 100_000), (DENSE, 1)])
def test_scores_equal_a_plain_forward_pass(config, batch_tokens):
    requests, model = _requests(), _model(config)
    found = score(model, requests, batch_tokens=batch_tokens)
    _same(found, _plain(model, requests))
    # Of the 64 answers to one question one is the likeliest, and they sum to 1.
    answers = found[-4 - SMALL.vocab_size : -4]
    assert sum(greedy for _, greedy in answers) == 1
    assert np.exp([log_p for log_p, _ in answers]).sum() == pytest.approx(1, abs=1e-5)


def _same(found, wanted):
    np.testing.assert_allclose([s for s, _ in found], [s for s, _ in wanted], atol=1e-4, rtol=0)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


@pytest.mark.slow
def test_order_changes_nothing_and_a_rerun_no_bit(moe):
    requests = _requests()
    once = score(moe, requests, batch_tokens=100_000)
    assert score(moe, requests, batch_tokens=100_000) == once
    order = np.random.default_rng(1).permutation(len(requests))
    shuffled = score(moe, [requests[i] for i in order], batch_tokens=100_000)
    _same(shuffled, [once[i] for i in order])
    assert score(moe, []) == []


@pytest.mark.slow
def test_a_mesh_scores_alike(moe):
    requests = _requests()
    alone = score(moe, requests, batch_tokens=100_000)
    mesh = sharding.make_mesh(MeshConfig(2, 1, 2, 2))
    shardings, _ = sharding.param_shardings(moe, mesh)
    graphdef, state = nnx.split(moe)
    nnx.replace_by_pure_dict(state, jax.device_put(nnx.to_pure_dict(state), shardings))
    spread = nnx.merge(graphdef, state)
    spread.placement = Placement(mesh)
    _same(score(spread, requests, batch_tokens=100_000), alone)


@pytest.mark.slow
def test_many_lengths_are_few_shapes(monkeypatch):
    shapes, real = [], scoring._hidden

    def listen(graphdef, state, ids, mask):
        shapes.append(ids.shape)
        assert mask.sum(axis=1).max() > 0
        return real(graphdef, state, ids, mask)

    monkeypatch.setattr(scoring, "_hidden", listen)
    requests = [Continuation([1] * (1 + n % 60), [2 + n % 50]) for n in range(300)]
    score(_model(DENSE), requests, batch_tokens=256)
    # The question asked twice is computed once; all batches but the last are full.
    assert len(set(shapes)) <= 4 and len(shapes) < 20
    assert {length for _, length in shapes} <= {32, 48, 64}
    assert sum(rows for rows, _ in shapes) < 64 + 8


@pytest.mark.parametrize(
    ("context", "targets", "words"),
    [([], [1], "context of 0"), ([1], [], "0 tokens"), ([1], [1] * 65, "65 tokens .* 64 tokens")],
)
def test_requests_that_cannot_be_scored(context, targets, words):
    with pytest.raises(InputError, match=words):
        score(_model(DENSE), [Continuation(context, targets)])


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 4), (8, 1), (5, 3), (50, 7)])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_windows_score_every_token_once(count, length, stride):
    tokens = list(range(count))
    parts = list(windows(tokens, 99, length, stride))
    assert [t for part in parts for t in part.targets] == tokens
    whole = [99, *tokens]
    for number, (context, targets) in enumerate(parts):
        end = targets[-1] + 1
        assert [*context, *targets] == whole[max(0, end - length) : end + 1]
        assert len(context) + len(targets) - 1 == min(length, end)
        if number:
            assert len(context) > length - stride and len(targets) <= stride
    assert list(windows([], 99, length, stride)) == []
