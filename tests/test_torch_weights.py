"""Reading .pth files: finding state dicts, and what is said of files that have none."""

import numpy as np
import pytest

from hmar_jax.autoencoders import convert
from hmar_jax.autoencoders.scales import PUBLISHED_SIDES, ScaleList
from hmar_jax.errors import InputError
from hmar_jax.io.state_dicts import StateDictReader
from hmar_jax.io.weight_files import load_state_dicts

MARKERS = {"tokenizer": "quantize.weight", "transformer": "pos"}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="reading .pth files needs torch")


@pytest.fixture
def save(torch, tmp_path):
    def save(value):
        torch.save(value, tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    return save


def test_a_state_dict(torch, save):
    path = save({"pos": torch.ones(2, dtype=torch.bfloat16), "count": torch.tensor([3]), "note": 1})
    found = load_state_dicts(path, MARKERS)
    assert found.keys() == {"transformer"} and found["transformer"].keys() == {"pos", "count"}
    assert found["transformer"]["pos"].dtype == np.float32
    assert found["transformer"]["count"].tolist() == [3]


def test_state_dicts_nested_in_a_trainers_checkpoint(torch, save):
    tokenizer = {"quantize.weight": torch.zeros(1), "pos": torch.zeros(2)}  # the first marker wins
    wrapped = {"module._orig_mod.pos": torch.ones(3)}
    again = {"pos": torch.ones(4)}
    path = save({"epoch": 3, "trainer": {"vae": tokenizer, "var": wrapped, "old": again}})
    with pytest.warns(UserWarning, match="took the weights trainer.var; it also has trainer.old"):
        found = load_state_dicts(path, MARKERS)
    assert found.keys() == {"tokenizer", "transformer"}
    assert found["tokenizer"].keys() == {"quantize.weight", "pos"}
    assert found["transformer"]["pos"].shape == (3,)  # the first one


def test_files_without_known_models(torch, save, tmp_path):
    with pytest.raises(InputError, match="contains no model of a known kind .*'pos' of a transf"):
        load_state_dicts(save({"a": torch.ones(2)}), MARKERS)
    with pytest.raises(InputError, match="none.pth: no such file"):
        load_state_dicts(tmp_path / "none.pth", MARKERS)
    with pytest.raises(InputError, match="must be a .pth file; got a directory"):
        load_state_dicts(tmp_path, MARKERS)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match="text.pth: not a file of PyTorch weights"):
        load_state_dicts(tmp_path / "text.pth", MARKERS)


def test_reader():
    rng = np.random.default_rng(0)
    state = {f"a.{i}.weight": rng.normal(size=(4, 3, 1, 1)) for i in (0, 11)} | {"a.0.bias": 0.0}
    r = StateDictReader(state)
    assert r.count(r"a\.(\d+)\.") == 12 and r.count(r"b\.(\d+)\.") == 0
    assert r.conv("a.0")["kernel"].shape == (1, 1, 3, 4)
    np.testing.assert_array_equal(r.conv1x1("a.0")["kernel"], state["a.0.weight"][:, :, 0, 0].T)
    assert "a.11.weight" in r and "a.11.bias" not in r
    with pytest.raises(InputError, match="the weights have no 'a.11.bias'"):
        r.conv("a.11")


# Scale lists of weights


def test_resolve_scales():
    sides = PUBLISHED_SIDES[512]
    assert convert.resolve_scales(10, 2240, None).sides == sides
    assert convert.resolve_scales(3, 14, (1, 2, 3)) == ScaleList((1, 2, 3))
    with pytest.raises(InputError, match="K=5 scales and L=66 tokens, .*: give scales"):
        convert.resolve_scales(5, 66, None)
    with pytest.raises(InputError, match="have K=2 and L=5, but these weights have K=2 .* L=10"):
        convert.resolve_scales(2, 10, (1, 2))


def test_scales_of_a_tokenizer_alone():
    state = {"quantize.ema_vocab_hit_SV": np.zeros((3, 8))}
    assert convert.tokenizer_scales(state, (1, 2, 5)).sides == (1, 2, 5)
    assert convert.tokenizer_scales({}, (1, 2)).sides == (1, 2)
    with pytest.raises(InputError, match="give the sides of its K=3 scales"):
        convert.tokenizer_scales(state)
    with pytest.raises(InputError, match="K=2 .* but these weights have K=3 scales"):
        convert.tokenizer_scales(state, (1, 2))
