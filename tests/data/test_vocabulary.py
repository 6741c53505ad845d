"""Byte pairs of our own: any text survives, an extension leaves English alone, no two tokenizers mix."""
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import Job, Trainer, one_sentence, words
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import script

from configurator import ConfigError
from data import dataset, tokenizer, vocabulary
from data.tokenizer import END_OF_TEXT, GPT2Tokenizer, StreamDecoder, from_meta, load, merge, name_of
from model import GPT, GPTConfig
from training import pretrained

pytestmark = pytest.mark.usefixtures("no_network")
ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
KOREAN = "모든 국민은 인간으로서의 존엄과 가치를 가지며, 행복을 추구할 권리를 가진다. API를 통한다.\n" * 3
ENGLISH = "All citizens are assured of human worth and dignity, and have the right to pursue happiness.\n" * 3
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
SAMPLES = ["한국어 문장", "\u1112\u1161\u11ab", "ㄱㄴㄷ", FAMILY, "a\0b", END_OF_TEXT, " \n\n\t x", "API를",
           "“quoted”", "é", "한", " 국", "①②", "\uac00\ud7a3", "ꀀ"]
TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(SAMPLES))).map("".join)
PLAIN = st.text(st.characters(exclude_categories=("Cs",)).filter(lambda c: not 0xA000 <= ord(c) < 0xE000))


LEARNED_FROM = KOREAN + ENGLISH + (ROOT / "train.py").read_text(encoding="utf-8")


def learned(vocab_size, **keys):
    return vocabulary.learn(vocabulary.count_words([LEARNED_FROM]), vocab_size, **keys)


SMALL = learned(500)
GROWN = vocabulary.extend(SMALL, vocabulary.count_words([KOREAN]), 700, ["<|korean|>"], ["훈", " 훈"])


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not in {SHARED}")
    return SHARED / name


@pytest.fixture(scope="module")
def gpt2():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCORTEX_GPT2_BPE", str(shared("gpt2_bpe")))
        made = GPT2Tokenizer()
        assert made.bpe.n_vocab == 50257
        return made


@pytest.fixture(scope="module")
def extended(gpt2):
    korean = dataset.whole_words(dataset.text_pieces(shared("korean_manual.txt")))
    return vocabulary.extend(gpt2, vocabulary.count_words(korean), 65536, seeds=vocabulary.korean_letters())


def assert_survives(made, text):
    ids = made.encode(text)
    assert made.decode(ids) == text and all(0 <= i < made.vocab_size for i in ids)
    decoder = StreamDecoder(made)
    pieces = [decoder.feed(i) for i in ids] + [decoder.flush()]
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("made", [SMALL, GROWN], ids=["new", "extended"])
@settings(max_examples=500, deadline=None)
@given(text=TEXT)
def test_any_text_survives_whole_and_streamed(made, text):
    assert_survives(made, text)


@settings(max_examples=500, deadline=None)
@given(text=TEXT)
def test_any_text_survives_extended_gpt2_whole_and_streamed(extended, text):
    assert_survives(extended, text)


@settings(max_examples=500, deadline=None)
@given(text=PLAIN)
def test_text_without_hangul_is_encoded_as_before_the_extension(text):
    assert GROWN.encode(text) == SMALL.encode(text)


@settings(max_examples=500, deadline=None)
@given(text=PLAIN)
def test_text_without_hangul_is_encoded_as_by_gpt2(extended, gpt2, text):
    assert extended.encode(text) == gpt2.encode(text)


def test_extended_gpt2_reads_korean_in_a_third_and_english_as_before(extended, gpt2):
    texts = {name: shared(name).read_text(encoding="utf-8")
             for name in ("korean_constitution.txt", "tinyshakespeare.txt")}
    assert extended.encode(texts["tinyshakespeare.txt"]) == gpt2.encode(texts["tinyshakespeare.txt"])
    korean = texts["korean_constitution.txt"]
    assert len(extended.encode(korean)) / len(korean) <= 0.72
    assert [extended.token_bytes(i) for i in range(50257)] == [gpt2.token_bytes(i) for i in range(50257)]
    assert extended.encode(END_OF_TEXT, allow_special=True) == [50256] and extended.end_of_text == 50256


