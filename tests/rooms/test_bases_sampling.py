"""Decoding: the same answers as transformers' own, whatever the batch; and draws that follow the distribution."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from luthier.errors import LuthierError
from luthier.sampling.generate import Sampling, _choose, generate, stop_ids
from tests.tiny import FAMILIES, NATURAL, tiny, tiny_ids, tiny_tokenizer

DECODERS = [f for f in FAMILIES if NATURAL.get(f) != "classify"]
PROMPTS = [tiny_ids(1, n, n)[0].tolist() for n in (3, 9, 5, 12, 4)]
HALF = set(range(3, 30))


def theirs(model, prompt, steps):
    ids = torch.tensor([prompt])
    settings = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=0, decoder_start_token_id=0)
    model.generation_config.eos_token_id = None
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)[0].tolist()
    return out[1:] if model.config.is_encoder_decoder else out[len(prompt) :]


@pytest.mark.parametrize("family", DECODERS)
def test_equal_to_the_library_and_independent_of_the_batch(family):
    model, tokenizer = tiny(family), tiny_tokenizer()
    mine = generate(model, tokenizer, PROMPTS, 8, batch_size=5, stop=())
    assert mine == [theirs(model, p, 8) for p in PROMPTS]
    kept = generate(model, tokenizer, PROMPTS, 8, batch_size=2, stop=HALF, keep_stop=True)
    for answer, whole in zip(kept, mine, strict=True):
        end = next((at for at, token in enumerate(whole) if token in HALF), len(whole) - 1)
        assert answer == whole[: end + 1]
    bare = generate(model, tokenizer, PROMPTS, 8, batch_size=5, stop=HALF)
    assert bare == [a[:-1] if a[-1] in HALF else a for a in kept]


def test_draws_do_not_depend_on_the_batch_and_follow_the_seed():
    model, tokenizer = tiny(), tiny_tokenizer()
    how = Sampling(temperature=1.0, top_p=0.95, seed=3)
    one = generate(model, tokenizer, PROMPTS, 8, batch_size=1, stop=HALF, sampling=how)
    assert one == generate(model, tokenizer, PROMPTS, 8, batch_size=5, stop=HALF, sampling=how)
    assert one != generate(model, tokenizer, PROMPTS, 8, stop=HALF, sampling=Sampling(1.0, 0.95, seed=4))
    state = torch.get_rng_state()
    generate(model, tokenizer, PROMPTS, 2, sampling=how)
    assert torch.equal(state, torch.get_rng_state())


def test_draws_follow_the_distribution():
    share = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = (torch.arange(1000) + 0.5) / 1000
    logits = share.log().expand(1000, 4)

    def drawn(**settings):
        found = _choose(logits, Sampling(temperature=1.0, **settings), uniform)
        return torch.bincount(found, minlength=4) / 1000

    torch.testing.assert_close(drawn(), share, atol=2e-3, rtol=0)
    torch.testing.assert_close(drawn(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=2e-3, rtol=0)
    torch.testing.assert_close(drawn(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=2e-3, rtol=0)
    torch.testing.assert_close(drawn(top_p=0.01), torch.tensor([1.0, 0, 0, 0]))
    assert _choose(logits[:1], Sampling(1.0, 0.6), torch.tensor([1.0 - 1e-7])).item() == 1


def test_the_mode_is_restored_and_no_gradient_is_kept():
    model = tiny().train()
    generate(model, tiny_tokenizer(), PROMPTS, 2)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_stop_ids_come_from_everywhere():
    model = tiny()
    model.generation_config.eos_token_id = [2, 7]
    assert stop_ids(model, tiny_tokenizer()) == {2, 7}
    assert stop_ids(tiny(eos_token_id=9), None) == {9}


def test_what_does_not_fit():
    model, tokenizer = tiny(max_position_embeddings=16), tiny_tokenizer()
    assert [len(a) for a in generate(model, tokenizer, [[5] * 12], 20, stop=())] == [4]
    assert generate(model, tokenizer, [], 4) == []
    with pytest.raises(LuthierError, match="prompt 1 has 16 tokens, the model 16 positions"):
        generate(model, tokenizer, [[5], [5] * 16], 4)
    with pytest.raises(LuthierError, match="prompt 0 is empty"):
        generate(model, tokenizer, [[]], 4)


@pytest.mark.parametrize("family,room", [("llama", "max_position_embeddings"), ("gpt2", "n_positions")])
def test_an_answer_ends_where_the_models_positions_end_whatever_stands_beside_it(family, room):
    """Also beside a prompt that leaves hardly any room, which has ended long before."""
    model, tokenizer = tiny(family, **{room: 16}), tiny_tokenizer()
    prompts = [[5, 6], [7] * 15, [8] * 9, [9] * 6, [4] * 3]
    alone = [generate(model, tokenizer, [p], 50, stop=())[0] for p in prompts]
    assert [len(a) for a in alone] == [16 - len(p) for p in prompts]
    assert generate(model, tokenizer, prompts, 50, stop=()) == alone
