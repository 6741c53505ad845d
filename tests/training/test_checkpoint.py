"""Reading checkpoints: damaged ones are one sentence, hostile ones do nothing, good ones come back."""
import builtins
import gc
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from arms import ARMS, build
from conftest import Job, one_sentence, same, words

from configurator import ConfigError
from model import GPT, GPTConfig, build_model
from training import checkpoint

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
            model = build_model(loaded, path)
            checkpoint.load_optimizer(model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu"),
                                      loaded["optimizer"], path)
        except ConfigError as error:
            noticed += 1
            assert str(path) in str(error)
    assert noticed > count // 10


def test_a_checkpoint_reads_back_what_was_written(finished):
    saved = finished.checkpoint()
    model = build_model(saved, "here")
    same(model.state_dict(), saved["model"])
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    checkpoint.load_optimizer(optimizer, finished.checkpoint()["optimizer"], "here")
    same(optimizer.state_dict()["state"], saved["optimizer"]["state"])


def test_find_prefers_the_last_weights_to_go_on_and_the_best_to_sample(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no ckpt\.pt: train first"):
        checkpoint.find(tmp_path)
    (tmp_path / "ckpt_last.pt").touch()
    (tmp_path / "ckpt-000004.pt").touch()
    assert [path.name for path in checkpoint.find(tmp_path)] == ["ckpt_last.pt", "ckpt-000004.pt"]
    (tmp_path / "ckpt.pt").touch()
    (tmp_path / "ckpt-000008.pt").touch()
    (tmp_path / "ckpt-1000000.pt").touch()
    (tmp_path / "ckpt-of-a-friend.pt").touch()
    assert [path.name for path in checkpoint.find(tmp_path, resume=True)] == [
        "ckpt_last.pt", "ckpt.pt", "ckpt-1000000.pt", "ckpt-000008.pt", "ckpt-000004.pt"]
    assert checkpoint.find(tmp_path)[0].name == "ckpt.pt"


# -------------------------------------------------- the manifest --------------------------------------------

def saved(folder, saves=3, keep=3):
    """A folder with so many saves of a small state."""
    for n in range(1, saves + 1):
        checkpoint.save({"model": {"w": torch.full((2_000,), float(n))}, "model_args": {}, "iter_num": n,
                         "config": {"keep_checkpoints": keep}}, folder / "ckpt.pt", keep)
    checkpoint.VERIFIED.clear()
    return folder


def flip(content, rng):
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    return content


def cut(content, rng):
    return content[:rng.randrange(len(content))]


def zero_page(content, rng):
    """4 KiB of zeros where the weights are, or from anywhere in a file that holds no zeros."""
    at = rng.randrange(len(content) - 4096)
    content[at:at + 4096] = bytes(4096)
    return content


@pytest.mark.parametrize("count", [70, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", [flip, cut, zero_page], ids=lambda damage: damage.__name__)
def test_damage_is_noticed_and_the_checkpoint_before_it_is_used(tmp_path, capsys, case, damage, count):
    whole, rng = (saved(tmp_path) / "ckpt.pt").read_bytes(), random.Random(7)
    for _ in range(count):
        damaged = bytes(damage(bytearray(whole), rng))
        if damaged == whole:                                    # zeros over zeros
            continue
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        loaded, path = checkpoint.read(tmp_path)
        assert (loaded["iter_num"], path.name) == (2, "ckpt-000002.pt")
        assert (loaded["model"]["w"] == 2).all()
        said = capsys.readouterr().err
        assert said.startswith("note: ") and "ckpt.pt is damaged" in said and said.count("\n") == 1
        case()


def test_a_damaged_checkpoint_never_becomes_the_one_before(tmp_path):
    """The next save keeps what is intact, not the file that was found damaged."""
    path = saved(tmp_path) / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:-9])
    loaded, _ = checkpoint.read(tmp_path)
    checkpoint.save(loaded | {"iter_num": 9}, path, keep=3)
    assert [entry["iter_num"] for entry in checkpoint.entries(tmp_path)] == [9, 2, 1]
    path.unlink()
    assert checkpoint.read(tmp_path)[0]["iter_num"] == 2


def test_without_an_intact_checkpoint_every_one_is_named(tmp_path, case):
    for path in saved(tmp_path).glob("ckpt*.pt"):
        path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ConfigError, match=r"ckpt\.pt is damaged.*ckpt-000002\.pt is damaged.*ckpt-000001"):
        checkpoint.read(tmp_path)
    case()


def test_exchanged_files_are_noticed_and_the_newest_is_found(tmp_path, capsys):
    one, other = saved(tmp_path) / "ckpt.pt", tmp_path / "ckpt-000002.pt"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert checkpoint.read(tmp_path)[0]["iter_num"] == 1         # the one that is where it should be
    assert "they were exchanged" in capsys.readouterr().err
    (tmp_path / "ckpt-000001.pt").unlink()
    loaded, path = checkpoint.read(tmp_path)
    assert (loaded["iter_num"], path) == (3, other)
    assert "they were exchanged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "empty", "a flipped bit", "no JSON", "a list"])
