import pytest
import torch

from llmctl.quant.packing import n_words, pack, unpack


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 32), (5, 33), (4, 64), (7, 127)])
def test_unpacking_undoes_packing_for_every_width_and_odd_shapes(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    codes[0, 0] = 2**bits - 1
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (shape[0], n_words(shape[1], bits))
    assert torch.equal(unpack(words, bits, shape[1]), codes)


def test_codes_stand_in_the_words_from_the_lowest_bit_on_without_gaps() -> None:
    codes = torch.arange(32, dtype=torch.uint8)[None] % 8
    whole = sum(int(code) << (3 * place) for place, code in enumerate(codes[0]))
    words = [whole >> (32 * word) & 0xFFFFFFFF for word in range(3)]
    assert [int(word) & 0xFFFFFFFF for word in pack(codes, 3)[0]] == words


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_transposed_column_of_words_is_unpacked(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    column = torch.empty(1, 5, dtype=torch.int32).copy_(pack(codes, bits).T).T  # contiguous, but its last stride is 5
    assert torch.equal(unpack(column.contiguous(), bits, 4), codes)
