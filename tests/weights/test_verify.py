"""convert_hf.py --verify: every kind of difference is found and named."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import finermoe_jax as fm
from finermoe_jax.weights import lazy
from finermoe_jax.weights.convert import convert
from finermoe_jax.weights.safetensors_files import TensorFiles
from finermoe_jax.weights.verify import verify
from tests.support import GOLDEN, assert_refused, command

UNTIED, TIED = GOLDEN / "upcycle" / "dense_untied", GOLDEN / "upcycle" / "dense_tied"
MIXTURE = GOLDEN / "c_go4_concatproj"
MOE = fm.MoEConfig(4, 2, 2, 2, 1)


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory):
    """UNTIED as MOE, in both forms."""
    folder = tmp_path_factory.mktemp("upcycled")
    convert(str(UNTIED), folder / "orbax", "orbax", MOE, seed=1)
    convert(str(folder / "orbax"), folder / "hf", "hf", None, seed=0)
    return folder


@pytest.mark.slow
def test_whole_conversions(upcycled, tmp_path):
    reports = [verify(str(UNTIED), upcycled / name, None, MOE) for name in ("orbax", "hf")]
    for report in reports:
        # Of 2 layers: 2 norms, 4 matrices, 3 biases and the shared expert; and 3 at the top.
        assert (report.copied, report.slices, report.drawn) == (2 * 12 + 3, 2 * 32 * 3, 2 * 2)
        assert 0.015 < np.sqrt(report.squares / report.values) < 0.025
    assert reports[0].digest == reports[1].digest
    again = verify(str(upcycled / "orbax"), upcycled / "hf", "hf", None)
    assert (again.copied, again.slices, again.drawn) == (2 * 12 + 3 + 2 * 32 * 3 + 4, 0, 0)
    assert again.digest == reports[0].digest
    # The embedding of a tied source is the target's lm_head.
    for source, moe in ((TIED, MOE), (TIED, None), (MIXTURE, None)):
        target = tmp_path / f"{source.name}-{moe is None}"
        convert(str(source), target, "orbax", moe, seed=1)
        assert verify(str(source), target, "orbax", moe).digest != reports[0].digest
    convert(str(UNTIED), tmp_path / "narrow", "orbax", MOE, seed=1, dtype="bfloat16")
    assert verify(str(UNTIED), tmp_path / "narrow", "orbax", MOE, dtype="bfloat16").slices == 192
    with pytest.raises(fm.InputError, match=r"stores bfloat16, not float32 as .*: pass.*--dtype"):
        verify(str(UNTIED), tmp_path / "narrow", "orbax", MOE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.experts.0.gate_proj.weight",
        "model.layers.0.mlp.experts.31.up_proj.weight",  # of the last copy
        "model.layers.1.mlp.experts.4.down_proj.weight",  # of the second copy
        "model.layers.0.mlp.shared_expert.down_proj.weight",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.0.post_attention_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("most", [lazy.BLOCK_BYTES, 600])
def test_one_flipped_bit_is_named(upcycled, tmp_path, monkeypatch, name, most):
    monkeypatch.setattr(lazy, "BLOCK_BYTES", most)
    folder = shutil.copytree(upcycled / "hf", tmp_path / "flipped")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(np.uint32).flat[-1] ^= 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(fm.InputError) as error:
        verify(str(UNTIED), folder, None, MOE)
    assert "1 tensors differ" in str(error.value) and str(error.value).endswith(name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_was_drawn_must_be_finite(upcycled, tmp_path, value):
    folder = shutil.copytree(upcycled / "hf", tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate.weight"
    tensors[name][3, 4] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(fm.InputError, match=name):
        verify(str(UNTIED), folder, None, MOE)


def test_another_source_and_another_architecture(upcycled, tmp_path):
    other = shutil.copytree(UNTIED, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({k: v + 1 for k, v in tensors.items()}, other / "model.safetensors")
    with pytest.raises(
        fm.InputError, match=r"is not the conversion of .*other: 219 tensors differ"
    ):
        verify(str(other), upcycled / "orbax", "orbax", MOE)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    with pytest.raises(fm.InputError, match="another architecture") as error:
        verify(str(other), upcycled / "orbax", "orbax", MOE)
    assert "rope_theta" in str(error.value) and "500000.0" in str(error.value)
    for source in (MIXTURE, TIED.parent / "nowhere"):
        with pytest.raises(fm.InputError):
            verify(str(source), upcycled / "hf", None, MOE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "modeling_finer_moe.py",
        "configuration_finer_moe.py",
    ],
)
def test_an_export_that_nothing_could_load(upcycled, tmp_path, name):
    source = shutil.copytree(UNTIED, tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": 3}')
    convert(str(source), tmp_path / "orbax", "orbax", MOE, seed=1)
    convert(str(tmp_path / "orbax"), tmp_path / "hf", "hf", None, seed=1)
    verify(str(tmp_path / "orbax"), tmp_path / "hf", "hf", None)
    file = tmp_path / "hf" / name
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(fm.InputError, match=f"{name} is missing or not what"):
        verify(str(tmp_path / "orbax"), tmp_path / "hf", "hf", None)


def test_separate_routers_have_names_for_messages(tmp_path):
    moe = dataclasses.replace(MOE, separate_routers=True)
    convert(str(UNTIED), tmp_path / "out", "orbax", moe, seed=1)
    assert verify(str(UNTIED), tmp_path / "out", "orbax", moe, seed=1).drawn == 6


@pytest.mark.slow
def test_what_was_drawn_and_the_experts_are_those_asked_for(upcycled, tmp_path):
    target = upcycled / "orbax"
    assert verify(str(UNTIED), target, "orbax", MOE, seed=1).drawn == 4
    with pytest.raises(fm.InputError, match=r"4 tensors differ.*\n.*mlp\.gate\.weight"):
        verify(str(UNTIED), target, "orbax", MOE, seed=2)
    other = dataclasses.replace(MOE, active_per_group=2)
    with pytest.raises(fm.InputError, match=r"active_per_group: 1 there, 2 "):
        verify(str(UNTIED), target, "orbax", other, seed=1)
    with pytest.raises(fm.InputError, match="stores float32, not bfloat16"):
        verify(str(UNTIED), target, "orbax", MOE, dtype="bfloat16")
    start = fm.UpcycleConfig(drop_ratio=0.5, copy_noise=0.1)
    convert(str(UNTIED), tmp_path / "dropped", "orbax", MOE, upcycling=start, seed=1)
    report = verify(str(UNTIED), tmp_path / "dropped", "orbax", MOE, upcycling=start, seed=1)
    assert (report.recomputed, report.drawn) == (2 * 12 + 3 + 2 * 32 * 3, 4)


def test_dtypes_are_not_mixed_silently(upcycled, tmp_path):
    folder = shutil.copytree(UNTIED, tmp_path / "mixed")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(np.float16)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(fm.InputError, match=r"float16 and float32.*--dtype"):
        convert(str(folder), tmp_path / "out", "orbax", MOE, seed=1)
    convert(str(folder), tmp_path / "out", "orbax", None, seed=1, dtype="float32")
    report = verify(str(folder), tmp_path / "out", "orbax", None, dtype="float32")
    assert "after casting float16/float32 to float32" in str(report)


def test_a_target_of_another_kind_than_was_asked_for(upcycled, tmp_path):
    convert(str(UNTIED), tmp_path / "dense", "orbax", None, seed=1)
    convert(str(tmp_path / "dense"), tmp_path / "exported", "hf", MOE, seed=1)
    for target, to, moe in (
        ("dense", "orbax", MOE),
        ("dense", None, MOE),
        ("exported", None, MOE),
    ):
        with pytest.raises(fm.InputError, match=r"another architecture.*\n.*moe\."):
            verify(str(UNTIED), tmp_path / target, to, moe)
    assert verify(str(UNTIED), tmp_path / "dense", "orbax", None).copied == 27
    assert verify(str(tmp_path / "dense"), tmp_path / "exported", "hf", MOE).copied == 27
    for target, to, moe in (("orbax", "orbax", None), ("hf", None, None), ("hf", "hf", MOE)):
        with pytest.raises(fm.InputError, match=r"another architecture.*\n.*moe\."):
            verify(str(UNTIED), upcycled / target, to, moe)
    for target, to in (("orbax", "hf"), ("hf", "orbax")):
        with pytest.raises(fm.InputError, match=rf"--to={to} asks for .*: pass --to={target}"):
            verify(str(UNTIED), upcycled / target, to, MOE)
    # A mixture is imported as it is, but has to be the one that a config states.
    source, other = str(upcycled / "hf"), dataclasses.replace(MOE, active_per_group=2)
    assert verify(source, upcycled / "orbax", "orbax", other).copied == 223
    with pytest.raises(fm.InputError, match=r"already has experts.*\n.*active_per_group"):
        verify(source, upcycled / "orbax", "orbax", other, stated=True)


@pytest.mark.nightly
def test_the_command(upcycled, tmp_path):
    target = tmp_path / "hf"
    done = command(
        "convert", f"--source={upcycled / 'orbax'}", f"--target={target}", "--to=hf",
        "--verify",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "223 tensors equal the source's bit for bit" in done.stdout
    assert done.stdout.splitlines()[-1] == str(target)
    tensors = load_file(target / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, target / "model.safetensors")
    given = f"--source={upcycled / 'orbax'}"
    refused = command("convert", given, f"--target={target}", "--verify")
    assert_refused_at_the_end(refused, "1 tensors differ", "lm_head.weight")


def assert_refused_at_the_end(result, *words):
    """As assert_refused; the progress bar comes first."""
    result.stderr = result.stderr[result.stderr.index("error: ") :]
    assert_refused(result, *words)


@pytest.mark.nightly
@pytest.mark.parametrize("numbers", [(1, 2, 1, 2, 1), (4, 2, 2, 1, 2)])
def test_there_and_back_in_small_blocks(tmp_path, monkeypatch, numbers):
    """Blocks that cut tables, matrices and experts: the same bits as in large ones."""
    moe = fm.MoEConfig(*numbers)
    convert(str(UNTIED), tmp_path / "large", "orbax", moe, seed=1)
    convert(str(tmp_path / "large"), tmp_path / "hf", "hf", None, seed=0)
    monkeypatch.setattr(lazy, "BLOCK_BYTES", 512)
    laid_out, tensor = [], TensorFiles.tensor

    def counted(files, name, index=()):
        if not index and ".experts." in name:
            laid_out.append(name)
        return tensor(files, name, index)

    monkeypatch.setattr(TensorFiles, "tensor", counted)
    convert(str(UNTIED), tmp_path / "small", "orbax", moe, seed=1)
    assert not laid_out
    convert(str(tmp_path / "hf"), tmp_path / "imported", "orbax", None, seed=0)
    digests = {
        verify(str(tmp_path / "hf"), tmp_path / name, "orbax", None).digest
        for name in ("large", "small", "imported")
    }
    assert len(digests) == 1
    # Three tensors of 2 layers' experts, for the import and for each verification.
    once = 4 * 3 * 2 * moe.num_experts
    assert once <= len(laid_out) <= 1.3 * once
    convert(str(tmp_path / "small"), tmp_path / "back", "hf", None, seed=0)
    for path in (tmp_path / "hf").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moe", "start", "name", "factor"),
    [
        (dataclasses.replace(MOE, shared_expert_intermediate_size=0), fm.UpcycleConfig(),
         "mlp.down_proj", 4),
        (MOE, fm.UpcycleConfig(function_preserving=True), "mlp.down_proj", 2),
    ],
)  # fmt: skip
def test_a_product_that_does_not_fit_the_dtype_is_refused(tmp_path, moe, start, name, factor):
    folder = shutil.copytree(UNTIED, tmp_path / "narrow")
    tensors = {n: t.astype(np.float16) for n, t in load_file(folder / "model.safetensors").items()}
    tensors[f"model.layers.1.{name}.weight"][3, 5] = 40000
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(fm.InputError, match=rf"multiplied by {factor} and hold 4.*largest float16"):
        convert(str(folder), tmp_path / "out", "orbax", moe, upcycling=start, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["narrow"]
    convert(str(folder), tmp_path / "out", "orbax", moe, upcycling=start, seed=1, dtype="float32")
    verify(str(folder), tmp_path / "out", "orbax", moe, upcycling=start, seed=1, dtype="float32")
