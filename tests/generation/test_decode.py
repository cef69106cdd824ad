"""Generation: what two compiled programs make is what the whole model says, however it is asked."""

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import finermoe_jax as fm
from finermoe_jax.config.run import MeshConfig
from finermoe_jax.data.tokenizers import end_tokens, open_tokenizer
from finermoe_jax.generation import decode as generation
from finermoe_jax.generation import text as completion
from finermoe_jax.generation.sampling import Sampling, choose
from finermoe_jax.generation.text import continue_all, conversation, stream_text
from finermoe_jax.layers import cpu, sharding
from finermoe_jax.layers.kv_cache import init_cache
from finermoe_jax.layers.sharding import make_mesh
from finermoe_jax.layers.stored import LayerView
from finermoe_jax.model.decoder import Decoder, with_params
from finermoe_jax.model.quantize import int8_weights
from finermoe_jax.runtime.files import find
from tests.support import command
from tests.support.models import run
from tests.support.training import MOE

# A repeated pattern of dense and MoE layers, several experts per slot, and everything else.
CONFIG = dataclasses.replace(
    MOE,
    initializer_range=0.3,
    num_hidden_layers=4,
    moe=fm.MoEConfig(8, 2, 1, 2, 2, concat_proj="routed", decoder_sparse_step=2),
)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(1))


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(find("finermoe_jax/demo/model"), 10**6)


def prompts(lengths, vocab=CONFIG.vocab_size):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


def batch(rows, left):
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(-len(row), None) if left else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def check_greedy(model, prompt, made):
    """Every new token is the most likely one after the whole sequence before it."""
    whole = np.zeros((1, 24), np.int32)
    whole[0, : len(prompt) + len(made)] = [*prompt, *made]
    best = np.asarray(run(model, whole).logits)[0].argmax(-1)
    np.testing.assert_array_equal(best[len(prompt) - 1 :][: len(made)], made)


@pytest.mark.nightly
def test_greedy_tokens_are_those_of_whole_sequences(model):
    rows = prompts([3, 11, 1, 7])
    new = []
    for left in (True, False):
        ids, mask = batch(rows, left)
        made = np.asarray(fm.generate(model, ids, mask, max_new_tokens=8))
        np.testing.assert_array_equal(made[:, : ids.shape[1]], ids)
        new.append(made[:, ids.shape[1] :])
    np.testing.assert_array_equal(*new)
    for row, tokens in zip(rows, new[0], strict=True):
        check_greedy(model, row, tokens)
    alone = np.asarray(fm.generate(model, [rows[1]], max_new_tokens=8))[0, 11:]
    np.testing.assert_array_equal(alone, new[0][1])


@pytest.mark.nightly
def test_stored_in_bfloat16(model):
    # Decoding multiplies in float32, as whole sequences do here: the weights are what is rounded.
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.to_pure_dict(nnx.state(model)))
    rounded = with_params(CONFIG, params, dtype="float32")
    row = prompts([9])[0]
    made = np.asarray(fm.generate(rounded, [row], max_new_tokens=8))[0, 9:]
    check_greedy(rounded, row, made)


@pytest.mark.nightly
def test_lengths_of_a_bucket_and_settings_share_two_programs(model):
    def stream(length, new, **settings):
        list(generation.stream(model, [prompts([length])[0]], None, new, Sampling(**settings)))

    stream(40, 5)
    compiled = [f._cache_size() for f in (generation.prefill, generation.decode)]
    stream(33, 9)
    stream(47, 2, temperature=0.7, top_k=5, seed=3)
    stream(41, 12, temperature=1.3, top_p=0.6, repetition_penalty=1.2)
    assert [f._cache_size() for f in (generation.prefill, generation.decode)] == compiled
    sizes = [generation.bucket(n) for n in (1, 32, 33, 48, 49, 64, 65, 96, 97, 1000)]
    assert sizes == [32, 32, 48, 48, 64, 64, 96, 96, 128, 1024]


@pytest.mark.nightly
def test_the_cache_is_written_in_place(model):
    graphdef, state = nnx.split(model)
    cache = generation.init_cache(CONFIG, 1, 48, model.dtype)
    arguments = np.zeros((1, 32), np.int32), np.array([5], np.int32), cache, Sampling().scalars()
    token, running = generation.prefill(graphdef, state, *arguments)
    keys = running.cache.layers[0][0].keys
    assert cache.layers[0][0].keys.is_deleted()
    place = keys.unsafe_buffer_pointer()
    _, after = generation.decode(graphdef, state, token, running, Sampling().scalars())
    assert keys.is_deleted() and after.cache.layers[0][0].keys.unsafe_buffer_pointer() == place


