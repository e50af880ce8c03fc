"""Passports as files: what they hold, what loading checks, what guarding with one does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import safeopt
from safeopt.passport import Passport, PassportError
from tests import zoo


@pytest.fixture
def anchors() -> safeopt.Anchors:
    return zoo.random_anchors(count=8)


@pytest.fixture
def model() -> nn.Module:
    return zoo.tied_llama()


@pytest.fixture
def path(model: nn.Module, anchors: safeopt.Anchors, tmp_path: Path) -> Path:
    file = tmp_path / "model.passport.safetensors"
    Passport.measure(model, anchors, model_name="little-llama", energy=0.9).save(file)
    return file


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """Write the file anew with other tensors or metadata, a whole safetensors file again."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def test_comes_back_as_it_was_measured(
    model: nn.Module, anchors: safeopt.Anchors, path: Path
) -> None:
    measured = Passport.measure(model, anchors, energy=0.9)
    loaded = Passport.load(path)
    assert loaded.header["model"]["name"] == "little-llama"
    assert loaded.header["certificate"] == measured.header["certificate"]
    assert loaded.subspace.reads == measured.subspace.reads
    step = zoo.random_step(model)
    one, two = ({name: s.clone() for name, s in step.items()} for _ in range(2))
    measured.subspace.remove_(one)
    loaded.subspace.remove_(two)
    for name, s in step.items():
        assert (one[name] - two[name]).norm() <= 2e-3 * s.norm()
    for basis in loaded.subspace.bases.values():
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0)


def test_holds_no_anchors_and_no_pickle(path: Path) -> None:
    loaded = Passport.load(path)
    assert set(loaded.header["anchors"]) == {"digest", "refuse", "comply"}
    assert loaded.header["anchors"]["refuse"] == 8
    tensors = load_file(path)
    kinds = {name.split("/")[0] for name in tensors}
    assert kinds == {"basis", "energy", "rows"}
    # Which tokens occur is known, in which order is not.
    assert all(t.dtype == torch.int64 for name, t in tensors.items() if name.startswith("rows/"))
    assert path.read_bytes()[8:9] == b"{"  # safetensors, not a zip or pickle


def test_loading_unpickles_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("something was unpickled")

    for module in ("pickle", "_pickle"):
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(f"{module}.{name}", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert Passport.load(path).header["model"]["name"] == "little-llama"


def test_certificate_is_of_anchors_that_were_held_out(
    model: nn.Module, anchors: safeopt.Anchors
) -> None:
    passport = Passport.measure(model, anchors, held_out=0.25, rank=3)
    certificate = passport.header["certificate"]
    assert certificate["probes"] == 2
    assert 0 <= certificate["lower_bound"] <= certificate["captured"] <= 1
    shares = passport.subspace.captured(model, anchors, [2, 6])
    assert certificate["captured"] == pytest.approx(float(shares.mean()), abs=1e-5)
    assert Passport.measure(model, anchors, held_out=0.0).header["certificate"] is None


def test_guards_a_training_run(model: nn.Module, anchors: safeopt.Anchors, path: Path) -> None:
    guard = safeopt.Guard.from_passport(model, path)
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)
    subspace = Passport.load(path).subspace
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [zoo.take_training_step(model, optimizer, torch.arange(40).view(4, 10))]
    losses += [zoo.take_training_step(model, optimizer, torch.arange(40).view(4, 10))]
    assert losses[1] < losses[0]
    moved = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    kept = {name: m.clone() for name, m in moved.items()}
    subspace.remove_(kept)
    for name, m in moved.items():
        torch.testing.assert_close(kept[name], m, atol=1e-6, rtol=0)
    assert guard.state_dict() == {"passport": Passport.load(path).digest}


def test_fits_the_model_in_bfloat16_and_a_peft_model(model: nn.Module, path: Path) -> None:
    half = zoo.tied_llama()
    half.load_state_dict(model.state_dict())
    safeopt.Guard.from_passport(half.bfloat16(), path)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))  # type: ignore[arg-type]
    guard = safeopt.Guard.from_passport(adapted, path)
    assert len(guard.pieces) == 4
    assert all("lora_A" in name for name in guard.pieces)


def test_names_what_differs(path: Path, model: nn.Module) -> None:
    with torch.no_grad():
        dict(model.named_parameters())["model.norm.weight"][3] += 0.1
    with pytest.raises(
        PassportError, match=r"little-llama.*other weights in 'model\.norm\.weight'"
    ):
        safeopt.Guard.from_passport(model, path)
    safeopt.Guard.from_passport(model, path, check_weights=False)
    with pytest.raises(PassportError, match=r"shape 97x48 of .*embed_tokens.*, not 97x32"):
        safeopt.Guard.from_passport(
            zoo.llama(tie_word_embeddings=True, hidden_size=48), path, check_weights=False
        )
    with pytest.raises(PassportError, match=r"no parameter 'model\.embed_tokens"):
        safeopt.Guard.from_passport(zoo.gpt2(), path)


