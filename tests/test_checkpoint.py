"""Reading checkpoints: damaged ones are one sentence, hostile ones do nothing, good ones come back."""
import builtins
import pickle
import random
import zipfile

import pytest
import torch
from conftest import Job, one_sentence, same, words

import checkpoint
from configurator import ConfigError
from model import GPT, GPTConfig

# -------------------------------------------------- damaged or hostile --------------------------------------

class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return builtins.exec, (f"open({str(self.path)!r}, 'w').close()",)


def rewritten(path, **changes):
    """The checkpoint with other values; None removes a key."""
    saved = torch.load(path, weights_only=True) | changes
    torch.save({key: value for key, value in saved.items() if value is not None}, path)


def change_bytes(change):
    def damage(path):
        content = bytearray(path.read_bytes())
        path.write_bytes(bytes(change(content)))
    return damage


def flip_in_pickle(content):
    """One bit of the first opcode stream, where the names and shapes are."""
    at = content.index(b"model_args")
    content[at + 2] ^= 1
    return content


def resave(**changes):
    return lambda path: rewritten(path, **changes)


def wider_weights(path):
    saved = torch.load(path, weights_only=True)
    saved["model"]["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(3, 3)
    torch.save(saved, path)


def pickle_bomb(path):
    path.write_bytes(pickle.dumps({"model": Bomb(path.with_name("executed")), "model_args": {}}))


def zip_bomb(path):
    torch.save({"model": Bomb(path.with_name("executed")), "model_args": {}, "iter_num": 1}, path)


WEIGHTS_DAMAGED = {
    "empty": change_bytes(lambda b: b""),
    "one byte": change_bytes(lambda b: b[:1]),
    "half": change_bytes(lambda b: b[:len(b) // 2]),
    "last byte missing": change_bytes(lambda b: b[:-1]),
    "zeros": change_bytes(lambda b: bytes(len(b))),
    "first page zero": change_bytes(lambda b: bytes(4096) + b[4096:]),
    "last page zero": change_bytes(lambda b: b[:-4096] + bytes(4096)),
    "a bit in its names": change_bytes(flip_in_pickle),
    "text": change_bytes(lambda b: b"Once upon a time there was a checkpoint.\n" * 99),
    "an empty zip": lambda path: zipfile.ZipFile(path, "w").close(),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "a list": lambda path: torch.save([1, 2], path),
    "an empty dict": lambda path: torch.save({}, path),
    "weights only": lambda path: torch.save(torch.load(path, weights_only=True)["model"], path),
    "other shapes": wider_weights,
    "no model": resave(model=None),
    "no model_args": resave(model_args=None),
    "model is a list": resave(model=[1]),
    "an empty model": resave(model={}),
    "weights are numbers": resave(model={"transformer.wte.weight": 3}),
    "unknown model_args": resave(model_args={"n_lair": 3}),
    "model_args of other types": resave(model_args={"n_layer": "three"}),
    "impossible model_args": resave(model_args={"n_layer": 1, "n_head": 3, "n_embd": 16}),
    "a pickle that executes": pickle_bomb,
    "a zip that executes": zip_bomb,
}
RUN_DAMAGED = {
    "no optimizer": resave(optimizer=None),
    "optimizer is a list": resave(optimizer=[]),
    "an empty optimizer": resave(optimizer={}),
    "an optimizer of another model": resave(optimizer={"state": {},
                                                       "param_groups": [{"params": [0]}, {"params": [1]}]}),
    "an optimizer without state": resave(optimizer={"param_groups": []}),
    "no iter_num": resave(iter_num=None),
    "iter_num is text": resave(iter_num="16"),
    "no best_val_loss": resave(best_val_loss=None),
    "no config": resave(config=None),
    "config of other types": resave(config={"batch_size": "many"}),
    "config out of range": resave(config={"batch_size": -1}),
}


@pytest.fixture
def copy(finished, train):
    """A finished run's folder to damage."""
    (train.folder / "out").mkdir()
    path = train.folder / "out" / "ckpt.pt"
    path.write_bytes((finished.folder / "out" / "ckpt.pt").read_bytes())
    return path


@pytest.mark.parametrize("damage", (WEIGHTS_DAMAGED | RUN_DAMAGED).values(),
                         ids=(WEIGHTS_DAMAGED | RUN_DAMAGED).keys())
def test_resuming_from_a_damaged_checkpoint_is_one_sentence(train, copy, damage):
    damage(copy)
    one_sentence(train.resume(max_iters=20, status=2), "train.py")
    assert not copy.with_name("executed").exists()


@pytest.mark.parametrize("damage", WEIGHTS_DAMAGED.values(), ids=WEIGHTS_DAMAGED.keys())
def test_sampling_from_a_damaged_checkpoint_is_one_sentence(copy, damage):
    damage(copy)
    result = Job("sample.py", words(out_dir=copy.parent, device="cpu", max_new_tokens=2, num_samples=1),
                 copy.parent.parent).wait()
    one_sentence(result, "sample.py", str(copy))
    assert not copy.with_name("executed").exists()


def test_resuming_with_moments_of_another_shape_is_one_sentence(train, copy):
    saved = torch.load(copy, weights_only=True)
    saved["optimizer"]["state"][2]["exp_avg"] = torch.zeros(7, 7)
    torch.save(saved, copy)
    one_sentence(train.resume(max_iters=20, status=2), "train.py", "exp_avg of shape (7, 7)")


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_flipped_bit_outside_the_tensors_is_noticed_or_harmless(finished, tmp_path, count):
    """Loading works or is a ConfigError. Bits inside tensor data are out of scope: torch.load checks no
    sums, so a flip there is read as another number; a hash beside the file would be needed."""
    content, path = (finished.folder / "out" / "ckpt.pt").read_bytes(), tmp_path / "flipped.pt"
    rng, noticed = random.Random(1), 0
    pickled = content.index(b"PK\x03\x04", 10)
    places = [*range(pickled), *range(len(content) - 2000, len(content))]
    for _ in range(count):
        at, bit = rng.choice(places), 1 << rng.randrange(8)
        path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1:])
        try:
            loaded = checkpoint.load(path, resume=True)
            model = checkpoint.build_model(loaded, path)
            checkpoint.load_optimizer(model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu"),
                                      loaded["optimizer"], path)
        except ConfigError as error:
            noticed += 1
            assert str(path) in str(error)
    assert noticed > count // 10


def test_a_checkpoint_reads_back_what_was_written(finished):
    saved = finished.checkpoint()
    model = checkpoint.build_model(saved, "here")
    same(model.state_dict(), saved["model"])
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    checkpoint.load_optimizer(optimizer, finished.checkpoint()["optimizer"], "here")
    same(optimizer.state_dict()["state"], saved["optimizer"]["state"])


def test_find_prefers_the_last_weights_to_go_on_and_the_best_to_sample(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no ckpt\.pt: train first"):
        checkpoint.find(tmp_path)
    (tmp_path / "ckpt_last.pt").touch()
    assert checkpoint.find(tmp_path).name == "ckpt_last.pt"
    (tmp_path / "ckpt.pt").touch()
    assert checkpoint.find(tmp_path).name == "ckpt.pt"
    assert checkpoint.find(tmp_path, resume=True).name == "ckpt_last.pt"


def test_the_mask_buffers_of_an_old_nanogpt_checkpoint_are_left_out(tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=16), seed=0)
    state = {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    torch.save({"model": state, "model_args": model.config.model_args()}, tmp_path / "ckpt.pt")
    loaded = checkpoint.build_model(checkpoint.load(tmp_path / "ckpt.pt"), tmp_path / "ckpt.pt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))