def test_without_a_manifest_a_checkpoint_is_read_and_said_to_be_unverified(tmp_path, capsys, damage):
    manifest = saved(tmp_path) / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text({"empty": "", "a flipped bit": text.replace('"bytes": ', '"bytes": 1'),
                         "no JSON": text[:-3], "a list": "[]", "missing": ""}[damage], encoding="utf-8")
    if damage == "missing":
        manifest.unlink()
    assert checkpoint.read(tmp_path)[0]["iter_num"] == 3
    assert "is read unverified" in capsys.readouterr().err
    (tmp_path / "ckpt.pt").write_bytes(b"not a checkpoint")
    assert checkpoint.read(tmp_path)[0]["iter_num"] == 2         # damage that reading itself notices


def test_a_manifest_names_no_file_but_checkpoints_beside_it(tmp_path, case):
    outside = tmp_path / "precious.pt"
    outside.write_bytes(b"mine")
    folder = tmp_path / "out"
    folder.mkdir()
    saved(folder)
    for name in ("../precious.pt", str(outside), "ckpt-1/../../precious.pt", "ckpt-..pt", "", "ckpt-1.pt\n"):
        checkpoint.write_manifest(folder, [{"file": name, "iter_num": 1, "bytes": 4, "sha256": "0"}])
        assert checkpoint.entries(folder) == []
        checkpoint.save({"model": {}, "model_args": {}, "iter_num": 5}, folder / "ckpt.pt", keep=1)
        assert outside.read_bytes() == b"mine"
        case()


def of_run(run, n):
    return {"model": {"w": torch.full((2_000,), float(n))}, "model_args": {}, "iter_num": n, "run": run}


def saves(folder, numbers, keep=2, run="this"):
    for n in numbers:
        checkpoint.save(of_run(run, n), folder / "ckpt.pt", keep)
    checkpoint.VERIFIED.clear()


@pytest.mark.parametrize("name", ["ckpt-20.pt", "ckpt-000002.pt", "ckpt-000001.pt", "ckpt-0000003.pt",
                                  "ckpt-7.pt", "ckpt_last.pt", "ckpt-best.pt", "my.pt.tmp"])
def test_copies_by_hand_outlive_every_save(tmp_path, case, name):
    """A name that the manifest does not list is the user's, whatever it looks like and whenever it came."""
    for at in range(4):
        folder = tmp_path / f"after{at}"
        folder.mkdir()
        saves(folder, range(1, at + 1))
        listed = {entry["file"] for entry in checkpoint.entries(folder) or ()}
        if name in listed:                                      # then it is the run's own
            continue
        (folder / name).write_bytes(b"mine")
        saves(folder, range(at + 1, 8))
        checkpoint.sweep(folder)
        checkpoint.discard(folder / name)
        assert (folder / name).read_bytes() == b"mine"
        mine = {path.name for path in folder.glob("*.pt")} - {name}
        assert len(mine) == 2 and mine == {entry["file"] for entry in checkpoint.entries(folder)}
        (folder / "ckpt.pt").write_bytes(b"damaged")
        assert checkpoint.read(folder)[0]["iter_num"] == 6
        case()


def test_copies_by_hand_that_took_a_listed_name_outlive_every_save(tmp_path, case):
    saves(tmp_path, (1, 2), keep=3)
    (tmp_path / "ckpt-000001.pt").write_bytes(b"mine")
    saves(tmp_path, range(3, 9), keep=3)
    assert (tmp_path / "ckpt-000001.pt").read_bytes() == b"mine"
    case()


@pytest.mark.parametrize("copied", [True, False])
def test_a_copy_by_hand_of_the_same_run_is_the_last_resort(tmp_path, capsys, case, copied):
    """A copy, and a save of the same run that the manifest does not know; never another run's."""
    saves(tmp_path, range(1, 5))
    if copied:
        shutil.copy(tmp_path / "ckpt.pt", tmp_path / "ckpt-20.pt")
    else:
        torch.save(of_run("this", 4), tmp_path / "ckpt-20.pt")
    torch.save(of_run("another", 99), tmp_path / "ckpt-99.pt")
    (tmp_path / "ckpt.pt").write_bytes(b"damaged")
    assert checkpoint.read(tmp_path)[0]["iter_num"] == 3        # the listed one comes first
    (tmp_path / "ckpt-000003.pt").unlink()
    loaded, path = checkpoint.read(tmp_path)
    assert (loaded["iter_num"], path.name) == (4, "ckpt-20.pt")
    assert "ckpt-99.pt is of another run" in capsys.readouterr().err
    path.unlink()
    with pytest.raises(ConfigError, match=r"ckpt\.pt is damaged.*ckpt-99\.pt is of another run.*--init_"):
        checkpoint.read(tmp_path)
    assert checkpoint.read(tmp_path / "ckpt-99.pt")[0]["iter_num"] == 99        # named, it is read
    case()