def test_layers_apart_lie_in_the_memory_of_their_stack():
    stack = jnp.arange(3 * 16 * 32, dtype=jnp.float32).reshape(3, 16, 32)
    layers = cpu.separate_layers(stack).layers
    start = stack.unsafe_buffer_pointer()
    assert [w.unsafe_buffer_pointer() - start for w in layers] == [0, 2048, 4096]
    # Rows of 12 bytes cannot: they are copied.
    odd = jnp.arange(9, dtype=jnp.float32).reshape(3, 3)
    np.testing.assert_array_equal(np.stack(cpu.separate_layers(odd).layers), odd)


@pytest.mark.nightly
def test_only_active_experts_are_read(model):
    """Whatever an expert holds that no token chose, NaN included, it reaches nothing."""
    row = prompts([4])[0]
    made = fm.generate(model, [row], max_new_tokens=6)
    params = jax.tree.map(lambda x: x, nnx.to_pure_dict(nnx.state(model)))
    used = [np.unique(routing.experts) for routing in run(model, made).routing]
    assert all(len(experts) < CONFIG.moe.num_experts for experts in used)
    moe = params["runs"][0][1]["moe"]
    for name in ("gate_up", "down"):
        poisoned = np.full(moe[name].shape, np.nan, np.float32)
        for layer, experts in enumerate(used):
            poisoned[layer, experts] = moe[name][layer, experts]
        moe[name] = jnp.asarray(poisoned)
    again = fm.generate(with_params(CONFIG, params, dtype="float32"), [row], max_new_tokens=6)
    np.testing.assert_array_equal(again, made)


@pytest.mark.slow
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows(monkeypatch, native, dtype, rows):
    jax.clear_caches()  # traces of another case
    monkeypatch.setattr(cpu, "_multiplies_bfloat16", lambda: native)
    monkeypatch.setattr(cpu, "_BLOCK_BYTES", 4096)
    monkeypatch.setattr(cpu, "_SUMS_BYTES", 4096)
    rng = np.random.default_rng(0)
    for outputs, width in ((5, 3), (70, 77), (33, 160)):
        stack = jnp.asarray(rng.integers(-99, 99, (3, outputs, width)), dtype)
        x = jnp.asarray(rng.standard_normal((rows, width)), jnp.float32)
        wanted = np.asarray(x, np.float64) @ np.asarray(stack[1], np.float64).T
        for weight in (stack[1], LayerView(stack, jnp.int32(1))):
            got = (
                jax.jit(cpu.few_rows)(x, weight) if weight is stack[1] else cpu.few_rows(x, weight)
            )
            np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=99 * width * 2e-5)


@pytest.mark.slow
def test_a_layer_written_out_stays_short():
    """The compiler's memory grows with the square of the length. Layers share their products."""

    def lines(layers, **changes):
        config = dataclasses.replace(
            MOE, hidden_size=512, intermediate_size=2048, num_hidden_layers=layers, **changes
        )
        model = Decoder(config, dtype="float32", param_dtype="bfloat16", rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(model)
        state = generation.layers_apart(state)
        running = generation._Running(
            init_cache(config, 1, 32, model.dtype),
            jnp.zeros((1, config.vocab_size), bool),
            jnp.int32(0),
        )
        arguments = jnp.zeros(1, jnp.int32), running, Sampling().scalars()
        return generation.decode.lower(graphdef, state, *arguments).as_text().count("\n")

    two = lines(2)
    assert two < 2800 and lines(4) - two < 1200


@pytest.mark.nightly
def test_int8(model):
    small = int8_weights(model)
    row = prompts([9])[0]
    made = np.asarray(fm.generate(small, [row], max_new_tokens=8))[0, 9:]
    check_greedy(small, row, made)
    exact, rounded = run(model, np.array([row])).logits, run(small, np.array([row])).logits
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.1
    # What every matrix became is off by half a step at most.
    weight = model.runs[0][1].moe.down[...]
    values = small.runs[0][1].moe.down.get_value()
    step = np.abs(weight).max(axis=-2, keepdims=True) / 127
    back = values.values.astype(jnp.float32) * values.scale[..., None, :]
    assert (np.abs(back - weight) <= step * 0.501).all()


# --- sampling -----------------------------------------------------------------------------------


def draws(logits, count=2000, **settings):
    rows = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (count, 1))
    seen = jnp.zeros(rows.shape, bool)
    return np.asarray(choose(rows, Sampling(**settings).scalars(), seen, jnp.int32(0)))


