"""Keys and values in 8 bits: small, near to the float ones, and as movable as they are."""

import pytest
import torch

from llmctl.config import ModelConfig
from llmctl.model.cache import CACHES, Int8KVCache, KVCache
from llmctl.model.decode import Decoder
from llmctl.model.transformer import LanguageModel
from tests.model.test_decode import DECODERS, PAIRS, VARIANTS

SHAPE = ModelConfig(vocab_size=5, d_model=64, n_layers=3, n_heads=4, n_kv_heads=2)
LARGEST_ERROR = 0.03
"""Of hidden states, in the norm; those of these models are drawn wider than any that is trained."""


def filled(kind: type[KVCache], batch: int, numbers_BKSH: torch.Tensor) -> KVCache:
    cache = kind(SHAPE, batch, 8)
    for layer in range(SHAPE.n_layers):
        cache.write(layer, numbers_BKSH, numbers_BKSH.flip(2))
    cache.advance(numbers_BKSH.shape[2])
    return cache


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 100.0])[:, None, None]


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, (16 + 4) / 64), (torch.bfloat16, (16 + 4) / 32)])
def test_bytes(dtype: torch.dtype, share: float):
    plain, coded = (kind(SHAPE, 3, 8, dtype=dtype) for kind in (KVCache, Int8KVCache))
    assert plain.n_bytes == 3 * 2 * 3 * 2 * 8 * 16 * dtype.itemsize
    assert coded.n_bytes == share * plain.n_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_read_back_within_half_a_step_of_their_own_head(dtype: torch.dtype):
    numbers = drawn(3, 2, 5, 16)
    numbers[0, 0, 0] = 0.0
    cache = Int8KVCache(SHAPE, 3, 8, dtype=dtype)
    cache.write(1, numbers, numbers.flip(2))
    for found, expected in zip(cache.read(1, 0, 5), (numbers, numbers.flip(2)), strict=True):
        assert found.dtype == dtype
        step = expected.abs().amax(dim=-1, keepdim=True) / 127
        rounding = 0 if dtype == torch.float32 else 2**-8 * expected.abs()
        assert ((found.float() - expected).abs() <= 0.501 * step + rounding).all()


def test_what_is_no_number_stays_none():
    numbers = drawn(1, 2, 3, 16)
    numbers[0, 0, 1, 3], numbers[0, 1, 2, 0] = float("nan"), float("inf")
    found, _ = filled(Int8KVCache, 1, numbers).read(0, 0, 3)
    assert found.isfinite().all(dim=-1).tolist() == [[[True, False, True], [True, True, False]]]


@pytest.mark.parametrize("kind", CACHES.values())
def test_rows_are_chosen_and_taken_with_all_that_belongs_to_them(kind: type[KVCache]):
    cache = filled(kind, 3, drawn(3, 2, 5, 16))
    before = [cache.read(layer, 0, 5) for layer in range(3)]
    before = [tuple(part.clone() for part in pair) for pair in before]
    cache.select(torch.tensor([2, 0, 2, 1]))
    for layer, pair in enumerate(before):
        for found, expected in zip(cache.read(layer, 0, 5), pair, strict=True):
            assert torch.equal(found, expected[[2, 0, 2, 1]])
    other = kind(SHAPE, 2, 8)
    other.put(cache.taken(4), 1, 2, 3)
    for layer, pair in enumerate(before):
        for found, expected in zip(other.read(layer, 2, 5), pair, strict=True):
            assert torch.equal(found[1], expected[2, :, :3])
            assert not found[0].any()


@torch.no_grad()
def states(model: LanguageModel, kind: type[KVCache], ids_BT: torch.Tensor, parts, *, lean: bool, **ragged):
    """Return hidden states, parts of a text at a time."""
    cache, found, start = kind(model.config, len(ids_BT), 12, dtype=model.dtype), [], 0
    decoder = Decoder(model) if lean else None
    for size in parts:
        part = slice(start, start + size)
        more = {name: value[:, part] for name, value in ragged.items()}
        if decoder is None:
            found.append(model.hidden(ids_BT[:, part], cache=cache, **more))
        else:
            found.append(decoder.hidden(ids_BT[:, part], cache, **more))
        start += size
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoders_states_stay_near_however_a_text_is_cut(build, ids, name: str, is_ragged: bool):
    model, ragged = build(**VARIANTS[name]), {}
    is_text = torch.tensor([[1] * 9, [0] * 2 + [1] * 7]) == 1
    if is_ragged:
        documents_BT = is_text.long()
        ragged = {"documents_BT": documents_BT, "positions_BT": (documents_BT.cumsum(dim=1) - 1).clamp(min=0)}
    else:
        is_text = torch.ones_like(is_text)
    expected = states(model, KVCache, ids(2, 9), (9,), lean=False, **ragged)[is_text]
    whole = states(model, Int8KVCache, ids(2, 9), (9,), lean=False, **ragged)[is_text]
    assert 0 < (whole - expected).norm() < LARGEST_ERROR * expected.norm()
    for lean in (True, False):
        for parts in ((4, 3, 1, 1), (1,) * 9):
            got = states(model, Int8KVCache, ids(2, 9), parts, lean=lean, **ragged)[is_text]
            assert torch.allclose(got, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", PAIRS)
def test_over_an_encoder_its_keys_and_values_stay_float(build, ids, name: str):
    model = build(**VARIANTS[name])
    memory_BSD = model.encode(ids(2, 5))
    found = []
    for kind in (KVCache, Int8KVCache, Int8KVCache):
        cache, decoder = kind(model.config, 2, 12, dtype=model.dtype), Decoder(model) if len(found) == 2 else None
        parts = []
        for place in range(6):
            new, memory = ids(2, 6)[:, place : place + 1], None if place else memory_BSD
            if decoder is None:
                parts.append(model.decode(new, memory, cache=cache))
            else:
                parts.append(decoder.hidden(new, cache, memory_BSD=memory))
        found.append(torch.cat(parts, dim=1))
        assert cache.cross[0] is not None
        assert cache.cross[0][0].dtype == torch.float64
    expected, plain, lean = found
    assert 0 < (plain - expected).norm() < LARGEST_ERROR * expected.norm()
    assert torch.allclose(lean, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
