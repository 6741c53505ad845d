"""The page of what each token cost: its figures are those that ran, and a real browser draws them."""
import html
import json
import re
import shutil
import subprocess
from functools import partial

import pytest
import torch
from arms import ARMS, TINY, build, tokens
from conftest import Job, one_sentence, words

import sparse_kernels as kernels
from data import tokenizer
from decode import sampling
from viz import tracing

BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
LETTERS = tokenizer.CharTokenizer([chr(0xAC00 + i) for i in range(TINY["vocab_size"])])


def recorded(arm, samples=2, new=9, policy=False, **settings):
    """A Recorder behind some samples of an arm's tiny model, and the multiply-adds of all that ran."""
    model = build(arm, std=0.2).use_policy(policy)
    recorder = tracing.Recorder(model, sampling.Sampler(**{"temperature": 0, **settings}))
    said = []
    for sample in range(samples):
        text = tokenizer.StreamDecoder(LETTERS)
        pieces = recorder.stream(partial(sampling.stream, model), tokens(1, 4, sample), new, "prompt", text)
        said.append("".join(pieces))
    return recorder, said


@pytest.mark.parametrize("name", ARMS)
def test_a_trace_changes_nothing_and_holds_every_token(name):
    recorder, said = recorded(ARMS[name])
    plain = build(ARMS[name], std=0.2)
    for sample, text in zip(range(2), said):
        ids = plain.generate(tokens(1, 4, sample), 9, temperature=0)[0, 4:].tolist()
        assert text == LETTERS.decode(ids)
        assert [token["id"] for token in recorder.samples[sample]["tokens"]] == ids
    layers = recorder.model.transformer.h
    assert kernels.tally is None and not any(block.mlp._forward_hooks for block in layers)
    first, *others = recorder.samples[0]["tokens"]
    assert first["macs"] is None and all(len(token["macs"]) == len(layers) for token in others)


def test_surprise_is_of_the_models_own_probabilities():
    recorder, _ = recorded({}, temperature=0.7, top_k=5)
    model = build({}, std=0.2)
    for sample, found in enumerate(recorder.samples):
        ids = torch.tensor([tokens(1, 4, sample)[0].tolist() + [token["id"] for token in found["tokens"]]])
        chances = model(ids[:, :-1], ids[:, 1:])[0][0, 3:].log_softmax(-1)
        bits = -chances.gather(1, ids[0, 4:, None])[:, 0] / tracing.LN2
        assert torch.allclose(torch.tensor([token["bits"] for token in found["tokens"]]), bits, atol=2e-3)
        likely = chances.exp().topk(5).values[2].tolist()
        assert [p for _, p in found["tokens"][2]["likely"]] == pytest.approx(likely, abs=1e-4)


def test_the_work_of_a_dense_block_is_all_of_it_and_of_a_sparse_one_what_ran():
    recorder, _ = recorded({})
    dense = tracing.dense_macs(recorder.model.config)
    assert all(macs == dense for token in recorder.samples[0]["tokens"][1:] for macs in token["macs"])
    assert tracing.totals(recorder.samples, recorder.model.config)["share"] == 1
    columns, _ = recorded(ARMS["columns"])
    config = columns.model.config
    units = config.units() * config.columns_active // config.columns
    gate = config.columns * 16 + config.columns**2            # the router, and who inhibits whom
    some = 4 * 16 * 16 + gate + 2 * 16 * units
    for token in columns.samples[0]["tokens"][1:]:
        assert token["macs"] == [some] * 2
        assert all(len(groups) == 2 and groups == sorted(groups) for groups in token["groups"])


def test_a_token_whose_window_is_read_anew_has_no_work_of_its_own():
    recorder, _ = recorded({}, samples=1, new=15)                # 4 tokens of a prompt, block_size=16
    assert [token["macs"] is None for token in recorder.samples[0]["tokens"]] == [
        True, *[False] * 12, True, True]
    assert recorder.samples[0]["tokens"][-1]["layers"] is None


@pytest.mark.parametrize("name", ["exits", "ponder", "hierarchy"])
def test_layers_used_are_those_that_ran(name):
    policy = name == "exits"
    arm = ARMS[name] | (dict(exit_threshold=0.5) if policy else {})
    recorder, _ = recorded(arm, samples=1, new=12, policy=policy)
    steps = recorder.samples[0]["tokens"][1:]
    assert all(token["layers"] >= 1 for token in steps)
    assert len({token["layers"] for token in steps}) > 1 or name == "ponder"
    for token in steps:
        if name == "ponder":
            assert 2 <= token["layers"] <= 4                    # one of the two layers up to three times
        else:
            assert (token["layers"] == 3) == all(token["macs"])