def test_a_new_vocabulary_of_32k_reads_korean_at_068(capsys):
    pieces = [dataset.whole_words(dataset.text_pieces(shared(name)))
              for name in ("korean_manual.txt", "english_manual.txt")]
    seeds = vocabulary.korean_letters() + vocabulary.korean_symbols()
    words_seen = sum(map(vocabulary.count_words, pieces), start=vocabulary.Counter())
    made = vocabulary.learn(words_seen, 32768, seeds=seeds)
    korean = shared("korean_constitution.txt").read_text(encoding="utf-8")
    assert made.vocab_size <= 32768 and len(made.encode(korean)) / len(korean) <= 0.68


@pytest.mark.parametrize("size", [257, 500, 1000])
def test_small_vocabularies_have_the_size_asked_for_and_shorten_text(size):
    made = learned(size)
    assert made.vocab_size == size == len({made.token_bytes(i) for i in range(size)})
    assert len(made.encode(LEARNED_FROM)) <= len(LEARNED_FROM.encode()) * {257: 1, 500: 0.6, 1000: 0.5}[size]


def test_too_small_a_vocabulary_is_one_sentence():
    with pytest.raises(ConfigError, match="--vocab_size=257 or more"):
        learned(256)
    with pytest.raises(ConfigError, match="must be more than the 500 ids"):
        vocabulary.extend(SMALL, vocabulary.Counter(), 400)


def test_learning_twice_gives_the_same_vocabulary():
    assert learned(500).vocabulary == SMALL.vocabulary


def test_ids_of_bytes_are_the_bytes_and_old_ids_stay():
    assert [SMALL.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert [GROWN.token_bytes(i) for i in range(500)] == [SMALL.token_bytes(i) for i in range(500)]
    new = [GROWN.token_bytes(i) for i in range(500, GROWN.vocab_size - 1)]
    assert new and all(vocabulary.is_korean(token) for token in new)


def test_seeds_become_tokens_and_a_text_that_lacks_them_costs_one_id_each():
    assert len(GROWN.encode("훈")) == 1 and len(SMALL.encode("훈")) == 3
    letters = vocabulary.korean_letters()
    assert len(letters) == 2 * 2350 and "①" in vocabulary.korean_symbols()
    assert learned(400, seeds=letters).vocabulary == learned(400).vocabulary, "too many seeds are left out"


def test_special_text_is_plain_text_unless_asked_for():
    for name, number in {END_OF_TEXT: SMALL.end_of_text, "<|korean|>": GROWN.vocab_size - 1}.items():
        assert number not in GROWN.encode(f"a{name}b") and GROWN.decode(GROWN.encode(name)) == name
        assert GROWN.encode(f"a{name}b", allow_special=True) == [97, number, 98]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=12))
def test_merge_spells_as_tiktoken_does(text):
    plain = tiktoken.Encoding("x", pat_str=r"(?s:.+)", mergeable_ranks=SMALL.ranks(), special_tokens={})
    assert merge(text.encode(), SMALL.ranks()) == plain.encode_ordinary(text)


def test_the_pieces_of_new_tokens_are_old_ids_that_spell_them():
    pieces = GROWN.pieces()
    assert len(pieces) == GROWN.vocab_size - 500
    for i, ids in enumerate(pieces):
        assert b"".join(map(SMALL.token_bytes, ids)) == GROWN.token_bytes(500 + i)


# ------------------------------------------------------------------------------------------------------------
# on disk and in checkpoints

def data_of(folder, made, text=KOREAN + ENGLISH):
    ids = made.encode(text * 4)
    dataset.write_dataset(folder, {"train": [ids], "val": [ids]}, made, "test_vocabulary.py")
    return folder