def test_names_a_different_tokenizer(
    make_model: Callable[..., nn.Module], tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"prompt": p, "reply": "no"} for p in ("abc", "some other one", "x")]
    anchors = safeopt.Anchors.from_rows(rows, tokenizer)
    model, file = make_model(), tmp_path / "passport.safetensors"
    Passport.measure(model, anchors, tokenizer=tokenizer).save(file)
    safeopt.Guard.from_passport(model, file, tokenizer=tokenizer)
    template = tokenizer.chat_template
    tokenizer.chat_template = template + " "
    try:
        with pytest.raises(PassportError, match="the tokenizer's chat template"):
            safeopt.Guard.from_passport(model, file, tokenizer=tokenizer)
    finally:
        tokenizer.chat_template = template


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.5, 0.99])
def test_truncated_files_fail_cleanly(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(PassportError, match="cut short"):
        Passport.load(path)


def test_any_flipped_byte_is_noticed(path: Path) -> None:
    content = path.read_bytes()
    for position in torch.randint(8, len(content), (40,)).tolist():
        changed = bytearray(content)
        changed[position] ^= 0x11
        path.write_bytes(bytes(changed))
        with pytest.raises(PassportError):
            Passport.load(path)
    path.write_bytes(content)
    Passport.load(path)


def test_changed_tensors_and_headers_are_noticed(path: Path) -> None:
    def change_tensor(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        del metadata
        tensors["basis/lm_head"][0, 0] += 0.5

    original = path.read_bytes()
    rewrite(path, change_tensor)
    with pytest.raises(PassportError, match="changed or damaged"):
        Passport.load(path)

    def change_header(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        del tensors
        metadata["header"] = metadata["header"].replace("little-llama", "other-llama")

    path.write_bytes(original)
    rewrite(path, change_header)
    with pytest.raises(PassportError, match="changed or damaged"):
        Passport.load(path)


def test_other_schemas_formats_and_missing_files(path: Path, tmp_path: Path) -> None:
    def newer(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        del tensors
        metadata["header"] = json.dumps({**json.loads(metadata["header"]), "schema": 99})

    rewrite(path, newer)
    with pytest.raises(PassportError, match=r"schema 99.*upgrade safeopt-llm"):
        Passport.load(path)
    other = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(2)}, other)
    with pytest.raises(PassportError, match="no passport"):
        Passport.load(other)
    with pytest.raises(FileNotFoundError, match="no passport at"):
        Passport.load(tmp_path / "nothing")


def test_parameters_without_a_rule_are_refused(anchors: safeopt.Anchors) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.big = zoo.llama(), nn.Parameter(torch.zeros(1 << 19))

        def forward(self, ids: torch.Tensor) -> Any:
            return self.inner(ids)

    with pytest.raises(ValueError, match=r"no rule covers .*'big'"):
        Passport.measure(Odd(), anchors)


def test_a_finer_passport_comes_back_as_it_was_measured(
    model: nn.Module, anchors: safeopt.Anchors, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"method": "KroneckerSubspace", "energy": 0.9, "grid": 0.8}
    measured = Passport.measure(model, anchors, **settings)
    file = tmp_path / "finer.safetensors"
    measured.save(file)
    loaded = Passport.load(file)
    assert loaded.header["method"]["type"] == "KroneckerSubspace"
    assert 0 < loaded.header["certificate"]["captured"] <= 1
    step = zoo.random_step(model)
    one, two = ({name: s.clone() for name, s in step.items()} for _ in range(2))
    measured.subspace.remove_(one)
    loaded.subspace.remove_(two)
    for name, s in step.items():
        assert (one[name] - two[name]).norm() <= 4e-3 * s.norm()
    guard = safeopt.Guard.from_passport(model, file)
    optimizer = safeopt.SafeAdamW(model.named_parameters(), lr=1e-2, guard=guard)
    losses = [
        zoo.take_training_step(model, optimizer, torch.arange(40).view(4, 10)) for _ in range(2)
    ]
    assert losses[1] < losses[0]
    with pytest.raises(PassportError, match=r"InputSubspace, KroneckerSubspace, got 'Dense"):
        Passport.measure(model, anchors, method="DenseSubspace")