def test_sampling_with_a_trace_writes_a_page(train):
    train(max_iters=4, columns=8, columns_active=2)
    keys = dict(out_dir=train.folder / "out", num_samples=2, max_new_tokens=9, device="cpu")
    plain = Job("sample.py", words(**keys), train.folder).wait()
    traced = Job("sample.py", words(**keys, trace="trace.html"), train.folder).wait()
    assert traced.status == 0 and traced.out == plain.out, traced.err
    page = (train.folder / "trace.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r"^const data = (.*);$", page, re.MULTILINE)[1])
    assert [len(sample["tokens"]) for sample in data["samples"]] == [9, 9] and data["group"] == "column"
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)      # it fetches nothing
    for bad in (dict(speculate=2), dict(compile=True)):
        one_sentence(Job("sample.py", words(**keys, trace="x.html", **bad), train.folder).wait(), "sample.py",
                     "trace=x.html")
    bad = Job("sample.py", words(**keys, trace="no/such/folder.html"), train.folder).wait()
    assert bad.status == 2 and "trace=no/such/folder.html cannot be written" in bad.err


def test_a_page_colours_by_the_work_where_it_varies_and_says_what_all_of_it_is():
    def sample(*work):
        steps = [{"macs": [macs, macs], "layers": layers} for macs, layers in work]
        return [{"tokens": [{"macs": None, "layers": None}, *steps]}]
    assert tracing.varying(sample((100, 2), (60, 2)), 200) == ["active share", "surprise"]
    assert tracing.varying(sample((100, 2), (99.5, 2)), 200) == ["surprise"]
    assert tracing.varying(sample((100, 2), (60, 1)), 200) == ["active share", "layers used", "surprise"]
    assert tracing.varying(sample(), 200) == ["surprise"]
    page = tracing.PAGE.read_text(encoding="utf-8")
    assert "by: data.vary[0]" in page and page.count("100 % is ${whole()}") == 2


# -------------------------------------------------- a browser ----------------------------------------------

ASKS = """
<pre id="answers"></pre>
<script>
const said = [], seen = [];
window.onerror = (...words) => seen.push(String(words[0]));
const spans = () => [...document.querySelectorAll(".token")];
const details = () => document.getElementById("details").textContent;
said.push({text: document.getElementById("text").textContent, spans: spans().length,
           colours: new Set(spans().map(s => s.style.background)).size, details: details(),
           cards: document.getElementById("totals").textContent});
spans()[3].dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
said.push({on: document.querySelector(".token.on").dataset.i, details: details()});
document.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
said.push({on: document.querySelector(".token.on").dataset.i});
for (const radio of document.querySelectorAll("input[name=by]")) {
  radio.click();
  said.push({by: radio.value, coloured: spans().filter(s => s.style.background).length,
             high: document.getElementById("high").textContent});
}
const heat = document.getElementById("heat"), pen = heat.getContext("2d");
const scale = heat.width / parseFloat(heat.style.width);
const at = (token, layer) => [...pen.getImageData((CELL.left + token * CELL.w + 4) * scale,
  (CELL.top + (data.layers - 1 - layer) * CELL.h + 6) * scale, 1, 1).data];
const layers = [...Array(data.layers).keys()];
said.push({cells: data.samples[0].tokens.map((_, i) => layers.map(layer => at(i, layer)))});
const sample = document.getElementById("sample");
sample.value = "1"; sample.dispatchEvent(new Event("change"));
said.push({second: document.getElementById("text").textContent});
document.getElementById("answers").textContent = JSON.stringify({said, seen});
</script>
</body>
"""


def browse(page, *flags):
    """Open a page in a headless browser whose network leads nowhere -> the DOM when its scripts have run."""
    done = subprocess.run([BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                           f"--user-data-dir={page.parent / 'profile'}", "--proxy-server=127.0.0.1:9",
                           "--virtual-time-budget=3000", *flags, page.as_uri()], capture_output=True,
                          text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(not BROWSER, reason="no chromium or chrome on the PATH")
def test_a_browser_draws_every_token_and_answers_the_mouse(tmp_path):
    recorder, said = recorded(ARMS["exits"] | dict(exit_threshold=0.5), policy=True)
    path = tmp_path / "trace.html"
    tracing.write(path, recorder, {"run": "a <b>run</b> & more"})
    asked = tmp_path / "asked.html"
    asked.write_text(path.read_text(encoding="utf-8").replace("</body>", ASKS), encoding="utf-8")
    dom = browse(asked, "--dump-dom")
    answers = json.loads(html.unescape(re.search(r'<pre id="answers">(.*?)</pre>', dom, re.DOTALL)[1]))
    first, hovered, moved, *colours, heat, second = answers["said"]
    assert answers["seen"] == []
    assert first["text"] == "prompt" + said[0] and first["spans"] == 9 and first["colours"] > 3
    assert "18tokens" in first["cards"] and "made while the prompt was read" in first["details"]
    token = recorder.samples[0]["tokens"][3]
    assert hovered["on"] == "3" and moved["on"] == "4"
    for part in (f"{token['bits']:.2f} bits", f"layers{token['layers']}"):
        assert part in hovered["details"]
    assert [c["by"] for c in colours] == ["surprise", "active share", "layers used"]
    assert [c["coloured"] for c in colours] == [9, 8, 8]
    for made, cells in zip(recorder.samples[0]["tokens"], heat["cells"]):
        for layer, (red, green, blue, _) in enumerate(cells):
            assert (red == green == blue) == (not (made["macs"] and made["macs"][layer])), layer
    assert second["second"] == "prompt" + said[1]
    shot = tmp_path / "shot.png"
    browse(path, f"--screenshot={shot}", "--window-size=1200,900")
    assert shot.stat().st_size > 20_000