def test_a_vocabulary_is_a_file_beside_the_meta_which_has_its_hash(tmp_path):
    data_of(tmp_path, GROWN)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert "bpe" not in meta and meta["tokenizer_sha256"] == GROWN.meta()["tokenizer_sha256"]
    again = load(tmp_path)
    assert again.vocabulary == GROWN.vocabulary and again.encode(KOREAN) == GROWN.encode(KOREAN)
    assert dataset.check(tmp_path, 8, GROWN.vocab_size)


@pytest.mark.parametrize("damage", [lambda b: b.replace(b"<|korean|>", b"<|KOREAN|>", 1), lambda b: b[:-9],
                                    lambda b: b""])
def test_a_changed_vocabulary_is_one_sentence(tmp_path, damage):
    path = data_of(tmp_path, GROWN) / "tokenizer.json"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"tokenizer.json .*prepare the data set again") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("vocabulary", [
    None, [], {"tokens": "ab"}, {"tokens": ["a"]}, {"tokens": ["a"], "specials": {END_OF_TEXT: 1}},
    {"tokens": ["a", END_OF_TEXT], "specials": {END_OF_TEXT: 1}, "extends": -1}], ids=str)
def test_what_is_no_vocabulary_is_one_sentence(vocabulary):
    with pytest.raises(ConfigError):
        from_meta({"tokenizer": "bpe", "bpe": vocabulary})


