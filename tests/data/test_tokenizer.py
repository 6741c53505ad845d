"""Text survives every tokenizer, alone and streamed, and no vocabulary file can run code."""
import json
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configurator import ConfigError
from data import tokenizer
from data.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    StreamDecoder,
    from_meta,
    load,
    meta_of,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"            # one emoji of five code points
SAMPLES = ["", "plain", "한국어 문장", "\u1112\u1161\u11ab", "ㄱㄴㄷ", FAMILY, "a\0b",
           "<|endoftext|>", " \n\n\t x"]
CHARS = CharTokenizer(sorted(set("".join(SAMPLES))))
TEXT = st.one_of(st.text(), st.lists(st.sampled_from(SAMPLES)).map("".join))


@pytest.fixture(scope="module")
def gpt2():
    if not (SHARED / "gpt2_bpe").is_dir():
        pytest.skip(f"GPT-2's vocabulary is not in {SHARED}/gpt2_bpe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCORTEX_GPT2_BPE", str(SHARED / "gpt2_bpe"))
        made = GPT2Tokenizer()
        assert made.bpe.n_vocab == made.vocab_size
        return made


def streamed(made, ids):
    decoder = StreamDecoder(made)
    return [decoder.feed(i) for i in ids] + [decoder.flush()]


def assert_survives(made, text):
    ids = made.encode(text)
    assert made.decode(ids) == text and all(0 <= i < made.vocab_size for i in ids)
    assert b"".join(map(made.token_bytes, ids)) == text.encode()
    pieces = streamed(made, ids)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_any_text_survives_the_byte_tokenizer_whole_and_streamed(case, text):
    assert_survives(ByteTokenizer(), text)
    case()


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=CHARS.chars))
def test_any_text_survives_the_character_tokenizer_whole_and_streamed(case, text):
    assert_survives(CHARS, text)
    case()


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_any_text_survives_gpt2_whole_and_streamed(gpt2, case, text):
    assert_survives(gpt2, text)
    case()


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 255)))
def test_bytes_that_are_no_text_stream_as_they_decode(case, ids):
    assert "".join(streamed(ByteTokenizer(), ids)) == ByteTokenizer().decode(ids)
    case()


def test_a_stream_holds_a_character_back_until_it_is_whole():
    assert streamed(ByteTokenizer(), "한".encode()) == ["", "", "한", ""]
    assert streamed(ByteTokenizer(), "한".encode()[:2]) == ["", "", "\ufffd"]


