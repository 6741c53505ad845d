"""bench.py scaling: its bytes and ops are those of the decode engine at a small shape; its arithmetic."""
import json

import pytest
import torch
from conftest import Job, one_sentence, record_of

from benchmarks import scaling
from configurator import ConfigError
from decode import engine
from decode.context import Cache
from decode.quantized import quantize
from kernels import picked as laid
from kernels.build import cpu_library
from layers import settle
from model import GPT, GPTConfig

LAYERS, C, V, STEPS = 4, 256, 640, 8             # whole groups of every form of a row; two groups of four
BY_NAME = {v.name: v for v in scaling.VARIANTS}


@pytest.fixture(scope="module")
def programs():
    """{variant: the program of its model of a small shape, behind STEPS steps}."""
    found, ids = {}, torch.randint(V, (1, 17), generator=torch.Generator().manual_seed(0))
    for v in scaling.VARIANTS:
        config = GPTConfig(n_layer=LAYERS, n_head=4, n_embd=C, block_size=32, vocab_size=V, bias=False,
                           **scaling.flags_of(v, C) | (dict(window=8) if v.window else {}))
        model = GPT(config, seed=0).eval()
        if v.bits != (16, 16, 16):
            quantize(model, "int8" if v.bits == scaling.INT8 else "int4")
        settle(model.to(torch.bfloat16), pack=True).use_policy()
        for block in model.transformer.h:
            if v.mlp == "screen":
                block.mlp.edge.fill_(0.5)
        cache = Cache(model, 1, 16, model.chosen(1)._replace(threads=1))
        program = engine.program_of(model, cache, V, 1, torch.device("cpu"))
        assert program, program
        program.begin(ids, [0], [1])
        for _ in range(STEPS):
            program.step()
        found[v.name] = program
    yield found


def ran(program, part, code="", field="runs"):
    """Of the ops of a part of the model: that number of each, a step, in their order."""
    return [getattr(op, field) / STEPS for op, name in zip(program.table, program.names)
            if name.startswith(code) and name.partition(" ")[2] == part]


@pytest.mark.skipif(cpu_library()[0] is None, reason="no C kernels here")
@pytest.mark.parametrize("name", BY_NAME)
def test_bytes_on_paper_are_those_that_the_engine_counts(programs, name):
    v, program = BY_NAME[name], programs[name]
    if v.two_of_four and v.bits[0] == 8 and not laid.wanted(torch.device("cpu")):
        pytest.skip("this processor reads 2:4 weights of 8 bits as dense ones")
    done = {part: size / STEPS for part, (_, size) in program.done().items()}
    middle = 0.25 if v.hierarchy > 1 else 1
    for layer, often in enumerate((1, middle, middle, 1)):
        [down] = ran(program, f"layer {layer} MLP", "rows_sum", "read") if v.mlp != "gelu" else [4 * C]
        picked = [n for n in ran(program, f"layer {layer} MLP", "linear", "read") if n]
        up = picked[-1] if picked and v.mlp in ("screen", "predict", "columns") else 4 * C * often
        assert done[f"layer {layer} attention"] == often * scaling.attention_bytes(v, C)
        assert done[f"layer {layer} MLP"] == pytest.approx(
            often * scaling.mlp_bytes(v, C, up / often, down / often), abs=1)
        assert 0 < down <= up or scaling.own_copy(v)
    head = scaling.head_bytes(v, C, V)
    few = ran(program, "head", "screened", "read") if v.screened_head and v.bits[2] == 16 else [0]
    assert done["head"] == pytest.approx(head + 2 * C * few[0], abs=1)


@pytest.mark.skipif(cpu_library()[0] is None, reason="no C kernels here")
@pytest.mark.parametrize("name", BY_NAME)
def test_ops_on_paper_are_those_of_the_engine(programs, name):
    v, program = BY_NAME[name], programs[name]
    cfg = scaling.Scaling()
    counted = sum(op.runs for op in program.table) / STEPS
    assert scaling.costs(v, LAYERS, C, cfg)["ops"] == counted


def test_rows_on_paper_are_those_that_a_variant_picks(programs):
    for name in ("predict + 2:4 + window 128, bf16", "columns + 2:4 + hierarchy 4, bf16"):
        v = BY_NAME[name]
        up, down = scaling.rows_read(v, 4 * C, 0.18, 0.15)
        assert [n for n in ran(programs[name], "layer 0 MLP", "linear", "read") if n][-1] == up
        assert ran(programs[name], "layer 0 MLP", "rows_sum", "read")[0] <= 1.5 * down
    assert scaling.rows_read(BY_NAME["screened units, int8"], 1000, 0.18, 0.15) == (150, 150)
    assert scaling.rows_read(BY_NAME["screened units, int4"], 1000, 0.18, 0.15) == (1000, 150)
    assert scaling.rows_read(BY_NAME["dense, squared ReLU, int8"], 1000, 0.18, 0.15) == (1000, 180)