@pytest.mark.parametrize("tokens", [["a", "a"], [3], ["한"]], ids=str)
def test_a_vocabulary_that_cannot_encode_every_text_is_one_sentence(tokens):
    made = from_meta({"tokenizer": "bpe", "bpe": {"tokens": [*tokens, END_OF_TEXT],
                                                  "specials": {END_OF_TEXT: len(tokens)}}})
    with pytest.raises(ConfigError):
        made.encode("a")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on byte pairs: .small its data, .grown data of the extended vocabulary, .other of another one."""
    folder = tmp_path_factory.mktemp("bpe")
    trainer = Trainer(folder, data_of(folder / "small", SMALL))
    trainer.grown, trainer.other = data_of(folder / "grown", GROWN), data_of(folder / "other", learned(490))
    trainer()
    return trainer


def sample(trainer, *argv, **keys):
    keys = {"out_dir": trainer.folder / "out", "device": "cpu", "dtype": "float32", "num_samples": 1,
            "max_new_tokens": 20, **keys}
    return Job("sample.py", [*words(**keys), *argv], trainer.folder, name="sample").wait()


def test_a_checkpoint_carries_its_vocabulary(trained):
    kept = trained.checkpoint()["tokenizer"]
    assert from_meta(kept).vocabulary == SMALL.vocabulary and kept["tokenizer_sha256"]
    result = sample(trained, "--start=국민은 ", tokenizer=trained.data)
    assert result.status == 0 and result.out.startswith("국민은 ")


def test_sampling_with_another_tokenizer_is_an_error_that_names_both(trained):
    names = [name_of(made.meta()) for made in (SMALL, learned(490))]
    one_sentence(sample(trained, tokenizer=trained.other), "sample.py", *names)


def test_training_on_with_another_tokenizer_is_an_error_that_names_both(trained):
    names = [name_of(made.meta()) for made in (SMALL, learned(490))]
    start = trained.folder / "out" / "ckpt.pt"
    one_sentence(trained(status=2, dataset=trained.other, init_from=start, out="b"), "train.py", *names)


def test_a_pretrained_model_grows_with_its_vocabulary_and_goes_on(trained):
    trained(dataset=trained.grown, init_from=trained.folder / "out" / "ckpt.pt", out="grown", max_iters=4)
    kept = trained.checkpoint("grown")
    assert kept["model_args"]["vocab_size"] == GROWN.vocab_size == len(kept["model"]["lm_head.weight"])
    trained.resume(out="grown", max_iters=6)
    assert "국민은" in sample(trained, "--start=국민은", out_dir=trained.folder / "grown").out


def test_gpt2s_weights_grow_to_an_extension_of_its_vocabulary(tmp_path, data, extended):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=50257)
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained(tmp_path / "gpt2")
    trainer = Trainer(tmp_path, data_of(tmp_path / "data", extended))
    model = {"n_layer": 1, "n_head": 2, "n_embd": 8}
    trainer(init_from=tmp_path / "gpt2", max_iters=1, learning_rate=0, min_lr=0, weight_decay=0, **model)
    rows = trainer.checkpoint()["model"]["transformer.wte.weight"]
    old = theirs.transformer.wte.weight.detach()
    assert len(rows) == extended.vocab_size and torch.equal(rows[:50257], old)
    assert torch.allclose(rows[50257], old[extended.pieces()[0]].mean(dim=0), atol=1e-6)
    sentence = trainer(status=2, init_from=tmp_path / "gpt2", dataset=data, out="b", **model)
    one_sentence(sentence, "train.py", "'gpt2'", "'byte'")


def test_a_new_row_is_the_mean_of_its_pieces_and_old_logits_stay():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=512), seed=1).eval()
    grown = pretrained.grow_vocabulary(model, 500, GROWN.pieces())
    rows, old = grown.lm_head.weight, model.lm_head.weight
    assert len(rows) == GROWN.vocab_size and grown.transformer.wte.weight is rows
    assert torch.equal(rows[:500], old[:500])
    for i, ids in enumerate(GROWN.pieces()):
        assert torch.allclose(rows[500 + i], old[ids].mean(dim=0))
    ids = torch.tensor([SMALL.encode(ENGLISH)[:32]])
    assert torch.equal(grown(ids)[0][..., :500], model(ids)[0][..., :500])


# ------------------------------------------------------------------------------------------------------------
# the scripts

@pytest.fixture(autouse=True)
def same_excepthook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def bilingual():
    return script("bilingual/prepare.py")


def files(tmp_path):
    for name, text in {"korean": KOREAN, "english": ENGLISH}.items():
        (tmp_path / name).write_text(text * 60, encoding="utf-8")
    return [f"--{name}={tmp_path / name}" for name in ("korean", "english")]


@pytest.mark.parametrize("tags", [False, True])
def test_korean_and_english_become_a_data_set_with_its_tokenizer(tmp_path, capsys, tags):
    out = tmp_path / "out"
    bilingual().main([*files(tmp_path), "--vocab_size=600", f"--out_dir={out}", f"--language_tags={tags}"])
    made = load(out)
    assert dataset.check(out, 32, made.vocab_size)
    said = capsys.readouterr().out
    assert "korean, held out" in said and "english, held out" in said and "tokens/char" in said
    texts = [made.decode(np.fromfile(out / f"{split}.bin", np.uint16)) for split in ("train", "val")]
    blocks = [block for text in texts for block in text.split(END_OF_TEXT) if block]
    assert tags == all(block.startswith(("<|korean|>", "<|english|>")) for block in blocks)
    for language, whole in {"korean": KOREAN * 60, "english": ENGLISH * 60}.items():
        own = [block for block in blocks if ("국민" in block) == (language == "korean")]
        assert "".join(own).replace(f"<|{language}|>", "") == whole


def test_an_extension_of_a_data_folders_vocabulary(tmp_path, capsys):
    folder = data_of(tmp_path / "old", SMALL)
    out = tmp_path / "out"
    bilingual().main([*files(tmp_path), "--vocab_size=560", f"--out_dir={out}", f"--extend={folder}"])
    made = load(out)
    assert made.extends == 500 and made.encode(ENGLISH) == SMALL.encode(ENGLISH)
    assert len(made.encode(KOREAN)) <= len(SMALL.encode(KOREAN))


@pytest.mark.parametrize("argv, expected", [
    ([], "--korean=FILE --english=FILE"),
    (["--korean=a", "--english=b", "--korean_share=1.0"], "korean_share"),
    (["--korean=a", "--english=b", "--extend=c", "--korean_share=0.5"], "leave one of them out"),
    (["--korean=no_such_file", "--english=b"], "does not exist")])
def test_bad_bilingual_command_lines_say_what_to_type(argv, expected):
    with pytest.raises(ConfigError, match=expected):
        bilingual().main(argv)


def test_a_share_of_korean_gives_korean_more_tokens(tmp_path, capsys):
    made = {}
    for share in (0.1, 0.9):
        bilingual().main([*files(tmp_path), "--vocab_size=330", f"--out_dir={tmp_path}/out",
                          f"--korean_share={share}"])
        made[share] = load(tmp_path / "out")
    assert len(made[0.9].encode(KOREAN)) < len(made[0.1].encode(KOREAN))
    assert len(made[0.9].encode(ENGLISH)) > len(made[0.1].encode(ENGLISH))


def test_a_network_that_swallows_packets_is_one_sentence_in_time(monkeypatch, tmp_path):
    monkeypatch.delenv("NANOCORTEX_GPT2_BPE", raising=False)
    monkeypatch.setattr(tokenizer, "BPE_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(tokenizer, "DOWNLOAD_SECONDS", 0.2)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(30))
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=r"TimeoutError.*NANOCORTEX_GPT2_BPE"):
        GPT2Tokenizer().encode("x")
    assert time.perf_counter() - started < 10


# ------------------------------------------------------------------------------------------------------------
# words that do not end

@pytest.mark.parametrize("abc", ["ACGT", "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", "가나다라"])
def test_a_word_that_does_not_end_is_learned_from_in_parts(capsys, abc):
    """Counted whole, a word takes the square of its length."""
    text = "".join(random.Random(0).choices(abc, k=20_500))
    words = vocabulary.count_words([text])
    assert "1 words of up to 20,500 characters" in capsys.readouterr().out
    assert max(map(len, words)) == vocabulary.LONGEST
    assert sum(len(word) * count for word, count in words.items()) == len(text)
    made, again = (vocabulary.learn(vocabulary.count_words([text]), 400) for _ in range(2))
    assert made.vocabulary == again.vocabulary and made.vocab_size == 400
    ids = made.encode(text + " " * 30)
    assert made.decode(ids) == text + " " * 30 and len(ids) < 0.95 * len(text.encode())


def test_words_of_usual_length_are_counted_as_before(capsys):
    text = "a b " + "c" * vocabulary.LONGEST + " a"
    assert vocabulary.count_words([text]) == {
        "a": 1, " b": 1, " " + "c" * (vocabulary.LONGEST - 1): 1, "c": 1, " a": 1}
    assert "characters" in capsys.readouterr().out
    assert vocabulary.count_words(["a" * vocabulary.LONGEST]) == {"a" * vocabulary.LONGEST: 1}
    assert capsys.readouterr().out == ""


LONG = {"DNA": "ACGT" * 100_000, "spaces": " " * 999_999, "spaces and a word": "a" + " " * 999_999 + "b",
        "line ends": "\n" * 999_999, "signs": "^" * 300_000, "Hangul": "가나" * 100_000,
        "a special in spaces": " " * 999_999 + "<|endoftext|>" + "\t" * 9_999}


@pytest.mark.parametrize("name", LONG)
def test_a_word_that_does_not_end_survives_byte_pairs(name):
    """Spaces in such numbers end the stack of tiktoken's regular expressions."""
    text = LONG[name]
    ids = SMALL.encode(text)
    assert SMALL.decode(ids) == text and SMALL.encode_many([text, "a"]) == [ids, SMALL.encode("a")]
    special = SMALL.encode(text, allow_special=True)
    assert SMALL.decode(special) == text and (SMALL.end_of_text in special) == ("<|endoftext|>" in text)
    assert SMALL.end_of_text not in ids


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab'! \n\t\x1f한<|>1", max_size=60))
def test_words_that_are_cut_by_themselves_give_the_same_ids(text):
    text += "<|endoftext|>" * (len(text) % 2) + text
    assert SMALL.encode_words(text) == SMALL.encode(text)
    assert SMALL.encode_words(text, set(SMALL.specials)) == SMALL.encode(text, allow_special=True)