@pytest.mark.slow
def test_sampling_frequencies():
    logits = np.log([0.3, 0.5, 0.15, 0.05])
    for settings, wanted in (
        (dict(temperature=1.0), [0.3, 0.5, 0.15, 0.05]),
        (dict(temperature=0.5), [0.247, 0.685, 0.062, 0.007]),
        (dict(temperature=1.0, top_k=2), [0.375, 0.625, 0, 0]),
        (dict(temperature=1.0, top_p=0.75), [0.375, 0.625, 0, 0]),
        (dict(temperature=1.0, top_p=0.85), [0.316, 0.526, 0.158, 0]),
        (dict(temperature=1.0, top_k=3, top_p=0.5), [0, 1, 0, 0]),
        (dict(temperature=1.0, top_p=1e-46), [0, 1, 0, 0]),
        (dict(temperature=1e-38), [0, 1, 0, 0]),
        (dict(temperature=1e-44), [0, 1, 0, 0]),
        (dict(temperature=0.0, top_k=3), [0, 1, 0, 0]),
    ):
        got = np.bincount(draws(logits, **settings), minlength=4) / 2000
        np.testing.assert_allclose(got, wanted, atol=0.04, err_msg=str(settings))
        np.testing.assert_array_equal(got == 0, np.array(wanted) == 0, err_msg=str(settings))


def test_repetition_penalty():
    logits = jnp.asarray([[2.0, 1.5, -1.0, -1.1]])
    seen = jnp.asarray([[True, False, False, False]])
    token = choose(logits, Sampling(repetition_penalty=1.5).scalars(), seen, jnp.int32(0))
    assert token.tolist() == [1]  # 2 / 1.5 < 1.5
    logits, seen = jnp.asarray([[-1.0, -1.1]]), jnp.asarray([[True, False]])
    token = choose(logits, Sampling(repetition_penalty=1.5).scalars(), seen, jnp.int32(0))
    assert token.tolist() == [1]


@pytest.mark.slow
def test_padding_is_not_penalized(model):
    """A row has seen its prompt and the new token, and no padding, which is token 0."""
    row = [5, 9, 7]
    graphdef, state = nnx.split(model)
    padded = np.zeros((1, 32), np.int32)
    padded[0, :3] = row
    cache = init_cache(CONFIG, 1, 48, model.dtype)  # as generate makes it: one program
    token, running = generation.prefill(
        graphdef, state, padded, np.asarray([3], np.int32), cache, Sampling().scalars()
    )
    assert np.flatnonzero(np.asarray(running.seen)[0]).tolist() == sorted({*row, int(token[0])})


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite(model, value):
    graphdef, state = nnx.split(model)
    damaged = nnx.merge(graphdef, jax.tree.map(lambda x: x * value, state))
    for temperature in (0.0, 1.0):
        with pytest.raises(fm.InputError, match="not finite"):
            fm.generate(damaged, [prompts([3])[0]], max_new_tokens=3, temperature=temperature)
    one = jnp.asarray([[0.0, 2.0, 1.0], [0.0, value, 1.0]])  # of one row a single logit
    for settings in (Sampling(), Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=2)):
        tokens = choose(one, settings.scalars(), jnp.zeros(one.shape, bool), jnp.int32(0))
        assert tokens[0] >= 0 and tokens[1] == -1


@pytest.mark.nightly
def test_a_seed_repeats_and_rows_differ(model):
    ids = np.tile(prompts([5])[0], (4, 1))
    sampling = Sampling(temperature=2.0, seed=5)
    made = np.asarray(fm.generate(model, ids, max_new_tokens=12, sampling=sampling))
    np.testing.assert_array_equal(
        made, fm.generate(model, ids, max_new_tokens=12, temperature=2.0, seed=5)
    )
    assert len({tuple(row) for row in made.tolist()}) == 4
    other = fm.generate(model, ids, max_new_tokens=12, temperature=2.0, seed=6)
    assert (np.asarray(other) != made).any()
    # A penalty forbids, if large enough, whatever is there already.
    never = Sampling(repetition_penalty=1e9)
    new = np.asarray(fm.generate(model, ids[:1], max_new_tokens=12, sampling=never))[0]
    assert len(set(new[5:].tolist())) == 12 and not set(new[5:]) & set(ids[0])