def test_gpt2_gives_the_ids_openai_documents(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("it's 2 o'clock,\n\n  now") == [270, 338, 362, 267, 6, 15750, 11, 628, 220, 783]


def test_the_end_of_text_mark_is_plain_text_unless_asked_for(gpt2):
    assert 50256 not in gpt2.encode("a<|endoftext|>b")
    assert gpt2.encode("a<|endoftext|>b", allow_special=True) == [64, 50256, 65]
    assert gpt2.decode([50256]) == "<|endoftext|>"


def test_the_local_vocabulary_splits_words_as_tiktoken_does(gpt2):
    public = pytest.importorskip("tiktoken_ext.openai_public")
    import tiktoken
    text = "I'll  we've\t\n x1234 don't!! \u3000한글 \n \n end  "
    theirs = tiktoken.Encoding("theirs", pat_str=public.r50k_pat_str, special_tokens={},
                               mergeable_ranks=gpt2.bpe._mergeable_ranks)
    assert theirs.encode_ordinary(text) == gpt2.encode(text)


def test_gpt2_without_files_or_network_says_what_to_do(monkeypatch, tmp_path):
    import tiktoken

    def offline(name):
        raise OSError("Name or service not known")
    monkeypatch.delenv("NANOCORTEX_GPT2_BPE", raising=False)
    monkeypatch.setattr(tokenizer, "BPE_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ConfigError, match=r"NANOCORTEX_GPT2_BPE.*--tokenizer=byte"):
        GPT2Tokenizer().encode("x")


def test_a_folder_that_is_not_gpt2s_vocabulary_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NANOCORTEX_GPT2_BPE", str(tmp_path))
    with pytest.raises(ConfigError, match="does not hold GPT-2's"):
        GPT2Tokenizer().encode("x")
    for name in ("encoder.json", "vocab.bpe"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match="does not hold GPT-2's"):
        GPT2Tokenizer().encode("x")


def test_making_the_gpt2_tokenizer_loads_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCORTEX_GPT2_BPE", str(tmp_path / "absent"))
    assert from_meta({"tokenizer": "gpt2"}).vocab_size == 50257


def test_an_unknown_character_is_named_with_the_size_of_the_vocabulary():
    with pytest.raises(ConfigError, match=r"'z' \(U\+007A\).*3 characters"):
        CharTokenizer(list("abc")).encode("az")


@pytest.mark.parametrize("made", [ByteTokenizer(), CHARS, GPT2Tokenizer()], ids=["byte", "char", "gpt2"])
@pytest.mark.parametrize("token", [-1, 60000])
def test_an_id_outside_the_vocabulary_is_one_sentence(made, token):
    for use in (lambda: made.decode([token]), lambda: made.token_bytes(token)):
        with pytest.raises(ConfigError, match=f"token {token} is outside .* {made.vocab_size}"):
            use()


def test_half_a_surrogate_pair_is_one_sentence():
    with pytest.raises(ConfigError, match=r"character 1 .*not valid Unicode"):
        ByteTokenizer().encode("a\udcff")


@pytest.mark.parametrize("made", [ByteTokenizer(), CHARS, GPT2Tokenizer()], ids=["byte", "char", "gpt2"])
def test_meta_rebuilds_the_tokenizer_through_json(made):
    again = from_meta(json.loads(json.dumps(made.meta())))
    assert type(again) is type(made) and again.meta() == made.meta() and again.vocab_size == made.vocab_size


def test_a_misspelt_tokenizer_gets_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'byte'"):
        from_meta({"tokenizer": "bytes"})


@pytest.mark.parametrize("chars", [None, [], "abc", ["ab"], [1], ["a", "a"]])
def test_a_character_vocabulary_is_distinct_single_characters(chars):
    with pytest.raises(ConfigError, match="character vocabulary"):
        from_meta({"tokenizer": "char", "chars": chars})


def test_a_folder_without_meta_is_gpt2(tmp_path):
    assert isinstance(load(tmp_path), GPT2Tokenizer) and meta_of(tmp_path) == {}


def write_pickle(folder, content):
    (folder / "meta.pkl").write_bytes(pickle.dumps(content))


def test_nanogpts_meta_pkl_keeps_its_ids_in_any_order(tmp_path):
    itos = {0: "z", 1: "a", 2: "한"}
    write_pickle(tmp_path, {"vocab_size": 3, "itos": itos, "stoi": {c: i for i, c in itos.items()}})
    made = load(tmp_path)
    assert made.encode("a한z") == [1, 2, 0] and made.decode([0, 1]) == "za"
    assert meta_of(tmp_path)["vocab_size"] == 3


@pytest.mark.parametrize("content", [
    [1, 2], {"stoi": {"a": 1}}, {"stoi": {"a": "0"}}, {"stoi": {"a": [0]}}, {"stoi": 3}, {"vocab_size": "65"},
    {"vocab_size": 0}, {"stoi": {"a": 0}, "itos": {0: "b"}}, {"stoi": {"ab": 0}}], ids=str)
def test_a_meta_pkl_of_another_shape_is_one_sentence(tmp_path, content):
    write_pickle(tmp_path, content)
    with pytest.raises(ConfigError):
        meta_of(tmp_path)


def test_a_meta_file_that_names_no_tokenizer_is_not_taken_for_gpt2(tmp_path):
    write_pickle(tmp_path, {"vocab_size": 100})
    with pytest.raises(ConfigError, match="names no tokenizer"):
        load(tmp_path)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pickle_was_executed",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_payload_in_meta_pkl_does_not_execute(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    payload = pickle.dumps({"vocab_size": 65, "x": Payload()}, protocol)
    pickle.loads(payload)
    assert (tmp_path / "pickle_was_executed").is_dir(), "the payload must work where nothing stops it"
    (tmp_path / "pickle_was_executed").rmdir()
    (tmp_path / "meta.pkl").write_bytes(payload)
    with pytest.raises(ConfigError, match=r"mkdir.*refused"):
        load(tmp_path)
    assert not (tmp_path / "pickle_was_executed").exists()


@settings(max_examples=200, deadline=None)
@given(damage=st.binary(max_size=60), keep=st.integers(0, 40))
def test_a_damaged_meta_pkl_is_one_sentence(tmp_path_factory, damage, keep):
    folder = tmp_path_factory.mktemp("damaged")
    whole = pickle.dumps({"vocab_size": 2, "stoi": {"a": 0, "b": 1}})
    (folder / "meta.pkl").write_bytes(whole[:keep] + damage)
    try:
        meta_of(folder)
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("text", [
    "", "{", "[1]", "null", '{"vocab_size": "65"}', '{"tokenizer": 3}', '{"tokens": 7}', '{"vocab_size": -1}',
    '{"format": 2}', "\xff\xfe", "[" * 100000], ids=lambda text: text[:20])
def test_a_bad_meta_json_is_one_sentence(tmp_path, text):
    (tmp_path / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"meta.json") as caught:
        meta_of(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("text, expected", [("", False), ("plain", False), ("한국어 café", False),
                                            ("\u1112\u1161\u11ab", True), ("cafe\u0301", True),
                                            ("\u0915\u093f", False), ("\u1100", False), ("豈", False)])
def test_letters_in_parts_are_noticed_where_unicode_has_them_whole(text, expected):
    assert tokenizer.is_decomposed(text) == expected
