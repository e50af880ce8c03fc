from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from safeopt.evaluation import Decoding, evaluating, greedy_replies
from safeopt.evaluation.generation import cast_copy

PROMPTS = ["Hi", "A much longer prompt than the others", "Why?", "Name a colour."]


def test_batches_give_the_replies_of_single_prompts(tokenizer: Any, make_model: Callable) -> None:
    model = make_model(eos_token_id=None)
    alone = [greedy_replies(model, tokenizer, [prompt], Decoding(8))[0] for prompt in PROMPTS]
    together = greedy_replies(model, tokenizer, PROMPTS, Decoding(8, batch_size=3))
    assert together == alone
    assert len(set(alone)) > 1


def test_model_and_generators_are_left_as_they_were(tokenizer: Any, make_model: Callable) -> None:
    model = make_model()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    greedy_replies(model, tokenizer, PROMPTS, Decoding(4))
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_state_comes_back_after_an_error(make_model: Callable) -> None:
    model = make_model()
    model.train()
    state = torch.get_rng_state()

    def interrupted() -> None:
        with evaluating(model):
            torch.rand(1)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert model.training
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_cast_copy_keeps_ties_and_leaves_the_original(make_model: Callable) -> None:
    model = make_model(tie_word_embeddings=True)
    copied: Any = cast_copy(model, "bfloat16")
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32
    pairs = zip(model.parameters(), copied.parameters(), strict=True)
    assert all(torch.equal(a.bfloat16(), b) for a, b in pairs)


def test_replies_from_bf16_weights(tokenizer: Any, make_model: Callable) -> None:
    model = make_model(eos_token_id=None)
    cast = greedy_replies(model, tokenizer, PROMPTS, Decoding(4, dtype="bfloat16"))
    assert cast == greedy_replies(cast_copy(model, "bfloat16"), tokenizer, PROMPTS, Decoding(4))
    assert model.dtype == torch.float32


def test_bad_settings_name_the_remedy(tokenizer: Any, make_model: Callable) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Decoding(max_new_tokens=0)
    with pytest.raises(ValueError, match="bfloat16"):
        Decoding(dtype="bf61")
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="chat template"):
        greedy_replies(make_model(), bare, PROMPTS)


def test_no_reply_copies_the_vocabulary_matrix(tokenizer: Any, make_model: Callable) -> None:
    """A batched product with the head's matrix would copy it once a prompt."""
    model = make_model(eos_token_id=None)
    with torch.profiler.profile(record_shapes=True) as profile:
        greedy_replies(model, tokenizer, PROMPTS, Decoding(4, dtype="bfloat16"))
    vocabulary = model.get_output_embeddings().out_features
    shapes = [shape for event in profile.events() for shape in event.input_shapes or []]
    with_vocabulary = [shape for shape in shapes if vocabulary in shape]
    assert with_vocabulary
    assert not [shape for shape in with_vocabulary if len(shape) == 3 and min(shape) > 1]
    assert not model.get_output_embeddings()._forward_pre_hooks