@pytest.mark.parametrize(
    "settings",
    [dict(temperature=-1.0), dict(temperature=float("nan")), dict(temperature=float("inf")),
     dict(top_k=-2), dict(top_k=2**31), dict(top_p=0.0), dict(top_p=1.1),
     dict(repetition_penalty=0.0), dict(seed=-1)],
)  # fmt: skip
def test_settings_that_make_no_sense(model, settings):
    ((name, value),) = settings.items()
    with pytest.raises(fm.InputError, match=f"{name}={value}"):
        generation.stream(model, [[1]], None, 4, Sampling(**settings))


# --- text ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer(tokenizer):
    config = dataclasses.replace(CONFIG, vocab_size=len(tokenizer))
    return Decoder(config, dtype="float32", param_dtype="float32", rngs=nnx.Rngs(2))


@pytest.mark.nightly
def test_pieces_stop_strings_and_batches(writer, tokenizer):
    texts = ["Return the", "def main(argv):\n    return 0", "list of"]
    new = 16
    whole = [
        tokenizer.decode(np.asarray(fm.generate(writer, [ids], max_new_tokens=new))[0, len(ids) :])
        for ids in (tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts)
    ]
    assert ["".join(stream_text(writer, tokenizer, t, new, ends=[])) for t in texts] == whole
    assert (
        continue_all(writer, tokenizer, texts, max_new_tokens=new, ends=[], batch_size=2) == whole
    )
    # A stop string that spans tokens, and one that never comes.
    stop = ["\0never", whole[0][7:12]]
    cut = [words.partition(stop[1])[0] for words in whole]
    assert len(cut[0]) <= 7
    assert [
        "".join(stream_text(writer, tokenizer, t, new, stop=stop, ends=[])) for t in texts
    ] == cut
    settings = dict(max_new_tokens=new, stop=stop, ends=[], batch_size=2)
    assert continue_all(writer, tokenizer, texts, **settings) == cut
    # The tokens that end a text.
    ids = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    tokens = np.asarray(fm.generate(writer, [ids], max_new_tokens=new))[0, len(ids) :].tolist()
    cut = tokens.index(tokens[5])
    ended = "".join(stream_text(writer, tokenizer, texts[0], new, ends=[tokens[5]]))
    assert ended == tokenizer.decode(tokens[:cut])


def test_characters_of_several_tokens_come_whole(tokenizer):
    words = "naïve — 東京 🙂!"
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    text = completion._Text(
        tokenizer, tokenizer("→", add_special_tokens=False)["input_ids"], ["!?"], []
    )
    pieces = [text.add(i) for i in ids]
    assert len(ids) > len(words) and "\ufffd" not in "".join(pieces)
    assert pieces[-1] == "" and text.rest() == "!"  # it might have begun the stop string
    assert text.shown == words


@pytest.mark.parametrize(
    "words, stop, shown", [("結果\n問題は", "\n問題", "結果"), ("ok‹/答> more", "‹/答>", "ok")]
)
def test_stop_strings_of_characters_of_several_tokens(tokenizer, words, stop, shown):
    text = completion._Text(tokenizer, [5], [stop], [])
    pieces = [text.add(i) for i in tokenizer(words, add_special_tokens=False)["input_ids"]]
    assert "".join(pieces) == text.shown == shown and text.ended


def test_a_prompt_of_ids_may_end_inside_a_character(tokenizer):
    ids = tokenizer("a 問b", add_special_tokens=False)["input_ids"]
    cut = ids.index(tokenizer("b", add_special_tokens=False)["input_ids"][0]) - 1
    assert tokenizer.decode(ids[:cut]).endswith("\ufffd")
    text = completion._Text(tokenizer, ids[:cut], [], [])
    assert "".join(text.add(i) for i in ids[cut:]) == "問b"


def test_a_first_word_keeps_its_space():
    """As with the tokenizers of Llama 2 and Mistral, whose decoders strip a text's first space."""
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "▁The", "▁capital", "▁is", "▁Paris"])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")
    prompt = completion._encode(tokenizer, "The capital is")
    assert prompt == [1, 2, 3, 4] == completion._encode(tokenizer, "<s>The capital is")
    text = completion._Text(tokenizer, prompt, [], [])
    assert text.add(5) == " Paris" and text.rest() == ""