def test_a_copy_by_hand_in_the_place_of_a_save_is_kept_under_another_name(train, case):
    train(max_iters=8)
    out = train.folder / "out"
    shutil.copy(out / "ckpt-000004.pt", train.folder / "at4.pt")
    for name in ("ckpt.pt", "ckpt_last.pt"):
        (out / name).write_bytes(b"mine" + name.encode())
    result = train.resume(max_iters=12)
    assert "ckpt.pt is kept as" in result.err and "iteration 4" in result.err
    for name in ("ckpt.pt", "ckpt_last.pt"):
        assert (out / f"{name}.aside-1").read_bytes() == b"mine" + name.encode()
    assert train.checkpoint()["iter_num"] == 12 and len(train.metrics()) == 13
    case()


def test_a_hundred_saves_keep_memory_and_file_descriptors_constant(tmp_path):
    proc = Path("/proc/self")
    if not proc.is_dir():
        pytest.skip("this system has no /proc to read memory and file descriptors from")

    def used():
        gc.collect()
        pages = int((proc / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(proc / "fd"))
    state = {"model": {"w": torch.ones(1_000_000)}, "model_args": {}}
    for n in range(110):
        checkpoint.save(state | {"iter_num": n}, tmp_path / "ckpt.pt", keep=2)
        if n == 9:
            memory, descriptors = used()
    after, descriptors_after = used()
    assert after - memory < 20 and descriptors_after == descriptors
    assert len(list(tmp_path.iterdir())) == 3


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(train):
    train(max_iters=12)
    path = train.folder / "out" / "ckpt.pt"
    assert {p.name for p in path.parent.glob("*.pt")} == {"ckpt.pt", "ckpt-000008.pt"}
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4                             # inside a tensor: only the hash can tell
    path.write_bytes(content)
    sampled = Job("sample.py", words(out_dir=path.parent, device="cpu", num_samples=1, max_new_tokens=3),
                  train.folder).wait()
    assert sampled.status == 0 and "Going on with" in sampled.err
    assert "iteration 8" in train.resume(max_iters=16).err
    train(out="whole")
    same(train.checkpoint(), train.checkpoint("whole"), skip=("seconds", "config", "run"))
    assert train.losses() == train.losses("whole")


def test_the_mask_buffers_of_an_old_nanogpt_checkpoint_are_left_out(tmp_path):
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=16), seed=0)
    state = {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}
    state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    torch.save({"model": state, "model_args": model.config.model_args()}, tmp_path / "ckpt.pt")
    loaded = build_model(checkpoint.load(tmp_path / "ckpt.pt"), tmp_path / "ckpt.pt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("arm", ["exits", "hierarchy", "qk_gain"])
def test_a_state_dict_names_each_tensor_once_and_older_spellings_load(tmp_path, arm):
    """The depth module stood there twice, as `through` too; that of hierarchy was called `hourglass`."""
    model = build(ARMS[arm], std=0.2)
    weights, args = model.state_dict(), model.config.model_args()
    assert not [key for key in weights if key.startswith("through.")]
    inner = {key: value for key, value in weights.items() if key.startswith(f"transformer.{arm}.")}
    assert inner or any(".attn.query_gain." in key for key in weights)
    older = weights | {key.replace(f"transformer.{arm}.", "through."): value for key, value in inner.items()}
    if arm == "hierarchy":
        older = {key.replace("transformer.hierarchy.", "transformer.hourglass."): older[key] for key in older}
    older = {key.replace(".query_gain.", ".sharpen."): value for key, value in older.items()}
    torch.save({"model": older, "model_args": args}, tmp_path / "ckpt.pt")
    same(build_model(*checkpoint.read(tmp_path)).state_dict(), weights)


def test_a_checkpoint_that_is_saved_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch, capfd):
    """Between manifest and file another process may save: sample.py beside a training run."""
    saves, sha_of = iter(range(1, 4)), checkpoint.sha_of

    def state(number):
        return {"model": {"w": torch.full((4,), float(number))}, "model_args": {}, "iter_num": number}

    checkpoint.save(state(0), tmp_path / "ckpt.pt", keep=2)

    def slowly(path):
        number = next(saves, None)
        if number:
            monkeypatch.setattr(checkpoint, "sha_of", sha_of)
            checkpoint.save(state(number), tmp_path / "ckpt.pt", keep=2)
            monkeypatch.setattr(checkpoint, "sha_of", slowly)
        return sha_of(path)

    monkeypatch.setattr(checkpoint, "sha_of", slowly)
    loaded, path = checkpoint.read(tmp_path)
    assert loaded["iter_num"] == 3 and path == tmp_path / "ckpt.pt" and capfd.readouterr().err == ""