def test_keys_and_values_are_of_the_columns_that_a_step_sees():
    """By hand: 4 layers of width 10 in 16 bits, 100 tokens; windows of 20 in three of four."""
    plain, windows = BY_NAME["dense, GELU, bf16"], BY_NAME["efficient, int8"]._replace(window=20)
    assert scaling.kv_bytes(plain, 4, 10, 100) == 4 * 10 * 400
    assert scaling.kv_bytes(windows, 4, 10, 100) == 4 * 10 * (3 * 20 + 100)
    assert scaling.kv_bytes(windows, 4, 10, 8) == 4 * 10 * 32
    assert scaling.kv_bytes(BY_NAME["hierarchy 4, int8"], 4, 10, 100) == 4 * 10 * (200 + 200 / 16)


def test_bytes_at_gpt2s_shape_are_those_of_the_record():
    """Of what reads no units by chance: results/decode_gpt2_cpu.json, whose blocks have random weights."""
    work = json.loads(scaling.RECORD.read_text())["work"]
    for side, name in (("ours", "dense, GELU, bf16"), ("ours, int8", "dense, GELU, int8"),
                       ("ours, int4", "dense, GELU, int4")):
        found = scaling.costs(BY_NAME[name], *scaling.SHAPES["124M"], scaling.Scaling())
        assert found["weight_bytes"] == pytest.approx(work[side]["weight_bytes"], rel=1e-9), side


def test_the_time_of_a_step_is_its_bytes_by_the_bandwidth_and_a_cards_ops(capsys):
    cfg = scaling.Scaling(shapes="124M", bandwidth=10.0, launch=2.0)
    found = scaling.scaling(cfg)
    for point in found["points"].values():
        size = point["weight_bytes"] + point["kv_bytes"]
        assert point["seconds"]["this CPU"] == pytest.approx(size / 10e9)
        assert point["seconds"]["H100"] == pytest.approx(size / 3.35e12 + 2e-6 * point["ops"])
    plain, dense, screened = (found["points"][f"124M: {name}, int8"] for name in (
        "dense, GELU", "dense, squared ReLU", "screened units"))
    assert plain["beside"] == "dense, GELU, bf16" and dense["beside"] == "dense, squared ReLU, bf16"
    assert screened["beside"] == "dense, squared ReLU, int8"   # GELU's bytes are not the block's merit
    assert screened["share"] == screened["weight_bytes"] / dense["weight_bytes"] < 1
    assert 0 < screened["may_lose"] < 0.2 and "arithmetic, not a measurement" in capsys.readouterr().out


def test_what_a_variant_may_lose_is_what_a_smaller_dense_model_loses():
    """The fit's own numbers: a model of 1e9 parameters has 406.4 / 1e9**0.34 nats above what no size can."""
    assert scaling.may_lose(1e9, 1.0) == 0
    assert scaling.may_lose(1e9, 0.5) == pytest.approx(406.4 / 5e8**0.34 - 406.4 / 1e9**0.34)
    assert scaling.may_lose(1e8, 0.5) > scaling.may_lose(1e10, 0.5) > 0
    assert scaling.parameters(12, 768) == 12 * 12 * 768**2 + 50304 * 768


@pytest.mark.parametrize("argv, parts", [
    (["--shapes=8B"], ["shapes='8B'", "124M, 350M, 1.5B, 7B"]),
    (["--live=0"], ["live=0.0 must be in (0, 1]"]),
    (["--share=1.5"], ["share=1.5 must be in (0, 1]"]),
    (["--context=0"], ["context=0 must be at least 1"]),
    (["--bandwidth=-1"], ["bandwidth=-1.0 must be 0 or more"]),
])
def test_mistakes_are_one_sentence(tmp_path, argv, parts):
    one_sentence(Job("bench.py", ["scaling", *argv], tmp_path).wait(), "bench.py", *parts)


def test_the_command_writes_a_record(tmp_path):
    record = record_of(Job("bench.py", ["scaling", "--shapes=7B", "--out=s.json"], tmp_path).wait())
    assert record["subcommand"] == "scaling" and {*record["points"]} == {f"7B: {name}" for name in BY_NAME}
    assert record["assumed"]["live"] == 0.18 and record["bandwidths"]["H100"] == 3350


def test_a_record_that_is_gone_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "RECORD", tmp_path / "gone.json")
    with pytest.raises(ConfigError, match=r"gone\.json is not here: type --bandwidth="):
        scaling.bandwidths(scaling.Scaling())