@pytest.mark.nightly
def test_on_a_mesh(model):
    """Experts, weights and rows spread over devices: the tokens of one device."""
    rows = prompts([3, 11, 1, 7])
    ids, mask = batch(rows, left=True)
    wanted = fm.generate(model, ids, mask, max_new_tokens=4)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, expert=2, tensor=2))
    params = nnx.to_pure_dict(nnx.state(model))
    shardings, _ = sharding.param_shardings(model, mesh)
    spread = with_params(CONFIG, jax.device_put(params, shardings), dtype="float32")
    spread.placement = sharding.Placement(mesh)
    np.testing.assert_array_equal(fm.generate(spread, ids, mask, max_new_tokens=4), wanted)
    with pytest.raises(fm.InputError, match="mesh of 8"):
        int8_weights(spread)


def test_conversations(tokenizer):
    with pytest.raises(fm.InputError, match="no chat template"):
        conversation(tokenizer, [{"role": "user", "content": "hi"}])
    import copy

    chatting = copy.copy(tokenizer)
    chatting.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    ids = conversation(chatting, said)
    assert tokenizer.decode(ids) == "<system>be brief\n<user>hi\n<assistant>"
    chatting.chat_template = "{{ raise_exception('only users') }}"
    with pytest.raises(fm.InputError, match="only users"):
        conversation(chatting, said)


@pytest.mark.nightly
def test_a_conversation_on_the_command_line(tmp_path, monkeypatch):
    """Two lines of stdin are two answers, each after all that was said before it."""
    folder = shutil.copytree(find("demo/model"), tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    )
    model, tokenizer = fm.load_hf(folder), fm.load_tokenizer(folder)
    said = [{"role": "system", "content": "be brief"}]
    ids = conversation(tokenizer, [*said, {"role": "user", "content": "Return the"}])
    made = np.asarray(fm.generate(model, [ids], max_new_tokens=8))[0, len(ids) :].tolist()
    # Of several tokens that end a text, the one that comes up: before the stop string would.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [made[6], 0]}))
    ends = end_tokens(folder, tokenizer, model.config.vocab_size)
    assert ends == {made[6], 0, tokenizer.eos_token_id}
    wanted, stop = [], tokenizer.decode(made[7:8])
    for line in ("Return the", "def"):
        said.append({"role": "user", "content": line})
        pieces = stream_text(
            model, tokenizer, conversation(tokenizer, said), 8, stop=[stop], ends=ends
        )
        wanted.append("".join(pieces))
        said.append({"role": "assistant", "content": wanted[-1]})
    assert wanted[0] == tokenizer.decode(made[: made.index(made[6])])
    flags = (f"--checkpoint={folder}", "--chat", f"--stop={stop}", "--max_new_tokens=8")
    monkeypatch.setattr("sys.stdin", io.StringIO("Return the\n\ndef\n"))
    done = command("generate", *flags, "--system=be brief")
    assert (done.returncode, done.stdout) == (0, "".join(f"{words}\n" for words in wanted))
    monkeypatch.setattr("sys.stdin", io.StringIO("Return the\n\ndef\n"))
    done = command("generate", *flags, f"--system={'be brief ' * 2000}")
    assert done.returncode == 2 and "prompt tokens" in done.stderr and not done.stdout


def test_prompts_that_cannot_be_continued(writer, tokenizer):
    for prompt, words in (
        ("", "empty"), ("a\udc80b", "UTF-8 at character 1"), ([10**7], "the vocabulary"),
    ):  # fmt: skip
        with pytest.raises(fm.InputError, match=words):
            stream_text(writer, tokenizer, prompt, 4)
        with pytest.raises(fm.InputError, match=words):
            continue_all(writer, tokenizer, ["fine", prompt], max_new_tokens=4)
    limit = writer.config.max_position_embeddings
    with pytest.raises(fm.InputError, match=f"{limit - 1} prompt tokens.*=2 .*{limit}"):
        stream_text(writer, tokenizer, [1] * (limit - 1), 2)
    with pytest.raises(fm.InputError, match="stop string is empty"):
        stream_text(writer, tokenizer, "fine", 2, stop=[""])
